"""Every kind of source, from a file on the disk to embeddings; every bad one in one line."""

import copy
import json

import jax
import numpy as np
import open_clip_alone
import pytest
import test_weights
import torch

import clip_jax
from clip_jax import cli, inference
from clip_jax.data import bytepairs
from clip_jax.interop import architecture, archive, naming, sources, weights

WIDE = {  # heads of width 64, as OpenAI's code has them
  "embed_dim": 20,
  "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2},
  "text_cfg": {"context_length": 9, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
  "quick_gelu": True,
}


def _torch_model(config, seed=0):
  torch.manual_seed(seed)
  return open_clip_alone.module("model").CLIP(**copy.deepcopy(config), output_dict=False).eval()


class Node(torch.nn.Module):
  """A place for parameters under the names of another module's."""

  def forward(self, x):
    return x


class QuickGELU(torch.nn.Module):
  def forward(self, x):
    return x * torch.sigmoid(1.702 * x)


def _openai_archive(path, model, activation=QuickGELU):
  """A scripted module with that model's parameters in half precision, as OpenAI released them."""
  root = Node()
  for name, value in model.state_dict().items():
    *groups, leaf = name.split(".")
    node = root
    for group in groups:
      if not hasattr(node, group):
        node.add_module(group, Node())
      node = getattr(node, group)
    value = value.half() if value.is_floating_point() else value
    if leaf in dict(model.named_buffers()) or not value.is_floating_point():
      node.register_buffer(leaf, value)
    else:
      node.register_parameter(leaf, torch.nn.Parameter(value))
  root.transformer.add_module("gelu", activation())
  for name, value in (("input_resolution", 32), ("context_length", 9), ("vocab_size", 49408)):
    root.register_buffer(name, torch.tensor(value))
  torch.jit.script(root).save(str(path))


def _close(model, torch_model, config, atol):
  ours = architecture.from_open_clip_config(config)
  image_BRR3, tokens_BL = test_weights._inputs(ours)
  with torch.no_grad():
    image = torch.tensor(image_BRR3).permute(0, 3, 1, 2)
    expected = torch_model(image, torch.tensor(tokens_BL).long())
  np.testing.assert_allclose(model.encode_image(image_BRR3), expected[0].numpy(), atol=atol)
  np.testing.assert_allclose(model.encode_text(tokens_BL), expected[1].numpy(), atol=atol)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_openai_archive(tmp_path):
  torch_model = _torch_model(WIDE)
  _openai_archive(tmp_path / "w.pt", torch_model)
  model = clip_jax.load(tmp_path / "w.pt")
  assert model.config.model == architecture.from_open_clip_config(WIDE)
  _close(model, torch_model.half().float(), WIDE, 2e-6)
  assert model.encode_text("a cat").shape == (1, 20)
  with pytest.raises(weights.WeightsError, match="its activation is quick_gelu"):
    sources.load(tmp_path / "w.pt", "gelu")
  _openai_archive(tmp_path / "other.pt", torch_model, activation=Node)
  with pytest.raises(weights.WeightsError, match="do not say their activation"):
    sources.load(tmp_path / "other.pt")


@pytest.mark.parametrize("name", test_weights.CONFIGS)
def test_open_clip(tmp_path, name):
  config = test_weights.CONFIGS[name]
  torch_model = _torch_model(config)
  (tmp_path / "open_clip_config.json").write_text(
    json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.4] * 3}})
  )
  torch.save(torch_model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
  training = {"module." + k: v for k, v in torch_model.state_dict().items()}
  torch.save({"epoch": 3, "state_dict": training}, tmp_path / "epoch_3.pt")
  for path in (tmp_path, tmp_path / "epoch_3.pt"):
    model = clip_jax.load(path)
    assert model.preprocess.std == (0.4, 0.4, 0.4)
    assert model.tokenizer is None  # its vocabulary is not the original's
    _close(model, torch_model, config, 2e-6)
  with pytest.raises(weights.WeightsError, match="its activation is"):
    sources.load(tmp_path, "gelu" if config.get("quick_gelu") else "quick_gelu")
  with pytest.raises(ValueError, match="give int32"):
    model.encode_text("a cat")


def _random_variables(model):
  rng = np.random.default_rng(5)
  shapes = weights.abstract_variables(model)
  return jax.tree.map(lambda s: (0.1 * rng.normal(size=s.shape)).astype(np.float32), shapes)


def test_big_vision(tmp_path):
  expected = test_weights._tiny_siglip()
  variables = _random_variables(expected)
  np.savez(tmp_path / "w.npz", **weights.to_theirs(variables, naming.big_vision(expected)))
  model = clip_jax.load(tmp_path / "w.npz")
  assert model.config.model == expected
  assert (model.preprocess.resize, model.preprocess.mean) == ("squash", (0.5, 0.5, 0.5))
  jax.tree.map(np.testing.assert_array_equal, model.params, variables["params"])
  wide = np.random.default_rng(0).integers(0, 256, (1, 20, 50, 3)).astype(np.uint8)
  assert model.encode_image(wide).shape == (1, 24)


def _hugging_face(folder, config, preprocessor, variables):
  model = architecture.from_huggingface_config(config)
  arrays = weights.to_theirs(variables or _random_variables(model), naming.huggingface(model))
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
  import test_archive

  (folder / "model.safetensors").write_bytes(test_archive._safetensors(arrays))


PREPROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3,
                "size": {"height": 32, "width": 32}}  # fmt: skip


def test_hugging_face(tmp_path):
  _hugging_face(tmp_path, test_weights.SIGLIP, PREPROCESSOR, None)
  model = clip_jax.load(tmp_path)
  assert model.config.model == test_weights._tiny_siglip()
  assert model.preprocess.resize == "squash"
  clip = {**test_weights.SIGLIP, "model_type": "clip", "projection_dim": 20}
  clip["text_config"] = {**clip["text_config"], "eos_token_id": 49}
  cropped = {**PREPROCESSOR, "size": {"shortest_edge": 32}, "do_center_crop": True}
  _hugging_face(tmp_path, clip, cropped, None)
  for merges, message in (
    ("a b", "vocab.json is not in the folder"),
    ("a bb", "symbol 'bb' is neither a byte"),
    ("a b c", "no byte-pair vocabulary"),
  ):
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    with pytest.raises(weights.WeightsError, match=message):
      clip_jax.load(tmp_path)
  (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
  (tmp_path / "vocab.json").write_text(json.dumps({"a": 1}))
  with pytest.raises(weights.WeightsError, match=r"other ids than merges\.txt"):
    clip_jax.load(tmp_path)
  symbols = bytepairs.symbol_table([("a", "b")])
  (tmp_path / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
  with pytest.raises(weights.WeightsError, match="515 ids, but the model has 50"):
    clip_jax.load(tmp_path)
  (tmp_path / "merges.txt").unlink()
  model = clip_jax.load(tmp_path)
  assert (model.preprocess.resize, model.config.model.activation) == ("shortest", "quick_gelu")
  for change, message in (
    ({"resample": 2}, "resample 2; clip_jax has 3"),
    ({"size": {"shortest_edge": 64}}, "takes 32 pixels"),
    ({"crop_size": {"height": 32, "width": 16}}, "crop_size .* takes 32 pixels"),
    ({"do_normalize": False}, "do_normalize False; clip_jax has True"),
    ({"do_rescale": False}, "do_rescale False"),
    ({"do_resize": False}, "do_resize False"),
    ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
    ({"do_center_crop": False}, "do_center_crop False"),
    ({"image_mean": ["a", "b", "c"]}, "is not three numbers"),
    ({"image_std": [0, 0, 0]}, "std: must be over 0"),
    ({"image_std": [0.5]}, "is not three numbers"),
  ):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**cropped, **change}))
    with pytest.raises(weights.WeightsError, match=message):
      clip_jax.load(tmp_path)


@pytest.mark.parametrize(
  ("where", "change", "message"),
  [
    ("text_config", {"eos_token_id": 5}, "eos_token_id 5; clip_jax pools texts at 49"),
    ("vision_config", {"num_channels": 4}, "num_channels 4"),
    ("text_config", {"num_hidden_layers": "2"}, "num_hidden_layers: '2' is no count"),
    ("vision_config", {"num_hidden_layers": 10**6}, "1,000,002 blocks; there are"),
    (
      "vision_config",
      {"hidden_size": 2**20, "num_attention_heads": 2**4},
      "parameters; the arrays",
    ),
    ("vision_config", {"layer_norm_eps": "small"}, "layer_norm_eps is"),
  ],
)
def test_hugging_face_configs_that_do_not_suit(tmp_path, where, change, message):
  clip = {**test_weights.SIGLIP, "model_type": "clip", "projection_dim": 20}
  clip["text_config"] = {**clip["text_config"], "eos_token_id": 49}
  cropped = {**PREPROCESSOR, "size": {"shortest_edge": 32}, "do_center_crop": True}
  _hugging_face(tmp_path, clip, cropped, None)
  changed = {**clip, where: {**clip[where], **change}}
  (tmp_path / "config.json").write_text(json.dumps(changed))
  with pytest.raises(weights.WeightsError, match=message):
    clip_jax.load(tmp_path)


def test_open_clips_preprocessing_is_checked(tmp_path):
  torch_model = _torch_model(WIDE)
  torch.save(torch_model.state_dict(), tmp_path / "w.pt")
  for change, message in (
    ({"size": 96}, "size 96, but the model takes 32 pixels"),
    ({"mode": "L"}, "mode 'L', not RGB"),
    ({"std": [0, 0, 0]}, "std: must be over 0"),
  ):
    config = {"model_cfg": WIDE, "preprocess_cfg": change}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(weights.WeightsError, match=message):
      clip_jax.load(tmp_path / "w.pt")


def test_our_own_folders_are_checked_too(tmp_path):
  model = clip_jax.load(_siglip_file(tmp_path))
  sources.save(model, tmp_path / "ours")
  with pytest.raises(weights.WeightsError, match="its activation is gelu_tanh"):
    clip_jax.load(tmp_path / "ours", "gelu")
  model.params["log_scale"] = jax.numpy.float32(np.nan)
  sources.save(model, tmp_path / "nan")
  with pytest.raises(weights.WeightsError, match="NaN or infinity: params/log_scale"):
    clip_jax.load(tmp_path / "nan")


def test_imported_weights_have_nothing_to_evaluate(tmp_path, capsys):
  sources.save(clip_jax.load(_siglip_file(tmp_path)), tmp_path / "ours")
  assert cli.main(["evaluate", "--weights", str(tmp_path / "ours")]) == 2
  assert "its config has no evaluation tasks" in capsys.readouterr().err


def _siglip_file(folder):
  config = test_weights._tiny_siglip()
  arrays = weights.to_theirs(_random_variables(config), naming.big_vision(config))
  np.savez(folder / "w.npz", **arrays)
  return folder / "w.npz"


def test_saved_weights_are_the_same(tmp_path):
  variables = _random_variables(test_weights._tiny_siglip())
  config = test_weights._tiny_siglip()
  np.savez(tmp_path / "w.npz", **weights.to_theirs(variables, naming.big_vision(config)))
  model = sources.load(tmp_path / "w.npz")
  sources.save(model, tmp_path / "out")
  again = clip_jax.load(tmp_path / "out")
  assert again.config == model.config
  assert again.tokenizer is None
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
  with pytest.raises(weights.WeightsError, match="is there already"):
    sources.save(model, tmp_path / "out")
  with pytest.raises(weights.WeightsError, match="cannot be written"):
    sources.save(model, tmp_path / "w.npz" / "out")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "w.npz"]


def test_import_from_the_command_line(tmp_path, capsys):
  torch_model = _torch_model(test_weights.CONFIGS["resnet"])
  config = {"model_cfg": test_weights.CONFIGS["resnet"]}
  (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
  torch.save(torch_model.state_dict(), tmp_path / "w.pt")
  words = ["import", str(tmp_path / "w.pt"), str(tmp_path / "out"), "--json"]
  assert cli.main(words) == 0
  assert json.loads(capsys.readouterr().out)["activation"] == "quick_gelu"
  _close(inference.load(tmp_path / "out"), torch_model, test_weights.CONFIGS["resnet"], 2e-6)
  assert cli.main(words) == 2
  assert "is there already" in capsys.readouterr().err


def _at_other_resolution(config, side):
  """open_clip's model of the config for images of another size, positions resized by open_clip."""
  torch_model = _torch_model(config)
  vision = {**config["vision_cfg"], "image_size": side}
  resized, state = _torch_model({**config, "vision_cfg": vision}), torch_model.state_dict()
  if "patch_size" in vision:
    open_clip_alone.module("model").resize_pos_embed(state, resized)
  else:  # which it leaves out for a ResNet
    name = "visual.attnpool.positional_embedding"
    first, grid = state[name][:1], state[name][1:].reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    sides = (side // 32, side // 32)
    grid = torch.nn.functional.interpolate(grid, sides, mode="bicubic", antialias=True)
    state[name] = torch.cat([first, grid.flatten(2)[0].T])
  resized.load_state_dict(state)
  return torch_model, resized


@pytest.mark.parametrize(
  ("config", "side"), [(WIDE, 56), (WIDE, 24), (test_weights.CONFIGS["resnet"], 128)]
)
def test_another_resolution_is_open_clips(tmp_path, capsys, config, side):
  torch_model, expected = _at_other_resolution(config, side)
  (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
  torch.save(torch_model.state_dict(), tmp_path / "w.pt")
  out = str(tmp_path / "out")
  assert cli.main(["import", str(tmp_path / "w.pt"), out, "--resolution", str(side)]) == 0
  model = clip_jax.load(out)
  assert model.resolution == side
  vision = {**config["vision_cfg"], "image_size": side}
  _close(model, expected, {**config, "vision_cfg": vision}, 5e-6)
  capsys.readouterr()
  words = ["import", str(tmp_path / "w.pt"), str(tmp_path / "b"), "--resolution", str(side + 1)]
  assert cli.main(words) == 2
  assert "must be a multiple of" in capsys.readouterr().err
  assert not (tmp_path / "b").exists()


def test_sources_that_are_no_weights(tmp_path):
  (tmp_path / "folder").mkdir()
  with pytest.raises(weights.WeightsError, match=r"a folder without config\.json"):
    sources.load(tmp_path / "folder")
  (tmp_path / "RN50.pt").write_bytes(b"something else")
  with pytest.raises(weights.WeightsError, match=r"not that of OpenAI's RN50\.pt"):
    sources.load(tmp_path / "RN50.pt")
  torch.save({"a": torch.zeros(3)}, tmp_path / "w.pt")
  with pytest.raises(weights.WeightsError, match="not a CLIP of a kind"):
    sources.load(tmp_path / "w.pt", "gelu")
  (tmp_path / "page.pt").write_text("<html>not found</html>")
  with pytest.raises(archive.ArchiveError, match="neither a PyTorch archive"):
    sources.load(tmp_path / "page.pt")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[" * 200_000, "cannot be read"),
    ("[" + "[]," * (2 << 20) + "[]]", "over 4,194,304 bytes"),
    ("[]", "not a JSON object"),
  ],
)
def test_a_config_that_is_none(tmp_path, text, message):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(weights.WeightsError, match=rf"config\.json: {message}"):
    sources.load(tmp_path)
