"""The text encoder. Source: section 2.4, model.py; for SigLIP's, arXiv 2303.15343, big_vision."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from clip_jax import config as config_lib
from clip_jax import sharding
from clip_jax.models import transformer


class TextTransformer(nn.Module):
  """int32 tokens [B, L] -> float32 features [B, D] before the projection.

  The published one attends backwards only and is pooled at the end-of-text token, which has the
  largest id of its vocabulary, so `argmax` finds it. SigLIP's (`pooling="last"`) attends both ways
  and is pooled at the last position, padding or not.
  """

  config: config_lib.Text
  activation: str
  dtype: Dtype
  scan_layers: bool = False
  remat: str = "none"
  norm_epsilon: float = 1e-5
  residual_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens_BL: jax.Array) -> jax.Array:
    c = self.config
    if tokens_BL.shape[1] != c.context_length:
      raise ValueError(f"tokens are {tokens_BL.shape}, the encoder takes [B, {c.context_length}]")
    siglip = c.pooling == "last"
    token_std, position_std = (c.width**-0.5, c.width**-0.5) if siglip else (0.02, 0.01)
    embed = nn.Embed(
      c.vocab_size,
      c.width,
      embedding_init=nn.initializers.normal(token_std),
      name="token_embedding",
    )
    position_LD = self.param(
      "positional_embedding", nn.initializers.normal(position_std), (c.context_length, c.width)
    )
    initial = (
      transformer.siglip_initial() if siglip else transformer.text_initial(c.width, c.layers)
    )
    blocks = transformer.Transformer(
      c.layers,
      c.heads,
      causal=not siglip,
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
    # The table comes to the tokens: a lookup in a table of which each device has some columns would
    # give all devices every token's few, which then had to be put together.
    table_VD = sharding.constrain(embed.embedding, None, None)
    x_BLD = sharding.constrain(jnp.take(table_VD, tokens_BL, axis=0), "batch", None, None)
    x_BLD = blocks(x_BLD + position_LD[None])
    if siglip:
      x_BD = x_BLD[:, -1]
    else:
      end_B = jnp.argmax(tokens_BL, axis=-1)
      x_BD = jnp.take_along_axis(x_BLD, end_B[:, None, None], axis=1)[:, 0]
    return transformer.layer_norm(epsilon=self.norm_epsilon, name="ln_final")(x_BD)
