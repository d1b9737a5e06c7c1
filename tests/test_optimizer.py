"""The update against PyTorch's AdamW, the schedule by hand, the decay mask by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clip_jax import config as c
from clip_jax import optimizer
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
