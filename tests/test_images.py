"""Decoding by stated rules (drill 11), resizing and cropping by torchvision's rounding."""

import io
import pathlib
import pickle
import struct
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from clip_jax.data import images


def _bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
  out = io.BytesIO()
  image.save(out, kind, **options)
  return out.getvalue()


def _half_transparent(mode: str) -> Image.Image:
  """Left half opaque black, right half transparent."""
  image = Image.new("RGBA", (8, 4), (0, 0, 0, 255))
  image.paste((0, 0, 0, 0), (4, 0, 8, 4))
  if mode == "P":
    return image.convert("RGB").quantize(4)
  return image.convert(mode)


def _palette_with_transparency() -> bytes:
  image = Image.new("P", (8, 4), 0)
  image.putpalette([0, 0, 0, 10, 200, 30])
  image.paste(1, (4, 0, 8, 4))
  return _bytes(image, "PNG", transparency=1)


def _exif_rotated() -> bytes:
  image = Image.new("RGB", (8, 4), (9, 9, 9))
  exif = Image.Exif()
  exif[0x0112] = 6
  return _bytes(image, "PNG", exif=exif)


def _animation(kind: str) -> bytes:
  frames = [Image.new("RGB", (6, 6), colour) for colour in ((250, 0, 0), (0, 250, 0))]
  options = {"lossless": True} if kind == "WEBP" else {}
  return _bytes(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def _grey16(value: int) -> bytes:
  return _bytes(Image.fromarray(np.full((4, 4), value, np.uint16)))


def _cmyk() -> bytes:
  return _bytes(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)


GOOD = {  # name: (bytes, size, mean of each channel)
  "rgb png": (_bytes(Image.new("RGB", (5, 7), (1, 2, 3))), (5, 7), (1, 2, 3)),
  "grey png": (_bytes(Image.new("L", (5, 7), 77)), (5, 7), (77, 77, 77)),
  "grey jpeg": (_bytes(Image.new("L", (8, 8), 77), "JPEG"), (8, 8), (77, 77, 77)),
  "16-bit grey, white": (_grey16(65535), (4, 4), (255, 255, 255)),
  "16-bit grey, mid": (_grey16(128 * 257), (4, 4), (128, 128, 128)),
  "16-bit grey, dark": (_grey16(257), (4, 4), (1, 1, 1)),
  "1-bit": (_bytes(Image.new("1", (5, 7), 1)), (5, 7), (255, 255, 255)),
  "cmyk jpeg": (_cmyk(), (8, 8), (254, 0, 0)),
  "rgba": (_bytes(_half_transparent("RGBA")), (8, 4), (127.5,) * 3),
  "grey and alpha": (_bytes(_half_transparent("LA")), (8, 4), (127.5,) * 3),
  "palette": (_bytes(Image.new("RGB", (8, 4), (10, 20, 30)).quantize(4)), (8, 4), (10, 20, 30)),
  "palette with transparency": (_palette_with_transparency(), (8, 4), (127.5,) * 3),
  "animated gif": (_animation("GIF"), (6, 6), (250, 0, 0)),
  "animated webp": (_animation("WEBP"), (6, 6), (250, 0, 0)),
  "bmp": (_bytes(Image.new("RGB", (3, 3), (4, 5, 6)), "BMP"), (3, 3), (4, 5, 6)),
  "tiff": (_bytes(Image.new("RGB", (3, 3), (4, 5, 6)), "TIFF"), (3, 3), (4, 5, 6)),
  "exif rotation is left alone": (_exif_rotated(), (8, 4), (9, 9, 9)),
  "one pixel": (_bytes(Image.new("RGB", (1, 1), (7, 8, 9))), (1, 1), (7, 8, 9)),
  "one pixel wide": (_bytes(Image.new("RGB", (1, 300), (7, 8, 9))), (1, 300), (7, 8, 9)),
}

_NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)


def _png_of(width: int, height: int, colour: int, packed: bytes) -> bytes:
  """A PNG of that size whose pixels are these; `colour`: 0 grey, 2 RGB."""
  chunk = lambda kind, data: (  # noqa: E731
    struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  )
  size = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def _header_only_png(width: int, height: int) -> bytes:
  """A PNG that claims a size and holds almost nothing."""
  return _png_of(width, height, 2, zlib.compress(b"\0" * 100))


def _bad_crc() -> bytes:
  data = bytearray(_bytes(Image.fromarray(_NOISE)))
  data[len(data) // 2] ^= 255
  return bytes(data)


BAD = {  # name: (bytes, cause)
  "empty": (b"", "empty"),
  "text": (b"hello, this is no image", "unreadable"),
  "html": (b"<!DOCTYPE html><html><body>404</body></html>", "unreadable"),
  "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unreadable"),
  "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable"),
  "cut png": (_bytes(Image.fromarray(_NOISE))[:-4000], "truncated"),
  "cut jpeg": (_bytes(Image.fromarray(_NOISE), "JPEG")[:-1500], "truncated"),
  "cut gif": (_bytes(Image.fromarray(_NOISE), "GIF")[:900], "truncated"),
  "png with a wrong checksum": (_bad_crc(), "truncated"),
  "png header alone": (_bytes(Image.fromarray(_NOISE))[:40], "unreadable"),
  "bomb": (_header_only_png(13_000, 13_000), "too_large"),
  "huge header": (_header_only_png(60_000, 60_000), "too_large"),
  "one long side": (_header_only_png(30_000, 1), "too_large"),
  "float tiff": (_bytes(Image.new("F", (4, 4), 0.5), "TIFF"), "mode"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_images_have_their_stated_pixels(name, drill):
  data, size, mean = GOOD[name]
  drill(11, images=1)
  image = images.decode(data)
  assert image.mode == "RGB"
  assert image.size == size
  np.testing.assert_allclose(np.asarray(image).reshape(-1, 3).mean(0), mean, atol=1.0)
  drill(11, right=1)


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused_by_cause(name, drill):
  data, cause = BAD[name]
  drill(11, images=1)
  with pytest.raises(images.ImageError) as error:
    images.decode(data)
  assert error.value.cause == cause
  assert pickle.loads(pickle.dumps(error.value)).cause == cause  # it crosses processes
  drill(11, right=1)


def _bomb() -> bytes:
  """13,000 x 13,000 pixels, all there: half a gigabyte as RGB, from under a megabyte."""
  packer, side = zlib.compressobj(1), 13_000
  rows = [packer.compress(bytes(side + 1)) for _ in range(side)]
  return _png_of(side, side, 0, b"".join([*rows, packer.flush()]))


REFUSE = """
import resource, sys
from clip_jax.data import images
data = open(sys.argv[1], "rb").read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
  images.decode(data)
except images.ImageError as error:
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  print(error.cause, grown)
"""


def test_refusing_a_bomb_takes_no_memory(tmp_path, drill):
  """In a process of its own, whose peak is told by the system."""
  bomb = tmp_path / "bomb.png"
  bomb.write_bytes(_bomb())
  assert bomb.stat().st_size < 1_000_000
  done = subprocess.run([sys.executable, "-c", REFUSE, str(bomb)], capture_output=True, text=True)
  cause, kilobytes = done.stdout.split()
  assert cause == "too_large"
  assert int(kilobytes) < 50_000
  drill(11, most_megabytes=int(kilobytes) / 1000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_damage_anywhere_gives_an_image_or_an_image_error(kind, drill):
  good = _bytes(Image.fromarray(_NOISE), kind)
  rng, crashes = np.random.default_rng(1), []
  for _ in range(150):
    data = bytearray(good)
    for at in rng.integers(0, len(data), rng.integers(1, 5)):
      data[at] = rng.integers(256)
    cut = len(data) if rng.random() < 0.5 else int(rng.integers(len(data)))
    try:
      assert images.decode(bytes(data[:cut])).mode == "RGB"
    except images.ImageError:
      pass
    except Exception as error:  # none may come out
      crashes.append(error)
  drill(12, executions=150, crashes=len(crashes))
  assert not crashes


def test_every_kind_of_source(tmp_path):
  path = tmp_path / "noise.png"
  path.write_bytes(_bytes(Image.fromarray(_NOISE)))
  for source in (path, str(path), path.read_bytes(), Image.open(path), _NOISE):
    np.testing.assert_array_equal(np.asarray(images.as_image(source)), _NOISE)


def test_errors_name_the_file(tmp_path):
  path = tmp_path / "cut.png"
  path.write_bytes(BAD["cut png"][0])
  with pytest.raises(images.ImageError, match=r"cut.png: cannot be decoded to its end"):
    images.as_image(path)
  with pytest.raises(images.ImageError, match=r"none.png: No such file"):
    images.as_image(tmp_path / "none.png")
  with pytest.raises(images.ImageError, match="Is a directory"):
    images.as_image(tmp_path)
  with pytest.raises(images.ImageError, match="must be uint8"):
    images.as_image(np.zeros((4, 4), np.uint8))
  with pytest.raises(images.ImageError, match="float is no image"):
    images.as_image(1.5)
  assert not list(pathlib.Path(tmp_path).glob("*.tmp"))


@pytest.mark.parametrize("size", [(50, 80), (80, 50), (33, 97), (31, 32), (24, 24), (7, 5), (1, 9)])
@pytest.mark.parametrize("resolution", [24, 25])
def test_fit_is_the_originals_resize_and_crop(size, resolution):
  """torchvision's rules, written out: long side truncated, crop offsets rounded half to even."""
  pixels = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
  image, (width, height) = Image.fromarray(pixels), size
  if width <= height:
    new = (resolution, int(resolution * height / width))
  else:
    new = (int(resolution * width / height), resolution)
  expected = np.asarray(image.resize(new, Image.Resampling.BICUBIC))
  top, left = (round((side - resolution) / 2.0) for side in expected.shape[:2])
  expected = expected[top : top + resolution, left : left + resolution]
  np.testing.assert_array_equal(images.fit(image, resolution), expected)


def test_random_crops_are_squares_of_the_resized_image():
  image = Image.fromarray(_NOISE).resize((90, 60))
  resized = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC))
  rng = np.random.default_rng(3)
  seen = set()
  for _ in range(60):
    crop = images.fit(image, 24, 32, rng)
    found = [
      (y, x) for y in range(9) for x in range(25) if (resized[y : y + 24, x : x + 24] == crop).all()
    ]
    assert len(found) == 1
    seen.update(found)
  assert {y for y, _ in seen} == set(range(9))
  assert len({x for _, x in seen}) > 15


def test_fit_refuses_a_short_side_under_the_resolution():
  with pytest.raises(ValueError, match="short_side 20 is under the resolution 24"):
    images.fit(Image.fromarray(_NOISE), 24, 20)


@pytest.mark.parametrize("size", [(1, 1000), (1001, 1), (3, 900)])
def test_a_thin_image_keeps_its_central_square(size):
  pixels = np.random.default_rng(4).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
  image = Image.fromarray(pixels)
  scale = 16 / min(size)
  whole = np.asarray(
    image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC)
  )
  top, left = (round((side - 16) / 2) for side in whole.shape[:2])
  np.testing.assert_array_equal(images.fit(image, 16), whole[top : top + 16, left : left + 16])


def test_a_thin_image_does_not_fill_the_memory():
  rng = np.random.default_rng(5)
  assert images.fit(Image.new("RGB", (1, 20_000)), 336, 384, rng).shape == (336, 336, 3)


@pytest.mark.parametrize(
  "size",  # height, width
  [
    (48, 64), (33, 50), (10, 4), (25, 24), (24, 24), (100, 30), (90, 31), (60, 30), (300, 200),
    (7, 40), (40, 7), (200, 3), (3, 200), (51, 53), (150, 151),
  ],
)  # fmt: skip
@pytest.mark.parametrize("resolution", [24, 25])
def test_the_devices_resize_is_pillows(size, resolution):
  """Every pixel, on noise and on hard edges, whose overshoot is cut between rows and columns."""
  rng = np.random.default_rng(6)
  noise = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
  blocks = rng.integers(0, 2, (*size, 3)).repeat(3, 0).repeat(3, 1)[: size[0], : size[1]]
  pixels = np.stack([noise, (255 * blocks).astype(np.uint8)])
  got = jax.jit(images.fit_on_device, static_argnums=1)(pixels, resolution)
  assert got.dtype == np.uint8
  expected = [images.fit(Image.fromarray(image), resolution) for image in pixels]
  np.testing.assert_array_equal(got, np.stack(expected))


def test_normalise_equals_pytorch():
  mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
  expected = (torch.tensor(_NOISE) / 255 - torch.tensor(mean)) / torch.tensor(std)
  np.testing.assert_allclose(images.normalise(_NOISE[None], mean, std)[0], expected, atol=1e-6)
