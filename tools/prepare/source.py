"""Pairs of any source that gives records by number: read where they lie, part by part."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

from clip_jax.data import folder_source, records
from clip_jax.data.tables import Rejected
from tools.prepare.jobs import Item, Job, Part, Plan, PrepareError

NAME = "pairs"
PART_RECORDS = 10_000


@dataclasses.dataclass(frozen=True)
class Run:
  """The records `start` to `stop` of a source as items of one split, named by where they stand."""

  source: records.RecordSource
  split: str
  start: int
  stop: int
  captions: bool = True  # whether a record must have some

  def __call__(self) -> Sequence[Item]:
    return [
      Item(
        self.source.locate(i),
        (self.split,),
        functools.partial(_load, self.source, i, self.captions),
      )
      for i in range(self.start, self.stop)
    ]


@dataclasses.dataclass(frozen=True)
class Evaluated:
  """The images of an evaluation set, which training data should not have."""

  fingerprint: str
  parts: tuple[Part, ...]


def job(source: records.RecordSource, description: str, part_records: int) -> Job:
  """All pairs of a source, in its order, in the split "train"; 0: parts of the usual size."""
  size = part_records or PART_RECORDS
  return Job(
    name=NAME,
    description=description,
    licence="not stated",
    source={"records": source.fingerprint},
    settings={"part_records": size},
    plan=lambda progress: Plan(
      parts=_parts(source, "train", size), classes=getattr(source, "classes", ())
    ),
  )


def evaluated(place: str) -> Evaluated:
  """A split of a prepared folder ("FOLDER:SPLIT"), all of its splits ("FOLDER"), or all images in
  a folder and in those below it.

  Raises: PrepareError when there are none; OSError.
  """
  folder, colon, split = place.rpartition(":")
  if not colon or pathlib.Path(place).exists():
    folder, split = place, ""
  root = pathlib.Path(folder)
  try:
    if (root / records.MANIFEST).is_file():
      splits = [split] if split else list(records.read_manifest(root)["splits"])
      sources: list[records.RecordSource] = [records.ArrayRecordSource(root, s) for s in splits]
    else:
      sources = [folder_source.FileSource(_images(root / split))]
  except records.RecordError as error:
    raise PrepareError(f"--against {error}") from error
  found = [p for own in sources for p in _parts(own, "test", PART_RECORDS, captions=False)]
  if not found:
    raise PrepareError(
      f"--against {place}: no images there; want a prepared folder (with {records.MANIFEST}) or a "
      f"folder of images ({', '.join(sorted(folder_source.IMAGES))})"
    )
  return Evaluated(" ".join(own.fingerprint for own in sources), tuple(found))


def _parts(
  source: records.RecordSource, split: str, size: int, captions: bool = True
) -> list[Part]:
  starts = range(0, len(source), size)
  return [Run(source, split, i, min(i + size, len(source)), captions) for i in starts]


def _images(root: pathlib.Path) -> list[folder_source.Entry]:
  if not root.is_dir():
    raise records.RecordError(f"{root}: no such folder")
  found = sorted(p for p in root.rglob("*") if p.suffix.lower() in folder_source.IMAGES)
  return [
    folder_source.Entry(path, path.relative_to(root).as_posix()) for path in found if path.is_file()
  ]


def _load(source: records.RecordSource, index: int, captions: bool) -> records.Record:
  """One record, white space of its captions made even.

  Raises: Rejected with the cause "record", "storage" or "empty_caption".
  """
  try:
    record = source[index]
  except records.RecordError as error:
    raise Rejected("record", str(error)) from error
  except OSError as error:
    raise Rejected("storage", str(error)) from error
  if not captions:
    return record
  texts = dict.fromkeys(" ".join(caption.split()) for caption in record.captions)
  kept = tuple(text for text in texts if text)
  if not kept:
    raise Rejected("empty_caption")
  return dataclasses.replace(record, captions=kept)
