"""Weights for another resolution than the one they were trained at."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from clip_jax.config import Model

_MOST_PIXELS = 4096


def at_resolution(
  params: Mapping[str, Any], model: Model, resolution: int
) -> tuple[dict[str, Any], Model]:
  """The same CLIP for square images of `resolution` pixels: its image positions resized.

  Raises: ValueError when the patch (of a ResNet, the 32 pixels of a last position) does not divide
    the resolution.
  """
  image = model.image
  if not 1 <= resolution <= _MOST_PIXELS or resolution % image.patch:
    raise ValueError(
      f"resolution {resolution}: must be a multiple of {image.patch}, the pixels that one position "
      f"of the image encoder covers, and at most {_MOST_PIXELS}"
    )
  old, new = image.resolution // image.patch, resolution // image.patch
  where = ("image", "attention_pool") if image.blocks else ("image",)
  resized = _replaced(params, (*where, "positional_embedding"), old, new, image.pooling == "class")
  return resized, dataclasses.replace(
    model, image=dataclasses.replace(image, resolution=resolution)
  )


def _replaced(
  tree: Mapping[str, Any], path: tuple[str, ...], old: int, new: int, class_token: bool
) -> dict[str, Any]:
  """The same nested dict with the embedding at `path` resized."""
  first, *rest = path
  inner = tree[first]
  if rest:
    changed: Any = _replaced(inner, tuple(rest), old, new, class_token)
  else:
    changed = resize_positions(jnp.asarray(inner), (old, old), (new, new), class_token)
  return {**tree, first: changed}


def resize_positions(
  embedding_SD: jax.Array, old_grid: tuple[int, int], new_grid: tuple[int, int], class_token: bool
) -> jax.Array:
  """Positional embeddings [S, D] of one grid of patches -> [S', D] of another, float32.

  Args: grids as (rows, columns), not necessarily square; class_token, whether the first row is
    not of the grid (the class token's, or the mean token's in attention pooling): it is kept.
  Raises: ValueError when S is not what the old grid has, or a grid is empty.
  Bicubic with Keys' a = -0.5, low-pass filtered where the grid shrinks, sample points at the
  patches' centres. Source: open_clip's resize_pos_embed, which asks PyTorch for bicubic with
  antialias=True and align_corners=False. Differs: Hugging Face's interpolate_pos_encoding leaves
  antialias out, and PyTorch then takes a = -0.75.
  """
  first = int(class_token)
  (rows, columns), width = old_grid, embedding_SD.shape[-1]
  if embedding_SD.ndim != 2 or len(embedding_SD) != first + rows * columns:
    raise ValueError(
      f"positional embeddings are {embedding_SD.shape}; a grid of {rows} x {columns} patches"
      f"{' and a class token' if class_token else ''} has [{first + rows * columns}, D]"
    )
  if min(*old_grid, *new_grid) < 1:
    raise ValueError(f"a grid of patches cannot be resized from {old_grid} to {new_grid}")
  embedding_SD = jnp.asarray(embedding_SD, jnp.float32)
  grid = embedding_SD[first:].reshape(rows, columns, width)
  grid = jax.image.resize(grid, (*new_grid, width), "cubic", antialias=True)
  return jnp.concatenate([embedding_SD[:first], grid.reshape(-1, width)])
