"""Our weights -> the files of other frameworks, written whole or not at all.

`export` writes `openai` (a state dict in a .pt file), `open_clip` or `huggingface` (folders), and
needs nothing of those frameworks; graphs (onnx, stablehlo, savedmodel) are graphs.py's.
`verify.py` compares the result where its framework is installed.
"""

import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from clip_jax import inference
from clip_jax.config import Model
from clip_jax.data import bytepairs
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.interop import graphs, naming, sources, weights, writers
from clip_jax.interop.architecture import WeightsError

FORMATS = ("openai", "open_clip", "huggingface", *graphs.FORMATS)


def export(model: inference.Clip, dest: pathlib.Path, format: str) -> None:
  """Writes `dest`: a file for openai, a new folder otherwise.

  Raises: WeightsError when the format has no such model, `dest` is there already or cannot be
    written, or the weights hold NaN.
  """
  refuse(model.config.model, format)
  if format == "openai" and dest.suffix == ".pt" and dest.stem in sources.RELEASED:
    raise WeightsError(f"{dest}: is the name of one of OpenAI's own files; give another")
  with writers.whole(dest, file=format == "openai") as folder:
    if format == "openai":
      arrays = _arrays(model, naming.openai)
      extra = {**_counts(arrays), **_sizes(model.config.model)}
      writers.torch_archive(folder / dest.name, {**arrays, **extra})
    elif format == "open_clip":
      _open_clip(model, _arrays(model, naming.openai), folder)
      if model.tokenizer not in (None, tokenizer_lib.original()):  # open_clip has the original's
        _tokenizer_files(model, folder)
    elif format == "huggingface":
      _huggingface(model, _arrays(model, naming.huggingface), folder)
      _inputs_files(model, folder)
    else:
      graphs.write(model, folder, format)
      _inputs_files(model, folder)


def _arrays(
  model: inference.Clip, naming_of: Callable[[Model], list[naming.Weight]]
) -> dict[str, np.ndarray]:
  return weights.to_theirs(model.variables, naming_of(model.config.model))


def refuse(model: Model, format: str) -> None:
  """Raises: WeightsError when `format` cannot hold the model, with the reason."""
  if format in graphs.FORMATS:
    graphs.check(format)
    return
  image, siglip = model.image, model.image.pooling == "map"
  if image.stem != "patch":
    raise WeightsError(f"{format}: has no convolutional stem (config.model.image.stem)")
  if format == "huggingface":
    if image.blocks:
      raise WeightsError("huggingface: transformers has no CLIP with a ResNet; use open_clip")
    if not siglip and model.text.pooling != "end":
      raise WeightsError("huggingface: no model mixes CLIP's image and SigLIP's text encoder")
    return
  if siglip or model.text.pooling != "end" or model.activation == "gelu_tanh":
    raise WeightsError(f"{format}: SigLIP's encoders are not in it; use huggingface")
  if format == "openai":
    if model.activation != "quick_gelu":
      raise WeightsError("openai: its code knows only quick_gelu; use open_clip")
    narrow = model.text.heads * 64 != model.text.width
    if narrow or (not image.blocks and image.heads * 64 != image.width):
      raise WeightsError("openai: its code has heads of width 64 only; use open_clip")
    if image.mlp_width or model.text.mlp_width:
      raise WeightsError("openai: its code has MLPs of four times the width only; use open_clip")


def _counts(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """PyTorch's BatchNorm counts its batches, which nothing reads at this momentum: 0."""
  return {
    name.replace("running_mean", "num_batches_tracked"): np.array(0, np.int64)
    for name in arrays
    if name.endswith(".running_mean")
  }


def _sizes(model: Model) -> dict[str, np.ndarray]:
  """By which our reader, too, knows OpenAI's own code: QuickGELU and heads of width 64."""
  values = (model.image.resolution, model.text.context_length, model.text.vocab_size)
  return {
    name: np.array(value, np.int64) for name, value in zip(naming.OPENAI_SIZES, values, strict=True)
  }


def _open_clip(model: inference.Clip, arrays: dict[str, np.ndarray], folder: pathlib.Path) -> None:
  m, p = model.config.model, model.preprocess
  image: dict[str, Any] = {"image_size": m.image.resolution, "width": m.image.width}
  if m.image.blocks:
    image |= {"layers": list(m.image.blocks), "head_width": 32 * m.image.width // m.image.heads}
  else:
    image |= {"layers": m.image.layers, "patch_size": m.image.patch}
    image["head_width"] = m.image.width // m.image.heads
    image |= _mlp_ratio(m.image.width, m.image.mlp_width)
  text = {
    "context_length": m.text.context_length,
    "vocab_size": m.text.vocab_size,
    "width": m.text.width,
    "heads": m.text.heads,
    "layers": m.text.layers,
    **_mlp_ratio(m.text.width, m.text.mlp_width),
  }
  config = {
    "model_cfg": {
      "embed_dim": m.embed_dim,
      "quick_gelu": m.activation == "quick_gelu",
      "vision_cfg": image,
      "text_cfg": text,
    },
    "preprocess_cfg": {
      "size": m.image.resolution,
      "mode": "RGB",
      "mean": list(p.mean),
      "std": list(p.std),
      "interpolation": "bicubic",
      "resize_mode": p.resize,
    },
  }
  writers.safetensors(folder / "open_clip_model.safetensors", {**arrays, **_counts(arrays)})
  writers.json_file(folder / "open_clip_config.json", config)


def _mlp_ratio(width: int, mlp_width: int) -> dict[str, float]:
  """The ratio from which `int(width * ratio)` gives the width of the MLP back."""
  if not mlp_width:
    return {}
  ratio = mlp_width / width
  return {"mlp_ratio": ratio if int(width * ratio) == mlp_width else math.nextafter(ratio, 99)}


_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def _huggingface(
  model: inference.Clip, arrays: dict[str, np.ndarray], folder: pathlib.Path
) -> None:
  m = model.config.model
  siglip, side = m.image.pooling == "map", m.image.resolution
  shared = {"hidden_act": _ACTIVATIONS[m.activation], "layer_norm_eps": m.norm_epsilon}
  text = {**shared, **_tower(m.text), "vocab_size": m.text.vocab_size}
  text["max_position_embeddings"] = m.text.context_length
  image = {**shared, **_tower(m.image), "image_size": side, "patch_size": m.image.patch}
  if siglip:
    text["projection_size"] = m.embed_dim
  else:
    end = last_token(model)
    ids = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    text |= ids | {"projection_dim": m.embed_dim}
    image["projection_dim"] = m.embed_dim
  kind = "Siglip" if siglip else "CLIP"
  config: dict[str, Any] = {
    "architectures": [f"{kind}Model"],
    "model_type": kind.lower(),
    "dtype": "float32",
    "text_config": {**text, "model_type": f"{kind.lower()}_text_model"},
    "vision_config": {**image, "model_type": f"{kind.lower()}_vision_model"},
  }
  if not siglip:
    config["projection_dim"] = m.embed_dim
  writers.safetensors(folder / "model.safetensors", arrays)
  writers.json_file(folder / "config.json", config)


def last_token(model: inference.Clip) -> int:
  """The id that ends a text. A trained vocabulary may be smaller than the model's table."""
  size = model.config.model.text.vocab_size
  return size - 1 if model.tokenizer is None else model.tokenizer.end_id


def _inputs_files(model: inference.Clip, folder: pathlib.Path) -> None:
  """What transformers' processors read: how pixels and tokens are made."""
  p, side = model.preprocess, model.config.model.image.resolution
  kind = "Siglip" if model.config.model.image.pooling == "map" else "CLIP"
  size: dict[str, Any] = {"height": side, "width": side}
  processor = {
    "image_processor_type": f"{kind}ImageProcessor",
    "processor_class": f"{kind}Processor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": size if p.resize == "squash" else {"shortest_edge": side},
    "resample": 3,
    "do_center_crop": p.resize == "shortest",
    "crop_size": size,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(p.mean),
    "image_std": list(p.std),
  }
  writers.json_file(folder / "preprocessor_config.json", processor)
  if model.tokenizer is not None:
    _tokenizer_files(model, folder)


def _tower(tower: Any) -> dict[str, int]:
  return {
    "hidden_size": tower.width,
    "intermediate_size": tower.mlp_width or 4 * tower.width,
    "num_hidden_layers": tower.layers,
    "num_attention_heads": tower.heads,
  }


def _tokenizer_files(model: inference.Clip, folder: pathlib.Path) -> None:
  """What transformers' CLIPTokenizer reads; its two special tokens have names of their own."""
  assert model.tokenizer is not None
  symbols = [*bytepairs.symbol_table(model.tokenizer.merges), "<|startoftext|>", "<|endoftext|>"]
  writers.json_file(folder / "vocab.json", {symbol: index for index, symbol in enumerate(symbols)})
  lines = ["#version: 0.2", *(" ".join(pair) for pair in model.tokenizer.merges)]
  (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
  special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
  special |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
  writers.json_file(folder / "special_tokens_map.json", special)
  length = model.config.model.text.context_length
  more = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True}
  writers.json_file(folder / "tokenizer_config.json", {**special, **more})
