"""What must come along with weights: how images become pixels, and texts tokens.

Read from the files beside the weights, in Hugging Face's and open_clip's forms. What this project
does otherwise is refused: a picture resized another way gives other embeddings, without a word.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from clip_jax import config as config_lib
from clip_jax import inference
from clip_jax.data import bytepairs
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.interop import architecture
from clip_jax.interop.architecture import WeightsError

_OPEN_CLIP = "open_clip_config.json"
_MAX_JSON_BYTES = 4 << 20  # a vocabulary of 49,408 takes 0.9 MB


def huggingface_preprocess(
  fields: Mapping[str, Any], model: config_lib.Model
) -> config_lib.Preprocess:
  """What preprocessor_config.json says. Raises: WeightsError on what is not here."""
  side, crops = model.image.resolution, bool(fields.get("do_center_crop", False))
  size = fields.get("size", side)
  shortest = not isinstance(size, dict) or "shortest_edge" in size
  wanted: dict[str, tuple[Any, ...]] = {
    "resample": (3,),  # bicubic
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "rescale_factor": (1 / 255, 0.00392156862745098),
    "do_center_crop": (True,) if shortest else (False, True),
  }
  for name, values in wanted.items():
    if fields.get(name, values[0]) not in values:
      raise WeightsError(
        f"preprocessor_config.json: {name} {fields[name]}; clip_jax has {values[0]}"
      )
  _sides("size", size, side)
  if crops:
    _sides("crop_size", fields.get("crop_size", side), side)
  return config_lib.Preprocess(
    mean=_three(fields, "image_mean"),
    std=_three(fields, "image_std"),
    resize="shortest" if shortest else "squash",
  )


def open_clip_preprocess(
  fields: Mapping[str, Any], model: config_lib.Model
) -> config_lib.Preprocess:
  """What open_clip's `preprocess_cfg` says. Raises: WeightsError on what is not here."""
  given = architecture.section(fields, "preprocess_cfg")
  defaults = config_lib.Preprocess()
  if given.get("interpolation", "bicubic") != "bicubic":
    raise WeightsError(f"{_OPEN_CLIP}: interpolation {given['interpolation']!r}, not bicubic")
  resize = given.get("resize_mode", "shortest")
  if resize not in ("shortest", "squash"):
    raise WeightsError(f"{_OPEN_CLIP}: resize_mode {resize!r}; not shortest or squash")
  if given.get("mode", "RGB") != "RGB":
    raise WeightsError(f"{_OPEN_CLIP}: mode {given['mode']!r}, not RGB")
  _sides("size", given.get("size", model.image.resolution), model.image.resolution)
  return config_lib.Preprocess(
    mean=_three(given, "mean") if "mean" in given else defaults.mean,
    std=_three(given, "std") if "std" in given else defaults.std,
    resize=resize,
  )


def _sides(name: str, size: Any, resolution: int) -> None:
  """Raises: WeightsError when a size in pixels is not the model's, on any side."""
  sides = size.values() if isinstance(size, dict) else size if isinstance(size, list) else [size]
  if any(side != resolution for side in sides):
    raise WeightsError(f"preprocessing: {name} {size}, but the model takes {resolution} pixels")


def _three(fields: Mapping[str, Any], name: str) -> tuple[float, float, float]:
  values = fields.get(name)
  if (
    not isinstance(values, list)
    or len(values) != 3
    or any(type(value) not in (int, float) for value in values)
  ):
    raise WeightsError(f"{name}: {values!r} is not three numbers")
  return (float(values[0]), float(values[1]), float(values[2]))


def vocabulary(folder: pathlib.Path, model: config_lib.Model) -> str:
  """The folder's own vocabulary, where it has one. Raises: WeightsError when its ids are not ours.

  Returns: as `inference.tokenizer_from` reads it.
  """
  path = folder / "merges.txt"
  if not path.is_file():
    return original(model)
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except (OSError, ValueError) as error:
    raise WeightsError(f"merges.txt: cannot be read ({error})") from error
  pairs = [line.split() for line in lines if line and not line.startswith("#version")]
  try:
    tokenizer = tokenizer_lib.Tokenizer(tuple((left, right) for left, right in pairs))
  except ValueError as error:
    raise WeightsError(f"merges.txt: no byte-pair vocabulary of CLIP's kind ({error})") from error
  if tokenizer == tokenizer_lib.original():
    return original(model)
  ids = json_object(folder / "vocab.json")
  symbols = list(bytepairs.symbol_table(tokenizer.merges))
  if [ids.get(symbol) for symbol in symbols] != list(range(len(symbols))):
    raise WeightsError("vocab.json: other ids than merges.txt gives in CLIP's order")
  if tokenizer.vocab_size > model.text.vocab_size:
    raise WeightsError(
      f"merges.txt: {tokenizer.vocab_size} ids, but the model has {model.text.vocab_size}"
    )
  return tokenizer.to_json()


def check_end(fields: Mapping[str, Any], model: config_lib.Model, vocabulary: str) -> None:
  """Texts are pooled at their highest id. Raises: WeightsError when the config says another one.

  (2 is what old configs say; transformers takes the highest id then.)
  """
  tokenizer = inference.tokenizer_from(vocabulary)
  end = model.text.vocab_size - 1 if tokenizer is None else tokenizer.end_id
  given = architecture.section(fields, "text_config").get("eos_token_id", 49407)
  if given not in (2, end):
    raise WeightsError(f"config.json: eos_token_id {given}; clip_jax pools texts at {end}")


def original(model: config_lib.Model) -> str:
  """The vocabulary where nothing says it: the original, if the sizes agree."""
  return "original" if model.text.vocab_size == tokenizer_lib.original().vocab_size else "none"


def json_object(path: pathlib.Path) -> dict[str, Any]:
  """A JSON file that is an object. Raises: WeightsError."""
  try:
    if path.stat().st_size > _MAX_JSON_BYTES:
      raise WeightsError(f"{path.name}: over {_MAX_JSON_BYTES:,} bytes, which is no such file")
    fields = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise WeightsError(
      f"{path.name} is not in the folder; get it from where the weights are"
    ) from None
  except WeightsError:
    raise
  except (OSError, ValueError, RecursionError) as error:
    raise WeightsError(f"{path.name}: cannot be read ({error})") from error
  if not isinstance(fields, dict):
    raise WeightsError(f"{path.name}: not a JSON object")
  return fields
