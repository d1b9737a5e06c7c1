"""What the runs of a study say: accuracy over pairs seen, and the pairs needed for one accuracy."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# The three of Figure 2 in the order in which the paper came to them.
OBJECTIVES = ("captions", "bag_of_words", "contrastive")
# In the paper the first needs more pairs than the second, whose row among the published is named.
COMPARED = (
  ("captions", "bag_of_words", "bag-of-words prediction"),
  ("bag_of_words", "contrastive", "contrastive"),
)


@dataclasses.dataclass(frozen=True)
class Curves:
  """One objective's zero-shot accuracy by one rule of scoring: a row a seed, a column a point."""

  rule: str
  pairs: np.ndarray  # float64 [points], rising
  accuracy: np.ndarray  # float64 [seeds, points], shares

  @property
  def mean(self) -> np.ndarray:
    return self.accuracy.mean(axis=0)


@dataclasses.dataclass(frozen=True)
class Ratio:
  """How many times the pairs of `fast` `slow` needs for an accuracy; None: one never reaches it."""

  slow: str
  fast: str
  of_means: float | None  # of the curves that are means over seeds
  of_seeds: tuple[float | None, ...]  # of the two runs of each seed, which saw the same batches

  @property
  def spread(self) -> tuple[float, float] | None:
    """The least and the greatest of the seeds; None unless all of them reached it."""
    reached = [ratio for ratio in self.of_seeds if ratio is not None]
    return (min(reached), max(reached)) if len(reached) == len(self.of_seeds) else None


def curves(runs: Sequence[Mapping[str, Any]]) -> dict[str, Curves]:
  """By objective, of the rule under which it ends best: what is found is not owed to the rule."""
  return {
    objective: max(by_rule(runs, objective), key=lambda one: float(one.mean[-1]))
    for objective in OBJECTIVES
  }


def by_rule(runs: Sequence[Mapping[str, Any]], objective: str) -> list[Curves]:
  """The same runs of one objective under each rule that they were scored by."""
  own = sorted((run for run in runs if run["objective"] == objective), key=lambda run: run["seed"])
  pairs = np.array([line["pairs"] for line in own[0]["evaluations"]], np.float64)
  return [
    Curves(
      rule,
      pairs,
      np.array([[line["accuracy"][rule] for line in run["evaluations"]] for run in own]),
    )
    for rule in own[0]["evaluations"][0]["accuracy"]
  ]


def pairs_for(pairs: np.ndarray, accuracy: np.ndarray, level: float) -> float | None:
  """Pairs seen when a curve first reaches `level`: a straight line over log pairs between points.

  A curve that begins above it gives its first point, which is then an upper bound.
  """
  reached = np.flatnonzero(accuracy >= level)
  if not len(reached):
    return None
  i = int(reached[0])
  if i == 0:
    return float(pairs[0])
  share = (level - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
  return float(math.exp((1 - share) * math.log(pairs[i - 1]) + share * math.log(pairs[i])))


def common_level(found: Mapping[str, Curves]) -> float:
  """The highest accuracy, in whole per cent, that every run and every mean curve reaches."""
  rows = (row for one in found.values() for row in (one.mean, *one.accuracy))
  return math.floor(100 * min(float(row.max()) for row in rows) + 1e-9) / 100


def ratio(found: Mapping[str, Curves], slow: str, fast: str, level: float) -> Ratio:
  """See `Ratio`."""
  a, b = found[slow], found[fast]
  return Ratio(
    slow,
    fast,
    _quotient(pairs_for(a.pairs, a.mean, level), pairs_for(b.pairs, b.mean, level)),
    tuple(
      _quotient(pairs_for(a.pairs, x, level), pairs_for(b.pairs, y, level))
      for x, y in zip(a.accuracy, b.accuracy, strict=True)
    ),
  )


def _quotient(a: float | None, b: float | None) -> float | None:
  return None if a is None or b is None else a / b


def levels(found: Mapping[str, Curves], chance: float) -> list[float]:
  """Tens of per cent that some mean curve reaches and none begins above, and `common_level`."""
  common = common_level(found)
  first = max(chance, *(float(one.mean[0]) for one in found.values()))
  best = max(float(one.mean.max()) for one in found.values())
  tens = [n / 10 for n in range(1, 10) if first < n / 10 <= best]
  return sorted({*tens, common} if common > first else set(tens))


def verdict(one: Ratio) -> str:
  """Whether it agrees with the paper, in which the slow one needs more pairs."""
  if one.spread is None:
    return "not every seed reaches it, so this says nothing of the paper's order"
  least, greatest = one.spread
  if least > 1:
    return "the paper's order"
  if greatest < 1:
    return "the opposite of the paper's order"
  return "no difference beyond what the seed makes"


class EfficiencyError(ValueError):
  """A study that no ratio can be read from: which file."""


@dataclasses.dataclass(frozen=True)
class Study:
  """What a study's file gives Figure 2: the ratios of `COMPARED`, and where they were read."""

  ratios: Mapping[str, Ratio]  # by the row of the figure
  about: str  # the accuracy at which they hold, of what
  fingerprint: str  # sha256 of the file


def read(path: str | os.PathLike[str]) -> Study:
  """The OUTPUT.json of `tools/predictive_study.py`, at the highest accuracy that all runs reach.

  Raises: EfficiencyError naming a file that is none; OSError with the file's name.
  """
  text = pathlib.Path(path).read_bytes()
  try:
    study = json.loads(text)
    found = curves(study["runs"])
    level = common_level(found)
    ratios = {row: ratio(found, slow, fast, level) for slow, fast, row in COMPARED}
    seeds = len(found["contrastive"].accuracy)
    about = f"{level:.0%} of {study['images']:,} images of {study['task']}, in {seeds} seed"
    about += "s" * (seeds > 1)
  except (ValueError, KeyError, IndexError, TypeError) as error:
    raise EfficiencyError(
      f"{path}: not what tools/predictive_study.py writes as OUTPUT.json ({error!r})"
    ) from None
  return Study(ratios, about, hashlib.sha256(text).hexdigest())
