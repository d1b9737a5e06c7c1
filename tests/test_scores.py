"""The metrics against scikit-learn, and the 11-point average precision against one done by hand."""

import numpy as np
import pytest
import torch
from sklearn import metrics

from clip_jax.evaluation import scores
from clip_jax.evaluation.encoding import EvaluationError

rng = np.random.default_rng(0)
SCORES_NC = rng.standard_normal((500, 12)).astype(np.float32)
LABELS = rng.integers(0, 12, 500)
SCORES_NC[np.arange(500), LABELS] += 1.0  # right about a third of the time
SCORES_NC[:, 0] += 1.0  # one class is found more often than the others


def test_shares_of_the_best_are_scikit_learns():
  predicted = SCORES_NC.argmax(axis=1)
  top1 = metrics.accuracy_score(LABELS, predicted)
  top5 = metrics.top_k_accuracy_score(LABELS, SCORES_NC, k=5)
  assert 0.2 < top1 < top5 - 0.1 < 0.9
  assert scores.accuracy(SCORES_NC, LABELS) == pytest.approx(top1, abs=1e-12)
  assert scores.top5(SCORES_NC, LABELS) == pytest.approx(top5, abs=1e-12)
  both = scores.mean_of_top1_and_top5(SCORES_NC, LABELS)
  assert both == pytest.approx((top1 + top5) / 2, abs=1e-12)


@pytest.mark.parametrize("present", [12, 5])
def test_mean_per_class_is_scikit_learns_over_the_classes_that_have_images(present):
  keep = np.isin(LABELS, range(present)) & ((LABELS > 0) | (np.arange(500) % 4 == 0))
  labels, scores_NC = LABELS[keep], SCORES_NC[keep]
  recalls = metrics.recall_score(
    labels, scores_NC.argmax(axis=1), labels=np.arange(present), average=None, zero_division=0
  )
  ours = scores.mean_per_class(scores_NC, labels)
  assert ours == pytest.approx(recalls.mean(), abs=1e-12)
  assert abs(ours - scores.accuracy(scores_NC, labels)) > 1e-3
  if present == 12:
    balanced = metrics.balanced_accuracy_score(labels, scores_NC.argmax(axis=1))
    assert ours == pytest.approx(balanced, abs=1e-12)


@pytest.mark.parametrize("decimals", [6, 0])
def test_roc_auc_is_scikit_learns_with_ties_and_without(decimals):
  margin = np.round(rng.standard_normal(301) + (np.arange(301) % 3 == 0), decimals)
  labels = (np.arange(301) % 3 == 0).astype(int)
  scores_N2 = np.stack([np.zeros(301), margin], axis=1)
  theirs = metrics.roc_auc_score(labels, margin)
  assert 0.6 < theirs < 0.9
  assert scores.roc_auc(scores_N2, labels) == pytest.approx(theirs, abs=1e-12)
  assert scores.roc_auc(scores_N2[:, ::-1], labels) == pytest.approx(1 - theirs, abs=1e-12)


def test_places_are_those_of_stable_sorts():
  """Few levels, so that most scores tie; -0.0 is 0.0. NumPy and PyTorch say the order."""
  levels_NC = rng.integers(-2, 3, (400, 9)) * np.float32(0.5)
  levels_NC[rng.random(levels_NC.shape) < 0.1] = -0.0
  labels = rng.integers(0, 9, 400)
  places = scores.ranks(levels_NC, labels)
  sorts = (
    np.argsort(-levels_NC, axis=1, kind="stable"),
    torch.sort(torch.from_numpy(levels_NC), dim=1, descending=True, stable=True).indices.numpy(),
  )
  for order_NC in sorts:
    np.testing.assert_array_equal(places, 1 + np.argmax(order_NC == labels[:, None], axis=1))
    found = (order_NC[:, :5] == labels[:, None]).any(axis=1)
    assert scores.top5(levels_NC, labels) == found.mean()
  found = levels_NC.argmax(axis=1) == labels
  np.testing.assert_array_equal(torch.from_numpy(levels_NC).argmax(dim=1) == labels, found)
  assert scores.accuracy(levels_NC, labels) == found.mean()
  recalls = metrics.recall_score(labels, levels_NC.argmax(axis=1), average=None)
  assert scores.mean_per_class(levels_NC, labels) == pytest.approx(recalls.mean(), abs=1e-12)
  # Of some order of equal scores the last rank is theirs, of some the first: ours lies between.
  own_N1 = np.take_along_axis(levels_NC, labels[:, None], axis=1)
  assert (places >= 1 + (levels_NC > own_N1).sum(axis=1)).all()
  assert (places <= (levels_NC >= own_N1).sum(axis=1)).all()


def test_the_first_k_are_those_of_pytorch():
  """Without ties, of which PyTorch's top-k leaves the order open."""
  places = scores.ranks(SCORES_NC, LABELS)
  for k in (1, 5, 12):
    top_Nk = torch.from_numpy(SCORES_NC).topk(k, dim=1).indices.numpy()
    np.testing.assert_array_equal(places <= k, (top_Nk == LABELS[:, None]).any(axis=1))


def test_a_constant_model_is_right_where_the_first_class_is():
  same_NC = np.ones((8, 6), np.float32)
  labels = [0, 1, 2, 3, 4, 5, 5, 0]
  np.testing.assert_array_equal(scores.ranks(same_NC, labels), [1, 2, 3, 4, 5, 6, 6, 1])
  assert scores.accuracy(same_NC, labels) == 2 / 8
  assert scores.top5(same_NC, labels) == 6 / 8
  assert scores.mean_per_class(same_NC, labels) == 1 / 6
  assert scores.mean_of_top1_and_top5(same_NC, labels) == 4 / 8
  assert scores.mean_average_precision(np.ones((4, 1)), np.array([[1], [0], [0], [0]])) == 0.25
  assert scores.roc_auc(np.ones((4, 2)), [0, 0, 1, 1]) == 0.5


# Ten images, best first; three show the class: precision 1/1, 2/3, 3/6 at recall 1/3, 2/3, 1. So
# the precision is 1 at 0 to 0.3, 2/3 at 0.4 to 0.6, 1/2 at 0.7 to 1.
RANKED = np.array([1, 0, 1, 0, 0, 1, 0, 0, 0, 0])
BY_HAND = (4 * 1 + 3 * 2 / 3 + 4 * 1 / 2) / 11


def _one_class(labels):
  return -np.arange(len(labels), dtype=float)[:, None], np.asarray(labels)[:, None]


def test_average_precision_by_hand():
  assert scores.mean_average_precision(*_one_class(RANKED)) == pytest.approx(BY_HAND, abs=1e-12)
  shuffled = rng.permutation(10)
  scores_N1, labels_N1 = _one_class(RANKED)
  ours = scores.mean_average_precision(scores_N1[shuffled], labels_N1[shuffled])
  assert ours == pytest.approx(BY_HAND, abs=1e-12)


def test_the_precision_at_a_recall_is_the_best_further_on():
  # Precisions at the found ones: 1/2, 2/3, 3/4: the last is the highest, so it counts everywhere.
  assert scores.mean_average_precision(*_one_class([0, 1, 1, 1])) == pytest.approx(0.75, abs=1e-12)


def test_recall_is_compared_in_whole_numbers():
  # Ten to find, the first three at the top and the others last: 0.3 is reached by those three.
  labels = [1] * 3 + [0] * 7 + [1] * 7
  expected = (4 * 1 + sum(10 / 17 for _ in range(7))) / 11
  assert scores.mean_average_precision(*_one_class(labels)) == pytest.approx(expected, abs=1e-12)


def test_difficult_objects_are_neither_right_nor_wrong():
  difficult = [1, -1, 0, 1, 0, -1, 0, 1, 0, 0, 0, 0]
  assert scores.mean_average_precision(*_one_class(difficult)) == pytest.approx(BY_HAND, abs=1e-12)


def test_classes_that_no_image_shows_do_not_count():
  scores_N1, labels_N1 = _one_class(RANKED)
  both = np.hstack([labels_N1, np.zeros_like(labels_N1), -labels_N1])
  ours = scores.mean_average_precision(np.repeat(scores_N1, 3, axis=1), both)
  assert ours == pytest.approx(BY_HAND, abs=1e-12)
  with pytest.raises(EvaluationError, match="no image shows any"):
    scores.mean_average_precision(scores_N1, 0 * labels_N1)


def test_perfect_and_worst():
  labels_NC = rng.integers(0, 2, (50, 4))
  assert scores.mean_average_precision(labels_NC.astype(float), labels_NC) == 1
  assert scores.score("11-point mAP", labels_NC.astype(float), labels_NC) == 1
  for metric in scores.METRICS:
    if metric != "11-point mAP":
      classes = 2 if metric == "ROC AUC" else 12
      labels = LABELS % classes
      perfect = np.eye(classes)[labels]
      assert scores.score(metric, perfect, labels) == 1
      if metric != "mean(top1, top5)":
        assert scores.score(metric, -perfect, labels) == 0


@pytest.mark.parametrize(
  ("metric", "scores_NC", "labels", "match"),
  [
    ("accuracy", np.zeros((2, 3)), [0, 3], "image 1: label 3 is out of range, there are 3"),
    ("mean per class", np.zeros((2, 3)), [-1, 0], "image 0: label -1"),
    ("accuracy", np.array([[0, 1], [np.nan, 1.0]]), [0, 0], "image 1: its scores are NaN"),
    ("11-point mAP", np.array([[np.nan]]), [[1]], "image 0: its scores are NaN"),
    ("11-point mAP", np.zeros((2, 2)), [[1, 2], [0, 0]], "want 1, 0 or -1"),
    ("11-point mAP", np.zeros((2, 2)), [[1], [0]], "want 1, 0 or -1"),
    ("accuracy", np.zeros((2, 3)), [0], "for 1 labels"),
    ("accuracy", np.zeros((0, 3)), np.zeros(0, int), "none empty"),
    ("accuracy", np.zeros((2, 3)), [0.0, 1.0], "a whole number an image"),
    ("ROC AUC", np.zeros((2, 3)), [0, 1], "of 3 classes"),
    ("ROC AUC", np.zeros((2, 2)), [1, 1], "2 images of class 1 and 0 of class 0"),
    ("F1", np.zeros((2, 2)), [1, 1], "choose one of accuracy, "),
  ],
)
def test_what_has_no_score_is_an_error(metric, scores_NC, labels, match):
  with pytest.raises(EvaluationError, match=match):
    scores.score(metric, scores_NC, labels)
