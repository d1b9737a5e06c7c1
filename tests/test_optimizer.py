"""The update against PyTorch's AdamW, the schedule by hand, the decay mask by name."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch

from clip_jax import config as c
from clip_jax import optimizer, rounding
from clip_jax.models import clip, presets

CONFIG = c.Optimizer(learning_rate=0.1, warmup_steps=4, weight_decay=0.2, beta2=0.98)


def test_schedule_by_hand():
  schedule = optimizer.schedule(CONFIG, 12)
  warm = [0.0, 0.025, 0.05, 0.075, 0.1]
  cosine = [0.05 * (1 + np.cos(np.pi * i / 8)) for i in range(1, 9)]
  np.testing.assert_allclose([schedule(i) for i in range(13)], warm + cosine, atol=1e-7)


def test_no_warmup_starts_at_the_peak():
  assert optimizer.schedule(dataclasses.replace(CONFIG, warmup_steps=0), 10)(0) == pytest.approx(
    0.1
  )


def test_a_warmup_longer_than_the_run_is_refused():
  with pytest.raises(ValueError, match=r"warmup_steps: 4 is not under config.steps \(4\)"):
    optimizer.schedule(CONFIG, 4)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_update_equals_pytorch(clip_norm):
  config = dataclasses.replace(CONFIG, clip_gradient_norm=clip_norm)
  rng = np.random.default_rng(0)
  params = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
  params = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
  tensors = {k: torch.nn.Parameter(torch.tensor(np.array(v))) for k, v in params.items()}
  groups = [
    {"params": [tensors["kernel"]], "weight_decay": config.weight_decay},
    {"params": [tensors["bias"]], "weight_decay": 0.0},
  ]
  reference = torch.optim.AdamW(groups, 1.0, (config.beta1, config.beta2), config.epsilon)
  tx, schedule = optimizer.make(config, 12), optimizer.schedule(config, 12)
  state = tx.init(params)
  for step in range(12):
    gradients = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()}
    updates, state = tx.update(gradients, state, params)
    params = {k: params[k] + updates[k] for k in params}
    for group in reference.param_groups:
      group["lr"] = float(schedule(step))
    for k, tensor in tensors.items():
      tensor.grad = torch.tensor(gradients[k])
    if clip_norm:
      torch.nn.utils.clip_grad_norm_(tensors.values(), clip_norm)
    reference.step()
  for k, tensor in tensors.items():
    np.testing.assert_allclose(params[k], tensor.detach().numpy(), atol=2e-6)


@pytest.mark.parametrize("config", [presets.VIT_B_32, presets.SIGLIP_B_16])
def test_decay_is_on_matrices_only(config):
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  tokens = jax.ShapeDtypeStruct((1, config.text.context_length), jnp.int32)
  model = clip.CLIP(config)
  params = jax.eval_shape(model.init, jax.random.key(0), image, tokens)["params"]
  mask = optimizer.decay_mask(params)
  for (path, decays), leaf in zip(
    jax.tree_util.tree_leaves_with_path(mask), jax.tree.leaves(params), strict=True
  ):
    stacked = "blocks" in jax.tree_util.keystr(path)
    name = path[-1].key
    matrix = leaf.ndim - stacked >= 2 and name != "bias"  # attention's biases are [3, H, K]
    assert decays == matrix, jax.tree_util.keystr(path)


def test_an_unknown_weight_is_asked_about():
  with pytest.raises(ValueError, match="does weight decay apply"):
    optimizer.decay_mask({"mystery": jnp.zeros(3)})


def test_log_scale_is_clipped_at_ln_100():
  for value, expected in ((5.0, np.log(100)), (2.0, 2.0)):
    clipped = optimizer.clip_log_scale({"log_scale": jnp.float32(value), "x": 1}, 100.0)
    np.testing.assert_allclose(clipped["log_scale"], expected, rtol=1e-6)
    assert clipped["x"] == 1


HALF = dataclasses.replace(CONFIG, moments_dtype="bfloat16", text_weights_dtype="bfloat16")


def _trees(seed):
  """Two trees of the same paths, of two magnitudes."""
  rng = np.random.default_rng(seed)
  leaf = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  return [
    {
      "image": {"fc": {"kernel": scale * leaf(30, 40), "bias": scale * leaf(40)}},
      "text": {
        "fc": {"kernel": scale * leaf(30, 40), "bias": scale * leaf(40)},
        "ln": {"scale": scale * leaf(40)},
        "token_embedding": {"embedding": scale * leaf(50, 40)},
      },
      "image_projection": scale * leaf(40, 8),
      "text_projection": scale * leaf(40, 8),
      "log_scale": np.float32(scale),
    }
    for scale in (1.0, 0.01)
  ]


def _paths(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_the_state_has_the_tree_of_adamw():
  """Whatever the dtype of the moments: the checkpoints of one are laid out as those of another."""
  params, _ = _trees(0)
  adamw = optax.adamw(optimizer.schedule(CONFIG, 12), mask=optimizer.decay_mask)
  reference = optax.chain(optax.identity(), adamw)
  for config, dtype in ((CONFIG, "float32"), (HALF, "bfloat16")):
    state = optimizer.make(config, 12).init(params)
    expected = reference.init(params)
    assert jax.tree.structure(jax.tree.map(lambda _: 0, state)) == jax.tree.structure(
      jax.tree.map(lambda _: 0, expected)
    )
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(moments) == 2 * (len(jax.tree.leaves(params)) - 1)
    assert {str(x.dtype) for x in moments} == {dtype}


def test_half_moments_are_updated_in_float32_and_rounded_to_a_neighbour():
  """Adam by hand in float64, from the same rounded moments; over keys the mean is the value."""
  params, gradients = _trees(0)
  make = optimizer.make(HALF, 12)
  update = jax.jit(lambda state, key: make.update(gradients, state, params, rng=key))
  _, state = update(make.init(params), jax.random.key(0))
  before = state[1][0]
  updates, exact = optimizer.make(CONFIG, 12).update(gradients, rounding.widened(state), params)
  sums: dict[str, np.ndarray] = {}
  repeats = 400
  for seed in range(repeats):
    got_updates, got = update(state, jax.random.key(seed))
    if not seed:
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got_updates, updates)
    moments = got[1][0]
    for name, tree in (("mu", moments.mu), ("nu", moments.nu)):
      for path, leaf in _paths(tree).items():
        assert leaf.dtype == ml_dtypes.bfloat16
        sums[f"{name}/{path}"] = sums.get(f"{name}/{path}", 0) + np.asarray(leaf, np.float64)
  for name, beta, power in (("mu", CONFIG.beta1, 1), ("nu", CONFIG.beta2, 2)):
    old, new = _paths(getattr(before, name)), _paths(getattr(exact[1][0], name))
    for path, gradient in _paths(gradients).items():
      by_hand = (
        beta * np.asarray(old[path], np.float64) + (1 - beta) * np.float64(gradient) ** power
      )
      np.testing.assert_allclose(new[path], by_hand, rtol=1e-5, atol=1e-12)
      spacing = 2.0**-7 * np.abs(by_hand)
      error = np.abs(sums[f"{name}/{path}"] / repeats - by_hand)
      assert (error < 5 * 0.5 * spacing / np.sqrt(repeats) + 1e-12).all(), path


def test_what_rests_in_bfloat16():
  """The matrices of the text encoder and its projection, and nothing else."""
  params, _ = _trees(0)
  half = {
    path for path, x in _paths(optimizer.at_rest(HALF, params)).items() if x.dtype.itemsize == 2
  }
  assert half == {"text/fc/kernel", "text/token_embedding/embedding", "text_projection"}
  assert optimizer.at_rest(CONFIG, params) is params
  other = _paths(optimizer.at_rest(HALF, params, jax.random.key(0)))
  for path, x in _paths(params).items():
    if path not in half:
      np.testing.assert_array_equal(other[path], x)
    else:
      assert np.abs(np.asarray(other[path], np.float32) - x).max() > 0
      np.testing.assert_allclose(np.asarray(other[path], np.float32), x, rtol=2.0**-7)


def test_tiny_updates_of_half_weights_arrive():
  """Without decay, 200 steps of 1/50 of a spacing: to nearest, the weights would never move."""
  config = dataclasses.replace(
    HALF, learning_rate=2.0**-7 / 50, warmup_steps=0, weight_decay=0.0, moments_dtype="float32"
  )
  params = {"text_projection": jnp.ones((100, 100), jnp.bfloat16), "log_scale": jnp.float32(1)}
  gradients = jax.tree.map(lambda x: jnp.ones(x.shape), params)
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  tx = optimizer.make(config, 10**9)  # a constant learning rate
  state = exact_state = tx.init(exact)

  @jax.jit
  def step(params, state, key):
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return optimizer.apply(config, 10**9, gradients, state, wide, key)

  for i in range(200):
    params, state = step(params, state, jax.random.key(i))
    updates, exact_state = tx.update(gradients, exact_state, exact)
    exact = optax.apply_updates(exact, updates)
  assert params["text_projection"].dtype == jnp.bfloat16
  moved = 1 - np.asarray(params["text_projection"], np.float64).mean()
  expected = 1 - float(exact["text_projection"][0, 0])
  assert expected > 3 * 2.0**-7
  assert moved == pytest.approx(expected, rel=0.02)


def test_a_locked_image_encoder_is_not_among_the_trained():
  params, gradients = _trees(0)
  locked = dataclasses.replace(CONFIG, lock_image=True, warmup_steps=0)
  assert optimizer.trained(CONFIG, params) == params
  trained = optimizer.trained(locked, params)
  assert set(trained) == {"text", "text_projection", "log_scale"}
  state = optimizer.make(locked, 12).init(trained)
  after, state = optimizer.apply(
    locked, 12, optimizer.trained(locked, gradients), state, params, jax.random.key(0)
  )
  for path, x in _paths(after).items():
    assert np.array_equal(x, _paths(params)[path]) == path.startswith("image"), path
  assert not any("image" in path for path in _paths(state))
