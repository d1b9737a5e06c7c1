"""The state that training starts from: random weights, those that `config.init` names, or those of
a checkpoint that another config wrote.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax import config as config_lib
from clip_jax import inference, train_step
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.interop import sources

# What may differ between the weights' own model and the one that trains on from them.
_FREE = ("compute_dtype", "residual_dtype", "scan_layers", "remat", "resolution")


def state(config: config_lib.Config, mesh: Mesh) -> train_step.TrainState:
  """The first state; with `config.init`, its weights and running statistics, the rest afresh.

  Of several hosts all must call.
  Raises: ValueError naming what of the config does not suit the weights; as `clip_jax.load`.
  """
  if not config.init:
    return train_step.init_state(config, mesh)
  model = sources.load(config.init, resolution=config.model.image.resolution)
  problems = _problems(config, model)
  if problems:
    raise ValueError(f"config.init: {config.init} does not suit this config: {'; '.join(problems)}")
  fresh = train_step.init_state(config, mesh)

  def put(ours: object, new: object) -> object:
    return jax.tree.map(  # through the host: not every backend sends to another host's devices
      lambda x, y: jax.device_put(np.asarray(x.astype(y.dtype)), y.sharding), ours, new
    )

  return dataclasses.replace(
    fresh,
    params=put(model.params, fresh.params),
    batch_stats=put(model.batch_stats, fresh.batch_stats),
  )


def as_saved(config: config_lib.Config, saved: dict[str, Any]) -> config_lib.Config:
  """`config` with the dtypes at rest of a checkpoint, to read it by; then `recast` its state.

  Args: saved, the config of the checkpoint, complete (`parsing.upgrade`).
  Raises: ValueError when it locked the image encoder and `config` does not, or the reverse.
  """
  theirs, ours = saved["optimizer"]["lock_image"], config.optimizer.lock_image
  if theirs != ours:
    raise ValueError(
      f"config.optimizer.lock_image was {theirs}, is {ours}: the checkpoint has moments of other "
      "parameters. Train in a new --workdir, with this one as config.init"
    )
  dtypes = {name: saved["optimizer"][name] for name in ("moments_dtype", "text_weights_dtype")}
  return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **dtypes))


def recast(
  state: train_step.TrainState, config: config_lib.Config, mesh: Mesh
) -> train_step.TrainState:
  """`state` in the dtypes of `config`: as it is, or rounded to nearest."""
  wanted = train_step.abstract_state(config, mesh)
  return jax.tree.map(lambda x, y: x if x.dtype == y.dtype else x.astype(y.dtype), state, wanted)


def vocabulary(config: config_lib.Config) -> tokenizer_lib.Tokenizer | None:
  """The vocabulary that the weights of `config.init` were trained with; None without weights.

  Of several hosts all must call: they agree on whether a checkpoint of ours can be read.
  """
  return sources.load(config.init).tokenizer if config.init else None


def _problems(config: config_lib.Config, model: inference.Clip) -> list[str]:
  found = _differences("config.model", model.config.model, config.model)
  for name in ("mean", "std"):
    theirs, ours = getattr(model.preprocess, name), getattr(config.preprocess, name)
    if theirs != ours:
      found.append(f"config.preprocess.{name} is {ours}, theirs is {theirs}")
  original = tokenizer_lib.original()
  if model.tokenizer is None:
    found.append("their vocabulary is not here, so captions cannot be turned into tokens")
  elif config.data.tokenizer == "original" and model.tokenizer != original:
    found.append("config.data.tokenizer is 'original', theirs is of their own ('train' takes it)")
  limit = config.optimizer.max_logit_scale
  if model.logit_scale > limit * (1 + 1e-4):  # rounding of its logarithm
    found.append(
      f"config.optimizer.max_logit_scale is {limit:g}, their logit scale is {model.logit_scale:.1f}"
    )
  return found


def _differences(where: str, theirs: object, ours: object) -> list[str]:
  """The fields in which two configs of a model differ, but for those that change no weight."""
  found = []
  for field in dataclasses.fields(ours):  # type: ignore[arg-type]
    a, b = getattr(theirs, field.name), getattr(ours, field.name)
    if dataclasses.is_dataclass(b):
      found += _differences(f"{where}.{field.name}", a, b)
    elif a != b and field.name not in _FREE:
      found.append(f"{where}.{field.name} is {b}, theirs is {a}")
  return found
