"""Weights in use: a trained CLIP that takes pictures and strings."""

import functools
import operator
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from clip_jax import checkpoint, optimizer, parsing, rounding, sharding
from clip_jax import config as config_lib
from clip_jax.data import images as images_lib
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.evaluation import prompts
from clip_jax.models.clip import CLIP

CHUNK = 256  # images or texts encoded at a time


class Clip:
  """Encoders with their weights, preprocessing and tokenizer.

  Attributes: `config` (of the run), `params` (nested dict; bfloat16 is taken as float32),
    `batch_stats` (a ResNet's running statistics; otherwise empty), `tokenizer` (None: the weights'
    own is not here), `preprocess`, `resolution` (pixels), `logit_scale` (multiplicative), `step`
    (of the checkpoint).
  """

  def __init__(
    self,
    config: config_lib.Config,
    params: Any,
    tokenizer: tokenizer_lib.Tokenizer | None,
    step: int = 0,
    batch_stats: Any = None,
  ):
    self.config, self.tokenizer, self.step = config, tokenizer, step
    self.params = rounding.widened(params)
    self.batch_stats = batch_stats or {}
    self.preprocess = config.preprocess
    self.resolution = config.model.image.resolution

  @functools.cached_property
  def logit_scale(self) -> float:
    return float(jnp.exp(self.params["log_scale"]))

  @property
  def variables(self) -> dict[str, Any]:
    """What `CLIP.apply` takes: "params", and "batch_stats" where the model has any."""
    out = {"params": self.params}
    return {**out, "batch_stats": self.batch_stats} if self.batch_stats else out

  def encode_image(self, images: Any, resize_on_device: bool = False) -> np.ndarray:
    """Unit-norm float32 embeddings [N, E].

    Args: images, a sequence of paths or PIL images (or a single one), uint8 [N, H, W, 3], all of
      which are resized and cropped as the weights ask; or float32 [N, R, R, 3], taken as
      preprocessed already. resize_on_device, for uint8 [N, H, W, 3]: the same pixels, without
      Pillow, compiled once for each H and W (not for weights that ask for "squash").
    Raises: ImageError naming the image that cannot be read; ValueError on another shape or dtype.
    """
    if isinstance(images, jax.Array):
      images = np.asarray(images)
    if resize_on_device:
      self._check_resizable(images)
    ready = images if resize_on_device else self._ready(images)
    return self._in_chunks(image_encoder, ready, self.config.model.embed_dim)

  def image_features(self, images: Any) -> np.ndarray:
    """float32 features [N, D] before the projection, not of unit norm: what a linear probe takes.

    Args and Raises: as `encode_image`. Source: appendix A.3; see `CLIP.image_features`.
    """
    image, embed_dim = self.config.model.image, self.config.model.embed_dim
    width = embed_dim if image.blocks else image.width
    return self._in_chunks(feature_encoder, self._ready(images), width)

  def _ready(self, images: Any) -> np.ndarray:
    """uint8 or float32 [N, R, R, 3] of all that `encode_image` takes."""
    if isinstance(images, jax.Array):
      images = np.asarray(images)
    if isinstance(images, np.ndarray) and images.ndim != 4:
      raise ValueError(f"images have shape {images.shape}; an array must be [N, height, width, 3]")
    if isinstance(images, np.ndarray) and images.dtype == np.float32:
      side = self.resolution
      if images.shape[1:] != (side, side, 3):
        raise ValueError(
          f"preprocessed images have shape {images.shape}, not [N, {side}, {side}, 3]"
        )
      return images
    if isinstance(images, np.ndarray) and images.dtype != np.uint8:
      raise ValueError(f"images are {images.dtype}; uint8 [N, H, W, 3] or float32 [N, R, R, 3]")
    if not isinstance(images, (Sequence, np.ndarray)) or isinstance(images, (str, bytes)):
      images = [images]
    return self._fit(images)

  def _check_resizable(self, images: Any) -> None:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
      raise ValueError("resize_on_device takes uint8 [N, H, W, 3], images of one size")
    if images.shape[3] != 3 or 0 in images.shape[1:]:
      raise ValueError(f"images have shape {images.shape}, not [N, height, width, 3]")
    if self.preprocess.resize == "squash":
      raise ValueError(
        "resize_on_device keeps proportions, which these weights ask not to (squash)"
      )

  def encode_text(
    self, texts: str | Sequence[str] | np.ndarray | jax.Array, truncate: bool = False
  ) -> np.ndarray:
    """Unit-norm float32 embeddings [N, E] of strings or of int32 tokens [N, L].

    Args and Raises: as `tokens`.
    """
    return self._in_chunks(text_encoder, self.tokens(texts, truncate), self.config.model.embed_dim)

  def tokens(
    self, texts: str | Sequence[str] | np.ndarray | jax.Array, truncate: bool = False
  ) -> np.ndarray:
    """int32 [N, L] of strings, or of tokens, which are only checked.

    truncate: cut strings that are too long, keep the end token. Raises: TokenizerError naming the
    text that is too long (without truncate); ValueError without a vocabulary, or on other tokens.
    """
    length = self.config.model.text.context_length
    if isinstance(texts, (np.ndarray, jax.Array)):
      tokens_NL = np.asarray(texts)
    elif self.tokenizer is None:
      raise ValueError(
        "the vocabulary of these weights is not here (SigLIP's, or a run's own): "
        f"give int32 tokens [N, {length}] in place of strings"
      )
    else:
      tokens_NL = self.tokenizer(texts, length, truncate)
    if tokens_NL.ndim != 2 or tokens_NL.shape[1] != length or tokens_NL.dtype != np.int32:
      raise ValueError(f"tokens are {tokens_NL.dtype} {tokens_NL.shape}, not int32 [N, {length}]")
    vocab_size = self.config.model.text.vocab_size
    if tokens_NL.size and not 0 <= tokens_NL.min() <= tokens_NL.max() < vocab_size:
      raise ValueError(
        f"tokens must lie in [0, {vocab_size}); were they made by another tokenizer?"
      )
    return tokens_NL

  def classify(
    self, images: Any, labels: Sequence[str], templates: Sequence[str] = ("{}",)
  ) -> np.ndarray:
    """Zero-shot probabilities [N, C] of each label for each image.

    A label is put into every template, as "a photo of a {}."; its class embedding is the mean over
    templates. Source: section 3.1.4. A model of the sigmoid loss judges each label by itself, so
    its rows need not sum to 1.
    """
    class_CE = prompts.class_embeddings(self.encode_text, labels, templates)
    logits_NC = self.logit_scale * self.encode_image(images) @ class_CE.T
    if self.config.model.loss == "sigmoid":
      return np.asarray(jax.nn.sigmoid(logits_NC + float(self.params["logit_bias"])))
    return np.asarray(jax.nn.softmax(logits_NC, axis=-1))

  def fit(self, image: Any) -> np.ndarray:
    """An image of any kind that `images.as_image` takes -> uint8 [R, R, 3], as the weights ask."""
    image = images_lib.as_image(image)
    if self.preprocess.resize == "squash":
      return images_lib.squash(image, self.resolution)
    return images_lib.fit(image, self.resolution)

  def _fit(self, images: Sequence[Any] | np.ndarray) -> np.ndarray:
    fitted = [self.fit(image) for image in images]
    side = self.resolution
    return np.stack(fitted) if fitted else np.zeros((0, side, side, 3), np.uint8)

  def _in_chunks(self, encode: Any, inputs: np.ndarray, width: int) -> np.ndarray:
    """Runs `encode` on padded chunks of a few fixed sizes, so that it compiles a few times only."""
    mesh = self._mesh
    parts = sharding.host_parts(mesh) if mesh else 1
    out = [np.zeros((0, width), np.float32)]
    for start in range(0, len(inputs), CHUNK):
      chunk = inputs[start : start + CHUNK]
      size = chunk_rows(len(chunk), parts)
      rows: Any = np.concatenate([chunk, np.repeat(chunk[-1:], size - len(chunk), axis=0)])
      if mesh:
        rows = sharding.global_batch({"rows": rows}, mesh)["rows"]
      embeddings_NE = encode(self.config, mesh, self._encoder_variables, rows)
      found = sharding.host_rows(embeddings_NE) if mesh else np.asarray(embeddings_NE)
      out.append(found[: len(chunk)])
    return np.concatenate(out)

  @functools.cached_property
  def _mesh(self) -> Mesh | None:
    """The devices that hold the weights and share the work; None: one, with its own rows.

    Over several hosts each gives rows of its own, equally many, and gets their embeddings; all
    must call.
    """
    where = self.params["log_scale"].sharding
    mesh = where.mesh if isinstance(where, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None

  @functools.cached_property
  def _encoder_variables(self) -> Any:
    """What the encoders take; on one CPU device, with the Transformers' layers apart.

    A layer that the program has to cut out of the stack costs a copy of its weights in every call,
    which is half of the time of one image or text there. Apart, they are the same memory.
    """
    one = len(self.params["log_scale"].devices()) == 1
    if self.config.model.scan_layers or not one or jax.default_backend() != "cpu":
      return self.variables
    return _apart(self.variables)


class _Layers(tuple):
  """A Transformer's blocks, each with its own arrays, in place of one stack of them."""


jax.tree_util.register_pytree_node(_Layers, lambda x: (tuple(x), None), lambda _, x: _Layers(x))


def _apart(tree: Any) -> Any:
  if not isinstance(tree, Mapping):
    return tree
  return {name: _layers(x) if name == "blocks" else _apart(x) for name, x in tree.items()}


def _layers(stacked: Any) -> _Layers:
  """Views: neither np.asarray nor device_put copies on a CPU (device_put does at odd addresses)."""
  host = jax.tree.map(np.asarray, stacked)
  count = len(jax.tree.leaves(host)[0])
  layers = [jax.tree.map(operator.itemgetter(layer), host) for layer in range(count)]
  return _Layers(jax.device_put(layers))


def _together(tree: Any) -> Any:
  """The model's own form. XLA sees that a slice of this stack is the layer, and makes neither."""
  if isinstance(tree, _Layers):
    return jax.tree.map(lambda *layers: jnp.stack(layers), *tree)
  return {name: _together(x) for name, x in tree.items()} if isinstance(tree, Mapping) else tree


def chunk_rows(rows: int, parts: int = 1) -> int:
  """How many of at most CHUNK rows a host encodes at a time, with padding: a few sizes only."""
  size = min(CHUNK, 1 << (rows - 1).bit_length())
  return -(-size // parts) * parts


@functools.partial(jax.jit, static_argnums=(0, 1))
def image_encoder(
  config: config_lib.Config, mesh: Mesh | None, variables: Any, image_BRR3: jax.Array
) -> Any:
  """uint8 [B, H, W, 3], or float32 [B, R, R, 3] as preprocessed, -> unit-norm float32 [B, E].

  Args: mesh, over which the rows lie, before and after; None: on one device.
  """
  return _encode(config, mesh, variables, _normalised(config, image_BRR3), "encode_image")


@functools.partial(jax.jit, static_argnums=(0, 1))
def feature_encoder(
  config: config_lib.Config, mesh: Mesh | None, variables: Any, image_BRR3: jax.Array
) -> Any:
  """The same -> float32 features [B, D] before the projection."""
  return _encode(config, mesh, variables, _normalised(config, image_BRR3), "image_features")


def _normalised(config: config_lib.Config, image_BRR3: jax.Array) -> jax.Array:
  if image_BRR3.dtype == jnp.uint8:
    image_BRR3 = images_lib.fit_on_device(image_BRR3, config.model.image.resolution)
    image_BRR3 = images_lib.normalise(image_BRR3, config.preprocess.mean, config.preprocess.std)
  return image_BRR3


@functools.partial(jax.jit, static_argnums=(0, 1))
def text_encoder(
  config: config_lib.Config, mesh: Mesh | None, variables: Any, tokens_BL: jax.Array
) -> Any:
  """int32 tokens [B, L] -> unit-norm float32 [B, E]. Args: mesh, as of `image_encoder`."""
  return _encode(config, mesh, variables, tokens_BL, "encode_text")


def _encode(
  config: config_lib.Config, mesh: Mesh | None, variables: Any, rows: jax.Array, method: str
) -> Any:
  model, variables = CLIP(config.model), _together(variables)
  if mesh is None:
    return model.apply(variables, rows, method=method)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    rows_BE = model.apply(variables, rows, method=method)
  return jax.lax.with_sharding_constraint(rows_BE, sharding.batch_sharding(mesh))


def load(path: str | os.PathLike[str], mesh: Mesh | None = None) -> Clip:
  """The newest whole checkpoint of a workdir, weights only.

  Args: mesh, whose devices share the work (of several hosts all must call); None: one device.
  Raises: CheckpointError when the folder holds none.
  """
  checkpoints = checkpoint.Checkpoints(pathlib.Path(path), read_only=True)
  try:
    newest = checkpoints.newest_meta()
    if newest is None:
      raise checkpoint.CheckpointError(f"{path}: no finished checkpoint in {checkpoints.folder}")
    config = parsing.parse(parsing.upgrade(newest[1]["config"]))
    wanted = _abstract_variables(config, mesh or sharding.one_device())
    restored = checkpoints.restore_latest(wanted["params"], batch_stats=wanted.get("batch_stats"))
  finally:
    checkpoints.close()
  assert restored is not None
  tokenizer = tokenizer_from(restored.meta["tokenizer"])
  return Clip(config, restored.params, tokenizer, restored.step, restored.batch_stats)


def spread(model: Clip, mesh: Mesh) -> Clip:
  """The same weights over the devices of `mesh`, which then share the work; all hosts must call."""
  if mesh.size == 1:
    return model
  variables = jax.tree.map(  # through the host: not every backend sends to another host's devices
    lambda leaf, place: jax.device_put(np.asarray(leaf), place.sharding),
    model.variables,
    sharding.place(jax.eval_shape(lambda: model.variables), mesh),
  )
  stats = variables.get("batch_stats")
  return Clip(model.config, variables["params"], model.tokenizer, model.step, stats)


def tokenizer_from(saved: str) -> tokenizer_lib.Tokenizer | None:
  """What a checkpoint names: "original", "none", or the JSON of a trained vocabulary."""
  if saved == "none":
    return None
  return (
    tokenizer_lib.original() if saved == "original" else tokenizer_lib.Tokenizer.from_json(saved)
  )


def _abstract_variables(config: config_lib.Config, mesh: Mesh) -> Any:
  """What the checkpoint of a run with this config holds."""
  image, text = config.model.image, config.model.text
  image_BRR3 = jax.ShapeDtypeStruct((1, image.resolution, image.resolution, 3), jnp.float32)
  tokens_BL = jax.ShapeDtypeStruct((1, text.context_length), jnp.int32)

  def initial(*inputs: Any) -> Any:
    variables = CLIP(config.model).init(*inputs)
    return {**variables, "params": optimizer.at_rest(config.optimizer, variables["params"])}

  shapes = jax.eval_shape(initial, jax.random.key(0), image_BRR3, tokens_BL)
  return sharding.place(shapes, mesh)
