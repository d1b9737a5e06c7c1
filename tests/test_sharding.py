"""The mesh and what lies on it."""

import jax
import numpy as np
import pytest

from clip_jax import sharding


def test_an_indivisible_batch_is_refused_with_the_remedy():
  mesh = sharding.make_mesh(8)
  sharding.check_batch(64, mesh)
  with pytest.raises(ValueError, match=r"batch_pairs: 60 pairs .* over 8 devices; 56 can"):
    sharding.check_batch(60, mesh)
  with pytest.raises(ValueError, match="over 8 devices; 8 can"):
    sharding.check_batch(3, mesh)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_batch_lies_row_by_row(devices):
  mesh = sharding.make_mesh(devices)
  rows = np.arange(48, dtype=np.int32).reshape(16, 3)
  batch = sharding.global_batch({"tokens": rows}, mesh)["tokens"]
  np.testing.assert_array_equal(batch, rows)
  shards = sorted(batch.addressable_shards, key=lambda s: s.index[0].start or 0)
  assert len(shards) == devices
  np.testing.assert_array_equal(np.concatenate([s.data for s in shards]), rows)
  assert all(s.data.shape == (16 // devices, 3) for s in shards)


def test_place_asks_for_whole_weights():
  mesh = sharding.make_mesh(4)
  placed = sharding.place({"kernel": np.zeros((2, 3), np.float32)}, mesh)["kernel"]
  assert placed.shape == (2, 3)
  assert placed.sharding.is_fully_replicated
  assert placed.sharding.device_set == set(jax.devices()[:4])
