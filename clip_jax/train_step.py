"""TrainState, init_state and train_step: pure functions of (state, batch)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from clip_jax import config as config_lib
from clip_jax import optimizer, rounding, sharding
from clip_jax.data import records
from clip_jax.gradients import loss_and_gradients
from clip_jax.models.clip import CLIP

_WEIGHTS, _STEPS, _ROUNDING = 0, 1, 2  # the streams of random numbers that come from config.seed
_SPIKE_MEMORY = 0.98  # of the running mean and variance of the log gradient norm: 50 steps


@struct.dataclass
class Guard:
  """What decides whether a step's gradient is applied. All scalars."""

  skipped: jax.Array  # int32, since the start
  skipped_in_row: jax.Array  # int32
  norm_count: jax.Array  # int32, gradient norms in the running moments
  norm_mean: jax.Array  # float32, of the log gradient norm
  norm_variance: jax.Array


@struct.dataclass
class TrainState:
  """All that a step changes. `step` counts batches seen, skipped ones too."""

  step: jax.Array
  params: Any  # float32, or as `optimizer.at_rest` has them
  batch_stats: Any  # running statistics of batch normalisation; empty for Vision Transformers
  opt_state: Any
  guard: Guard


def init_state(config: config_lib.Config, mesh: Mesh) -> TrainState:
  """The state before the first step, the same for any number of devices."""
  make = functools.partial(_init, config)
  out = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
  return jax.jit(make, out_shardings=out)(jax.random.key(config.seed))


def abstract_state(config: config_lib.Config, mesh: Mesh) -> TrainState:
  """Shapes, dtypes and shardings of the state, without allocating it."""
  shapes = jax.eval_shape(functools.partial(_init, config), jax.random.key(config.seed))
  return sharding.place(shapes, mesh)


def _init(config: config_lib.Config, rng: jax.Array) -> TrainState:
  image, text = config.model.image, config.model.text
  image_BRR3 = jnp.zeros((1, image.resolution, image.resolution, 3))
  tokens_BL = jnp.zeros((1, text.context_length), jnp.int32)
  variables = CLIP(config.model).init(jax.random.fold_in(rng, _WEIGHTS), image_BRR3, tokens_BL)
  params, batch_stats = variables["params"], variables.get("batch_stats", {})
  trained = optimizer.trained(config.optimizer, params)
  opt_state = optimizer.make(config.optimizer, config.steps).init(trained)
  params = optimizer.at_rest(config.optimizer, params)
  return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, opt_state, fresh_guard())


def fresh_guard() -> Guard:
  """The guard before the first step."""
  zero, zero_f = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
  return Guard(zero, zero, zero, zero_f, zero_f)


def make_train_step(config: config_lib.Config, mesh: Mesh) -> jax.stages.Wrapped:
  """The jitted step: (state, batch) -> (state, metrics); the state passed in is donated.

  The batch holds `image` uint8 [B, R, R, 3], `tokens` int32 [B, L], and int32 [B] `bad` (why a
  record was replaced, an index into records.CAUSES) and `stop` (a host was asked to stop), which
  are summed over all hosts. Metrics are float32 scalars, and `bad_by_cause` [causes]. Of pairs and
  of tensors that are not finite the first is told by its number (-1: none; tensors as the leaves of
  the gradient), which `culprit` names. A step whose loss or gradient is not finite changes no
  parameter, no running statistics and no optimizer state.
  """
  whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  state = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
  step = functools.partial(train_step, config, mesh)
  return jax.jit(step, in_shardings=(state, rows), out_shardings=(state, whole), donate_argnums=0)


def train_step(
  config: config_lib.Config, mesh: Mesh, state: TrainState, batch: dict[str, jax.Array]
) -> tuple[TrainState, dict[str, jax.Array]]:
  """See `make_train_step`."""
  seed, updates = jax.random.key(config.seed), state.step - state.guard.skipped
  rng = jax.random.fold_in(jax.random.fold_in(seed, _STEPS), state.step)
  # by updates, so that a skipped step leaves no trace
  rounding_rng = jax.random.fold_in(jax.random.fold_in(seed, _ROUNDING), updates)
  wide = rounding.widened(state.params)
  (loss, figures, batch_stats), gradients = loss_and_gradients(
    config, mesh, wide, state.batch_stats, batch, rng
  )
  squares_T = jnp.stack([jnp.sum(jnp.square(x)) for x in jax.tree.leaves(gradients)])
  gradient_norm = jnp.sqrt(squares_T.sum())
  params, opt_state = optimizer.apply(
    config.optimizer, config.steps, gradients, state.opt_state, wide, rounding_rng
  )
  keep, spike_sigma, guard = judge(config.optimizer, state.guard, loss, gradient_norm)
  params, batch_stats, opt_state = jax.tree.map(
    lambda new, old: jnp.where(keep, new, old),
    (params, batch_stats, opt_state),
    (state.params, state.batch_stats, state.opt_state),
  )
  metrics = {
    "loss": loss,
    "accuracy": figures.accuracy,
    "logit_scale": figures.scale,
    "image_rank": figures.image_rank,
    "text_rank": figures.text_rank,
    "gradient_norm": gradient_norm,
    "gradient_norm_sigma": spike_sigma,
    "learning_rate": optimizer.schedule(config.optimizer, config.steps)(updates),
    "skipped": guard.skipped,
    "skipped_in_row": guard.skipped_in_row,
    "bad_by_cause": jnp.bincount(batch["bad"], length=len(records.CAUSES)),
    "not_finite_pairs": figures.not_finite_pairs,
    "first_not_finite_pair": figures.first_not_finite_pair,
    "first_not_finite_tensor": _first(~jnp.isfinite(squares_T)),
    "stop": batch["stop"].sum(),
  }
  metrics = {name: value.astype(jnp.float32) for name, value in metrics.items()}
  return TrainState(state.step + 1, params, batch_stats, opt_state, guard), metrics


def _first(which_N: jax.Array) -> jax.Array:
  """The index of the first that is true, or -1."""
  return jnp.where(which_N.any(), jnp.argmax(which_N), -1)


def judge(
  config: config_lib.Optimizer, guard: Guard, loss: jax.Array, gradient_norm: jax.Array
) -> tuple[jax.Array, jax.Array, Guard]:
  """Whether to apply this step, how many sigma its gradient norm is out, and the next guard.

  The moments are those of the log gradient norm over about 50 steps; a spike counts only once
  that many were seen and warm-up is over.
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
  log_norm = jnp.log(jnp.where(finite, gradient_norm, 1.0) + 1e-12)
  known = guard.norm_count >= max(config.warmup_steps, 50)
  deviation = log_norm - guard.norm_mean
  sigma = jnp.where(known & finite, deviation * jax.lax.rsqrt(guard.norm_variance + 1e-6), 0.0)
  spike = (sigma > config.skip_spike_sigma) & (config.skip_spike_sigma > 0)
  keep = finite & ~spike
  memory = jnp.minimum(_SPIKE_MEMORY, guard.norm_count / (guard.norm_count + 1.0))
  moved = Guard(
    skipped=guard.skipped,
    skipped_in_row=jnp.zeros_like(guard.skipped_in_row),
    norm_count=guard.norm_count + 1,
    norm_mean=guard.norm_mean + (1 - memory) * deviation,
    norm_variance=memory * (guard.norm_variance + (1 - memory) * deviation**2),
  )
  held = dataclasses.replace(
    guard, skipped=guard.skipped + 1, skipped_in_row=guard.skipped_in_row + 1
  )
  return keep, sigma, jax.tree.map(lambda a, b: jnp.where(keep, a, b), moved, held)
