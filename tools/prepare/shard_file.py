"""One shard: the records of some items in one ArrayRecord file, a pure function of the source.

So it does not matter which process writes it, when, or whether one before died of it. Shards are
made in a folder of their own, each with a small JSON beside it once it is complete.
"""

import dataclasses
import hashlib
import heapq
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from clip_jax.data import images, records
from clip_jax.data.tables import Rejected
from tools.prepare import files, filters, look
from tools.prepare.jobs import Item, Listed, Part, PrepareError

VALIDATION = "validation"
SHOWN = 100  # pairs of a split on the contact sheet
# Where the bins of histograms begin; the last has no end.
EDGES = {
  "caption_characters": (1, 5, 10, 20, 40, 80, 160, 320, 640),
  "shorter_side": (1, 32, 64, 128, 224, 256, 336, 384, 512, 768, 1024, 2048, 4096),
  "longer_side": (1, 32, 64, 128, 224, 256, 336, 384, 512, 768, 1024, 2048, 4096),
}


@dataclasses.dataclass(frozen=True)
class Pick:
  """Items of a part: those at `positions` int64 [n], or all of them."""

  part: Part
  positions: np.ndarray | None = None

  @property
  def size(self) -> int | None:
    """How many items, where that is known before the part is called."""
    if self.positions is not None:
      return len(self.positions)
    return len(self.part.items) if isinstance(self.part, Listed) else None

  def items(self) -> Sequence[Item]:
    found = self.part()
    return found if self.positions is None else [found[i] for i in self.positions]


@dataclasses.dataclass(frozen=True)
class Shard:
  """Writes `name` and `<name>.json` to `work`. `looked`: all of its pairs were found good before.

  Raises: PrepareError when the file cannot be written, and what a part raises.
  """

  name: str
  split: str
  picks: tuple[Pick, ...]
  filters: filters.Filters
  looked: bool
  work: pathlib.Path

  def __call__(self, report: Callable[[int], None]) -> None:
    path = self.work / self.name
    temporary = files.temporary_of(path)
    notes = _Notes(self.split)
    try:
      writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
      for item in self._items():
        try:
          record = item.read()
          good = filters.checked(record, self.filters, decode=not self.looked)
          made = filters.stored(good, self.filters)
          writer.write(records.pack(made.record))
        except (Rejected, images.ImageError, UnicodeEncodeError) as error:
          notes.left_out(item, look.reason(error), str(error))
        else:
          notes.kept(item, made, len(record.captions))
        report(1)
      writer.close()
      found = array_record_module.ArrayRecordReader(str(temporary)).num_records()
      if found != notes.records:
        raise RuntimeError(f"holds {found} records after {notes.records} were written")
    except RuntimeError as error:  # what ArrayRecord raises when the disk is full, and for all else
      temporary.unlink(missing_ok=True)
      raise PrepareError(
        f"{path}: cannot be written ({error}); make room or give leave to write, then run the "
        "same command again: finished shards are kept"
      ) from error
    entry = {
      "file": self.name,
      "bytes": temporary.stat().st_size,
      "sha256": files.sha256(temporary),
      **notes.entry(),
    }
    files.finish(temporary, path)
    files.replace(path.with_name(path.name + ".json"), json.dumps(entry).encode())

  def _items(self) -> Iterator[Item]:
    for pick in self.picks:
      yield from pick.items()


class _Notes:
  """What is told of a shard beside its records."""

  def __init__(self, split: str):
    self._split = split
    self.records = 0
    self._captions = self._captions_left_out = self._kept = 0
    self._rejected: list[list[str]] = []
    self._measured: dict[str, list[int]] = {name: [] for name in EDGES}
    self._drawn: list[tuple[int, int]] = []  # a heap of (- hash of the key, record)

  def left_out(self, item: Item, reason: str, detail: str) -> None:
    if self._counts(item):
      self._rejected += [[name, reason, detail] for name in item.inputs]

  def kept(self, item: Item, made: filters.Checked, captions: int) -> None:
    record = made.record
    self._kept += self._counts(item) * len(item.inputs)
    self._captions += len(record.captions)
    self._captions_left_out += captions - len(record.captions)
    self._measured["caption_characters"] += map(len, record.captions)
    self._measured["shorter_side"].append(min(made.size))
    self._measured["longer_side"].append(max(made.size))
    digest = hashlib.sha256(record.key.encode()).digest()
    drawn = (-int.from_bytes(digest[:6]), self.records)
    (heapq.heappush if len(self._drawn) < SHOWN else heapq.heappushpop)(self._drawn, drawn)
    self.records += 1

  def _counts(self, item: Item) -> bool:
    """Whether the item is counted in this split, as it is in one of them alone."""
    return self._split == item.splits[0] or self._split not in item.splits

  def entry(self) -> dict[str, Any]:
    return {
      "records": self.records,
      "captions": self._captions,
      "captions_left_out": self._captions_left_out,
      "kept": self._kept,
      "rejected": self._rejected,
      "histograms": {
        name: np.bincount(
          np.searchsorted(edges, self._measured[name], side="right"), minlength=len(edges) + 1
        )[1:].tolist()
        for name, edges in EDGES.items()
      },
      "drawn": sorted([-negative, place] for negative, place in self._drawn),
    }


def entry(shard: Shard, folder: pathlib.Path, verify: bool) -> dict[str, Any] | None:
  """What was noted of this shard, if it is still there (or in `folder`) as it was.

  verify=False is for what was written a moment ago: its bytes are not read again.
  """
  try:
    found = json.loads((shard.work / f"{shard.name}.json").read_text(encoding="utf-8"))
    size, digest = found["bytes"], found["sha256"]
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    return None
  for path in (shard.work / shard.name, folder / shard.name):
    whole = path.is_file() and path.stat().st_size == size
    if whole and (not verify or files.sha256(path) == digest):
      return found
  return None


def histograms(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[int]]]:
  """The sums of all entries': `counts[i]` values from `edges[i]` on, under the next edge."""
  return {
    name: {
      "edges": list(edges),
      "counts": [
        sum(column) for column in zip(*(e["histograms"][name] for e in entries), strict=True)
      ]
      or [0] * len(edges),
    }
    for name, edges in EDGES.items()
  }
