"""The paper's linear probe and few-shot probe on an image encoder's features.

Source: appendix A.3, section 3.2, Figure 6.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from clip_jax.evaluation.probe import logistic

SHOTS = (1, 2, 4, 8, 16)

_STEPS_PER_DECADE = 8
_DECADES = 6  # each way from 1
ENDS = (10.0**-_DECADES, 10.0**_DECADES)  # of the lambdas that are searched
_FIRST_STEP = 2 * _STEPS_PER_DECADE  # the search starts with every other decade
HELD_BACK = 0.2  # of the training set, for a validation set where there is none

Metric = Callable[[np.ndarray, np.ndarray], float]  # of scores [N, C] and labels; more is better


class ProbeError(ValueError):
  """A probe that would give a wrong figure: what of it, and why."""


@dataclasses.dataclass(frozen=True)
class Split:
  """Features float32 [N, D] with labels: int [N], or [N, C] of 1, 0 and -1 for several an image."""

  features_ND: np.ndarray
  labels: np.ndarray

  def take(self, rows: np.ndarray) -> "Split":
    return Split(self.features_ND[rows], self.labels[rows])


@dataclasses.dataclass(frozen=True)
class Tried:
  """One lambda of a search."""

  lambda_: float
  score: float  # on the validation set
  iterations: int
  converged: bool


@dataclasses.dataclass(frozen=True)
class Learned:
  """A classifier with the lambda that was found for it."""

  fit: logistic.Fit  # the last one
  lambda_: float
  tried: tuple[Tried, ...]  # in the order of the search
  examples: int  # that the last fit saw


@dataclasses.dataclass(frozen=True)
class ProbeResult:
  score: float  # on the test set
  lambda_: float
  tried: tuple[Tried, ...]  # in the order of the search
  iterations: int  # of the last fit
  converged: bool  # of the last fit
  examples: int  # that the last fit saw


def doubts(lambdas: Sequence[float], converged: Sequence[bool]) -> tuple[str, ...]:
  """In sentences what speaks against fits: those short of their minimum, lambdas at an end.

  Args: lambdas that were chosen; converged, of each fit.
  """
  out = []
  if bad := sum(not there for there in converged):
    out.append(f"{bad} of {len(converged)} fits did not come to their minimum.")
  for lambda_ in dict.fromkeys(lambdas):
    if lambda_ in ENDS:
      out.append(f"The lambda chosen, {lambda_:g}, is an end of those tried.")
  return tuple(out)


def sweep(score: Callable[[float], float]) -> tuple[float, tuple[tuple[float, float], ...]]:
  """The lambda with the highest score, and (lambda, score) of all that were looked at.

  Starts with 1e6, 1e4, ..., 1e-6 and looks four times on both sides of the best so far, one decade
  away, then 1/2, 1/4 and 1/8: at most 15 lambdas of the 97 with 8 steps a decade (the paper counts
  96, which are the steps). Past the ends there are none. Of equal scores the largest lambda wins,
  the simplest classifier; the paper does not say.
  Raises: ProbeError when a score is not a number.
  Source: appendix A.3.
  """
  end = _DECADES * _STEPS_PER_DECADE
  scores: dict[int, float] = {}
  step = _FIRST_STEP
  wanted = list(range(end, -end - 1, -step))
  while True:
    for k in wanted:
      if k not in scores:
        scores[k] = score(_lambda(k))
        if math.isnan(scores[k]):
          raise ProbeError(f"lambda {_lambda(k):g}: the validation score is nan; check the metric")
    best = max(scores, key=lambda k: (scores[k], k))
    if step == 1:
      return _lambda(best), tuple((_lambda(k), s) for k, s in scores.items())
    step //= 2
    wanted = [k for k in (best + step, best - step) if abs(k) <= end]


def _lambda(k: int) -> float:
  return float(10.0 ** (k / _STEPS_PER_DECADE))


def probe(
  train: Split,
  test: Split,
  classes: int,
  metric: Metric,
  validation: Split | None = None,
  *,
  seed: int = 0,
  stop: logistic.Stop = logistic.AT_MINIMUM,
  mesh: Mesh | None = None,
) -> ProbeResult:
  """What `learn` finds, on the test set. Raises: LogisticError on bad features or labels."""
  _check(classes, *([] if validation is None else [validation]), test)
  found = learn(train, classes, metric, validation, seed=seed, stop=stop, mesh=mesh)
  score = metric(found.fit.scores(test.features_ND), test.labels)
  last = found.fit
  return ProbeResult(
    score, found.lambda_, found.tried, last.iterations, last.converged, found.examples
  )


def learn(
  train: Split,
  classes: int,
  metric: Metric,
  validation: Split | None = None,
  *,
  seed: int = 0,
  stop: logistic.Stop = logistic.AT_MINIMUM,
  mesh: Mesh | None = None,
) -> Learned:
  """Searches lambda on the validation set, and fits again with that merged into training.

  Without a validation set one is held back by `hold_back(train, seed)`. Several labels an image are
  as many problems of two classes, with one lambda: the paper does not say more of VOC2007.
  Differs: fits go to the minimum (`stop`). The paper's, as far as its authors told, are as good as
  scikit-learn's defaults leave them: far from it at a small lambda.
  Raises: LogisticError on bad features or labels, of any split.
  Source: appendix A.3.
  """
  if validation is None:
    train, validation = hold_back(train, seed)
  _check(classes, validation)
  best, lambda_, tried = _search(train, validation, classes, metric, stop, mesh)
  features_ND = np.concatenate([train.features_ND, validation.features_ND])
  labels = np.concatenate([train.labels, validation.labels])
  problem = logistic.prepare(features_ND, labels, classes, mesh)
  return Learned(logistic.fit(problem, lambda_, best, stop), lambda_, tried, len(labels))


def few_shot(
  train: Split,
  validation: Split,
  test: Split,
  classes: int,
  metric: Metric,
  shots: int,
  seed: int,
  *,
  stop: logistic.Stop = logistic.AT_MINIMUM,
  mesh: Mesh | None = None,
) -> ProbeResult:
  """The probe of `shots` examples a class of `train`, drawn by the seed, on the test set.

  Of one seed the examples of fewer shots are among those of more. Lambda is searched on the whole
  validation set: more than a few examples choose that one number. The validation set is not merged
  into training. The paper says neither.
  Raises: LogisticError as `probe`; ProbeError for several labels an image, or where a class has
    fewer examples than shots.
  Source: section 3.1.5, Figure 6.
  """
  if train.labels.ndim != 1:
    raise ProbeError("few-shot wants one label an image: of several no number a class can be drawn")
  _check(classes, validation, test)
  drawn = train.take(draw(train.labels, shots, classes, seed))
  fit, lambda_, tried = _search(drawn, validation, classes, metric, stop, mesh)
  score = metric(fit.scores(test.features_ND), test.labels)
  return ProbeResult(score, lambda_, tried, fit.iterations, fit.converged, len(drawn.labels))


def _check(classes: int, *splits: Split) -> None:
  for split in splits:
    logistic.check(split.features_ND, split.labels, classes)


def _search(
  train: Split,
  validation: Split,
  classes: int,
  metric: Metric,
  stop: logistic.Stop,
  mesh: Mesh | None,
) -> tuple[logistic.Fit, float, tuple[Tried, ...]]:
  """(the best fit, its lambda, all of them)."""
  problem = logistic.prepare(train.features_ND, train.labels, classes, mesh)
  fits: dict[float, logistic.Fit] = {}

  def score(lambda_: float) -> float:
    start = between(fits, lambda_)
    fits[lambda_] = logistic.fit(problem, lambda_, start, stop)
    return metric(fits[lambda_].scores(validation.features_ND), validation.labels)

  lambda_, scores = sweep(score)
  tried = (Tried(at, s, fits[at].iterations, fits[at].converged) for at, s in scores)
  return fits[lambda_], lambda_, tuple(tried)


def between(fits: dict[float, logistic.Fit], lambda_: float) -> logistic.Fit | None:
  """Where to start: on the line through the fits of two other lambdas, over log(lambda).

  Of the nearest on both sides or else of the two nearest. Weights change about evenly along it.
  """
  if len(fits) < 2:
    return next(iter(fits.values()), None)
  larger = sorted(other for other in fits if other > lambda_)
  smaller = sorted((other for other in fits if other < lambda_), reverse=True)
  near = larger[:1] + smaller[:1] if larger and smaller else (larger or smaller)[:2]
  a, b = (fits[other] for other in near)
  share = math.log(lambda_ / near[0]) / math.log(near[1] / near[0])
  return dataclasses.replace(
    a,
    weights_DC=a.weights_DC + np.float32(share) * (b.weights_DC - a.weights_DC),
    bias_C=a.bias_C + np.float32(share) * (b.bias_C - a.bias_C),
  )


def hold_back(train: Split, seed: int = 0, share: float = HELD_BACK) -> tuple[Split, Split]:
  """(training, validation) of a training set: `share` of each class, rounded down, drawn by `seed`.

  Of several labels an image, that share of all. The paper splits the training set too, and does not
  say how. Raises: ProbeError when nothing would be held back.
  """
  n = len(train.labels)
  labels = train.labels if train.labels.ndim == 1 else np.zeros(n, np.int64)
  place_N, count_N = _places(labels, seed)
  held = place_N < np.floor(share * count_N)
  if not held.any():
    raise ProbeError(
      f"{n} examples: every class has too few to hold back {share:.0%} for validation; give a "
      "validation set"
    )
  return train.take(np.flatnonzero(~held)), train.take(np.flatnonzero(held))


def draw(labels: np.ndarray, shots: int, classes: int, seed: int) -> np.ndarray:
  """Rows, ascending, of `shots` examples of every class, drawn by `seed`.

  Raises: ProbeError naming a class with fewer.
  """
  counts_C = np.bincount(labels, minlength=classes)
  if shots < 1 or counts_C.min() < shots:
    c = int(np.argmin(counts_C))
    raise ProbeError(
      f"{shots} shots: class {c} has {counts_C[c]} examples; ask for at least 1 and at most that"
    )
  return np.flatnonzero(_places(labels, seed)[0] < shots)


def _places(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Of each example: its place, from 0, in a random order of its class, and the class's size."""
  shuffled = np.random.default_rng(seed).permutation(len(labels))
  by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
  _, first, class_of, counts = np.unique(
    labels[by_class], return_index=True, return_inverse=True, return_counts=True
  )
  place_N, count_N = np.zeros((2, len(labels)), np.int64)
  place_N[by_class] = np.arange(len(labels)) - first[class_of]
  count_N[by_class] = counts[class_of]
  return place_N, count_N
