"""Weights in and out, against open_clip's own models: embeddings, logits, every tensor."""

import copy
import re

import jax
import numpy as np
import open_clip_alone
import pytest
import torch

from clip_jax.interop import architecture, naming, weights
from clip_jax.models import presets
from clip_jax.models.clip import CLIP
from tools import golden_open_clip

CONFIGS = {
  "vit": golden_open_clip.CONFIGS["vit_gelu"],
  "vit_quick_gelu": golden_open_clip.CONFIGS["vit_quick_gelu"],
  "resnet": golden_open_clip.CONFIGS["resnet"],
}
TEXT, RESNET = CONFIGS["vit"]["text_cfg"], CONFIGS["resnet"]
SIGLIP = {
  "model_type": "siglip",
  "text_config": {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 3, "max_position_embeddings": 7,
  },
  "vision_config": {
    "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
  },
}  # fmt: skip


def randomised(config):
  """open_clip's model of a config, all its weights, biases and statistics at random."""
  torch.manual_seed(2)
  generator = torch.Generator().manual_seed(3)
  model = open_clip_alone.module("model").CLIP(**copy.deepcopy(config), output_dict=False)
  with torch.no_grad():
    for name, value in model.state_dict().items():
      if value.is_floating_point() and "attn_mask" not in name:
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
          value.copy_(0.5 + noise.abs())
        elif value.ndim > 1:
          value.copy_(noise * value[0].numel() ** -0.5)
        else:
          value.copy_(value + 0.2 * noise)
  return model.eval()


@pytest.fixture(scope="module", params=CONFIGS)
def theirs(request):
  config = CONFIGS[request.param]
  return config, randomised(config)


def _arrays(model):
  return {name: value.numpy() for name, value in model.state_dict().items()}


def _inputs(model, count=5):
  rng = np.random.default_rng(1)
  side, length = model.image.resolution, model.text.context_length
  image_BRR3 = rng.normal(size=(count, side, side, 3)).astype(np.float32)
  tokens_BL = rng.integers(1, model.text.vocab_size - 1, (count, length)).astype(np.int32)
  tokens_BL[np.arange(count), rng.integers(1, length, count)] = model.text.vocab_size - 1
  return image_BRR3, tokens_BL


def test_embeddings_and_logits_equal_open_clips(theirs, drill):
  config, torch_model = theirs
  model = architecture.from_open_clip_config(config)
  variables = weights.to_ours(_arrays(torch_model), naming.openai(model), model)
  image_BRR3, tokens_BL = _inputs(model)
  image_BE, text_BE, scale = jax.jit(CLIP(model).apply)(variables, image_BRR3, tokens_BL)
  with torch.no_grad():
    image = torch.tensor(image_BRR3).permute(0, 3, 1, 2)
    expected = torch_model(image, torch.tensor(tokens_BL).long())
  np.testing.assert_allclose(image_BE, expected[0].numpy(), atol=2e-6)
  np.testing.assert_allclose(text_BE, expected[1].numpy(), atol=2e-6)
  np.testing.assert_allclose(scale, expected[2].numpy(), rtol=1e-6)
  logits_BB = np.asarray(scale * image_BE @ text_BE.T)
  theirs_BB = (expected[2] * expected[0] @ expected[1].T).numpy()
  np.testing.assert_allclose(logits_BB, theirs_BB, atol=1e-4)
  drill(33, most_logit_difference=np.abs(logits_BB - theirs_BB).max())


def test_the_activation_matters(theirs):
  """The comparison above would see a wrong one."""
  config, torch_model = theirs
  wrong = architecture.from_open_clip_config(
    {**config, "quick_gelu": not config.get("quick_gelu", False)}
  )
  variables = weights.to_ours(_arrays(torch_model), naming.openai(wrong), wrong)
  image_BRR3, tokens_BL = _inputs(wrong)
  text_BE = jax.jit(CLIP(wrong).apply)(variables, image_BRR3, tokens_BL)[1]
  expected = torch_model.encode_text(torch.tensor(tokens_BL).long(), normalize=True)
  assert np.abs(text_BE - expected.detach().numpy()).max() > 1e-3


def test_round_trips_are_exact(theirs, drill):
  config, torch_model = theirs
  model = architecture.from_open_clip_config(config)
  table, arrays = naming.openai(model), _arrays(torch_model)
  variables = weights.to_ours(arrays, table, model)
  back = weights.to_theirs(variables, table)
  expected = {
    name: array
    for name, array in arrays.items()
    if not re.search("num_batches_tracked|attn_mask", name)
  }
  assert back.keys() == expected.keys()
  differing = sum(not np.array_equal(back[name], array) for name, array in expected.items())
  drill(33, round_trips=1, differing=differing)
  for name, array in expected.items():
    assert back[name].shape == array.shape, name
    np.testing.assert_array_equal(back[name], array, err_msg=name)
  again = weights.to_ours(back, table, model)
  jax.tree.map(np.testing.assert_array_equal, again, variables)


@pytest.mark.parametrize("table", [naming.huggingface, naming.big_vision, naming.openai])
def test_tables_are_their_own_inverse(table):
  """Every array of ours has its place, once, and comes back as it was."""
  openai = table is naming.openai
  model = architecture.from_open_clip_config(RESNET) if openai else _tiny_siglip()
  rng = np.random.default_rng(5)
  shapes = weights.abstract_variables(model)
  variables = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
  if openai:  # a variance is not negative
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
  names = table(model)
  back = weights.to_ours(weights.to_theirs(variables, names), names, model)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


def _tiny_siglip():
  return architecture.from_huggingface_config(SIGLIP)


def test_half_precision_is_widened(theirs):
  config, torch_model = theirs
  model = architecture.from_open_clip_config(config)
  half = {
    name: array.astype(np.float16) if array.dtype == np.float32 else array
    for name, array in _arrays(torch_model).items()
    if "attn_mask" not in name
  }
  variables = weights.to_ours(half, naming.openai(model), model)
  leaf = variables["params"]["text_projection"]
  assert leaf.dtype == np.float32
  np.testing.assert_array_equal(leaf, half["text_projection"].astype(np.float32))


def test_all_that_does_not_fit_is_told_together(theirs):
  config, torch_model = theirs
  model = architecture.from_open_clip_config(config)
  arrays = _arrays(torch_model)
  del arrays["ln_final.bias"]
  arrays["extra.weight"] = np.zeros(3, np.float32)
  arrays["text_projection"] = arrays["text_projection"][:, 1:]
  arrays["ln_final.weight"] = arrays["ln_final.weight"].astype(np.int32)
  arrays["transformer.resblocks.1.attn.in_proj_weight"] = np.zeros((5, 7), np.float32)
  with pytest.raises(weights.WeightsError) as caught:
    weights.to_ours(arrays, naming.openai(model), model)
  for message in (
    "ln_final.bias is missing",
    "extra.weight is not part of this model",
    "text_projection has shape [24, 19]",
    "ln_final.weight is int32",
    "resblocks.1.attn.in_proj_weight has shape [5, 7]",
  ):
    assert message in str(caught.value)


def test_nothing_is_read_or_made_before_all_fits(theirs, monkeypatch):
  """Shapes and dtypes are those of the model, or no number is looked at; then all bad ones are."""
  config, torch_model = theirs
  model = architecture.from_open_clip_config(config)
  arrays = {name: array.copy() for name, array in _arrays(torch_model).items()}
  arrays["positional_embedding"][3, 2] = np.nan
  arrays["ln_final.bias"][1] = np.inf
  with pytest.raises(weights.WeightsError, match=r"ing holds NaN .*; ln_final\.bias holds NaN"):
    weights.to_ours(arrays, naming.openai(model), model)

  def looked(*_):
    raise AssertionError("read, or memory taken")

  for name in ("_is_finite", "_empty"):
    monkeypatch.setattr(weights, name, looked)
  arrays["text_projection"] = arrays["text_projection"][:, 1:]
  with pytest.raises(weights.WeightsError, match=r"^text_projection has shape \[24, 19\]"):
    weights.to_ours(arrays, naming.openai(model), model)


def test_a_layer_too_few_or_too_many_is_told(theirs):
  config, torch_model = theirs
  arrays = _arrays(torch_model)
  for layers, message in ((3, "resblocks.2.* is missing"), (1, "resblocks.1.* is not part of")):
    other = {**config, "text_cfg": {**config["text_cfg"], "layers": layers}}
    model = architecture.from_open_clip_config(other)
    with pytest.raises(weights.WeightsError, match=message):
      weights.to_ours(arrays, naming.openai(model), model)


@pytest.mark.parametrize("name", [*presets.PUBLISHED, *presets.LAION])
def test_the_architecture_is_seen_in_the_shapes(name):
  """All the released models, from the shapes of their arrays alone."""
  preset = {**presets.PUBLISHED, **presets.LAION}[name]
  table = naming.openai(preset)
  ours = weights.flat(weights.abstract_variables(preset))
  shapes = {}
  for weight in table:
    leaves = [np.broadcast_to(np.float32(0), ours[path].shape) for path in weight.ours]
    if weight.layer is not None:
      leaves = [leaf[0] for leaf in leaves]
    for their_name, array in zip(weight.theirs, weight.layout.to_theirs(leaves), strict=True):
      shapes[their_name] = array.shape
  assert architecture.from_openai_shapes(shapes, preset.activation) == preset
  with pytest.raises(weights.WeightsError, match="do not say their activation"):
    architecture.from_openai_shapes(shapes, None)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"vision_cfg": {"timm_model_name": "eva"}}, "timm's eva"),
    ({"text_cfg": {"hf_model_name": "roberta"}}, "roberta"),
    ({"multimodal_cfg": {"width": 3}}, "multimodal_cfg is not known"),
    ({"vision_cfg": {"attentional_pool": True, "width": 8}}, "attentional_pool is not known"),
  ],
)
def test_towers_that_are_not_here_are_refused_by_name(change, message):
  with pytest.raises(weights.WeightsError, match=message):
    architecture.from_open_clip_config({**CONFIGS["vit"], **change})


def test_unknown_shapes_do_not_show_their_heads(theirs):
  _, torch_model = theirs
  shapes = {name: array.shape for name, array in _arrays(torch_model).items()}
  with pytest.raises(weights.WeightsError, match="do not show the number of heads"):
    architecture.from_openai_shapes(shapes, "gelu")


def test_jax_takes_the_memory_as_it_is(theirs):
  """On a CPU; otherwise importing takes twice the memory of the weights."""
  config, torch_model = theirs
  model = architecture.from_open_clip_config(config)
  ours = weights.to_ours(_arrays(torch_model), naming.openai(model), model)
  for array in jax.tree.leaves(ours):
    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


def test_a_negative_variance_is_refused():
  model = architecture.from_open_clip_config(RESNET)
  arrays = _arrays(randomised(RESNET))
  arrays["visual.bn1.running_var"] = -arrays["visual.bn1.running_var"]
  with pytest.raises(weights.WeightsError, match=r"visual\.bn1\.running_var holds a negative"):
    weights.to_ours(arrays, naming.openai(model), model)


def test_heads_of_a_resnets_pool_come_from_the_config():
  """open_clip gives the pool 32 * width / head_width heads."""
  config = copy.deepcopy(RESNET)
  config["vision_cfg"]["head_width"] = 32
  theirs, model = randomised(config), architecture.from_open_clip_config(config)
  variables = weights.to_ours(_arrays(theirs), naming.openai(model), model)
  image_BRR3, _ = _inputs(model)
  got = CLIP(model).apply(variables, image_BRR3, method="encode_image")
  with torch.no_grad():
    image = torch.tensor(image_BRR3).permute(0, 3, 1, 2)
    expected = theirs.encode_image(image, normalize=True).numpy()
  assert model.image.heads == 8
  np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"embed_dim": None}, "embed_dim: None is no count"),
    ({"vision_cfg": [1]}, "vision_cfg: .* is no JSON object"),
    ({"vision_cfg": {"width": "128"}}, "width: '128' is no count"),
    ({"vision_cfg": {"head_width": 0}}, "head_width: 0 is no count"),
    ({"vision_cfg": {"patch_size": True}}, "patch_size: True is no count"),
    ({"vision_cfg": {"image_size": -64}}, "image_size: -64 is no count"),
    ({"vision_cfg": {"image_size": [64, 32]}}, "square images only"),
    ({"vision_cfg": {"layers": [3, "4", 6, 3]}}, "layers: '4' is no count"),
    ({"vision_cfg": {"mlp_ratio": "4"}}, "mlp_ratio: '4' is no ratio"),
    ({"text_cfg": {"heads": 2.0}}, r"heads: 2\.0 is no count"),
  ],
)
def test_open_clip_configs_that_are_none(change, message):
  config = {**CONFIGS["vit"], **change}
  with pytest.raises(weights.WeightsError, match=message):
    architecture.from_open_clip_config(config)


def test_a_square_given_twice_is_one():
  config = {**CONFIGS["vit"], "vision_cfg": {"image_size": [64, 64], "patch_size": 16}}
  assert architecture.from_open_clip_config(config).image.resolution == 64
