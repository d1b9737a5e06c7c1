import numpy as np
import pytest
import sklearn.metrics

from clip_jax.evaluation.encoding import EvaluationError
from clip_jax.evaluation.shifts import accuracy as shift_accuracy
from clip_jax.evaluation.shifts.robustness import ShiftError

LOGITS = np.array(
  [
    [9.0, 1.0, 2.0, 3.0, 0.0],  # right among all five; of classes 1 to 4 the best is 3
    [9.0, 5.0, 4.0, 0.0, 0.0],  # class 0 spoils it, until it is left out
    [0.0, 2.0, 2.0, 1.0, 0.0],  # a tie of 1 and 2: of those that are left, 1 comes first
    [0.0, 0.0, 1.0, 2.0, 3.0],
  ]
)
MEMBERS = [[1], [3, 4], [2]]


def test_restricted_logits_are_the_best_of_each_class():
  want = [[1, 3, 2], [5, 0, 4], [2, 1, 2], [0, 3, 1]]
  np.testing.assert_array_equal(shift_accuracy.restrict(LOGITS, MEMBERS), want)


def test_the_accuracy_on_the_same_classes_by_hand():
  """The first image is of no class, the second and fourth are right; a tie is the first class."""
  assert shift_accuracy.restricted_accuracy(LOGITS, np.array([0, 1, 2, 4]), MEMBERS) == (2 / 3, 3)
  assert shift_accuracy.restricted_accuracy(LOGITS, np.array([0, 1, 1, 4]), MEMBERS) == (1, 3)


def test_a_subset_of_all_classes_is_plain_accuracy():
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(200, 7)), rng.integers(7, size=200)
  want = sklearn.metrics.accuracy_score(labels, logits.argmax(1))
  found = shift_accuracy.restricted_accuracy(logits, labels, [[i] for i in range(7)])
  assert found == (pytest.approx(want), 200)
  top = sklearn.metrics.top_k_accuracy_score(labels, logits, k=1, labels=range(7))
  assert shift_accuracy.correct(logits, labels).mean() == pytest.approx(top)


def test_leaving_classes_out_never_makes_a_right_one_wrong():
  rng = np.random.default_rng(1)
  logits, labels = rng.normal(size=(500, 10)), rng.integers(4, size=500)
  before = shift_accuracy.correct(logits, labels)
  after = shift_accuracy.correct(shift_accuracy.restrict(logits, [[i] for i in range(4)]), labels)
  assert after[before].all()
  assert after.sum() > before.sum()


def test_logits_that_are_no_numbers_are_refused():
  with pytest.raises(EvaluationError, match="image 0: its scores are NaN"):
    shift_accuracy.correct(np.full((2, 3), np.nan), np.array([0, 1]))


@pytest.mark.parametrize(
  ("members", "words"),
  [
    *(([[0], []], "class 1 of the shift"), ([], "class 0 of the shift")),
    *(([[0], [5]], "classes 0 to 4"), ([[0], [-1]], "0 to 4")),
    ([[0, 1], [1]], "one class at most"),
  ],
)
def test_bad_members_are_refused(members, words):
  with pytest.raises(ShiftError, match=words):
    shift_accuracy.restrict(LOGITS, members)


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 1, 2, 5], [-1, 0, 0, 0]])
def test_bad_labels_are_refused(labels):
  with pytest.raises(EvaluationError, match=r"for 3 labels|label (5|-1) is out of range"):
    shift_accuracy.correct(LOGITS, np.array(labels))


def test_no_image_of_the_subset_is_an_error():
  with pytest.raises(ShiftError, match="no image is of any"):
    shift_accuracy.restricted_accuracy(LOGITS, np.array([0, 0, 0, 0]), MEMBERS)


FRAMES = [  # group, offset, right
  *(("cat 1", -12, False), ("cat 1", -10, True), ("cat 1", 0, True), ("cat 1", 3, True)),
  *(("cat 2", 0, True), ("cat 2", 10, False)),
  *(("dog 1", -1, True), ("dog 1", 0, False)),
  ("dog 2", 0, True),
]


@pytest.mark.parametrize(("k", "share"), [(0, 3 / 4), (9, 3 / 4), (10, 2 / 4), (12, 1 / 4)])
def test_frames_count_only_with_all_of_their_neighbours(k, share):
  groups, offsets, right = zip(*FRAMES, strict=True)
  assert shift_accuracy.pm_accuracy(np.array(right), groups, offsets, k) == share
  order = np.random.default_rng(0).permutation(len(FRAMES))
  mixed = [[column[i] for i in order] for column in (right, groups, offsets)]
  assert shift_accuracy.pm_accuracy(*mixed, k) == share


def test_a_group_has_one_anchor():
  with pytest.raises(ShiftError, match="group 'b' has 0 anchors"):
    shift_accuracy.pm_accuracy(np.array([True, True]), ["a", "b"], [0, 1], 10)
  with pytest.raises(ShiftError, match="group 'a' has 2 anchors"):
    shift_accuracy.pm_accuracy(np.array([True, True]), ["a", "a"], [0, 0], 10)
  with pytest.raises(ShiftError, match="0 groups"):
    shift_accuracy.pm_accuracy(np.zeros(0, bool), [], [], 10)
