"""Every knob of a run, with its unit: frozen dataclasses.

An experiment file describes its run as a `Config` and hands it over as a `ConfigDict`, in which the
command line overrides single values (`--config.optimizer.learning_rate=1e-3`); `parsing.parse`
turns it back into a checked `Config`.
"""

import dataclasses
from typing import Any, Literal

import ml_collections


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
  # share of the patches that training leaves out, others for every image and step (FLIP)
  patch_dropout: float = 0.0


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
  # of what passes from block to block of a Transformer; inside a block it is float32 either way
  residual_dtype: Literal["float32", "bfloat16"] = "float32"
  scan_layers: bool = False  # one compiled block for all layers; same values
  # what the backward pass recomputes in place of keeping it; same values. "none"; "dots": all but
  # products with weights; "tuned": what is large for its cost (models/transformer.py); "full": all
  remat: Literal["none", "tuned", "dots", "full"] = "none"


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

  # "auto": by what lies at the path, see data/places.py; "scenes" and "digits" need no path
  kind: Literal[
    "auto", "scenes", "digits", "array_record", "webdataset", "parquet", "table", "tfds"
  ] = "auto"
  path: str = ""  # a folder or file; in an object store: gs://, s3://, https://
  split: str = "train"
  weight: float = 1.0  # share of the mixture, relative to the other sources
  records: int = 0  # how many scenes to draw; 0: all that the source has
  image_column: str = ""  # of Parquet or a table; empty: the usual names
  caption_column: str = ""  # the same; of WebDataset the field of its .json, of TFDS the feature
  images: str = ""  # folder below which a table's images lie; empty: the table's own


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
  # JPEGs at 1/2, 1/4 or 1/8 of their size where the crop needs no more: see data/crops.py
  scaled_decode: bool = True
  # GiB of address space that a worker process may take besides its own at its start and that of
  # the batches it holds; a record that needs more is a bad one. 0: no limit
  worker_memory_gib: float = 16.0


@dataclasses.dataclass(frozen=True)
class Mesh:
  """How the devices share the work. Several TPU slices split `data`, nothing else."""

  data: int = 0  # each part holds all the weights and some of the batch; 0: as many as are left
  fsdp: int = 1  # each part holds some of the weights and some of the batch
  tensor: int = 1  # each part holds some of the heads and of the MLPs, for the same pairs


@dataclasses.dataclass(frozen=True)
class Loss:
  """How the devices compute the loss over the global batch. The values are the same."""

  # "gather": every device holds all embeddings; "ring": they travel, a part at a time
  exchange: Literal["gather", "ring"] = "gather"
  chunk: int = 0  # texts that meet a device's images at a time in the ring; 0: see losses.py
  # of captions that are the same as the row's own, token by token
  identical_captions: Literal["negatives", "positives"] = "negatives"


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
  # the paper's savings of memory (section 2.5), bfloat16 rounded stochastically
  moments_dtype: Literal["float32", "bfloat16"] = "float32"
  text_weights_dtype: Literal["float32", "bfloat16"] = "float32"
  lock_image: bool = False  # the image encoder of `init` stays as it is (LiT)


@dataclasses.dataclass(frozen=True)
class Task:
  """One evaluation: a zero-shot classification or a retrieval over a held-out source."""

  name: str = ""
  kind: Literal["zero_shot", "retrieval"] = "zero_shot"
  source: Source = Source()
  prompts: str = ""  # a name in evaluation/prompts.py, for zero_shot
  limit: int = 0  # first records only; 0: all
  # the key of a published dataset (evaluation/datasets.py): of its test split, whatever copy lies
  # below source.path, with its own prompts and the paper's metric
  dataset: str = ""


@dataclasses.dataclass(frozen=True)
class Evaluation:
  tasks: tuple[Task, ...] = ()
  every_steps: int = 0  # 0: only at the end
  batch: int = 256  # images or texts encoded at a time


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  every_steps: int = 1000  # besides the steps that are evaluated, which are saved first
  keep: int = 3


@dataclasses.dataclass(frozen=True)
class Config:
  name: str = ""
  init: str = ""  # weights to start from, anything that clip_jax.load reads; empty: random ones
  seed: int = 0
  steps: int = 0
  log_every_steps: int = 20
  # the encoders see the batch in so many parts, twice; loss and gradient are the whole batch's
  microbatches: int = 1
  model: Model = Model()
  preprocess: Preprocess = Preprocess()
  data: Data = Data()
  mesh: Mesh = Mesh()
  loss: Loss = Loss()
  optimizer: Optimizer = Optimizer()
  evaluation: Evaluation = Evaluation()
  checkpoint: Checkpoint = Checkpoint()


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
  """The locked ConfigDict that an experiment file's `get_config` returns."""
  return ml_collections.ConfigDict(to_dict(config)).lock()


def to_dict(config: Any) -> Any:
  """Nested plain dicts and lists: what JSON holds. Inverse of `parsing.parse`."""
  if dataclasses.is_dataclass(config):
    return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
  if isinstance(config, tuple):
    return [to_dict(value) for value in config]
  return config
