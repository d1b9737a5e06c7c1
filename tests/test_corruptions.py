import colorsys
import hashlib
import io

import numpy as np
import pytest
import scipy.ndimage
from known_model import KnownModel, Source, labelled
from PIL import Image
from sklearn.datasets import load_sample_images

from clip_jax.data import images as images_lib
from clip_jax.data.records import MemorySource, Record
from clip_jax.evaluation import encoding
from clip_jax.evaluation.stress import corruptions, noise_and_blur, weather_and_digital
from clip_jax.evaluation.stress.corruptions import NAMES, SEVERITIES, CorruptedSource, corrupt

PHOTOS = [images_lib.fit(Image.fromarray(photo), 224) for photo in load_sample_images().images]
COLOURS = np.random.default_rng(0).integers(0, 256, (12, 14, 3)).astype(np.uint8)


def encoded(image, kind, **settings):
  file = io.BytesIO()
  Image.fromarray(image).save(file, kind, **settings)
  return file.getvalue()


def each(*values):
  """(severity, published value) for pytest."""
  return list(zip(SEVERITIES, values, strict=True))


def psnr(name, severity):
  """Decibels, of the mean square over two photographs and three draws."""
  squares = [
    np.mean((corrupt(photo, name, severity, key) / 255.0 - photo / 255.0) ** 2)
    for photo in PHOTOS
    for key in "abc"
  ]
  return -10 * np.log10(np.mean(squares))


# Saturation goes down at 1 and 2 and up from 3 on; the published elastic maps move the whole image
# at 1 and 2 and tear it into waves from 3 on, and frost and fog trade cover for contrast.
NOT_BY_DISTANCE = {"saturate", "elastic_transform", "frost", "fog"}


def test_the_groups_hold_every_name_once():
  assert sorted(NAMES) == sorted({n for names in corruptions.GROUPS.values() for n in names})
  assert len(NAMES) == len(set(NAMES)) == 18
  assert len(corruptions.PUBLISHED) == 15


@pytest.mark.parametrize("name", NAMES)
def test_the_higher_the_severity_the_further_from_the_original(name):
  distances = [psnr(name, s) for s in SEVERITIES]
  assert 8 < min(distances) < max(distances) < 30
  if name in NOT_BY_DISTANCE:
    assert distances != sorted(distances, reverse=True)
  else:
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (8, 8), (30, 17)])
def test_odd_shapes_keep_their_shape_and_kind(name, shape):
  for level in (0, 128, 255):
    image = np.full((*shape, 3), level, np.uint8)
    before = image.copy()
    for severity in SEVERITIES:
      out = corrupt(image, name, severity, "k")
      assert (out.dtype, out.shape) == (np.uint8, (*shape, 3))
    np.testing.assert_array_equal(image, before)


DRAWN = (
  *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur"),
  *("motion_blur", "snow", "frost", "fog", "elastic_transform"),
)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_drawn_depends_on_name_severity_and_key_alone(name):
  photo = PHOTOS[0][:64, :64]
  first = corrupt(photo, name, 2, "one")
  for other in NAMES:
    corrupt(photo[::-1], other, 1, "two")
  np.testing.assert_array_equal(corrupt(photo, name, 2, "one"), first)
  assert np.array_equal(corrupt(photo, name, 2, "two"), first) == (name not in DRAWN)


def test_the_seed_is_the_sha256_of_name_severity_and_key():
  grey = np.full((4, 4, 3), 128, np.uint8)
  digest = hashlib.sha256(b'["gaussian_noise", 1, "k"]').digest()
  noise = np.random.default_rng(int.from_bytes(digest)).normal(0, 0.08, grey.shape)
  want = np.rint((128 / 255 + noise) * 255)
  np.testing.assert_array_equal(corrupt(grey, "gaussian_noise", 1, "k"), want)


@pytest.mark.parametrize(
  ("name", "severity", "deviation"),
  [
    *(("gaussian_noise", 1, 0.08), ("gaussian_noise", 2, 0.12)),
    *(("shot_noise", 1, (0.4 / 60) ** 0.5), ("shot_noise", 2, (0.4 / 25) ** 0.5)),
    *(("speckle_noise", 1, 0.4 * 0.15), ("speckle_noise", 2, 0.4 * 0.2)),
  ],
)
def test_noise_on_grey_has_the_published_deviation(name, severity, deviation):
  """At severities that hardly ever reach black or white: mean and deviation within 2 %."""
  out = corrupt(np.full((200, 200, 3), 102, np.uint8), name, severity, "k") / 255.0
  assert out.mean() == pytest.approx(0.4, rel=0.02)
  assert out.std() == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize(("severity", "share"), each(0.03, 0.06, 0.09, 0.17, 0.27))
def test_impulses_are_half_salt_and_half_pepper(severity, share):
  out = corrupt(np.full((200, 200, 3), 102, np.uint8), "impulse_noise", severity, "k")
  assert set(np.unique(out)) == {0, 102, 255}
  for level in (0, 255):
    assert np.mean(out == level) == pytest.approx(share / 2, rel=0.06)


@pytest.mark.parametrize(("severity", "sigma"), each(1, 2, 3, 4, 6))
def test_gaussian_blur_is_that_of_pixels_at_224_and_of_half_at_112(severity, sigma):
  for side, scale in ((224, 1.0), (112, 0.5)):
    photo = PHOTOS[0][:side, :side]
    want = [
      scipy.ndimage.gaussian_filter(photo[..., c].astype(float), sigma * scale, mode="nearest")
      for c in range(3)
    ]
    out = corrupt(photo, "gaussian_blur", severity, "k")
    assert np.abs(out - np.stack(want, -1)).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(("severity", "radius"), each(3, 4, 6, 8, 10))
def test_defocus_spreads_a_point_over_its_disk(severity, radius):
  point = np.zeros((224, 224, 3), np.uint8)
  point[100:124, 100:124] = 255  # larger than a pixel, so that rounding does not swallow it
  y, x = np.mgrid[-11:12, -11:12]
  disk = (y**2 + x**2 <= radius**2).astype(float)
  want = scipy.ndimage.convolve(point[..., 0] / 255.0, disk / disk.sum()) * 255
  out = corrupt(point, "defocus_blur", severity, "k")[..., 1].astype(float)
  # The rim is softened, which shifts weight by a pixel at most: little anywhere, nothing in sum.
  assert np.abs(out - want).max() < (1.0 if severity == 1 else 12.0)
  assert out.sum() == pytest.approx(want.sum(), rel=1e-3)


def test_convolution_is_that_of_scipy_at_the_edges_too():
  rng = np.random.default_rng(1)
  image, kernel = rng.random((13, 9, 3)), rng.random((5, 7))
  for ours, theirs in (("reflect", "mirror"), ("edge", "nearest"), ("wrap", "wrap")):
    want = [scipy.ndimage.convolve(image[..., c], kernel, mode=theirs) for c in range(3)]
    got = noise_and_blur.convolve(image, kernel, ours)
    np.testing.assert_allclose(got, np.stack(want, -1), atol=1e-12)


def test_a_trail_lies_along_its_angle():
  level = noise_and_blur.trail(2, 1.5, 0.0)
  row = np.exp(-0.5 * (np.arange(5) / 1.5) ** 2)
  np.testing.assert_allclose(level[5, 5:10], row / row.sum())
  assert level.sum() == pytest.approx(1)
  upright = noise_and_blur.trail(2, 1.5, 90.0)
  np.testing.assert_allclose(upright, level.T, atol=1e-12)
  weights = noise_and_blur.trail(10, 8, 30.0)
  y, x = np.nonzero(weights > 1e-9)
  along = (x - 21) * np.cos(np.radians(30)) + (y - 21) * np.sin(np.radians(30))
  across = (y - 21) * np.cos(np.radians(30)) - (x - 21) * np.sin(np.radians(30))
  assert np.abs(across).max() < 1.42
  assert -1.42 < along.min() < along.max() < 21.42


def test_enlarging_a_ramp_makes_it_flatter_about_the_middle():
  ramp = np.tile(np.arange(21.0)[:, None, None], (1, 21, 1))
  got = noise_and_blur.enlarged(ramp, 2.0)
  np.testing.assert_allclose(got[:, 3, 0], 10 + (np.arange(21) - 10) / 2)
  np.testing.assert_array_equal(noise_and_blur.enlarged(ramp, 1.0), ramp)


def test_zoom_blur_is_the_mean_of_the_published_enlargements():
  ramp = np.tile((100 + np.arange(101))[None, :, None], (101, 1, 3)).astype(np.uint8)
  zooms = np.arange(1, 1.31, 0.03)
  slope = (1 + np.sum(1 / zooms)) / (len(zooms) + 1)
  out = corrupt(ramp, "zoom_blur", 5, "k")
  assert np.abs(out[50, :, 0] - (150 + slope * (np.arange(101) - 50))).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_moves_pixels_and_makes_none(reach):
  numbered = np.arange(20 * 23, dtype=float).reshape(20, 23, 1)
  out = noise_and_blur._swapped(numbered, reach, np.random.default_rng(0))[..., 0].astype(int)
  np.testing.assert_array_equal(np.sort(out.ravel()), np.arange(20 * 23))
  y, x = np.indices(out.shape)
  distance = np.maximum(np.abs(out // 23 - y), np.abs(out % 23 - x))
  assert np.mean(distance > 0) > 0.6
  assert np.median(distance) <= 2 * reach


def by_pixel(image, change):
  """colorsys, one pixel at a time."""
  pixels = image.reshape(-1, 3) / 255
  rows = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*p))) for p in pixels]
  return np.array(rows).reshape(image.shape) * 255


SOME = np.concatenate([COLOURS, np.tile(np.arange(0, 238, 17)[None, :, None], (1, 1, 3))])
SOME = SOME.astype(np.uint8)  # greys and black among the colours


@pytest.mark.parametrize(("severity", "added"), each(0.1, 0.2, 0.3, 0.4, 0.5))
def test_brightness_is_added_to_the_value_of_hsv(severity, added):
  want = by_pixel(SOME, lambda h, s, v: (h, s, min(1.0, v + added)))
  assert np.abs(corrupt(SOME, "brightness", severity, "k") - want).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
  ("severity", "factor", "added"),
  [(1, 0.3, 0), (2, 0.1, 0), (3, 2, 0), (4, 5, 0.1), (5, 20, 0.2)],
)
def test_saturation_is_that_of_hsv(severity, factor, added):
  want = by_pixel(SOME, lambda h, s, v: (h, min(1.0, s * factor + added), v))
  assert np.abs(corrupt(SOME, "saturate", severity, "k") - want).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(("severity", "share"), each(0.4, 0.3, 0.2, 0.1, 0.05))
def test_contrast_shrinks_each_channel_about_its_mean(severity, share):
  photo = PHOTOS[1]
  out = corrupt(photo, "contrast", severity, "k").astype(float)
  np.testing.assert_allclose(out.mean((0, 1)), photo.mean((0, 1)), atol=0.1)
  np.testing.assert_allclose(out.std((0, 1)), photo.std((0, 1)) * share, rtol=0.02)


@pytest.mark.parametrize(("severity", "quality"), each(25, 18, 15, 10, 7))
def test_jpeg_is_a_file_of_that_quality(severity, quality):
  want = np.asarray(Image.open(io.BytesIO(encoded(PHOTOS[0], "JPEG", quality=quality))))
  np.testing.assert_array_equal(corrupt(PHOTOS[0], "jpeg_compression", severity, "k"), want)


@pytest.mark.parametrize(("severity", "side"), [(2, 112), (5, 56)])
def test_pixels_are_means_of_boxes(severity, side):
  size = 224 // side
  boxes = PHOTOS[0].reshape(side, size, side, size, 3).mean((1, 3))
  want = np.repeat(np.repeat(boxes, size, 0), size, 1)
  assert np.abs(corrupt(PHOTOS[0], "pixelate", severity, "k") - want).max() <= 1.0


def test_plasma_wraps_around_and_fills_its_range():
  field = weather_and_digital._plasma(64, 64, 2.0, np.random.default_rng(0))
  assert (field.min(), field.max()) == (0.0, 1.0)
  inside = np.abs(np.diff(field, axis=0)).max()
  assert np.abs(field[0] - field[-1]).max() <= inside
  rough = weather_and_digital._plasma(64, 64, 1.2, np.random.default_rng(0))
  assert np.abs(np.diff(rough, axis=0)).mean() > 2 * np.abs(np.diff(field, axis=0)).mean()


@pytest.mark.parametrize("decay", [1.4, 2.0])
def test_each_level_of_plasma_is_smaller_by_decay_squared(decay):
  """What the middles of squares have over the mean of their corners, at two levels."""
  field = weather_and_digital._plasma(512, 512, decay, np.random.default_rng(0))

  def random_part(half):
    corner = field[:: 2 * half, :: 2 * half]
    corners = (corner + np.roll(corner, -1, 0) + np.roll(np.roll(corner, -1, 0), -1, 1)) / 4
    corners += np.roll(corner, -1, 1) / 4
    return (field[half :: 2 * half, half :: 2 * half] - corners).std()

  assert random_part(2) / random_part(1) == pytest.approx(decay**2, rel=0.03)


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur"])
def test_an_image_of_half_the_size_is_blurred_as_much_in_proportion(name):
  def halved(image):
    return image.reshape(112, 2, 112, 2, 3).mean((1, 3))

  small = np.rint(halved(PHOTOS[1])).astype(np.uint8)
  whole = halved(corrupt(PHOTOS[1], name, 4, "k"))[10:-10, 10:-10]
  half = corrupt(small, name, 4, "k")[10:-10, 10:-10]
  blurred = np.abs(half.astype(float) - small[10:-10, 10:-10]).mean()
  assert np.abs(whole - half).mean() < 0.15 * blurred


@pytest.mark.parametrize(("severity", "thickness"), each(1.5, 2, 2.5, 2.5, 3))
def test_fog_on_grey_lies_between_no_haze_and_full_haze(severity, thickness):
  """x + thickness p, times x / (x + thickness) where x is the brightest: p is 0 to 1 at 256."""
  out = corrupt(np.full((256, 256, 3), 128, np.uint8), "fog", severity, "k") / 255
  x = 128 / 255
  assert out.min() == pytest.approx(x * x / (x + thickness), abs=0.5 / 255 + 1e-9)
  assert out.max() == pytest.approx(x, abs=0.5 / 255 + 1e-9)


def test_snow_and_frost_make_a_dark_image_brighter():
  dark = np.full((224, 224, 3), 20, np.uint8)
  for name in ("snow", "frost"):
    means = [corrupt(dark, name, s, "k").mean() for s in SEVERITIES]
    assert means[0] > 40
    assert means == sorted(means) or name == "frost"
    assert corrupt(dark, name, 3, "k").std() > 10


@pytest.mark.parametrize(("severity", "height"), [(3, 0.05), (4, 0.07), (5, 0.12)])
def test_elastic_waves_have_the_published_height(severity, height):
  """A ramp shows where each pixel came from: an affine map, and waves of a known deviation."""
  scale = 120 / 224
  side, sigma = 244 * scale, 244 * 0.01 * scale
  ramp = np.tile(np.arange(0, 240, 2, dtype=np.uint8)[:, None, None], (1, 120, 3))
  out = corrupt(ramp, "elastic_transform", severity, "k")[15:-15, 15:-15, 0] / 2
  y, x = np.indices((120, 120))[:, 15:-15, 15:-15].reshape(2, -1)
  affine = np.stack([y, x, np.ones_like(y)], axis=1).astype(float)
  found, *_ = np.linalg.lstsq(affine, out.ravel(), rcond=None)
  # of uniform noise from -1 to 1 smoothed by a Gaussian in two dimensions
  deviation = height * side * (1 / 3) ** 0.5 / (2 * np.pi**0.5 * sigma)
  assert (out.ravel() - affine @ found).std() == pytest.approx(deviation, rel=0.1)
  assert np.abs(found[:2] - [1, 0]).max() < 0.02 * side / (120 / 3)
  assert np.abs(found - [1, 0, 0]).max() > 1e-3


@pytest.mark.parametrize("severity", [0, 6, -1, 2.5])
def test_a_severity_out_of_range_is_an_error(severity):
  with pytest.raises(corruptions.CorruptionError, match=r"severity .*: want 1 to 5"):
    corrupt(COLOURS, "fog", severity, "k")
  with pytest.raises(corruptions.CorruptionError, match="severity"):
    CorruptedSource(labelled(["a"]), "fog", severity, lambda image: image)


def test_an_unknown_name_lists_the_names():
  with pytest.raises(corruptions.CorruptionError, match=r"'rain': .*gaussian_noise.*saturate"):
    corrupt(COLOURS, "rain", 1, "k")
  with pytest.raises(corruptions.CorruptionError, match="'rain'"):
    CorruptedSource(labelled(["a"]), "rain", 1, lambda image: image)


@pytest.mark.parametrize("image", [COLOURS / 255.0, COLOURS[..., 0], COLOURS[..., :2]])
def test_other_arrays_are_refused_by_key(image):
  with pytest.raises(corruptions.CorruptionError, match=r"key7: .* uint8 \[H, W, 3\]"):
    corrupt(image, "fog", 1, "key7")


def fitter(side):
  return lambda image: images_lib.fit(images_lib.as_image(image), side)


def photo_source(crop=0):
  photo = load_sample_images().images[0]
  records = [
    Record("a", encoded(photo, "PNG"), ("a temple",), "china"),
    Record("b", encoded(photo[crop:], "PNG"), (), "other"),
  ]
  return MemorySource(records, "photos")


def test_a_source_is_fitted_first_and_then_corrupted():
  source = CorruptedSource(photo_source(100), "motion_blur", 3, fitter(56))
  photo = load_sample_images().images[0]
  for i, (key, file) in enumerate({"a": photo, "b": photo[100:]}.items()):
    fitted = images_lib.fit(Image.fromarray(file), 56)
    np.testing.assert_array_equal(source[i].image, corrupt(fitted, "motion_blur", 3, key))
  record = source[0]
  assert (record.key, record.captions, record.label) == ("a", ("a temple",), "china")
  assert len(source) == 2
  assert source.locate(1) == "photos record 1 (motion_blur, severity 3)"
  np.testing.assert_array_equal(fitter(56)(record.image), record.image)


def test_the_order_of_reading_changes_nothing():
  source = CorruptedSource(photo_source(), "glass_blur", 5, fitter(56))
  forth = [source[i].image for i in (0, 1)]
  back = [source[i].image for i in (1, 0)]
  for a, b in zip(forth, back[::-1], strict=True):
    np.testing.assert_array_equal(a, b)
  assert not np.array_equal(*(CorruptedSource(photo_source(), "fog", 5, fitter(56))[i].image
                              for i in (0, 1)))  # fmt: skip


def test_the_fingerprint_tells_sources_corruptions_and_sizes_apart():
  made = [
    CorruptedSource(photo_source(crop), name, severity, fitter(side)).fingerprint
    for crop, name, severity, side in [
      *((0, "fog", 1, 32), (9, "fog", 1, 32), (0, "snow", 1, 32)),
      *((0, "fog", 2, 32), (0, "fog", 1, 48), (0, "fog", 1, 32)),
    ]
  ]
  assert len(set(made)) == 5
  assert made[0] == made[-1]


def test_a_bad_record_is_named_with_its_corruption():
  source = CorruptedSource(Source([Record("a", b"no image", ())]), "fog", 4, fitter(32))
  with pytest.raises(encoding.EvaluationError, match=r"record 0 \(fog, severity 4\)"):
    encoding.encode_images(KnownModel([[1.0]], {}, 1), source, 1, 1, lambda i, r: None)
