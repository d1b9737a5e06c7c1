"""The sharded loss against the plain oracle, the oracle against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_sharded_equals_oracle(devices):
  mesh, inputs = sharding.make_mesh(devices=jax.devices()[:devices]), _embeddings(32, seed=devices)

  def plain(image_BE, text_BE, scale):
    return losses.contrastive(_unit(image_BE), _unit(text_BE), scale)

  def sharded(image_BE, text_BE, scale):
    return losses.sharded_contrastive(mesh, _unit(image_BE), _unit(text_BE), scale)

  expected = jax.value_and_grad(plain, argnums=(0, 1, 2), has_aux=True)(*inputs)
  got = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1, 2), has_aux=True))(*inputs)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
  assert abs(got[0][0] - expected[0][0]) <= 1e-6


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


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_sharded_sigmoid_equals_oracle(devices):
  mesh, inputs = (
    sharding.make_mesh(devices=jax.devices()[:devices]),
    (*_embeddings(32, devices), jnp.float32(-6.0)),
  )

  def plain(image_BE, text_BE, scale, bias):
    return losses.sigmoid(_unit(image_BE), _unit(text_BE), scale, bias)

  def sharded(image_BE, text_BE, scale, bias):
    return losses.sharded_sigmoid(mesh, _unit(image_BE), _unit(text_BE), scale, bias)

  expected = jax.value_and_grad(plain, argnums=(0, 1, 2, 3), has_aux=True)(*inputs)
  got = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1, 2, 3), has_aux=True))(*inputs)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_no_device_holds_all_sigmoid_logits():
  mesh, (image_BE, text_BE, scale) = sharding.make_mesh(devices=jax.devices()[:8]), _embeddings(64)
  rows, bias = sharding.batch_sharding(mesh), jnp.float32(-6.0)
  image_BE, text_BE = jax.device_put((image_BE, text_BE), rows)
  step = jax.jit(jax.grad(lambda i, t: losses.sharded_sigmoid(mesh, i, t, scale, bias)[0], (0, 1)))
  program = step.lower(image_BE, text_BE).compile().as_text()
  assert "f32[8,64]" in program
  assert "f32[64,64]" not in program


def test_no_device_holds_all_logits():
  """On 8 devices the program holds [b, B] logits only, never [B, B]."""
  mesh, (image_BE, text_BE, scale) = sharding.make_mesh(devices=jax.devices()[:8]), _embeddings(64)
  rows = sharding.batch_sharding(mesh)
  image_BE, text_BE = jax.device_put((image_BE, text_BE), rows)
  step = jax.jit(jax.grad(lambda i, t: losses.sharded_contrastive(mesh, i, t, scale)[0], (0, 1)))
  program = step.lower(image_BE, text_BE).compile().as_text()
  assert "f32[8,64]" in program
  assert "f32[64,64]" not in program
