"""CLIP: two encoders, two projections into one embedding space, one learned scale."""

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
    shared = (c.activation, dtype, c.scan_layers, c.remat)
    self.image: resnet.ModifiedResNet | vit.VisionTransformer
    if c.image.blocks:
      self.image = resnet.ModifiedResNet(c.image, c.embed_dim, dtype, c.scan_layers, c.remat)
    else:
      self.image = vit.VisionTransformer(c.image, *shared)
      self.image_projection = self._projection("image_projection", c.image.width)
    self.text = text.TextTransformer(c.text, *shared)
    self.text_projection = self._projection("text_projection", c.text.width)
    # exp(log_scale) multiplies the cosine similarities; 1 / 0.07 to start with (section 2.5)
    self.log_scale = self.param("log_scale", nn.initializers.constant(math.log(1 / 0.07)), ())

  def _projection(self, name: str, width: int) -> jax.Array:
    return self.param(name, nn.initializers.normal(width**-0.5), (width, self.config.embed_dim))

  def __call__(
    self, image_BRR3: jax.Array, tokens_BL: jax.Array, train: bool = False
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(image_BE, text_BE, logit scale): what the loss takes."""
    image_BE = self.encode_image(image_BRR3, train)
    return image_BE, self.encode_text(tokens_BL), jnp.exp(self.log_scale)

  def encode_image(self, image_BRR3: jax.Array, train: bool = False) -> jax.Array:
    """Normalised float32 images [B, R, R, 3] -> image_BE.

    `train` concerns ResNets alone: it takes the batch's statistics, and updates `batch_stats`.
    """
    if isinstance(self.image, resnet.ModifiedResNet):
      return _unit(self.image(image_BRR3, train))
    return _unit(
      _project(self.image(image_BRR3), self.image_projection, compute_dtype(self.config))
    )

  def encode_text(self, tokens_BL: jax.Array) -> jax.Array:
    """int32 tokens [B, L] -> text_BE."""
    return _unit(_project(self.text(tokens_BL), self.text_projection, compute_dtype(self.config)))


def compute_dtype(config: config_lib.Model) -> Dtype:
  """The dtype of the matrix products: what the config says, or what suits the device."""
  if config.compute_dtype == "auto":
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
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
    "text": sizes["text"] + sizes["text_projection"],
    "total": sum(sizes.values()),
  }


def flops_per_pair(config: config_lib.Model) -> int:
  """Matrix-product FLOPs of one forward pass of one image and one text (2 a multiply-add)."""
  text_ = config.text
  text_flops = _transformer_flops(text_.context_length, text_.width, text_.layers)
  return flops_per_image(config) + text_flops + 2 * text_.width * config.embed_dim


def flops_per_image(config: config_lib.Model) -> int:
  """The image encoder's part of `flops_per_pair`."""
  image = config.image
  if image.blocks:
    return resnet.flops(image, config.embed_dim)
  tokens = (image.resolution // image.patch) ** 2 + 1
  blocks = _transformer_flops(tokens, image.width, image.layers)
  return _stem_flops(image) + blocks + 2 * image.width * config.embed_dim


def _transformer_flops(tokens: int, width: int, layers: int) -> int:
  return layers * (24 * tokens * width**2 + 4 * tokens**2 * width)


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
