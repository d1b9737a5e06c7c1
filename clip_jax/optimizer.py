"""AdamW with warm-up and cosine decay; decay on matrices only. Source: section 2.5, Table 18.

Where the config asks, moments and the text encoder's matrices rest in bfloat16 between steps: each
update is computed in float32 from what they hold, then rounded stochastically.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clip_jax import config as config_lib
from clip_jax import rounding

_MOMENTS, _WEIGHTS = 0, 1  # what is rounded: streams of random numbers of one update
_IMAGE = ("image", "image_projection")  # the image encoder, of a model's parameters
_TEXT = ("text", "text_projection")

# The last name of a weight's path says whether it is a matrix (decays) or a gain, bias or scale.
_DECAYED = {
  "kernel", "embedding", "positional_embedding", "image_projection", "text_projection",
}  # fmt: skip
_UNDECAYED = {
  "bias", "scale", "class_embedding", "log_scale", "probe", "text_projection_bias", "logit_bias",
}  # fmt: skip


def schedule(config: config_lib.Optimizer, steps: int) -> optax.Schedule:
  """Linear warm-up from zero over `warmup_steps`, then half a cosine to zero at `steps`.

  Source: section 2.5 (cosine); the paper states neither the shape of the warm-up nor the end.
  """
  if not 0 <= config.warmup_steps < max(steps, 1):
    raise ValueError(
      f"config.optimizer.warmup_steps: {config.warmup_steps} is not under config.steps ({steps})"
    )
  return optax.warmup_cosine_decay_schedule(
    0.0 if config.warmup_steps else config.learning_rate,
    config.learning_rate,
    config.warmup_steps,
    steps,
  )


def make(config: config_lib.Optimizer, steps: int) -> optax.GradientTransformationExtraArgs:
  """The update of every trained parameter; the gradient is clipped first where the config asks.

  With `moments_dtype` "bfloat16" its `update` takes the keyword `rng`, another key for each update.
  """
  clip = config.clip_gradient_norm
  adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
  adamw = optax.chain(
    _with_half_moments(adam) if config.moments_dtype == "bfloat16" else adam,
    optax.add_decayed_weights(config.weight_decay, decay_mask),
    optax.scale_by_learning_rate(schedule(config, steps)),
  )
  return optax.chain(optax.clip_by_global_norm(clip) if clip > 0 else optax.identity(), adamw)


def _with_half_moments(adam: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """`scale_by_adam` whose two moments rest in bfloat16; its state has the same tree.

  The update itself takes this step's moments before they are rounded.
  Source: section 2.5, after Dhariwal et al. 2020, arXiv 2005.00341.
  """

  def init(params: Any) -> Any:
    state = adam.init(params)
    mu, nu = optax.tree.cast((state.mu, state.nu), jnp.bfloat16)
    return state._replace(mu=mu, nu=nu)

  def update(
    gradients: Any, state: Any, params: Any = None, *, rng: jax.Array, **_: Any
  ) -> tuple[Any, Any]:
    mu, nu = rounding.widened((state.mu, state.nu))
    updates, state = adam.update(gradients, state._replace(mu=mu, nu=nu), params)
    pairs = jax.tree_util.tree_map_with_path(
      lambda path, mu, nu: rounding.stochastic_pair(mu, nu, rounding.path_key(rng, path)),
      state.mu,
      state.nu,
    )
    mu, nu = jax.tree.transpose(jax.tree.structure(state.mu), None, pairs)
    return updates, state._replace(mu=mu, nu=nu)

  return optax.GradientTransformationExtraArgs(init, update)


def apply(
  config: config_lib.Optimizer,
  steps: int,
  gradients: Any,
  opt_state: Any,
  params: Any,
  rng: jax.Array,
) -> tuple[Any, Any]:
  """One update: (params as they rest, opt_state).

  Args: gradients, of the `trained` parameters; params, all, in float32; rng, of this update.
  """
  before = trained(config, params)
  updates, opt_state = make(config, steps).update(
    gradients, opt_state, before, rng=jax.random.fold_in(rng, _MOMENTS)
  )
  after = clip_log_scale(optax.apply_updates(before, updates), config.max_logit_scale)
  return at_rest(config, {**params, **after}, jax.random.fold_in(rng, _WEIGHTS)), opt_state


def trained(config: config_lib.Optimizer, params: Any) -> Any:
  """Those that have a gradient, moments and decay: all but a locked image encoder.

  Source: Zhai et al. 2022, arXiv 2111.07991 (LiT). Differs: the projection is locked too, as it is
  part of what `config.init` learnt.
  """
  return {name: x for name, x in params.items() if not (config.lock_image and name in _IMAGE)}


def at_rest(config: config_lib.Optimizer, params: Any, rng: jax.Array | None = None) -> Any:
  """`params` in the dtypes in which they lie between steps.

  With `text_weights_dtype` "bfloat16" those are the text encoder's matrices, embeddings and
  projection included: what decays. Its gains and biases stay in float32 (under 1 % of the bytes),
  and so do the logit scale and the image encoder. `rng` None, at the start: rounded to nearest.
  Source: section 2.5, "half-precision stochastically rounded text encoder weights".
  """
  if config.text_weights_dtype == "float32":
    return params

  def put(path: tuple[Any, ...], x: jax.Array, decays: bool) -> jax.Array:
    if path[0].key not in _TEXT or not decays:
      return x
    if rng is None:
      return x.astype(jnp.bfloat16)
    return rounding.stochastic(x, rounding.path_key(rng, path))

  return jax.tree_util.tree_map_with_path(put, params, decay_mask(params))


def decay_mask(params: Any) -> Any:
  """True for each matrix. Raises: ValueError on a weight that neither list above names."""

  def decays(path: tuple[Any, ...], _: jax.Array) -> bool:
    name = path[-1].key
    if name not in _DECAYED | _UNDECAYED:
      raise ValueError(
        f"{jax.tree_util.keystr(path)}: does weight decay apply to it? name it in optimizer.py"
      )
    return name in _DECAYED

  return jax.tree_util.tree_map_with_path(decays, params)


def clip_log_scale(params: Any, max_logit_scale: float) -> Any:
  """Keeps the logit scale at or under `max_logit_scale` (100 in the paper, section 2.5)."""
  return {**params, "log_scale": jnp.minimum(params["log_scale"], math.log(max_logit_scale))}
