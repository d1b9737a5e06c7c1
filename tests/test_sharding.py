"""The mesh and what lies on it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from clip_jax import config as c
from clip_jax import sharding
from clip_jax.models import clip, presets
from clip_jax.models.text import TextTransformer


def test_an_indivisible_batch_is_refused_with_the_remedy():
  mesh = sharding.make_mesh(devices=jax.devices()[:8])
  sharding.check_batch(64, mesh)
  with pytest.raises(ValueError, match=r"batch_pairs: 60 pairs .* over 8 devices; 56 can"):
    sharding.check_batch(60, mesh)
  with pytest.raises(ValueError, match="over 8 devices; 8 can"):
    sharding.check_batch(3, mesh)
  with pytest.raises(ValueError, match="over 8 devices in 4 microbatches; 64 can"):
    sharding.check_batch(72, mesh, microbatches=4)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_batch_lies_row_by_row(devices):
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  rows = np.arange(48, dtype=np.int32).reshape(16, 3)
  batch = sharding.global_batch({"tokens": rows}, mesh)["tokens"]
  np.testing.assert_array_equal(batch, rows)
  shards = sorted(batch.addressable_shards, key=lambda s: s.index[0].start or 0)
  assert len(shards) == devices
  np.testing.assert_array_equal(np.concatenate([s.data for s in shards]), rows)
  assert all(s.data.shape == (16 // devices, 3) for s in shards)


def _weights(config: c.Model):
  image = jnp.zeros((1, config.image.resolution, config.image.resolution, 3))
  tokens = jnp.zeros((1, config.text.context_length), jnp.int32)
  return jax.eval_shape(clip.CLIP(config).init, jax.random.key(0), image, tokens)


def _where(tree):
  return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _mesh(**axes):
  return sharding.make_mesh(c.Mesh(**axes))


def test_axes_multiply_to_the_devices():
  assert dict(_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
  assert dict(_mesh(data=2, fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  with pytest.raises(ValueError, match=r"data 2 x fsdp 3 x tensor 1 is 6 devices, there are 8"):
    _mesh(fsdp=3)
  with pytest.raises(ValueError, match=r"data 1 x fsdp 16 x tensor 1 is 16 devices, there are 8"):
    _mesh(fsdp=16)


class _Chip:
  """A device as a TPU of several slices has them."""

  platform, device_kind, process_index = "cpu", "cpu", 0

  def __init__(self, index, chips_a_slice):
    self.id, self.slice_index = index, index // chips_a_slice

  def __repr__(self):
    return f"chip {self.id}"


def test_slices_split_data_alone():
  chips = [_Chip(i, 4) for i in (5, 1, 2, 3, 4, 0, 6, 7)]
  mesh = sharding.make_mesh(c.Mesh(fsdp=2), chips)
  assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
  for row in mesh.devices.reshape(4, 2):
    assert row[0].slice_index == row[1].slice_index
  assert [d.slice_index for d in mesh.devices[:, 0, 0]] == [0, 0, 1, 1]
  with pytest.raises(ValueError, match="2 slices do not divide data"):
    sharding.make_mesh(c.Mesh(fsdp=8), chips)


def test_hosts_do_not_share_rows():
  chips = [_Chip(i, 8) for i in range(8)]
  for chip in chips:
    chip.process_index = chip.id // 2
  assert sharding.make_mesh(c.Mesh(tensor=2), chips).shape["tensor"] == 2
  with pytest.raises(ValueError, match=r"config.mesh.tensor: 4 devices .* hosts \[0, 1\]"):
    sharding.make_mesh(c.Mesh(tensor=4), chips)


@pytest.mark.parametrize("name", sorted(presets.PUBLISHED))
def test_every_weight_of_the_published_models_has_its_axes(name):
  """Sharded 8 ways, a device rests on little over an eighth of the weights."""
  params = sharding.place(_weights(presets.PUBLISHED[name])["params"], _mesh(fsdp=8))
  leaves = jax.tree.leaves(params)
  local = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
  total = sum(leaf.size for leaf in leaves)
  assert total / 8 < local < 1.03 * total / 8


def test_tensor_parallelism_splits_heads_and_mlps():
  placed = sharding.place(_weights(presets.VIT_B_32)["params"], _mesh(tensor=4))
  block = placed["image"]["transformer"]["blocks"]
  got = {
    "qkv": block["attention"]["qkv"]["kernel"].sharding.spec,
    "out": block["attention"]["out"]["kernel"].sharding.spec,
    "fc": block["mlp"]["fc"]["kernel"].sharding.spec,
    "proj": block["mlp"]["proj"]["kernel"].sharding.spec,
    "norm": block["ln_1"]["scale"].sharding.spec,
  }
  assert got == {
    "qkv": P(None, "fsdp", None, "tensor", None),
    "out": P(None, "tensor", None, "fsdp"),
    "fc": P(None, "fsdp", "tensor"),
    "proj": P(None, "tensor", "fsdp"),
    "norm": P(None, None),
  }


def test_tokens_are_looked_up_where_their_rows_are():
  """Weights are gathered and gradients summed; no embedding goes to another device."""
  text = c.Text(context_length=6, vocab_size=40, width=16, layers=1, heads=2)
  mesh = _mesh(fsdp=2, tensor=2)
  encoder = TextTransformer(text, "gelu", jnp.dtype("float32"))
  tokens = jax.ShapeDtypeStruct((32, 6), jnp.int32, sharding=sharding.batch_sharding(mesh))
  variables = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 6), jnp.int32))

  def total(variables, tokens):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return encoder.apply(variables, tokens).sum()

  gradient = jax.jit(jax.grad(total), out_shardings=_where(sharding.place(variables, mesh)))
  compiled = gradient.lower(sharding.place(variables, mesh), tokens).compile().as_text()
  assert "all-gather(" in compiled
  assert "collective-permute(" not in compiled
  assert "all-to-all(" not in compiled


def test_moments_lie_as_their_weights():
  params, mesh = _weights(presets.RN50)["params"], _mesh(fsdp=4, tensor=2)
  moments = sharding.place(optax.adamw(1e-3).init(params), mesh)[0].mu
  assert _where(moments) == _where(sharding.place(params, mesh))


def test_indivisible_weights_are_told_with_the_remedy():
  params = _weights(presets.VIT_B_32)["params"]
  chips = [_Chip(i, 35) for i in range(35)]
  message = (
    r"stem/patch_embedding/kernel: config.mesh.fsdp = 5 does not divide axis 1 of \[3072, 768\]; "
    r"use a divisor of 768, .*; and \d+ more"
  )
  with pytest.raises(ValueError, match=message):
    sharding.place(params, sharding.make_mesh(c.Mesh(fsdp=5), chips))
  with pytest.raises(ValueError, match=r"attention/out/kernel: config.mesh.tensor = 7 does not"):
    sharding.place(params, sharding.make_mesh(c.Mesh(tensor=7), chips))


def test_a_weight_without_names_is_told():
  with pytest.raises(ValueError, match="params/new/thing: which axes has it"):
    sharding.place({"params": {"new": {"thing": np.zeros((2, 3))}}}, _mesh())
