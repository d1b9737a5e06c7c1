"""One table: our weights <-> their names and layouts in OpenAI's, Hugging Face's and big_vision's.

A `Weight` says which array of ours is which array (or arrays) of theirs and how one is laid out as
the other; the reverse is its exact inverse, so an import followed by an export changes no bit.
Our paths start with the collection: "params/text/ln_final/scale", "batch_stats/image/bn_1/mean".
Layers that are stacked on a leading axis here are single there: `layer` is the index.

Sources: openai/CLIP model.py (open_clip keeps its names), transformers modeling_clip.py and
modeling_siglip.py, big_vision models/proj/image_text/two_towers.py.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from clip_jax import config as config_lib


class Layout(NamedTuple):
  """How theirs is laid out as ours, and back."""

  to_ours: Callable[[Sequence[np.ndarray]], np.ndarray]
  to_theirs: Callable[[np.ndarray], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Weight:
  """One array of ours, or one layer of it, and where another format keeps it."""

  ours: str
  theirs: tuple[str, ...]
  layout: Layout
  layer: int | None = None


SAME = Layout(lambda x: x[0], lambda x: [x])
DENSE = Layout(lambda x: x[0].T, lambda x: [x.T])  # [out, in] there, [in, out] here
CONVOLUTION = Layout(  # [out, in, height, width] there, [height, width, in, out] here
  lambda x: x[0].transpose(2, 3, 1, 0), lambda x: [x.transpose(3, 2, 0, 1)]
)
SCALAR = Layout(lambda x: x[0].reshape(()), lambda x: [x])


def _patches(patch: int) -> Layout:
  """[D, 3, P, P] <-> [P * P * 3, D]."""
  return Layout(
    lambda x: x[0].transpose(2, 3, 1, 0).reshape(-1, x[0].shape[0]),
    lambda x: [x.reshape(patch, patch, -1, x.shape[-1]).transpose(3, 2, 0, 1)],
  )


def _split(heads: int) -> Layout:
  """A dense layer into heads: [H * K, D] <-> [D, H, K]."""
  return Layout(
    lambda x: x[0].T.reshape(x[0].shape[1], heads, -1),
    lambda x: [x.reshape(x.shape[0], -1).T],
  )


def _split_bias(heads: int) -> Layout:
  return Layout(lambda x: x[0].reshape(heads, -1), lambda x: [x.reshape(-1)])


def _merge(heads: int) -> Layout:
  """A dense layer out of heads: [D, H * K] <-> [H, K, D]."""
  return Layout(
    lambda x: x[0].T.reshape(heads, -1, x[0].shape[0]),
    lambda x: [x.reshape(-1, x.shape[-1]).T],
  )


def _packed(heads: int, parts: int, separate: bool) -> Layout:
  """Queries, keys, values: one [n * D, D] there (or n of [D, D]) <-> [D, n, H, K]."""

  def to_ours(x: Sequence[np.ndarray]) -> np.ndarray:
    rows = np.concatenate(x) if separate else x[0]
    return rows.T.reshape(rows.shape[1], parts, heads, -1)

  def to_theirs(x: np.ndarray) -> list[np.ndarray]:
    rows = x.reshape(x.shape[0], -1).T
    return np.split(rows, parts) if separate else [rows]

  return Layout(to_ours, to_theirs)


def _packed_bias(heads: int, parts: int, separate: bool) -> Layout:
  def to_ours(x: Sequence[np.ndarray]) -> np.ndarray:
    return (np.concatenate(x) if separate else x[0]).reshape(parts, heads, -1)

  def to_theirs(x: np.ndarray) -> list[np.ndarray]:
    return np.split(x.reshape(-1), parts) if separate else [x.reshape(-1)]

  return Layout(to_ours, to_theirs)


def _norm(ours: str, theirs: str, layer: int | None = None) -> Iterator[Weight]:
  yield Weight(f"{ours}/scale", (f"{theirs}.weight",), SAME, layer)
  yield Weight(f"{ours}/bias", (f"{theirs}.bias",), SAME, layer)


def _dense(ours: str, theirs: str, layer: int | None = None) -> Iterator[Weight]:
  yield Weight(f"{ours}/kernel", (f"{theirs}.weight",), DENSE, layer)
  yield Weight(f"{ours}/bias", (f"{theirs}.bias",), SAME, layer)


def _merged(ours: str, theirs: str, heads: int, layer: int | None = None) -> Iterator[Weight]:
  yield Weight(f"{ours}/kernel", (f"{theirs}.weight",), _merge(heads), layer)
  yield Weight(f"{ours}/bias", (f"{theirs}.bias",), SAME, layer)


def openai(model: config_lib.Model) -> list[Weight]:
  """The names of the released models and of open_clip's native towers."""
  text = model.text
  out = [
    Weight("params/log_scale", ("logit_scale",), SCALAR),
    Weight("params/text_projection", ("text_projection",), SAME),
    Weight("params/text/token_embedding/embedding", ("token_embedding.weight",), SAME),
    Weight("params/text/positional_embedding", ("positional_embedding",), SAME),
    *_norm("params/text/ln_final", "ln_final"),
    *_openai_blocks("params/text", "transformer", text.layers, text.heads),
  ]
  return out + list(_openai_resnet(model) if model.image.blocks else _openai_vit(model))


def _openai_vit(model: config_lib.Model) -> Iterator[Weight]:
  image = model.image
  yield Weight("params/image_projection", ("visual.proj",), SAME)
  yield Weight(
    "params/image/stem/patch_embedding/kernel", ("visual.conv1.weight",), _patches(image.patch)
  )
  yield Weight("params/image/class_embedding", ("visual.class_embedding",), SAME)
  yield Weight("params/image/positional_embedding", ("visual.positional_embedding",), SAME)
  yield from _norm("params/image/ln_pre", "visual.ln_pre")
  yield from _norm("params/image/ln_post", "visual.ln_post")
  yield from _openai_blocks("params/image", "visual.transformer", image.layers, image.heads)


def _openai_blocks(ours: str, theirs: str, layers: int, heads: int) -> Iterator[Weight]:
  for i in range(layers):
    there, here = f"{theirs}.resblocks.{i}", f"{ours}/transformer/blocks"
    yield from _norm(f"{here}/ln_1", f"{there}.ln_1", i)
    yield from _norm(f"{here}/ln_2", f"{there}.ln_2", i)
    qkv = f"{here}/attention/qkv"
    yield Weight(
      f"{qkv}/kernel", (f"{there}.attn.in_proj_weight",), _packed(heads, 3, separate=False), i
    )
    yield Weight(
      f"{qkv}/bias", (f"{there}.attn.in_proj_bias",), _packed_bias(heads, 3, separate=False), i
    )
    yield from _merged(f"{here}/attention/out", f"{there}.attn.out_proj", heads, i)
    yield from _dense(f"{here}/mlp/fc", f"{there}.mlp.c_fc", i)
    yield from _dense(f"{here}/mlp/proj", f"{there}.mlp.c_proj", i)


def _openai_resnet(model: config_lib.Model) -> Iterator[Weight]:
  for i in (1, 2, 3):
    yield from _convolution(f"image/conv_{i}", f"visual.conv{i}")
    yield from _batch_norm(f"image/bn_{i}", f"visual.bn{i}")
  for stage, blocks in enumerate(model.image.blocks, start=1):
    for block in range(blocks):
      there = f"visual.layer{stage}.{block}"
      here, layer = f"image/stage_{stage}/blocks", block - 1
      if block == 0:
        here, layer = f"image/stage_{stage}/first", None
        yield from _convolution(f"{here}/shortcut_conv", f"{there}.downsample.0")
        yield from _batch_norm(f"{here}/shortcut_bn", f"{there}.downsample.1")
      for i in (1, 2, 3):
        yield from _convolution(f"{here}/conv_{i}", f"{there}.conv{i}", layer)
        yield from _batch_norm(f"{here}/bn_{i}", f"{there}.bn{i}", layer)
  pool, heads = "params/image/attention_pool", model.image.heads
  yield Weight(
    f"{pool}/positional_embedding", ("visual.attnpool.positional_embedding",), SAME
  )
  for part in ("q", "k", "v"):
    there = f"visual.attnpool.{part}_proj"
    yield Weight(f"{pool}/{part}/kernel", (f"{there}.weight",), _split(heads))
    yield Weight(f"{pool}/{part}/bias", (f"{there}.bias",), _split_bias(heads))
  yield from _merged(f"{pool}/c", "visual.attnpool.c_proj", heads)


def _convolution(ours: str, theirs: str, layer: int | None = None) -> Iterator[Weight]:
  yield Weight(f"params/{ours}/kernel", (f"{theirs}.weight",), CONVOLUTION, layer)


def _batch_norm(ours: str, theirs: str, layer: int | None = None) -> Iterator[Weight]:
  yield from _norm(f"params/{ours}", theirs, layer)
  yield Weight(f"batch_stats/{ours}/mean", (f"{theirs}.running_mean",), SAME, layer)
  yield Weight(f"batch_stats/{ours}/variance", (f"{theirs}.running_var",), SAME, layer)


def huggingface(model: config_lib.Model) -> list[Weight]:
  """The names of transformers' CLIPModel, or of SiglipModel where the image is pooled by a probe."""
  image, text = model.image, model.text
  siglip = image.pooling == "map"
  vision, words = "vision_model", "text_model"
  final = f"{words}.final_layer_norm"
  out = [
    Weight("params/log_scale", ("logit_scale",), SCALAR),
    Weight(
      "params/text/token_embedding/embedding", (f"{words}.embeddings.token_embedding.weight",), SAME
    ),
    Weight(
      "params/text/positional_embedding", (f"{words}.embeddings.position_embedding.weight",), SAME
    ),
    Weight(
      "params/image/stem/patch_embedding/kernel",
      (f"{vision}.embeddings.patch_embedding.weight",),
      _patches(image.patch),
    ),
    Weight(
      "params/image/positional_embedding",
      (f"{vision}.embeddings.position_embedding.weight",),
      SAME,
    ),
    *_norm("params/text/ln_final", final),
    *_norm("params/image/ln_post", f"{vision}.post_layernorm"),
    *_huggingface_blocks("params/text", words, text.layers, text.heads),
    *_huggingface_blocks("params/image", vision, image.layers, image.heads),
  ]
  if siglip:
    return out + list(_huggingface_siglip(model))
  return [
    *out,
    Weight("params/text_projection", ("text_projection.weight",), DENSE),
    Weight("params/image_projection", ("visual_projection.weight",), DENSE),
    Weight("params/image/class_embedding", (f"{vision}.embeddings.class_embedding",), SAME),
    *_norm("params/image/ln_pre", f"{vision}.pre_layrnorm"),  # their spelling
  ]


def _huggingface_siglip(model: config_lib.Model) -> Iterator[Weight]:
  heads, pool, head = model.image.heads, "params/image/pooling", "vision_model.head"
  yield Weight("params/logit_bias", ("logit_bias",), SCALAR)
  yield Weight("params/text_projection", ("text_model.head.weight",), DENSE)
  yield Weight("params/text_projection_bias", ("text_model.head.bias",), SAME)
  yield Weight(
    "params/image/stem/patch_embedding/bias", ("vision_model.embeddings.patch_embedding.bias",), SAME
  )
  yield Weight(
    f"{pool}/probe",
    (f"{head}.probe",),
    Layout(lambda x: x[0].reshape(-1), lambda x: [x.reshape(1, 1, -1)]),
  )
  split = _probe_attention(heads)
  for part, layout in zip(("kernel", "bias"), split, strict=True):
    name = (f"{head}.attention.in_proj_{'weight' if part == 'kernel' else 'bias'}",)
    for ours, piece in zip(("q", "kv"), layout, strict=True):
      yield Weight(f"{pool}/{ours}/{part}", name, piece)
  yield from _merged(f"{pool}/out", f"{head}.attention.out_proj", heads)
  yield from _norm(f"{pool}/ln", f"{head}.layernorm")
  yield from _dense(f"{pool}/mlp/fc", f"{head}.mlp.fc1")
  yield from _dense(f"{pool}/mlp/proj", f"{head}.mlp.fc2")


def _huggingface_blocks(ours: str, theirs: str, layers: int, heads: int) -> Iterator[Weight]:
  for i in range(layers):
    there, here = f"{theirs}.encoder.layers.{i}", f"{ours}/transformer/blocks"
    yield from _norm(f"{here}/ln_1", f"{there}.layer_norm1", i)
    yield from _norm(f"{here}/ln_2", f"{there}.layer_norm2", i)
    names = tuple(f"{there}.self_attn.{part}_proj" for part in "qkv")
    qkv = f"{here}/attention/qkv"
    weights, biases = (tuple(f"{n}.{p}" for n in names) for p in ("weight", "bias"))
    yield Weight(f"{qkv}/kernel", weights, _packed(heads, 3, separate=True), i)
    yield Weight(f"{qkv}/bias", biases, _packed_bias(heads, 3, separate=True), i)
    yield from _merged(f"{here}/attention/out", f"{there}.self_attn.out_proj", heads, i)
    yield from _dense(f"{here}/mlp/fc", f"{there}.mlp.fc1", i)
    yield from _dense(f"{here}/mlp/proj", f"{there}.mlp.fc2", i)
