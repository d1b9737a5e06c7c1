"""Items -> ArrayRecord shards with a manifest: a killed run goes on, nothing is half-written.

Shards are made in `DEST/.unfinished/`, each with a small JSON beside it once it is complete; when
all are there they move to DEST and the manifest follows as the last file. What stands under its
final name is whole.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import rich.progress
from array_record.python import array_record_module

from clip_jax.data import images, records
from clip_jax.data.tables import Rejected, Rejection

VERSION = 3  # raise it whenever the same source would give other records
REJECTED = "rejected.jsonl"
_WORK = ".unfinished"
_SHARD = re.compile(r"\w+-\d{5}-of-\d{5}\.array_record")


class PrepareError(ValueError):
  """The data cannot be prepared: what is wrong, where, what to do."""


@dataclasses.dataclass(frozen=True)
class Item:
  """A record to be. `load` makes it or raises Rejected or ImageError.

  It is written to every split of `splits` and counted once. `origins` names the inputs that it
  stands for (rows of a table), where that is not its key alone.
  """

  key: str
  splits: tuple[str, ...]
  load: Callable[[], records.Record]
  origins: tuple[str, ...] = ()

  @property
  def inputs(self) -> tuple[str, ...]:
    return self.origins or (self.key,)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What there is to write, and what is already known to be left out."""

  items: Sequence[Item] = ()
  rejected: Sequence[Rejection] = ()
  classes: Sequence[str] = ()
  notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # into the manifest
  # In place of items, where they are too many to hold: what makes those of each shard of "train".
  parts: Sequence[Callable[[], Sequence[Item]]] = ()


@dataclasses.dataclass(frozen=True)
class Job:
  """A data set: its description for the manifest, and how to plan it.

  `settings` and `source` (what was read, by name, with its sha256) are its identity: a finished
  folder of the same identity is left alone, an unfinished one goes on.
  """

  name: str
  description: str
  licence: str
  source: Mapping[str, str]
  settings: Mapping[str, Any]
  plan: Callable[[rich.progress.Progress], Plan]

  @property
  def identity(self) -> dict[str, Any]:
    return {**request(self.name, self.settings), "source": dict(self.source)}


def request(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
  """The part of an identity that is known before the source is."""
  return {"version": VERSION, "name": name, "settings": dict(settings)}


def finished(folder: pathlib.Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
  """The manifest of a complete data set in `folder` whose identity has these fields, or None."""
  try:
    manifest = records.read_manifest(folder)
    parts = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    whole = all((folder / s["file"]).stat().st_size == s["bytes"] for s in parts)
    found = manifest["identity"]
  except (records.RecordError, KeyError, TypeError, AttributeError, OSError):
    return None
  same = all(found.get(key) == value for key, value in identity.items())
  return manifest if whole and same else None


def write(
  job: Job, folder: pathlib.Path, shard_records: int, progress: rich.progress.Progress
) -> dict[str, Any]:
  """Makes the shards that are not there yet, then the manifest, which it returns.

  Raises: PrepareError when nothing is kept, when another process writes to the same folder, or
    when a shard cannot be written; OSError of the file system.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with _alone_in(folder):
    work = _work_folder(folder, {**job.identity, "shard_records": shard_records})
    plan = job.plan(progress)
    _check_keys(plan.items)
    done = _write_splits(plan, folder, work, shard_records, progress)
    shards = [shard for split in done.values() for shard in split]
    rejected = [*plan.rejected, *(Rejection(*r) for shard in shards for r in shard["rejected"])]
    if not any(shard["records"] for shard in shards):
      shutil.rmtree(work)
      counts = ", ".join(f"{n} {reason}" for reason, n in _count(rejected).items()) or "no input"
      named = "".join(f"\n  {r.key}: {r.reason} {r.detail}" for r in rejected[:10])
      raise PrepareError(f"{folder}: nothing was kept ({counts}); nothing is written{named}")
    manifest = _manifest(job, plan, done, rejected)
    _publish(folder, work, manifest, rejected)
  return manifest


def _manifest(
  job: Job,
  plan: Plan,
  done: Mapping[str, Sequence[Mapping[str, Any]]],
  rejected: Sequence[Rejection],
) -> dict[str, Any]:
  kept = sum(shard["kept"] for shards in done.values() for shard in shards)
  fields = ("file", "records", "bytes", "sha256")
  return {
    "format": records.MANIFEST_FORMAT,
    "name": job.name,
    "description": job.description,
    "licence": job.licence,
    "identity": job.identity,
    "inputs": kept + len(rejected),
    "kept": kept,
    "rejected": _count(rejected),
    **plan.notes,
    "classes": list(plan.classes),
    "splits": {
      split: {
        "records": sum(shard["records"] for shard in shards),
        "captions": sum(shard["captions"] for shard in shards),
        "shards": [{field: shard[field] for field in fields} for shard in shards],
      }
      for split, shards in done.items()
    },
  }


def _count(rejected: Sequence[Rejection]) -> dict[str, int]:
  return dict(Counter(r.reason for r in rejected).most_common())


def _check_keys(items: Sequence[Item]) -> None:
  repeated = [key for key, n in Counter(item.key for item in items).items() if n > 1]
  if repeated:
    raise PrepareError(f"keys that stand more than once: {', '.join(repeated[:10])}")


def _work_folder(folder: pathlib.Path, identity: Mapping[str, Any]) -> pathlib.Path:
  """The folder of unfinished shards; emptied when they belong to another source or setting."""
  work = folder / _WORK
  marker, text = work / "identity.json", json.dumps(identity, sort_keys=True)
  if not (marker.is_file() and marker.read_text(encoding="utf-8") == text):
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    replace(marker, text.encode())
  return work


def _write_splits(
  plan: Plan,
  folder: pathlib.Path,
  work: pathlib.Path,
  shard_records: int,
  progress: rich.progress.Progress,
) -> dict[str, list[dict[str, Any]]]:
  splits: dict[str, list[Item]] = {}
  for item in plan.items:
    for split in item.splits:
      splits.setdefault(split, []).append(item)
  shards: dict[str, Sequence[Sequence[Item] | Callable[[], Sequence[Item]]]] = {
    split: [own[start : start + shard_records] for start in range(0, len(own), shard_records)]
    for split, own in splits.items()
  }
  total = None if plan.parts else sum(map(len, splits.values()))
  task = progress.add_task("writing", total=total)
  done: dict[str, list[dict[str, Any]]] = {}
  for split, parts in (shards or {"train": plan.parts}).items():
    done[split] = []
    for number, part in enumerate(parts):
      name = f"{split}-{number:05d}-of-{len(parts):05d}.array_record"
      found = _already(folder, work, name)
      if found:
        progress.advance(task, found["records"] + len(found["rejected"]))
      items = () if found else part() if callable(part) else part
      done[split].append(found or _write_shard(items, split, work / name, progress, task))
  return done


def _already(folder: pathlib.Path, work: pathlib.Path, name: str) -> dict[str, Any] | None:
  """What an earlier run noted of this shard, if the shard is still there as it was."""
  try:
    entry = json.loads((work / f"{name}.json").read_text(encoding="utf-8"))
  except (FileNotFoundError, ValueError):
    return None
  for path in (work / name, folder / name):
    if (
      path.is_file() and path.stat().st_size == entry["bytes"] and _sha256(path) == entry["sha256"]
    ):
      return entry
  return None


def _write_shard(
  items: Sequence[Item],
  split: str,
  path: pathlib.Path,
  progress: rich.progress.Progress,
  task: rich.progress.TaskID,
) -> dict[str, Any]:
  """Writes one shard and, once it is complete, its entry. Returns the entry."""
  temporary = path.with_name(path.name + ".tmp")
  kept, written, written_captions, rejected = 0, 0, 0, []
  try:
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
    for item in items:
      counted = split == item.splits[0]
      try:
        record = item.load()
        writer.write(records.pack(record))
        written, kept = written + 1, kept + counted * len(item.inputs)
        written_captions += len(record.captions)
      except (Rejected, images.ImageError, UnicodeEncodeError) as error:
        reason = _reason(error)
        rejected += [[name, reason, str(error)] for name in item.inputs if counted]
      progress.advance(task)
    writer.close()
    reader = array_record_module.ArrayRecordReader(str(temporary))
    if reader.num_records() != written:
      raise RuntimeError(f"holds {reader.num_records()} records after {written} were written")
  except RuntimeError as error:  # what ArrayRecord raises when the disk is full, and for all else
    raise PrepareError(
      f"{temporary}: cannot be written ({error}); make room or give leave to write, then run the "
      "same command again: finished shards are kept"
    ) from error
  _sync(temporary)
  entry = {
    "file": path.name,
    "records": written,
    "bytes": temporary.stat().st_size,
    "sha256": _sha256(temporary),
    "captions": written_captions,
    "kept": kept,
    "rejected": rejected,
  }
  os.replace(temporary, path)
  replace(path.with_name(path.name + ".json"), json.dumps(entry).encode())
  return entry


def _reason(error: Rejected | images.ImageError | UnicodeEncodeError) -> str:
  if isinstance(error, Rejected):
    return error.reason
  return error.cause if isinstance(error, images.ImageError) else "encoding"


def _publish(
  folder: pathlib.Path,
  work: pathlib.Path,
  manifest: Mapping[str, Any],
  rejected: Sequence[Rejection],
) -> None:
  """Moves everything to its final name, the manifest last; an older data set makes way."""
  (folder / records.MANIFEST).unlink(missing_ok=True)
  names = {shard["file"] for split in manifest["splits"].values() for shard in split["shards"]}
  for path in folder.iterdir():
    if _SHARD.fullmatch(path.name) and path.name not in names:
      path.unlink()
  for name in sorted(names):
    if (work / name).exists():  # else an earlier run has moved it
      os.replace(work / name, folder / name)
  lines = (json.dumps(dataclasses.asdict(r), ensure_ascii=False) + "\n" for r in rejected)
  replace(folder / REJECTED, "".join(lines).encode("utf-8", "backslashreplace"))
  text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
  replace(folder / records.MANIFEST, text.encode("utf-8", "backslashreplace"))
  shutil.rmtree(work)


@contextlib.contextmanager
def _alone_in(folder: pathlib.Path) -> Iterator[None]:
  """Holds the folder for this process. Raises: PrepareError when another one has it."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
        raise PrepareError(f"{folder}: another process is preparing data here; wait") from None
    yield  # a file system without locks is no reason to stop
  finally:
    os.close(handle)


def replace(path: pathlib.Path, data: bytes) -> None:
  """Writes a small file whole: under a temporary name, onto the disk, then under its own."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_bytes(data)
  _sync(temporary)
  os.replace(temporary, path)


def _sync(path: pathlib.Path) -> None:
  with path.open("rb") as file:
    os.fsync(file.fileno())


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
