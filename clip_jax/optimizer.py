"""AdamW with warm-up and cosine decay; decay on matrices only. Source: section 2.5, Table 18."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clip_jax import config as config_lib

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


def make(config: config_lib.Optimizer, steps: int) -> optax.GradientTransformation:
  """The update of every parameter; the gradient is clipped first where the config asks."""
  clip = config.clip_gradient_norm
  return optax.chain(
    optax.clip_by_global_norm(clip) if clip > 0 else optax.identity(),
    optax.adamw(
      schedule(config, steps),
      config.beta1,
      config.beta2,
      config.epsilon,
      weight_decay=config.weight_decay,
      mask=decay_mask,
    ),
  )


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
