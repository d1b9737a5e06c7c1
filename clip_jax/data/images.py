"""Decode, resize, crop, normalise: from the bytes of a file to the encoder's input.

Decoding is strict: every kind of image has a stated result, or an error that says why not.
Sources: sections 2.3 and 2.5; openai/CLIP `clip.py` (torchvision's Resize and CenterCrop on
Pillow images, whose rounding is kept).
"""

import io
import os
import pathlib
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # never EPS: it would start Ghostscript
MAX_PIXELS = 50_000_000
MAX_SIDE = 20_000
MAX_BYTES = 200_000_000
_MAX_RATIO = 64

# Pillow warns of odd metadata and of sizes that are refused here. (Not `catch_warnings`: decoding
# runs in threads.)
warnings.filterwarnings("ignore", module=r"PIL\.")

# All that Pillow's decoders raise on damaged or hostile files.
_DECODER_ERRORS = (
  OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError,
  AttributeError, NotImplementedError, MemoryError, struct.error, zlib.error,
)  # fmt: skip


class ImageError(ValueError):
  """An image that cannot be used. `cause` is one word, for counts."""

  def __init__(self, cause: str, message: str):
    super().__init__(message)
    self.cause = cause

  def __reduce__(self) -> tuple[Any, ...]:
    return ImageError, (self.cause, str(self))


def decode(data: bytes) -> Image.Image:
  """The bytes of a file -> a Pillow image in mode RGB.

  16-bit grey is scaled to 8 bits (a plain conversion would saturate); transparency is composited
  on white; CMYK, palettes, grey and 1-bit are converted; of an animation the first frame counts;
  EXIF orientation is not applied (as in the original).
  Raises: ImageError, with cause "too_large", "empty", "unreadable", "truncated" or "mode".
  Differs: the original drops the alpha channel, and resizes palettes and alpha before it converts
    to RGB; the colours of invisible pixels are arbitrary, and white is what people see.
  """
  return pixels(header(data))


def header(data: bytes) -> Image.Image:
  """The first half of `decode`: a file whose size is known and allowed, its pixels not yet read."""
  if not data:
    raise ImageError("empty", "no bytes at all")
  if len(data) > MAX_BYTES:
    raise ImageError("too_large", f"{len(data):,} bytes, over the limit of {MAX_BYTES:,}")
  try:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
  except Image.DecompressionBombError as error:
    raise ImageError("too_large", f"over {MAX_PIXELS:,} pixels by far ({error})") from error
  except _DECODER_ERRORS as error:
    kinds = ", ".join(FORMATS)
    raise ImageError("unreadable", f"not an image of a kind that is read ({kinds})") from error
  width, height = image.size
  if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
    raise ImageError(
      "too_large", f"{width} x {height} pixels, over {MAX_PIXELS:,} or a side over {MAX_SIDE:,}"
    )
  if min(width, height) < 1:
    raise ImageError("empty", f"{width} x {height} pixels")
  return image


def pixels(image: Image.Image) -> Image.Image:
  """The second half of `decode`: reads the pixels, in mode RGB."""
  try:
    image.load()
  except _DECODER_ERRORS as error:
    raise ImageError("truncated", f"cannot be decoded to its end ({error})") from error
  return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
  """Any mode -> RGB, by the rules of `decode`."""
  mode = image.mode
  if mode.startswith("I;16") or mode == "I":
    grey = np.asarray(image)
    if mode == "I" and (grey.min() < 0 or grey.max() > 65535):
      raise ImageError("mode", "32-bit integer pixels, whose range is not known")
    return Image.fromarray(np.round(grey / 257).astype(np.uint8)).convert("RGB")
  if mode == "F":
    raise ImageError("mode", "floating-point pixels, whose range is not known")
  if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, layer).convert("RGB")
  return image if mode == "RGB" else image.convert("RGB")  # a copy would take as long as decoding


def as_image(source: Any) -> Image.Image:
  """A path, the bytes of a file, uint8 [H, W, 3], or a Pillow image -> an image in mode RGB.

  Raises: ImageError, naming the file where there is one.
  """
  if isinstance(source, Image.Image):
    try:
      source.load()
      return _rgb(source)
    except OSError as error:
      raise ImageError("truncated", f"cannot be decoded to its end ({error})") from error
  if isinstance(source, np.ndarray):
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
      raise ImageError(
        "mode", f"an array must be uint8 [H, W, 3], not {source.dtype} {source.shape}"
      )
    if 0 in source.shape:
      raise ImageError("empty", f"an array of shape {source.shape} has no pixels")
    return Image.fromarray(source)
  if isinstance(source, bytes):
    return decode(source)
  if not isinstance(source, (str, os.PathLike)):
    kinds = "a path, bytes, a PIL image or uint8 [H, W, 3]"
    raise ImageError("unreadable", f"{type(source).__name__} is no image: give {kinds}")
  return _from_file(pathlib.Path(source))


def _from_file(path: pathlib.Path) -> Image.Image:
  try:
    if path.stat().st_size > MAX_BYTES:
      raise ImageError("too_large", f"{path}: over the limit of {MAX_BYTES:,} bytes")
    data = path.read_bytes()
  except OSError as error:
    raise ImageError("unreadable", f"{path}: {error.strerror or error}") from error
  try:
    return decode(data)
  except ImageError as error:
    raise ImageError(error.cause, f"{path}: {error}") from error


def fit(
  image: Image.Image,
  resolution: int,
  short_side: int = 0,
  rng: np.random.Generator | None = None,
) -> np.ndarray:
  """Resizes the short side, bicubic, then crops a square: uint8 [R, R, 3].

  Args: short_side, in pixels after the resize, 0 for `resolution`; rng, for a random square (the
    paper's only augmentation, section 2.3), None for the central one (evaluation).
  Of an image over 64 times as long as wide only the middle takes part, so that a thin one does
  not grow without bound; the central square stays the same.
  Raises: ValueError when the short side is under the resolution.
  """
  cut, size, corner = place(image.size, resolution, short_side, rng)
  if any(cut):
    image = image.crop((*cut, image.width - cut[0], image.height - cut[1]))
  if image.size != size:
    image = image.resize(size, Image.Resampling.BICUBIC)
  if size != (resolution, resolution):
    image = image.crop((*corner, corner[0] + resolution, corner[1] + resolution))
  return np.array(image)


Pair = tuple[int, int]


def place(
  size: Pair, resolution: int, short_side: int = 0, rng: np.random.Generator | None = None
) -> tuple[Pair, Pair, Pair]:
  """Where `fit`'s square lies in an image of `size`, which is (width, height) as all pairs here.

  Returns: the pixels to cut off at both ends of each side, the size to which the rest is resized,
    and the square's left upper corner in that. Raises: as `fit`.
  """
  short = short_side or resolution
  if short < resolution:
    raise ValueError(f"short_side {short} is under the resolution {resolution}")
  cut = (_cut(size[0], min(size)), _cut(size[1], min(size)))
  width, height = size[0] - 2 * cut[0], size[1] - 2 * cut[1]
  # torchvision's Resize: the long side is truncated, not rounded
  if width <= height:
    width, height = short, int(short * height / width)
  else:
    width, height = int(short * width / height), short
  if rng is None:
    # torchvision's CenterCrop: half-way cases go to the even number
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
  else:
    left, top = (int(rng.integers(side - resolution + 1)) for side in (width, height))
  return cut, (width, height), (left, top)


def _cut(side: int, short: int) -> int:
  """The pixels at either end of a side that take no part."""
  return max(0, (side - _MAX_RATIO * short) // 2)


def squash(image: Image.Image, resolution: int) -> np.ndarray:
  """Resizes both sides, bicubic, whatever becomes of the proportions: uint8 [R, R, 3]."""
  if image.size != (resolution, resolution):
    image = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
  return np.array(image)


def fit_on_device(image_BHW3: jax.Array, resolution: int) -> jax.Array:
  """`fit`'s central square of uint8 images [B, H, W, 3] of one size: uint8 [B, R, R, 3], on the
  device.

  Equals Pillow 13 pixel for pixel: its weights in fixed point, its rounding between rows and
  columns, and its order, which is columns first where the height shrinks much more than the width.
  (Past a shrinking by 8 the sums may round at their last of 22 bits.)
  """
  height, width = image_BHW3.shape[1:3]
  if height == width == resolution:
    return image_BHW3
  short = min(height, width)
  cut = [_cut(side, short) for side in (height, width)]
  image_BHW3 = image_BHW3[:, cut[0] : height - cut[0], cut[1] : width - cut[1]]
  height, width = image_BHW3.shape[1:3]
  new_height, new_width = (int(resolution * side / short) for side in (height, width))
  top, left = (round((side - resolution) / 2) for side in (new_height, new_width))
  passes = [
    ("bhwc,rw->bhrc", _bicubic_weights(width, new_width)[left : left + resolution]),
    ("bhwc,rh->brwc", _bicubic_weights(height, new_height)[top : top + resolution]),
  ]
  if height - new_height > max(0, 2 * (width - new_width)):
    passes.reverse()
  for subscripts, weights in passes:
    image_BHW3 = _weighted_sums(subscripts, image_BHW3, weights)
  return image_BHW3


_FIXED_POINT_BITS = 22  # after the point. Source: Pillow Resample.c


def _bicubic_weights(size: int, new_size: int) -> np.ndarray:
  """int32 [new_size, size]: what each old pixel adds to each new one, in fixed point."""
  if new_size == size:
    return np.eye(size, dtype=np.int32) << _FIXED_POINT_BITS
  scale = size / new_size
  stretch = max(scale, 1.0)  # the kernel widens where the image shrinks
  centre = (np.arange(new_size)[:, None] + 0.5) * scale
  first, end = (np.floor(centre + sign * 2 * stretch + 0.5) for sign in (-1, 1))
  old = np.arange(size)[None]
  x = np.abs(old + 0.5 - centre) / stretch
  near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2  # Keys, a = -0.5
  weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
  weights = np.where((old >= first) & (old < end), weights, 0.0)
  weights /= weights.sum(1, keepdims=True)
  return np.trunc(weights * (1 << _FIXED_POINT_BITS) + np.copysign(0.5, weights)).astype(np.int32)


def _weighted_sums(subscripts: str, image_BHW3: jax.Array, weights: np.ndarray) -> jax.Array:
  """One pass. The halves of the weights keep every sum exact in float32: 8 + 11 bits a product."""
  low = weights & 0x7FF
  high = (weights - low) >> 11
  pixels = image_BHW3.astype(jnp.float32)
  sums = [
    jnp.einsum(subscripts, pixels, half.astype(np.float32), precision=jax.lax.Precision.HIGHEST)
    for half in (high, low)
  ]
  total = (sums[0].astype(jnp.int32) << 11) + sums[1].astype(jnp.int32)
  rounded = (total + (1 << (_FIXED_POINT_BITS - 1))) >> _FIXED_POINT_BITS
  return jnp.clip(rounded, 0, 255).astype(jnp.uint8)


def normalise(image_BRR3: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """Pixels 0 to 255 [B, R, R, 3] -> float32, (x / 255 - mean) / std by channel, on the device."""
  by_channel = (1, 1, 1, 3)
  mean_1113 = jnp.asarray(mean, jnp.float32).reshape(by_channel)
  std_1113 = jnp.asarray(std, jnp.float32).reshape(by_channel)
  return (image_BRR3.astype(jnp.float32) / 255.0 - mean_1113) / std_1113
