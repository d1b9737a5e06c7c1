"""Resized positional embeddings against PyTorch's interpolate, as open_clip calls it."""

import numpy as np
import pytest
import torch

from clip_jax.models import resize


def _embedding(rows: int) -> np.ndarray:
  return np.random.default_rng(rows).normal(size=(rows, 10)).astype(np.float32)


def _torch(grid_SD: np.ndarray, old: tuple[int, int], new: tuple[int, int], antialias=True):
  image = torch.tensor(grid_SD).reshape(1, *old, -1).permute(0, 3, 1, 2)
  resized = torch.nn.functional.interpolate(
    image, size=new, mode="bicubic", antialias=antialias, align_corners=False
  )
  return resized.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1).numpy()


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize(
  ("old", "new"),
  [
    ((16, 16), (24, 24)),  # ViT-L/14 from 224 to 336 pixels
    ((24, 24), (16, 16)),
    ((7, 7), (12, 12)),  # the attention pooling of RN50 from 224 to 384 pixels
    ((14, 14), (9, 20)),  # not square, one side shrinks
    ((5, 8), (8, 5)),
    ((27, 27), (1, 3)),
    ((2, 1), (7, 4)),
  ],
)
def test_equals_pytorch(old, new, class_token):
  embedding_SD = _embedding(old[0] * old[1] + class_token)
  got = np.asarray(resize.resize_positions(embedding_SD, old, new, class_token))
  np.testing.assert_array_equal(got[:class_token], embedding_SD[:class_token])
  expected = _torch(embedding_SD[int(class_token) :], old, new)
  np.testing.assert_allclose(got[class_token:], expected, atol=1e-5)


def test_pytorch_without_antialias_is_another_kernel():
  """So the choice is told apart by the test above, for a growing grid too."""
  embedding_SD = _embedding(49)
  got = resize.resize_positions(embedding_SD, (7, 7), (12, 12), class_token=False)
  other = _torch(embedding_SD, (7, 7), (12, 12), antialias=False)
  assert np.abs(np.asarray(got) - other).max() > 0.05


def test_the_same_grid_changes_nothing():
  embedding_SD = _embedding(13)
  same = resize.resize_positions(embedding_SD, (3, 4), (3, 4), class_token=True)
  np.testing.assert_array_equal(same, embedding_SD)


def test_wrong_grids_are_told():
  with pytest.raises(ValueError, match=r"\(49, 10\); a grid of 7 x 7 patches and a class token"):
    resize.resize_positions(_embedding(49), (7, 7), (12, 12), class_token=True)
  with pytest.raises(ValueError, match=r"from \(7, 7\) to \(0, 12\)"):
    resize.resize_positions(_embedding(49), (7, 7), (0, 12), class_token=False)
