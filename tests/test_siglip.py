"""SigLIP's towers against Hugging Face's, their attention by gradients, the sizes people use."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import config as c
from clip_jax import parsing
from clip_jax.models import clip, presets, transformer
from tools import golden_siglip

TINY = golden_siglip.TINY


@functools.cache
def _params():
  return golden_siglip.random_params(TINY, seed=0)


def _unit(x_BE):
  return x_BE / np.linalg.norm(x_BE, axis=-1, keepdims=True)


def _assert_equal_to(expected, model, params, image_BRR3, tokens_BL):
  """Each embedding within 1e-5 of its length, each logit within 1e-5 of the largest."""
  apply = jax.jit(lambda *x: clip.CLIP(model).apply({"params": params}, *x))
  image_BE, text_BE, scale = apply(image_BRR3, tokens_BL)
  np.testing.assert_allclose(image_BE, _unit(expected["image"]), atol=2e-6)
  np.testing.assert_allclose(text_BE, _unit(expected["text"]), atol=2e-6)
  logits_BB = scale * image_BE @ text_BE.T + params["logit_bias"]
  largest = np.abs(expected["logits"]).max()
  np.testing.assert_allclose(logits_BB, expected["logits"], atol=1e-5 * largest)
  # the features themselves, before the division that would hide a wrong length
  features = functools.partial(clip.CLIP(model).apply, {"params": params}, image_BRR3)
  image_BD = jax.jit(lambda: features(method=lambda module, image: module.image(image)))()
  size = np.linalg.norm(expected["image"], axis=-1).max()
  np.testing.assert_allclose(image_BD, expected["image"], atol=1e-5 * size)


def test_equals_the_golden_outputs():
  """Without transformers: the outputs of tools/golden_siglip.py."""
  golden = json.loads(golden_siglip.PATH.read_text())
  expected = {name: np.array(golden[name]) for name in ("image", "text", "logits")}
  _assert_equal_to(expected, TINY, _params(), *golden_siglip.random_inputs(TINY, seed=1))


@pytest.mark.parametrize("change", [{"activation": "gelu"}, {"norm_epsilon": 1e-5}])
def test_the_golden_outputs_tell_the_options_apart(change):
  golden = json.loads(golden_siglip.PATH.read_text())
  expected = {name: np.array(golden[name]) for name in ("image", "text", "logits")}
  model = dataclasses.replace(TINY, **change)
  with pytest.raises(AssertionError):
    _assert_equal_to(expected, model, _params(), *golden_siglip.random_inputs(TINY, seed=1))


def test_options_change_nothing():
  inputs = golden_siglip.random_inputs(TINY, seed=4)

  def loss(params, model):
    image_BE, text_BE, _ = clip.CLIP(model).apply({"params": params}, *inputs)
    return (image_BE * jnp.arange(32.0)[None]).sum() + (text_BE**3).sum()

  value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  changed = dataclasses.replace(TINY, scan_layers=True, remat="full")
  expected, got = value_and_grad(_params(), TINY), value_and_grad(_params(), changed)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4), got, expected)


def test_text_attends_both_ways_by_gradients():
  """Every position's output depends on every position's input."""
  model = transformer.Transformer(
    1, 3, False, "gelu_tanh", transformer.siglip_initial(), jnp.dtype("float32")
  )
  x_1LD = jnp.asarray(np.random.default_rng(0).normal(size=(1, 7, 24)), jnp.float32)
  variables = jax.jit(model.init)(jax.random.key(0), x_1LD)
  jacobian = jax.jit(jax.jacrev(lambda x: model.apply(variables, x)[0].sum(-1)))(x_1LD)
  assert (jnp.abs(jacobian[:, 0]).max(-1) > 0).all()


def test_text_is_pooled_at_the_last_position_and_sees_all_others():
  """By gradients of the embedding with respect to each position's embedding."""
  tokens_BL = np.arange(9, dtype=np.int32)[None] + 1

  def total(positions_LD):
    params = _params()
    text = {**params["text"], "positional_embedding": positions_LD}
    variables = {"params": {**params, "text": text}}
    return clip.CLIP(model).apply(variables, tokens_BL, method="encode_text")[0, :5].sum()

  model, positions_LD = TINY, _params()["text"]["positional_embedding"]
  assert (jnp.abs(jax.jit(jax.grad(total))(positions_LD)).max(-1) > 0).all()
  # without blocks to mix positions, the last one alone is left
  model = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, layers=1))
  cut = jax.tree.map(lambda x: x[:1] * 0, _params()["text"]["transformer"])

  def total_unmixed(positions_LD):
    params = _params()
    text = {**params["text"], "positional_embedding": positions_LD, "transformer": cut}
    variables = {"params": {**params, "text": text}}
    return clip.CLIP(model).apply(variables, tokens_BL, method="encode_text")[0, :5].sum()

  reach_L = jnp.abs(jax.jit(jax.grad(total_unmixed))(positions_LD)).max(-1) > 0
  np.testing.assert_array_equal(reach_L, np.arange(9) == 8)


def test_the_image_tower_sees_whole_patches_only():
  image_BRR3, _ = golden_siglip.random_inputs(TINY, seed=5, batch=1)

  def total(image_BRR3):
    variables = {"params": _params()}
    return clip.CLIP(TINY).apply(variables, image_BRR3, method="encode_image")[0, :5].sum()

  reach_RR = jnp.abs(jax.jit(jax.grad(total))(image_BRR3))[0].max(-1) > 0
  inside_R = np.arange(29) < 24
  np.testing.assert_array_equal(reach_RR, inside_R[:, None] & inside_R[None])


def test_initial_values_are_big_visions():
  """Standard deviations of big_vision's initial weights, and the logits' start."""
  model = c.Model(
    c.Vision(64, 16, width=128, layers=4, heads=4, pooling="map"),
    c.Text(16, 2000, width=128, layers=4, heads=4, pooling="last"),
    128,
    "gelu_tanh",
    1e-6,
    "sigmoid",
  )
  inputs = golden_siglip.random_inputs(model, seed=0, batch=1)
  params = jax.jit(clip.CLIP(model).init)(jax.random.key(0), *inputs)["params"]
  text, image, pooling = params["text"], params["image"], params["image"]["pooling"]
  square, mlp = 128**-0.5, (2 / (5 * 128)) ** 0.5  # Xavier's: sqrt(2 / (fan-in + fan-out))
  expected = [
    (image["stem"]["patch_embedding"]["kernel"], 768**-0.5),
    (image["positional_embedding"], square),
    (text["positional_embedding"], square),
    (text["token_embedding"]["embedding"], square),
    (params["text_projection"], square),
    (pooling["q"]["kernel"], square),
    (pooling["kv"]["kernel"], square),
    (pooling["out"]["kernel"], square),
    (pooling["mlp"]["fc"]["kernel"], mlp),
  ]
  for tower in (image, text):
    blocks = tower["transformer"]["blocks"]
    expected += [
      (blocks["attention"]["qkv"]["kernel"], square),
      (blocks["attention"]["out"]["kernel"], square),
      (blocks["mlp"]["fc"]["kernel"], mlp),
      (blocks["mlp"]["proj"]["kernel"], mlp),
      (blocks["mlp"]["fc"]["bias"], 1e-6),
    ]
  for weight, std in expected:
    np.testing.assert_allclose(np.std(weight), std, rtol=0.06)
  np.testing.assert_allclose(params["log_scale"], np.log(10), rtol=1e-6)
  assert params["logit_bias"] == -10
  for bias in (image["stem"]["patch_embedding"]["bias"], params["text_projection_bias"]):
    assert not bias.any()


# Totals, image and text parameters. Source: Hugging Face's SiglipModel (transformers 5.23.0) of
# the google/siglip-* sizes, on PyTorch's meta device.
SIGLIP_COUNTS = {
  "SigLIP-B/16-224": (203_155_970, 92_884_224, 110_271_744),
  "SigLIP-B/16-256": (203_202_050, 92_930_304, 110_271_744),
  "SigLIP-L/16-256": (652_150_786, 315_956_224, 336_194_560),
  "SigLIP-So400m/14-384": (877_960_498, 428_225_600, 449_734_896),
}
# Source: open_clip 3.3.0's CLIP of its model_configs, on PyTorch's meta device.
LAION_COUNTS = {
  "ViT-H/14": (986_109_441, 632_076_800, 354_032_640),
  "ViT-bigG/14": (2_539_567_105, 1_844_907_264, 694_659_840),
}


@pytest.mark.parametrize("name", [*SIGLIP_COUNTS, *LAION_COUNTS])
def test_parameter_counts(name):
  counts = clip.parameter_counts((presets.SIGLIP | presets.LAION)[name])
  got = (counts["total"], counts["image"], counts["text"])
  assert got == (SIGLIP_COUNTS | LAION_COUNTS)[name]


def test_every_preset_is_counted_and_accepted():
  assert {*SIGLIP_COUNTS, *LAION_COUNTS} == {*presets.SIGLIP, *presets.LAION}
  for model in (presets.SIGLIP | presets.LAION).values():
    config = c.Config(model=model)
    assert parsing.parse(c.to_dict(config)) == config


def test_flops_are_the_compilers():
  """Within a tenth of XLA's own count, which has the norms and activations too."""
  model = c.Model(
    c.Vision(64, 16, width=128, layers=1, heads=4, mlp_width=1000, pooling="map"),
    c.Text(32, 100, width=128, layers=1, heads=4, mlp_width=300, pooling="last"),
    128,
    "gelu_tanh",
    1e-6,
    "sigmoid",
  )
  image, tokens = (jnp.asarray(x) for x in golden_siglip.random_inputs(model, seed=0))
  params = jax.eval_shape(clip.CLIP(model).init, jax.random.key(0), image, tokens)
  compiled = jax.jit(clip.CLIP(model).apply).lower(params, image, tokens).compile()
  expected = pytest.approx(4 * clip.flops_per_pair(model), rel=0.1)
  assert compiled.cost_analysis()["flops"] == expected
