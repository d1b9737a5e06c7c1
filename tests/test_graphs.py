"""Graphs handed on. Here StableHLO, which JAX itself reads; tests/interop: ONNX and SavedModel."""

import importlib.util
import json
import subprocess

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import cli, inference
from clip_jax import config as c
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.interop import architecture, archive, exports, graphs, verify, weights
from tools import golden_open_clip, golden_siglip

NAMES = [*golden_open_clip.CONFIGS, "siglip"]


def tiny(name, tokenizer=None):
  """A small model of each kind, weights and statistics at random, of CLIP or of SigLIP."""
  if name == "siglip":
    model = golden_siglip.TINY
    variables = {"params": golden_siglip.random_params(model, 0)}
  else:
    model = architecture.from_open_clip_config(golden_open_clip.CONFIGS[name])
    variables = golden_open_clip.random_variables(model, 0)
  variables = jax.tree.map(jnp.asarray, variables)
  config = c.Config(model=model)
  return inference.Clip(
    config, variables["params"], tokenizer, batch_stats=variables.get("batch_stats")
  )


def inputs(model, images, texts):
  """(image_BRR3, tokens_BL), as many as asked for."""
  m, rng = model.config.model, np.random.default_rng(7)
  side, length = m.image.resolution, m.text.context_length
  image_BRR3 = rng.normal(size=(images, side, side, 3)).astype(np.float32)
  tokens_BL = rng.integers(1, m.text.vocab_size - 1, (texts, length)).astype(np.int32)
  tokens_BL[np.arange(texts), rng.integers(2, length, texts)] = m.text.vocab_size - 1
  return image_BRR3, tokens_BL


def check(model, run, channels_first=False):
  """`run(graph, *inputs)` gives our embeddings and logits, for any number of images and texts."""
  for images, texts in ((1, 1), (5, 2)):
    image_BRR3, tokens_BL = inputs(model, images, texts)
    pixels = image_BRR3.transpose(0, 3, 1, 2).copy() if channels_first else image_BRR3
    image_BE, text_BE = model.encode_image(image_BRR3), model.encode_text(tokens_BL)
    logits_BB = model.logit_scale * image_BE @ text_BE.T + float(model.params.get("logit_bias", 0))
    np.testing.assert_allclose(run("image_encoder", pixels)[0], image_BE, atol=2e-6)
    np.testing.assert_allclose(run("text_encoder", tokens_BL)[0], text_BE, atol=2e-6)
    both = run("clip", pixels, tokens_BL)
    np.testing.assert_allclose(both[0], logits_BB, atol=1e-4)
    np.testing.assert_allclose(both[1], logits_BB.T, atol=1e-4)
    np.testing.assert_allclose(both[2], text_BE, atol=2e-6)
    np.testing.assert_allclose(both[3], image_BE, atol=2e-6)


@pytest.mark.parametrize("name", ["vit_quick_gelu", "resnet", "siglip"])
def test_stablehlo(tmp_path, name):
  model, out = tiny(name), tmp_path / "out"
  exports.export(model, out, "stablehlo")
  arrays = dict(archive.read(out / "weights.safetensors").arrays)
  for path, leaf in weights.flat(model.variables).items():
    np.testing.assert_array_equal(arrays[path], leaf)
  read = {
    name: jax.export.deserialize(bytearray((out / f"{name}.stablehlo").read_bytes()))
    for name in ("image_encoder", "text_encoder", "clip")
  }
  assert all(graph.platforms == ("cpu", "cuda", "tpu") for graph in read.values())
  check(model, lambda graph, *x: read[graph].call(arrays, *x))
  assert verify.compare(model, out, "stablehlo")[0].largest_difference < 2e-6


def check_that_another_program_is_refused(out):
  path = out / "text_encoder.stablehlo"
  data, beside = path.read_bytes(), path.with_name(path.name + ".sha256")
  path.write_bytes((out / "image_encoder.stablehlo").read_bytes())
  with pytest.raises(
    weights.WeightsError, match=r"text_encoder\.stablehlo: its sha256 is \w{64}, w"
  ):
    graphs.read_stablehlo(path)
  beside.unlink()
  graphs.read_stablehlo(path)  # without a sum it is taken
  path.write_bytes(data[:-200])
  with pytest.raises(
    weights.WeightsError, match=r"jax .* does not read it .*: install that one, or"
  ):
    graphs.read_stablehlo(path)
  path.write_bytes(data)


def test_a_graph_of_a_newer_jax_is_refused(tmp_path, monkeypatch):
  one = jax.ShapeDtypeStruct((), jnp.float32)
  exported = jax.export.export(jax.jit(jnp.sin))(one)
  (tmp_path / "g.stablehlo").write_bytes(exported.serialize())
  assert float(graphs.read_stablehlo(tmp_path / "g.stablehlo").call(jnp.float32(0))) == 0
  version = exported.calling_convention_version
  monkeypatch.setattr(jax.export, "maximum_supported_calling_convention_version", version - 1)
  told = (
    f"g.stablehlo: jax {jax.__version__} does not read it .its calling convention is {version}, "
  )
  with pytest.raises(weights.WeightsError, match=told):
    graphs.read_stablehlo(tmp_path / "g.stablehlo")


def test_what_lies_beside_the_graphs(tmp_path):
  model = tiny("vit_gelu", tokenizer_lib.original())
  exports.export(model, tmp_path / "out", "stablehlo")
  names = {path.name for path in (tmp_path / "out").iterdir()}
  sums = sorted(name for name in names if name.endswith(".sha256"))
  assert sums == [f"{name}.stablehlo.sha256" for name in ("clip", "image_encoder", "text_encoder")]
  said = subprocess.run(
    ["sha256sum", "--check", "--strict", *sums],
    cwd=tmp_path / "out",
    capture_output=True,
    text=True,
  )
  assert said.stdout == "".join(f"{name.removesuffix('.sha256')}: OK\n" for name in sums), said
  check_that_another_program_is_refused(tmp_path / "out")
  assert {"graphs.json", "preprocessor_config.json", "vocab.json", "merges.txt"} < names
  facts = json.loads((tmp_path / "out" / "graphs.json").read_text())
  assert facts["graphs"]["image_encoder"] == {
    "inputs": ["pixel_values"],
    "outputs": ["image_embeds"],
  }
  assert facts["pixel_values"] == "float32 ['images', 40, 40, 3], normalised"


def test_scans_are_unrolled_and_constants_folded():
  """Against the function itself; nothing of the loop or of the mask is left to compute."""
  weights_LDD = np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32)

  def function(x_BD):
    def layer(x_BD, weight_DD):
      return jnp.where(jnp.arange(4)[None] < 3, jnp.tanh(x_BD @ weight_DD), 0.5), None

    return jax.lax.scan(jax.checkpoint(layer), x_BD, jnp.asarray(weights_LDD))[0]

  x_BD = np.ones((2, 4), np.float32)
  closed = jax.make_jaxpr(function)(x_BD)
  inlined = jax.make_jaxpr(lambda x: graphs.inline(closed.jaxpr, closed.consts, [x]))(x_BD)
  text = str(inlined)
  assert text.count("dot_general") == text.count("tanh") == 3
  assert not any(word in text for word in ("scan", "remat", "checkpoint", "iota", " lt "))
  np.testing.assert_allclose(
    graphs.inline(closed.jaxpr, closed.consts, [x_BD])[0], function(x_BD), atol=1e-6
  )


@pytest.mark.parametrize(("format", "module"), [("onnx", "jax2onnx"), ("savedmodel", "tensorflow")])
def test_a_missing_extra_is_told(tmp_path, monkeypatch, format, module):
  found = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == module else found(name)
  )
  told = f"{format}: {module} is not installed; in the checkout, pip"
  with pytest.raises(weights.WeightsError, match=told):
    exports.export(tiny("vit_gelu"), tmp_path / "out", format)
  assert not list(tmp_path.iterdir())


def test_a_missing_runtime_is_told(tmp_path, monkeypatch):
  model = tiny("vit_gelu")
  exports.export(model, tmp_path / "out", "stablehlo")

  def missing(*_):
    raise ModuleNotFoundError(name="onnxruntime")

  monkeypatch.setitem(verify._RUNTIMES, "stablehlo", missing)
  (found,) = verify.compare(model, tmp_path / "out", "stablehlo")
  assert str(found) == "not checked: stablehlo: onnxruntime is not installed"


def test_broken_weights_and_places_are_refused(tmp_path):
  model = tiny("vit_gelu")
  model.params["image"]["ln_pre"]["scale"] = jnp.full(32, jnp.nan)
  with pytest.raises(weights.WeightsError, match="NaN or infinity: params/image/ln_pre/scale"):
    exports.export(model, tmp_path / "out", "stablehlo")
  assert not list(tmp_path.iterdir())
  (tmp_path / "file").write_text("")
  with pytest.raises(weights.WeightsError, match="cannot be written"):
    exports.export(tiny("vit_gelu"), tmp_path / "file" / "out", "stablehlo")


def test_from_the_command_line(tmp_path, capsys):
  from clip_jax.interop import sources

  sources.save(tiny("vit_gelu"), tmp_path / "weights")
  words = ["export", str(tmp_path / "weights"), str(tmp_path / "out"), "--format", "stablehlo"]
  assert cli.main([*words, "--json"]) == 0
  (read,) = json.loads(capsys.readouterr().out)["read_back"]
  assert read["runtime"].startswith("jax.export")
  assert read["largest_difference"] < 2e-6
  assert cli.main(words) == 2
  assert "is there already" in capsys.readouterr().err
