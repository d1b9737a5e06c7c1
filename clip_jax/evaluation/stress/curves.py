"""A stress test: accuracy under every corruption at every severity, beside that on clean images."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clip_jax.data import records
from clip_jax.evaluation import curves
from clip_jax.evaluation.stress import corruptions

CLEAN = ("clean", 0)  # the cell of the images as they are


@dataclasses.dataclass(frozen=True)
class StressResult:
  """What a stress test found. Shares are between 0 and 1; means are over the severities tested."""

  name: str
  clean: float
  severities: tuple[int, ...]
  accuracy: Mapping[str, tuple[float, ...]]  # by corruption, one figure a severity

  @property
  def means(self) -> dict[str, float]:
    """By corruption."""
    return {name: statistics.fmean(values) for name, values in self.accuracy.items()}

  @property
  def by_severity(self) -> tuple[float, ...]:
    """The mean over corruptions at each severity."""
    return tuple(statistics.fmean(values) for values in zip(*self.accuracy.values(), strict=True))

  @property
  def mean(self) -> float:
    """Over corruptions and severities."""
    return statistics.fmean(self.by_severity)

  @property
  def published_mean(self) -> float | None:
    """Over the fifteen corruptions and five severities of the published tables, if all are there.

    Not the published mCE: that divides each corruption's error by AlexNet's.
    """
    complete = self.severities == corruptions.SEVERITIES
    if not complete or not set(corruptions.PUBLISHED) <= set(self.accuracy):
      return None
    return statistics.fmean(self.means[name] for name in corruptions.PUBLISHED)

  def relative(self, accuracy: float) -> float:
    """What part of the clean accuracy that is; nan where the clean accuracy is 0."""
    return accuracy / self.clean if self.clean else math.nan

  def metrics(self) -> dict[str, float]:
    """Flat, for a line of JSON: `fog/3` is the accuracy at severity 3, `fog/mean` that over all."""
    out = {"clean": self.clean, "mean": self.mean, "relative": self.relative(self.mean)}
    if self.published_mean is not None:
      out["published_mean"] = self.published_mean
    for name, values in self.accuracy.items():
      out |= {f"{name}/{s}": v for s, v in zip(self.severities, values, strict=True)}
      out[f"{name}/mean"] = self.means[name]
    return out


def stress(
  evaluate: Callable[[records.RecordSource], float],
  source: records.RecordSource,
  fit: Callable[[Any], np.ndarray],
  names: Sequence[str] = corruptions.NAMES,
  severities: Sequence[int] = corruptions.SEVERITIES,
  *,
  name: str = "",
  done: Mapping[tuple[str, int], float] | None = None,
  note: Callable[[str, int, float], None] = lambda corruption, severity, accuracy: None,
) -> StressResult:
  """Evaluates `source` clean and under each corruption at each severity.

  Args: evaluate, a source -> its accuracy, 0 to 1; fit, the model's (`encoding.Model.fit`); done,
    cells (corruption, severity) that an earlier run measured and that are not measured again, the
    clean one under CLEAN; note, called with every cell as soon as it is measured.
  Raises: CorruptionError, before anything is measured, for an unknown or repeated name or severity
    or none at all; and for an accuracy that is none.
  """
  names, severities = tuple(names), tuple(sorted(severities))
  for what, values in (("corruptions", names), ("severities", severities)):
    if not values or len(set(values)) < len(values):
      raise corruptions.CorruptionError(f"{what} {values}: want at least one, and each once")
  cells = [(corruption, severity) for corruption in names for severity in severities]
  for corruption, severity in cells:
    corruptions.check(corruption, severity)
  known = dict(done or {})
  for corruption, severity in (CLEAN, *cells):
    if (corruption, severity) not in known:
      cell = source
      if severity:
        cell = corruptions.CorruptedSource(source, corruption, severity, fit)
      accuracy = _share(evaluate(cell), corruption, severity)
      known[corruption, severity] = accuracy
      note(corruption, severity, accuracy)
  return StressResult(
    name=name,
    clean=_share(known[CLEAN], *CLEAN),
    severities=severities,
    accuracy={c: tuple(_share(known[c, s], c, s) for s in severities) for c in names},
  )


def _share(accuracy: float, corruption: str, severity: int) -> float:
  if not 0 <= accuracy <= 1:  # nan is not either
    raise corruptions.CorruptionError(
      f"{corruption}, severity {severity}: accuracy {accuracy} is no share between 0 and 1; remove "
      "the cell from the results and measure it again"
    )
  return float(accuracy)


def panels(result: StressResult, chance: float | None = None) -> list[curves.Panel]:
  """The curves of accuracy by severity for the report: the mean, then each corruption.

  Severity 0 is the clean accuracy. `chance` is the accuracy of a guess.
  """
  count = len(result.accuracy)
  lines = {f"mean of {count} corruptions" if count > 1 else "mean": result.by_severity}
  lines |= {name.replace("_", " "): values for name, values in result.accuracy.items()}
  out = []
  for title, values in lines.items():
    curve = [(0.0, result.clean)]
    curve += [(float(s), v) for s, v in zip(result.severities, values, strict=True)]
    out.append(
      curves.panel(title, {"accuracy": curve}, curves.PERCENT, True, chance, along="severity")
    )
  return out
