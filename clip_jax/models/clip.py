"""CLIP: two encoders, two projections into one embedding space, one learned scale.

SigLIP is the same with other poolings and the sigmoid loss: see `config.Vision.pooling`,
`config.Text.pooling` and `config.Model.loss`.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from clip_jax import config as config_lib
from clip_jax.models import resnet, text, vit


class CLIP(nn.Module):
  """The model of the paper (Figure 3). Embeddings are unit-norm float32 [B, E]."""

  config: config_lib.Model

  def setup(self) -> None:
    c, dtype = self.config, compute_dtype(self.config)
    residual_dtype = jnp.dtype(c.residual_dtype)
    shared = (c.activation, dtype, c.scan_layers, c.remat, c.norm_epsilon, residual_dtype)
    constant = nn.initializers.constant
    self.image: resnet.ModifiedResNet | vit.VisionTransformer
    if c.image.blocks:
      self.image = resnet.ModifiedResNet(c.image, c.embed_dim, dtype, c.scan_layers, c.remat)
    else:
      self.image = vit.VisionTransformer(c.image, *shared)
      if c.image.pooling != "map":
        self.image_projection = self._projection("image_projection", c.image.width)
    self.text = text.TextTransformer(c.text, *shared)
    self.text_projection = self._projection("text_projection", c.text.width)
    if c.text.pooling == "last":
      self.text_projection_bias = self.param("text_projection_bias", constant(0), (c.embed_dim,))
    # exp(log_scale) multiplies the cosine similarities; 1 / 0.07 to start with (section 2.5). The
    # sigmoid loss starts with 10 and adds a bias, as most pairs do not match (arXiv 2303.15343).
    sigmoid = c.loss == "sigmoid"
    self.log_scale = self.param("log_scale", constant(math.log(10 if sigmoid else 1 / 0.07)), ())
    if sigmoid:
      self.logit_bias = self.param("logit_bias", constant(-10), ())

  def _projection(self, name: str, width: int) -> jax.Array:
    return self.param(name, nn.initializers.normal(width**-0.5), (width, self.config.embed_dim))

  def __call__(
    self,
    image_BRR3: jax.Array,
    tokens_BL: jax.Array,
    train: bool = False,
    kept_BK: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(image_BE, text_BE, logit scale): what the loss takes (sigmoid: with params' logit_bias)."""
    image_BE = self.encode_image(image_BRR3, train, kept_BK)
    return image_BE, self.encode_text(tokens_BL), jnp.exp(self.log_scale)

  def encode_image(
    self, image_BRR3: jax.Array, train: bool = False, kept_BK: jax.Array | None = None
  ) -> jax.Array:
    """Normalised float32 images [B, R, R, 3] -> image_BE.

    `train` concerns ResNets alone: it takes the batch's statistics, and updates `batch_stats`.
    `kept_BK`, Vision Transformers alone: the patches of each image that are looked at; None: all.
    """
    x_BD = self.image_features(image_BRR3, train, kept_BK)
    if isinstance(self.image, resnet.ModifiedResNet) or self.config.image.pooling == "map":
      return _unit(x_BD)
    return _unit(_project(x_BD, self.image_projection, compute_dtype(self.config)))

  def image_features(
    self, image_BRR3: jax.Array, train: bool = False, kept_BK: jax.Array | None = None
  ) -> jax.Array:
    """The same arguments -> float32 features [B, D] before the projection: a linear probe's.

    A ResNet ends with its attention pooling, whose output is the embedding: its features are that,
    not scaled to unit norm. So are those of SigLIP's pooling. Source: appendix A.3 takes features
    before the projection of Vision Transformers alone; "I_f in Figure 3" is what an encoder gives.
    """
    if isinstance(self.image, resnet.ModifiedResNet):
      return self.image(image_BRR3, train)
    return self.image(image_BRR3, kept_BK)

  def encode_text(self, tokens_BL: jax.Array) -> jax.Array:
    """int32 tokens [B, L] -> text_BE."""
    x_BE = _project(self.text(tokens_BL), self.text_projection, compute_dtype(self.config))
    if self.config.text.pooling == "last":
      x_BE = x_BE + self.text_projection_bias[None]
    return _unit(x_BE)


def compute_dtype(config: config_lib.Model, platform: str | None = None) -> jnp.dtype:
  """The dtype of the matrix products: what the config says, or what suits the platform.

  platform: "cpu", "gpu" or "tpu", of the devices that the program is for; None: of JAX's first.
  """
  if config.compute_dtype == "auto":
    on_cpu = (platform or jax.default_backend()) == "cpu"
    return jnp.dtype("float32" if on_cpu else "bfloat16")
  return jnp.dtype(config.compute_dtype)


def _project(x_BD: jax.Array, weight_DE: jax.Array, dtype: Dtype) -> jax.Array:
  x_BD = x_BD.astype(dtype)
  weight_DE = weight_DE.astype(dtype)
  return jnp.einsum("bd,de->be", x_BD, weight_DE, preferred_element_type=jnp.float32)


def _unit(x_BE: jax.Array) -> jax.Array:
  return x_BE / jnp.linalg.norm(x_BE, axis=-1, keepdims=True)


def parameter_counts(config: config_lib.Model) -> dict[str, int]:
  """{"image", "text", "total"} parameters, projections included, by shapes alone."""
  image = jax.ShapeDtypeStruct(
    (1, config.image.resolution, config.image.resolution, 3), jnp.float32
  )
  tokens = jax.ShapeDtypeStruct((1, config.text.context_length), jnp.int32)
  params = jax.eval_shape(CLIP(config).init, jax.random.key(0), image, tokens)["params"]
  sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
  return {
    "image": sizes["image"] + sizes.get("image_projection", 0),
    "text": sizes["text"] + sizes["text_projection"] + sizes.get("text_projection_bias", 0),
    "total": sum(sizes.values()),
  }


def flops_per_pair(config: config_lib.Model, train: bool = False) -> int:
  """Matrix-product FLOPs of one forward pass of one image and one text (2 a multiply-add).

  `train`: without the patches that training leaves out.
  """
  text_ = config.text
  text_flops = _blocks_flops(text_.context_length, text_)
  return flops_per_image(config, train) + text_flops + 2 * text_.width * config.embed_dim


def training_flops_per_pair(config: config_lib.Model, lock_image: bool = False) -> int:
  """The same of forward and backward pass, which is twice the forward.

  `lock_image`: the image encoder runs forward only (`config.Optimizer.lock_image`).
  """
  saved = 2 * flops_per_image(config, train=True) if lock_image else 0
  return 3 * flops_per_pair(config, train=True) - saved


def flops_per_image(config: config_lib.Model, train: bool = False) -> int:
  """The image encoder's part of `flops_per_pair`."""
  image = config.image
  if image.blocks:
    return resnet.flops(image, config.embed_dim)
  kept, patches = vit.kept_patches(image)
  patches = kept if train else patches
  if image.pooling == "map":
    # keys and values of every patch, attention of one query, its own two products, its MLP
    mlp_width, tokens = image.mlp_width or 4 * image.width, patches
    pooling = 4 * image.width * (patches * image.width + patches + image.width + mlp_width)
  else:
    tokens, pooling = patches + 1, 2 * image.width * config.embed_dim
  return _stem_flops(image) + _blocks_flops(tokens, image) + pooling


def _blocks_flops(tokens: int, tower: config_lib.Vision | config_lib.Text) -> int:
  width, mlp_width = tower.width, tower.mlp_width or 4 * tower.width
  attention = 8 * tokens * width**2 + 4 * tokens**2 * width
  return tower.layers * (attention + 4 * tokens * width * mlp_width)


def _stem_flops(image: config_lib.Vision) -> int:
  tokens = (image.resolution // image.patch) ** 2
  if image.stem == "patch":
    return 2 * tokens * 3 * image.patch**2 * image.width
  levels = image.patch.bit_length() - 1
  channels = [3] + [image.width >> (levels - 1 - level) for level in range(levels)]
  sides = [image.resolution >> (level + 1) for level in range(levels)]
  pairs = zip(sides, channels[:-1], channels[1:], strict=True)
  convolutions = sum(2 * 9 * side**2 * c_in * c_out for side, c_in, c_out in pairs)
  return convolutions + 2 * tokens * image.width**2
