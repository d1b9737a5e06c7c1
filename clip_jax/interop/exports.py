"""Our weights -> the files of other frameworks, written whole or not at all.

`export` writes `openai` (a state dict in a .pt file), `open_clip` or `huggingface` (folders), and
needs nothing of those frameworks; `verify.py` compares the result where they are installed.
"""

import json
import math
import pathlib
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from clip_jax import inference
from clip_jax.config import Model
from clip_jax.data import bytepairs
from clip_jax.interop import naming, weights
from clip_jax.interop.architecture import WeightsError

FORMATS = ("openai", "open_clip", "huggingface")


def export(model: inference.Clip, dest: pathlib.Path, format: str) -> None:
  """Writes `dest`: a file for openai, a new folder otherwise.

  Raises: WeightsError when the format has no such model, `dest` is there already or cannot be
    written, or the weights hold NaN.
  """
  refuse(model.config.model, format)
  if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
    raise WeightsError(f"{dest}: is there already; give a new name")
  table = (naming.huggingface if format == "huggingface" else naming.openai)(model.config.model)
  variables = {"params": model.params}
  if model.batch_stats:
    variables["batch_stats"] = model.batch_stats
  arrays = weights.to_theirs(variables, table)
  try:
    dest.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
  except OSError as error:
    raise WeightsError(f"{dest}: cannot be written ({error.strerror})") from error
  try:
    if format == "openai":
      torch_archive(unfinished / dest.name, {**arrays, **_counts(arrays)})
      (unfinished / dest.name).rename(dest)
      return
    if format == "open_clip":
      _open_clip(model, arrays, unfinished)
    else:
      _huggingface(model, arrays, unfinished)
    unfinished.chmod(0o755)
    unfinished.rename(dest)
  except OSError as error:
    raise WeightsError(f"{dest}: cannot be written ({error.strerror or error})") from error
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def refuse(model: Model, format: str) -> None:
  """Raises: WeightsError when `format` cannot hold the model, with the reason."""
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


def _open_clip(model: inference.Clip, arrays: dict[str, np.ndarray], folder: pathlib.Path) -> None:
  m, p = model.config.model, model.preprocess
  image: dict[str, Any] = {"image_size": m.image.resolution, "width": m.image.width}
  if m.image.blocks:
    image["layers"] = list(m.image.blocks)
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
  safetensors(folder / "open_clip_model.safetensors", {**arrays, **_counts(arrays)})
  _json(folder / "open_clip_config.json", config)


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
  m, p = model.config.model, model.preprocess
  siglip, side = m.image.pooling == "map", m.image.resolution
  shared = {"hidden_act": _ACTIVATIONS[m.activation], "layer_norm_eps": m.norm_epsilon}
  text = {**shared, **_tower(m.text), "vocab_size": m.text.vocab_size}
  text["max_position_embeddings"] = m.text.context_length
  image = {**shared, **_tower(m.image), "image_size": side, "patch_size": m.image.patch}
  if siglip:
    text["projection_size"] = m.embed_dim
  else:
    ids = {"bos_token_id": m.text.vocab_size - 2, "eos_token_id": m.text.vocab_size - 1}
    text |= ids | {"pad_token_id": m.text.vocab_size - 1, "projection_dim": m.embed_dim}
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
  safetensors(folder / "model.safetensors", arrays)
  _json(folder / "config.json", config)
  _json(folder / "preprocessor_config.json", processor)
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
  _json(folder / "vocab.json", {symbol: index for index, symbol in enumerate(symbols)})
  lines = ["#version: 0.2", *(" ".join(pair) for pair in model.tokenizer.merges)]
  (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
  special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
  special |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
  _json(folder / "special_tokens_map.json", special)
  length = model.config.model.text.context_length
  more = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True}
  _json(folder / "tokenizer_config.json", {**special, **more})


def _json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def safetensors(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """One file: the length of a JSON header, the header, the bytes in its order."""
  names = {"float32": "F32", "int64": "I64"}
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, array in arrays.items():
    start, end = end, end + array.nbytes
    header[name] = {
      "dtype": names[array.dtype.name],
      "shape": list(array.shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for array in arrays.values():
      file.write(array.reshape(-1).view(np.uint8).data)


def torch_archive(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """What `torch.load` reads as a dict of tensors: a zip of a pickle and the storages."""
  root, entries = path.stem, []
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    for key, (name, array) in enumerate(arrays.items()):
      entries.append(_string(name) + _tensor(array, str(key)))
    pickle = b"\x80\x02}(" + b"".join(entries) + b"u."  # protocol 2, {, the items, }, stop
    archive.writestr(f"{root}/data.pkl", pickle)
    archive.writestr(f"{root}/byteorder", "little")
    for key, array in enumerate(arrays.values()):
      with archive.open(f"{root}/data/{key}", "w", force_zip64=True) as file:
        file.write(array.reshape(-1).view(np.uint8).data)
    archive.writestr(f"{root}/version", "3\n")


def _tensor(array: np.ndarray, key: str) -> bytes:
  """The opcodes of a call of `_rebuild_tensor_v2` on a storage of its own, rows first."""
  kinds = {"float32": b"FloatStorage", "float16": b"HalfStorage", "int64": b"LongStorage"}
  kind = kinds[array.dtype.name]
  storage = b"(" + _string("storage") + b"ctorch\n" + kind + b"\n" + _string(key)
  storage += _string("cpu") + _number(array.size) + b"tQ"
  strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
  shape = b"(" + b"".join(map(_number, array.shape)) + b"t"
  layout = shape + b"(" + b"".join(map(_number, strides)) + b"t"
  hooks = b"ccollections\nOrderedDict\n)R"
  call = b"ctorch._utils\n_rebuild_tensor_v2\n("
  return call + storage + _number(0) + layout + b"\x89" + hooks + b"tR"


def _string(text: str) -> bytes:
  data = text.encode()
  return b"X" + struct.pack("<I", len(data)) + data


def _number(n: int) -> bytes:
  return b"\x8a\x08" + struct.pack("<q", n)
