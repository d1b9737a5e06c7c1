"""Where weights come from: which format a file or folder is, and what it says beside the arrays.

`load` takes all of them: our own checkpoints, OpenAI's `.pt`, open_clip's state dicts, Hugging
Face's folders, big_vision's `.npz`.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np

from clip_jax import checkpoint, inference, parsing
from clip_jax import config as config_lib
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.interop import architecture, archive, inputs, naming, weights, writers
from clip_jax.interop.architecture import WeightsError
from clip_jax.models import clip, resize

# sha256 of the nine released files, by name. Source: openai/CLIP clip.py (parts of addresses).
RELEASED = {
  "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
  "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
  "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
  "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
  "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
  "ViT-B-32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
  "ViT-B-16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
  "ViT-L-14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
  "ViT-L-14-336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
_HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class Found:
  """Weights as they lie there, and what they say of themselves."""

  format: str  # for people
  arrays: Mapping[str, np.ndarray]
  table: Callable[[config_lib.Model], list[naming.Weight]]
  model: config_lib.Model
  preprocess: config_lib.Preprocess
  tokenizer: str  # as `inference.tokenizer_from` reads it; "none": not in clip_jax


def load(
  path: str | pathlib.Path, activation: str | None = None, resolution: int = 0
) -> inference.Clip:
  """Weights of any format that clip_jax reads, in float32.

  Args: activation, "quick_gelu" or "gelu", for a state dict that does not say it; resolution, in
    pixels, for images of another size than the weights were trained on (their positional
    embeddings are resized; 0: as they are).
  Raises: WeightsError, ArchiveError or CheckpointError: one line with the file and what to do.
  """
  path = pathlib.Path(path)
  model = _load(path, activation)
  if resolution in (0, model.resolution):
    return model
  try:
    params, resized = resize.at_resolution(model.params, model.config.model, resolution)
  except ValueError as error:
    raise WeightsError(f"{path}: {error}") from error
  config = dataclasses.replace(model.config, model=resized)
  return inference.Clip(config, params, model.tokenizer, model.step, model.batch_stats)


def _load(path: pathlib.Path, activation: str | None) -> inference.Clip:
  if not path.exists():
    raise WeightsError(f"{path}: no such file or folder")
  try:
    if (path / "checkpoints").is_dir():
      model = inference.load(path)
      _agree(model.config.model.activation, activation)
      weights.finite(model.variables)
      return model
    found = find(path, activation)
    config = config_lib.Config(name=path.stem, model=found.model, preprocess=found.preprocess)
    config = parsing.parse(config_lib.to_config_dict(config))  # before anything is as large
    _plausible(found)
    variables = weights.to_ours(found.arrays, found.table(found.model), found.model)
  except (WeightsError, parsing.ConfigError) as error:
    raise WeightsError(f"{path}: {error}") from error
  variables = jax.device_put(variables)  # on a CPU without a copy: see `weights.to_ours`
  tokenizer = inference.tokenizer_from(found.tokenizer)
  return inference.Clip(
    config, variables["params"], tokenizer, batch_stats=variables.get("batch_stats")
  )


def _plausible(found: Found) -> None:
  """Raises: WeightsError when a config describes a model far larger than the arrays beside it."""
  image, text = found.model.image, found.model.text
  blocks = image.layers + text.layers + sum(image.blocks)
  if blocks > len(found.arrays):
    raise WeightsError(f"its config says {blocks:,} blocks; there are {len(found.arrays)} arrays")
  wanted = clip.parameter_counts(found.model)["total"]
  there = sum(array.size for array in found.arrays.values())
  if wanted > 2 * there:
    raise WeightsError(f"its config says {wanted:,} parameters; the arrays hold {there:,}")


def save(model: inference.Clip, dest: pathlib.Path) -> None:
  """Writes weights as a checkpoint of ours: a new folder, whole or not at all.

  Raises: WeightsError when `dest` is there already or cannot be written; CheckpointError.
  """
  tokenizer = model.tokenizer
  name = "none" if tokenizer is None else "original"
  if tokenizer is not None and tokenizer != tokenizer_lib.original():
    name = tokenizer.to_json()
  with writers.whole(dest) as folder:
    checkpoints = checkpoint.Checkpoints(folder)
    try:
      facts = {"config": config_lib.to_dict(model.config), "data": {}, "tokenizer": name}
      step = {"step": jax.numpy.int32(model.step)}
      checkpoints.save(model.step, model.params, step, facts, model.batch_stats)
    finally:
      checkpoints.close()


def find(path: pathlib.Path, activation: str | None = None) -> Found:
  """What lies at `path`. Raises: WeightsError, ArchiveError."""
  if path.is_dir():
    if (path / "config.json").is_file():
      return _huggingface(path, activation)
    if (path / "open_clip_config.json").is_file():
      return _open_clip(path, activation)
    raise WeightsError(
      "a folder without config.json (Hugging Face), open_clip_config.json (open_clip) or "
      "checkpoints (clip_jax): give the folder that holds one of them, or the file of the weights"
    )
  check_released(path)
  tensors = archive.read(path)
  if tensors.format == "npz":
    model = architecture.from_big_vision_shapes(_shapes(tensors.arrays))
    _agree(model.activation, activation)
    squash = config_lib.Preprocess(mean=_HALF, std=_HALF, resize="squash")
    return Found("big_vision SigLIP", tensors.arrays, naming.big_vision, model, squash, "none")
  # OpenAI's own code: as TorchScript its activation is a module, as a state dict it has its sizes.
  if tensors.format == "torchscript":
    released = any("QuickGELU" in name for name in tensors.facts.get("classes", ()))
  else:
    released = tensors.arrays.keys() >= set(naming.OPENAI_SIZES)
  beside = path.with_name("open_clip_config.json")
  if released:
    _agree("quick_gelu", activation)
    activation = "quick_gelu"
  elif tensors.format != "torchscript" and beside.is_file():
    return _open_clip_arrays(_unprefixed(tensors.arrays), beside, activation)
  arrays = _unprefixed(tensors.arrays)
  model = architecture.from_openai_shapes(_shapes(arrays), activation, released)
  name = "OpenAI archive" if tensors.format == "torchscript" else f"{tensors.format} state dict"
  return Found(name, arrays, naming.openai, model, config_lib.Preprocess(), inputs.original(model))


def check_released(path: pathlib.Path) -> bool:
  """Whether the file is the released one that its name claims.

  Returns: False when the name claims nothing. Raises: WeightsError on another sha256.
  """
  if path.suffix != ".pt" or path.stem not in RELEASED:
    return False
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while block := file.read(1 << 22):
      digest.update(block)
  if digest.hexdigest() != RELEASED[path.stem]:
    raise WeightsError(
      f"sha256 {digest.hexdigest()} is not that of OpenAI's {path.name} ({RELEASED[path.stem]}): "
      "get it again, or give it another name if it is something else"
    )
  return True


def _huggingface(folder: pathlib.Path, activation: str | None) -> Found:
  fields = inputs.json_object(folder / "config.json")
  model = architecture.from_huggingface_config(fields)
  _agree(model.activation, activation)
  tensors = archive.read(folder)
  preprocess = inputs.huggingface_preprocess(
    inputs.json_object(folder / "preprocessor_config.json"), model
  )
  kind, vocabulary = "SiglipModel", "none"
  if model.image.pooling != "map":
    kind, vocabulary = "CLIPModel", inputs.vocabulary(folder, model)
    inputs.check_end(fields, model, vocabulary)
  name, table = f"Hugging Face {kind}", naming.huggingface
  return Found(name, tensors.arrays, table, model, preprocess, vocabulary)


def _open_clip(folder: pathlib.Path, activation: str | None) -> Found:
  names = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
  for name in (*names, "open_clip_pytorch_model.bin"):
    if (folder / name).is_file():
      arrays = _unprefixed(archive.read(folder / name).arrays)
      return _open_clip_arrays(arrays, folder / "open_clip_config.json", activation)
  raise WeightsError(f"none of {', '.join(names)}, open_clip_pytorch_model.bin is in the folder")


def _open_clip_arrays(
  arrays: Mapping[str, np.ndarray], config_path: pathlib.Path, activation: str | None
) -> Found:
  fields = inputs.json_object(config_path)
  model = architecture.from_open_clip_config(
    architecture.section(fields, "model_cfg") if "model_cfg" in fields else fields
  )
  _agree(model.activation, activation)
  preprocess = inputs.open_clip_preprocess(fields, model)
  vocabulary = inputs.vocabulary(config_path.parent, model)
  return Found("open_clip", arrays, naming.openai, model, preprocess, vocabulary)


def _agree(there: str, given: str | None) -> None:
  if given is not None and given != there:
    raise WeightsError(f"its activation is {there}, and --activation says {given}")


def _unprefixed(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
  """Without the `module.` that PyTorch's parallel training puts before every name."""
  if arrays and all(name.startswith("module.") for name in arrays):
    return {name.removeprefix("module."): array for name, array in arrays.items()}
  return arrays


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
  return {name: array.shape for name, array in arrays.items()}
