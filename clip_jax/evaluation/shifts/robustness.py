"""Natural distribution shifts: accuracies that compare with the published ones, and what they mean.

Effective robustness is what a model has under a shift beyond what its ImageNet accuracy predicts.
The prediction is a line through the logits of the accuracies of standard ImageNet models.
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
AVERAGE = "average of 7 shifts"

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

  Empty cells are not measured; `where` and `status` are notes. SHIFTS has the columns' names.
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


def average(accuracy: Mapping[str, float]) -> float:
  """The mean over the seven shifts, each counted once. Raises: ShiftError naming those missing.

  Source: figures 13 and 14.
  """
  missing = [c for columns in SHIFTS.values() for c in columns if c not in accuracy]
  if missing:
    raise ShiftError(f"no average over the seven shifts: {', '.join(missing)} not measured")
  return statistics.fmean(
    statistics.fmean(accuracy[column] for column in columns) for columns in SHIFTS.values()
  )


def with_average(rows: Sequence[Row]) -> tuple[Row, ...]:
  """The rows that have all seven shifts, with their average as one more column, AVERAGE."""
  every = {column for columns in SHIFTS.values() for column in columns}
  return tuple(
    dataclasses.replace(row, accuracy={**row.accuracy, AVERAGE: average(row.accuracy)})
    for row in rows
    if every <= set(row.accuracy)
  )


@dataclasses.dataclass(frozen=True)
class Fit:
  """logit(accuracy under the shift) = intercept + slope logit(accuracy on `base`)."""

  base: str
  shift: str
  intercept: float
  slope: float
  models: tuple[str, ...]  # that the line stands on

  @property
  def points(self) -> int:
    return len(self.models)

  def predict(self, base_accuracy: float) -> float:
    """The accuracy under the shift that a standard model of that accuracy has."""
    return _sigmoid(self.intercept + self.slope * logit(base_accuracy, self.base))

  def effective_robustness(self, base_accuracy: float, shift_accuracy: float) -> float:
    """What the model has beyond the prediction, as a share (0.1 is ten points)."""
    return shift_accuracy - self.predict(base_accuracy)


def logit(accuracy: float, where: str) -> float:
  """log(p / (1 - p)). Raises: ShiftError, with `where`, for 0 and 1, which have none."""
  if not 0 < accuracy < 1:
    raise ShiftError(f"{where}: accuracy {accuracy} has no logit; want one between 0 and 1")
  return math.log(accuracy / (1 - accuracy))


def _sigmoid(x: float) -> float:
  return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def fit(
  rows: Sequence[Row], shift: str, kinds: Sequence[str] = ("standard",), base: str = IMAGENET
) -> Fit:
  """The least-squares line through the rows of those kinds that have both columns.

  Args: base, the column that predicts: ImageNet, or a column with ImageNet's accuracy on the
    shift's classes alone (`restricted_accuracy`), as the paper's averages want it.
  Raises: ShiftError when fewer than two models, or only equal accuracies on `base`, are there.
  """
  used = [r for r in rows if r.kind in kinds and base in r.accuracy and shift in r.accuracy]
  x = np.array([logit(r.accuracy[base], f"{r.model}, {base}") for r in used])
  y = np.array([logit(r.accuracy[shift], f"{r.model}, {shift}") for r in used])
  if len(used) < 2 or np.ptp(x) == 0:
    found = f"{len(used)} model{'s' * (len(used) != 1)} of kind {' or '.join(kinds)}"
    raise ShiftError(
      f"no line for {shift}: {found} with both accuracies, and two that differ on {base} are "
      "wanted; give a CSV with the accuracies of more standard models"
    )
  slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
  intercept = float(y.mean() - slope * x.mean())
  return Fit(base, shift, intercept, slope, tuple(r.model for r in used))


def interval(
  rows: Sequence[Row],
  line: Fit,
  base_accuracy: float,
  *,
  level: float = 0.95,
  draws: int = 1000,
  seed: int = 0,
) -> tuple[float, float]:
  """Between which accuracies the prediction lies, by a bootstrap over the models of the line.

  Raises: ShiftError on fewer than three models, of which no draw says anything.
  Source: figure 13's bands (95 %).
  """
  used = [r for r in rows if r.model in line.models and line.base in r.accuracy]
  used = [r for r in used if line.shift in r.accuracy]
  if len(used) < 3:
    raise ShiftError(f"no interval for {line.shift}: {len(used)} models, at least 3 are wanted")
  rng, found = np.random.default_rng(seed), []
  for _ in range(draws):
    drawn = [used[i] for i in rng.integers(len(used), size=len(used))]
    if len({r.accuracy[line.base] for r in drawn}) > 1:
      kinds = tuple({r.kind for r in drawn})
      found.append(fit(drawn, line.shift, kinds, line.base).predict(base_accuracy))
  low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Effective:
  """One model under one shift; shares. `points` models stand behind the prediction."""

  model: str
  kind: str
  shift: str
  base_accuracy: float
  accuracy: float
  predicted: float
  effective: float
  points: int


def effective(rows: Sequence[Row], line: Fit) -> tuple[Effective, ...]:
  """The effective robustness of every row that has both columns of `line`."""
  out = []
  for row in rows:
    if line.base in row.accuracy and line.shift in row.accuracy:
      x, y = row.accuracy[line.base], row.accuracy[line.shift]
      gain = line.effective_robustness(x, y)
      predicted = line.predict(x)
      out.append(Effective(row.model, row.kind, line.shift, x, y, predicted, gain, line.points))
  return tuple(out)
