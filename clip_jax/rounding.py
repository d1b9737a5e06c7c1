"""Float32 to bfloat16 so that nothing is lost on average: stochastic rounding.

A bfloat16 number has 8 bits of precision, so an update under 1/512 of a weight vanishes whenever
it is rounded to nearest. Rounded up or down with the right odds it arrives on average.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

_LOW = 0xFFFF  # the bits that a float32 has and a bfloat16 has not


def stochastic(x: jax.Array, key: jax.Array) -> jax.Array:
  """float32 -> bfloat16, one of the two neighbours, its mean over keys exactly `x`.

  A number that bfloat16 holds stays; so do infinities, NaN and the sign of a zero. What lies past
  the largest finite bfloat16 (3.39e38) is rounded to nearest, as a cast does.
  Cost: 16 random bits are added below the last bit that stays, and the rest is cut off. They come
  from one block of Threefry a value (some 130 operations, no memory: tools/bench/update.py), which
  gives 32 bits: `stochastic_pair` uses both halves. With `jax_threefry_partitionable`, JAX's
  default, an element's bits depend on the key and its index alone, on whatever mesh it lies.
  Source: Gupta et al. 2015, arXiv 1502.02551; for weights, section 2.5 of arXiv 2103.00020.
  """
  return _rounded(x, jax.random.bits(key, x.shape, jnp.uint32) & _LOW)


def stochastic_pair(x: jax.Array, y: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`stochastic` of two arrays of one shape, independently, for the random bits of one."""
  bits = jax.random.bits(key, x.shape, jnp.uint32)
  return _rounded(x, bits & _LOW), _rounded(y, bits >> 16)


def _rounded(x: jax.Array, noise: jax.Array) -> jax.Array:
  """Args: noise, uint32 in [0, 2^16), of the shape of `x`."""
  up_or_down = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
  cut = jax.lax.bitcast_convert_type(up_or_down & jnp.uint32(0xFFFF0000), jnp.float32)
  within = jnp.abs(x) <= float(jnp.finfo(jnp.bfloat16).max)
  return jnp.where(within, cut, x).astype(jnp.bfloat16)


def path_key(key: jax.Array, path: tuple[Any, ...]) -> jax.Array:
  """A key of a leaf's own, from its path in a tree: whatever else is in the tree."""
  name = jax.tree_util.keystr(path, simple=True, separator="/")
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def widened(tree: Any) -> Any:
  """Every bfloat16 leaf as float32, which is exact; the others as they are."""
  return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)
