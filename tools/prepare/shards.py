"""A job -> ArrayRecord shards with a manifest: a killed run goes on, nothing is half-written.

Where a pair's place depends on other pairs (duplicates, evaluation sets, a validation split) all
are looked at first, see `look.py`; else shards are written in one pass. Either pass is a list of
tasks for an engine (`parallel.py`, `cluster.py`), done in `DEST/.unfinished/`. When all shards are
there they move to DEST and the manifest follows as the last file. What stands under its final
name is whole.
"""

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import pathlib
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import rich.progress

from clip_jax.data import records
from clip_jax.data.tables import Rejection
from tools.prepare import files, parallel, shard_file, sheet, standing
from tools.prepare.jobs import Item, Job, Plan, PrepareError
from tools.prepare.passes import Choices, Looked, Passes
from tools.prepare.source import PART_RECORDS

REJECTED = "rejected.jsonl"
_SHARD = re.compile(r"\w+-\d{5,}-of-\d{5,}\.array_record")
_NAMED = 10  # of what was left out, where nothing was kept


def identity(job: Job, choices: Choices) -> dict[str, Any]:
  """What a finished folder must be of to be left alone."""
  return {**job.identity, "settings": {**job.settings, **choices.settings}}


def write(
  job: Job,
  folder: pathlib.Path,
  shard_records: int,
  progress: rich.progress.Progress,
  choices: Choices | None = None,
  engine: parallel.Engine = parallel.here,
  force: bool = False,
) -> dict[str, Any]:
  """Makes the shards that are not there yet, then the manifest, which it returns.

  Shards have `shard_records` records (0: 10,000, or what their part of the plan has). The same
  files come out whatever the engine and however often a run before was killed. `force`: a data set
  of another source or other settings makes way.
  Raises: PrepareError when one is there without `force`, when nothing is kept, when another process
    writes to the same folder, or when a shard cannot be written; OSError of the file system.
  """
  chosen = choices or Choices()
  own = identity(job, chosen)
  fresh = not folder.exists()
  folder.mkdir(parents=True, exist_ok=True)
  with _alone_in(folder):
    work = folder / standing.WORK
    try:
      standing.claim(folder, {**own, "shard_records": shard_records}, force)
      passes = Passes(folder, work, chosen, engine, progress)
      manifest = _made(job, own, passes, shard_records)
      _publish(folder, work, manifest)
    except Exception:
      standing.leave(folder, fresh)
      raise
  return manifest


def _made(job: Job, own: Mapping[str, Any], passes: Passes, shard_records: int) -> dict[str, Any]:
  """Everything but its final names. Returns the manifest. Raises: as `write`."""
  folder, work, looked = passes.folder, passes.work, None
  plan = job.plan(passes.progress)
  _check_keys(plan.items)
  size = shard_records or PART_RECORDS
  if passes.choices.looks_first or (plan.parts and shard_records):
    todo, looked = passes.looked(plan, size)
  else:
    todo = passes.planned(plan, size)
  passes.write(todo)
  done = [_entry(shard, folder) for shard in todo]
  rejected = _write_rejections(work / REJECTED, _rejections(plan, looked, todo, folder))
  if not any(entry["records"] for entry in done):
    words = _nothing_kept(work / REJECTED, rejected)
    shutil.rmtree(work)
    raise PrepareError(f"{folder}: nothing was kept {words}")
  splits: dict[str, list[dict[str, Any]]] = {}
  for shard, entry in zip(todo, done, strict=True):
    splits.setdefault(shard.split, []).append(entry)
  manifest = _manifest(job, own, plan, splits, rejected)
  sheet.write(work / sheet.NAME, manifest, splits, (work, folder))
  return manifest


def _entry(shard: shard_file.Shard, folder: pathlib.Path) -> dict[str, Any]:
  """What was noted of a shard that was just written, but for what was left out of it."""
  found = shard_file.entry(shard, folder, verify=False)
  if found is None:
    raise PrepareError(
      f"{shard.work / shard.name}: has gone while others were written; start again"
    )
  return {name: value for name, value in found.items() if name != "rejected"}


def _rejections(
  plan: Plan, looked: Looked | None, shards: Sequence[shard_file.Shard], folder: pathlib.Path
) -> Iterator[Rejection]:
  """All of them, in the order of the inputs; not in memory."""
  yield from plan.rejected
  if looked is not None:
    yield from looked.rejections()
  for shard in shards:
    found = shard_file.entry(shard, folder, verify=False) or {"rejected": ()}
    yield from (Rejection(*fields) for fields in found["rejected"])


def _write_rejections(path: pathlib.Path, rejections: Iterator[Rejection]) -> dict[str, int]:
  """A line each. Returns their number by reason, the largest first."""
  counts: Counter[str] = Counter()
  temporary = files.temporary_of(path)
  with temporary.open("wb") as file:
    for rejection in rejections:
      counts[rejection.reason] += 1
      line = json.dumps(dataclasses.asdict(rejection), ensure_ascii=False) + "\n"
      file.write(line.encode("utf-8", "backslashreplace"))
  files.finish(temporary, path)
  return dict(counts.most_common())


def _nothing_kept(path: pathlib.Path, rejected: Mapping[str, int]) -> str:
  counts = ", ".join(f"{n} {reason}" for reason, n in rejected.items()) or "no input"
  with path.open(encoding="utf-8") as lines:
    first = [json.loads(line) for line in itertools.islice(lines, _NAMED)]
  named = "".join(f"\n  {r['key']}: {r['reason']} {r['detail']}" for r in first)
  return f"({counts}); nothing is written{named}"


def _manifest(
  job: Job,
  own: Mapping[str, Any],
  plan: Plan,
  splits: Mapping[str, Sequence[Mapping[str, Any]]],
  rejected: Mapping[str, int],
) -> dict[str, Any]:
  kept = sum(entry["kept"] for entries in splits.values() for entry in entries)
  fields = ("file", "records", "bytes", "sha256")
  return {
    "format": records.MANIFEST_FORMAT,
    "name": job.name,
    "description": job.description,
    "licence": job.licence,
    "identity": own,
    "inputs": kept + sum(rejected.values()),
    "kept": kept,
    "rejected": rejected,
    **plan.notes,
    "classes": list(plan.classes),
    "splits": {
      split: {
        "records": sum(entry["records"] for entry in entries),
        "captions": sum(entry["captions"] for entry in entries),
        "captions_left_out": sum(entry["captions_left_out"] for entry in entries),
        "histograms": shard_file.histograms(entries),
        "shards": [{field: entry[field] for field in fields} for entry in entries],
      }
      for split, entries in splits.items()
    },
  }


def _check_keys(items: Sequence[Item]) -> None:
  repeated = [key for key, n in Counter(item.key for item in items).items() if n > 1]
  if repeated:
    raise PrepareError(f"keys that stand more than once: {', '.join(repeated[:10])}")


def _publish(folder: pathlib.Path, work: pathlib.Path, manifest: Mapping[str, Any]) -> None:
  """Moves everything to its final name, the manifest last; an older data set makes way."""
  (folder / records.MANIFEST).unlink(missing_ok=True)
  names = {shard["file"] for split in manifest["splits"].values() for shard in split["shards"]}
  for path in folder.iterdir():
    if _SHARD.fullmatch(path.name) and path.name not in names:
      path.unlink()
  for name in sorted(names):
    if (work / name).exists():  # else an earlier run has moved it
      os.replace(work / name, folder / name)
  for name in (REJECTED, sheet.NAME):
    os.replace(work / name, folder / name)
  text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
  files.replace(folder / records.MANIFEST, text.encode("utf-8", "backslashreplace"))
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
