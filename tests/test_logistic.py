"""Logistic regression against scikit-learn's Newton solver, autodiff and sums by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl
from scipy import special
from sklearn import datasets, linear_model

from clip_jax import sharding
from clip_jax.evaluation.probe import lbfgs, logistic

LAMBDAS = (1e6, 1e3, 1.0, 1e-3, 1e-6)
TRAIN = 600


@functools.cache
def digits():
  pixels, labels = datasets.load_digits(return_X_y=True)
  return (pixels / 16).astype(np.float32), labels


def objective(weights_DC, bias_C, features_ND, wrong_of, lambda_):
  """In float64, from margins: what wrong answers have over the right one."""
  weights_DC = np.asarray(weights_DC, np.float64)
  loss = wrong_of(features_ND.astype(np.float64) @ weights_DC + bias_C)
  return (loss.sum() + lambda_ / 2 * (weights_DC**2).sum()) / len(features_ND)


def softmax_loss(labels):
  def loss(logits_NC):
    wrong_NC = logits_NC - logits_NC[range(len(labels)), labels][:, None]
    wrong_NC[range(len(labels)), labels] = -np.inf
    return np.logaddexp(0, special.logsumexp(wrong_NC, axis=1))

  return loss


def logistic_loss(held_NC):
  known_NC = held_NC >= 0
  return lambda logits_NC: known_NC * np.logaddexp(0, np.where(held_NC == 1, -1, 1) * logits_NC)


def scikit_learn(features_ND, labels, lambda_):
  """Newton's method with the whole Hessian: at the minimum to all digits of float64."""
  model = linear_model.LogisticRegression(
    C=1 / lambda_, solver="newton-cholesky", tol=1e-12, max_iter=200
  )
  with threadpoolctl.threadpool_limits(1):  # its threads spin: slow where cores are shared
    model.fit(features_ND.astype(np.float64), labels)
  return model.coef_.T, model.intercept_


@functools.cache
def problem(devices=1, examples=TRAIN):
  features_ND, labels = digits()
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  return logistic.prepare(features_ND[:examples], labels[:examples], 10, mesh)


@pytest.mark.parametrize("lambda_", LAMBDAS)
def test_digits_as_scikit_learn(lambda_):
  features_ND, labels = digits()
  got = logistic.fit(problem(), lambda_)
  expected = scikit_learn(features_ND[:TRAIN], labels[:TRAIN], lambda_)
  measure = functools.partial(
    objective,
    features_ND=features_ND[:TRAIN],
    wrong_of=softmax_loss(labels[:TRAIN]),
    lambda_=lambda_,
  )
  least = measure(*expected)
  assert got.converged
  assert -1e-9 < measure(got.weights_DC, got.bias_C) / least - 1 < 1e-6
  assert got.objective == pytest.approx(least, rel=2e-6)
  right, theirs = (
    np.mean(np.argmax(scores_NC, axis=1) == labels[TRAIN:])
    for scores_NC in (
      got.scores(features_ND[TRAIN:]),
      features_ND[TRAIN:] @ expected[0] + expected[1],
    )
  )
  assert abs(right - theirs) <= 0.002


@pytest.mark.parametrize("lambda_", [1e3, 1.0, 1e-6])
def test_two_classes_as_scikit_learn(lambda_):
  """One vector of weights: with one for each class the same lambda would count half as much."""
  features_ND, labels = digits()
  features_ND, labels = features_ND[:301], (labels[:301] >= 5).astype(np.int64)
  got = logistic.fit(logistic.prepare(features_ND, labels, 2), lambda_)
  weights_D1, bias = scikit_learn(features_ND, labels, lambda_)
  loss = logistic_loss(labels[:, None])
  least = objective(weights_D1, bias, features_ND, loss, lambda_)
  ours = objective(got.weights_DC[:, 1:], got.bias_C[1:], features_ND, loss, lambda_)
  assert got.converged
  assert -1e-9 < ours / least - 1 < 1e-6
  assert not got.weights_DC[:, 0].any()
  assert not got.bias_C[0]


@pytest.mark.parametrize("lambda_", [1e3, 1.0, 1e-6])
def test_several_labels_are_a_problem_each(lambda_):
  features_ND, digit = digits()
  features_ND, digit = features_ND[:301], digit[:301]
  labels = np.stack([digit % 2 == 0, digit >= 5, digit == 0], axis=1).astype(np.int8)
  labels[np.random.default_rng(0).random(labels.shape) < 0.1] = -1
  got = logistic.fit(logistic.prepare(features_ND, labels, 3), lambda_)
  weights_DC, bias_C = np.zeros((64, 3)), np.zeros(3)
  for c in range(3):
    known = labels[:, c] >= 0
    weights_DC[:, c : c + 1], bias_C[c : c + 1] = scikit_learn(
      features_ND[known], labels[known, c], lambda_
    )
  measure = functools.partial(
    objective, features_ND=features_ND, wrong_of=logistic_loss(labels), lambda_=lambda_
  )
  assert got.converged
  assert -1e-9 < measure(got.weights_DC, got.bias_C) / measure(weights_DC, bias_C) - 1 < 1e-6


def test_a_huge_lambda_leaves_the_intercepts():
  """By hand: no weights, and the probabilities are the classes' shares."""
  labels = np.array([0, 1, 1, 2, 2, 2])
  features_ND = np.random.default_rng(0).normal(size=(6, 4))
  got = logistic.fit(logistic.prepare(features_ND, labels, 3), 1e12)
  assert np.abs(got.weights_DC).max() < 1e-9
  np.testing.assert_allclose(special.softmax(got.bias_C), [1 / 6, 2 / 6, 3 / 6], rtol=1e-5)
  entropy = -(np.log(1 / 6) + 2 * np.log(1 / 3) + 3 * np.log(1 / 2)) / 6
  assert got.objective == pytest.approx(entropy, rel=1e-5)


def test_the_softmax_loss_by_hand():
  """Logits ln 1, ln 2, ln 3: probabilities 1/6, 1/3, 1/2."""
  loss = lbfgs.Softmax(jnp.array([0, 2]))
  logits_NC = jnp.log(jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]))
  wrong_NC = loss.margins(logits_NC)
  loss_N, residual_NC, curvature_NC = loss.at(wrong_NC)
  np.testing.assert_allclose(loss_N, np.log([6, 2]), rtol=1e-6)
  expected_NC = [[-5 / 6, 1 / 3, 1 / 2], [1 / 6, 1 / 3, -1 / 2]]
  np.testing.assert_allclose(residual_NC, expected_NC, rtol=1e-6)
  np.testing.assert_allclose(curvature_NC, [[5 / 36, 2 / 9, 1 / 4]] * 2, rtol=1e-6)
  # of 40 more for the right class nothing is left in 1 - p, nor in log(sum) - logit
  far_NC = loss.margins(logits_NC.at[1, 2].add(40.0))
  assert float(loss.at(far_NC)[0][1]) == pytest.approx(np.exp(-40), rel=1e-5)
  assert float(loss.at(far_NC)[1][1, 2]) == pytest.approx(-np.exp(-40), rel=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "logistic"])
def test_gradients_and_slopes_are_those_of_autodiff(kind):
  rng = np.random.default_rng(0)
  logits_NC, step_NC = jnp.float32(3 * rng.normal(size=(2, 7, 4)))
  weight_N = jnp.float32(rng.random(7))
  if kind == "softmax":
    labels = jnp.array(rng.integers(0, 4, 7))
    loss = lbfgs.Softmax(labels)

    def plain(z_NC):
      return -jnp.take_along_axis(jax.nn.log_softmax(z_NC), labels[:, None], axis=1)[:, 0]
  else:
    sign_NC = jnp.float32(rng.integers(-1, 2, (7, 4)))
    loss = lbfgs.Logistic(sign_NC)

    def plain(z_NC):
      return -(jnp.abs(sign_NC) * jax.nn.log_sigmoid(-sign_NC * z_NC)).sum(axis=1)

  loss_N, residual_NC, curvature_NC = loss.at(loss.margins(logits_NC))
  gradient_NC = jax.grad(lambda z_NC: plain(z_NC).sum())
  np.testing.assert_allclose(loss_N, plain(logits_NC), rtol=1e-5)
  np.testing.assert_allclose(residual_NC, gradient_NC(logits_NC), atol=1e-6)
  hessian = jax.hessian(lambda z_NC: plain(z_NC).sum())(logits_NC)
  np.testing.assert_allclose(curvature_NC, jnp.einsum("ncnc->nc", hessian), atol=1e-6)

  def along(t):
    return (weight_N * plain(logits_NC + t * step_NC)).sum()

  for t in (0.0, 0.7):
    got = loss.slopes(loss.margins(logits_NC), loss.margins(step_NC), jnp.float32(t), weight_N)
    np.testing.assert_allclose(got, (jax.grad(along)(t), jax.grad(jax.grad(along))(t)), rtol=1e-4)


@pytest.mark.parametrize("lambda_", [10.0, 1e-3])
def test_eight_devices_agree_with_one(lambda_):
  one, eight = (logistic.fit(problem(devices, 101), lambda_) for devices in (1, 8))
  assert len(problem(8, 101).examples.weight_N) == 104
  assert not problem(8, 101).examples.weight_N.sharding.is_fully_replicated
  assert one.converged
  assert eight.converged
  assert eight.objective == pytest.approx(one.objective, rel=2e-6)
  scale = np.abs(one.weights_DC).max()
  np.testing.assert_allclose(eight.weights_DC, one.weights_DC, atol=2e-3 * scale)
  np.testing.assert_allclose(eight.bias_C, one.bias_C, atol=2e-3 * np.abs(one.bias_C).max())


def test_a_start_changes_the_way_and_not_the_end():
  cold = logistic.fit(problem(), 1e-3)
  near = logistic.fit(problem(), 1.2e-3)
  warm = logistic.fit(problem(), 1e-3, near)
  assert warm.iterations < 0.7 * cold.iterations
  assert warm.objective == pytest.approx(cold.objective, rel=2e-6)
  # from a start where nearly all is decided the other way
  bad = logistic.Fit(-30 * near.weights_DC, near.bias_C, 0.0, 0, True)
  assert logistic.fit(problem(), 1e-3, bad).objective == pytest.approx(cold.objective, rel=2e-6)


def test_iterations_that_do_not_suffice_are_told():
  got = logistic.fit(problem(), 1e-3, stop=logistic.Stop(max_iterations=5))
  assert (got.iterations, got.converged) == (5, False)


def test_a_gradient_tolerance_stops_as_scikit_learn_says():
  features_ND, labels = digits()
  features_ND, labels = features_ND[:TRAIN].astype(np.float64), labels[:TRAIN]
  got = logistic.fit(problem(), 1e-3, stop=logistic.Stop(gradient_tolerance=1e-4))
  assert got.converged
  assert got.iterations < 0.7 * logistic.fit(problem(), 1e-3).iterations
  residual_NC = special.softmax(got.scores(features_ND), axis=1) - np.eye(10)[labels]
  gradient_DC = (features_ND.T @ residual_NC + 1e-3 * got.weights_DC) / TRAIN
  assert np.abs(gradient_DC).max() <= 1.1e-4
  assert np.abs(residual_NC.mean(axis=0)).max() <= 1.1e-4


def test_columns_that_do_not_vary_are_harmless():
  features_ND, labels = digits()
  constant_ND = np.pad(features_ND[:TRAIN], ((0, 0), (0, 3)), constant_values=7.0)
  got = logistic.fit(logistic.prepare(constant_ND, labels[:TRAIN], 10), 1.0)
  assert got.objective == pytest.approx(logistic.fit(problem(), 1.0).objective, rel=2e-6)
  assert np.abs(got.weights_DC[64:]).max() < 1e-5


NAN = np.ones((3, 2))
NAN[1, 1] = np.nan


@pytest.mark.parametrize(
  ("features_ND", "labels", "classes", "message"),
  [
    (NAN, [0, 1, 0], 2, r"features of row 1 are not finite"),
    (np.full((3, 2), np.inf), [0, 1, 0], 2, r"row 0 are not finite \(nor those of 2 more"),
    (np.zeros((0, 2)), [], 2, "is the split empty"),
    (np.ones((3, 2)), [0, 1], 2, "one label for each"),
    (np.ones((3, 2)), [0, 1, 3], 3, r"label of row 2 is 3, not in \[0, 3\)"),
    (np.ones((3, 2)), [0, -1, 1], 2, "label of row 1 is -1"),
    (np.ones((3, 2)), [0.0, 1.0, 1.0], 2, "float64 .*, not integers"),
    (np.ones((3, 2)), [0, 0, 0], 1, "want at least two"),
    (np.ones((3, 2)), [1, 1, 1], 2, "class 0 has 0 training examples, and 3 lack it"),
    (np.ones((3, 2)), [0, 2, 2], 3, "class 1 has 0 training examples"),
    (np.ones((3, 2)), np.eye(3, 2) + 1, 2, "1, 0 and -1"),
    (np.ones((3, 2)), np.ones((3, 2)), 2, "class 0 has 3 training examples, and 0 lack it"),
    (np.ones((3, 2)), np.eye(3, 2), 3, r"labels \(3, 2\): several an image are \[N, 3\]"),
  ],
)
def test_bad_examples_are_told(features_ND, labels, classes, message):
  with pytest.raises(logistic.LogisticError, match=message):
    logistic.prepare(features_ND, np.array(labels), classes)


@pytest.mark.parametrize("lambda_", [0.0, -1.0, np.nan, np.inf])
def test_a_lambda_that_is_none_is_told(lambda_):
  with pytest.raises(logistic.LogisticError, match="want a positive number"):
    logistic.fit(problem(), lambda_)
