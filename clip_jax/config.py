"""Every knob of a run, with its unit: frozen dataclasses, and the one `parse` from a ConfigDict.

An experiment file describes its run as a `Config` and hands it over as a `ConfigDict`, in which the
command line overrides single values (`--config.optimizer.learning_rate=1e-3`); `parse` turns it
back into a checked `Config`.
"""

import copy
import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections


class ConfigError(ValueError):
  """A config that cannot be used: which key, what it holds, what it should hold."""


@dataclasses.dataclass(frozen=True)
class Vision:
  """The image encoder: a Vision Transformer, or with `blocks` a modified ResNet."""

  resolution: int = 224  # pixels, square
  patch: int = 32  # pixels, square; of a ResNet the 32 that a position of its last grid covers
  # "patch": one linear map of each patch, as published; "convolution": 3x3 convolutions of stride 2
  stem: Literal["patch", "convolution"] = "patch"
  width: int = 768  # of a ResNet the channels after the stem; its features are 32 times as wide
  layers: int = 12  # of a ResNet 0
  heads: int = 12  # of a ResNet those of the attention pool
  mlp_width: int = 0  # 0: four times the width
  # "class": the class token's output, projected, as published; "map": SigLIP's, a learned probe
  # attends to the patches, which have biases and neither a class token nor a norm before the
  # blocks; nothing is projected, so the width is embed_dim
  pooling: Literal["class", "map"] = "class"
  blocks: tuple[int, ...] = ()  # residual blocks of a ResNet's four stages; empty: a Transformer


@dataclasses.dataclass(frozen=True)
class Text:
  """The text encoder."""

  context_length: int = 77  # tokens, start and end included
  vocab_size: int = 49408
  width: int = 512
  layers: int = 12
  heads: int = 8
  mlp_width: int = 0  # 0: four times the width
  # "end": the end-of-text token under a causal mask, as published; "last": SigLIP's, the last
  # position, attention in both directions, a projection with bias
  pooling: Literal["end", "last"] = "end"


@dataclasses.dataclass(frozen=True)
class Model:
  """Two encoders into one embedding space. The activation is part of every checkpoint."""

  image: Vision = Vision()
  text: Text = Text()
  embed_dim: int = 512
  activation: Literal["quick_gelu", "gelu", "gelu_tanh"] = "quick_gelu"
  norm_epsilon: float = 1e-5  # of every LayerNorm
  # "softmax": over the batch, as published; "sigmoid": SigLIP's, each pair by itself, with a
  # learned logit_bias
  loss: Literal["softmax", "sigmoid"] = "softmax"
  compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on CPU
  scan_layers: bool = False  # one compiled block for all layers; same values
  remat: bool = False  # recompute blocks in the backward pass; same values, less memory


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """What turns a decoded image into the encoder's input. Stored with the weights."""

  mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
  std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
  # "shortest": the short side is resized and a square cropped, as published; "squash": both sides
  # are resized to the resolution, as SigLIP's weights ask (not for training, which crops)
  resize: Literal["shortest", "squash"] = "shortest"
  train_short_side: int = 0  # pixels before the random square crop; 0: the resolution


@dataclasses.dataclass(frozen=True)
class Source:
  """One set of image-text pairs."""

  kind: Literal["scenes", "digits", "array_record"] = "array_record"
  path: str = ""  # folder with a manifest.json, for array_record
  split: str = "train"
  weight: float = 1.0  # share of the mixture, relative to the other sources
  records: int = 0  # how many scenes to draw; 0: all that the source has


@dataclasses.dataclass(frozen=True)
class Data:
  """What the training batches are made of."""

  sources: tuple[Source, ...] = ()
  batch_pairs: int = 256  # global batch
  # "train": a vocabulary of text.vocab_size on the sources' own captions, at the first start
  tokenizer: Literal["original", "train"] = "original"
  workers: int = 0  # processes a host; 0: threads of the trainer itself
  threads: int = 2  # decoding threads where workers = 0
  prefetch_batches: int = 4
  max_bad_fraction: float = 0.001  # of the records seen; past it (and past 10) the run stops


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW with linear warm-up and cosine decay to zero. Source: Table 18."""

  learning_rate: float = 5e-4
  warmup_steps: int = 2000
  weight_decay: float = 0.2  # on matrices only
  beta1: float = 0.9
  beta2: float = 0.98
  epsilon: float = 1e-6
  clip_gradient_norm: float = 0.0  # 0: off
  max_logit_scale: float = 100.0
  skip_spike_sigma: float = 0.0  # skip a step whose gradient norm is this far out; 0: log only
  max_skipped_in_row: int = 10


@dataclasses.dataclass(frozen=True)
class Task:
  """One evaluation: a zero-shot classification or a retrieval over a held-out source."""

  name: str = ""
  kind: Literal["zero_shot", "retrieval"] = "zero_shot"
  source: Source = Source()
  prompts: str = ""  # a name in evaluation/prompts.py, for zero_shot
  limit: int = 0  # first records only; 0: all


@dataclasses.dataclass(frozen=True)
class Evaluation:
  tasks: tuple[Task, ...] = ()
  every_steps: int = 0  # 0: only at the end
  batch: int = 256  # images or texts encoded at a time


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  every_steps: int = 1000
  keep: int = 3


@dataclasses.dataclass(frozen=True)
class Config:
  name: str = ""
  init: str = ""  # weights to start from, anything that clip_jax.load reads; empty: random ones
  seed: int = 0
  steps: int = 0
  log_every_steps: int = 20
  model: Model = Model()
  preprocess: Preprocess = Preprocess()
  data: Data = Data()
  optimizer: Optimizer = Optimizer()
  evaluation: Evaluation = Evaluation()
  checkpoint: Checkpoint = Checkpoint()


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
  """The locked ConfigDict that an experiment file's `get_config` returns."""
  return ml_collections.ConfigDict(to_dict(config)).lock()


def to_dict(config: Any) -> Any:
  """Nested plain dicts and lists: what JSON holds. Inverse of `parse`."""
  if dataclasses.is_dataclass(config):
    return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
  if isinstance(config, tuple):
    return [to_dict(value) for value in config]
  return config


def parse(tree: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
  """ConfigDict or plain nested dict -> Config.

  Raises: ConfigError naming every unknown key, missing key and wrong type at once.
  """
  problems: list[str] = []
  config = _parse(Config, tree, "config", problems)
  if not problems:
    problems = _contradictions(config)
  if problems:
    raise ConfigError("; ".join(problems))
  return config


# Fields younger than the first checkpoints, with what those runs had in their place.
_LATER: dict[tuple[str, ...], Any] = {
  ("init",): "",
  ("model", "image", "blocks"): [],
  ("model", "image", "mlp_width"): 0,
  ("model", "image", "pooling"): "class",
  ("model", "text", "mlp_width"): 0,
  ("model", "text", "pooling"): "end",
  ("model", "norm_epsilon"): 1e-5,
  ("model", "loss"): "softmax",
  ("preprocess", "resize"): "shortest",
}


def upgrade(saved: Mapping[str, Any]) -> dict[str, Any]:
  """A config from a checkpoint (`to_dict`), completed by the fields that came after it."""
  tree = copy.deepcopy(dict(saved))
  for (*parents, name), value in _LATER.items():
    group = tree
    for parent in parents:
      group = group.get(parent, {})
    group.setdefault(name, value)
  return tree


def _parse(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
  """Checks `value` against the annotation `kind`; collects what is wrong in `problems`."""
  origin = typing.get_origin(kind)
  if dataclasses.is_dataclass(kind):
    return _parse_dataclass(kind, value, where, problems)
  if origin is tuple:
    if not isinstance(value, (list, tuple)):
      problems.append(f"{where}: expected a list, got {value!r}")
      return ()
    inner = typing.get_args(kind)
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    if len(kinds) != len(value):
      problems.append(f"{where}: expected {len(kinds)} values, got {len(value)}")
      return ()
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(_parse(k, v, f"{where}[{i}]", problems) for i, (k, v) in pairs)
  if origin is Literal:
    if value not in typing.get_args(kind):
      choices = ", ".join(map(repr, typing.get_args(kind)))
      problems.append(f"{where}: {value!r} is none of {choices}")
    return value
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    problems.append(f"{where}: expected {kind.__name__}, got {value!r}")
  return value


def _parse_dataclass(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
  if not isinstance(value, (Mapping, ml_collections.ConfigDict)):
    problems.append(f"{where}: expected the keys of {kind.__name__}, got {value!r}")
    return kind()
  hints = typing.get_type_hints(kind)
  for key in value:
    if key not in hints:
      near = difflib.get_close_matches(key, hints, n=1)
      problems.append(
        f"{where}.{key}: no such key" + (f"; did you mean {near[0]!r}?" if near else "")
      )
  missing = [key for key in hints if key not in value]
  problems.extend(f"{where}.{key}: missing" for key in missing)
  fields = {k: _parse(hints[k], value[k], f"{where}.{k}", problems) for k in hints if k in value}
  return kind(**fields)


def _contradictions(config: Config) -> list[str]:
  """What types cannot say: values out of range, and values that do not go together."""
  image, text = config.model.image, config.model.text
  numbers = {
    "config.log_every_steps": config.log_every_steps,
    "config.model.embed_dim": config.model.embed_dim,
    "config.model.image.resolution": image.resolution,
    "config.model.image.patch": image.patch,
    "config.model.text.context_length": text.context_length,
    "config.model.text.vocab_size": text.vocab_size,
    "config.data.batch_pairs": config.data.batch_pairs,
    "config.data.threads": config.data.threads,
    "config.data.prefetch_batches": config.data.prefetch_batches,
    "config.checkpoint.every_steps": config.checkpoint.every_steps,
    "config.checkpoint.keep": config.checkpoint.keep,
    "config.evaluation.batch": config.evaluation.batch,
  }
  for name, encoder in (("image", image), ("text", text)):
    for part in ("width", "layers", "heads"):
      numbers[f"config.model.{name}.{part}"] = getattr(encoder, part)
  if image.blocks:
    del numbers["config.model.image.layers"]
  found = [f"{key}: must be at least 1, is {value}" for key, value in numbers.items() if value < 1]
  least = {
    "config.steps": config.steps,
    "config.evaluation.every_steps": config.evaluation.every_steps,
    "config.data.workers": config.data.workers,
  }
  found += [f"{key}: must not be under 0, is {value}" for key, value in least.items() if value < 0]
  above = {
    "config.optimizer.max_logit_scale": config.optimizer.max_logit_scale,
    "config.preprocess.std": min(config.preprocess.std),
  }
  found += [f"{key}: must be over 0, is {value}" for key, value in above.items() if value <= 0]
  if found:
    return found
  if image.stem == "convolution" and image.patch & (image.patch - 1):
    found.append(f"config.model.image.patch: {image.patch} is no power of two")
  # SigLIP's So400m/14 leaves 6 of its 384 pixels out; anywhere else it is a slip.
  may_leave_out = (image.pooling, image.stem) == ("map", "patch") and image.resolution > image.patch
  if image.resolution % image.patch and not may_leave_out:
    found.append(
      f"config.model.image.patch: {image.patch} does not divide resolution {image.resolution}"
    )
  if image.pooling == "map" and image.width != config.model.embed_dim:
    found.append(
      f"config.model.embed_dim: {config.model.embed_dim} is not the image encoder's width "
      f"{image.width}, and its pooling 'map' has no projection"
    )
  if image.blocks:
    found.extend(_resnet_contradictions(image))
  image_width = 32 * image.width if image.blocks else image.width  # where its attention is
  for name, width, encoder in (("image", image_width, image), ("text", text.width, text)):
    if encoder.mlp_width < 0:
      found.append(f"config.model.{name}.mlp_width: must be at least 0, is {encoder.mlp_width}")
    if width % encoder.heads:
      found.append(f"config.model.{name}.heads: {encoder.heads} does not divide width {width}")
  short = config.preprocess.train_short_side
  if short and short < image.resolution:
    found.append(
      f"config.preprocess.train_short_side: {short} is under the resolution {image.resolution}"
    )
  names = [task.name or task.kind for task in config.evaluation.tasks]
  found += [
    f"config.evaluation.tasks: two are called {name!r}"
    for name in set(names)
    if names.count(name) > 1
  ]
  if config.data.sources and sum(s.weight for s in config.data.sources) <= 0:
    found.append("config.data.sources: the weights sum to zero")
  return found


def _resnet_contradictions(image: Vision) -> list[str]:
  where, found = "config.model.image", []
  if len(image.blocks) != 4 or min(image.blocks) < 1:
    found.append(f"{where}.blocks: {list(image.blocks)} is not four stages of 1 block or more")
  if image.width % 2:
    found.append(f"{where}.width: {image.width} is odd; the stem of a ResNet halves it")
  for name, only in (("patch", 32), ("layers", 0), ("stem", "patch")):
    value = getattr(image, name)
    if value != only:
      found.append(f"{where}.{name}: {value!r}; a ResNet (it has blocks) takes {only!r} only")
  return found
