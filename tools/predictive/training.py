"""The predictive objectives' loss, state and step, on any mesh, beside `clip_jax.train_step`.

They are a study, not a way to train CLIP: what has no second embedding has no logit scale, no
exchange of embeddings, no microbatches, no export and no retrieval. So they stay out of the
training path, and share with it the image encoder, the batches, the mesh and the optimizer.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from clip_jax import config as config_lib
from clip_jax import optimizer, sharding
from clip_jax.data import images
from tools.predictive import heads

_WEIGHTS = 0  # as in clip_jax.train_step: the encoder starts from the same weights


class StudyError(ValueError):
  """A study that would not compare like with like, or cannot go on: which setting, and why."""


@struct.dataclass
class State:
  """All that a step changes."""

  step: jax.Array
  params: Any
  batch_stats: Any  # of a ResNet; otherwise empty
  opt_state: Any


def checked_task(config: config_lib.Config) -> config_lib.Task:
  """The one zero-shot task, whose accuracy the figure shows; retrievals are passed over.

  Raises: StudyError naming every setting that one of the three objectives would not follow.
  """
  shown = [task for task in config.evaluation.tasks if task.kind == "zero_shot"]
  only = {
    "init": (config.init, "", "all start from random weights"),
    "microbatches": (config.microbatches, 1, "a predictive step has one part"),
    "loss.exchange": (config.loss.exchange, "gather", "predicting exchanges no embeddings"),
    "model.loss": (config.model.loss, "softmax", "the paper's contrastive loss is compared"),
    "model.image.patch_dropout": (
      config.model.image.patch_dropout,
      0.0,
      "the predictive steps leave out no patches",
    ),
    "model.text.pooling": (config.model.text.pooling, "end", "captions are read forwards"),
    "optimizer.lock_image": (config.optimizer.lock_image, False, "all train the image encoder"),
    "optimizer.moments_dtype": (config.optimizer.moments_dtype, "float32", "no rounding here"),
    "optimizer.text_weights_dtype": (
      config.optimizer.text_weights_dtype,
      "float32",
      "no rounding here",
    ),
    "optimizer.skip_spike_sigma": (
      config.optimizer.skip_spike_sigma,
      0.0,
      "the predictive steps skip nothing",
    ),
  }
  found = [
    f"config.{name}: {value!r}; the study takes {wanted!r} only ({why})"
    for name, (value, wanted, why) in only.items()
    if value != wanted
  ]
  if len(shown) != 1:
    found.append(f"config.evaluation.tasks: {len(shown)} are zero-shot; the figure shows one")
  if found:
    raise StudyError("; ".join(found))
  return shown[0]


def loss(logp_BL: jax.Array, counted_BL: jax.Array) -> jax.Array:
  """The mean over captions of the mean of -logp over what is predicted of each; a scalar.

  So a caption weighs the same whatever its length, and one of which nothing is predicted adds 0.
  For a bag of k words it is the cross-entropy against a target of 1 / k for each of them.
  """
  total_B = jnp.where(counted_BL, logp_BL, 0).sum(-1)
  return -(total_B / jnp.maximum(counted_BL.sum(-1), 1)).mean()


def init_state(config: config_lib.Config, prediction: heads.Prediction, mesh: Mesh) -> State:
  """The state before the first step, the same for any number of devices."""
  make = functools.partial(_init, config, prediction)
  return jax.jit(make, out_shardings=_shardings(config, prediction, mesh))()


def _init(config: config_lib.Config, prediction: heads.Prediction) -> State:
  rng = jax.random.fold_in(jax.random.key(config.seed), _WEIGHTS)
  variables = heads.initial(config.model, prediction, rng)
  opt_state = optimizer.make(config.optimizer, config.steps).init(variables["params"])
  step = jnp.zeros((), jnp.int32)
  return State(step, variables["params"], variables.get("batch_stats", {}), opt_state)


def _shardings(config: config_lib.Config, prediction: heads.Prediction, mesh: Mesh) -> Any:
  shapes = jax.eval_shape(functools.partial(_init, config, prediction))
  return jax.tree.map(lambda x: x.sharding, sharding.place(shapes, mesh))


def make_step(
  config: config_lib.Config, prediction: heads.Prediction, mesh: Mesh
) -> jax.stages.Wrapped:
  """The jitted step: (state, batch) -> (state, {"loss"}); the state passed in is donated.

  The batch holds `image` uint8 [B, R, R, 3] and `tokens` int32 [B, L], sharded by rows; other
  entries are not looked at.
  """
  whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  state = _shardings(config, prediction, mesh)
  step = functools.partial(_step, config, prediction, mesh)
  return jax.jit(step, in_shardings=(state, rows), out_shardings=(state, whole), donate_argnums=0)


def _step(
  config: config_lib.Config,
  prediction: heads.Prediction,
  mesh: Mesh,
  state: State,
  batch: dict[str, jax.Array],
) -> tuple[State, dict[str, jax.Array]]:
  image_BRR3 = images.normalise(batch["image"], config.preprocess.mean, config.preprocess.std)

  def loss_of(params: Any) -> tuple[jax.Array, Any]:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      scores, changed = heads.Predictive(config.model, prediction).apply(
        {"params": params, "batch_stats": state.batch_stats},
        image_BRR3,
        batch["tokens"],
        train=True,
        mutable=["batch_stats"],
      )
    return loss(*scores), changed.get("batch_stats", {})

  (value, batch_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
  updates, opt_state = optimizer.make(config.optimizer, config.steps).update(
    gradients, state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  return State(state.step + 1, params, batch_stats, opt_state), {"loss": value}
