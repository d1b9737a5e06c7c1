"""The report's curves over steps or severities: values in, SVG coordinates and hover texts out."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 340, 190  # of a panel, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24  # margins around the plot
_MAX_POINTS = 120  # drawn per curve; more are averaged

PERCENT = "%"
_TRAINING = (  # key in metrics.jsonl, title, unit
  ("train/loss", "Loss", ""),
  ("train/accuracy", "In-batch accuracy", PERCENT),
  ("train/logit_scale", "Logit scale", ""),
  ("train/gradient_norm", "Gradient norm", ""),
  ("train/learning_rate", "Learning rate", ""),
  ("train/pairs_per_second", "Pairs per second", ""),
  ("train/data_wait", "Share of time waiting for data", PERCENT),
  ("train/mfu", "Model FLOP utilisation", PERCENT),
)
_EVALUATED = {  # metric, what to call it, where its chance level stands
  "11_point_map": ("11-point mAP", ""),
  "roc_auc": ("ROC AUC", ""),
  "mean_top1_top5": ("mean(top1, top5)", ""),
  "top1": ("top-1", "chance"),
  "top5": ("top-5", ""),
  "image_to_text_R@1": ("image to text R@1", "image_to_text_chance_R@1"),
  "text_to_image_R@1": ("text to image R@1", "text_to_image_chance_R@1"),
}


@dataclasses.dataclass(frozen=True)
class Point:
  x: float
  y: float
  title: str


@dataclasses.dataclass(frozen=True)
class Series:
  name: str
  last: str  # its last value in words
  line: str  # an SVG path; gaps where a value was not finite
  band: str  # an SVG path from the least to the greatest value, where points were averaged
  points: tuple[Point, ...]


@dataclasses.dataclass(frozen=True)
class Panel:
  """One drawing with axes. Ticks are (position, label)."""

  title: str
  series: tuple[Series, ...]
  x_ticks: tuple[tuple[float, str], ...]
  y_ticks: tuple[tuple[float, str], ...]
  hit_width: float  # of the strip around each point that answers to the pointer
  evaluation: bool  # of a task, not of training
  chance: tuple[float, str] | None = None
  along: str = "step"  # what the horizontal axis counts


def panels(lines: Sequence[Mapping[str, Any]]) -> list[Panel]:
  """The curves of a run, from its metrics lines in order; keys that are missing give no panel."""
  out = []
  for key, title, unit in _TRAINING:
    curve = _curve(lines, key)
    if curve:
      out.append(panel(title, {title: curve}, unit))
  tasks = dict.fromkeys(
    key.removeprefix("eval/").rpartition("/")[0]
    for line in lines
    for key in line
    if key.startswith("eval/")
  )
  for task in tasks:
    curves, chance = {}, None
    for metric, (name, chance_metric) in _EVALUATED.items():
      curve = _curve(lines, f"eval/{task}/{metric}")
      if curve:
        curves[name] = curve
        levels = _curve(lines, f"eval/{task}/{chance_metric}")
        chance = levels[-1][1] if levels and chance is None else chance
    if curves:
      out.append(panel(task, curves, PERCENT, True, chance))
  return out


def _curve(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
  """(step, value) pairs; nan where a value was not finite. Empty when there is no finite value."""
  pairs = []
  for line in lines:
    if key in line and "step" in line:
      value = line[key]
      finite = isinstance(value, (int, float)) and math.isfinite(value)
      pairs.append((float(line["step"]), float(value) if finite else math.nan))
  return pairs if any(math.isfinite(value) for _, value in pairs) else []


def panel(
  title: str,
  curves: Mapping[str, Sequence[tuple[float, float]]],
  unit: str,
  evaluation: bool = False,
  chance: float | None = None,
  along: str = "step",
) -> Panel:
  """Curves of (x, value) under one pair of axes; `along` is one unit of x, in words.

  With the unit `PERCENT` values and `chance` are shares between 0 and 1. A value may be nan, but
  not all of them.
  """
  scale = 100.0 if unit == PERCENT else 1.0
  values = [v * scale for curve in curves.values() for _, v in curve if math.isfinite(v)]
  steps = [s for curve in curves.values() for s, _ in curve]
  y_low, y_high = (min(0.0, *values), 100.0 if unit == PERCENT else max(values))
  if not evaluation and unit == PERCENT and max(values) < 40:
    y_high = max(1.0, *values)
  y_values = ticks(y_low, y_high, 4)
  x_values = ticks(min(0.0, *steps), max(steps), 5)
  y_axis = _Axis(y_values[0], y_values[-1], HEIGHT - BOTTOM, TOP)
  x_axis = _Axis(min(0.0, *steps), max(*steps, 1.0), LEFT, WIDTH - RIGHT)
  most = max(len(curve) for curve in curves.values())
  drawn = min(most, _MAX_POINTS)
  return Panel(
    title=title,
    series=tuple(_series(n, c, x_axis, y_axis, scale, unit, along) for n, c in curves.items()),
    x_ticks=tuple((x_axis(x), number(x)) for x in x_values if x_axis.low <= x <= x_axis.high),
    y_ticks=tuple((y_axis(y), number(y) + unit) for y in y_values),
    hit_width=round(max(2.0, (WIDTH - LEFT - RIGHT) / drawn), 1),
    evaluation=evaluation,
    chance=None
    if chance is None
    else (y_axis(chance * scale), f"chance {number(chance * scale)}{unit}"),
    along=along,
  )


@dataclasses.dataclass(frozen=True)
class _Axis:
  """Values from `low` to `high` -> positions from `start` to `end`."""

  low: float
  high: float
  start: float
  end: float

  def __call__(self, value: float) -> float:
    share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
    return round(self.start + share * (self.end - self.start), 1)


def _series(
  name: str,
  curve: Sequence[tuple[float, float]],
  x: _Axis,
  y: _Axis,
  scale: float,
  unit: str,
  along: str,
) -> Series:
  """One curve, in at most `_MAX_POINTS` points: past that, means of runs of points in a band."""
  size = -(-len(curve) // _MAX_POINTS)
  points, line, upper, lower, broken = [], [], [], [], True
  for start in range(0, len(curve), size):
    run = curve[start : start + size]
    finite = [v * scale for _, v in run if math.isfinite(v)]
    if not finite:
      broken = True
      continue
    step, mean = run[-1][0], sum(finite) / len(finite)
    where = f"{along} {step:,.0f}"
    if size > 1:
      where = f"{along}s {run[0][0]:,.0f} to {step:,.0f}, mean"
    points.append(Point(x(step), y(mean), f"{name}, {where}: {number(mean)}{unit}"))
    line.append(f"{'M' if broken else 'L'}{x(step)} {y(mean)}")
    upper.append(f"{x(step)} {y(max(finite))}")
    lower.append(f"{x(step)} {y(min(finite))}")
    broken = False
  band = f"M{'L'.join(upper + lower[::-1])}Z" if size > 1 else ""
  last = next(v for _, v in reversed(curve) if math.isfinite(v))
  return Series(name, f"{number(last * scale)}{unit}", "".join(line), band, tuple(points))


def ticks(low: float, high: float, count: int) -> list[float]:
  """About `count` round values: the first at or under `low`, the last at or over `high`."""
  if not high > low:
    pad = abs(low) * 0.1 or 1.0
    low, high = low - pad, high + pad
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
  """Three or so figures, for people: 0.0005, 2.31, 94.1, 1,240, 25.3k, 1.2M."""
  size = abs(value)
  if size >= 1e6:
    return f"{value / 1e6:.3g}M"
  if size >= 1e4:
    return f"{value / 1e3:.3g}k"
  if size >= 1000:
    return f"{value:,.0f}"
  if size and size < 1e-3:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
  return f"{value:.3g}"
