"""Training's JPEGs at a fraction of their size, crops resized alone; evaluation as ever."""

import io
import types

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from clip_jax import config as c
from clip_jax import inference
from clip_jax.data import crops, images, records
from clip_jax.evaluation import encoding
from tests import test_images


def _smooth(width: int, height: int, mode: str = "RGB") -> Image.Image:
  """Slow waves in all colours, as photos have them."""
  y, x = np.mgrid[:height, :width]
  waves = [np.sin(x / 9 + k) + np.cos(y / 7 - 2 * k) for k in range(3)]
  return Image.fromarray((128 + 60 * np.stack(waves, 2)).astype(np.uint8)).convert(mode)


def _jpeg(image: Image.Image, **options) -> bytes:
  out = io.BytesIO()
  image.save(out, "JPEG", quality=95, **options)
  return out.getvalue()


@pytest.mark.parametrize(
  ("size", "short_side", "expected"),
  [
    ((512, 512), 224, (256, 256)),
    ((512, 512), 256, (256, 256)),
    ((512, 512), 257, (512, 512)),
    ((447, 900), 224, (447, 900)),
    ((448, 900), 224, (224, 450)),
    ((683, 512), 224, (342, 256)),
    ((897, 1200), 224, (225, 300)),
    ((2000, 1799), 224, (250, 225)),
    ((1791, 1791), 224, (448, 448)),
    ((4000, 3000), 224, (500, 375)),
    ((100, 300), 224, (100, 300)),
  ],
)
def test_a_jpeg_is_halved_while_its_short_side_is_enough(size, short_side, expected):
  data = _jpeg(Image.new("RGB", size, (200, 30, 90)))
  image = crops.decode(data, short_side)
  assert image.size == expected
  assert image.mode == "RGB"
  assert min(image.size) >= min(short_side, *size)
  # One colour has no frequencies to leave out.
  assert np.abs(np.asarray(image).astype(int) - (200, 30, 90)).max() <= 2


def _squares_mean(pixels_HW3: np.ndarray, side: int) -> np.ndarray:
  height, width = pixels_HW3.shape[:2]
  return pixels_HW3.reshape(height // side, side, width // side, side, 3).mean((1, 3))


@pytest.mark.parametrize("side", [2, 4, 8])
@pytest.mark.parametrize(
  ("mode", "options"),
  [
    ("RGB", {}),
    ("RGB", {"progressive": True}),
    ("RGB", {"subsampling": 0}),
    ("RGB", {"restart_marker_blocks": 3}),
    ("L", {}),
    ("CMYK", {}),
  ],
  ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_its_pixels_are_about_the_means_of_squares(side, mode, options):
  data = _jpeg(_smooth(128, 96, mode), **options)
  whole = np.asarray(images.decode(data)).astype(float)
  image = crops.decode(data, 96 // side)
  assert (image.size, image.mode) == ((128 // side, 96 // side), "RGB")
  difference = np.abs(np.asarray(image) - _squares_mean(whole, side))
  assert difference.mean() < 1.0
  assert difference.max() < 8


def test_orientation_is_left_alone_and_of_several_pictures_the_first_counts():
  exif = Image.Exif()
  exif[0x0112] = 6
  assert crops.decode(_jpeg(_smooth(128, 96), exif=exif), 48).size == (64, 48)
  out = io.BytesIO()
  frames = [_smooth(128, 96), Image.new("RGB", (128, 96))]
  frames[0].save(out, "MPO", save_all=True, append_images=frames[1:])
  image = crops.decode(out.getvalue(), 48)
  assert image.size == (64, 48)
  assert 120 < np.asarray(image).mean() < 136


@pytest.mark.parametrize("name", test_images.GOOD)
def test_every_kind_keeps_its_stated_colours(name):
  data, size, mean = test_images.GOOD[name]
  image = crops.decode(data, 4)
  shrunk = "jpeg" in name
  assert (image.mode, image.size) == ("RGB", (4, 4) if shrunk else size)
  np.testing.assert_allclose(np.asarray(image).reshape(-1, 3).mean(0), mean, atol=1.0)
  if not shrunk:
    np.testing.assert_array_equal(np.asarray(image), np.asarray(images.decode(data)))


def test_arrays_go_as_they_are():
  pixels_HW3 = np.asarray(_smooth(64, 64))
  np.testing.assert_array_equal(np.asarray(crops.decode(pixels_HW3, 8)), pixels_HW3)


def _outcome(decode, data: bytes) -> str:
  try:
    return decode(data).mode
  except images.ImageError as error:
    return f"{error.cause}: {error}"


@pytest.mark.parametrize("name", test_images.BAD)
def test_bad_images_are_refused_as_ever(name):
  data, cause = test_images.BAD[name]
  told = _outcome(lambda data: crops.decode(data, 8), data)
  assert told.startswith(cause)
  assert told == _outcome(images.decode, data)


@pytest.mark.parametrize("progressive", [False, True])
def test_damage_anywhere_is_found_as_by_the_whole_decode(progressive):
  good = _jpeg(_smooth(64, 48), progressive=progressive)
  rng = np.random.default_rng(1)
  found = set()
  for _ in range(200):
    data = bytearray(good)
    for at in rng.integers(0, len(data), rng.integers(1, 5)):
      data[at] = rng.integers(256)
    data = bytes(data[: len(data) if rng.random() < 0.5 else int(rng.integers(len(data)))])
    whole = _outcome(images.decode, data)
    assert _outcome(lambda data: crops.decode(data, 12), data) == whole
    found.add(whole.split(":")[0])
  assert {"RGB", "truncated", "unreadable"} <= found


def _difference(size: tuple[int, int], short_side: int) -> np.ndarray:
  """|crop - fit| of 12 squares of one image of noise, where every pixel tells."""
  noise = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
  image, found = Image.fromarray(noise), []
  for seed in range(12):
    got = crops.crop(image, 24, short_side, np.random.default_rng(seed))
    wanted = images.fit(image, 24, short_side, np.random.default_rng(seed))
    assert (got.shape, got.dtype) == ((24, 24, 3), np.uint8)
    found.append(np.abs(got.astype(int) - wanted))
  return np.stack(found)


SIZES = [(90, 60), (60, 90), (64, 64), (32, 32), (32, 40), (33, 31), (20, 24), (257, 256), (700, 9)]
with_simd = pytest.mark.skipif(crops.simd is None, reason="no build for this machine")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("short_side", [0, 32])
def test_a_crop_is_that_of_the_whole_resized_image(size, short_side, monkeypatch):
  """But for a rounding in the place of its corners."""
  monkeypatch.setattr(crops, "simd", None)
  difference = _difference(size, short_side)
  assert difference.max() <= 1
  assert (difference > 0).mean() < 0.01
  if min(size) == (short_side or 24):  # nothing is resized
    assert difference.max() == 0


def test_a_crop_of_a_high_image_may_differ_by_the_order_of_rows_and_columns(monkeypatch):
  monkeypatch.setattr(crops, "simd", None)
  difference = _difference((32, 50), 0)
  assert 1 < difference.max() < 20
  assert difference.mean() < 0.7


@with_simd
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("short_side", [0, 32])
def test_a_crop_by_vector_instructions_is_the_same_but_for_roundings(size, short_side):
  difference = _difference(size, short_side)
  assert difference.max() <= 25  # where noise leaves 0 to 255 between rows and columns
  assert (difference > 1).mean() < 0.05
  assert difference.mean() < 0.6


@with_simd
def test_vector_instructions_resize_photos_as_pillow_does_on_every_processor(monkeypatch):
  """Slow waves stay within 0 to 255, so nothing but the last bit of a weight can tell."""
  image = _smooth(300, 260)
  made = [crops.crop(image, 96, 128, np.random.default_rng(3))]
  for extensions in ("none", "sse4_1"):
    resizer = crops.simd.Resizer()
    resizer.cpu_extensions = crops.simd.CpuExtensions[extensions]
    monkeypatch.setattr(crops.simd, "Resizer", lambda resizer=resizer: resizer)
    made.append(crops.crop(image, 96, 128, np.random.default_rng(3)))
  np.testing.assert_array_equal(made[0], made[1])
  np.testing.assert_array_equal(made[0], made[2])
  monkeypatch.setattr(crops, "simd", None)
  by_pillow = crops.crop(image, 96, 128, np.random.default_rng(3))
  difference = np.abs(made[0].astype(int) - by_pillow)
  assert difference.max() == 1
  assert (difference > 0).mean() < 0.3


def test_crops_of_all_shapes():
  """Among them the one that the faster library would read from outside of the memory for: it
  enlarges, and the first new pixel falls on the middle of an old one."""
  rng = np.random.default_rng(0)
  shapes = [(10, 18, 23, 42, 46)]
  for seed in range(2_000):
    width, height = (int(side) for side in np.exp(rng.uniform(0, 5, 2)))
    resolution = int(np.exp(rng.uniform(0, 4)))
    shapes.append((width, height, resolution, resolution + int(rng.integers(64)), seed))
  for width, height, resolution, short_side, seed in shapes:
    image = Image.new("RGB", (width, height), (250, 3, 90))
    got = crops.crop(image, resolution, short_side, np.random.default_rng(seed))
    assert got.shape == (resolution, resolution, 3)
    assert (got == (250, 3, 90)).all(), (width, height, resolution, short_side, seed)


def test_a_crop_refuses_what_fit_refuses():
  with pytest.raises(ValueError, match="short_side 20 is under the resolution 24"):
    crops.crop(_smooth(64, 64), 24, 20, np.random.default_rng(0))


def test_crops_of_scaled_decodes_are_near_those_of_whole_ones():
  data = _jpeg(_smooth(512, 512))
  made = [
    decode_and_fit(np.random.default_rng(5)).astype(float)
    for decode_and_fit in (
      lambda rng: images.fit(images.decode(data), 224, 0, rng),
      lambda rng: crops.crop(crops.decode(data, 224), 224, 0, rng),
    )
  ]
  assert np.abs(made[0] - made[1]).mean() < 1.0


def test_evaluation_decodes_whole(monkeypatch):
  """Pixel for pixel what Pillow gives for the original's steps; nothing asks for a scale."""

  def refuse(self, mode, size):
    raise AssertionError("evaluation must not decode a JPEG at a scale")

  monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", refuse)
  monkeypatch.setattr(crops, "decode", refuse)
  data = _jpeg(_smooth(600, 512))
  resized = Image.open(io.BytesIO(data)).resize((262, 224), Image.Resampling.BICUBIC)
  expected = np.asarray(resized.crop((19, 0, 243, 224)))
  source = records.MemorySource([records.Record("a", data, ("a wave",))], "memory")
  model = types.SimpleNamespace(preprocess=c.Preprocess(), resolution=224)
  model.fit = types.MethodType(inference.Clip.fit, model)
  np.testing.assert_array_equal(encoding.image_of(model, source, 0), expected)
  with pytest.raises(AssertionError, match="at a scale"):  # the trap is one
    Image.open(io.BytesIO(data)).draft(None, (224, 224))
