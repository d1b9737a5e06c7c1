"""The paper's metrics, of the scores [N, C] of images against classes: shares between 0 and 1.

Of classes that score exactly the same the first comes first: see `ranks`.
Source: Table 9 (which metric belongs to which dataset).
"""

import re
from collections.abc import Sequence

import numpy as np

from clip_jax.evaluation.encoding import EvaluationError

METRICS = ("accuracy", "mean per class", "11-point mAP", "ROC AUC", "mean(top1, top5)")

Labels = Sequence[int] | np.ndarray


def score(metric: str, scores_NC: np.ndarray, labels: Labels) -> float:
  """The metric of that name, one of METRICS. Raises: EvaluationError, also for any other name."""
  match metric:
    case "accuracy":
      return accuracy(scores_NC, labels)
    case "mean per class":
      return mean_per_class(scores_NC, labels)
    case "11-point mAP":
      return mean_average_precision(scores_NC, np.asarray(labels))
    case "ROC AUC":
      return roc_auc(scores_NC, labels)
    case "mean(top1, top5)":
      return mean_of_top1_and_top5(scores_NC, labels)
  raise EvaluationError(f"metric {metric!r}: no such metric; choose one of {', '.join(METRICS)}")


def log_name(metric: str) -> str:
  """What a metric is called in a run's log: "mean per class" is `mean_per_class`."""
  return re.sub(r"\W+", "_", metric.lower()).strip("_")


def accuracy(scores_NC: np.ndarray, labels: Labels) -> float:
  """The share of images whose right class comes first."""
  return float(np.mean(ranks(scores_NC, labels) == 1))


def top5(scores_NC: np.ndarray, labels: Labels) -> float:
  """The share of images whose right class is among the five best (of five or fewer: all)."""
  return float(np.mean(ranks(scores_NC, labels) <= 5))


def mean_of_top1_and_top5(scores_NC: np.ndarray, labels: Labels) -> float:
  """The mean of `accuracy` and `top5`, as Kinetics700 is scored."""
  places = ranks(scores_NC, labels)
  return float((np.mean(places == 1) + np.mean(places <= 5)) / 2)


def mean_per_class(scores_NC: np.ndarray, labels: Labels) -> float:
  """The mean over classes of the accuracy on a class's images; classes without any do not count."""
  correct = ranks(scores_NC, labels) == 1
  _, class_of, images = np.unique(labels, return_inverse=True, return_counts=True)
  return float(np.mean(np.bincount(class_of, weights=correct) / images))


def mean_average_precision(scores_NC: np.ndarray, labels_NC: np.ndarray) -> float:
  """The mean over classes of the average precision at 11 points, for images of several classes.

  `labels_NC` holds 1 where an image shows the class, 0 where it does not, and -1 where it shows
  only objects of the class that are marked difficult: such an image is left out of the class's
  ranking, neither right nor wrong. The precision at recall r is the highest at any recall of at
  least r, for r = 0, 0.1, ..., 1. A tie counts against the model. A class that no image shows has
  no average precision and does not count.
  Raises: EvaluationError for labels of another shape or value, or if no image shows any class.
  Source: the development kit of the Pascal VOC challenge 2007 (`VOCevalcls`).
  """
  _check_scores(scores_NC, len(labels_NC))
  if labels_NC.shape != scores_NC.shape or not np.isin(labels_NC, (-1, 0, 1)).all():
    raise EvaluationError(
      f"labels {labels_NC.shape} for scores {scores_NC.shape}: want 1, 0 or -1 for every score"
    )
  shown = (labels_NC == 1).any(axis=0)
  if not shown.any():
    raise EvaluationError("no image shows any of the classes: there is no average precision")
  return float(
    np.mean([_average_precision(scores_NC[:, c], labels_NC[:, c]) for c in np.flatnonzero(shown)])
  )


def _average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
  """Of one class: scores [N] and labels [N] of 1, 0, -1."""
  scores, labels = scores[labels >= 0], labels[labels >= 0]
  order = np.lexsort((labels, -scores))  # in a tie the image that does not show it comes first
  found = np.cumsum(labels[order])
  precision = found / np.arange(1, len(found) + 1)
  # Recall found / all >= k / 10, in whole numbers: 0.3 is not 3 * 0.1.
  points = [precision[10 * found >= k * found[-1]].max() for k in range(11)]
  return float(np.mean(points))


def roc_auc(scores_N2: np.ndarray, labels: Labels) -> float:
  """The share of pairs of an image of class 1 and one of class 0 that are in the right order.

  An image's place in the order is how much class 1 scores above class 0. A tie is half a pair, as
  in scikit-learn. Raises: EvaluationError unless there are two classes with images of both.
  """
  _check_labels(scores_N2, labels)
  if scores_N2.shape[1] != 2:
    raise EvaluationError(f"ROC AUC of {scores_N2.shape[1]} classes: it is defined for two")
  is_one = np.asarray(labels) == 1
  ones, zeros = int(is_one.sum()), int((~is_one).sum())
  if not ones or not zeros:
    raise EvaluationError(
      f"ROC AUC of {ones} images of class 1 and {zeros} of class 0: it wants some of both"
    )
  margin = scores_N2[:, 1].astype(np.float64) - scores_N2[:, 0].astype(np.float64)
  _, place, times = np.unique(margin, return_inverse=True, return_counts=True)
  rank = (np.cumsum(times) - (times - 1) / 2)[place]  # from 1; the mean one among equals
  return float((rank[is_one].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def ranks(scores_NC: np.ndarray, labels: Labels) -> np.ndarray:
  """Of each image the place of its right class among all, from 1: int [N].

  Before it come the classes that score higher, and of those that score exactly as much the ones of
  a lower index: rank 1 is NumPy's argmax, and up to k are the first k of a stable descending sort.
  So of two classes with the same prompts (ImageNet has "missile" and "sunglasses" twice) one is
  found and one is not, and a model that scores all alike is right where the first class is.
  Raises: EvaluationError for labels out of range, and for NaNs, which have no place in an order.
  Differs: the original's top-k leaves open in which order equal scores come.
  """
  _check_labels(scores_NC, labels)
  label_N1 = np.asarray(labels)[:, None]
  own_N1 = np.take_along_axis(scores_NC, label_N1, axis=1)
  ahead_NC = scores_NC > own_N1
  ahead_NC |= (scores_NC == own_N1) & (np.arange(scores_NC.shape[1])[None] < label_N1)
  return 1 + ahead_NC.sum(axis=1)


def _check_labels(scores_NC: np.ndarray, labels: Labels) -> None:
  labels = np.asarray(labels)
  if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
    raise EvaluationError(f"labels {labels.shape} of {labels.dtype}: want a whole number an image")
  _check_scores(scores_NC, len(labels))
  bad = (labels < 0) | (labels >= scores_NC.shape[1])
  if bad.any():
    i = int(np.argmax(bad))
    raise EvaluationError(
      f"image {i}: label {labels[i]} is out of range, there are {scores_NC.shape[1]} classes"
    )


def _check_scores(scores_NC: np.ndarray, images: int) -> None:
  if scores_NC.ndim != 2 or len(scores_NC) != images or not scores_NC.size:
    raise EvaluationError(f"scores {scores_NC.shape} for {images} labels: want [N, C], none empty")
  bad = np.isnan(scores_NC).any(axis=1)
  if bad.any():
    raise EvaluationError(
      f"image {int(np.argmax(bad))}: its scores are NaN (as those of {bad.sum()} of {len(bad)}); "
      "the weights are broken: evaluate an earlier checkpoint"
    )
