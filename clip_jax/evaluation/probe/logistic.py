"""L2-regularised logistic regression by L-BFGS, sharded over examples.

The objective is scikit-learn's `LogisticRegression(C=1 / lambda)`, divided by the number of
examples N: the mean cross-entropy + lambda / (2 N) times the sum of squared weights; intercepts are
free. As there, two classes have one vector of weights between them (the logistic loss), more have
one each (the softmax); several labels an image are one problem of two classes for each label.

Three things make it fast. The features are turned once to their principal axes, where a diagonal
approximates the inverse Hessian well, at any lambda. Logits are linear in the step: a search along
the line costs no product with the features, and an iteration two. And a fit may start where that
of another lambda ended.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl
from jax.sharding import Mesh
from scipy import special

from clip_jax import sharding
from clip_jax.evaluation.probe import lbfgs


@dataclasses.dataclass(frozen=True)
class Stop:
  """Where a fit ends.

  It has converged when what another step would gain, by the approximate Hessian, is under
  `tolerance` of the objective and of all that was gained over intercepts alone; the objective is
  then within 1e-6 of its minimum, relative. Or when the gradient of each class is no longer than
  `gradient_tolerance`. scikit-learn stops where none of its entries exceeds 1e-4: at a small lambda
  far from the minimum, at a classifier that depends on the way there.
  """

  tolerance: float = 3e-9
  gradient_tolerance: float = 0.0
  max_iterations: int = 1000


AT_MINIMUM = Stop()


class LogisticError(ValueError):
  """Features or labels that no classifier can be fitted to: which, and why."""


@dataclasses.dataclass(frozen=True)
class Problem:
  """A training set on the devices, made ready for fits at any lambda."""

  examples: lbfgs.Examples  # centred, along the principal axes
  mean_D: np.ndarray  # float32
  axes_DD: np.ndarray  # float32, a principal axis in each column
  count: int  # of examples
  classes: int
  two: bool  # classes, of which an image has one
  mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Fit:
  """`logits_NC = features_ND @ weights_DC + bias_C`; of two classes the first has zeros."""

  weights_DC: np.ndarray  # float32
  bias_C: np.ndarray  # float32
  objective: float  # as of the module's head, in float32
  iterations: int
  converged: bool

  def scores(self, features_ND: np.ndarray) -> np.ndarray:
    """Logits [N, C], float32."""
    return features_ND @ self.weights_DC + self.bias_C[None]


def prepare(
  features_ND: np.ndarray, labels: np.ndarray, classes: int, mesh: Mesh | None = None
) -> Problem:
  """Checks the training set and lays it on the devices of `mesh` (None: all there are).

  Args: features_ND, real numbers. labels, int [N] in [0, classes); or [N, classes] where an image
    may have several: 1, 0, or -1 where it is neither (VOC's "difficult").
  Raises: LogisticError on a feature that is not finite, a label out of range, no examples, a class
    that none or all of them have.
  """
  features_ND, labels = check(features_ND, labels, classes)
  chance = _chance(labels, classes)
  mesh = mesh or sharding.make_mesh()
  rows, n = sharding.batch_sharding(mesh), len(labels)
  padding = -n % (mesh.shape["data"] * mesh.shape["fsdp"])

  def put(x: np.ndarray) -> jax.Array:
    padded = np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
    return jax.make_array_from_callback(padded.shape, rows, lambda index: padded[index])

  target = labels
  if labels.ndim == 2 or classes == 2:
    held_NC = labels.reshape(n, -1).astype(np.float32)
    target = np.where(held_NC < 0, 0, 1 - 2 * held_NC)
  mean_D = features_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
  given_ND, weight_N = put(features_ND), put(np.full(n, 1 / n, np.float32))
  covariance_DD = np.asarray(_covariance(given_ND, mean_D, weight_N, mesh), np.float64)
  with threadpoolctl.threadpool_limits(1):  # its threads spin: slow where cores are shared
    axes_DD = np.linalg.eigh(covariance_DD)[1].astype(np.float32)
  features_NA, spread_A1 = _turned(given_ND, mean_D, axes_DD, weight_N, mesh)
  examples = lbfgs.Examples(features_NA, put(target), weight_N, spread_A1, np.float32(chance))
  return Problem(examples, mean_D, axes_DD, n, classes, labels.ndim == 1 and classes == 2, mesh)


def check(
  features_ND: np.ndarray, labels: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
  """float32 features and int32 or int8 labels of the same number. Raises: LogisticError."""
  features_ND, labels = np.asarray(features_ND, np.float32), np.asarray(labels)
  several = labels.ndim == 2
  if features_ND.ndim != 2 or len(features_ND) != len(labels) or not features_ND.size:
    raise LogisticError(
      f"features {features_ND.shape} and labels {labels.shape}: want [N, D] and one label for each "
      "of at least one row; is the split empty?"
    )
  finite_N = np.isfinite(features_ND).all(axis=1)
  if not finite_N.all():
    raise LogisticError(
      f"features of row {np.argmin(finite_N)} are not finite (nor those of "
      f"{(~finite_N).sum() - 1} more): are the weights broken?"
    )
  if classes < 2 and not several:
    raise LogisticError(f"{classes} class: want at least two to tell apart")
  if several:
    if labels.shape[1] != classes or not np.isin(labels, (-1, 0, 1)).all():
      raise LogisticError(
        f"labels {labels.shape}: several an image are [N, {classes}] of 1, 0 and -1 (unknown)"
      )
    return features_ND, labels.astype(np.int8)
  if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
    raise LogisticError(f"labels are {labels.dtype} {labels.shape}, not integers [N]")
  if not 0 <= labels.min() <= labels.max() < classes:
    row = int(np.argmax((labels < 0) | (labels >= classes)))
    raise LogisticError(f"label of row {row} is {labels[row]}, not in [0, {classes})")
  return features_ND, labels.astype(np.int32)


def _chance(labels: np.ndarray, classes: int) -> float:
  """The mean loss of the best intercepts alone. Raises: LogisticError where one is infinite."""
  several = labels.ndim == 2
  held_C = (labels == 1).sum(axis=0) if several else np.bincount(labels, minlength=classes)
  other_C = (labels == 0).sum(axis=0) if several else len(labels) - held_C
  bad = (held_C == 0) | (other_C == 0)
  if bad.any():
    c = int(np.argmax(bad))
    raise LogisticError(
      f"class {c} has {held_C[c]} training examples, and {other_C[c]} lack it ({bad.sum()} of "
      f"{classes} classes such): no finite intercept fits; leave the class out"
    )
  known_C = held_C + other_C
  total = special.xlogy(held_C, held_C / known_C).sum()
  total += special.xlogy(other_C, other_C / known_C).sum() if several else 0
  return -float(total) / len(labels)


@functools.partial(jax.jit, static_argnums=3)
def _covariance(
  features_ND: jax.Array, mean_D: jax.Array, weight_N: jax.Array, mesh: Mesh
) -> jax.Array:
  centred_ND = features_ND - mean_D[None]
  covariance_DD = lbfgs.dot("nd,ne->de", centred_ND * weight_N[:, None], centred_ND)
  return jax.lax.with_sharding_constraint(covariance_DD, sharding.replicated(mesh))


@functools.partial(jax.jit, static_argnums=4)
def _turned(
  features_ND: jax.Array, mean_D: jax.Array, axes_DD: jax.Array, weight_N: jax.Array, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
  """The features along the axes with a column of ones, and the mean square of each column."""
  turned_ND = lbfgs.dot("nd,da->na", features_ND - mean_D[None], axes_DD)
  features_NA = jnp.concatenate([turned_ND, jnp.ones_like(turned_ND[:, :1])], axis=1)
  features_NA = jax.lax.with_sharding_constraint(features_NA, sharding.batch_sharding(mesh))
  spread_A1 = lbfgs.dot("na,n->a", jnp.square(features_NA), weight_N)[:, None]
  return features_NA, jax.lax.with_sharding_constraint(spread_A1, sharding.replicated(mesh))


def fit(
  problem: Problem,
  lambda_: float,
  start: Fit | None = None,
  stop: Stop = AT_MINIMUM,
) -> Fit:
  """The weights that minimise the objective at `lambda_`.

  Args: start, the fit of another lambda or of part of the examples, or a mixture; None: zeros.
  Raises: LogisticError on a lambda that is not positive.
  """
  if not 0 < lambda_ < np.inf:
    raise LogisticError(f"lambda {lambda_}: want a positive number")
  columns = 1 if problem.two else problem.classes
  first_AC = np.zeros((len(problem.mean_D) + 1, columns), np.float32)
  if start is not None:
    weights_DC, bias_C = start.weights_DC[:, -columns:], start.bias_C[-columns:]
    first_AC[:-1] = problem.axes_DD.T @ weights_DC
    first_AC[-1] = bias_C + problem.mean_D @ weights_DC
  found = lbfgs.minimise(
    problem.examples,
    first_AC,
    np.float32(lambda_ / problem.count),
    np.float32(stop.tolerance),
    np.float32(stop.gradient_tolerance),
    np.int32(stop.max_iterations),
    problem.mesh,
  )
  theta_AC = np.asarray(found.theta_AC)
  weights_DC = problem.axes_DD @ theta_AC[:-1]
  bias_C = theta_AC[-1] - problem.mean_D @ weights_DC
  if problem.two:
    weights_DC, bias_C = np.pad(weights_DC, ((0, 0), (1, 0))), np.pad(bias_C, (1, 0))
  return Fit(
    weights_DC, bias_C, float(found.objective), int(found.iterations), bool(found.converged)
  )
