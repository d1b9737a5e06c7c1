"""The search for lambda by hand, the probe against scikit-learn, few shots, bad input."""

import functools
import itertools

import jax
import numpy as np
import pytest
import threadpoolctl
from sklearn import datasets, linear_model, metrics

from clip_jax import sharding
from clip_jax.evaluation.probe import linear_probe, logistic

FIRST = [6, 4, 2, 0, -2, -4, -6]  # decades


def accuracy(scores_NC, labels):
  return float(np.mean(np.argmax(scores_NC, axis=1) == labels))


def one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


@functools.cache
def digits():
  """(training, validation, test): pixels as features."""
  pixels, labels = datasets.load_digits(return_X_y=True)
  pixels = (pixels / 16).astype(np.float32)
  ends = (0, 300, 500, 1700)
  parts = [slice(*pair) for pair in itertools.pairwise(ends)]
  return tuple(linear_probe.Split(pixels[part], labels[part]) for part in parts)


def visited(score):
  """The best lambda and all lambdas looked at, as powers of ten."""
  best, scores = linear_probe.sweep(lambda lambda_: score(np.log10(lambda_)))
  return float(np.log10(best)), [float(np.log10(lambda_)) for lambda_, _ in scores]


@pytest.mark.parametrize(
  ("peak", "then", "found"),
  [
    (0, [1, -1, 0.5, -0.5, 0.25, -0.25, 0.125, -0.125], 0),
    (1.6, [3, 1, 2.5, 1.5, 1.75, 1.25, 1.625, 1.375], 1.625),
    (-2.6, [-1, -3, -2.5, -3.5, -2.25, -2.75, -2.375, -2.625], -2.625),
    (9, [5, 5.5, 5.75, 5.875], 6),
    (-9, [-5, -5.5, -5.75, -5.875], -6),
  ],
)
def test_which_lambdas_are_looked_at(peak, then, found):
  best, seen = visited(lambda power: -abs(power - peak))
  np.testing.assert_allclose(seen, FIRST + then, atol=1e-9)
  assert best == pytest.approx(found)


def test_every_one_of_the_97_can_be_found():
  grid = [k / 8 for k in range(-48, 49)]
  assert len(grid) == 97
  for peak in grid:
    best, seen = visited(lambda power, peak=peak: -abs(power - peak))
    assert best == pytest.approx(peak, abs=1e-9)
    assert len(seen) == len(set(seen)) <= 15
    np.testing.assert_allclose(8 * np.array(seen), np.round(8 * np.array(seen)), atol=1e-6)


def test_of_equal_scores_the_largest_lambda_wins():
  assert visited(lambda power: 0.5)[0] == 6
  best, seen = visited(lambda power: float(-1.1 < power < 2.1))
  assert best == pytest.approx(2)
  np.testing.assert_allclose(seen[7:], [3, 1, 2.5, 1.5, 2.25, 1.75, 2.125, 1.875], atol=1e-9)


def test_a_score_that_is_no_number_is_told():
  with pytest.raises(linear_probe.ProbeError, match="lambda 100: the validation score is nan"):
    linear_probe.sweep(lambda lambda_: np.nan if lambda_ == 100 else 0.5)


def test_the_probe_as_with_scikit_learn():
  """The same search and the same last fit, by Newton's method."""
  train, validation, test = digits()

  def fitted(lambda_, features_ND, labels):
    model = linear_model.LogisticRegression(C=1 / lambda_, solver="newton-cholesky", tol=1e-8)
    with threadpoolctl.threadpool_limits(1):  # its threads spin: slow where cores are shared
      return model.fit(features_ND.astype(np.float64), labels)

  best, scores = linear_probe.sweep(
    lambda lambda_: fitted(lambda_, train.features_ND, train.labels).score(
      validation.features_ND, validation.labels
    )
  )
  both_ND = np.concatenate([train.features_ND, validation.features_ND])
  last = fitted(best, both_ND, np.concatenate([train.labels, validation.labels]))
  got = linear_probe.probe(train, test, 10, accuracy, validation, mesh=one_device())
  assert [t.lambda_ for t in got.tried] == [lambda_ for lambda_, _ in scores]
  np.testing.assert_allclose([t.score for t in got.tried], [s for _, s in scores], atol=1e-9)
  assert got.lambda_ == best
  assert got.examples == 500
  assert got.converged
  assert all(t.converged for t in got.tried)
  assert abs(got.score - last.score(test.features_ND, test.labels)) <= 0.002


def test_a_fit_starts_on_the_line_through_two_others():
  """Of lambda's logarithm; by hand."""

  def at(value):
    return logistic.Fit(np.full((2, 3), value), np.full(3, -value), 0.0, 0, True)

  assert linear_probe.between({}, 1.0) is None
  only = at(4.0)
  assert linear_probe.between({10.0: only}, 1.0) is only
  fits = {100.0: at(0.0), 10.0: at(4.0), 0.1: at(6.0)}
  for lambda_, value in ((1.0, 5.0), (10**0.5, 4.5), (1e-3, 8.0), (1e3, -4.0)):
    start = linear_probe.between(fits, lambda_)
    np.testing.assert_allclose(start.weights_DC, np.full((2, 3), value), rtol=1e-6)
    np.testing.assert_allclose(start.bias_C, np.full(3, -value), rtol=1e-6)


def test_several_labels_an_image():
  """One lambda for all of them; the metric sees labels as they came."""
  parts = [
    linear_probe.Split(s.features_ND, np.stack([s.labels % 2 == 0, s.labels > 4], axis=1))
    for s in digits()
  ]
  train, validation, test = parts

  def mean_precision(scores_NC, labels_NC):
    return metrics.average_precision_score(labels_NC, scores_NC)

  got = linear_probe.probe(train, test, 2, mean_precision, validation, mesh=one_device())
  each = []
  for c in range(2):
    model = linear_model.LogisticRegression(C=1 / got.lambda_, tol=1e-8, max_iter=10_000)
    features_ND, labels_NC = (
      np.concatenate([train.features_ND, validation.features_ND]),
      np.concatenate([train.labels, validation.labels]),
    )
    model.fit(features_ND.astype(np.float64), labels_NC[:, c])
    scores_N = model.decision_function(test.features_ND)
    each.append(metrics.average_precision_score(test.labels[:, c], scores_N))
  assert got.score == pytest.approx(np.mean(each), abs=2e-3)
  assert got.score > 0.9


def test_a_fifth_of_each_class_is_held_back():
  labels = np.repeat([0, 1, 2, 3], [10, 4, 1, 16])
  train = linear_probe.Split(np.arange(31.0)[:, None], np.random.default_rng(1).permutation(labels))
  left, held = linear_probe.hold_back(train)
  np.testing.assert_array_equal(np.bincount(held.labels, minlength=4), [2, 0, 0, 3])
  rows = np.concatenate([left.features_ND, held.features_ND])[:, 0].astype(int)
  np.testing.assert_array_equal(np.sort(rows), np.arange(31))
  np.testing.assert_array_equal(np.concatenate([left.labels, held.labels]), train.labels[rows])
  again, other = (linear_probe.hold_back(train, seed)[1].features_ND for seed in (0, 1))
  np.testing.assert_array_equal(again, held.features_ND)
  assert not np.array_equal(other, held.features_ND)
  several = linear_probe.Split(np.zeros((11, 1)), np.zeros((11, 3), bool))
  assert [len(s.labels) for s in linear_probe.hold_back(several)] == [9, 2]


def test_a_probe_without_a_validation_set_holds_one_back():
  train, _, test = digits()
  got = linear_probe.probe(train, test, 10, accuracy, seed=3, mesh=one_device())
  left, held = linear_probe.hold_back(train, 3)
  given = linear_probe.probe(left, test, 10, accuracy, held, mesh=one_device())
  assert got.examples == 300
  assert got == given


def test_shots_are_drawn_class_by_class():
  labels = np.array([2, 0, 1, 1, 0, 2, 0, 1, 2, 1])
  drawn = {k: linear_probe.draw(labels, k, 3, seed=5) for k in (1, 2, 3)}
  for k, rows in drawn.items():
    np.testing.assert_array_equal(np.bincount(labels[rows]), [k, k, k])
    assert list(rows) == sorted(set(rows))
  assert set(drawn[1]) < set(drawn[2]) < set(drawn[3])
  assert len({tuple(linear_probe.draw(labels, 1, 3, seed)) for seed in range(20)}) > 5
  with pytest.raises(linear_probe.ProbeError, match="4 shots: class 0 has 3 examples"):
    linear_probe.draw(labels, 4, 3, seed=5)
  with pytest.raises(linear_probe.ProbeError, match="0 shots"):
    linear_probe.draw(labels, 0, 3, seed=5)


def test_few_shots():
  train, validation, test = digits()
  scores = {}
  for shots, seed in ((1, 0), (1, 7), (4, 7)):
    got = linear_probe.few_shot(
      train, validation, test, 10, accuracy, shots, seed, mesh=one_device()
    )
    assert got.examples == 10 * shots
    assert got.converged
    assert max(t.score for t in got.tried) == next(
      t.score for t in got.tried if t.lambda_ == got.lambda_
    )
    few = train.take(linear_probe.draw(train.labels, shots, 10, seed))
    model = linear_model.LogisticRegression(C=1 / got.lambda_, tol=1e-9, max_iter=10_000)
    model.fit(few.features_ND.astype(np.float64), few.labels)
    assert abs(got.score - model.score(test.features_ND, test.labels)) <= 0.002
    scores[shots, seed] = got.score
  assert scores[1, 7] < scores[4, 7] - 0.1
  assert scores[1, 0] != scores[1, 7]


def test_bad_splits_are_told():
  train, validation, test = digits()
  broken = linear_probe.Split(np.full_like(test.features_ND, np.nan), test.labels)
  with pytest.raises(logistic.LogisticError, match="row 0 are not finite"):
    linear_probe.probe(train, broken, 10, accuracy, validation)
  with pytest.raises(logistic.LogisticError, match="is 7, not in"):
    linear_probe.probe(train, test, 7, accuracy, validation)
  empty = train.take(np.zeros(0, int))
  with pytest.raises(logistic.LogisticError, match="is the split empty"):
    linear_probe.probe(train, test, 10, accuracy, empty)
  with pytest.raises(linear_probe.ProbeError, match="too few to hold back 20%"):
    linear_probe.probe(train.take(np.arange(10)), test, 10, accuracy)
  several = linear_probe.Split(train.features_ND, np.ones((300, 10), bool))
  with pytest.raises(linear_probe.ProbeError, match="few-shot wants one label"):
    linear_probe.few_shot(several, validation, test, 10, accuracy, 1, 0)


def test_what_speaks_against_fits():
  assert linear_probe.doubts([1.0, 1e5], [True, True]) == ()
  assert linear_probe.doubts([], [True, False, False]) == (
    "2 of 3 fits did not come to their minimum.",
  )
  assert linear_probe.doubts([1e-6, 1.0, 1e6, 1e6], [True] * 4) == (
    "The lambda chosen, 1e-06, is an end of those tried.",
    "The lambda chosen, 1e+06, is an end of those tried.",
  )
  lambda_, tried = linear_probe.sweep(lambda x: x)  # the more the better: the end itself
  assert (lambda_, tried[0][0]) == (1e6, 1e6)
  assert linear_probe.doubts([lambda_, linear_probe.sweep(lambda x: -x)[0]], [True]) != ()
