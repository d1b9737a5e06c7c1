"""Weights out: exact when read back, and the same embeddings in the frameworks they are for."""

import copy
import dataclasses
import json

import jax
import numpy as np
import open_clip_alone
import pytest
import test_sources
import test_weights
import torch

from clip_jax import cli, cli_options, inference
from clip_jax import config as c
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.interop import (
  architecture,
  archive,
  exports,
  naming,
  sources,
  verify,
  weights,
  writers,
)

CONFIGS = {**test_weights.CONFIGS, "wide": test_sources.WIDE}


def _clip(model, tokenizer=None):
  variables = test_sources._random_variables(model)
  if "batch_stats" in variables:
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
  config = c.Config(model=model, preprocess=c.Preprocess(mean=(0.1, 0.2, 0.3)))
  params = jax.tree.map(jax.numpy.asarray, variables["params"])
  return inference.Clip(config, params, tokenizer, batch_stats=variables.get("batch_stats"))


def _same(a, b):
  assert a.config.model == b.config.model
  jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
  jax.tree.map(np.testing.assert_array_equal, a.batch_stats, b.batch_stats)


@pytest.mark.parametrize("name", CONFIGS)
def test_open_clip_and_back_is_exact(tmp_path, name):
  model = _clip(architecture.from_open_clip_config(CONFIGS[name]))
  exports.export(model, tmp_path / "out", "open_clip")
  back = sources.load(tmp_path / "out")
  _same(back, model)
  assert back.preprocess == model.preprocess
  assert verify.compare(model, tmp_path / "out", "open_clip")[0].largest_difference < 1e-6
  written = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]
  theirs = open_clip_alone.module("model").CLIP(**copy.deepcopy(written), output_dict=False)
  arrays = archive.read(tmp_path / "out" / "open_clip_model.safetensors").arrays
  state = {key: torch.tensor(array) for key, array in arrays.items()}
  theirs.load_state_dict(state, strict=True)
  test_sources._close(model, theirs.eval(), CONFIGS[name], 2e-6)


@pytest.mark.parametrize("name", ["wide", "resnet_wide"])
def test_openai_is_what_its_builder_takes(tmp_path, name):
  config = CONFIGS.get(name) or {
    **test_weights.RESNET,
    "quick_gelu": True,
    "text_cfg": {**test_weights.TEXT, "width": 64, "heads": 1},
  }
  model = _clip(architecture.from_open_clip_config(config))
  exports.export(model, tmp_path / "out.pt", "openai")
  state = torch.load(tmp_path / "out.pt", weights_only=True)
  build = open_clip_alone.module("model").build_model_from_openai_state_dict
  theirs = build(dict(state), cast_dtype=torch.float32).float()
  for size in naming.OPENAI_SIZES:
    del state[size]
  theirs.load_state_dict(state)  # the builder rounds to half precision
  test_sources._close(model, theirs, config, 2e-6)
  (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": test_weights.TEXT}))
  _same(sources.load(tmp_path / "out.pt"), model)  # whatever lies beside it
  assert verify.compare(model, tmp_path / "out.pt", "openai")[0].agrees
  (tmp_path / "open_clip_config.json").unlink()
  with pytest.raises(weights.WeightsError, match="one of OpenAI's own files"):
    exports.export(model, tmp_path / "ViT-B-32.pt", "openai")
  assert list(tmp_path.iterdir()) == [tmp_path / "out.pt"]


@pytest.mark.parametrize("siglip", [False, True])
def test_hugging_face_and_back_is_exact(tmp_path, siglip):
  if siglip:
    model = _clip(test_weights._tiny_siglip())
  else:
    model = _clip(architecture.from_open_clip_config(CONFIGS["wide"]), tokenizer_lib.original())
  exports.export(model, tmp_path / "out", "huggingface")
  back = sources.load(tmp_path / "out")
  _same(back, model)
  assert back.preprocess == model.preprocess
  assert (back.tokenizer is None) == siglip
  own, theirs = verify.compare(model, tmp_path / "out", "huggingface")
  assert own.largest_difference < 1e-6
  if theirs.largest_difference is None:  # tests/interop has transformers
    assert "transformers is not installed" in str(theirs)
  else:
    assert theirs.largest_difference < 1e-5


@pytest.mark.parametrize("format", ["open_clip", "huggingface"])
def test_a_trained_vocabulary_comes_along(tmp_path, format):
  """Smaller than the model's table of embeddings, so the end token is not its last row."""
  tokenizer = tokenizer_lib.train(["a red circle", "a blue square", "two green rings"], 600)
  model = architecture.from_open_clip_config(CONFIGS["wide"])
  text = dataclasses.replace(model.text, vocab_size=700)
  model = _clip(dataclasses.replace(model, text=text), tokenizer)
  exports.export(model, tmp_path / "out", format)
  back = sources.load(tmp_path / "out")
  assert back.tokenizer == tokenizer
  np.testing.assert_array_equal(back.encode_text("two rings"), model.encode_text("two rings"))
  if format == "huggingface":
    written = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert written["eos_token_id"] == tokenizer.end_id < 699
    for found in verify.compare(model, tmp_path / "out", format):
      assert found.largest_difference is None or found.largest_difference < 1e-5


def _changed(model, **image):
  return dataclasses.replace(model, image=dataclasses.replace(model.image, **image))


@pytest.mark.parametrize(
  ("name", "format", "message"),
  [
    ("resnet", "huggingface", "transformers has no CLIP with a ResNet"),
    ("vit", "openai", "knows only quick_gelu"),
    ("vit_quick_gelu", "openai", "heads of width 64 only"),
  ],
)
def test_what_a_format_does_not_hold_is_refused(tmp_path, name, format, message):
  model = _clip(architecture.from_open_clip_config(CONFIGS[name]))
  with pytest.raises(weights.WeightsError, match=message):
    exports.export(model, tmp_path / "out", format)
  assert not list(tmp_path.iterdir())


def test_siglip_and_own_stems_are_refused():
  siglip = test_weights._tiny_siglip()
  for format in ("openai", "open_clip"):
    with pytest.raises(weights.WeightsError, match="use huggingface"):
      exports.refuse(siglip, format)
  own = _changed(architecture.from_open_clip_config(CONFIGS["vit"]), stem="convolution")
  for format in ("openai", "open_clip", "huggingface"):
    with pytest.raises(weights.WeightsError, match="no convolutional stem"):
      exports.refuse(own, format)


def test_nothing_half_written(tmp_path, monkeypatch):
  model = _clip(architecture.from_open_clip_config(CONFIGS["vit"]))
  (tmp_path / "file").write_text("mine")
  with pytest.raises(weights.WeightsError, match="is there already"):
    exports.export(model, tmp_path / "file", "open_clip")
  with pytest.raises(weights.WeightsError, match="cannot be written"):
    exports.export(model, tmp_path / "file" / "out", "open_clip")

  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(writers, "json_file", full)
  with pytest.raises(weights.WeightsError, match="No space left"):
    exports.export(model, tmp_path / "out", "open_clip")
  broken = jax.tree.map(lambda x: x, model.params) | {"log_scale": jax.numpy.float32(np.nan)}
  model.params = broken
  with pytest.raises(weights.WeightsError, match="NaN or infinity: params/log_scale"):
    exports.export(model, tmp_path / "out", "open_clip")
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_help_names_all_formats():
  assert cli_options.FORMATS == exports.FORMATS == tuple(verify._RUNTIMES)


def test_export_from_the_command_line(tmp_path, capsys):
  sources.save(_clip(architecture.from_open_clip_config(CONFIGS["vit"])), tmp_path / "in")
  words = ["export", str(tmp_path / "in"), str(tmp_path / "out"), "--format", "open_clip"]
  assert cli.main([*words, "--json"]) == 0
  read = json.loads(capsys.readouterr().out)["read_back"]
  assert read[0]["runtime"] == "clip_jax"
  assert read[0]["largest_difference"] < 1e-6
  assert cli.main(words) == 2
  assert "is there already" in capsys.readouterr().err


def test_rounding_to_bfloat16_is_not_taken_for_a_difference(tmp_path):
  model = _clip(architecture.from_open_clip_config(CONFIGS["vit"]))
  config = dataclasses.replace(model.config.model, compute_dtype="bfloat16")
  model.config = dataclasses.replace(model.config, model=config)
  exports.export(model, tmp_path / "out", "open_clip")
  assert verify.compare(model, tmp_path / "out", "open_clip")[0].largest_difference < 1e-6


def test_a_file_that_differs_is_no_success(tmp_path, capsys, monkeypatch):
  model = _clip(architecture.from_open_clip_config(CONFIGS["vit"]))
  sources.save(model, tmp_path / "in")
  monkeypatch.setattr(verify, "compare", lambda *_: [verify.Comparison("it", 0.1)])
  words = ["export", str(tmp_path / "in"), str(tmp_path / "out"), "--format", "open_clip"]
  assert cli.main(words) == 2
  assert "not the same when read back: it: embeddings differ by 1.0e-01" in capsys.readouterr().err
