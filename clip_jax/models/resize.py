"""Positional embeddings for another resolution."""

import jax
import jax.numpy as jnp


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
