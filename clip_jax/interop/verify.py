"""What was written, read back by the framework it is for, where that is installed.

torch, open_clip and transformers are imported here only, and only to compare.
"""

import dataclasses
import importlib
import pathlib
from typing import Any

import jax
import numpy as np

from clip_jax import inference
from clip_jax.interop import archive, exports, graphs, naming, sources


@dataclasses.dataclass(frozen=True)
class Comparison:
  """How far the other framework's embeddings are from ours, or why that is not known."""

  runtime: str  # name and version, or what is missing
  largest_difference: float | None

  @property
  def agrees(self) -> bool:
    """Whether the difference is one of rounding."""
    return self.largest_difference is not None and self.largest_difference < 1e-4

  def __str__(self) -> str:
    if self.largest_difference is None:
      return f"not checked: {self.runtime}"
    return f"{self.runtime}: embeddings differ by {self.largest_difference:.1e} at most"


def compare(model: inference.Clip, dest: pathlib.Path, format: str) -> list[Comparison]:
  """Reads `dest` back: always with our own reader, and with `format`'s runtime where it is.

  On three random images and texts; the differences are of unit-norm embeddings.
  """
  rng = np.random.default_rng(0)
  m = model.config.model
  image_NRR3 = rng.normal(size=(3, m.image.resolution, m.image.resolution, 3)).astype(np.float32)
  end = exports.last_token(model)
  tokens_NL = rng.integers(1, end - 1, (3, m.text.context_length)).astype(np.int32)
  tokens_NL[:, -2] = end  # and one more behind it, which must not matter to CLIP
  ours = _float32(model, image_NRR3, tokens_NL)
  found = []
  if format not in graphs.FORMATS:
    again = _float32(sources.load(dest), image_NRR3, tokens_NL)
    found.append(Comparison("clip_jax", _largest(ours, again)))
  try:
    version, embeddings = _RUNTIMES[format](dest, image_NRR3, tokens_NL)
  except ImportError as error:
    missing = Comparison(f"{format}: {error.name or error} is not installed", None)
    return [*found, missing]
  return [*found, Comparison(version, _largest(ours, embeddings))]


def _float32(
  model: inference.Clip, image_NRR3: np.ndarray, tokens_NL: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Both embeddings without the rounding of bfloat16, which some devices compute in."""
  plain = dataclasses.replace(model.config.model, compute_dtype="float32", residual_dtype="float32")
  config = dataclasses.replace(model.config, model=plain)
  exact = inference.Clip(config, model.params, None, batch_stats=model.batch_stats)
  return exact.encode_image(image_NRR3), exact.encode_text(tokens_NL)


def _largest(a: Any, b: Any) -> float:
  return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def _open_clip(
  dest: pathlib.Path, image_NRR3: np.ndarray, tokens_NL: np.ndarray
) -> tuple[str, tuple[np.ndarray, np.ndarray]]:
  """open_clip's model of the same config, or of OpenAI's builder, with the weights of `dest`."""
  torch, open_clip = importlib.import_module("torch"), importlib.import_module("open_clip")
  if dest.is_file():
    state = torch.load(dest, weights_only=True)
    build = open_clip.model.build_model_from_openai_state_dict
    theirs = build(dict(state), cast_dtype=torch.float32).float()
    for name in naming.OPENAI_SIZES:
      del state[name]
    theirs.load_state_dict(state)  # the builder rounds to half precision
  else:
    theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{dest.absolute()}")
  with torch.no_grad():
    image = torch.tensor(image_NRR3).permute(0, 3, 1, 2)
    embeddings = (
      theirs.float().eval().encode_image(image, normalize=True).numpy(),
      theirs.encode_text(torch.tensor(tokens_NL).long(), normalize=True).numpy(),
    )
  return f"open_clip {open_clip.__version__}", embeddings


def _transformers(
  dest: pathlib.Path, image_NRR3: np.ndarray, tokens_NL: np.ndarray
) -> tuple[str, tuple[np.ndarray, np.ndarray]]:
  torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
  transformers.utils.logging.disable_progress_bar()
  theirs = transformers.AutoModel.from_pretrained(dest).eval()
  with torch.no_grad():
    image = torch.tensor(image_NRR3).permute(0, 3, 1, 2)
    out = theirs(pixel_values=image, input_ids=torch.tensor(tokens_NL).long())
  embeddings = out.image_embeds.numpy(), out.text_embeds.numpy()
  return f"transformers {transformers.__version__}", embeddings


def _onnxruntime(
  dest: pathlib.Path, image_NRR3: np.ndarray, tokens_NL: np.ndarray
) -> tuple[str, tuple[np.ndarray, np.ndarray]]:
  runtime = importlib.import_module("onnxruntime")
  inputs = {
    "pixel_values": image_NRR3.transpose(0, 3, 1, 2).copy(),
    "input_ids": tokens_NL.astype(np.int64),
  }

  def run(graph: str, names: list[str]) -> list[np.ndarray]:
    graphs.check_sha256(path := dest / f"{graph}.onnx")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {name: inputs[name] for name in names})

  (image_NE,), (text_NE,) = (
    run("image_encoder", ["pixel_values"]),
    run("text_encoder", ["input_ids"]),
  )
  both = run("clip", ["pixel_values", "input_ids"])
  return f"onnxruntime {runtime.__version__}", _agreeing(image_NE, text_NE, both[3], both[2])


def _jax_export(
  dest: pathlib.Path, image_NRR3: np.ndarray, tokens_NL: np.ndarray
) -> tuple[str, tuple[np.ndarray, np.ndarray]]:
  arrays = archive.read(dest / "weights.safetensors").arrays

  def run(graph: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
    exported = graphs.read_stablehlo(dest / f"{graph}.stablehlo")
    return tuple(np.asarray(x) for x in exported.call(dict(arrays), *inputs))

  (image_NE,), (text_NE,) = run("image_encoder", image_NRR3), run("text_encoder", tokens_NL)
  both = run("clip", image_NRR3, tokens_NL)
  return f"jax.export {jax.__version__}", _agreeing(image_NE, text_NE, both[3], both[2])


def _tensorflow(
  dest: pathlib.Path, image_NRR3: np.ndarray, tokens_NL: np.ndarray
) -> tuple[str, tuple[np.ndarray, np.ndarray]]:
  tf = importlib.import_module("tensorflow")
  graphs.check_sha256(dest / "saved_model.pb")
  signatures = tf.saved_model.load(str(dest)).signatures
  image = signatures["image_encoder"](pixel_values=tf.constant(image_NRR3))["image_embeds"].numpy()
  text = signatures["text_encoder"](input_ids=tf.constant(tokens_NL))["text_embeds"].numpy()
  both = signatures["serving_default"](
    pixel_values=tf.constant(image_NRR3), input_ids=tf.constant(tokens_NL)
  )
  embeddings = both["image_embeds"].numpy(), both["text_embeds"].numpy()
  return f"tensorflow {tf.__version__}", _agreeing(image, text, *embeddings)


def _agreeing(
  image_NE: np.ndarray, text_NE: np.ndarray, image_too: np.ndarray, text_too: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Both encoders' embeddings; the whole model's where those are further from each other."""
  return np.stack([image_NE, image_too]), np.stack([text_NE, text_too])


_RUNTIMES = {
  "openai": _open_clip,
  "open_clip": _open_clip,
  "huggingface": _transformers,
  "onnx": _onnxruntime,
  "stablehlo": _jax_export,
  "savedmodel": _tensorflow,
}
