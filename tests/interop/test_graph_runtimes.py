"""Exported graphs in the runtimes that they are for: onnxruntime, and TensorFlow."""

import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
import test_graphs

from clip_jax.interop import exports, verify

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
    return sessions[graph].run(None, dict(zip(names, inputs, strict=True)))

  side, length = model.resolution, model.config.model.text.context_length
  pixels, tokens = sessions["clip"].get_inputs()
  assert (pixels.name, pixels.shape) == ("pixel_values", ["images", 3, side, side])
  assert (tokens.name, tokens.shape) == ("input_ids", ["texts", length])
  names = [each.name for each in sessions["clip"].get_outputs()]
  assert names == ["image_embeds", "text_embeds", "logits_per_image"]
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
    names = sorted(signatures[graph].structured_input_signature[1], reverse=True)  # pixels first
    found = signatures[graph](**{n: tf.constant(x) for n, x in zip(names, inputs, strict=True)})
    order = ("image_embeds", "text_embeds", "logits_per_image")
    return [np.asarray(found[key]) for key in order if key in found]

  test_graphs.check(model, run)
  (found,) = verify.compare(model, out, "savedmodel")
  print(name, found)
  assert found.largest_difference < 1e-5
