"""Natural distribution shifts: accuracies that compare with the published ones, and what they mean.

Effective robustness is what a model has under a shift beyond what its ImageNet accuracy predicts.
The prediction is a line through the logits of the accuracies of standard ImageNet models. A shift
with fewer classes than ImageNet's is compared with ImageNet's accuracy on those alone.
Source: section 3.3 and figures 13 and 14; Taori et al. 2020 (arXiv 2007.00644).
"""

import csv
import dataclasses
import math
import os
import pathlib
import statistics
import types
from collections.abc import Mapping, Sequence

import numpy as np

IMAGENET = "ImageNet"
STANDARD = "standard"  # the kind of model that a line is of

# Each shift with its columns. The two kept for videos, a frame by itself and with its neighbours,
# count half each (the paper does not say how its average takes them).
SHIFTS: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
  {
    "ImageNetV2": ("ImageNetV2",),
    "ImageNet-A": ("ImageNet-A",),
    "ImageNet-R": ("ImageNet-R",),
    "ObjectNet": ("ObjectNet",),
    "ImageNet-Sketch": ("ImageNet-Sketch",),
    "ImageNet-Vid": ("ImageNet-Vid PM0", "ImageNet-Vid PM10"),
    "Youtube-BB": ("Youtube-BB PM0", "Youtube-BB PM10"),
  }
)

_WHOLE = ("ImageNetV2", "ImageNet-Sketch")  # with all of ImageNet's classes
_TEXT_COLUMNS = ("model", "kind", "where", "status")
_PUBLISHED = pathlib.Path(__file__).resolve().parents[2] / "assets" / "paper" / "robustness.csv"

# What trained the published models. Only one saw nothing but ImageNet and its labels; of the two
# others NS saw 300 million unlabelled images, FixResNeXt 940 million with hashtags.
_KINDS: Mapping[str, str] = {
  "ImageNet ResNet-101": "standard",
  "NS EfficientNet-L2": "more data",
  "FixResNeXt101-32x48d V2": "more data",
  "Linear Probe CLIP (ViT-L/14@336px)": "linear probe",
  "Zero-Shot CLIP (ViT-L/14@336px)": "zero-shot",
}


class ShiftError(ValueError):
  """Accuracies that no figure can be made of: which, and why."""


@dataclasses.dataclass(frozen=True)
class Row:
  """A model's accuracies by column, between 0 and 1; what was not measured is not there."""

  model: str
  kind: str
  accuracy: Mapping[str, float]


def read(path: str | os.PathLike[str]) -> tuple[Row, ...]:
  """A CSV of accuracies in percent: columns `model`, `kind`, `ImageNet`, and one a shift.

  Empty cells are not measured; `where` and `status` are notes. SHIFTS has the columns' names, and
  `restricted` those of ImageNet on a shift's classes alone.
  Raises: ShiftError naming the line and the column that cannot be used.
  """
  return _rows(pathlib.Path(path), None)


def published() -> tuple[Row, ...]:
  """The models of Table 16 and Figure 13. Only one of them is of the kind "standard"."""
  return _rows(_PUBLISHED, _KINDS)


def _rows(path: pathlib.Path, kinds: Mapping[str, str] | None) -> tuple[Row, ...]:
  """Args: kinds, of each model, where the file has no column of them."""
  with path.open(encoding="utf-8-sig", newline="") as file:
    reader = csv.DictReader(file)
    columns = tuple(reader.fieldnames or ())
    lines = [(reader.line_num, row) for row in reader]
  if kinds is not None:
    columns = (*columns, "kind")
    lines = [(number, {**row, "kind": kinds[row["model"]]}) for number, row in lines]
  missing = [column for column in ("model", "kind", IMAGENET) if column not in columns]
  if missing:
    raise ShiftError(
      f"{path}: no column {missing[0]!r} in its first line; it has {', '.join(columns) or 'none'}"
    )
  out = []
  for number, row in lines:
    where = f"{path} line {number}"
    if None in row or None in row.values():
      raise ShiftError(f"{where}: want {len(columns)} values, one a column")
    numbers = {c: row[c] for c in columns if c not in _TEXT_COLUMNS and row[c].strip()}
    accuracy = {c: _percent(text, f"{where}, {c}") for c, text in numbers.items()}
    if not row["model"] or not row["kind"]:
      raise ShiftError(f"{where}: want a model and its kind (standard, zero-shot, ...)")
    out.append(Row(row["model"], row["kind"], types.MappingProxyType(accuracy)))
  return tuple(out)


def _percent(text: str, where: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 <= value <= 100:
    raise ShiftError(f"{where}: {text!r} is no accuracy in percent")
  return value / 100


def restricted(shift: str) -> str:
  """The column of ImageNet's accuracy on a shift's classes, by `accuracy.restricted_accuracy`."""
  return f"{IMAGENET} on {shift} classes"


def average_name(shifts: Sequence[str]) -> str:
  """What the mean over these shifts is called, with those of the paper's seven that it lacks."""
  lacking = [shift for shift in SHIFTS if shift not in shifts]
  if not lacking:
    return f"average of {len(SHIFTS)} shifts"
  return f"average of {len(shifts)} of {len(SHIFTS)} shifts (without {', '.join(lacking)})"


def by_shift(row: Row) -> Row:
  """The row with one accuracy a shift: of the two that are kept for videos their mean."""
  videos = {
    shift: statistics.fmean(row.accuracy[column] for column in columns)
    for shift, columns in SHIFTS.items()
    if all(column in row.accuracy for column in columns)
  }
  return dataclasses.replace(row, accuracy={**row.accuracy, **videos})


def with_average(rows: Sequence[Row], bases: Mapping[str, str]) -> tuple[Row, ...]:
  """The rows that have all shifts and bases of `bases`, with the means of both as columns more.

  Args: bases, of each shift, the column that predicts it. Every shift counts once, as in figures
    13 and 14; the columns are called `average_name` and "ImageNet for" that.
  """
  name, columns = average_name(list(bases)), {*bases, *bases.values()}
  out = []
  for row in rows:
    if columns <= set(row.accuracy):
      own = row.accuracy
      means = {
        name: statistics.fmean(own[shift] for shift in bases),
        f"{IMAGENET} for {name}": statistics.fmean(own[base] for base in bases.values()),
      }
      out.append(dataclasses.replace(row, accuracy={**own, **means}))
  return tuple(out)


@dataclasses.dataclass(frozen=True)
class Fit:
  """logit(accuracy under the shift) = intercept + slope logit(accuracy on `base`)."""

  base: str
  shift: str
  intercept: float
  slope: float
  logits: tuple[tuple[float, float], ...]  # of the models that the line stands on: base and shift

  @property
  def points(self) -> int:
    return len(self.logits)

  def predict(self, base_accuracy: float) -> float:
    """The accuracy under the shift that a standard model of that accuracy has."""
    return float(_sigmoid(self.intercept + self.slope * logit(base_accuracy, self.base)))


def logit(accuracy: float, where: str) -> float:
  """log(p / (1 - p)). Raises: ShiftError, with `where`, for 0 and 1, which have none."""
  if not 0 < accuracy < 1:
    raise ShiftError(f"{where}: accuracy {accuracy} has no logit; want one between 0 and 1")
  return math.log(accuracy / (1 - accuracy))


def _sigmoid(x: np.ndarray | float) -> np.ndarray:
  return 1 / (1 + np.exp(-np.clip(x, -700, 700)))


def fit(rows: Sequence[Row], shift: str, base: str = IMAGENET) -> Fit:
  """The least-squares line through the standard models that have both columns.

  Args: base, the column that predicts: ImageNet, or what `restricted` calls.
  Raises: ShiftError when fewer than two models, or only equal accuracies on `base`, are there.
  """
  used = _standard(rows, shift, base)
  x = np.array([logit(r.accuracy[base], f"{r.model}, {base}") for r in used])
  y = np.array([logit(r.accuracy[shift], f"{r.model}, {shift}") for r in used])
  if len(used) < 2 or np.ptp(x) == 0:
    found = f"{len(used)} model{'s' * (len(used) != 1)} of kind {STANDARD}"
    raise ShiftError(
      f"no line for {shift}: {found} with both accuracies, and two that differ on {base} are "
      "wanted; give a CSV with the accuracies of more standard models"
    )
  slope, intercept = (float(one) for one in _lines(x[None], y[None])[0])
  return Fit(base, shift, intercept, slope, tuple(zip(x.tolist(), y.tolist(), strict=True)))


def _standard(rows: Sequence[Row], shift: str, base: str) -> list[Row]:
  return [r for r in rows if r.kind == STANDARD and {base, shift} <= set(r.accuracy)]


def _lines(x_DN: np.ndarray, y_DN: np.ndarray) -> np.ndarray:
  """Least squares of each of D draws of N points: [D, 2], slope and intercept."""
  x_mean_D1, y_mean_D1 = x_DN.mean(axis=1, keepdims=True), y_DN.mean(axis=1, keepdims=True)
  off_DN = x_DN - x_mean_D1
  slope_D = (off_DN * (y_DN - y_mean_D1)).sum(axis=1) / (off_DN**2).sum(axis=1)
  return np.stack([slope_D, y_mean_D1[:, 0] - slope_D * x_mean_D1[:, 0]], axis=1)


def interval(
  line: Fit, base_accuracy: float, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
  """Between which accuracies the prediction lies, by a bootstrap over the models of the line.

  Raises: ShiftError on fewer than three models, of which no draw says anything.
  Source: figure 13's bands (95 %).
  """
  if line.points < 3:
    raise ShiftError(f"no interval for {line.shift}: {line.points} models, at least 3 are wanted")
  drawn = np.random.default_rng(seed).integers(line.points, size=(draws, line.points))
  x_DN, y_DN = np.moveaxis(np.array(line.logits)[drawn], -1, 0)
  differ = np.ptp(x_DN, axis=1) > 0
  lines_D2 = _lines(x_DN[differ], y_DN[differ])
  found_D = _sigmoid(lines_D2 @ np.array([logit(base_accuracy, line.base), 1.0]))
  low, high = np.quantile(found_D, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Effective:
  """One model under one shift, or on average; shares (0.1 is ten points).

  `low` and `high` are `effective` by the ends of the prediction's 95 % interval; None where too few
  models make the line for one.
  """

  model: str
  shift: str
  base_accuracy: float
  accuracy: float
  predicted: float
  effective: float
  low: float | None
  high: float | None


def effective(row: Row, line: Fit) -> Effective:
  """What a model has beyond the prediction.

  Raises: ShiftError for a row that has not both columns of `line`, or 0 or 1 on its base.
  """
  if line.base not in row.accuracy or line.shift not in row.accuracy:
    lacking = line.base if line.shift in row.accuracy else line.shift
    raise ShiftError(f"{row.model}, {line.shift}: its accuracy on {lacking!r} is not measured")
  x, y = row.accuracy[line.base], row.accuracy[line.shift]
  try:
    predicted = line.predict(x)
  except ShiftError as error:
    raise ShiftError(f"{row.model}, {line.shift}, {error}") from None
  low, high = interval(line, x) if line.points > 2 else (None, None)
  ends = [None if end is None else y - end for end in (high, low)]
  return Effective(row.model, line.shift, x, y, predicted, y - predicted, *ends)


@dataclasses.dataclass(frozen=True)
class Found:
  """The effective robustness of models; `notes` tell of every line what it is of, or why not."""

  effective: tuple[Effective, ...]
  notes: tuple[str, ...]


def over_lines(measured: Sequence[Row], models: Sequence[Row]) -> Found:
  """The effective robustness of measured models under each shift, and on average over theirs.

  An average is of all shifts that a model has; others that have these too are in it. The line of an
  average is through the averages of the standard models, as in figure 13.
  Args: models, those that the lines are of, among others.
  """
  measured, models = [by_shift(r) for r in measured], [by_shift(r) for r in models]
  bases, out, said = dict[str, str](), list[Effective](), list[str]()
  for shift in SHIFTS:
    rows = [row for row in measured if shift in row.accuracy]
    if rows:
      bases[shift], why = _base(shift, rows, models)
      more, words = _over_line(rows, models, shift, bases[shift], why)
      out, said = out + more, said + words
  there = [{e.shift for e in out if e.model == row.model} for row in measured]
  for own in dict.fromkeys(tuple(s for s in SHIFTS if s in shifts) for shifts in there):
    if len(own) > 1:
      chosen, name = {shift: bases[shift] for shift in own}, average_name(own)
      averaged, lines = with_average(measured, chosen), with_average(models, chosen)
      more, words = _over_line(averaged, lines, name, f"{IMAGENET} for {name}", "")
      out, said = out + more, said + words
  return Found(tuple(out), tuple(dict.fromkeys(said)))


def _base(shift: str, rows: Sequence[Row], models: Sequence[Row]) -> tuple[str, str]:
  """The column that predicts a shift, and why it is not the paper's, where it is not."""
  own = restricted(shift)
  if shift in _WHOLE:
    return IMAGENET, ""
  if not any(own in row.accuracy for row in rows):
    return IMAGENET, f"{own!r} is not measured"
  if len(_standard(models, shift, own)) < 2:
    return IMAGENET, f"fewer than two standard models have a column {own!r}"
  return own, ""


def _over_line(
  rows: Sequence[Row], models: Sequence[Row], shift: str, base: str, why: str
) -> tuple[list[Effective], list[str]]:
  """The rows above a shift's line, and what it is of. `why` the base is not the paper's, or ""."""
  try:
    line = fit(models, shift, base)
  except ShiftError as error:
    return [], [str(error)]
  out, said = list[Effective](), list[str]()
  for row in rows:
    try:
      out.append(effective(row, line))
    except ShiftError as error:
      said.append(str(error))
  own = [100 * effective(r, line).effective for r in _standard(models, shift, base)]
  words = (
    f"{shift}: above the line of {line.points} standard models over their accuracy on {base!r}"
  )
  words += f" ({min(own):+.1f} to {max(own):+.1f} points off it themselves)"
  words += f", of all its classes and not of the shift's alone, as {why}" if why else ""
  return out, [words, *said]
