"""Exported graphs in the runtimes that they are for: onnxruntime, and TensorFlow."""

import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
import test_graphs

from clip_jax.interop import exports, graphs, verify

OUTPUTS = ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]

pytestmark = pytest.mark.filterwarnings("default")  # theirs to keep


@pytest.mark.parametrize("name", test_graphs.NAMES)
def test_onnx(tmp_path, name):
  model, out = test_graphs.tiny(name), tmp_path / "out"
  exports.export(model, out, "onnx")
  sessions = {
    path.stem: onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for path in out.glob("*.onnx")
  }
  assert set(sessions) == {"image_encoder", "text_encoder", "clip"}

  def run(graph, *inputs):
    names = [each.name for each in sessions[graph].get_inputs()]
    wide = [x.astype(np.int64) if x.dtype == np.int32 else x for x in inputs]
    return sessions[graph].run(None, dict(zip(names, wide, strict=True)))

  side, length = model.resolution, model.config.model.text.context_length
  pixels, tokens = sessions["clip"].get_inputs()
  assert (pixels.name, pixels.shape) == ("pixel_values", ["images", 3, side, side])
  assert (tokens.name, tokens.shape) == ("input_ids", ["texts", length])
  names = [each.name for each in sessions["clip"].get_outputs()]
  assert names == OUTPUTS
  test_graphs.check(model, run, channels_first=True)
  (found,) = verify.compare(model, out, "onnx")
  print(name, found)
  assert found.largest_difference < 1e-5


@pytest.mark.parametrize("name", test_graphs.NAMES)
def test_savedmodel(tmp_path, name):
  model, out = test_graphs.tiny(name), tmp_path / "out"
  exports.export(model, out, "savedmodel")
  signatures = tf.saved_model.load(str(out)).signatures

  def run(graph, *inputs):
    signature = signatures["serving_default" if graph == "clip" else graph]
    names = sorted(signature.structured_input_signature[1], reverse=True)  # pixels first
    found = signature(**{n: tf.constant(x) for n, x in zip(names, inputs, strict=True)})
    return [np.asarray(found[key]) for key in OUTPUTS if key in found]

  test_graphs.check(model, run)
  (found,) = verify.compare(model, out, "savedmodel")
  print(name, found)
  assert found.largest_difference < 1e-5


def test_onnx_past_two_gigabytes_has_its_weights_beside_it(tmp_path, monkeypatch):
  monkeypatch.setattr(graphs, "_ONE_FILE_BYTES", 1000)
  model, out = test_graphs.tiny("vit_gelu"), tmp_path / "out"
  exports.export(model, out, "onnx")
  assert (out / "clip.onnx.data").stat().st_size > 10 * (out / "clip.onnx").stat().st_size / 100
  (found,) = verify.compare(model, out, "onnx")
  assert found.largest_difference < 1e-5


def test_products_with_weights_are_plain_in_onnx(tmp_path):
  """onnxruntime lays their matrices out once; the converter alone writes Einsum for each."""
  exports.export(test_graphs.tiny("vit_gelu"), tmp_path / "out", "onnx")
  graph = onnx.load(tmp_path / "out" / "clip.onnx").graph
  constants = {each.name for each in graph.initializer}
  for node in graph.node:
    assert node.op_type != "Einsum" or not constants & set(node.input), node.name
