"""The Vision Transformer image encoder. Source: section 2.4, Table 20, openai/CLIP model.py.

With `pooling="map"` it is SigLIP's. Source: arXiv 2303.15343, big_vision models/vit.py.
"""

import functools

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
  remat: str = "none"
  norm_epsilon: float = 1e-5
  residual_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, image_BRR3: jax.Array, kept_BK: jax.Array | None = None) -> jax.Array:
    c = self.config
    if image_BRR3.shape[1:] != (c.resolution, c.resolution, 3):
      raise ValueError(
        f"images are {image_BRR3.shape}, the encoder takes [B, {c.resolution}, {c.resolution}, 3]"
      )
    siglip = c.pooling == "map"
    initial = transformer.siglip_initial() if siglip else transformer.image_initial()
    layer_norm = functools.partial(transformer.layer_norm, epsilon=self.norm_epsilon)
    normal = nn.initializers.normal(c.width**-0.5)
    if c.stem == "patch":
      stem: nn.Module = _PatchStem(c.patch, c.width, siglip, self.dtype, name="stem")
    else:
      stem = _ConvolutionStem(c.patch, c.width, self.activation, self.dtype, name="stem")
    x_BSD = stem(image_BRR3).astype(jnp.float32)
    if not siglip:
      class_D = self.param("class_embedding", normal, (c.width,))
      class_B1D = jnp.broadcast_to(class_D, (x_BSD.shape[0], 1, c.width))
      x_BSD = jnp.concatenate([class_B1D, x_BSD], axis=1)
    position_SD = self.param("positional_embedding", normal, (x_BSD.shape[1], c.width))
    x_BSD = x_BSD + position_SD[None]
    if kept_BK is not None:
      x_BSD = _keep(x_BSD, kept_BK, first=0 if siglip else 1)
    if not siglip:
      x_BSD = layer_norm(name="ln_pre")(x_BSD)
    blocks = transformer.Transformer(
      c.layers,
      c.heads,
      causal=False,
      activation=self.activation,
      initial=initial,
      dtype=self.dtype,
      scan_layers=self.scan_layers,
      remat=self.remat,
      mlp_width=c.mlp_width,
      norm_epsilon=self.norm_epsilon,
      residual_dtype=self.residual_dtype,
      name="transformer",
    )
    x_BSD, ln_post = blocks(x_BSD), layer_norm(name="ln_post")
    if not siglip:
      return ln_post(x_BSD[:, 0])
    pool = _AttentionPooling(
      c.heads, c.mlp_width, self.activation, initial, self.dtype, self.norm_epsilon, name="pooling"
    )
    return pool(ln_post(x_BSD))


def kept_patches(config: config_lib.Vision) -> tuple[int, int]:
  """(how many patches of an image training keeps, how many there are).

  Source: Li et al. 2022, arXiv 2212.00794, section 3 (FLIP).
  """
  patches = (config.resolution // config.patch) ** 2
  return max(1, round(patches * (1 - config.patch_dropout))), patches


def _keep(x_BSD: jax.Array, kept_BK: jax.Array, first: int) -> jax.Array:
  """The `first` positions, and of the patches after them those that `kept_BK` names."""
  patches = jnp.take_along_axis(x_BSD[:, first:], kept_BK[:, :, None], axis=1)
  return jnp.concatenate([x_BSD[:, :first], patches], axis=1)


class _PatchStem(nn.Module):
  """[B, R, R, 3] -> [B, S, D]: one linear map of each patch; as published, without bias.

  Pixels past the last whole patch, right and below, are left out.
  """

  patch: int
  width: int
  siglip: bool
  dtype: Dtype

  @nn.compact
  def __call__(self, image_BRR3: jax.Array) -> jax.Array:
    # A convolution of stride P with a P x P kernel is one matrix product over flattened patches,
    # here taken row by row and each flattened as (row, column, channel).
    batch, patch = image_BRR3.shape[0], self.patch
    side = image_BRR3.shape[1] // patch
    image_BRR3 = image_BRR3[:, : side * patch, : side * patch]
    grid = image_BRR3.reshape(batch, side, patch, side, patch, 3).swapaxes(2, 3)
    patches = grid.reshape(batch, side * side, patch * patch * 3)
    uniform = transformer.image_initial().fc
    initial = nn.initializers.lecun_normal() if self.siglip else uniform
    return nn.Dense(
      self.width, self.siglip, dtype=self.dtype, kernel_init=initial, name="patch_embedding"
    )(patches)


class _AttentionPooling(nn.Module):
  """float32 [B, S, D] -> [B, D]: a learned probe attends to all positions, then x + mlp(norm(x)).

  SigLIP's "MAP" head (multi-head attention pooling).
  """

  heads: int
  mlp_width: int
  activation: str
  initial: transformer.Initial
  dtype: Dtype
  norm_epsilon: float

  @nn.compact
  def __call__(self, x_BSD: jax.Array) -> jax.Array:
    batch, _, width = x_BSD.shape
    split, initial = (self.heads, width // self.heads), self.initial
    probe_initial = nn.initializers.normal((2 / (width + 1)) ** 0.5)  # Xavier's of [1, D]
    probe_D = self.param("probe", probe_initial, (width,))
    q = nn.DenseGeneral(split, dtype=self.dtype, kernel_init=initial.qkv, name="q")
    kv = nn.DenseGeneral((2, *split), dtype=self.dtype, kernel_init=initial.qkv, name="kv")
    out = nn.DenseGeneral(width, (-2, -1), dtype=self.dtype, kernel_init=initial.out, name="out")
    mlp = transformer.Mlp(self.mlp_width, self.activation, initial, self.dtype, name="mlp")
    norm = transformer.layer_norm(epsilon=self.norm_epsilon, name="ln")
    q_1HK = q(probe_D[None])
    q_B1HK = jnp.broadcast_to(q_1HK, (batch, 1, *split))
    k_BSHK, v_BSHK = jnp.moveaxis(kv(x_BSD), -3, 0)
    x_B1D = out(jax.nn.dot_product_attention(q_B1HK, k_BSHK, v_BSHK)).astype(jnp.float32)
    x_B1D = x_B1D + mlp(norm(x_B1D)).astype(jnp.float32)
    return x_B1D[:, 0]


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
