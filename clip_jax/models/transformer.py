"""The pre-norm Transformer that both encoders share. Source: section 2.4, openai/CLIP model.py."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.ad_checkpoint import checkpoint_name as named

from clip_jax import sharding


def uniform_bias(fan_in: int) -> Initializer:
  """PyTorch's default for the bias of a dense layer, which the released code keeps."""
  bound = fan_in**-0.5
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Initial(NamedTuple):
  """Initial values of one block's weights. Attention's biases start at zero."""

  qkv: Initializer
  out: Initializer
  fc: Initializer
  proj: Initializer
  mlp_bias: Callable[[int], Initializer] = uniform_bias  # by fan-in


def text_initial(width: int, layers: int) -> Initial:
  """Scales of the text encoder. Source: hyperparameters of the released code."""
  deep = width**-0.5 * (2 * layers) ** -0.5
  normal = nn.initializers.normal
  return Initial(normal(width**-0.5), normal(deep), normal((2 * width) ** -0.5), normal(deep))


def image_initial() -> Initial:
  """PyTorch's defaults, which the released code leaves in the Vision Transformer."""
  uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(+-fan_in^-1/2)
  return Initial(nn.initializers.xavier_uniform(), uniform, uniform, uniform)


def siglip_initial() -> Initial:
  """SigLIP's, both encoders. Source: big_vision, models/vit.py."""
  xavier = nn.initializers.xavier_uniform()
  square = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")  # Xavier of q, k, v apart
  return Initial(square, xavier, xavier, xavier, lambda _: nn.initializers.normal(1e-6))


def activate(x: jax.Array, activation: str) -> jax.Array:
  """`quick_gelu`: x * sigmoid(1.702 x), the original's; `gelu`: the exact one (erf), LAION's;
  `gelu_tanh`: its approximation by tanh, SigLIP's."""
  if activation == "quick_gelu":
    return x * jax.nn.sigmoid(1.702 * x)
  return jax.nn.gelu(x, approximate=activation == "gelu_tanh")


layer_norm = functools.partial(
  nn.LayerNorm, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, param_dtype=jnp.float32
)


class Attention(nn.Module):
  """Multi-head self-attention; logits and softmax in float32."""

  heads: int
  causal: bool
  initial: Initial
  dtype: Dtype

  @nn.compact
  def __call__(self, x_BSD: jax.Array) -> jax.Array:
    width = x_BSD.shape[-1]
    split = (3, self.heads, width // self.heads)
    qkv = nn.DenseGeneral(split, dtype=self.dtype, kernel_init=self.initial.qkv, name="qkv")
    out = nn.DenseGeneral(
      width, (-2, -1), dtype=self.dtype, kernel_init=self.initial.out, name="out"
    )
    qkv_BS3HK = sharding.constrain(qkv(x_BSD), "batch", None, None, "heads", None)
    q_BSHK, k_BSHK, v_BSHK = (  # kept as rows of all heads: 64 channels apart would be padded
      named(x_BSHK.reshape(x_BSD.shape), name).reshape(x_BSHK.shape)
      for name, x_BSHK in zip("qkv", jnp.moveaxis(qkv_BS3HK, -3, 0), strict=True)
    )
    y_BSHK = jax.nn.dot_product_attention(q_BSHK, k_BSHK, v_BSHK, is_causal=self.causal)
    return out(y_BSHK)


class Mlp(nn.Module):
  """Two dense layers, `mlp_width` between them (0: four times the width)."""

  mlp_width: int
  activation: str
  initial: Initial
  dtype: Dtype

  @nn.compact
  def __call__(self, x_BSD: jax.Array) -> jax.Array:
    width, initial = x_BSD.shape[-1], self.initial
    mlp_width = self.mlp_width or 4 * width
    fc_bias, proj_bias = initial.mlp_bias(width), initial.mlp_bias(mlp_width)
    fc = nn.Dense(mlp_width, True, self.dtype, kernel_init=initial.fc, bias_init=fc_bias, name="fc")
    proj = nn.Dense(
      width, True, self.dtype, kernel_init=initial.proj, bias_init=proj_bias, name="proj"
    )
    x_BSF = sharding.constrain(fc(x_BSD), "batch", None, "mlp")
    return proj(activate(x_BSF, self.activation))


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)), both in float32; returned in x's dtype."""

  heads: int
  causal: bool
  activation: str
  initial: Initial
  dtype: Dtype
  mlp_width: int
  norm_epsilon: float

  @nn.compact
  def __call__(self, x_BSD: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    attention = Attention(self.heads, self.causal, self.initial, self.dtype, name="attention")
    mlp = Mlp(self.mlp_width, self.activation, self.initial, self.dtype, name="mlp")
    ln_1 = layer_norm(epsilon=self.norm_epsilon, name="ln_1")
    ln_2 = layer_norm(epsilon=self.norm_epsilon, name="ln_2")
    residual_dtype, x_BSD = x_BSD.dtype, x_BSD.astype(jnp.float32)
    x_BSD = x_BSD + attention(ln_1(x_BSD)).astype(jnp.float32)
    x_BSD = x_BSD + mlp(ln_2(x_BSD)).astype(jnp.float32)
    x_BSD = x_BSD.astype(residual_dtype)
    return sharding.constrain(x_BSD, "batch", None, None), None


def rematerialised(block: type[nn.Module], remat: str, scan_layers: bool) -> type[nn.Module]:
  """`block`, of which the backward pass recomputes what `config.Model.remat` says.

  The input of every block is kept. Beside it `dots` keeps the results of matrix products and
  convolutions (attention's own aside); `tuned` the queries, keys and values of a Transformer's
  block, 6 bytes a token and channel in bfloat16, and in a ResNet's what its first two convolutions
  give, which are small for what they cost; `full` nothing. In FLOPs (ViT-L/14, 128 pairs a v5e
  chip, docs/preflight.md): none 1, dots 1.02, tuned 1.15, full 1.23.
  """
  if remat == "none":
    return block
  policies = jax.checkpoint_policies
  policy = {
    "full": policies.nothing_saveable,
    "tuned": policies.save_only_these_names("q", "k", "v", "conv_1", "conv_2"),
    "dots": policies.save_from_both_policies(
      policies.dots_with_no_batch_dims_saveable,
      policies.save_only_these_names("conv_1", "conv_2", "conv_3", "shortcut_conv"),
    ),
  }[remat]
  return nn.remat(block, prevent_cse=not scan_layers, policy=policy)


class Transformer(nn.Module):
  """`layers` blocks, float32 [B, S, D] -> float32 [B, S, D].

  The blocks' weights are stacked on a leading axis of length `layers`, whether they are run by
  a loop on the device (`scan_layers`, one compiled block) or unrolled: the option changes the
  size of the program and nothing else. For `remat` see `rematerialised`. The blocks hand on their
  result in `residual_dtype`, which is also what the backward pass keeps of every block.
  """

  layers: int
  heads: int
  causal: bool
  activation: str
  initial: Initial
  dtype: Dtype
  scan_layers: bool = False
  remat: str = "none"
  mlp_width: int = 0  # 0: four times the width
  norm_epsilon: float = 1e-5
  residual_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x_BSD: jax.Array) -> jax.Array:
    block = rematerialised(Block, self.remat, self.scan_layers)
    stack = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.layers,
      unroll=1 if self.scan_layers else self.layers,
    )
    blocks = stack(
      self.heads,
      self.causal,
      self.activation,
      self.initial,
      self.dtype,
      self.mlp_width,
      self.norm_epsilon,
      name="blocks",
    )
    return blocks(x_BSD.astype(self.residual_dtype), None)[0].astype(jnp.float32)
