"""What stands in DEST already: the same data set goes on or is done; another is not discarded
unasked.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from clip_jax.data import records
from tools.prepare import files
from tools.prepare.jobs import PrepareError

WORK = ".unfinished"
_IDENTITY = "identity.json"
_DONE = ("looked-*.json", "*.array_record.json")  # the last file of a piece that is done
_NAMED = 5  # differences that are told
_SHOWN = 40  # characters of a value


def finished(folder: pathlib.Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
  """The manifest of a complete data set in `folder` whose identity has these fields, or None."""
  try:
    manifest = records.read_manifest(folder)
    parts = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    whole = all((folder / s["file"]).stat().st_size == s["bytes"] for s in parts)
    found = manifest["identity"]
  except (records.RecordError, KeyError, TypeError, AttributeError, OSError):
    return None
  same = all(found.get(key) == value for key, value in wanted.items())
  return manifest if whole and same else None


def check(folder: pathlib.Path, wanted: Mapping[str, Any]) -> None:
  """Raises: PrepareError when what is there, finished or not, was made from another source or with
  other settings than these fields of an identity, naming those that differ.
  """
  work = folder / WORK
  asked: dict[str, Any] = json.loads(json.dumps(wanted))  # as what was kept has it
  if any(True for _ in _pieces(work)):
    state, found = "an unfinished data set", _identity(work)
  elif (folder / records.MANIFEST).exists():
    state, found = "a data set", _of_manifest(folder)
    asked.pop("shard_records", None)  # which it does not keep
  else:
    return
  if found is None:
    raise PrepareError(
      f"{folder}: holds {state} that cannot be read; choose another folder, or --force to replace "
      "it"
    )
  pairs = list(_differences({name: found.get(name) for name in asked}, asked))
  if pairs:
    more = f" and {len(pairs) - _NAMED} more" if len(pairs) > _NAMED else ""
    raise PrepareError(
      f"{folder}: holds {state} that was made otherwise: {'; '.join(pairs[:_NAMED])}{more}. Choose "
      "another folder, or --force to replace it"
    )


def claim(folder: pathlib.Path, own: Mapping[str, Any], force: bool) -> None:
  """Makes the folder of unfinished files this identity's; what it has done already stays there.

  Raises: PrepareError as `check`, unless `force`.
  """
  if not force:
    check(folder, own)
  work = folder / WORK
  text = json.dumps(own, sort_keys=True)
  if _identity(work) != json.loads(text):
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    files.replace(work / _IDENTITY, text.encode())
  for left_behind in work.glob("*.tmp"):
    left_behind.unlink()


def leave(folder: pathlib.Path, fresh: bool) -> None:
  """After an error: takes away what holds no finished work; `fresh`: the folder was made for it."""
  work = folder / WORK
  if not any(True for _ in _pieces(work)):
    shutil.rmtree(work, ignore_errors=True)
  if fresh and not any(True for _ in folder.iterdir()):
    os.rmdir(folder)


def _pieces(work: pathlib.Path) -> Iterator[pathlib.Path]:
  for pattern in _DONE:
    yield from work.glob(pattern)


def _identity(work: pathlib.Path) -> dict[str, Any] | None:
  try:
    found = json.loads((work / _IDENTITY).read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) else None


def _of_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
  try:
    found = records.read_manifest(folder).get("identity")
  except records.RecordError:
    return None
  return found if isinstance(found, dict) else None


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
  """ "max_side 300, now 301" for each value that differs."""
  if isinstance(old, dict) and isinstance(new, dict):
    for key in dict.fromkeys([*old, *new]):
      inner = f"{name} {key}" if name and name != "settings" else key
      yield from _differences(old.get(key), new.get(key), inner)
  elif old != new:
    yield f"{name} {_shown(old)}, now {_shown(new)}"


def _shown(value: Any) -> str:
  if value is None:
    return "not given"
  text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
  return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
