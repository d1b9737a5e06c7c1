"""The losses: symmetric cross-entropy over the global batch (Figure 3), and SigLIP's sigmoid loss.

`contrastive` and `sigmoid` are the plain oracles; `sharded_contrastive` and `sharded_sigmoid`
have their values and gradients on a mesh.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clip_jax import sharding


def contrastive(
  image_BE: jax.Array, text_BE: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Symmetric cross-entropy of matched pairs.

  Args: image_BE, text_BE unit-norm float32; scale, the multiplicative logit scale.
  Returns: (loss, accuracy), float32 scalars; accuracy is the share of images whose own text is
    the likeliest of the batch.
  Costs: 2 B^2 E multiply-adds and B^2 float32 logits. Source: Figure 3.
  """
  logits_BB = scale * _similarity(image_BE, text_BE)
  own_B = jnp.arange(logits_BB.shape[0])
  loss_B = _cross_entropy(logits_BB, own_B) + _cross_entropy(logits_BB.T, own_B)
  return loss_B.mean() / 2, (logits_BB.argmax(-1) == own_B).mean()


def sharded_contrastive(
  mesh: Mesh, image_BE: jax.Array, text_BE: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """`contrastive` with each device computing its own rows of the logits only.

  Every device gathers the other side's embeddings: B E float32 each way over the network, and
  2 b B float32 logits in memory instead of B^2. The gradient of the gather is a reduce-scatter,
  so no negatives and no gradients are lost.
  """
  rows, scalar = P(sharding.BATCH_AXES), P()
  local = functools.partial(_local_contrastive, sharding.BATCH_AXES)
  mapped = jax.shard_map(
    local, mesh=mesh, in_specs=(rows, rows, scalar), out_specs=(scalar, scalar)
  )
  return mapped(image_BE, text_BE, scale)


def _local_contrastive(
  axes: tuple[str, ...], image_bE: jax.Array, text_bE: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """This device's rows of both logit matrices, averaged over all devices."""
  image_BE = jax.lax.all_gather(image_bE, axes, tiled=True)
  text_BE = jax.lax.all_gather(text_bE, axes, tiled=True)
  local = image_bE.shape[0]
  own_b = jax.lax.axis_index(axes) * local + jnp.arange(local)
  image_logits_bB = scale * _similarity(image_bE, text_BE)
  text_logits_bB = scale * _similarity(text_bE, image_BE)
  loss_b = _cross_entropy(image_logits_bB, own_b) + _cross_entropy(text_logits_bB, own_b)
  accuracy = (image_logits_bB.argmax(-1) == own_b).mean()
  return jax.lax.pmean(loss_b.mean() / 2, axes), jax.lax.pmean(accuracy, axes)


def sigmoid(
  image_BE: jax.Array, text_BE: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Each of the B^2 pairs judged by itself as matched or not; summed, then divided by B.

  Args: image_BE, text_BE unit-norm float32; scale and bias, of logits = scale * cosine + bias.
  Returns: (loss, accuracy), as `contrastive` does.
  Costs: B^2 E multiply-adds and B^2 float32 logits. Source: arXiv 2303.15343, section 3.2.
  """
  logits_BB = scale * _similarity(image_BE, text_BE) + bias
  own_B = jnp.arange(logits_BB.shape[0])
  return _pair_losses(logits_BB, own_B).mean(), (logits_BB.argmax(-1) == own_B).mean()


def sharded_sigmoid(
  mesh: Mesh, image_BE: jax.Array, text_BE: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """`sigmoid` with each device computing its own rows of the logits only.

  Every device gathers the texts alone: B E float32 over the network, b B float32 logits in memory.
  """
  rows, scalar = P(sharding.BATCH_AXES), P()
  local = functools.partial(_local_sigmoid, sharding.BATCH_AXES)
  mapped = jax.shard_map(
    local, mesh=mesh, in_specs=(rows, rows, scalar, scalar), out_specs=(scalar, scalar)
  )
  return mapped(image_BE, text_BE, scale, bias)


def _local_sigmoid(
  axes: tuple[str, ...],
  image_bE: jax.Array,
  text_bE: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """This device's images against all texts, averaged over all devices."""
  text_BE = jax.lax.all_gather(text_bE, axes, tiled=True)
  local = image_bE.shape[0]
  own_b = jax.lax.axis_index(axes) * local + jnp.arange(local)
  logits_bB = scale * _similarity(image_bE, text_BE) + bias
  accuracy = (logits_bB.argmax(-1) == own_b).mean()
  return (
    jax.lax.pmean(_pair_losses(logits_bB, own_b).mean(), axes),
    jax.lax.pmean(accuracy, axes),
  )


def _pair_losses(logits_bB: jax.Array, own_b: jax.Array) -> jax.Array:
  """[b]: each row's sum of -log sigmoid(z * logit), z = 1 in its own column and -1 elsewhere."""
  sign_bB = 2 * jax.nn.one_hot(own_b, logits_bB.shape[1]) - 1
  return -jax.nn.log_sigmoid(sign_bB * logits_bB).sum(-1)


def _similarity(a_BE: jax.Array, b_CE: jax.Array) -> jax.Array:
  return jnp.einsum("be,ce->bc", a_BE, b_CE, precision=jax.lax.Precision.HIGHEST)


_cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
