"""ConfigDict or plain dict -> a checked `Config`; old checkpoints' configs completed."""

import copy
import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections

from clip_jax import config as config_lib


class ConfigError(ValueError):
  """A config that cannot be used: which key, what it holds, what it should hold."""


def parse(tree: Mapping[str, Any] | ml_collections.ConfigDict) -> config_lib.Config:
  """ConfigDict or plain nested dict -> Config.

  Raises: ConfigError naming every unknown key, missing key and wrong type at once.
  """
  problems: list[str] = []
  config = _parse(config_lib.Config, tree, "config", problems)
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
  ("microbatches",): 1,
  ("mesh",): config_lib.to_dict(config_lib.Mesh()),
  ("loss",): config_lib.to_dict(config_lib.Loss()),
  ("model", "image", "patch_dropout"): 0.0,
  ("model", "residual_dtype"): "float32",
  ("optimizer", "moments_dtype"): "float32",
  ("optimizer", "text_weights_dtype"): "float32",
  ("optimizer", "lock_image"): False,
  ("data", "scaled_decode"): False,
  ("data", "worker_memory_gib"): 0.0,
}


def upgrade(saved: Mapping[str, Any]) -> dict[str, Any]:
  """A config from a checkpoint (`to_dict`), completed by the fields that came after it."""
  tree = copy.deepcopy(dict(saved))
  for (*parents, name), value in _LATER.items():
    group = tree
    for parent in parents:
      group = group.get(parent, {})
    group.setdefault(name, copy.deepcopy(value))
  tasks = tree.get("evaluation", {}).get("tasks", ())
  for task in tasks:
    task.setdefault("dataset", "")
  named = [task["source"] for task in tasks if "source" in task]
  for source in (*tree.get("data", {}).get("sources", ()), *named):
    for name in ("image_column", "caption_column", "images"):
      source.setdefault(name, "")
  if isinstance(tree["model"].get("remat"), bool):  # before there were several ways
    tree["model"]["remat"] = "full" if tree["model"]["remat"] else "none"
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


def _contradictions(config: config_lib.Config) -> list[str]:
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
    "config.microbatches": config.microbatches,
    "config.mesh.fsdp": config.mesh.fsdp,
    "config.mesh.tensor": config.mesh.tensor,
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
    "config.data.worker_memory_gib": config.data.worker_memory_gib,
    "config.mesh.data": config.mesh.data,
    "config.loss.chunk": config.loss.chunk,
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
  found.extend(_scale_contradictions(config))
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
  names = [task.name or task.dataset or task.kind for task in config.evaluation.tasks]
  found += [
    f"config.evaluation.tasks: two are called {name!r}"
    for name in set(names)
    if names.count(name) > 1
  ]
  if config.data.sources and sum(s.weight for s in config.data.sources) <= 0:
    found.append("config.data.sources: the weights sum to zero")
  return found


def _scale_contradictions(config: config_lib.Config) -> list[str]:
  """Of the options that make a large batch or a large model possible."""
  found, image, pairs = [], config.model.image, config.data.batch_pairs
  if pairs % config.microbatches:
    found.append(f"config.microbatches: {config.microbatches} does not divide {pairs} pairs")
  locked = config.optimizer.lock_image
  if config.microbatches > 1 and image.blocks and not locked:
    found.append(
      f"config.microbatches: {config.microbatches}; a ResNet's batch normalisation takes its "
      "statistics over the whole batch, so it takes 1 only (config.model.remat saves memory too)"
    )
  if config.loss.chunk and config.loss.exchange != "ring":
    found.append("config.loss.chunk: config.loss.exchange 'gather' has no chunks; 'ring' has")
  if not 0 <= image.patch_dropout < 1:
    found.append(
      f"config.model.image.patch_dropout: must be at least 0 and under 1, is {image.patch_dropout}"
    )
  elif image.patch_dropout and image.blocks:
    found.append("config.model.image.patch_dropout: a ResNet has no patches to leave out")
  elif image.patch_dropout and locked:
    found.append(
      "config.model.image.patch_dropout: leaves out what a locked image encoder "
      "(config.optimizer.lock_image) was trained to see; make it 0"
    )
  if locked and not config.init:
    found.append(
      "config.optimizer.lock_image: locks random weights; name trained ones in config.init"
    )
  return found


def _resnet_contradictions(image: config_lib.Vision) -> list[str]:
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
