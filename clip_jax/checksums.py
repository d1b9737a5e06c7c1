"""Checksums of arrays: the same on any mesh and in any number of processes."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax import hosts


def of_leaves(tree: Any) -> dict[str, list[Any]]:
  """Each leaf's [shape, dtype, checksum]; the same on any mesh and in any number of processes."""
  leaves = [(name, jnp.asarray(leaf)) for name, leaf in named(tree)]
  parts = jax.device_get([_checksums_here(leaf) for _, leaf in leaves])
  sums = np.array([sum(map(int, part)) % 2**32 for part in parts], np.uint32)
  spread = np.array([not leaf.is_fully_addressable for _, leaf in leaves], bool)
  if spread.any():
    sums = np.where(spread, hosts.sum_over_hosts(np.where(spread, sums, 0)), sums)
  return {
    name: [list(leaf.shape), str(leaf.dtype), int(checksum) % 2**32]
    for (name, leaf), checksum in zip(leaves, sums, strict=True)
  }


def named(tree: Any) -> list[tuple[str, Any]]:
  """The leaves with their paths: "params/text/bias"."""
  paths = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in paths]


def _checksums_here(leaf: jax.Array) -> list[jax.Array]:
  """Checksums of the parts of a leaf that are this process's to count; they add up to its own."""
  parts = []
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      start = jnp.array([axis.start or 0 for axis in shard.index], jnp.uint32)
      parts.append(_checksum(leaf.shape, shard.data, start))
  return parts


@functools.partial(jax.jit, static_argnums=0)
def _checksum(shape: tuple[int, ...], part: jax.Array, start: jax.Array) -> jax.Array:
  """A uint32 that any single changed element changes, of the part at `start` of a whole `shape`.

  Each element's bits are multiplied by an odd number that depends on its position; a change of
  one element by d != 0 moves the sum by d times an odd number, which is not 0 modulo 2^32.
  """
  strides = [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))]
  first = sum((start[i] * jnp.uint32(stride) for i, stride in enumerate(strides)), jnp.uint32(0))
  if part.ndim < 3:
    return _part_checksum(part, strides, first)

  # layer by layer, as XLA on a CPU holds a leaf's products in memory
  def add(layer: jax.Array, total: jax.Array) -> jax.Array:
    rows = jax.lax.dynamic_index_in_dim(part, layer, keepdims=False)
    place = first + layer.astype(jnp.uint32) * jnp.uint32(strides[0])
    return total + _part_checksum(rows, strides[1:], place)

  return jax.lax.fori_loop(0, part.shape[0], add, jnp.uint32(0))


def _part_checksum(array: jax.Array, strides: list[int], first: jax.Array) -> jax.Array:
  """Of elements whose positions are `first` and so many `strides` further."""
  unsigned = jnp.dtype(f"uint{array.dtype.itemsize * 8}")
  bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
  index = jnp.full(array.shape, first)
  for axis, stride in enumerate(strides):
    index += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride)
  weight = (index * jnp.uint32(2654435761)) | jnp.uint32(1)
  return jnp.sum(bits * weight, dtype=jnp.uint32)
