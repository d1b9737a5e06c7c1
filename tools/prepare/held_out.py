"""Which pairs may be held out: those unlike all others, so that no test picture is in training."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from tools.prepare import captions

_SIDE = 16  # pixels of the small pictures that are compared
_ALIKE = 0.97  # cosine of two small pictures, as ink on white
_BLOCK = 512  # pictures compared with all others at a time


def small_picture(image: Image.Image) -> np.ndarray:
  """An RGB image -> float32 [16 * 16 * 3], unit norm: how much ink is where, whatever its size."""
  small = image.resize((_SIDE, _SIDE), Image.Resampling.BOX)
  ink = 255.0 - np.asarray(small, np.float32).reshape(-1)
  return ink / max(float(np.linalg.norm(ink)), 1e-6)


def unlike_all_others(
  names: Sequence[str], texts: Sequence[tuple[str, ...]], pixels_NF: np.ndarray
) -> list[bool]:
  """Of each pair: whether no other has its base name, its first caption, or nearly its picture."""
  by_name = Counter(names)
  owners = Counter(text for own in texts for text in set(map(captions.letters, own)))
  alike = _has_twin(pixels_NF)
  return [
    by_name[name] == 1 and owners[captions.letters(own[0])] == 1 and not twin
    for name, own, twin in zip(names, texts, alike, strict=True)
  ]


def drawn(keys: Iterable[str], size: int) -> list[str]:
  """`size` of the keys, by their hash: the same ones everywhere, hardly others when some go."""
  return sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())[:size]


def _has_twin(pixels_NF: np.ndarray) -> list[bool]:
  out: list[bool] = []
  for start in range(0, len(pixels_NF), _BLOCK):
    cosine_bN = pixels_NF[start : start + _BLOCK] @ pixels_NF.T
    rows = np.arange(len(cosine_bN))
    cosine_bN[rows, start + rows] = -1.0
    out += [bool(best) for best in cosine_bN.max(axis=1) > _ALIKE]
  return out
