"""The contrastive loss: symmetric cross-entropy over the global batch (Figure 3).

`contrastive` is the plain oracle; `sharded_contrastive` has its value and gradient on a mesh.
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


def _similarity(a_BE: jax.Array, b_CE: jax.Array) -> jax.Array:
  return jnp.einsum("be,ce->bc", a_BE, b_CE, precision=jax.lax.Precision.HIGHEST)


_cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
