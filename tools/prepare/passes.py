"""A plan -> its shards, in one pass or two; and tasks run, but for those that are done already."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import rich.progress

from clip_jax.data.tables import Rejection
from tools.prepare import duplicates, look, parallel, shard_file
from tools.prepare.evaluation_sets import Evaluated
from tools.prepare.filters import Filters
from tools.prepare.jobs import Item, Listed, Part, Plan, PrepareError
from tools.prepare.shard_file import VALIDATION, Pick, Shard
from tools.prepare.source import PART_RECORDS

_Task = TypeVar("_Task", look.Look, Shard)


@dataclasses.dataclass(frozen=True)
class Choices:
  """What is asked of a data set's pairs beyond their source; of each, the default asks nothing."""

  filters: Filters = dataclasses.field(default_factory=Filters)
  deduplicate: str = "none"  # or "exact", "near"
  against: tuple[Evaluated, ...] = ()
  near_bits: int = duplicates.BITS  # for near duplicates and `against`
  validation_fraction: float = 0.0

  @property
  def looks_first(self) -> bool:
    """Whether a pair's place depends on others, so that all are looked at before one is written."""
    return bool(self.deduplicate != "none" or self.against or self.validation_fraction)

  @property
  def hashed(self) -> bool:
    return bool(self.deduplicate == "near" or self.against)

  @property
  def settings(self) -> dict[str, Any]:
    """Those that change what is written, for the identity of a data set."""
    chosen = {
      "deduplicate": "" if self.deduplicate == "none" else self.deduplicate,
      "near_bits": self.near_bits if self.hashed else 0,
      "looks": look.LOOKS if self.hashed else 0,
      "against": [own.fingerprint for own in self.against],
      "validation_fraction": self.validation_fraction,
    }
    asked = {"near_bits"} if self.hashed else set()
    return self.filters.settings | {k: v for k, v in chosen.items() if v or k in asked}


@dataclasses.dataclass(frozen=True)
class Looked:
  """What the first pass saw, and what follows from it."""

  seen: look.Seen
  evaluated: look.Seen
  verdicts: duplicates.Verdicts

  def rejections(self) -> Iterator[Rejection]:
    """Part by part: what was left out at once, then what stood elsewhere."""
    start, reason = 0, self.verdicts.reason
    for part, end in enumerate(self.seen.ends):
      yield from (Rejection(*fields) for fields in self.seen.rejected(part))
      for index in map(int, start + np.flatnonzero(reason[start:end])):
        own = reason[index]
        elsewhere = self.evaluated if own == duplicates.IN_EVALUATION else self.seen
        _, *inputs = self.seen.names(index)
        other, *_ = elsewhere.names(int(self.verdicts.other[index]))
        same = "the same pixels as" if own == duplicates.DUPLICATE else "much like"
        for name in inputs:
          yield Rejection(name, duplicates.REASONS[own], f"{same} {other}")
      start = int(end)


@dataclasses.dataclass(frozen=True)
class Passes:
  """Both passes of one data set in `folder`, whose unfinished files are in `work`."""

  folder: pathlib.Path
  work: pathlib.Path
  choices: Choices
  engine: parallel.Engine
  progress: rich.progress.Progress

  def planned(self, plan: Plan, shard_records: int) -> list[Shard]:
    """The shards of a plan whose pairs do not depend on each other."""
    splits: dict[str, list[Item]] = {}
    for item in plan.items:
      for split in item.splits:
        splits.setdefault(split, []).append(item)
    picks: dict[str, list[Pick]] = {
      split: [
        Pick(Listed(tuple(own[start : start + shard_records])))
        for start in range(0, len(own), shard_records)
      ]
      for split, own in splits.items()
    }
    picks = picks or {"train": [Pick(part) for part in plan.parts]}
    return self._named({split: [(pick,) for pick in own] for split, own in picks.items()}, False)

  def looked(self, plan: Plan, shard_records: int) -> tuple[list[Shard], Looked]:
    """The shards of a plan whose pairs do depend on each other, each full but the last.

    Raises: PrepareError for an image of an evaluation set that cannot be read.
    """
    choices, none = self.choices, Filters()
    parts: Sequence[Part] = plan.parts or [
      Listed(tuple(plan.items[start : start + PART_RECORDS]))
      for start in range(0, len(plan.items), PART_RECORDS)
    ]
    images = [part for own in choices.against for part in own.parts]
    evaluated = self._seen("evaluated", images, none, "reading evaluation sets")
    for part in range(len(images)):
      for name, reason, detail in evaluated.rejected(part)[:1]:
        raise PrepareError(f"--against: {name}: {reason}, {detail}; mend it or take it away")
    seen = self._seen("looked", parts, choices.filters, "looking")
    facts = seen.facts
    verdicts = duplicates.judge(
      facts["pixels"],
      facts["looks"],
      evaluated.facts["looks"],
      choices.deduplicate,
      choices.near_bits,
    )
    splits = {
      split: _picks(seen, parts, rows, shard_records) for split, rows in self._rows(seen, verdicts)
    }
    return self._named(splits, True), Looked(seen, evaluated, verdicts)

  def _seen(self, kind: str, parts: Sequence[Part], filters: Filters, words: str) -> look.Seen:
    looks = [
      look.Look(kind, number, part, filters, self.choices.hashed, self.work)
      for number, part in enumerate(parts)
    ]
    self._run(looks, lambda task: look.entry(task), words, None)
    return look.gather(looks)

  def _rows(
    self, seen: look.Seen, verdicts: duplicates.Verdicts
  ) -> Iterator[tuple[str, np.ndarray]]:
    """Each split and which of the images seen are in it, in their order."""
    kept = verdicts.reason == duplicates.KEPT
    trained = np.array([names == ("train",) for names in seen.split_names], bool)
    held_out = look.share(seen.facts["pixels"]) < self.choices.validation_fraction
    moved = held_out & trained[seen.splits] if len(trained) else held_out
    splits = [*dict.fromkeys(split for names in seen.split_names for split in names), VALIDATION]
    for split in dict.fromkeys(splits):
      own = np.array([split in names for names in seen.split_names], bool)
      inside = own[seen.splits] & ~moved if len(own) else moved
      if split == VALIDATION:
        inside = inside | moved
      if (rows := np.flatnonzero(kept & inside)).size:
        yield split, rows

  def _named(self, splits: dict[str, list[tuple[Pick, ...]]], looked: bool) -> list[Shard]:
    return [
      Shard(
        f"{split}-{number:05d}-of-{len(own):05d}.array_record",
        split,
        picks,
        self.choices.filters,
        looked,
        self.work,
      )
      for split, own in splits.items()
      for number, picks in enumerate(own)
    ]

  def write(self, shards: Sequence[Shard]) -> None:
    """Writes those that are not there yet."""
    sizes = [pick.size for shard in shards for pick in shard.picks]
    known = [size for size in sizes if size is not None]
    total = sum(known) if len(known) == len(sizes) else None
    self._run(shards, lambda task: shard_file.entry(task, self.folder, True), "writing", total)

  def _run(
    self,
    tasks: Sequence[_Task],
    done: Callable[[_Task], dict[str, Any] | None],
    words: str,
    total: int | None,
  ) -> None:
    if not tasks:
      return
    bar = self.progress.add_task(words, total=total)
    todo = []
    for task in tasks:
      if found := done(task):
        self.progress.advance(bar, _inputs(found))
      else:
        todo.append(task)
    self.engine(
      todo,
      lambda count: self.progress.advance(bar, count),
      lambda text: self.progress.console.print(f"warning: {text}", markup=False),
    )


def _inputs(found: dict[str, Any]) -> int:
  return found.get("records", found["kept"]) + len(found["rejected"])


def _picks(
  seen: look.Seen, parts: Sequence[Part], rows: np.ndarray, shard_records: int
) -> list[tuple[Pick, ...]]:
  """Of each shard, which items of which parts."""
  out = []
  part_N = np.searchsorted(seen.ends, rows, side="right")
  position_N = seen.facts["position"][rows].astype(np.int64)
  for start in range(0, len(rows), shard_records):
    own = slice(start, start + shard_records)
    numbers, first = np.unique(part_N[own], return_index=True)
    positions = np.split(position_N[own], first[1:])
    out.append(tuple(_pick(parts[n], at) for n, at in zip(numbers, positions, strict=True)))
  return out


def _pick(part: Part, positions: np.ndarray) -> Pick:
  """A listed part's own items travel to their worker, and none of the others."""
  if isinstance(part, Listed):
    return Pick(Listed(tuple(part.items[i] for i in positions)))
  return Pick(part, positions)
