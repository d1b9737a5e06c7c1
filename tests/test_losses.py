"""The sharded loss against the plain oracle, the oracle against PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
import torch

from clip_jax import config as c
from clip_jax import losses, sharding


def _embeddings(batch: int, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
  draw = np.random.default_rng(seed).normal
  image_BE, text_BE = draw(size=(2, batch, 24)).astype(np.float32)
  return jnp.asarray(image_BE), jnp.asarray(text_BE), jnp.float32(7.5)


def _unit(x_BE):
  return x_BE / jnp.linalg.norm(x_BE, axis=-1, keepdims=True)


def test_oracle_equals_pytorch():
  inputs = _embeddings(16)

  def loss_of(image_BE, text_BE, scale):
    return losses.contrastive(_unit(image_BE), _unit(text_BE), scale)[0]

  value, gradients = jax.value_and_grad(loss_of, argnums=(0, 1, 2))(*inputs)
  tensors = [torch.tensor(np.array(x), requires_grad=True) for x in inputs]
  image, text = (torch.nn.functional.normalize(x, dim=-1) for x in tensors[:2])
  logits = tensors[2] * image @ text.T
  own = torch.arange(16)
  cross_entropy = torch.nn.functional.cross_entropy
  expected = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
  expected.backward()
  np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
  for gradient, tensor in zip(gradients, tensors, strict=True):
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), atol=2e-6)


def test_known_values():
  image_BE = jnp.eye(4)
  loss, accuracy = losses.contrastive(image_BE, image_BE, jnp.float32(2.0))
  np.testing.assert_allclose(loss, np.log(np.exp(2) + 3) - 2, rtol=1e-6)
  assert accuracy == 1
  _, accuracy = losses.contrastive(image_BE, jnp.roll(image_BE, 1, axis=0), jnp.float32(2.0))
  assert accuracy == 0


def test_sigmoid_oracle_equals_pytorch():
  """And the formula of arXiv 2303.15343, section 3.2, pair by pair."""
  inputs = (*_embeddings(12, seed=3), jnp.float32(-4.0))

  def loss_of(image_BE, text_BE, scale, bias):
    return losses.sigmoid(_unit(image_BE), _unit(text_BE), scale, bias)[0]

  value, gradients = jax.value_and_grad(loss_of, argnums=(0, 1, 2, 3))(*inputs)
  tensors = [torch.tensor(np.array(x), requires_grad=True) for x in inputs]
  image, text = (torch.nn.functional.normalize(x, dim=-1) for x in tensors[:2])
  logits = tensors[2] * image @ text.T + tensors[3]
  expected = torch.nn.functional.binary_cross_entropy_with_logits(
    logits, torch.eye(12), reduction="sum"
  )
  (expected / 12).backward()
  np.testing.assert_allclose(value, expected.item() / 12, rtol=1e-6)
  for gradient, tensor in zip(gradients, tensors, strict=True):
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), atol=2e-6)
  by_hand = 0.0
  for i, row in enumerate(logits.detach().numpy()):
    for j, logit in enumerate(row):
      by_hand += np.log1p(np.exp(-logit if i == j else logit))
  np.testing.assert_allclose(value, by_hand / 12, rtol=1e-6)


def test_sigmoid_known_values():
  image_BE, scale, bias = jnp.eye(4), jnp.float32(3.0), jnp.float32(-1.0)
  loss, accuracy = losses.sigmoid(image_BE, image_BE, scale, bias)
  np.testing.assert_allclose(loss, np.log1p(np.exp(-2)) + 3 * np.log1p(np.exp(-1)), rtol=1e-6)
  assert accuracy == 1
  _, accuracy = losses.sigmoid(image_BE, jnp.roll(image_BE, 1, axis=0), scale, bias)
  assert accuracy == 0
  huge = losses.sigmoid(image_BE, -image_BE, jnp.float32(1e4), jnp.float32(0.0))[0]
  np.testing.assert_allclose(huge, 1e4 + 3 * np.log(2), rtol=1e-6)


def _tokens(batch: int, captions: int, seed: int = 0) -> jax.Array:
  """`batch` captions of which only `captions` differ."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, 500, (captions, 9))[rng.integers(0, captions, batch)])


@functools.cache
def _case(batch, bias, seed, captions):
  """Inputs in float32, tokens, and what the oracle makes of them in float64.

  In float32 the oracle's own rounding would take up more than half of what is allowed.
  """
  image_BE, text_BE, scale = _embeddings(batch, seed)
  inputs = (_unit(image_BE), _unit(text_BE), scale, *([jnp.float32(bias)] if bias else []))
  tokens_BL = _tokens(batch, captions or batch, seed)
  oracle = functools.partial(
    losses.sigmoid if bias else losses.contrastive, tokens_BL=tokens_BL if captions else None
  )
  with jax.enable_x64(True):
    wide = [np.asarray(x, np.float64) for x in inputs]
    both = jax.value_and_grad(oracle, tuple(range(len(wide))), has_aux=True)
    return inputs, tokens_BL, jax.device_get(quick.compiled(both, *wide)(*wide))


def _compare(mesh, loss, batch, bias, seed=0, captions=0, tolerance=1e-6):
  """Value, accuracy and every gradient of the sharded loss against the plain oracle's.

  Gradients are compared relative to the largest entry of each.
  """
  inputs, tokens_BL, (expected, gradients) = _case(batch, bias, seed, captions)

  def sharded(image_BE, text_BE, *head):
    head = head if bias else (*head, None)
    return losses.sharded(loss, mesh, image_BE, text_BE, *head, tokens_BL)

  both = jax.value_and_grad(sharded, tuple(range(len(inputs))), has_aux=True)
  got, got_gradients = jax.device_get(quick.compiled(both, *inputs)(*inputs))
  np.testing.assert_allclose(got, expected, rtol=1e-6)
  for a, b in zip(got_gradients, gradients, strict=True):
    assert np.abs(a - b).max() < tolerance * np.abs(b).max()


CHUNKS = {1: 5, 2: 7, 3: 4, 4: 5, 5: 1, 6: 3, 7: 100, 8: 2}  # by devices


@pytest.mark.parametrize("bias", [0.0, -6.0])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("devices", CHUNKS)
def test_sharded_equals_oracle(devices, exchange, bias):
  """6 pairs a device in chunks that divide them, that do not, and that are larger."""
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  loss = c.Loss(exchange, CHUNKS[devices] if exchange == "ring" else 0)
  _compare(mesh, loss, 6 * devices, bias, seed=devices)


@pytest.mark.parametrize("bias", [0.0, -6.0])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_4095_pairs_equal_the_oracle(exchange, bias):
  """1,365 a device, the ring's usual 1,024 and the rest at a time.

  Their gradients are sums of 4,095 terms: in float32 the oracle itself is 2e-6 off.
  """
  mesh = sharding.make_mesh(devices=jax.devices()[:3])
  _compare(mesh, c.Loss(exchange), 4095, bias, tolerance=2e-6)


@pytest.mark.parametrize("bias", [0.0, -6.0])
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_identical_captions_count_as_positives(exchange, bias):
  """32 pairs of 11 captions, on a mesh of all three axes."""
  mesh = sharding.make_mesh(c.Mesh(fsdp=2, tensor=2))
  loss = c.Loss(exchange, 3 if exchange == "ring" else 0, "positives")
  _compare(mesh, loss, 32, bias, captions=11)


def test_identical_captions_by_hand():
  """Two pairs of one caption: each image's target is half of either text."""
  image_BE = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
  tokens_BL = jnp.asarray([[3, 4], [3, 4]])
  loss, accuracy = losses.contrastive(image_BE, image_BE, jnp.float32(2.0), tokens_BL)
  np.testing.assert_allclose(loss, np.log(np.exp(2) + 1) - 1, rtol=1e-6)
  assert accuracy == 1
  loss, _ = losses.contrastive(image_BE, image_BE, jnp.float32(2.0))
  np.testing.assert_allclose(loss, np.log(np.exp(2) + 1) - 2, rtol=1e-6)


def test_caption_ids_tell_captions_apart():
  """A million captions that differ by one token, by its place, by little: no two ids alike."""
  tokens_BL = np.zeros((2**20, 77), np.int32)
  tokens_BL[:, 0], tokens_BL[:, 1], tokens_BL[:, 2] = 49406, np.arange(2**20) % 1024, 49407
  tokens_BL[:, 3] = np.arange(2**20) // 1024
  swapped = tokens_BL[:, [0, 3, 2, 1, *range(4, 77)]]
  both = np.concatenate([tokens_BL, swapped[(tokens_BL[:, 1] != tokens_BL[:, 3])]])
  ids_B2 = np.asarray(jax.jit(losses.caption_ids)(both)).astype(np.uint64)
  distinct = len(np.unique(both[:, 1].astype(np.uint64) * 2**32 + both[:, 3]))
  assert len(np.unique(ids_B2[:, 0] * 2**32 + ids_B2[:, 1])) == distinct
  for half in ids_B2.T:  # as good as random, each: n^2 / 2^33 collisions
    expected = distinct**2 / 2**33
    assert abs(distinct - len(np.unique(half)) - expected) < 5 * np.sqrt(expected)


@pytest.mark.parametrize("bias", [None, jnp.float32(-6.0)])
def test_the_ring_is_not_finite_where_an_input_is_not(bias):
  mesh, (image_BE, text_BE, scale) = sharding.make_mesh(), _embeddings(32)
  tokens_BL = _tokens(32, 32)
  ring = quick.compiled(
    lambda *pair: losses.sharded(c.Loss("ring", 2), mesh, *pair, scale, bias, tokens_BL),
    image_BE,
    text_BE,
  )
  assert np.isfinite(ring(image_BE, text_BE)[0])
  for value in (np.nan, np.inf):
    assert not np.isfinite(ring(image_BE.at[3, 2].set(value), text_BE)[0])
    assert not np.isfinite(ring(image_BE, text_BE.at[30, 0].set(value))[0])


def test_the_ring_at_the_highest_scale():
  """Logits of 100 overflow no exponential; equal logits of all texts give the first."""
  mesh, tokens_BL, image_BE = sharding.make_mesh(), _tokens(16, 16), jnp.eye(16)
  ring = quick.compiled(
    lambda text_BE, scale: losses.sharded(
      c.Loss("ring", 1), mesh, image_BE, text_BE, scale, None, tokens_BL
    ),
    image_BE,
    jnp.float32(0),
  )
  loss, accuracy = ring(image_BE, jnp.float32(100))
  np.testing.assert_allclose(loss, 0, atol=1e-6)
  assert accuracy == 1
  assert ring(image_BE * 0, jnp.float32(1))[1] == 1 / 16


def _program(loss, bias, batch=64, width=24):
  mesh, scale = sharding.make_mesh(), jnp.float32(7.5)
  rows = jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=sharding.batch_sharding(mesh))
  tokens = jnp.zeros((batch, 3), jnp.int32)

  def loss_of(image_BE, text_BE):
    return losses.sharded(loss, mesh, image_BE, text_BE, scale, bias, tokens)[0]

  return jax.jit(jax.value_and_grad(loss_of, (0, 1))).lower(rows, rows).compile()


@pytest.mark.parametrize("bias", [None, jnp.float32(-6.0)])
def test_no_device_holds_all_logits(bias):
  """On 8 devices: [b, B] logits by gathering, in the ring neither those nor all embeddings."""
  gather = _program(c.Loss(), bias).as_text()
  assert "f32[8,64]" in gather
  assert "f32[64,64]" not in gather
  ring = _program(c.Loss("ring", 4), bias).as_text()
  assert "f32[8,4]" in ring
  assert not any(shape in ring for shape in ("f32[8,64]", "f32[64,64]", "f32[64,24]"))


@pytest.mark.parametrize("bias", [None, jnp.float32(-6.0)])
def test_the_memory_of_the_ring_does_not_grow_with_the_batch(bias):
  """16,384 pairs on 8 devices: tiles of 2,048 x 256 and the visitors, against 2,048 x 16,384."""
  ring = _program(c.Loss("ring", 256), bias, 16384, 64).memory_analysis()
  gather = _program(c.Loss(), bias, 16384, 64).memory_analysis()
  tile, visitors = 4 * 2048 * 256, 4 * 2048 * 64
  assert ring.temp_size_in_bytes < 6 * tile + 10 * visitors
  assert gather.temp_size_in_bytes > 4 * 2048 * 16384


@pytest.mark.parametrize("devices", [1, 8])
def test_the_effective_rank(devices):
  """By the eigenvalues, and where it is known: E directions alike, one, none."""
  rng = np.random.default_rng(0)
  uneven_BE = np.asarray(_unit(rng.normal(size=(512, 16)) * np.linspace(0.1, 2, 16) + 0.5))
  values = np.linalg.eigvalsh(np.cov(uneven_BE, rowvar=False, bias=True))
  signs_BE = np.concatenate([np.eye(16), -np.eye(16)])
  line_BE = _unit(np.eye(16)[0] + np.linspace(-1, 1, 32)[:, None] * np.eye(16)[1])
  same_BE = _unit(np.ones((32, 16)) + 1e-4 * rng.normal(size=(32, 16)))
  mesh = sharding.make_mesh(c.Mesh(), jax.devices()[:devices])
  rank = jax.jit(losses.effective_rank, in_shardings=sharding.batch_sharding(mesh))
  expected = values.sum() ** 2 / (values**2).sum()
  assert 2 < expected < 15
  np.testing.assert_allclose(rank(jnp.float32(uneven_BE)), expected, rtol=1e-3)
  np.testing.assert_allclose(rank(jnp.float32(signs_BE)), 16, rtol=1e-3)
  assert 0.9 < rank(jnp.float32(line_BE)) < 1.2
  assert rank(jnp.float32(same_BE)) < 0.01
