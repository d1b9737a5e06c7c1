"""What overlap with the training data is worth: accuracy on Overlap, Clean and All, with tests.

Overlap is the evaluated images that have a near duplicate in training, Clean the others, All both.
Source: section 5 and figure 17.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats

from clip_jax.data import records
from clip_jax.evaluation import encoding

LEVEL = 0.995  # of the Clopper-Pearson interval


@dataclasses.dataclass(frozen=True)
class Effect:
  """Counts of right answers, and what follows from them. Shares are between 0 and 1.

  A figure that needs an image in Overlap, or in Clean, is nan where there is none.
  """

  name: str
  right_overlap: int
  overlapping: int
  right_clean: int
  clean: int

  @property
  def n(self) -> int:
    return self.overlapping + self.clean

  @property
  def share(self) -> float:
    """How much of the evaluation set is in Overlap."""
    return self.overlapping / self.n

  @property
  def accuracy(self) -> float:
    """On All."""
    return (self.right_overlap + self.right_clean) / self.n

  @property
  def overlap_accuracy(self) -> float:
    return self.right_overlap / self.overlapping if self.overlapping else math.nan

  @property
  def clean_accuracy(self) -> float:
    return self.right_clean / self.clean if self.clean else math.nan

  @property
  def inflation(self) -> float:
    """All - Clean, the paper's main figure: how much the accuracy gains by the overlap."""
    return self.accuracy - self.clean_accuracy

  @property
  def difference(self) -> float:
    """Overlap - Clean, the left half of figure 17."""
    return self.overlap_accuracy - self.clean_accuracy

  @property
  def p_value(self) -> float:
    """How likely so many right answers in Overlap, or more, are at the accuracy of Clean.

    One-tailed, by the binomial distribution. Small: the model does better on what it has seen.
    """
    if not self.overlapping or not self.clean:
      return math.nan
    test = scipy.stats.binomtest(
      self.right_overlap, self.overlapping, self.clean_accuracy, alternative="greater"
    )
    return float(test.pvalue)

  @property
  def interval(self) -> tuple[float, float]:
    """Clopper and Pearson's interval of the accuracy on Overlap, 99.5 %, two-sided."""
    if not self.overlapping:
      return math.nan, math.nan
    found = scipy.stats.binomtest(self.right_overlap, self.overlapping).proportion_ci(LEVEL)
    return float(found.low), float(found.high)

  @property
  def differs(self) -> bool:
    """Whether that interval leaves the accuracy on Clean out, above or below."""
    low, high = self.interval
    return self.clean_accuracy < low or self.clean_accuracy > high

  def metrics(self) -> dict[str, float]:
    """Flat, for a line of JSON."""
    low, high = self.interval
    return {
      "n": float(self.n),
      "overlapping": float(self.overlapping),
      "share": self.share,
      "all": self.accuracy,
      "overlap": self.overlap_accuracy,
      "clean": self.clean_accuracy,
      "inflation": self.inflation,
      "p_value": self.p_value,
      "overlap_low": low,
      "overlap_high": high,
    }


def effect(name: str, right_overlap: int, overlapping: int, right_clean: int, clean: int) -> Effect:
  """Checked counts. Raises: EvaluationError for none at all or more right answers than images."""
  for right, images in ((right_overlap, overlapping), (right_clean, clean)):
    if not 0 <= right <= images:
      raise encoding.EvaluationError(f"{name}: {right} right answers of {images} images")
  if overlapping + clean == 0:
    raise encoding.EvaluationError(f"{name}: no images at all")
  return Effect(name, right_overlap, overlapping, right_clean, clean)


class Selection:
  """Some records of `source`, in the order of `indices`."""

  def __init__(self, source: records.RecordSource, indices: Sequence[int]):
    self._source, self._indices = source, tuple(int(i) for i in indices)
    self.classes: tuple[str, ...] = tuple(getattr(source, "classes", ()))

  def __repr__(self) -> str:
    return f"Selection({self._source!r}, {len(self)} records, {self.fingerprint[:16]})"

  @property
  def fingerprint(self) -> str:
    return hashlib.sha256(f"{self._source.fingerprint} {self._indices}".encode()).hexdigest()

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> records.Record:
    return self._source[self._indices[index]]

  def locate(self, index: int) -> str:
    return self._source.locate(self._indices[index])


def measure(
  evaluate: Callable[[records.RecordSource], float],
  source: records.RecordSource,
  overlapping: np.ndarray,
  name: str = "",
) -> Effect:
  """Evaluates Overlap and Clean apart; `overlapping` is bool [N] (`overlap.Matches.overlapping`).

  Args: evaluate, a source -> its accuracy, 0 to 1: right answers over images, nothing else.
  Raises: EvaluationError when the lengths differ, or when the accuracy is no such share (a mean
    per class is none, and no binomial test applies to it).
  """
  if overlapping.shape != (len(source),) or overlapping.dtype != np.bool_:
    raise encoding.EvaluationError(
      f"{name}: overlap of {overlapping.shape} {overlapping.dtype} for {len(source)} records"
    )
  counts = []
  for wanted in (True, False):
    indices = np.flatnonzero(overlapping == wanted)
    right = 0.0
    if len(indices):
      right = len(indices) * evaluate(Selection(source, list(indices)))
    if not (math.isfinite(right) and abs(right - round(right)) < 1e-3):
      raise encoding.EvaluationError(
        f"{name}: accuracy {right / len(indices)} is no number of right answers over "
        f"{len(indices)} images; the tests need plain accuracy"
      )
    counts += [round(right), len(indices)]
  return effect(name, *counts)
