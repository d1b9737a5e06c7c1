"""The losses: symmetric cross-entropy over the global batch (Figure 3), and SigLIP's sigmoid loss.

`contrastive` and `sigmoid` are the plain oracles. `sharded` has their values and gradients on a
mesh: here by gathering embeddings, or by the ring in `ring.py`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clip_jax import config as config_lib
from clip_jax import ring, sharding

_NO_SPREAD = 1e-6  # squared variance about the mean, of a whole of 1


def contrastive(
  image_BE: jax.Array, text_BE: jax.Array, scale: jax.Array, tokens_BL: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Symmetric cross-entropy of matched pairs.

  Args: image_BE, text_BE unit-norm float32; scale, the multiplicative logit scale; tokens_BL, the
    captions where identical ones count as positives: a row's target is then uniform over them.
  Returns: (loss, accuracy), float32 scalars; accuracy is the share of images for which a text of
    their own caption is the likeliest of the batch.
  Costs: 2 B^2 E multiply-adds and B^2 float32 logits. Source: Figure 3.
  """
  logits_BB = scale * ring.similarity(image_BE, text_BE)
  same_BB = _same(image_BE.shape[0], tokens_BL)
  loss_B = _cross_entropy(logits_BB, same_BB) + _cross_entropy(logits_BB.T, same_BB)
  return loss_B.mean() / 2, _accuracy(logits_BB, same_BB)


def sigmoid(
  image_BE: jax.Array,
  text_BE: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  tokens_BL: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Each of the B^2 pairs judged by itself as matched or not; summed, then divided by B.

  Args: as `contrastive`'s, with scale and bias of logits = scale * cosine + bias; pairs of
    identical captions are matched where tokens_BL is given.
  Returns: (loss, accuracy), as `contrastive` does.
  Costs: B^2 E multiply-adds and B^2 float32 logits. Source: arXiv 2303.15343, section 3.2.
  """
  logits_BB = scale * ring.similarity(image_BE, text_BE) + bias
  same_BB = _same(image_BE.shape[0], tokens_BL)
  return _pair_losses(logits_BB, same_BB).mean(), _accuracy(logits_BB, same_BB)


def sharded(
  config: config_lib.Loss,
  mesh: Mesh,
  image_BE: jax.Array,
  text_BE: jax.Array,
  scale: jax.Array,
  bias: jax.Array | None,
  tokens_BL: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """`contrastive`, or with a bias `sigmoid`, of embeddings whose rows lie over the devices.

  Captions are compared by `caption_ids`. `config.exchange` chooses how texts meet images:
  "gather": every device gathers both sides (sigmoid: the texts alone) and computes its b = B / n
    rows of the logits (softmax twice: its images against all texts, its texts against all images).
    The gradient of the gather is a reduce-scatter, so no negatives and no gradients are lost.
  "ring": see `ring.softmax`.
  Costs of "gather" a device, forward and backward (sigmoid: half of each): memory, some 12 B E
    bytes of embeddings and their gradients and 8 b B of logits. Network, 8 B E bytes gathered and
    8 B E scattered back (16 where libtpu makes an all-reduce of that, as on v5e). Time, 12 b B E
    FLOPs, in float32, for which a TPU multiplies six times.
  By arithmetic from the peaks in `chips.py`, softmax, E = 512, 256 v5e chips, no latency: 32,768
    pairs, gather 0.8 ms of products and 2.0 of network, ring 0.5 and 4.0, as it uses one of four
    links; 1,048,576 pairs, gather does not fit, ring 540 and 130.
  """
  if config.identical_captions == "positives":
    ids_BW = caption_ids(tokens_BL)
  else:
    ids_BW = jnp.arange(image_BE.shape[0], dtype=jnp.uint32)[:, None]
  if config.exchange == "ring":
    if bias is None:
      return ring.softmax(mesh, config.chunk, image_BE, text_BE, scale, ids_BW)
    return ring.sigmoid(mesh, config.chunk, image_BE, text_BE, scale, bias, ids_BW)
  rows, scalar, axes = P(sharding.BATCH_AXES), P(), sharding.BATCH_AXES
  head = (scale,) if bias is None else (scale, bias)
  mapped = jax.shard_map(
    functools.partial(_local_contrastive if bias is None else _local_sigmoid, axes),
    mesh=mesh,
    in_specs=(rows, rows, rows, *(scalar for _ in head)),
    out_specs=(scalar, scalar),
  )
  return mapped(image_BE, text_BE, ids_BW, *head)


def effective_rank(x_BE: jax.Array) -> jax.Array:
  """Over how many directions unit-norm embeddings spread about their mean; float32, 0 to E.

  (sum of v)^2 / sum of v^2 over the eigenvalues v of their covariance: E where all are equal, 1
  where all but one are zero. Below 1 all embeddings are nearly the same. No gradient.
  Costs: 2 B E^2 FLOPs, and E^2 float32 summed over the devices.
  Source: the participation ratio; Gao et al. 2017, doi 10.1101/214262.
  """
  x_BE = jax.lax.stop_gradient(x_BE)
  centred_BE = x_BE - x_BE.mean(axis=0, keepdims=True)
  covariance_EE = centred_BE.T @ centred_BE / x_BE.shape[0]
  return jnp.trace(covariance_EE) ** 2 / (jnp.sum(covariance_EE**2) + _NO_SPREAD)


def caption_ids(tokens_BL: jax.Array) -> jax.Array:
  """Two independent 32-bit hashes of each row of tokens, uint32 [B, 2].

  Equal rows have equal ids. In a batch of 1,048,576 different captions the odds that any two of
  them share an id are 3e-8 (2^39 pairs over 2^64).
  """
  position_L = jnp.arange(tokens_BL.shape[1], dtype=jnp.uint32)
  words_BL = tokens_BL.astype(jnp.uint32) * 128 + position_L[None]  # 77 positions
  sums = [_mixed(words_BL, seed).sum(1, dtype=jnp.uint32) for seed in (0x9E3779B9, 0x85EBCA6B)]
  return jnp.stack(sums, axis=1)


def _mixed(x: jax.Array, seed: int) -> jax.Array:
  """Every bit of the result depends on every bit of x: MurmurHash3's finaliser, twice."""
  x = x ^ jnp.uint32(seed)
  for _ in range(2):
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    x = (x ^ (x >> 16)) + jnp.uint32(seed)
  return x


def _local_contrastive(
  axes: tuple[str, ...],
  image_bE: jax.Array,
  text_bE: jax.Array,
  ids_bW: jax.Array,
  scale: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """This device's rows of both logit matrices, averaged over all devices."""
  image_BE = jax.lax.all_gather(image_bE, axes, tiled=True)
  text_BE = jax.lax.all_gather(text_bE, axes, tiled=True)
  same_bB = ring.same(ids_bW, jax.lax.all_gather(ids_bW, axes, tiled=True))
  image_logits_bB = scale * ring.similarity(image_bE, text_BE)
  text_logits_bB = scale * ring.similarity(text_bE, image_BE)
  loss_b = _cross_entropy(image_logits_bB, same_bB) + _cross_entropy(text_logits_bB, same_bB)
  accuracy = _accuracy(image_logits_bB, same_bB)
  return jax.lax.pmean(loss_b.mean() / 2, axes), jax.lax.pmean(accuracy, axes)


def _local_sigmoid(
  axes: tuple[str, ...],
  image_bE: jax.Array,
  text_bE: jax.Array,
  ids_bW: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """This device's images against all texts, averaged over all devices."""
  text_BE = jax.lax.all_gather(text_bE, axes, tiled=True)
  same_bB = ring.same(ids_bW, jax.lax.all_gather(ids_bW, axes, tiled=True))
  logits_bB = scale * ring.similarity(image_bE, text_BE) + bias
  loss = _pair_losses(logits_bB, same_bB).mean()
  accuracy = _accuracy(logits_bB, same_bB)
  return jax.lax.pmean(loss, axes), jax.lax.pmean(accuracy, axes)


def _same(rows: int, tokens_BL: jax.Array | None) -> jax.Array:
  """bool [B, B]: which texts are a row's own."""
  if tokens_BL is None:
    return jnp.eye(rows, dtype=bool)
  return (tokens_BL[:, None] == tokens_BL[None]).all(-1)


def _cross_entropy(logits_bB: jax.Array, same_bB: jax.Array) -> jax.Array:
  """[b]: against a target that is uniform over `same_bB`."""
  own_b = jnp.where(same_bB, logits_bB, 0).sum(-1) / same_bB.sum(-1)
  return jax.nn.logsumexp(logits_bB, axis=-1) - own_b


def _pair_losses(logits_bB: jax.Array, same_bB: jax.Array) -> jax.Array:
  """[b]: each row's sum of -log sigmoid(z * logit), z = 1 where the pair matches, else -1."""
  return -jax.nn.log_sigmoid(jnp.where(same_bB, logits_bB, -logits_bB)).sum(-1)


def _accuracy(logits_bB: jax.Array, same_bB: jax.Array) -> jax.Array:
  return jnp.take_along_axis(same_bB, logits_bB.argmax(-1)[:, None], axis=1).mean()
