"""The few-shot curve as the paper's Figure 6 draws it: values in, SVG coordinates and words out."""

import dataclasses
import math
from collections.abc import Callable

from clip_jax.evaluation import curves
from clip_jax.evaluation.probe.study import Study

WIDTH, HEIGHT = 760, 360  # in SVG units
LEFT, RIGHT, TOP, BOTTOM = 52, 24, 22, 46  # margins around the plot
_NONE, _ONE = 26, 74  # where 0 and 1 examples stand, from the left margin
_STAR = 8.0
_NEAR = 30  # labels of the horizontal axis stand so far apart at least


@dataclasses.dataclass(frozen=True)
class Meeting:
  """Where the curve reaches zero-shot."""

  x: float
  label: str
  anchor: str


@dataclasses.dataclass(frozen=True)
class Drawing:
  """One drawing with axes: examples a class on a logarithmic axis, the score in percent."""

  x_ticks: tuple[tuple[float, str], ...]
  y_ticks: tuple[tuple[float, str], ...]
  line: str  # an SVG path through the means
  rest: str  # from the last of them to the probe of all examples
  band: str  # from the worst to the best seed
  means: tuple[curves.Point, ...]
  seeds: tuple[curves.Point, ...]
  full: curves.Point
  zero_shot: curves.Point | None
  star: str  # an SVG path around it
  meeting: Meeting | None


def draw(study: Study) -> Drawing:
  """The drawing of a study that has few shots."""
  values = [cell.score for few in study.few for cell in few.cells] + [study.full.score]
  values += [study.zero_shot.score] if study.zero_shot else []
  y_values = curves.ticks(100 * min(values), 100 * max(values), 5)
  low, high = y_values[0], y_values[-1]
  most = max(study.examples_a_class, study.few[-1].shots, 2.0)

  def x(examples: float) -> float:
    along = math.log(examples) / math.log(most)
    return round(LEFT + _ONE + along * (WIDTH - RIGHT - LEFT - _ONE), 1)

  def y(score: float) -> float:
    share = (100 * score - low) / (high - low)
    return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)

  def dot(examples: float, score: float, words: str) -> curves.Point:
    return curves.Point(x(examples), y(score), f"{words}: {100 * score:.1f}%")

  means = tuple(
    dot(f.shots, f.mean, f"{f.shots} a class, mean of {len(f.cells)}") for f in study.few
  )
  seeds = tuple(
    dot(f.shots, cell.score, f"{f.shots} a class, seed {cell.seed}")
    for f in study.few
    for cell in f.cells
  )
  full = dot(study.examples_a_class, study.full.score, f"all {study.full.examples:,} examples")
  upper = [f"{x(f.shots)} {y(max(cell.score for cell in f.cells))}" for f in study.few]
  lower = [f"{x(f.shots)} {y(min(cell.score for cell in f.cells))}" for f in study.few]
  zero_shot = None
  if study.zero_shot is not None:
    score = study.zero_shot.score
    zero_shot = curves.Point(LEFT + _NONE, y(score), f"zero-shot: {100 * score:.1f}%")
  return Drawing(
    x_ticks=_ticks(study, x),
    y_ticks=tuple((y(value / 100), f"{curves.number(value)}%") for value in y_values),
    line="M" + "L".join(f"{m.x} {m.y}" for m in means),
    rest=f"M{means[-1].x} {means[-1].y}L{full.x} {full.y}",
    band=f"M{'L'.join(upper + lower[::-1])}Z",
    means=means,
    seeds=seeds,
    full=full,
    zero_shot=zero_shot,
    star=_star(zero_shot) if zero_shot else "",
    meeting=_meeting(study, x),
  )


def _ticks(study: Study, x: Callable[[float], float]) -> tuple[tuple[float, str], ...]:
  """Zero, the numbers of shots, and all examples; what stands too near to its left is left out."""
  wanted = [(float(LEFT + _NONE), "0")] if study.zero_shot else []
  wanted += [(x(few.shots), str(few.shots)) for few in study.few]
  last = (x(study.examples_a_class), f"{curves.number(study.examples_a_class)}, all")
  out: list[tuple[float, str]] = []
  for at, label in wanted:
    if (not out or at - out[-1][0] >= _NEAR) and last[0] - at >= 2 * _NEAR:
      out.append((at, label))
  return (*out, last)


def _meeting(study: Study, x: Callable[[float], float]) -> Meeting | None:
  """Nothing where the curve does not cross zero-shot's line."""
  equal = study.equal
  if equal is None or equal.bound:
    return None
  at = x(equal.shots)
  return Meeting(at, f"{equal} a class", "end" if at > WIDTH / 2 else "start")


def _star(centre: curves.Point) -> str:
  """Five points, the first one up."""
  corners = []
  for k in range(10):
    radius, angle = _STAR * (0.42 if k % 2 else 1.0), math.pi * k / 5
    corners.append(
      f"{centre.x + radius * math.sin(angle):.1f} {centre.y - radius * math.cos(angle):.1f}"
    )
  return f"M{'L'.join(corners)}Z"
