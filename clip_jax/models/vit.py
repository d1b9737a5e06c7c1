"""The Vision Transformer image encoder. Source: section 2.4, Table 20, openai/CLIP model.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from clip_jax import config as config_lib
from clip_jax.models import transformer


class VisionTransformer(nn.Module):
  """Normalised float32 images [B, R, R, 3] -> float32 features [B, D] before the projection."""

  config: config_lib.Vision
  activation: str
  dtype: Dtype
  scan_layers: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, image_BRR3: jax.Array) -> jax.Array:
    c = self.config
    if image_BRR3.shape[1:] != (c.resolution, c.resolution, 3):
      raise ValueError(
        f"images are {image_BRR3.shape}, the encoder takes [B, {c.resolution}, {c.resolution}, 3]"
      )
    normal = nn.initializers.normal(c.width**-0.5)
    stem = _PatchStem if c.stem == "patch" else _ConvolutionStem
    x_BSD = stem(c.patch, c.width, self.activation, self.dtype, name="stem")(image_BRR3)
    x_BSD = x_BSD.astype(jnp.float32)
    class_D = self.param("class_embedding", normal, (c.width,))
    class_B1D = jnp.broadcast_to(class_D, (x_BSD.shape[0], 1, c.width))
    x_BSD = jnp.concatenate([class_B1D, x_BSD], axis=1)
    position_SD = self.param("positional_embedding", normal, (x_BSD.shape[1], c.width))
    x_BSD = transformer.layer_norm(name="ln_pre")(x_BSD + position_SD[None])
    blocks = transformer.Transformer(
      c.layers,
      c.heads,
      causal=False,
      activation=self.activation,
      initial=transformer.image_initial(),
      dtype=self.dtype,
      scan_layers=self.scan_layers,
      remat=self.remat,
      name="transformer",
    )
    return transformer.layer_norm(name="ln_post")(blocks(x_BSD)[:, 0])


class _PatchStem(nn.Module):
  """[B, R, R, 3] -> [B, S, D]: one linear map of each patch, without bias, as published."""

  patch: int
  width: int
  activation: str
  dtype: Dtype

  @nn.compact
  def __call__(self, image_BRR3: jax.Array) -> jax.Array:
    # A convolution of stride P with a P x P kernel is one matrix product over flattened patches,
    # here taken row by row and each flattened as (row, column, channel).
    batch, patch = image_BRR3.shape[0], self.patch
    side = image_BRR3.shape[1] // patch
    grid = image_BRR3.reshape(batch, side, patch, side, patch, 3).swapaxes(2, 3)
    patches = grid.reshape(batch, side * side, patch * patch * 3)
    uniform = transformer.image_initial().fc
    return nn.Dense(
      self.width, use_bias=False, dtype=self.dtype, kernel_init=uniform, name="patch_embedding"
    )(patches)


class _ConvolutionStem(nn.Module):
  """[B, R, R, 3] -> [B, S, D]: log2(P) convolutions of stride 2, then a linear map.

  Small models on little data learn shapes much faster with it. The patch must be a power of two.
  Differs: not in the paper. Source: Xiao et al. 2021, Early convolutions help transformers see
  better, arXiv 2106.14881 (without its batch normalisation).
  """

  patch: int
  width: int
  activation: str
  dtype: Dtype

  @nn.compact
  def __call__(self, image_BRR3: jax.Array) -> jax.Array:
    x_BRRC = image_BRR3
    levels = self.patch.bit_length() - 1
    for level in range(levels):
      channels = self.width >> (levels - 1 - level)
      convolution = nn.Conv(
        channels,
        (3, 3),
        strides=2,
        dtype=self.dtype,
        kernel_init=nn.initializers.he_normal(),
        name=f"conv_{level}",
      )
      x_BRRC = convolution(x_BRRC)
      x_BRRC = transformer.activate(x_BRRC, self.activation)
    x_BSC = x_BRRC.reshape(x_BRRC.shape[0], -1, self.width)
    return nn.Dense(self.width, dtype=self.dtype, name="project")(x_BSC)
