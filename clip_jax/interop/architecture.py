"""Which model a set of weights is: from its shapes, or from the config that lies beside it.

Shapes tell everything but three things: the activation, the heads of a Transformer, and LayerNorm's
epsilon. Where no config says them they are not guessed: the activation must be given, and the heads
are those of the known model with these shapes, or must come from a config.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax.config import Model, Text, Vision
from clip_jax.models import presets

Shapes = Mapping[str, Sequence[int]]


class WeightsError(ValueError):
  """Weights that cannot be taken over or handed on: which, why, what to do."""


def from_openai_shapes(shapes: Shapes, activation: str | None, released: bool = False) -> Model:
  """The model of weights that carry OpenAI's names.

  Args: released, for an archive of OpenAI's own code, in which every head is 64 wide.
  Raises: WeightsError.
  """
  refused = {
    "visual.trunk.": "its image tower is timm's (visual.trunk.*), which clip_jax does not have",
    "text.transformer.resblocks.": "its text tower is apart (text.*, open_clip's CustomTextCLIP), "
    "which clip_jax does not read",
    "text.": "its text tower is another library's (text.*), which clip_jax does not have",
    "text_model.": "these are names of Hugging Face: give the folder with its config.json",
  }
  for prefix, reason in refused.items():
    if any(name.startswith(prefix) for name in shapes):
      raise WeightsError(reason)
  _size(shapes, "positional_embedding", 0)  # before a question about something else altogether
  if activation is None:
    raise WeightsError(
      "these weights do not say their activation: import them with --activation quick_gelu (as "
      "OpenAI's and DFN's have) or gelu (LAION's, DataComp's); clip_jax.load takes it too"
    )
  text = Text(
    context_length=_size(shapes, "positional_embedding", 0),
    vocab_size=_size(shapes, "token_embedding.weight", 0),
    width=_size(shapes, "ln_final.weight", 0),
    layers=_count(shapes, r"transformer\.resblocks\.(\d+)\."),
    heads=1,
    mlp_width=_mlp(shapes, "transformer.resblocks.0.mlp.c_fc.weight"),
  )
  resnet = any(name.startswith("visual.layer1.") for name in shapes)
  image = _resnet(shapes) if resnet else _vit(shapes)
  model = Model(
    image,
    text,
    _size(shapes, "text_projection", 1),
    activation=activation,  # type: ignore[arg-type]  # checked by parsing.parse
  )
  return _with_heads(model, released)


def _vit(shapes: Shapes) -> Vision:
  patch = _size(shapes, "visual.conv1.weight", 3)
  return Vision(
    resolution=patch * _side(shapes, "visual.positional_embedding"),
    patch=patch,
    width=_size(shapes, "visual.conv1.weight", 0),
    layers=_count(shapes, r"visual\.transformer\.resblocks\.(\d+)\."),
    heads=1,
    mlp_width=_mlp(shapes, "visual.transformer.resblocks.0.mlp.c_fc.weight"),
  )


def _resnet(shapes: Shapes) -> Vision:
  width = _size(shapes, "visual.layer1.0.conv1.weight", 0)
  return Vision(
    resolution=32 * _side(shapes, "visual.attnpool.positional_embedding"),
    patch=32,
    width=width,
    layers=0,
    heads=width // 2,  # as the released code has it: heads of width 64
    blocks=tuple(_count(shapes, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)),
  )


def _with_heads(model: Model, released: bool) -> Model:
  """The same with the heads of the known model of these shapes. Raises: WeightsError."""
  if released:
    image, text = model.image, dataclasses.replace(model.text, heads=model.text.width // 64)
    if not image.blocks:
      image = dataclasses.replace(image, heads=image.width // 64)
    return dataclasses.replace(model, image=image, text=text)
  known = [*presets.PUBLISHED.values(), *presets.LAION.values()]
  for preset in known:
    if _headless(preset) == _headless(model):
      return dataclasses.replace(preset, activation=model.activation)
  raise WeightsError(
    "no known model has these shapes, and they do not show the number of heads: put open_clip's "
    "config (open_clip_config.json) beside the weights"
  )


def _headless(model: Model) -> Model:
  replace = dataclasses.replace
  heads = model.image.heads if model.image.blocks else 1
  image, text = replace(model.image, heads=heads), replace(model.text, heads=1)
  return replace(model, image=image, text=text, activation="gelu")


_OPEN_CLIP_VISION = {
  "image_size",
  "layers",
  "width",
  "patch_size",
  "head_width",
  "mlp_ratio",
}
_OPEN_CLIP_TEXT = {
  "context_length",
  "vocab_size",
  "width",
  "heads",
  "layers",
  "mlp_ratio",
}


def from_open_clip_config(config: Mapping[str, Any]) -> Model:
  """The model of open_clip's `model_cfg`. Raises: WeightsError naming what is not here."""
  image, text = section(config, "vision_cfg"), section(config, "text_cfg")
  if "timm_model_name" in image:
    raise WeightsError(f"its image tower is timm's {image['timm_model_name']}, which is not here")
  if "hf_model_name" in text:
    raise WeightsError(f"its text tower is Hugging Face's {text['hf_model_name']}, not here")
  _refuse(config, {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}, "model_cfg")
  _refuse(image, _OPEN_CLIP_VISION, "vision_cfg")
  _refuse(text, _OPEN_CLIP_TEXT, "text_cfg")
  width, side = _whole(image, "width", 768), _square(image, "image_size", 224)
  head_width, layers = _whole(image, "head_width", 64), image.get("layers", 12)
  if isinstance(layers, (list, tuple)):
    blocks = tuple(_whole({"layers": count}, "layers", 0) for count in layers)
    heads = 32 * width // head_width
    tower = Vision(side, 32, width=width, layers=0, heads=heads, blocks=blocks)
  else:
    tower = Vision(
      resolution=side,
      patch=_whole(image, "patch_size", 16),
      width=width,
      layers=_whole(image, "layers", 12),
      heads=width // head_width,
      mlp_width=_ratio(width, image.get("mlp_ratio", 4.0)),
    )
  words = _whole(text, "width", 512)
  return Model(
    tower,
    Text(
      context_length=_whole(text, "context_length", 77),
      vocab_size=_whole(text, "vocab_size", 49408),
      width=words,
      layers=_whole(text, "layers", 12),
      heads=_whole(text, "heads", 8),
      mlp_width=_ratio(words, text.get("mlp_ratio", 4.0)),
    ),
    _whole(config, "embed_dim", 0),
    activation="quick_gelu" if config.get("quick_gelu", False) else "gelu",
  )


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
  """A part of a config, empty where it is not there. Raises: WeightsError when it is no object."""
  value = config.get(name) or {}
  if not isinstance(value, dict):
    raise WeightsError(f"{name}: {str(value)[:60]} is no JSON object")
  return value


def _whole(fields: Mapping[str, Any], name: str, default: int) -> int:
  """A count from a config; default 0: it must be there. Raises: WeightsError when it is none."""
  value = fields.get(name, default)
  if type(value) is not int or not 1 <= value < 2**24:
    given = repr(value)[:60] if name in fields else "nothing"
    raise WeightsError(f"{name}: {given} is no count from 1 to 16 million")
  return value


def _square(fields: Mapping[str, Any], name: str, default: int) -> int:
  """A side in pixels, given once or twice. Raises: WeightsError when it is none."""
  value = fields.get(name, default)
  if isinstance(value, (list, tuple)):
    if len(value) != 2 or value[0] != value[1]:
      raise WeightsError(f"{name}: {str(value)[:60]}; clip_jax has square images only")
    value = value[0]
  return _whole({name: value}, name, default)


# What config.json leaves out, because it is their default. Source: transformers
# configuration_clip.py and configuration_siglip.py.
_CLIP_TEXT: dict[str, Any] = {
  "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
  "num_attention_heads": 8, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}  # fmt: skip
_CLIP_VISION: dict[str, Any] = {
  "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
  "num_attention_heads": 12, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}  # fmt: skip
_SIGLIP_TEXT: dict[str, Any] = {
  "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
  "num_attention_heads": 12, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh",
  "layer_norm_eps": 1e-6,
}  # fmt: skip
_SIGLIP_VISION: dict[str, Any] = _CLIP_VISION | {
  "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
_ACTIVATIONS: dict[str, Any] = {
  "quick_gelu": "quick_gelu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
}


def from_huggingface_config(config: Mapping[str, Any]) -> Model:
  """The model of a `config.json` of CLIPModel or SiglipModel. Raises: WeightsError."""
  kind = config.get("model_type")
  if kind not in ("clip", "siglip"):
    raise WeightsError(f"config.json: model_type {kind!r}; clip_jax reads 'clip' and 'siglip'")
  siglip = kind == "siglip"
  text = (_SIGLIP_TEXT if siglip else _CLIP_TEXT) | section(config, "text_config")
  image = (_SIGLIP_VISION if siglip else _CLIP_VISION) | section(config, "vision_config")
  if image.get("num_channels", 3) != 3:
    raise WeightsError(f"config.json: num_channels {image['num_channels']}; clip_jax reads 3")
  for name in ("hidden_act", "layer_norm_eps"):
    if text[name] != image[name]:
      raise WeightsError(
        f"config.json: {name} is {text[name]!r} of the text and {image[name]!r} of the image "
        "tower; clip_jax has one for both"
      )
  if not isinstance(text["hidden_act"], str) or text["hidden_act"] not in _ACTIVATIONS:
    raise WeightsError(f"config.json: hidden_act {text['hidden_act']!r}, which is not here")
  pixels, words = _whole(image, "hidden_size", 0), _whole(text, "hidden_size", 0)
  return Model(
    Vision(
      resolution=_square(image, "image_size", 0),
      patch=_whole(image, "patch_size", 0),
      width=pixels,
      layers=_whole(image, "num_hidden_layers", 0),
      heads=_whole(image, "num_attention_heads", 0),
      mlp_width=_not_fourfold(pixels, _whole(image, "intermediate_size", 0)),
      pooling="map" if siglip else "class",
    ),
    Text(
      context_length=_whole(text, "max_position_embeddings", 0),
      vocab_size=_whole(text, "vocab_size", 0),
      width=words,
      layers=_whole(text, "num_hidden_layers", 0),
      heads=_whole(text, "num_attention_heads", 0),
      mlp_width=_not_fourfold(words, _whole(text, "intermediate_size", 0)),
      pooling="last" if siglip else "end",
    ),
    pixels if siglip else _whole(config, "projection_dim", 512),
    activation=_ACTIVATIONS[text["hidden_act"]],
    norm_epsilon=text["layer_norm_eps"],
    loss="sigmoid" if siglip else "softmax",
  )


def from_big_vision_shapes(shapes: Shapes) -> Model:
  """The SigLIP of big_vision's names, whose arrays show their heads. Raises: WeightsError."""
  kernel = "params/{}/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
  image, text = kernel.format("img/Transformer"), kernel.format("txt/Encoder_0")
  patch = _size(shapes, "params/img/embedding/kernel", 0)
  side = math.isqrt(_size(shapes, "params/img/pos_embedding", 1))
  mlp = "params/{}/encoderblock_0/MlpBlock_0/Dense_0/kernel"
  return Model(
    Vision(
      resolution=patch * side,
      patch=patch,
      width=_size(shapes, image, 0),
      layers=_count(shapes, r"params/img/Transformer/encoderblock_(\d+)/"),
      heads=_size(shapes, image, 1),
      mlp_width=_not_fourfold(
        _size(shapes, image, 0), _size(shapes, mlp.format("img/Transformer"), 1)
      ),
      pooling="map",
    ),
    Text(
      context_length=_size(shapes, "params/txt/pos_embedding", 1),
      vocab_size=_size(shapes, "params/txt/Embed_0/embedding", 0),
      width=_size(shapes, text, 0),
      layers=_count(shapes, r"params/txt/Encoder_0/encoderblock_(\d+)/"),
      heads=_size(shapes, text, 1),
      mlp_width=_not_fourfold(
        _size(shapes, text, 0), _size(shapes, mlp.format("txt/Encoder_0"), 1)
      ),
      pooling="last",
    ),
    _size(shapes, "params/txt/head/kernel", 1),
    activation="gelu_tanh",
    norm_epsilon=1e-6,
    loss="sigmoid",
  )


def _size(shapes: Shapes, name: str, axis: int) -> int:
  if name not in shapes:
    raise WeightsError(f"no array {name!r} in it: not a CLIP of a kind that clip_jax knows")
  if len(shapes[name]) <= axis:
    raise WeightsError(f"{name}: shape {list(shapes[name])} has no axis {axis}")
  return int(shapes[name][axis])


def _side(shapes: Shapes, name: str) -> int:
  """Positions along a square grid, without the class token."""
  positions = _size(shapes, name, 0) - 1
  side = math.isqrt(max(positions, 0))
  if side * side != positions or not side:
    raise WeightsError(f"{name}: {positions} positions beside the class token are no square grid")
  return side


def _count(shapes: Shapes, pattern: str) -> int:
  found = {int(m.group(1)) for name in shapes if (m := re.match(pattern, name))}
  return len(found)


def _mlp(shapes: Shapes, name: str) -> int:
  return _not_fourfold(_size(shapes, name, 1), _size(shapes, name, 0))


def _not_fourfold(width: int, mlp_width: int) -> int:
  return 0 if mlp_width == 4 * width else mlp_width


def _ratio(width: int, ratio: Any) -> int:
  if type(ratio) not in (int, float) or not 0 < ratio < 1000:
    raise WeightsError(f"mlp_ratio: {repr(ratio)[:60]} is no ratio")
  return _not_fourfold(width, int(width * ratio))


def _refuse(config: Mapping[str, Any], known: set[str], where: str) -> None:
  """Anything else might change the arithmetic; a default that says "off" does not."""
  others = [name for name in config if name not in known and config[name] not in (None, False)]
  if others:
    raise WeightsError(f"{where}: {', '.join(sorted(others))} is not known to clip_jax")
