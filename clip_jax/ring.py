"""The losses in a ring: texts visit every device's images in turn, a chunk of them at a time.

One visit serves both directions: the tile of logits between a device's images and the visitors
adds to its images' statistics, which stay, and to the texts', which travel with them. So each
logit is computed once in the forward pass and once more in the backward pass, where the visitors
collect their gradient; two rings, one a direction, would compute each twice.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from clip_jax import sharding

_CHUNK = 1024  # texts at a time where the config does not say
_LOWEST = -1e30  # of logits that are none: finite, so that no inf - inf arises

Tile = Callable[..., tuple[Any, Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def softmax(
  mesh: Mesh,
  chunk: int,
  image_BE: jax.Array,
  text_BE: jax.Array,
  scale: jax.Array,
  ids_BW: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """`losses.contrastive`, its value and its gradient, with O(b chunk) memory on each device.

  Args: chunk, texts that meet a device's b images at a time (0: 1024; one that does not divide b
    leaves a smaller last one); image_BE, text_BE unit-norm float32; scale; ids_BW uint32, equal for
    the pairs of one caption.
  Returns: (loss, accuracy), float32 scalars. No gradient flows through the accuracy.
  Costs, on each of n devices with b = B / n pairs: memory, a few tiles of 4 b chunk bytes and twice
    the visitors, 4 b E bytes (backward three times). Network, n hops of 4 b (E + W + 2) bytes
    forward and of 4 b (2 E + W + 1) backward: 12 B E bytes and little more, where "gather" takes
    both sides and gives both gradients back. Time, 2 b B E FLOPs forward and 6 b B E backward, 2 of
    which compute the logits again; in float32 a TPU multiplies six times. The texts' hop is under
    way during the tiles, that of what they collect comes after. In seconds: `losses.sharded`.
  A hop leads to the next device in the mesh's order of data x fsdp, over one link, except at the
    end of a row (of fsdp, or of the slice): the next row's start is as many links away as the row
    is long, two where its ends are joined (16 of the 256 hops on a whole v5e:16x16), or on another
    slice. A hop is as fast as the slowest of the devices'.
  """
  return _softmax_forward(mesh, chunk, image_BE, text_BE, scale, ids_BW)[0]


def _softmax_forward(
  mesh: Mesh, chunk: int, image_BE: jax.Array, text_BE: jax.Array, scale: jax.Array, ids_BW: Any
) -> tuple[tuple[jax.Array, jax.Array], Any]:
  axes, rows, scalar = sharding.BATCH_AXES, P(sharding.BATCH_AXES), P()

  def local(image_bE: jax.Array, text_bE: jax.Array, scale: jax.Array, ids_bW: jax.Array) -> Any:
    b = image_bE.shape[0]

    def tile(own: Any, fixed: Any, moving: Any, first: jax.Array) -> tuple[Any, Any]:
      logits_bk, same_bk = _logits(image_bE, fixed, scale, ids_bW)
      rows, positives, best = own
      columns = _add_exp(moving, logits_bk, axis=0)
      positives = _add_positives(positives, logits_bk, same_bk)
      return (
        _add_exp(rows, logits_bk, axis=1),
        positives,
        _best(best, logits_bk, same_bk, first),
      ), columns

    zero_b = jnp.zeros(b)
    lowest_b = jnp.full(b, -jnp.inf)
    own = ((lowest_b, zero_b), (zero_b, zero_b), (lowest_b, zero_b.astype(jnp.int32), zero_b))
    visitors = _visitors(chunk, {"text": text_bE, "ids": ids_bW})
    empty = jax.tree.map(lambda x: _blocks(x, visitors["valid"].shape), (lowest_b, zero_b))
    (rows, (sum_b, count_b), best), columns = _travel(axes, tile, own, visitors, empty)
    row_lse_b = rows[0] + jnp.log(rows[1])
    column_lse_b = (columns[0] + jnp.log(columns[1])).reshape(-1)[:b]
    loss_b = (row_lse_b + column_lse_b) / 2 - sum_b / count_b
    means = jax.lax.pmean((loss_b.mean(), best[2].mean()), axes)
    return means, (row_lse_b, column_lse_b, count_b)

  mapped = _map(local, mesh, (rows, rows, scalar, rows), ((scalar, scalar), (rows, rows, rows)))
  out, statistics = mapped(image_BE, text_BE, scale, ids_BW)
  return out, (image_BE, text_BE, scale, ids_BW, statistics)


def _softmax_backward(mesh: Mesh, chunk: int, saved: Any, cotangents: Any) -> Any:
  axes, rows, scalar = sharding.BATCH_AXES, P(sharding.BATCH_AXES), P()
  image_BE, text_BE, scale, ids_BW, statistics = saved

  def local(
    image_bE: jax.Array, text_bE: jax.Array, scale: jax.Array, ids_bW: jax.Array, stats: Any, g: Any
  ) -> Any:
    row_lse_b, column_lse_b, count_b = stats

    def tile(own: Any, fixed: Any, moving: Any, _: jax.Array) -> tuple[Any, Any]:
      logits_bk, same_bk = _logits(image_bE, fixed, scale, ids_bW)
      by_row_bk = jnp.exp(logits_bk - row_lse_b[:, None])
      by_column_bk = jnp.exp(logits_bk - fixed["lse"][None])
      target_bk = jnp.where(same_bk, 2 / count_b[:, None], 0)
      d_bk = jnp.where(fixed["valid"][None], by_row_bk + by_column_bk - target_bk, 0)
      return _add_gradients(own, moving, d_bk, logits_bk, image_bE, fixed["text"])

    b = image_bE.shape[0]
    visitors = _visitors(chunk, {"text": text_bE, "ids": ids_bW, "lse": column_lse_b})
    own = (jnp.zeros_like(image_bE), jnp.zeros(()))
    own, moving = _travel(axes, tile, own, visitors, jnp.zeros_like(visitors["text"]))
    size = jax.lax.axis_size(axes)
    factor = g / (2 * b * size)  # the loss is a mean over B, of two halves
    d_text_bE = moving.reshape(-1, moving.shape[-1])[:b]
    d_scale = jax.lax.psum(own[1], axes) / scale
    return factor * scale * own[0], factor * scale * d_text_bE, factor * d_scale

  specs = (rows, rows, scalar, rows, (rows, rows, rows), scalar)
  mapped = _map(local, mesh, specs, (rows, rows, scalar))
  gradients = mapped(image_BE, text_BE, scale, ids_BW, statistics, cotangents[0])
  return (*gradients, None)


softmax.defvjp(_softmax_forward, _softmax_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sigmoid(
  mesh: Mesh,
  chunk: int,
  image_BE: jax.Array,
  text_BE: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  ids_BW: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """`losses.sigmoid`, its value and its gradient, with O(b chunk) memory on each device.

  Args, returns and costs: as `softmax`, but for the statistics, which need not travel: hops of
    4 b (E + W) bytes forward and of 4 b (2 E + W) backward.
  """
  return _sigmoid_forward(mesh, chunk, image_BE, text_BE, scale, bias, ids_BW)[0]


def _sigmoid_forward(
  mesh: Mesh,
  chunk: int,
  image_BE: jax.Array,
  text_BE: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  ids_BW: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
  axes, rows, scalar = sharding.BATCH_AXES, P(sharding.BATCH_AXES), P()

  def local(
    image_bE: jax.Array, text_bE: jax.Array, scale: jax.Array, bias: jax.Array, ids_bW: jax.Array
  ) -> Any:
    zero_b = jnp.zeros(image_bE.shape[0])

    def tile(own: Any, fixed: Any, moving: Any, first: jax.Array) -> tuple[Any, Any]:
      logits_bk, same_bk = _logits(image_bE, fixed, scale, ids_bW, bias)
      loss_bk = jax.nn.softplus(jnp.where(same_bk, -logits_bk, logits_bk))
      best = _best(own[1], logits_bk, same_bk, first)
      return (own[0] + jnp.where(fixed["valid"][None], loss_bk, 0).sum(1), best), moving

    best = (jnp.full_like(zero_b, -jnp.inf), zero_b.astype(jnp.int32), zero_b)
    visitors = _visitors(chunk, {"text": text_bE, "ids": ids_bW})
    (loss_b, best), _ = _travel(axes, tile, (zero_b, best), visitors, ())
    return jax.lax.pmean((loss_b.mean(), best[2].mean()), axes)

  mapped = _map(local, mesh, (rows, rows, scalar, scalar, rows), (scalar, scalar))
  out = mapped(image_BE, text_BE, scale, bias, ids_BW)
  return out, (image_BE, text_BE, scale, bias, ids_BW)


def _sigmoid_backward(mesh: Mesh, chunk: int, saved: Any, cotangents: Any) -> Any:
  axes, rows, scalar = sharding.BATCH_AXES, P(sharding.BATCH_AXES), P()

  def local(
    image_bE: jax.Array,
    text_bE: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    ids_bW: jax.Array,
    g: jax.Array,
  ) -> Any:
    def tile(own: Any, fixed: Any, moving: Any, _: jax.Array) -> tuple[Any, Any]:
      logits_bk, same_bk = _logits(image_bE, fixed, scale, ids_bW, bias)
      d_bk = jax.nn.sigmoid(logits_bk) - same_bk
      d_bk = jnp.where(fixed["valid"][None], d_bk, 0)
      (image, by_scale), moving = _add_gradients(
        own[:2], moving, d_bk, logits_bk - bias, image_bE, fixed["text"]
      )
      return (image, by_scale, own[2] + d_bk.sum()), moving

    b = image_bE.shape[0]
    visitors = _visitors(chunk, {"text": text_bE, "ids": ids_bW})
    own = (jnp.zeros_like(image_bE), jnp.zeros(()), jnp.zeros(()))
    own, moving = _travel(axes, tile, own, visitors, jnp.zeros_like(visitors["text"]))
    factor = g / (b * jax.lax.axis_size(axes))
    d_text_bE = moving.reshape(-1, moving.shape[-1])[:b]
    d_scale, d_bias = jax.lax.psum((own[1] / scale, own[2]), axes)
    return factor * scale * own[0], factor * scale * d_text_bE, factor * d_scale, factor * d_bias

  specs = (rows, rows, scalar, scalar, rows, scalar)
  mapped = _map(local, mesh, specs, (rows, rows, scalar, scalar))
  return (*mapped(*saved, cotangents[0]), None)


sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)


def similarity(a_bE: jax.Array, c_cE: jax.Array) -> jax.Array:
  """[b, c] products, float32 on every device."""
  return jnp.einsum("be,ce->bc", a_bE, c_cE, precision=jax.lax.Precision.HIGHEST)


def same(ids_bW: jax.Array, ids_cW: jax.Array) -> jax.Array:
  """bool [b, c]: which rows have equal ids."""
  words = range(ids_bW.shape[1])
  equal = [ids_bW[:, word][:, None] == ids_cW[:, word][None] for word in words]
  return functools.reduce(jnp.logical_and, equal)


def _travel(
  axes: tuple[str, ...], tile: Tile, own: Any, fixed: Any, moving: Any
) -> tuple[Any, Any]:
  """Every device's visitors meet every device, chunk by chunk, and come home.

  Args: tile, (own, a chunk of fixed, its moving, the global index of its first text) -> (own, its
    moving); fixed and moving [chunks, k, ...], of which `moving` is what visits change.
  """
  size, me = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
  ahead = [(i, (i + 1) % size) for i in range(size)]
  chunks, k = fixed["valid"].shape
  per_device = fixed.pop("rows")
  valid = fixed.pop("valid")

  def hop(state: Any, visits: jax.Array) -> tuple[Any, None]:
    own, fixed, moving = state
    following = jax.lax.ppermute(fixed, axes, ahead)  # under way while the tiles are computed
    home = (me - visits) % size

    def chunk(own: Any, part: Any) -> tuple[Any, Any]:
      index, is_valid, fixed, moving = part
      first = home * per_device + index * k
      return tile(own, {**fixed, "valid": is_valid}, moving, first)

    own, moving = jax.lax.scan(chunk, own, (jnp.arange(chunks), valid, fixed, moving))
    return (own, following, jax.lax.ppermute(moving, axes, ahead)), None

  (own, _, moving), _ = jax.lax.scan(hop, (own, fixed, moving), jnp.arange(size))
  return own, moving


def _visitors(chunk: int, arrays: dict[str, jax.Array]) -> dict[str, Any]:
  """[b, ...] -> [chunks, k, ...], the last chunk filled up; `valid` says which are real."""
  b = arrays["text"].shape[0]
  k = min(chunk or _CHUNK, b)
  shape = (-(-b // k), k)
  valid = (jnp.arange(shape[0] * k) < b).reshape(shape)
  return {**{name: _blocks(x, shape) for name, x in arrays.items()}, "valid": valid, "rows": b}


def _blocks(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
  pad = [(0, shape[0] * shape[1] - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
  return jnp.pad(x, pad).reshape(*shape, *x.shape[1:])


def _logits(
  image_bE: jax.Array, fixed: Any, scale: jax.Array, ids_bW: jax.Array, bias: Any = 0.0
) -> tuple[jax.Array, jax.Array]:
  """Logits [b, k] of a tile, and which of them are of a pair's own caption."""
  logits_bk = scale * similarity(image_bE, fixed["text"]) + bias
  logits_bk = jnp.where(fixed["valid"][None], logits_bk, _LOWEST)
  return logits_bk, same(ids_bW, fixed["ids"]) & fixed["valid"][None]


def _add_exp(state: tuple[jax.Array, jax.Array], logits_bk: jax.Array, axis: int) -> Any:
  """(running maximum, sum of exponentials relative to it), with another tile's."""
  maximum, total = state
  higher = jnp.maximum(maximum, logits_bk.max(axis))
  tile_total = jnp.exp(logits_bk - jnp.expand_dims(higher, axis)).sum(axis)
  return higher, total * jnp.exp(maximum - higher) + tile_total


def _add_positives(state: Any, logits_bk: jax.Array, same_bk: jax.Array) -> Any:
  return state[0] + jnp.where(same_bk, logits_bk, 0).sum(1), state[1] + same_bk.sum(1)


def _best(state: Any, logits_bk: jax.Array, same_bk: jax.Array, first: jax.Array) -> Any:
  """(highest logit, its text's index, 1 if that text is the row's own): the first of equals."""
  value, index, own = state
  column = logits_bk.argmax(1)
  tile_value, tile_index = logits_bk.max(1), first + column.astype(jnp.int32)
  tile_own = jnp.take_along_axis(same_bk, column[:, None], axis=1)[:, 0].astype(own.dtype)
  better = (tile_value > value) | ((tile_value == value) & (tile_index < index))
  pick = functools.partial(jnp.where, better)
  return pick(tile_value, value), pick(tile_index, index), pick(tile_own, own)


def _add_gradients(
  own: Any,
  d_text_kE: jax.Array,
  d_bk: jax.Array,
  scaled_bk: jax.Array,
  image_bE: jax.Array,
  text_kE: jax.Array,
) -> tuple[Any, jax.Array]:
  """By the cosines' logits d_bk: to images (stays), scale times the logits, texts (travels)."""
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  image = own[0] + product("bk,ke->be", d_bk, text_kE)
  by_scale = own[1] + (d_bk * scaled_bk).sum()
  return (image, by_scale), d_text_kE + product("bk,be->ke", d_bk, image_bE)


def _map(
  local: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
  """Gradients are written out above, so nothing asks which values vary between devices."""
  return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
