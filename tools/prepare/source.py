"""Pairs of any source that gives records by number: read where they lie, part by part."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

from clip_jax.data import records, webdataset_source
from clip_jax.data.tables import Rejected, Rejection
from tools.prepare.jobs import Item, Job, Part, Plan

NAME = "pairs"
PART_RECORDS = 10_000


@dataclasses.dataclass(frozen=True)
class Run:
  """The records `start` to `stop` of a source as items of one split, named by where they stand:
  below `folder`, where they lie there.
  """

  source: records.RecordSource
  split: str
  start: int
  stop: int
  captions: bool = True  # whether a record must have some
  folder: str = ""

  def __call__(self) -> Sequence[Item]:
    return [
      Item(
        _below(self.source.locate(i), self.folder),
        (self.split,),
        functools.partial(_load, self.source, i, self.captions),
      )
      for i in range(self.start, self.stop)
    ]


def job(source: records.RecordSource, description: str, part_records: int, folder: str = "") -> Job:
  """All pairs of a source, in its order, in the split "train"; 0: parts of the usual size.

  `folder` is the source's own, which is left out of the names of what is rejected.
  """
  size = part_records or PART_RECORDS
  return Job(
    name=NAME,
    description=description,
    licence="not stated",
    source={"records": source.fingerprint},
    settings={"part_records": size},
    plan=lambda progress: Plan(
      rejected=_left_out(source, folder),
      parts=parts_of(source, "train", size, folder=folder),
      classes=getattr(source, "classes", ()),
    ),
  )


def parts_of(
  source: records.RecordSource,
  split: str,
  size: int = PART_RECORDS,
  captions: bool = True,
  folder: str = "",
) -> list[Part]:
  """All records of a source in runs of `size`."""
  starts = range(0, len(source), size)
  return [Run(source, split, i, min(i + size, len(source)), captions, folder) for i in starts]


def _below(where: str, folder: str) -> str:
  """Where a record stands, without the folder that all of them are in."""
  rest = where.removeprefix(folder)
  return rest.lstrip("/ ") or where if folder and rest != where else where


def _left_out(source: records.RecordSource, folder: str) -> Iterator[Rejection]:
  """What the source itself does not count among its records."""
  if isinstance(source, webdataset_source.WebdatasetSource):
    for found in source.left_out():
      yield dataclasses.replace(found, key=_below(found.key, folder))


def _load(source: records.RecordSource, index: int, captions: bool) -> records.Record:
  """One record, white space of its captions made even.

  Raises: Rejected with the cause that the source has, or "record", "storage" or "empty_caption".
  """
  try:
    record = source[index]
  except records.RecordError as error:
    said = str(error).removeprefix(f"{source.locate(index)}: ")
    raise Rejected(error.reason, said) from error
  except OSError as error:
    raise Rejected("storage", str(error)) from error
  if not captions:
    return record
  texts = dict.fromkeys(" ".join(caption.split()) for caption in record.captions)
  kept = tuple(text for text in texts if text)
  if not kept:
    raise Rejected("empty_caption")
  return dataclasses.replace(record, captions=kept)
