"""L-BFGS for linear classifiers with an L2 penalty, sharded over examples.

What a general optimiser cannot know makes it short of work: logits are linear in the step, so that
a search along a line needs no product with the features, and an iteration two. The first guess at
the inverse Hessian is a diagonal made anew in each iteration: right where the columns of the
features do not correlate and the probabilities do not depend on them. optax.lbfgs takes one fixed
scaling of the weights. With the same diagonal, made for even probabilities, it is as fast at large
lambdas, but with little regularisation nothing stays even: on scikit-learn's digits it takes twice
the iterations at a lambda of 0.01, and after 600 at 1e-4 is 1 % above the minimum, which is reached
here after 200 (tools/bench/linear_probe.py --features digits --optax).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from clip_jax import sharding

_MEMORY = 10  # steps that L-BFGS remembers, as many as SciPy's
_SEARCHES = 30  # evaluations along one line, at most; one or two are usual
_FLAT = 0.1  # a line's slope at its accepted point over that at its start
_FRESH = 32  # iterations after which the logits are a product again: sums of steps drift from it
_TINY = 1e-30
dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)  # float32 on every device


class Examples(NamedTuple):
  """What a classifier is fitted to; rows are sharded, the rest is whole on every device."""

  features_NA: jax.Array  # uncorrelated columns, the last one ones: the intercept's
  target: jax.Array  # int32 class [N]; or float32 [N, C]: -1 it holds, 1 it does not, 0 unknown
  weight_N: jax.Array  # sum to 1; 0 in rows that only fill up the devices
  spread_A1: jax.Array  # mean square of each column
  chance: Any  # the loss of the best intercepts alone


class Minimum(NamedTuple):
  theta_AC: jax.Array
  objective: jax.Array
  iterations: jax.Array
  converged: jax.Array


class _State(NamedTuple):
  iterations: Any
  theta_AC: Any
  wrong_NC: Any  # margins at `theta_AC`
  gradient_AC: Any
  curvature_C: Any  # mean p (1 - p) of each class
  objective: Any
  gain: Any  # over intercepts alone
  steps_MAC: Any  # the last changes of theta, and of the gradient
  changes_MAC: Any
  converged: Any
  stuck: Any


@functools.partial(jax.jit, static_argnums=6)
def minimise(
  examples: Examples,
  first_AC: jax.Array,
  decay: jax.Array,
  tolerance: jax.Array,
  gradient_tolerance: jax.Array,
  max_iterations: jax.Array,
  mesh: Mesh,
) -> Minimum:
  """Theta of the least weighted loss + decay / 2 times its squares (without the last row's).

  Converged: what the next step would gain, by the approximate Hessian, is under `tolerance` of the
  objective, and of all that was gained over intercepts alone; or no class's gradient is longer than
  `gradient_tolerance`.
  """
  features_NA, target, weight_N, spread_A1, chance = examples
  loss = Softmax(target) if target.ndim == 1 else Logistic(target)
  decay_A1 = jnp.full_like(spread_A1, decay).at[-1].set(0)
  whole = functools.partial(lax.with_sharding_constraint, shardings=sharding.replicated(mesh))

  def look(state: _State) -> _State:
    """The state with what the next direction and the stop need of its place."""
    theta_AC = state.theta_AC
    loss_N, residual_NC, curvature_NC = loss.at(state.wrong_NC)
    gradient_AC = dot("na,nc->ac", features_NA, residual_NC * weight_N[:, None])
    penalty = 0.5 * jnp.sum(decay_A1 * jnp.square(theta_AC))
    objective = dot("n,n->", loss_N, weight_N) + penalty
    return state._replace(
      gradient_AC=whole(gradient_AC) + decay_A1 * theta_AC,
      curvature_C=whole(dot("nc,n->c", curvature_NC, weight_N)),
      objective=objective,
      # where lambda is so large that rounding hides the gain, the penalty is as much
      gain=jnp.maximum(chance - objective, penalty),
    )

  def advance(state: _State) -> _State:
    # where no probability is in doubt the intercepts have no curvature: a little of the weights'
    scale_AC = 1 / (spread_A1 * state.curvature_C[None] + decay_A1 + 1e-3 * decay)
    direction_AC = -_two_loops(state, scale_AC)
    slope = jnp.sum(direction_AC * state.gradient_AC)
    enough = -0.5 * slope <= tolerance * jnp.minimum(state.objective, state.gain)
    longest = jnp.max(jnp.linalg.norm(state.gradient_AC, axis=0))
    along_NC = loss.margins(dot("na,ac->nc", features_NA, direction_AC))
    penalty = (
      jnp.sum(decay_A1 * state.theta_AC * direction_AC),
      jnp.sum(decay_A1 * jnp.square(direction_AC)),
    )
    size = _search(lambda t: loss.slopes(state.wrong_NC, along_NC, t, weight_N), slope, penalty)
    moved_AC, slot = size * direction_AC, state.iterations % _MEMORY
    theta_AC = state.theta_AC + moved_AC
    wrong_NC = lax.cond(
      state.iterations % _FRESH == _FRESH - 1,
      lambda: loss.margins(dot("na,ac->nc", features_NA, theta_AC)),
      lambda: state.wrong_NC + size * along_NC,
    )
    new = look(state._replace(theta_AC=theta_AC, wrong_NC=wrong_NC))
    return new._replace(
      iterations=state.iterations + 1,
      steps_MAC=state.steps_MAC.at[slot].set(moved_AC),
      changes_MAC=state.changes_MAC.at[slot].set(new.gradient_AC - state.gradient_AC),
      converged=enough | (longest <= gradient_tolerance),
      stuck=size == 0,
    )

  memory, no = jnp.zeros((_MEMORY, *first_AC.shape)), jnp.zeros((), bool)
  wrong_NC = loss.margins(dot("na,ac->nc", features_NA, first_AC))
  zeros = (jnp.zeros_like(first_AC), jnp.zeros(first_AC.shape[1]), jnp.zeros(()), jnp.zeros(()))
  first = _State(jnp.int32(0), first_AC, wrong_NC, *zeros, memory, memory, no, no)
  end = lax.while_loop(
    lambda s: ~(s.converged | s.stuck) & (s.iterations < max_iterations), advance, look(first)
  )
  return whole(Minimum(end.theta_AC, end.objective, end.iterations, end.converged))


def _two_loops(state: _State, scale_AC: jax.Array) -> jax.Array:
  """The approximate inverse Hessian times the gradient; `scale_AC` approximates it at first.

  Source: Nocedal and Wright, Numerical Optimization, algorithm 7.4.
  """
  count = jnp.minimum(state.iterations, _MEMORY)

  def pair(age: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    slot = (state.iterations - 1 - age) % _MEMORY
    s_AC, y_AC = state.steps_MAC[slot], state.changes_MAC[slot]
    return s_AC, y_AC, jnp.sum(s_AC * y_AC)

  def newest_first(age: Any, carry: Any) -> Any:
    q_AC, alphas = carry
    s_AC, y_AC, sy = pair(age)
    alpha = jnp.where(sy > 0, jnp.sum(s_AC * q_AC) / sy, 0)
    return q_AC - alpha * y_AC, alphas.at[age].set(alpha)

  def oldest_first(i: Any, r_AC: Any) -> Any:
    age = count - 1 - i
    s_AC, y_AC, sy = pair(age)
    beta = jnp.where(sy > 0, jnp.sum(y_AC * r_AC) / sy, alphas[age])
    return r_AC + (alphas[age] - beta) * s_AC

  start = (state.gradient_AC, jnp.zeros(_MEMORY))
  q_AC, alphas = lax.fori_loop(0, count, newest_first, start)
  _, y_AC, sy = pair(0)
  factor = jnp.where((count > 0) & (sy > 0), sy / jnp.sum(y_AC * scale_AC * y_AC), 1)
  return lax.fori_loop(0, count, oldest_first, factor * scale_AC * q_AC)


def _search(slopes: Any, slope: jax.Array, penalty: tuple[jax.Array, jax.Array]) -> jax.Array:
  """How far to go: where the slope of a convex line is `_FLAT` of its first, by Newton's method.

  Args: slopes, of a place on the line the loss's first and second derivative; slope, the first at
    0, penalty included; penalty, its own two derivatives at 0.
  Returns 0 where nothing was found.
  """

  def advance(carry: Any) -> Any:
    count, t, low, high, _ = carry
    first, second = slopes(t)
    first, second = first + penalty[0] + t * penalty[1], second + penalty[1]
    flat = jnp.abs(first) <= _FLAT * jnp.abs(slope)
    low, high = jnp.where(first < 0, t, low), jnp.where(first < 0, high, t)
    newton = t - first / jnp.maximum(second, _TINY)
    middle = jnp.where(low > 0, 0.5 * (low + high), 0.1 * high)
    middle = jnp.where(jnp.isinf(high), 4 * t, middle)
    inside = (newton > low) & (newton < jnp.minimum(high, 4 * t))
    return count + 1, jnp.where(flat, t, jnp.where(inside, newton, middle)), low, high, flat

  start = (jnp.zeros((), jnp.int32), jnp.float32(1), jnp.float32(0), jnp.float32(jnp.inf), False)
  _, t, low, _, flat = lax.while_loop(lambda c: ~c[4] & (c[0] < _SEARCHES), advance, start)
  return jnp.where(flat, t, low)


class Softmax(NamedTuple):
  """The cross-entropy of one class out of many, from margins: logits less that of the class.

  Differences keep their relative precision where the right class has nearly all probability.
  """

  label_N: jax.Array

  def margins(self, logits_NC: jax.Array) -> jax.Array:
    return logits_NC - jnp.take_along_axis(logits_NC, self.label_N[:, None], axis=1)

  def _right(self, wrong_NC: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, wrong_NC.shape, 1) == self.label_N[:, None]

  def _probabilities(self, wrong_NC: jax.Array) -> tuple[jax.Array, ...]:
    """(of each wrong class, 0 at the right; their sum; the highest margin; the normaliser - 1)."""
    highest_N1 = jnp.max(wrong_NC, axis=1, keepdims=True)  # at least 0, the right one's
    e_NC = jnp.where(self._right(wrong_NC), 0, jnp.exp(wrong_NC - highest_N1))
    others_N1 = jnp.sum(e_NC, axis=1, keepdims=True)
    total_N1 = others_N1 + jnp.exp(-highest_N1)
    # of the normaliser the largest term is 1: the right class's, or one of the others'
    beside_N1 = jnp.where(highest_N1 > 0, total_N1 - 1, others_N1)
    return e_NC / total_N1, others_N1 / total_N1, highest_N1, beside_N1

  def at(self, wrong_NC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    p_NC, wrong_N1, highest_N1, beside_N1 = self._probabilities(wrong_NC)
    right_NC = self._right(wrong_NC)
    residual_NC = jnp.where(right_NC, -wrong_N1, p_NC)
    spread_NC = jnp.where(right_NC, wrong_N1 * (1 - wrong_N1), p_NC * (1 - p_NC))
    return (highest_N1 + jnp.log1p(beside_N1))[:, 0], residual_NC, spread_NC

  def slopes(
    self, wrong_NC: jax.Array, along_NC: jax.Array, t: jax.Array, weight_N: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    p_NC = self._probabilities(wrong_NC + t * along_NC)[0]
    first_N = jnp.sum(p_NC * along_NC, axis=1)
    second_N = jnp.sum(p_NC * jnp.square(along_NC), axis=1) - jnp.square(first_N)
    return dot("n,n->", first_N, weight_N), dot("n,n->", second_N, weight_N)


class Logistic(NamedTuple):
  """The sum of the logistic losses of several labels: -1 it holds, 1 it does not, 0 unknown."""

  sign_NC: jax.Array

  def margins(self, logits_NC: jax.Array) -> jax.Array:
    return self.sign_NC * logits_NC

  def at(self, wrong_NC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    p_NC, known_NC = jax.nn.sigmoid(wrong_NC), jnp.abs(self.sign_NC)
    loss_N = jnp.sum(known_NC * jax.nn.softplus(wrong_NC), axis=1)
    return loss_N, self.sign_NC * p_NC, known_NC * p_NC * (1 - p_NC)

  def slopes(
    self, wrong_NC: jax.Array, along_NC: jax.Array, t: jax.Array, weight_N: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    p_NC = jax.nn.sigmoid(wrong_NC + t * along_NC)
    first_N = jnp.sum(p_NC * along_NC, axis=1)
    second_N = jnp.sum(p_NC * (1 - p_NC) * jnp.square(along_NC), axis=1)
    return dot("n,n->", first_N, weight_N), dot("n,n->", second_N, weight_N)
