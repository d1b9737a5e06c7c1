"""The encoders against PyTorch, the options against the plain model, causality by gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from clip_jax import config as c
from clip_jax.evaluation.paper import published
from clip_jax.models import clip, presets, transformer

SMALL = c.Model(
  image=c.Vision(resolution=24, patch=8, width=32, layers=3, heads=4),
  text=c.Text(context_length=12, vocab_size=50, width=24, layers=2, heads=3),
  embed_dim=16,
)


def _inputs(batch: int = 3) -> tuple[jax.Array, jax.Array]:
  rng = np.random.default_rng(0)
  image_BRR3 = rng.normal(size=(batch, 24, 24, 3)).astype(np.float32)
  tokens_BL = np.zeros((batch, 12), np.int32)
  for i in range(batch):
    tokens_BL[i, : 4 + i] = [48, *rng.integers(1, 48, 2 + i), 49]
  return jnp.asarray(image_BRR3), jnp.asarray(tokens_BL)


@functools.cache
def _params():
  """Random weights everywhere, so that no zero bias or unit gain hides a missing term."""
  params = jax.jit(clip.CLIP(SMALL).init)(jax.random.key(0), *_inputs(1))["params"]
  rng = np.random.default_rng(1)
  noise = lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), jnp.float32)  # noqa: E731
  return jax.tree.map(noise, params)


def _torch(x):
  return torch.tensor(np.asarray(x, np.float32))


class TorchEncoder(torch.nn.Module):
  """One stack of pre-norm blocks out of PyTorch's own layers, filled with our weights."""

  def __init__(self, blocks, width, heads, activation):
    super().__init__()
    self.layers = torch.nn.ModuleList()
    for i in range(blocks["ln_1"]["scale"].shape[0]):
      layer = torch.nn.TransformerEncoderLayer(
        width, heads, 4 * width, 0.0, activation, 1e-5, batch_first=True, norm_first=True
      )
      b = jax.tree.map(lambda x, i=i: _torch(x[i]), blocks)
      attention, mlp = b["attention"], b["mlp"]
      layer.load_state_dict(
        {
          "self_attn.in_proj_weight": attention["qkv"]["kernel"].reshape(width, 3 * width).T,
          "self_attn.in_proj_bias": attention["qkv"]["bias"].reshape(3 * width),
          "self_attn.out_proj.weight": attention["out"]["kernel"].reshape(width, width).T,
          "self_attn.out_proj.bias": attention["out"]["bias"],
          "linear1.weight": mlp["fc"]["kernel"].T,
          "linear1.bias": mlp["fc"]["bias"],
          "linear2.weight": mlp["proj"]["kernel"].T,
          "linear2.bias": mlp["proj"]["bias"],
          "norm1.weight": b["ln_1"]["scale"],
          "norm1.bias": b["ln_1"]["bias"],
          "norm2.weight": b["ln_2"]["scale"],
          "norm2.bias": b["ln_2"]["bias"],
        }
      )
      self.layers.append(layer)

  def forward(self, x, mask=None):
    for layer in self.layers:
      x = layer(x, src_mask=mask)
    return x


def _torch_norm(x, norm):
  return torch.nn.functional.layer_norm(
    x, x.shape[-1:], _torch(norm["scale"]), _torch(norm["bias"])
  )


def _torch_image(params, config, image, activation):
  """The released model's image encoder: convolution, class token, ln_pre, blocks, ln_post."""
  p, v = params["image"], config.image
  kernel = _torch(p["stem"]["patch_embedding"]["kernel"]).reshape(v.patch, v.patch, 3, v.width)
  x = torch.nn.functional.conv2d(
    image.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1), stride=v.patch
  )
  x = x.flatten(2).transpose(1, 2)
  x = torch.cat([_torch(p["class_embedding"]).expand(len(x), 1, -1), x], 1)
  x = _torch_norm(x + _torch(p["positional_embedding"]), p["ln_pre"])
  x = TorchEncoder(p["transformer"]["blocks"], v.width, v.heads, activation)(x)
  x = _torch_norm(x[:, 0], p["ln_post"]) @ _torch(params["image_projection"])
  return torch.nn.functional.normalize(x, dim=-1)


def _torch_text(params, config, tokens, activation):
  p, t = params["text"], config.text
  x = _torch(p["token_embedding"]["embedding"])[tokens] + _torch(p["positional_embedding"])
  mask = torch.full((t.context_length, t.context_length), float("-inf")).triu(1)
  x = TorchEncoder(p["transformer"]["blocks"], t.width, t.heads, activation)(x, mask)
  x = _torch_norm(x, p["ln_final"])[torch.arange(len(x)), tokens.argmax(-1)]
  return torch.nn.functional.normalize(x @ _torch(params["text_projection"]), dim=-1)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_encoders_equal_pytorch(activation):
  config = dataclasses.replace(SMALL, activation=activation)
  params, (image_BRR3, tokens_BL) = _params(), _inputs()
  act = torch.nn.functional.gelu if activation == "gelu" else lambda x: x * torch.sigmoid(1.702 * x)
  image_BE, text_BE, scale = jax.jit(clip.CLIP(config).apply)(
    {"params": params}, image_BRR3, tokens_BL
  )
  with torch.no_grad():
    expected_image = _torch_image(params, config, _torch(image_BRR3), act)
    expected_text = _torch_text(params, config, torch.tensor(np.array(tokens_BL)), act)
  np.testing.assert_allclose(image_BE, expected_image, atol=2e-6)
  np.testing.assert_allclose(text_BE, expected_text, atol=2e-6)
  np.testing.assert_allclose(scale, np.exp(params["log_scale"]), rtol=1e-6)


def test_image_gradient_equals_pytorch():
  params, (image_BRR3, tokens_BL) = _params(), _inputs()
  act = lambda x: x * torch.sigmoid(1.702 * x)  # noqa: E731
  weight_BE = np.random.default_rng(2).normal(size=(3, 16)).astype(np.float32)

  def ours(image_BRR3):
    return (clip.CLIP(SMALL).apply({"params": params}, image_BRR3, tokens_BL)[0] * weight_BE).sum()

  image = _torch(image_BRR3).requires_grad_()
  (_torch_image(params, SMALL, image, act) * torch.tensor(weight_BE)).sum().backward()
  np.testing.assert_allclose(jax.jit(jax.grad(ours))(image_BRR3), image.grad, atol=2e-5)


@pytest.mark.parametrize(
  "option", [{"scan_layers": True}, {"remat": "full"}, {"remat": "dots"}, {"remat": "tuned"}]
)
def test_options_change_nothing(option):
  params, inputs = _params(), _inputs()

  def loss(params, config):
    image_BE, text_BE, _ = clip.CLIP(config).apply({"params": params}, *inputs)
    return (image_BE * jnp.arange(16.0)[None]).sum() + (text_BE**3).sum()

  changed = dataclasses.replace(SMALL, **option)
  value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  expected, got = value_and_grad(params, SMALL), value_and_grad(params, changed)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), got, expected)
  init = jax.jit(clip.CLIP(changed).init)(jax.random.key(3), *inputs)
  plain = jax.jit(clip.CLIP(SMALL).init)(jax.random.key(3), *inputs)
  jax.tree.map(np.testing.assert_array_equal, init, plain)


@pytest.mark.parametrize(
  ("remat", "more"),
  [
    ("none", 0),
    ("dots", 2),  # attention's two
    ("tuned", 4),  # those, its output and the MLP's first
    ("full", 5),  # all but the MLP's second, on which nothing depends
  ],
)
def test_products_that_the_backward_pass_repeats(remat, more):
  initial, dtype = transformer.image_initial(), jnp.dtype("float32")
  model = transformer.Transformer(2, 2, False, "gelu", initial, dtype, remat=remat)
  x_BSD = jnp.ones((2, 5, 16))
  variables = jax.eval_shape(model.init, jax.random.key(0), x_BSD)
  text = str(jax.make_jaxpr(jax.grad(lambda v: model.apply(v, x_BSD).sum()))(variables))
  assert text.count("= dot_general[") == 6 + 12 + more  # one block in a loop


def test_the_residual_stream_in_bfloat16():
  """Rounded between blocks and nowhere else; of each block the backward pass keeps 2 bytes."""
  initial, dtype = transformer.image_initial(), jnp.dtype("float32")
  fields = (3, 2, False, "gelu", initial, dtype)
  model = transformer.Transformer(*fields, remat="full", residual_dtype=jnp.bfloat16)
  x_BSD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 16)), jnp.float32)
  variables = model.init(jax.random.key(0), x_BSD)
  expected_BSD = x_BSD.astype(jnp.bfloat16)
  block = transformer.Block(*fields[1:], mlp_width=0, norm_epsilon=1e-5)
  for layer in range(3):
    weights = jax.tree.map(lambda x, i=layer: x[i], variables["params"]["blocks"])
    wide_BSD = block.apply({"params": weights}, expected_BSD.astype(jnp.float32))[0]
    expected_BSD = wide_BSD.astype(jnp.bfloat16)
  got_BSD = model.apply(variables, x_BSD)
  assert got_BSD.dtype == jnp.float32
  np.testing.assert_allclose(got_BSD, expected_BSD.astype(jnp.float32), rtol=2**-7)
  exact_BSD = transformer.Transformer(*fields).apply(variables, x_BSD)
  assert 0 < np.abs(got_BSD - exact_BSD).max() < 0.05

  kept = jax.eval_shape(lambda x: jax.vjp(lambda x: model.apply(variables, x), x)[1], x_BSD)
  stacks = [x.dtype for x in jax.tree.leaves(kept) if x.shape == (3, 2, 5, 16)]
  assert stacks == [jnp.bfloat16]


def test_text_is_causal_by_gradients():
  """No position's output depends on a later position's input, and each depends on all before."""
  model = transformer.Transformer(
    2, 3, True, "quick_gelu", transformer.text_initial(24, 2), jnp.dtype("float32")
  )
  x_1LD = jnp.asarray(np.random.default_rng(0).normal(size=(1, 7, 24)), jnp.float32)
  variables = jax.jit(model.init)(jax.random.key(0), x_1LD)
  jacobian = jax.jit(jax.jacrev(lambda x: model.apply(variables, x)[0].sum(-1)))(
    x_1LD
  )  # [L, 1, L, D]
  reach_LL = jnp.abs(jacobian[:, 0]).max(-1)
  np.testing.assert_array_equal(reach_LL > 0, np.tri(7, dtype=bool))


def test_text_ignores_what_follows_the_end_token():
  params, (_, tokens_BL) = _params(), _inputs(1)
  end = int(tokens_BL[0].argmax())
  model = clip.CLIP(SMALL)
  changed_BL = tokens_BL.at[0, end + 1 :].set(7)
  inside_BL = tokens_BL.at[0, 1].set(7)
  embed = jax.jit(lambda t: model.apply({"params": params}, t, method="encode_text"))
  np.testing.assert_allclose(embed(tokens_BL), embed(changed_BL), atol=1e-6)
  assert jnp.abs(embed(tokens_BL) - embed(inside_BL)).max() > 1e-3


@pytest.mark.parametrize("name", presets.PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
  rows = {row["model"]: row for row in published.rows("architectures.csv")}
  counts = clip.parameter_counts(presets.PUBLISHED[name])
  assert counts["total"] == int(rows[name]["params_total"])
  assert counts["image"] == int(rows[name]["params_visual"])
  assert counts["text"] == int(rows[name]["params_text"])


def test_initial_scales_are_the_published_ones():
  """Standard deviations of the released code's initial weights, by weight."""
  config = c.Model(
    image=c.Vision(resolution=64, patch=16, width=128, layers=6, heads=4),
    text=c.Text(context_length=77, vocab_size=2000, width=128, layers=6, heads=4),
    embed_dim=128,
  )
  image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  tokens = jax.ShapeDtypeStruct((1, 77), jnp.int32)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (image, tokens))
  params = jax.jit(clip.CLIP(config).init)(jax.random.key(0), *zeros)["params"]
  text, vision = params["text"], params["image"]
  blocks, image_blocks = text["transformer"]["blocks"], vision["transformer"]["blocks"]
  width, deep = 128**-0.5, 128**-0.5 * 12**-0.5
  expected = [
    (text["token_embedding"]["embedding"], 0.02),
    (text["positional_embedding"], 0.01),
    (blocks["attention"]["qkv"]["kernel"], width),
    (blocks["attention"]["out"]["kernel"], deep),
    (blocks["mlp"]["fc"]["kernel"], 256**-0.5),
    (blocks["mlp"]["proj"]["kernel"], deep),
    (params["text_projection"], width),
    (params["image_projection"], width),
    (vision["positional_embedding"], width),
    (image_blocks["attention"]["qkv"]["kernel"], (2 / (4 * 128)) ** 0.5),  # xavier_uniform
    (image_blocks["attention"]["out"]["kernel"], (3 * 128) ** -0.5),
    (image_blocks["mlp"]["fc"]["kernel"], (3 * 128) ** -0.5),
    (image_blocks["mlp"]["proj"]["kernel"], (3 * 512) ** -0.5),
    (vision["stem"]["patch_embedding"]["kernel"], (3 * 16 * 16 * 3) ** -0.5),
  ]
  for weight, std in expected:
    np.testing.assert_allclose(np.std(weight), std, rtol=0.05)
  assert float(jnp.exp(params["log_scale"])) == pytest.approx(1 / 0.07, rel=1e-6)


def test_wrong_shapes_are_named():
  image_BRR3, tokens_BL = _inputs(1)
  with pytest.raises(ValueError, match=r"images are \(1, 32, 32, 3\)"):
    jax.eval_shape(clip.CLIP(SMALL).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), tokens_BL)
  with pytest.raises(ValueError, match=r"tokens are \(1, 5\)"):
    jax.eval_shape(clip.CLIP(SMALL).init, jax.random.key(0), image_BRR3, jnp.zeros((1, 5), int))


@pytest.mark.parametrize("stem", ["patch", "convolution"])
def test_flops_are_the_compilers(stem):
  """Within a tenth of XLA's own count, which has the norms and activations too."""
  config = c.Model(
    image=c.Vision(resolution=64, patch=16, stem=stem, width=128, layers=2, heads=4),
    text=c.Text(context_length=32, vocab_size=100, width=128, layers=2, heads=4),
    embed_dim=64,
  )
  image = jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.float32)
  tokens = jax.ShapeDtypeStruct((4, 32), jnp.int32)
  params = jax.eval_shape(clip.CLIP(config).init, jax.random.key(0), image, tokens)
  compiled = jax.jit(clip.CLIP(config).apply).lower(params, image, tokens).compile()
  expected = pytest.approx(4 * clip.flops_per_pair(config), rel=0.1)
  assert compiled.cost_analysis()["flops"] == expected


def test_a_locked_image_encoder_trains_for_its_forward_pass():
  image, pair = clip.flops_per_image(SMALL), clip.flops_per_pair(SMALL)
  assert clip.training_flops_per_pair(SMALL) == 3 * pair
  assert clip.training_flops_per_pair(SMALL, lock_image=True) == 3 * (pair - image) + image


def test_the_convolutional_stem_sees_the_whole_image():
  """Each pixel reaches the embedding, and the stem has one output a patch."""
  vision = dataclasses.replace(SMALL.image, stem="convolution")
  config = dataclasses.replace(SMALL, image=vision)
  image_BRR3, tokens_BL = _inputs(1)
  variables = jax.jit(clip.CLIP(config).init)(jax.random.key(0), image_BRR3, tokens_BL)
  assert variables["params"]["image"]["positional_embedding"].shape == (10, 32)

  def total(image_BRR3):
    return clip.CLIP(config).apply(variables, image_BRR3, method="encode_image")[0, :8].sum()

  assert (jnp.abs(jax.jit(jax.grad(total))(image_BRR3)).max(-1) > 0).all()
