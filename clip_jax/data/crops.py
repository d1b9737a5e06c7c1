"""Training's crops, made fast: JPEGs decoded at a fraction of their size, only the crop resized,
with vector instructions where the machine has them.

For training alone. Evaluation decodes every image whole and resizes as the original does
(data/images.py); tests/test_layout.py lets no module but data/pipeline.py import this one, and
`config.data.scaled_decode` turns it off.
"""

from typing import Any

import numpy as np
from PIL import Image

from clip_jax.data import images

try:
  import cykooz_resizer as simd
except ImportError:  # it has builds for x86-64 alone
  simd = None

# Raise one whenever the same record would give another crop. A run does not go on with the other's.
VERSION = 2 if simd is None else 3


def decode(source: Any, short_side: int) -> Image.Image:
  """As `images.as_image`, but a JPEG's bytes at 1/2, 1/4 or 1/8 of its size where that leaves at
  least `short_side` pixels on its short side; sides are rounded up.

  The decoder leaves out the high frequencies of each block of 8x8 (libjpeg's scaled inverse DCT),
  which gives about the means of squares of 2x2, 4x4 or 8x8 pixels; the bicubic resize that follows
  has less left to average. Crops of 224 pixels from JPEGs of 512 (quality 90) differ from those of
  the whole decode by 1.0 of 255 in the mean over 20 photos (44 dB, the worst 35), 0.7 over 29
  pieces of clip art (42 dB, the worst 33) and 0.8 over 40 drawn scenes (46 dB, the worst 43).
  Raises: ImageError, as the whole decode does.
  """
  if not isinstance(source, bytes):
    return images.as_image(source)
  image = images.header(source)
  image.draft(None, (short_side, short_side))  # of JPEGs only
  return images.pixels(image)


def crop(
  image: Image.Image, resolution: int, short_side: int, rng: np.random.Generator
) -> np.ndarray:
  """`images.fit`'s random square, without the resized pixels around it: uint8 [R, R, 3], read-only.

  A value in 6 is off by 1 of 255 (of noise, 1 in 3), because the weights have 14 bits instead of
  22; by Pillow, one in some 400, because it keeps the square's corners in float32. Where values lie
  over 255 or under 0 between the two passes, which happens in noise, they may be off by up to 25:
  columns and rows are not always taken in `fit`'s order.
  Args and Raises: as `images.fit`.
  """
  cut, size, corner = images.place(image.size, resolution, short_side, rng)
  if any(cut):
    image = image.crop((*cut, image.width - cut[0], image.height - cut[1]))
  ends = (corner[0] + resolution, corner[1] + resolution)
  if image.size == size:
    return np.asarray(image.crop((*corner, *ends)))
  scale = (image.width / size[0], image.height / size[1])
  left, top = corner[0] * scale[0], corner[1] * scale[1]
  right, bottom = min(ends[0] * scale[0], image.width), min(ends[1] * scale[1], image.height)
  return np.asarray(_resize(image, resolution, (left, top, right, bottom)))


def _resize(
  image: Image.Image, resolution: int, box: tuple[float, float, float, float]
) -> Image.Image:
  """The box (left, top, right, bottom) of an image in mode RGB -> a square, bicubic.

  Pillow enlarges: the other library drops weights of zero at the ends of each window, and where the
  first new pixel falls on the middle of an old one, that window begins later than the next, which
  is then read from outside of the memory. Where an image shrinks, no window overtakes another.
  """
  left, top, right, bottom = box
  if simd is None or min(right - left, bottom - top) < resolution:
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC, box)
  part = simd.CropBox(left, top, right - left, bottom - top)
  bicubic = simd.ResizeAlg.convolution(simd.FilterType.catmull_rom)  # Keys, a = -0.5, as Pillow's
  square = Image.new("RGB", (resolution, resolution))
  simd.Resizer().resize_pil(image, square, simd.ResizeOptions(bicubic, False, part))
  return square
