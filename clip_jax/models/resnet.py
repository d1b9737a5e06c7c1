"""The modified ResNet image encoder. Source: section 2.4, Table 19, openai/CLIP model.py.

Beside a common ResNet: a stem of three convolutions, average pools where others have strides, and
attention in place of the last pool. Its output is the embedding: no projection follows.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.ad_checkpoint import checkpoint_name as named

from clip_jax import config as config_lib
from clip_jax.models import transformer

_EXPANSION = 4  # a block's output channels over those inside it
_MOMENTUM = 0.1  # the weight of this batch in the running statistics
_EPSILON = 1e-5

_Convolution = Callable[[jax.Array], jax.Array]
_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(+-fan_in^-1/2)


class ModifiedResNet(nn.Module):
  """Normalised float32 images [B, R, R, 3] -> float32 embeddings [B, E], not of unit norm.

  `train` normalises by the statistics of the batch and updates the running ones, which the
  collection `batch_stats` holds; otherwise the running ones are used. Under `jax.jit` the batch
  is the global one, however it is sharded.
  """

  config: config_lib.Vision
  embed_dim: int
  dtype: Dtype
  scan_layers: bool = False
  remat: str = "none"

  @nn.compact
  def __call__(self, image_BRR3: jax.Array, train: bool = False) -> jax.Array:
    c = self.config
    if image_BRR3.shape[1:] != (c.resolution, c.resolution, 3):
      raise ValueError(
        f"images are {image_BRR3.shape}, the encoder takes [B, {c.resolution}, {c.resolution}, 3]"
      )
    norm = functools.partial(BatchNorm, train, self.dtype)
    x_BRRC = image_BRR3
    for i, channels in enumerate((c.width // 2, c.width // 2, c.width), 1):
      x_BRRC = _conv(channels, 3, self.dtype, f"conv_{i}", stride=2 if i == 1 else 1)(x_BRRC)
      x_BRRC = nn.relu(norm(name=f"bn_{i}")(x_BRRC))
    x_BRRC = _average_pool(x_BRRC, 2)
    for i, blocks in enumerate(c.blocks):
      stage = _Stage(
        blocks,
        c.width << i,
        2 if i else 1,
        train,
        self.dtype,
        self.scan_layers,
        self.remat,
        name=f"stage_{i + 1}",
      )
      x_BRRC = stage(x_BRRC)
    return AttentionPool(self.embed_dim, c.heads, self.dtype, name="attention_pool")(x_BRRC)


class BatchNorm(nn.Module):
  """Normalises each channel of [B, R, R, C] over all else; statistics in float32 or wider.

  As in PyTorch, the batch is normalised by its plain variance and the running variance moves
  towards the unbiased one, n / (n - 1) times as large. (flax.linen.BatchNorm keeps the plain one.)
  """

  train: bool
  dtype: Dtype
  scale_init: Initializer = nn.initializers.ones

  @nn.compact
  def __call__(self, x_BRRC: jax.Array) -> jax.Array:
    shape = x_BRRC.shape[-1:]
    scale_C = self.param("scale", self.scale_init, shape)
    bias_C = self.param("bias", nn.initializers.zeros, shape)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
    running_variance = self.variable("batch_stats", "variance", jnp.ones, shape)
    x_BRRC = x_BRRC.astype(jnp.promote_types(self.dtype, jnp.float32))
    if self.train:
      count = x_BRRC.size // shape[0]
      if count < 2:
        raise ValueError(f"{self.name}: no variance over one value a channel; use a larger batch")
      mean_C = x_BRRC.mean((0, 1, 2))
      variance_C = jnp.square(x_BRRC - mean_C[None, None, None]).mean((0, 1, 2))
      unbiased_C = variance_C * (count / (count - 1))
      running_mean.value = (1 - _MOMENTUM) * running_mean.value + _MOMENTUM * mean_C
      running_variance.value = (1 - _MOMENTUM) * running_variance.value + _MOMENTUM * unbiased_C
    else:
      mean_C, variance_C = running_mean.value, running_variance.value
    factor_C = scale_C * jax.lax.rsqrt(variance_C + _EPSILON)
    x_BRRC = (x_BRRC - mean_C[None, None, None]) * factor_C[None, None, None]
    return (x_BRRC + bias_C[None, None, None]).astype(self.dtype)


class Bottleneck(nn.Module):
  """[B, R, R, C] -> [B, R / stride, R / stride, 4 * channels]: convolutions beside a shortcut.

  The stride is an average pool, before the last convolution of either way (anti-aliasing). The
  block starts as its shortcut: the scale of its last norm is zero at first.
  """

  channels: int
  stride: int
  train: bool
  dtype: Dtype

  @nn.compact
  def __call__(self, x_BRRC: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    conv = functools.partial(_conv, dtype=self.dtype)
    norm = functools.partial(BatchNorm, self.train, self.dtype)
    out = self.channels * _EXPANSION
    y_BRRC = nn.relu(norm(name="bn_1")(conv(self.channels, 1, name="conv_1")(x_BRRC)))
    y_BRRC = nn.relu(norm(name="bn_2")(conv(self.channels, 3, name="conv_2")(y_BRRC)))
    y_BRRC = conv(out, 1, name="conv_3")(_average_pool(y_BRRC, self.stride))
    y_BRRC = norm(nn.initializers.zeros, name="bn_3")(y_BRRC)
    if self.stride > 1 or x_BRRC.shape[-1] != out:
      x_BRRC = conv(out, 1, name="shortcut_conv")(_average_pool(x_BRRC, self.stride))
      x_BRRC = norm(name="shortcut_bn")(x_BRRC)
    return nn.relu(x_BRRC + y_BRRC), None


class _Stage(nn.Module):
  """`blocks` bottlenecks, of which the first changes resolution and channels.

  The weights and statistics of the others are stacked on a leading axis of length `blocks - 1`,
  whether a loop on the device runs them (`scan_layers`) or not: see `transformer.Transformer`.
  """

  blocks: int
  channels: int
  stride: int
  train: bool
  dtype: Dtype
  scan_layers: bool
  remat: str

  @nn.compact
  def __call__(self, x_BRRC: jax.Array) -> jax.Array:
    first = transformer.rematerialised(Bottleneck, self.remat, scan_layers=False)
    x_BRRC, _ = first(self.channels, self.stride, self.train, self.dtype, name="first")(x_BRRC)
    if self.blocks == 1:
      return x_BRRC
    block = transformer.rematerialised(Bottleneck, self.remat, self.scan_layers)
    stack = nn.scan(
      block,
      variable_axes={"params": 0, "batch_stats": 0},
      split_rngs={"params": True},
      length=self.blocks - 1,
      unroll=1 if self.scan_layers else self.blocks - 1,
    )
    return stack(self.channels, 1, self.train, self.dtype, name="blocks")(x_BRRC, None)[0]


class AttentionPool(nn.Module):
  """[B, R, R, D] -> [B, E]: one attention whose only query is the mean position's."""

  embed_dim: int
  heads: int
  dtype: Dtype

  @nn.compact
  def __call__(self, x_BRRD: jax.Array) -> jax.Array:
    width = x_BRRD.shape[-1]
    wide = jnp.promote_types(self.dtype, jnp.float32)
    x_BSD = x_BRRD.reshape(x_BRRD.shape[0], -1, width).astype(wide)
    x_BSD = jnp.concatenate([x_BSD.mean(1, keepdims=True), x_BSD], axis=1)
    normal, bias = nn.initializers.normal(width**-0.5), transformer.uniform_bias(width)
    position_SD = self.param("positional_embedding", normal, (x_BSD.shape[1], width))
    x_BSD = x_BSD + position_SD[None]
    dense = functools.partial(nn.DenseGeneral, dtype=self.dtype, kernel_init=normal, bias_init=bias)
    split = (self.heads, width // self.heads)
    q_B1HK = dense(split, name="q")(x_BSD[:, :1])
    k_BSHK, v_BSHK = dense(split, name="k")(x_BSD), dense(split, name="v")(x_BSD)
    y_B1HK = jax.nn.dot_product_attention(q_B1HK, k_BSHK, v_BSHK)
    return dense(self.embed_dim, (-2, -1), name="c")(y_B1HK)[:, 0].astype(wide)


def _conv(channels: int, side: int, dtype: Dtype, name: str, stride: int = 1) -> _Convolution:
  """A convolution without bias that keeps the size at stride 1, padded alike on both sides.

  Its result bears its name, by which rematerialisation knows it.
  """
  conv = nn.Conv(
    channels,
    (side, side),
    strides=stride,
    padding=side // 2,
    use_bias=False,
    dtype=dtype,
    kernel_init=_uniform,
    name=name,
  )
  return lambda x_BRRC: named(conv(x_BRRC), name)


def _average_pool(x_BRRC: jax.Array, side: int) -> jax.Array:
  """Means of `side` x `side` positions, which divide the grid: the resolution is 32 n pixels."""
  if side == 1:
    return x_BRRC
  batch, grid, _, channels = x_BRRC.shape
  split = (batch, grid // side, side, grid // side, side, channels)
  return x_BRRC.reshape(split).mean((2, 4))


def flops(config: config_lib.Vision, embed_dim: int) -> int:
  """Matrix-product FLOPs of one image's forward pass (2 a multiply-add; padding counted)."""
  width, grid = config.width, config.resolution // 2
  # per position: 3x3 of the stem at half the resolution
  total = 2 * 9 * grid**2 * (3 * width // 2 + (width // 2) ** 2 + width // 2 * width)
  grid, channels_in = grid // 2, width
  for i, blocks in enumerate(config.blocks):
    inside, out, stride = width << i, _EXPANSION * width << i, 2 if i else 1
    before, grid = grid**2, grid // stride
    first = before * (channels_in * inside + 9 * inside**2)
    first += grid**2 * (inside * out + channels_in * out)
    other = grid**2 * (2 * inside * out + 9 * inside**2)
    total += 2 * (first + (blocks - 1) * other)
    channels_in = out
  tokens = grid**2 + 1
  pool = 2 * tokens * channels_in**2 + channels_in**2 + 2 * tokens * channels_in
  return total + 2 * (pool + channels_in * embed_dim)
