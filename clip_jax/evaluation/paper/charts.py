"""The geometry of Figures 5 and 9 as drawings of a page: published and measured side by side."""

import dataclasses
import math

from clip_jax.evaluation import curves
from clip_jax.evaluation.paper import published
from clip_jax.evaluation.paper import tables as paper_tables

WIDTH = 680  # SVG units
_LEFT, _RIGHT, _TOP, _BOTTOM = 130, 60, 8, 34
_BAR, _GAP, _DOTS = 9, 6, 300  # thickness of a bar, space between rows, height of dots' plot
MEAN = "mean of 27 zero-shot scores"  # the column that Figure 9 draws over multiply-adds


@dataclasses.dataclass(frozen=True)
class Mark:
  """A bar from `x`, `y`, or where `width` is 0 a dot at them."""

  x: float
  y: float
  width: float
  measured: bool
  title: str


@dataclasses.dataclass(frozen=True)
class Chart:
  """A drawing. `texts` are (x, y, anchor, words), `lines` SVG paths of the grid."""

  title: str
  height: float
  marks: tuple[Mark, ...]
  texts: tuple[tuple[float, float, str, str], ...]
  lines: tuple[str, ...]
  bar: int = _BAR


def chart(grid: paper_tables.Grid) -> Chart | None:
  """The drawing of a figure, or None where there is none of that table."""
  if grid.table.key == "figure5":
    return _bars(grid)
  return _dots(grid) if grid.table.key == "figure9" else None


def _bars(grid: paper_tables.Grid) -> Chart:
  """A bar a row and figure, to the left or to the right of zero."""
  rows: list[tuple[str, list[tuple[float, bool, str]]]] = []
  for row in grid.rows:
    values = []
    for column in grid.columns:
      c = grid.cells[row, column]
      if c.cell.value:
        values.append((float(c.cell.value), False, f"{row}: published {c.cell.value}"))
      if c.measured:
        values.append((float(c.measured.value), True, f"{row}, {column}: measured {c.shown}"))
    rows.append((row, values))
  every = [value for _, values in rows for value, _, _ in values]
  scale = curves.ticks(min(0.0, *every), max(0.0, *every), 8)
  across = (WIDTH - _LEFT - _RIGHT) / (scale[-1] - scale[0])

  def x(value: float) -> float:
    return round(_LEFT + (value - scale[0]) * across, 1)

  marks, texts, y = [], [], float(_TOP)
  for row, values in rows:
    texts.append((_LEFT - 8.0, y + _BAR * len(values) / 2 + 4, "end", row))
    for value, measured, title in values:
      left, right = sorted((x(0), x(value)))
      marks.append(Mark(left, y, max(round(right - left, 1), 0.5), measured, title))
      y += _BAR
    y += _GAP
  texts += [(x(value), y + 14, "middle", curves.number(value)) for value in scale]
  lines = [f"M{x(value)} {_TOP}V{y}" for value in scale]
  return Chart(grid.table.caption, y + _BOTTOM, tuple(marks), tuple(texts), tuple(lines))


def _dots(grid: paper_tables.Grid) -> Chart | None:
  """The mean of Table 11's row over the multiply-adds of an image, on a logarithmic axis."""
  means, (column, *_) = published.means("11"), grid.columns
  dots: list[tuple[float, float, bool, str]] = []
  for row in grid.rows:
    c, own = grid.cells[row, column], grid.cells.get((row, MEAN))
    flops = float(c.measured.value) if c.measured else 0.0
    if row in means and (c.cell.value or flops):
      dots.append((float(c.cell.value or flops), float(means[row]), False, row))
    if flops and own and own.measured:
      dots.append((flops, float(own.measured.value), True, row))
  if not dots:
    return None
  x_scale = [1, 2, 5, 10, 20, 50, 100, 200, 500]
  y_scale = curves.ticks(min(d[1] for d in dots), max(d[1] for d in dots), 5)
  bottom = _TOP + _DOTS

  def x(value: float) -> float:
    share = math.log(value / x_scale[0]) / math.log(x_scale[-1] / x_scale[0])
    return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

  def y(value: float) -> float:
    return round(bottom - (value - y_scale[0]) / (y_scale[-1] - y_scale[0]) * _DOTS, 1)

  marks, texts = [], [(WIDTH / 2, bottom + 30.0, "middle", grid.table.caption)]
  for flops, mean, measured, name in dots:
    kind = "measured" if measured else "published"
    title = f"{name}: {flops:.1f}, {MEAN} {mean:.1f}, {kind}"
    marks.append(Mark(x(flops), y(mean), 0, measured, title))
    if not measured:
      texts.append((x(flops) + 7, y(mean) + 4, "start", name))
  texts += [(x(value), bottom + 15.0, "middle", f"{value}") for value in x_scale]
  texts += [(_LEFT - 8.0, y(value) + 4, "end", curves.number(value)) for value in y_scale]
  lines = [f"M{_LEFT} {y(value)}H{WIDTH - _RIGHT}" for value in y_scale]
  title = f"{MEAN} over {grid.table.caption[0].lower()}{grid.table.caption[1:]}"
  return Chart(title, bottom + _BOTTOM, tuple(marks), tuple(texts), tuple(lines))
