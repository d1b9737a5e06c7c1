"""One table: our weights <-> their names and layouts in OpenAI's, Hugging Face's and big_vision's.

A `Weight` says which array of ours is which array (or arrays) of theirs and how one is laid out as
the other; the reverse is its exact inverse, so an import followed by an export changes no bit.
Our paths start with the collection: "params/text/ln_final/scale", "batch_stats/image/bn_1/mean".
Layers that are stacked on a leading axis here are single there: `layer` is the index.

Sources: openai/CLIP model.py (open_clip keeps its names), transformers modeling_clip.py and
modeling_siglip.py, big_vision models/proj/image_text/two_towers.py.
"""

import dataclasses
from collections.abc import Iterator

from clip_jax import config as config_lib
from clip_jax.interop import layouts


@dataclasses.dataclass(frozen=True)
class Weight:
  """One array of ours, or one layer of it, and where another format keeps it.

  Both sides may be several arrays that are laid out together: queries, keys and values.
  """

  ours: tuple[str, ...]
  theirs: tuple[str, ...]
  layout: layouts.Layout
  layer: int | None = None


def _norm(ours: str, theirs: str, layer: int | None = None) -> Iterator[Weight]:
  yield Weight((f"{ours}/scale",), (f"{theirs}.weight",), layouts.SAME, layer)
  yield Weight((f"{ours}/bias",), (f"{theirs}.bias",), layouts.SAME, layer)


def _dense(ours: str, theirs: str, layer: int | None = None) -> Iterator[Weight]:
  yield Weight((f"{ours}/kernel",), (f"{theirs}.weight",), layouts.DENSE, layer)
  yield Weight((f"{ours}/bias",), (f"{theirs}.bias",), layouts.SAME, layer)


def _merged(ours: str, theirs: str, heads: int, layer: int | None = None) -> Iterator[Weight]:
  yield Weight((f"{ours}/kernel",), (f"{theirs}.weight",), layouts.merge(heads), layer)
  yield Weight((f"{ours}/bias",), (f"{theirs}.bias",), layouts.SAME, layer)


# Sizes that OpenAI's own files hold beside the weights.
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")


def openai(model: config_lib.Model) -> list[Weight]:
  """The names of the released models and of open_clip's native towers."""
  text = model.text
  out = [
    Weight(("params/log_scale",), ("logit_scale",), layouts.SCALAR),
    Weight(("params/text_projection",), ("text_projection",), layouts.SAME),
    Weight(("params/text/token_embedding/embedding",), ("token_embedding.weight",), layouts.SAME),
    Weight(("params/text/positional_embedding",), ("positional_embedding",), layouts.SAME),
    *_norm("params/text/ln_final", "ln_final"),
    *_openai_blocks("params/text", "transformer", text.layers, text.heads),
  ]
  return out + list(_openai_resnet(model) if model.image.blocks else _openai_vit(model))


def _openai_vit(model: config_lib.Model) -> Iterator[Weight]:
  image = model.image
  yield Weight(("params/image_projection",), ("visual.proj",), layouts.SAME)
  yield Weight(
    ("params/image/stem/patch_embedding/kernel",),
    ("visual.conv1.weight",),
    layouts.patches(image.patch),
  )
  yield Weight(("params/image/class_embedding",), ("visual.class_embedding",), layouts.SAME)
  yield Weight(
    ("params/image/positional_embedding",), ("visual.positional_embedding",), layouts.SAME
  )
  yield from _norm("params/image/ln_pre", "visual.ln_pre")
  yield from _norm("params/image/ln_post", "visual.ln_post")
  yield from _openai_blocks("params/image", "visual.transformer", image.layers, image.heads)


def _openai_blocks(ours: str, theirs: str, layers: int, heads: int) -> Iterator[Weight]:
  for i in range(layers):
    there, here = f"{theirs}.resblocks.{i}", f"{ours}/transformer/blocks"
    yield from _norm(f"{here}/ln_1", f"{there}.ln_1", i)
    yield from _norm(f"{here}/ln_2", f"{there}.ln_2", i)
    qkv = f"{here}/attention/qkv"
    yield Weight((f"{qkv}/kernel",), (f"{there}.attn.in_proj_weight",), layouts.qkv(heads), i)
    yield Weight((f"{qkv}/bias",), (f"{there}.attn.in_proj_bias",), layouts.qkv_bias(heads), i)
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
      here = f"image/stage_{stage}/{'blocks' if block else 'first'}"
      layer = block - 1 if block else None
      if block == 0:
        yield from _convolution(f"{here}/shortcut_conv", f"{there}.downsample.0")
        yield from _batch_norm(f"{here}/shortcut_bn", f"{there}.downsample.1")
      for i in (1, 2, 3):
        yield from _convolution(f"{here}/conv_{i}", f"{there}.conv{i}", layer)
        yield from _batch_norm(f"{here}/bn_{i}", f"{there}.bn{i}", layer)
  pool, heads = "params/image/attention_pool", model.image.heads
  yield Weight(
    (f"{pool}/positional_embedding",), ("visual.attnpool.positional_embedding",), layouts.SAME
  )
  for part in ("q", "k", "v"):
    there = f"visual.attnpool.{part}_proj"
    yield Weight((f"{pool}/{part}/kernel",), (f"{there}.weight",), layouts.split(heads))
    yield Weight((f"{pool}/{part}/bias",), (f"{there}.bias",), layouts.split_bias(heads))
  yield from _merged(f"{pool}/c", "visual.attnpool.c_proj", heads)


def _convolution(ours: str, theirs: str, layer: int | None = None) -> Iterator[Weight]:
  yield Weight((f"params/{ours}/kernel",), (f"{theirs}.weight",), layouts.CONVOLUTION, layer)


def _batch_norm(ours: str, theirs: str, layer: int | None = None) -> Iterator[Weight]:
  yield from _norm(f"params/{ours}", theirs, layer)
  yield Weight((f"batch_stats/{ours}/mean",), (f"{theirs}.running_mean",), layouts.SAME, layer)
  yield Weight((f"batch_stats/{ours}/variance",), (f"{theirs}.running_var",), layouts.SAME, layer)


def huggingface(model: config_lib.Model) -> list[Weight]:
  """The names of transformers' CLIPModel, or of its SiglipModel where a probe pools the image."""
  image, text = model.image, model.text
  siglip = image.pooling == "map"
  scalar = layouts.SCALAR_1 if siglip else layouts.SCALAR
  vision, words = "vision_model", "text_model"
  final = f"{words}.final_layer_norm"
  out = [
    Weight(("params/log_scale",), ("logit_scale",), scalar),
    Weight(
      ("params/text/token_embedding/embedding",),
      (f"{words}.embeddings.token_embedding.weight",),
      layouts.SAME,
    ),
    Weight(
      ("params/text/positional_embedding",),
      (f"{words}.embeddings.position_embedding.weight",),
      layouts.SAME,
    ),
    Weight(
      ("params/image/stem/patch_embedding/kernel",),
      (f"{vision}.embeddings.patch_embedding.weight",),
      layouts.patches(image.patch),
    ),
    Weight(
      ("params/image/positional_embedding",),
      (f"{vision}.embeddings.position_embedding.weight",),
      layouts.SAME,
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
    Weight(("params/text_projection",), ("text_projection.weight",), layouts.DENSE),
    Weight(("params/image_projection",), ("visual_projection.weight",), layouts.DENSE),
    Weight(
      ("params/image/class_embedding",), (f"{vision}.embeddings.class_embedding",), layouts.SAME
    ),
    *_norm("params/image/ln_pre", f"{vision}.pre_layrnorm"),  # their spelling
  ]


def _huggingface_siglip(model: config_lib.Model) -> Iterator[Weight]:
  heads, pool, head = model.image.heads, "params/image/pooling", "vision_model.head"
  yield Weight(("params/logit_bias",), ("logit_bias",), layouts.SCALAR_1)
  yield Weight(("params/text_projection",), ("text_model.head.weight",), layouts.DENSE)
  yield Weight(("params/text_projection_bias",), ("text_model.head.bias",), layouts.SAME)
  yield Weight(
    ("params/image/stem/patch_embedding/bias",),
    ("vision_model.embeddings.patch_embedding.bias",),
    layouts.SAME,
  )
  yield Weight((f"{pool}/probe",), (f"{head}.probe",), layouts.PROBE)
  kernels, biases = (
    tuple(f"{pool}/{n}/{part}" for n in ("q", "kv")) for part in ("kernel", "bias")
  )
  there = f"{head}.attention.in_proj"
  yield Weight(kernels, (f"{there}_weight",), layouts.q_and_kv(layouts.qkv(heads), 1))
  yield Weight(biases, (f"{there}_bias",), layouts.q_and_kv(layouts.qkv_bias(heads), 0))
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
    yield Weight((f"{qkv}/kernel",), weights, layouts.apart(layouts.qkv(heads)), i)
    yield Weight((f"{qkv}/bias",), biases, layouts.apart(layouts.qkv_bias(heads)), i)
    yield from _merged(f"{here}/attention/out", f"{there}.self_attn.out_proj", heads, i)
    yield from _dense(f"{here}/mlp/fc", f"{there}.mlp.fc1", i)
    yield from _dense(f"{here}/mlp/proj", f"{there}.mlp.fc2", i)


def big_vision(model: config_lib.Model) -> list[Weight]:
  """The names of SigLIP's own checkpoints, whose layouts are flax's, as ours."""
  image, text = model.image, model.text
  out = [
    Weight(("params/log_scale",), ("params/t",), layouts.SCALAR_1),
    Weight(("params/logit_bias",), ("params/b",), layouts.SCALAR_1),
    Weight(
      ("params/text/token_embedding/embedding",), ("params/txt/Embed_0/embedding",), layouts.SAME
    ),
    Weight(("params/text/positional_embedding",), ("params/txt/pos_embedding",), layouts.FIRST),
    Weight(("params/text_projection",), ("params/txt/head/kernel",), layouts.SAME),
    Weight(("params/text_projection_bias",), ("params/txt/head/bias",), layouts.SAME),
    Weight(
      ("params/image/stem/patch_embedding/kernel",),
      ("params/img/embedding/kernel",),
      layouts.one(
        lambda x: x.reshape(-1, x.shape[-1]),
        lambda x: x.reshape(image.patch, image.patch, -1, x.shape[-1]),
      ),
    ),
    Weight(
      ("params/image/stem/patch_embedding/bias",), ("params/img/embedding/bias",), layouts.SAME
    ),
    Weight(("params/image/positional_embedding",), ("params/img/pos_embedding",), layouts.FIRST),
    *_big_vision_blocks("params/text", "params/txt/Encoder_0", text.layers),
    *_big_vision_blocks("params/image", "params/img/Transformer", image.layers),
    *_flax("params/text/ln_final", "params/txt/Encoder_0/encoder_norm", "scale"),
    *_flax("params/image/ln_post", "params/img/Transformer/encoder_norm", "scale"),
  ]
  pool, head = "params/image/pooling", "params/img/MAPHead_0"
  out.append(Weight((f"{pool}/probe",), (f"{head}/probe",), layouts.PROBE))
  for part, axis in (("kernel", 1), ("bias", 0)):
    names = tuple(
      f"{head}/MultiHeadDotProductAttention_0/{n}/{part}" for n in ("query", "key", "value")
    )
    here = tuple(f"{pool}/{n}/{part}" for n in ("q", "kv"))
    out.append(Weight(here, names, layouts.q_and_kv(layouts.stacked(axis), axis)))
  out += _flax(f"{pool}/out", f"{head}/MultiHeadDotProductAttention_0/out", "kernel")
  out += _flax(f"{pool}/ln", f"{head}/LayerNorm_0", "scale")
  out += _flax(f"{pool}/mlp/fc", f"{head}/MlpBlock_0/Dense_0", "kernel")
  return out + list(_flax(f"{pool}/mlp/proj", f"{head}/MlpBlock_0/Dense_1", "kernel"))


def _big_vision_blocks(ours: str, theirs: str, layers: int) -> Iterator[Weight]:
  for i in range(layers):
    there, here = f"{theirs}/encoderblock_{i}", f"{ours}/transformer/blocks"
    attention = f"{there}/MultiHeadDotProductAttention_0"
    yield from _flax(f"{here}/ln_1", f"{there}/LayerNorm_0", "scale", i)
    yield from _flax(f"{here}/ln_2", f"{there}/LayerNorm_1", "scale", i)
    for part, axis in (("kernel", 1), ("bias", 0)):
      names = tuple(f"{attention}/{n}/{part}" for n in ("query", "key", "value"))
      yield Weight((f"{here}/attention/qkv/{part}",), names, layouts.stacked(axis), i)
    yield from _flax(f"{here}/attention/out", f"{attention}/out", "kernel", i)
    yield from _flax(f"{here}/mlp/fc", f"{there}/MlpBlock_0/Dense_0", "kernel", i)
    yield from _flax(f"{here}/mlp/proj", f"{there}/MlpBlock_0/Dense_1", "kernel", i)


def _flax(ours: str, theirs: str, first: str, layer: int | None = None) -> Iterator[Weight]:
  for part in (first, "bias"):
    yield Weight((f"{ours}/{part}",), (f"{theirs}/{part}",), layouts.SAME, layer)
