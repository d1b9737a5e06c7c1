"""The causal text encoder, pooled at the end-of-text token. Source: section 2.4, model.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from clip_jax import config as config_lib
from clip_jax.models import transformer


class TextTransformer(nn.Module):
  """int32 tokens [B, L] -> float32 features [B, D] before the projection.

  The end-of-text token has the largest id of its vocabulary, so `argmax` finds it.
  """

  config: config_lib.Text
  activation: str
  dtype: Dtype
  scan_layers: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, tokens_BL: jax.Array) -> jax.Array:
    c = self.config
    if tokens_BL.shape[1] != c.context_length:
      raise ValueError(f"tokens are {tokens_BL.shape}, the encoder takes [B, {c.context_length}]")
    embed = nn.Embed(
      c.vocab_size, c.width, embedding_init=nn.initializers.normal(0.02), name="token_embedding"
    )
    position_LD = self.param(
      "positional_embedding", nn.initializers.normal(0.01), (c.context_length, c.width)
    )
    blocks = transformer.Transformer(
      c.layers,
      c.heads,
      causal=True,
      activation=self.activation,
      initial=transformer.text_initial(c.width, c.layers),
      dtype=self.dtype,
      scan_layers=self.scan_layers,
      remat=self.remat,
      name="transformer",
    )
    x_BLD = blocks(embed(tokens_BL) + position_LD[None])
    end_B = jnp.argmax(tokens_BL, axis=-1)
    x_BD = jnp.take_along_axis(x_BLD, end_B[:, None, None], axis=1)[:, 0]
    return transformer.layer_norm(name="ln_final")(x_BD)
