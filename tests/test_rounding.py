"""Stochastic rounding against exact arithmetic in numpy: the two neighbours, and how often each."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from clip_jax import config as c
from clip_jax import rounding, sharding

_round = jax.jit(rounding.stochastic)
_LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)


def _neighbours(x):
  """float64 of the bfloat16 numbers at or next to finite `x`, the smaller magnitude first."""
  down = x.view(np.uint32) & np.uint32(0xFFFF0000)
  exact = down == x.view(np.uint32)
  up = np.where(exact, down, down + np.uint32(0x10000))
  return down.view(np.float32).astype(np.float64), up.view(np.float32).astype(np.float64)


def _numbers(count, seed=0):
  """Of all magnitudes and both signs."""
  rng = np.random.default_rng(seed)
  bits = rng.integers(0, 2**32, count, dtype=np.uint32)
  x = bits.view(np.float32)
  return np.where(np.abs(x) <= _LARGEST, x, np.float32(1.1))


def test_the_result_is_a_neighbour_with_the_right_odds():
  """256 numbers, each 20,000 times; the mean within 5 standard errors of the number itself."""
  x, repeats = _numbers(256), 20_000
  down, up = _neighbours(x)
  got = np.asarray(_round(np.broadcast_to(x, (repeats, 256)), jax.random.key(1)))
  assert got.dtype == ml_dtypes.bfloat16
  got = got.astype(np.float64)
  assert ((got == down) | (got == up)).all()
  step = np.where(up == down, 1.0, up - down)
  share = (x.astype(np.float64) - down) / step
  seen = ((got - down) / step).mean(0)
  error = np.sqrt(share * (1 - share) / repeats) + 1e-12
  assert (np.abs(seen - share) < 5 * error).all()
  assert (share > 0.01).sum() > 200  # it was rounding that was tested


@pytest.mark.parametrize("low", [0, 1, 2, 32767, 32768, 65535])
def test_every_noise_counts_the_same(low):
  """Over all 2^16 noises the number is rounded up exactly as often as its low bits say."""
  x = np.full(2**16, np.uint32(0x3F9A0000 | low)).view(np.float32)
  got = np.asarray(rounding._rounded(jnp.asarray(x), jnp.arange(2**16, dtype=jnp.uint32)))
  up = (got.astype(np.float32) > np.uint32(0x3F9A0000).view(np.float32)).sum()
  assert up == low


@settings(deadline=None)  # the first call compiles
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1))
def test_bits_by_integer_arithmetic(bits, noise):
  x = np.array([bits], np.uint32).view(np.float32)
  got = np.asarray(rounding._rounded(jnp.asarray(x), jnp.array([noise], jnp.uint32)))
  if np.isnan(x[0]):
    assert np.isnan(got[0])
  elif np.abs(x[0]) > _LARGEST:
    assert got[0] == x.astype(ml_dtypes.bfloat16)[0]
  elif np.abs(x[0]) >= np.finfo(np.float32).tiny:  # a CPU flushes numbers under it
    assert int(got.view(np.uint16)[0]) == (bits + noise) >> 16


def test_special_values_stay():
  special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, _LARGEST, -_LARGEST, 2.0**-126]
  x = np.tile(np.array(special, np.float32), (1000, 1))
  got = np.asarray(_round(x, jax.random.key(0))).astype(np.float32)
  np.testing.assert_array_equal(got, x)
  np.testing.assert_array_equal(np.signbit(got), np.signbit(x))


def test_what_is_past_the_largest_is_never_nan():
  largest = np.float32(_LARGEST)
  x = np.linspace(largest, np.finfo(np.float32).max, 1000, dtype=np.float32)
  got = np.asarray(_round(x, jax.random.key(0))).astype(np.float32)
  np.testing.assert_array_equal(got, x.astype(ml_dtypes.bfloat16).astype(np.float32))
  assert set(got.tolist()) == {float(largest), np.inf}


def test_a_small_drift_arrives_on_average_and_to_nearest_never():
  """1,000 additions of 1/1000 of the spacing, at 1,000 weights of 1."""

  def add(one_step, carry, key):
    return one_step(carry.astype(jnp.float32) + 2.0**-7 / 1000, key), None

  start, keys = jnp.ones(1000, jnp.bfloat16), jax.random.split(jax.random.key(0), 1000)
  run = jax.jit(lambda f: jax.lax.scan(functools.partial(add, f), start, keys)[0], static_argnums=0)
  drifted = np.asarray(run(rounding.stochastic)).astype(np.float64)
  # each weight took a random walk, of variance 1000 x 1/1000 x 999/1000 steps
  assert abs(drifted.mean() - (1 + 2.0**-7)) < 5 * 2.0**-7 / np.sqrt(1000)
  assert (np.asarray(run(lambda x, key: x.astype(jnp.bfloat16))) == 1).all()


def test_a_pair_is_rounded_independently():
  x = jnp.full(100_000, 1 + 2.0**-8, jnp.float32)  # half way
  a, b = rounding.stochastic_pair(x, x, jax.random.key(3))
  up_a, up_b = np.asarray(a) > 1, np.asarray(b) > 1
  for share, expected in ((up_a, 0.5), (up_b, 0.5), (up_a & up_b, 0.25)):
    assert abs(share.mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / 100_000)


def test_the_same_on_any_mesh():
  x, key = _numbers(64 * 64).reshape(64, 64), jax.random.key(5)
  mesh = sharding.make_mesh(c.Mesh(fsdp=4, tensor=2))
  expected = np.asarray(_round(x, key)).view(np.uint16)
  for spec in (P("fsdp", "tensor"), P(None, ("tensor", "fsdp"))):
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    got = _round(placed, key)
    assert not got.sharding.is_fully_replicated
    np.testing.assert_array_equal(np.asarray(got).view(np.uint16), expected)


def test_keys_are_of_paths():
  tree = {"a": {"kernel": 1, "bias": 2}, "b": {"kernel": 3}}
  key = jax.random.key(0)
  of = lambda tree: {  # noqa: E731
    jax.tree_util.keystr(path): jax.random.key_data(rounding.path_key(key, path)).tobytes()
    for path, _ in jax.tree_util.tree_leaves_with_path(tree)
  }
  whole = of(tree)
  assert len(set(whole.values())) == 3
  assert of({"b": {"kernel": 0}}).items() <= whole.items()


def test_widened_touches_bfloat16_alone():
  tree = {
    "a": jnp.ones(2, jnp.bfloat16),
    "b": jnp.ones(2, jnp.float32),
    "c": jnp.ones(2, jnp.int32),
  }
  got = rounding.widened(tree)
  assert {k: str(v.dtype) for k, v in got.items()} == {"a": "float32", "b": "float32", "c": "int32"}
