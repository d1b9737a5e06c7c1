"""What a camera does to an image: noise and blur, at five severities.

Every corruption takes uint8 [H, W, 3], a severity from 1 to 5 and a generator, and gives uint8
[H, W, 3]. The parameters are those published for images of 224 pixels; the ones that count pixels
(radii, widths, reaches) are multiplied by the image's short side over 224, so that an image of
another size is blurred as much in proportion (one of 32 pixels hardly at all at severity 1). Noise
is drawn for every pixel and is not scaled.
Source: Hendrycks & Dietterich 2019 (arXiv 1903.12261); the figures are those of the authors'
ImageNet-C generator (github.com/hendrycks/robustness, Apache-2.0), the functions are our own.
Differs: the published images are cut off to whole levels and stored as JPEG of quality 85; here
they are rounded and stay as they are. Further differences stand at the function they concern.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import scipy.ndimage
import scipy.signal

SEVERITIES = (1, 2, 3, 4, 5)
PUBLISHED_SIDE = 224  # pixels of the images that the parameters were published for

_T = TypeVar("_T")


class CorruptionError(ValueError):
  """A corruption that does not exist, a severity out of range, or an image of a wrong kind."""


def at(by_severity: Sequence[_T], severity: int) -> _T:
  """The parameter of that severity. Raises: CorruptionError unless it is 1 to 5."""
  if severity not in SEVERITIES:
    raise CorruptionError(f"severity {severity}: want 1 to 5 (clean is the source itself)")
  return by_severity[severity - 1]


def scale_of(image_HW3: np.ndarray) -> float:
  """What a length published for 224 pixels is multiplied by."""
  return min(image_HW3.shape[:2]) / PUBLISHED_SIDE


def to_unit(image_HW3: np.ndarray) -> np.ndarray:
  """uint8 -> float64 from 0 to 1."""
  return image_HW3.astype(np.float64) / 255.0


def to_uint8(unit_HW3: np.ndarray) -> np.ndarray:
  """Any numbers -> uint8: cut off to 0 to 1, times 255, rounded."""
  return np.rint(np.clip(unit_HW3, 0.0, 1.0) * 255.0).astype(np.uint8)


def gaussian_noise(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """Additive, as of an amplifier in low light."""
  sigma = at((0.08, 0.12, 0.18, 0.26, 0.38), severity)
  return to_uint8(to_unit(image_HW3) + rng.normal(0.0, sigma, image_HW3.shape))


def shot_noise(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """Poisson: white is as many photons as the parameter says."""
  photons = at((60, 25, 12, 5, 3), severity)
  return to_uint8(rng.poisson(to_unit(image_HW3) * photons) / photons)


def impulse_noise(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """Salt and pepper: that share of the values (of each channel by itself) is 0 or 255."""
  share = at((0.03, 0.06, 0.09, 0.17, 0.27), severity)
  hit, salt = (rng.random(image_HW3.shape) for _ in range(2))
  return np.where(hit < share, np.where(salt < 0.5, 255, 0), image_HW3).astype(np.uint8)


def speckle_noise(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """Multiplicative: the brighter the value, the more noise."""
  sigma = at((0.15, 0.2, 0.35, 0.45, 0.6), severity)
  return to_uint8(to_unit(image_HW3) * (1.0 + rng.normal(0.0, sigma, image_HW3.shape)))


def gaussian_blur(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """A Gaussian of that standard deviation in pixels; nothing is drawn."""
  del rng
  sigma = at((1, 2, 3, 4, 6), severity) * scale_of(image_HW3)
  return to_uint8(_gaussian(to_unit(image_HW3), sigma))


def defocus_blur(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """A disk of that radius with a softened rim, both in pixels; nothing is drawn."""
  del rng
  radius, rim = at(((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)), severity)
  scale = scale_of(image_HW3)
  return to_uint8(convolve(to_unit(image_HW3), disk(radius * scale, rim * scale), "reflect"))


def motion_blur(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """A trail to one side, within 45 degrees of the horizontal: half its length and its fading."""
  radius, sigma = at(((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)), severity)
  scale, angle = scale_of(image_HW3), rng.uniform(-45.0, 45.0)
  return to_uint8(convolve(to_unit(image_HW3), trail(radius * scale, sigma * scale, angle), "edge"))


def zoom_blur(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """The mean of the image and its enlargements, as of a lens that zooms; nothing is drawn.

  Differs: enlarged about the exact centre; the published ones are up to a pixel off it.
  """
  del rng
  count, step = at(((12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03)), severity)
  unit_HW3 = to_unit(image_HW3)
  total_HW3 = unit_HW3 + sum(enlarged(unit_HW3, 1.0 + i * step) for i in range(count))
  return to_uint8(total_HW3 / (count + 1))


def glass_blur(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """Blurred, each pixel swapped with one within reach, blurred again: seen through rough glass.

  Differs: pixels whose neighbourhoods do not touch are swapped at once, not one after another in
  the order of reading; those at the edge take part.
  """
  sigma, reach, rounds = at(
    ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)), severity
  )
  scale = scale_of(image_HW3)
  unit_HW3 = _gaussian(to_unit(image_HW3), sigma * scale)
  for _ in range(rounds):
    unit_HW3 = _swapped(unit_HW3, max(1, round(reach * scale)), rng)
  return to_uint8(_gaussian(unit_HW3, sigma * scale))


def _gaussian(unit_HW3: np.ndarray, sigma: float) -> np.ndarray:
  return scipy.ndimage.gaussian_filter(unit_HW3, sigma, mode="nearest", axes=(0, 1))


def convolve(unit_HWN: np.ndarray, kernel: np.ndarray, edge: str) -> np.ndarray:
  """Every channel convolved with an odd-sided kernel; beyond the edge `numpy.pad`'s mode `edge`."""
  margins = [(side // 2, side // 2) for side in kernel.shape]
  padded_HWN = np.pad(unit_HWN, (*margins, (0, 0)), mode=edge)  # type: ignore[call-overload]
  return scipy.signal.fftconvolve(padded_HWN, kernel[..., None], mode="valid", axes=(0, 1))


def disk(radius: float, rim: float) -> np.ndarray:
  """A disk of sum 1, its rim softened by a Gaussian that is cut off after one or two pixels."""
  half = int(radius) + 2
  y, x = np.mgrid[-half : half + 1, -half : half + 1]
  inside = (y**2 + x**2 <= radius**2).astype(np.float64)
  soft = scipy.ndimage.gaussian_filter(inside, rim, mode="constant", radius=1 if radius <= 8 else 2)
  return soft / soft.sum()


def trail(radius: float, sigma: float, angle: float) -> np.ndarray:
  """A line of sum 1 from the centre, 2 `radius` long at `angle` degrees, fading as half a Gaussian.

  Differs: between pixels the weight is shared among four of them; the published one rounds.
  """
  steps = np.arange(round(2 * radius) + 1)
  weights = np.exp(-0.5 * (steps / sigma) ** 2)
  half = len(steps)
  kernel = np.zeros((2 * half + 1, 2 * half + 1))
  y, x = (half + steps * turn(np.radians(angle)) for turn in (np.sin, np.cos))
  top, left = np.floor(y).astype(int), np.floor(x).astype(int)
  for down in (0, 1):
    for right in (0, 1):
      share = (1 - np.abs(top + down - y)) * (1 - np.abs(left + right - x))
      np.add.at(kernel, (top + down, left + right), weights * share)
  return kernel / kernel.sum()


def enlarged(unit_HWN: np.ndarray, factor: float) -> np.ndarray:
  """The middle of the image, `factor` times as large, bilinear; the shape stays."""
  steps = np.array([1 / factor, 1 / factor, 1.0])
  centre = (np.array(unit_HWN.shape) - 1) / 2
  return scipy.ndimage.affine_transform(
    unit_HWN, steps, centre - centre * steps, order=1, mode="nearest"
  )


def _swapped(unit_HW3: np.ndarray, reach: int, rng: np.random.Generator) -> np.ndarray:
  """Each pixel in turn changes places with one at most `reach` away, in both directions.

  The pixels of one turn are 2 `reach` apart, so that no two of them want the same one: a turn is
  one operation on arrays, and the result a permutation of the pixels.
  """
  out_HW3 = unit_HW3.copy()
  height, width = out_HW3.shape[:2]
  down_HW, right_HW = rng.integers(-reach, reach, size=(2, height, width))
  period = 2 * reach
  for turn in range(period**2):
    y, x = np.mgrid[turn // period : height : period, turn % period : width : period]
    other_y, other_x = y + down_HW[y, x], x + right_HW[y, x]
    inside = (other_y >= 0) & (other_y < height) & (other_x >= 0) & (other_x < width)
    here, there = (y[inside], x[inside]), (other_y[inside], other_x[inside])
    out_HW3[here], out_HW3[there] = out_HW3[there], out_HW3[here]
  return out_HW3
