"""The loss of a global batch and its gradient, in one pass or exactly in microbatches."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clip_jax import config as config_lib
from clip_jax import losses, optimizer, sharding
from clip_jax.data import images
from clip_jax.models import vit
from clip_jax.models.clip import CLIP, compute_dtype


class Figures(NamedTuple):
  """What the embeddings of a batch say beside the loss: float32 scalars."""

  accuracy: jax.Array
  scale: jax.Array
  image_rank: jax.Array  # see `losses.effective_rank`
  text_rank: jax.Array
  not_finite_pairs: jax.Array  # of which an embedding has a NaN or an infinity
  first_not_finite_pair: jax.Array  # its row of the global batch, or -1


class Forward(NamedTuple):
  """What a batch gives beside its gradient."""

  loss: jax.Array
  figures: Figures
  batch_stats: Any


def loss_and_gradients(
  config: config_lib.Config,
  mesh: Mesh,
  params: Any,
  batch_stats: Any,
  batch: dict[str, jax.Array],
  rng: jax.Array,
) -> tuple[Forward, Any]:
  """The loss over all B pairs and its gradient by the trained ones of `params`.

  A locked image encoder (`lock_image`) runs forward only, as in evaluation: a ResNet normalises by
  its running statistics, which stay.
  Args: params, float32, and so is the gradient; batch, `image` uint8 [B, R, R, 3] and `tokens`
    int32 [B, L]; rng, of this step: chooses the patches that `patch_dropout` leaves out, for the
    whole batch, so microbatches change nothing.
  With `config.microbatches` over 1 the encoders run over one part of the batch at a time, first for
  the embeddings alone, then, when the loss over all of them has given each embedding its gradient,
  once more with their backward pass: 4/3 of the FLOPs, activations of one part, B E float32 for
  each side's embeddings and again for their gradients.
  Source: Gao et al. 2021, arXiv 2101.06983; Pham et al. 2021, arXiv 2111.10050, section 4.
  """
  inputs = {"image": batch["image"], "tokens": batch["tokens"]}
  if config.model.image.patch_dropout:
    kept = vit.kept_patches(config.model.image)
    inputs["kept"] = _choose(rng, batch["image"].shape[0], *kept)

  def encode(trained: Any, inputs: Any) -> Any:
    return _encode(config, mesh, batch_stats, {**params, **trained}, inputs)

  trained = optimizer.trained(config.optimizer, params)
  head = functools.partial(_loss, config, mesh, batch["tokens"])
  own = {name: params[name] for name in ("log_scale", "logit_bias") if name in params}
  if config.microbatches == 1:

    def loss_of(trained: Any) -> tuple[jax.Array, Forward]:
      (image_BE, text_BE), changed = encode(trained, inputs)
      loss, figures = head(image_BE, text_BE, trained)
      return loss, Forward(loss, figures, changed)

    (_, forward), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
    return forward, gradients

  parts = {name: _split(mesh, config.microbatches, x) for name, x in inputs.items()}
  embeddings = jax.lax.map(lambda part: encode(trained, part)[0], parts)
  image_BE, text_BE = (_join(mesh, x) for x in embeddings)
  head_gradient = jax.value_and_grad(head, argnums=(0, 1, 2), has_aux=True)
  (loss, figures), (*by_embedding, by_own) = head_gradient(image_BE, text_BE, own)
  by_embedding_parts = tuple(_split(mesh, config.microbatches, x) for x in by_embedding)

  def add(total: Any, part: Any) -> tuple[Any, None]:
    inputs, by_embedding = part
    _, backward, _ = jax.vjp(lambda trained: encode(trained, inputs), trained, has_aux=True)
    return jax.tree.map(jnp.add, total, backward(by_embedding)[0]), None

  zeros = jax.tree.map(jnp.zeros_like, trained)
  gradients, _ = jax.lax.scan(add, zeros, (parts, by_embedding_parts))
  return Forward(loss, figures, batch_stats), {**gradients, **by_own}


def _encode(
  config: config_lib.Config, mesh: Mesh, batch_stats: Any, params: Any, inputs: dict[str, jax.Array]
) -> tuple[tuple[jax.Array, jax.Array], Any]:
  """((image_BE, text_BE), running statistics) of some rows."""
  platform = mesh.devices.flat[0].platform
  dtype: Any = compute_dtype(config.model, platform).name
  model = dataclasses.replace(config.model, compute_dtype=dtype)
  image_BRR3 = images.normalise(inputs["image"], config.preprocess.mean, config.preprocess.std)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    (image_BE, text_BE, _), changed = CLIP(model).apply(
      {"params": params, "batch_stats": batch_stats},
      image_BRR3,
      inputs["tokens"],
      train=not config.optimizer.lock_image,  # which concerns the image encoder alone
      kept_BK=inputs.get("kept"),
      mutable=["batch_stats"],
    )
  return (image_BE, text_BE), changed.get("batch_stats", {})


def _loss(
  config: config_lib.Config,
  mesh: Mesh,
  tokens_BL: jax.Array,
  image_BE: jax.Array,
  text_BE: jax.Array,
  params: Any,
) -> tuple[jax.Array, Figures]:
  """The loss and its figures, from embeddings, log_scale and logit_bias."""
  scale, bias = jnp.exp(params["log_scale"]), params.get("logit_bias")
  loss, accuracy = losses.sharded(config.loss, mesh, image_BE, text_BE, scale, bias, tokens_BL)
  image_rank, text_rank = map(losses.effective_rank, (image_BE, text_BE))
  bad_B = ~jnp.isfinite(image_BE.sum(1) + text_BE.sum(1))
  first = jnp.where(bad_B.any(), jnp.argmax(bad_B), -1)
  bad, first = (x.astype(jnp.float32) for x in (bad_B.sum(), first))
  return loss, Figures(accuracy, scale, image_rank, text_rank, bad, first)


def _choose(rng: jax.Array, rows: int, kept: int, patches: int) -> jax.Array:
  """int32 [B, K]: for each row, which K of its patches stay; every choice is as likely."""
  noise_BS = jax.random.uniform(rng, (rows, patches))
  return jnp.argsort(noise_BS, axis=1)[:, :kept]


def _split(mesh: Mesh, parts: int, x: jax.Array) -> jax.Array:
  """[B, ...] -> [parts, B / parts, ...]: every device cuts its own rows, nothing travels."""
  cut = jax.shard_map(
    lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]),
    mesh=mesh,
    in_specs=P(sharding.BATCH_AXES),
    out_specs=P(None, sharding.BATCH_AXES),
  )
  return cut(x)


def _join(mesh: Mesh, x: jax.Array) -> jax.Array:
  """The inverse of `_split`."""
  put = jax.shard_map(
    lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]),
    mesh=mesh,
    in_specs=P(None, sharding.BATCH_AXES),
    out_specs=P(sharding.BATCH_AXES),
  )
  return put(x)
