"""What stands between a scene and its file: weather, light, distortion and compression.

Every corruption takes uint8 [H, W, 3], a severity from 1 to 5 and a generator, and gives uint8
[H, W, 3]; parameters, scaling and source as in `noise_and_blur`.
"""

import io

import numpy as np
import scipy.ndimage
from PIL import Image

from clip_jax.evaluation.stress.noise_and_blur import (
  at,
  convolve,
  enlarged,
  scale_of,
  to_uint8,
  to_unit,
  trail,
)

_LUMA = np.array([0.299, 0.587, 0.114])  # of red, green, blue. Source: ITU-R BT.601
_ICE = np.array([0.84, 0.93, 1.0])  # the colour of frost: white, a little blue
_ELASTIC_SIDE = 244  # sic: the published generator takes it for the side of its 224-pixel images


def snow(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """Flakes that fall in two directions over a whitened image.

  Parameters: mean and deviation of the noise that flakes are made of, their size in pixels, the
  threshold over which noise is a flake, half the length and the fading of their trail in pixels,
  and what is left of the image's own colours.
  """
  mean, deviation, size, threshold, radius, sigma, kept = at(
    (
      (0.1, 0.3, 3.0, 0.5, 10, 4, 0.8),
      (0.2, 0.3, 2.0, 0.5, 12, 4, 0.7),
      (0.55, 0.3, 4.0, 0.9, 12, 8, 0.7),
      (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
      (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    ),
    severity,
  )
  scale, unit_HW3 = scale_of(image_HW3), to_unit(image_HW3)
  noise_HW1 = rng.normal(mean, deviation, (*image_HW3.shape[:2], 1))
  flakes_HW1 = enlarged(noise_HW1, max(1.0, size * scale))
  flakes_HW1 = np.clip(np.where(flakes_HW1 < threshold, 0.0, flakes_HW1), 0.0, 1.0)
  angle = rng.uniform(-135.0, -45.0)
  flakes_HW1 = convolve(flakes_HW1, trail(radius * scale, sigma * scale, angle), "edge")
  grey_HW1 = (unit_HW3 @ _LUMA)[..., None]
  white_HW3 = np.maximum(unit_HW3, grey_HW1 * 1.5 + 0.5)
  covered_HW3 = kept * unit_HW3 + (1.0 - kept) * white_HW3
  return to_uint8(covered_HW3 + flakes_HW1 + np.rot90(flakes_HW1, 2))


def frost(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """Ice on the pane: shares of the image and of a drawn pattern of ice, added.

  Differs: the published one lays a piece of one of five photographs of frost on the image. Those
  are no part of this project; the pattern is drawn here, so the figures are not comparable.
  """
  own, ice = at(((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)), severity)
  pattern_HW1 = _ice(image_HW3.shape[0], image_HW3.shape[1], scale_of(image_HW3), rng)
  return to_uint8(own * to_unit(image_HW3) + ice * pattern_HW1 * _ICE)


def _ice(height: int, width: int, scale: float, rng: np.random.Generator) -> np.ndarray:
  """float [H, W, 1], 0 to 1: ridges of a fractal, and needles in three directions between them."""
  ridges_HW1 = (1.0 - np.abs(2.0 * _plasma(height, width, 1.4, rng) - 1.0))[..., None] ** 2
  needles_HW1 = np.zeros((height, width, 1))
  for angle in rng.uniform(0.0, 360.0) + np.array([0.0, 60.0, 120.0]):
    seeds_HW1 = (rng.random((height, width, 1)) < 0.02).astype(np.float64)
    needles_HW1 += convolve(seeds_HW1, trail(12 * scale, 8 * scale, angle), "wrap")
  needles_HW1 /= max(float(needles_HW1.max()), 1e-9)
  return np.clip(0.25 + 0.55 * ridges_HW1 + 0.5 * needles_HW1, 0.0, 1.0)


def fog(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """A fractal haze of that thickness over the image, rougher the less its decay."""
  thickness, decay = at(((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)), severity)
  unit_HW3 = to_unit(image_HW3)
  brightest = unit_HW3.max()
  haze_HW1 = _plasma(image_HW3.shape[0], image_HW3.shape[1], decay, rng)[..., None]
  return to_uint8((unit_HW3 + thickness * haze_HW1) * brightest / (brightest + thickness))


def _plasma(height: int, width: int, decay: float, rng: np.random.Generator) -> np.ndarray:
  """float [H, W], 0 to 1: a fractal by the diamond-square algorithm on a torus, cut to size.

  Each halving of the grid divides the random part by decay squared, as the published one does.
  """
  side = 2
  while side < max(height, width):
    side *= 2
  field, step, swing = np.zeros((side, side)), side, 1.0
  while step >= 2:
    half = step // 2
    corner = field[::step, ::step].copy()
    below, right = np.roll(corner, -1, 0), np.roll(corner, -1, 1)
    middle, top, left = rng.uniform(-swing, swing, size=(3, *corner.shape))
    middle += (corner + below + right + np.roll(below, -1, 1)) / 4
    field[half::step, half::step] = middle
    field[::step, half::step] = top + (corner + right + middle + np.roll(middle, 1, 0)) / 4
    field[half::step, ::step] = left + (corner + below + middle + np.roll(middle, 1, 1)) / 4
    step, swing = half, swing / decay**2
  field -= field.min()
  return (field / field.max())[:height, :width]


def brightness(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """That much added to the value of HSV; hue and saturation stay. Nothing is drawn."""
  del rng
  added = at((0.1, 0.2, 0.3, 0.4, 0.5), severity)
  unit_HW3 = to_unit(image_HW3)
  value_HW1 = unit_HW3.max(axis=2, keepdims=True)
  brighter_HW1 = np.minimum(value_HW1 + added, 1.0)
  # With hue and saturation kept, all channels grow as the value does; black turns grey.
  ratio_HW3 = np.divide(unit_HW3, value_HW1, out=np.ones_like(unit_HW3), where=value_HW1 > 0)
  return to_uint8(ratio_HW3 * brighter_HW1)


def contrast(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """That share of each channel's distance from its mean. Nothing is drawn."""
  del rng
  share = at((0.4, 0.3, 0.2, 0.1, 0.05), severity)
  unit_HW3 = to_unit(image_HW3)
  mean_113 = unit_HW3.mean(axis=(0, 1), keepdims=True)
  return to_uint8((unit_HW3 - mean_113) * share + mean_113)


def elastic_transform(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """A random affine map of at most that reach, and waves of that height and width, in pixels.

  Differs: the two are one resampling here; the published one interpolates twice.
  """
  height, width, reach = at(
    ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    severity,
  )
  side = _ELASTIC_SIDE * scale_of(image_HW3)
  shape = image_HW3.shape[:2]
  noise_2HW = rng.uniform(-1.0, 1.0, (2, *shape))
  waves_2HW = scipy.ndimage.gaussian_filter(
    noise_2HW, width * side, mode="reflect", truncate=3.0, axes=(1, 2)
  )
  places_2HW = np.indices(shape) + height * side * waves_2HW
  centre, span = np.array(shape) // 2, max(1, min(shape) // 3)
  points_33 = np.ones((3, 3))  # rows of y, x, 1
  points_33[:, :2] = centre + span * np.array([[1, 1], [1, -1], [-1, -1]])
  moved_32 = points_33[:, :2] + rng.uniform(-reach * side, reach * side, (3, 2))
  affine_32 = np.linalg.solve(points_33, moved_32)
  sampled_2HW = np.einsum("iyx,ij->jyx", places_2HW, affine_32[:2]) + affine_32[2][:, None, None]
  unit_HW3 = to_unit(image_HW3)
  channels = [
    scipy.ndimage.map_coordinates(unit_HW3[..., c], sampled_2HW, order=1, mode="mirror")
    for c in range(3)
  ]
  return to_uint8(np.stack(channels, axis=-1))


def pixelate(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """That share of the pixels a side, as boxes. Nothing is drawn."""
  del rng
  share = at((0.6, 0.5, 0.4, 0.3, 0.25), severity)
  image = Image.fromarray(image_HW3)
  small = (max(1, int(image.width * share)), max(1, int(image.height * share)))
  boxes = image.resize(small, Image.Resampling.BOX)
  return np.array(boxes.resize(image.size, Image.Resampling.BOX))


def saturate(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """The saturation of HSV times the first number, plus the second. Nothing is drawn.

  Severities 1 and 2 take colour away, the others add it. Grey counts as red, the hue of number 0.
  """
  del rng
  factor, added = at(((0.3, 0.0), (0.1, 0.0), (2.0, 0.0), (5.0, 0.1), (20.0, 0.2)), severity)
  unit_HW3 = to_unit(image_HW3)
  value_HW1 = unit_HW3.max(axis=2, keepdims=True)
  spread_HW1 = value_HW1 - unit_HW3.min(axis=2, keepdims=True)
  saturation_HW1 = spread_HW1 / np.where(value_HW1 > 0, value_HW1, 1.0)
  new_HW1 = np.clip(saturation_HW1 * factor + added, 0.0, 1.0)
  # How far each channel is below the largest, as a share of the spread: that is the hue.
  red_HW3 = np.broadcast_to(np.array([0.0, 1.0, 1.0]), unit_HW3.shape)
  below_HW3 = np.divide(value_HW1 - unit_HW3, spread_HW1, out=red_HW3.copy(), where=spread_HW1 > 0)
  return to_uint8(value_HW1 * (1.0 - new_HW1 * below_HW3))


def jpeg_compression(image_HW3: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
  """A JPEG file of that quality, with Pillow's other settings. Nothing is drawn.

  Its blocks are 8 or 16 pixels whatever the image's size, so a small image suffers more.
  """
  del rng
  file = io.BytesIO()
  Image.fromarray(image_HW3).save(file, "JPEG", quality=at((25, 18, 15, 10, 7), severity))
  with Image.open(file) as image:
    return np.array(image.convert("RGB"))
