"""What one cell of the paper's tables is measured by: zero-shot, linear probe, retrieval, shifts.

Source: Tables 10, 11, 13 and 16, sections 3.1 to 3.3, appendices A and E.1.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from clip_jax.evaluation import classifier, datasets, encoding, retrieval, scores
from clip_jax.evaluation.paper.results import Fitted
from clip_jax.evaluation.paper.units import CAPTIONS, Fold, Settings, Task
from clip_jax.evaluation.probe import features, linear_probe, probe_file, splits
from clip_jax.evaluation.shifts import accuracy as shift_accuracy


@dataclasses.dataclass(frozen=True)
class Weights:
  """A model and what its features and results are kept under."""

  name: str
  model: encoding.FeatureModel
  hash: str  # of the weights and all else that the model computes by


@dataclasses.dataclass(frozen=True)
class Value:
  """A measured figure in percent, over `n` images."""

  metric: str
  percent: float
  n: int


@dataclasses.dataclass(frozen=True)
class Found:
  values: tuple[Value, ...]
  left_out: tuple[str, ...]  # where the records stand that were left out, in training too
  fits: tuple[Fitted, ...] = ()  # of the probes, one a fold


Progress = Callable[[str, int, int], None]  # of what, how many are done, of how many


def measure(given: Task, weights: Weights, settings: Settings, progress: Progress) -> Found:
  """Measures the figures of a unit; of several folds their mean.

  Every process must call it alike. Raises: EvaluationError naming the record that is bad, or whose
    label is no class; NotAvailable where no image is of a shift's classes; PromptError, ProbeError,
    LogisticError, ShiftError; OSError.
  """
  if given.unit.table == "13":
    return _retrieval(given, weights, settings, progress)
  run = _probe if given.unit.probed else _zero_shot
  found = [run(given, fold, weights, settings, progress) for fold in given.folds]
  sizes = [one.n for one in found]
  distinct = {fold.test.fingerprint: n for fold, n in zip(given.folds, sizes, strict=True)}
  percent = 100 * float(np.mean([one.share for one in found]))
  value = Value(given.unit.dataset.metric, round(percent, 10), sum(distinct.values()))
  left_out = tuple(dict.fromkeys(where for one in found for where in one.left_out))
  return Found((value,), left_out, tuple(one.fit for one in found if one.fit))


@dataclasses.dataclass(frozen=True)
class _Scored:
  """A share of so many images, those left out, and how the probe was fitted."""

  share: float
  n: int
  left_out: tuple[str, ...]
  fit: Fitted | None = None


def _zero_shot(
  given: Task, fold: Fold, weights: Weights, settings: Settings, progress: Progress
) -> _Scored:
  assert given.prompt_set is not None
  copy, name = fold.test, given.unit.dataset.key
  class_CE = classifier.classifier(
    weights.model,
    given.prompt_set,
    settings.cache,
    weights.hash,
    settings.batch,
    functools.partial(progress, f"{name}: prompts"),
  )
  found = _features(copy, "embedding", weights, settings, progress)
  return _scored(given, copy, found, encoding.similarities(found.rows_ND, class_CE))


def _probe(
  given: Task, fold: Fold, weights: Weights, settings: Settings, progress: Progress
) -> _Scored:
  assert fold.train is not None
  kind, train = features.PROBED[settings.features], fold.train
  classes, metric = len(train.classes), functools.partial(scores.score, train.dataset.metric)

  def learn() -> probe_file.Probe:
    seen = _features(train, kind, weights, settings, progress)
    progress(f"{given.unit.dataset.key}: fitting", 0, 1)
    rest, validation = splits.own_validation(seen, train, _split(train, seen))
    learned = linear_probe.learn(rest, classes, metric, validation)
    return probe_file.Probe(learned.fit, learned.lambda_, seen.left_out)

  key = features.cache_key(weights.model, train, kind, weights.hash)
  trained_on = f"{key} {train.dataset.metric} {settings.limit} {settings.skip_unreadable}"
  probe = probe_file.kept(settings.cache, trained_on, classes, learn)
  found = _features(fold.test, kind, weights, settings, progress)
  scored = _scored(given, fold.test, found, probe.fit.scores(found.rows_ND))
  fit = Fitted(float(probe.lambda_), int(probe.fit.iterations), bool(probe.fit.converged))
  return dataclasses.replace(scored, left_out=(*probe.left_out, *scored.left_out), fit=fit)


def _scored(
  given: Task, copy: datasets.Copy, found: features.Features, scores_NC: np.ndarray
) -> _Scored:
  """By the data set's metric; over the classes of a shift where it has fewer than ImageNet."""
  indices, within = given.unit.dataset.imagenet_indices, given.unit.within
  if within:
    return _scored_within(within, copy, found, scores_NC)
  if indices and len(indices) < scores_NC.shape[1]:
    scores_NC = shift_accuracy.restrict(scores_NC, [[k] for k in indices])
  share = scores.score(given.unit.dataset.metric, scores_NC, _split(copy, found).labels)
  return _Scored(share, len(scores_NC), found.left_out)


def _scored_within(
  within: datasets.Dataset, copy: datasets.Copy, found: features.Features, scores_NC: np.ndarray
) -> _Scored:
  """On ImageNet's images of the classes of a shift. Raises: NotAvailable where there are none."""
  labels = _split(copy, found).labels
  if not np.isin(labels, within.imagenet_indices).any():
    raise datasets.NotAvailable(
      f"{copy.dataset.key} {copy.split}: of the {len(labels)} images measured none is of a class "
      f"of {within.key}; measure more (--limit), or all"
    )
  members = [[k] for k in within.imagenet_indices]
  share, n = shift_accuracy.restricted_accuracy(scores_NC, labels, members)
  return _Scored(share, n, found.left_out)


def _retrieval(given: Task, weights: Weights, settings: Settings, progress: Progress) -> Found:
  copy = given.folds[0].test
  found = _features(copy, "embedding", weights, settings, progress)
  captions = [own[:CAPTIONS] for own in found.captions]
  if () in captions:
    where = copy.locate(int(found.indices[captions.index(())]))
    raise encoding.EvaluationError(f"{where}: has no caption to retrieve")
  progress(f"{copy.dataset.key}: captions", 0, 1)
  prefix, batch = settings.caption_prefix, settings.batch
  ranked = retrieval.rank(weights.model, np.asarray(found.rows_ND), captions, batch, prefix)
  both = (ranked.image_to_text, ranked.text_to_image)
  shares = [recall.recall[k] for recall in both for k in retrieval.KS]
  values = [
    Value(metric, round(100 * share, 10), len(captions))
    for metric, share in zip(given.unit.metrics, shares, strict=True)
  ]
  return Found(tuple(values), found.left_out)


def _features(
  copy: datasets.Copy, kind: str, weights: Weights, settings: Settings, progress: Progress
) -> features.Features:
  return features.encode(
    weights.model,
    copy,
    kind,
    settings.batch,
    settings.cache,
    weights.hash,
    settings.limit,
    skip_unreadable=settings.skip_unreadable,
    progress=functools.partial(progress, f"{copy.dataset.key}: {copy.split}"),
  )


def _split(copy: datasets.Copy, found: features.Features) -> linear_probe.Split:
  return splits.labelled(found, copy, copy.classes, copy.dataset.rule == "several")
