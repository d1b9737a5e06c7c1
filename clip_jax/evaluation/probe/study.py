"""What probes of one set of features found, beside zero-shot: the paper's Figures 6 and 7.

Source: section 3.1.5.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from clip_jax.evaluation.probe.cells import FEW, FULL, ZERO_SHOT, Cell, Cells


@dataclasses.dataclass(frozen=True)
class Shots:
  """Probes of so many examples a class, one a seed."""

  shots: int
  cells: tuple[Cell, ...]

  @property
  def mean(self) -> float:
    return statistics.fmean(cell.score for cell in self.cells)


@dataclasses.dataclass(frozen=True)
class Equal:
  """The examples a class at which a probe is as good as zero-shot. `bound`: how to read it."""

  shots: float
  bound: str  # "", "less than" (the fewest are better already) or "more than" (not even all are)

  def __str__(self) -> str:
    size = f"{self.shots:.1f}" if self.shots < 100 else f"{self.shots:,.0f}"
    return f"{self.bound} {size.removesuffix('.0')}".strip()


@dataclasses.dataclass(frozen=True)
class Study:
  """Scores are between 0 and 1, by `metric` on the test split."""

  name: str
  metric: str
  classes: int
  zero_shot: Cell | None
  full: Cell
  few: tuple[Shots, ...]  # fewest first

  @property
  def examples_a_class(self) -> float:
    """The mean, that the full probe was trained on."""
    return self.full.examples / self.classes

  @property
  def curve(self) -> tuple[tuple[float, float], ...]:
    """(examples a class, score) of all probes, the full one last."""
    points = [(float(few.shots), few.mean) for few in self.few]
    return (*points, (self.examples_a_class, self.full.score))

  @property
  def equal(self) -> Equal | None:
    """None without zero-shot or few shots."""
    if self.zero_shot is None or not self.few:
      return None
    return equal_shots(self.curve, self.zero_shot.score)

  def metrics(self) -> dict[str, Any]:
    """For a program; what there is none of is null."""
    full, equal = self.full, self.equal
    return {
      "name": self.name,
      "metric": self.metric,
      "n": full.n,
      "zero_shot": self.zero_shot and self.zero_shot.score,
      "linear_probe": {
        "score": full.score,
        "lambda": full.lambda_,
        "iterations": full.iterations,
        "converged": full.converged,
        "examples": full.examples,
      },
      "few_shot": [
        {
          "shots": few.shots,
          "mean": few.mean,
          "scores": {str(cell.seed): cell.score for cell in few.cells},
        }
        for few in self.few
      ],
      "zero_shot_equals_shots": equal and dataclasses.asdict(equal),
    }


def counted(shots: int) -> str:
  """In words."""
  return f"{shots} shot{'s' if shots > 1 else ''}"


def of_cells(
  cells: Cells, name: str, metric: str, classes: int, shots: Sequence[int], seeds: Sequence[int]
) -> Study:
  """The study of what was measured; of zero-shot there may be nothing."""
  few = tuple(Shots(k, tuple(cells[FEW, k, seed] for seed in seeds)) for k in sorted(shots))
  zero_shot = cells.get((ZERO_SHOT, 0, None))
  return Study(name, metric, classes, zero_shot, cells[FULL, None, None], few)


def equal_shots(curve: Sequence[tuple[float, float]], score: float) -> Equal:
  """Where a curve of (examples a class, score) first reaches `score`.

  Between two points on the line through them over the logarithm of the examples.
  Source: Figure 7, "log-linear interpolation of 1, 2, 4, 8, 16-shot and fully supervised results".
  """
  first, last = curve[0], curve[-1]
  if first[1] >= score:
    return Equal(first[0], "less than" if first[1] > score else "")
  for (x, y), (next_x, next_y) in itertools.pairwise(curve):
    if next_y >= score:
      share = (score - y) / (next_y - y)
      return Equal(math.exp((1 - share) * math.log(x) + share * math.log(next_x)), "")
  return Equal(last[0], "more than")
