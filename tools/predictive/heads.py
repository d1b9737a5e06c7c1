"""The two predictive baselines of Figure 2: heads that say how likely a caption is for an image.

Both stand on CLIP's own image encoder and see nothing of the image but its pooled features, what
CLIP projects into its embedding: so the objectives differ in what they ask of the same encoder.
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from clip_jax import config as config_lib
from clip_jax import sharding
from clip_jax.models import clip, resnet, transformer, vit

Prediction = Literal["captions", "bag_of_words"]


class Predictive(nn.Module):
  """CLIP's image encoder, under its name and so with its first weights, and one head.

  "captions": a causal decoder, the caption token by token; "bag_of_words": a linear map, all words
  at once. Source: section 2.3, after Desai and Johnson 2020, arXiv 2006.06666 (VirTex), and Joulin
  et al. 2016, arXiv 1511.02251.
  """

  config: config_lib.Model
  prediction: Prediction

  def setup(self) -> None:
    c, dtype = self.config, clip.compute_dtype(self.config)
    shared = (
      c.activation,
      dtype,
      c.scan_layers,
      c.remat,
      c.norm_epsilon,
      jnp.dtype(c.residual_dtype),
    )
    self.image: resnet.ModifiedResNet | vit.VisionTransformer
    if c.image.blocks:
      self.image = resnet.ModifiedResNet(c.image, c.embed_dim, dtype, c.scan_layers, c.remat)
    else:
      self.image = vit.VisionTransformer(c.image, *shared)
    self.head: CaptionDecoder | BagOfWords
    if self.prediction == "captions":
      self.head = CaptionDecoder(c.text, *shared)
    else:
      self.head = BagOfWords(c.text.vocab_size)

  def __call__(
    self, image_BRR3: jax.Array, tokens_BL: jax.Array, train: bool = False
  ) -> tuple[jax.Array, jax.Array]:
    """`score` of the images' own `features`."""
    return self.score(self.features(image_BRR3, train), tokens_BL)

  def features(self, image_BRR3: jax.Array, train: bool = False) -> jax.Array:
    """Normalised float32 images [B, R, R, 3] -> float32 [B, D], of a ResNet [B, E].

    `train` concerns ResNets alone, as in `CLIP.encode_image`.
    """
    if isinstance(self.image, resnet.ModifiedResNet):
      return self.image(image_BRR3, train).astype(jnp.float32)
    return self.image(image_BRR3)

  def score(self, x_BD: jax.Array, tokens_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(logp_BL, counted_BL): of each token its log-probability, and whether it is predicted at all.

    What stands in logp_BL where counted_BL is False means nothing.
    """
    return self.head(x_BD, tokens_BL), counted(self.prediction, tokens_BL)


def counted(prediction: Prediction, tokens_BL: jax.Array) -> jax.Array:
  """bool [B, L]: what of each row is predicted; never the start token, never padding.

  "captions": every token up to the end token, which is one of them. "bag_of_words": every
  different token between the two, where it stands first.
  """
  place_L = jnp.arange(tokens_BL.shape[1])[None]
  end_B1 = jnp.argmax(tokens_BL, axis=-1)[:, None]  # the end token has the largest id
  if prediction == "captions":
    return (place_L > 0) & (place_L <= end_B1)
  inside_BL = (place_L > 0) & (place_L < end_B1)
  same_BLL = tokens_BL[:, :, None] == tokens_BL[:, None, :]
  before_BLL = inside_BL[:, None, :] & (place_L[0][:, None] > place_L[0][None])[None]
  return inside_BL & ~(same_BLL & before_BLL).any(-1)


class BagOfWords(nn.Module):
  """(features [B, D], tokens [B, L]) -> log-probabilities [B, L] of the tokens in any order.

  One softmax over the vocabulary, not one sigmoid a word, which Mahajan et al. 2018, arXiv
  1805.00932, found worse for the several hashtags of an image. Logits in float32.
  """

  vocab_size: int

  @nn.compact
  def __call__(self, x_BD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    logits_BV = nn.Dense(self.vocab_size, dtype=jnp.float32, name="project")(x_BD)
    logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    return jnp.take_along_axis(logp_BV, tokens_BL, axis=1)


class CaptionDecoder(nn.Module):
  """(features [B, D], tokens [B, L]) -> log-probabilities [B, L] of each token after those before.

  CLIP's text Transformer (width, layers, heads, causal mask), with the projected image in place of
  the start token, which says nothing; the table of embeddings also gives the logits. A first token
  is not predicted: its log-probability is 0.
  Differs: VirTex's decoder attends to the grid of image features, and reads captions backwards too.
  """

  config: config_lib.Text
  activation: str
  dtype: Dtype
  scan_layers: bool
  remat: str
  norm_epsilon: float
  residual_dtype: Dtype

  @nn.compact
  def __call__(self, x_BD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    c, length = self.config, self.config.context_length - 1
    if tokens_BL.shape[1] != c.context_length:
      raise ValueError(f"tokens are {tokens_BL.shape}, the decoder takes [B, {c.context_length}]")
    normal = nn.initializers.normal
    embed = nn.Embed(c.vocab_size, c.width, embedding_init=normal(0.02), name="token_embedding")
    position_LD = self.param("positional_embedding", normal(0.01), (length, c.width))
    image_BD = nn.Dense(c.width, dtype=self.dtype, name="project")(x_BD).astype(jnp.float32)
    table_VD = sharding.constrain(embed.embedding, None, None)
    before_BLD = jnp.take(table_VD, tokens_BL[:, 1:-1], axis=0)
    y_BLD = jnp.concatenate([image_BD[:, None], before_BLD], axis=1) + position_LD[None]
    blocks = transformer.Transformer(
      c.layers,
      c.heads,
      causal=True,
      activation=self.activation,
      initial=transformer.text_initial(c.width, c.layers),
      dtype=self.dtype,
      scan_layers=self.scan_layers,
      remat=self.remat,
      mlp_width=c.mlp_width,
      norm_epsilon=self.norm_epsilon,
      residual_dtype=self.residual_dtype,
      name="transformer",
    )
    y_BLD = blocks(sharding.constrain(y_BLD, "batch", None, None))
    y_BLD = transformer.layer_norm(epsilon=self.norm_epsilon, name="ln_final")(y_BLD)
    logits_BLV = jnp.einsum(
      "bld,vd->blv",
      y_BLD.astype(self.dtype),
      table_VD.astype(self.dtype),
      preferred_element_type=jnp.float32,
    )
    own_BL = jnp.take_along_axis(logits_BLV, tokens_BL[:, 1:, None], axis=2)[:, :, 0]
    logp_BL = own_BL - jax.nn.logsumexp(logits_BLV, axis=-1)
    return jnp.pad(logp_BL, ((0, 0), (1, 0)))


def initial(config: config_lib.Model, prediction: Prediction, rng: jax.Array) -> Any:
  """Random variables: "params" and, of a ResNet, "batch_stats"."""
  image, text = config.image, config.text
  image_BRR3 = jnp.zeros((1, image.resolution, image.resolution, 3))
  tokens_BL = jnp.zeros((1, text.context_length), jnp.int32)
  return Predictive(config, prediction).init(rng, image_BRR3, tokens_BL)


def parameter_counts(config: config_lib.Model, prediction: Prediction) -> dict[str, int]:
  """{"image", "head"} parameters, by shapes alone."""
  make = functools.partial(initial, config, prediction)
  params = jax.eval_shape(make, jax.random.key(0))["params"]
  return {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}


def flops_per_pair(config: config_lib.Model, prediction: Prediction) -> int:
  """Matrix-product FLOPs of one forward pass of a pair, as `clip.flops_per_pair` counts them."""
  image, text = config.image, config.text
  width = config.embed_dim if image.blocks else image.width
  projected = not image.blocks and image.pooling == "class"  # by CLIP, not here
  features = clip.flops_per_image(config) - 2 * image.width * config.embed_dim * projected
  if prediction == "bag_of_words":
    return features + 2 * width * text.vocab_size
  length = text.context_length - 1
  read = dataclasses.replace(config, text=dataclasses.replace(text, context_length=length))
  projection = 2 * text.width * config.embed_dim
  blocks = clip.flops_per_pair(read) - clip.flops_per_image(read) - projection
  return features + 2 * width * text.width + blocks + 2 * length * text.width * text.vocab_size
