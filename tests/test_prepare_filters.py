"""What is kept by its sides and captions, and how large images are reduced."""

import io

import numpy as np
import pytest
from PIL import Image

from clip_jax.data import images, records, tables
from tools.prepare import filters, jobs


def _smooth(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
  rng = np.random.default_rng(3)
  small = rng.integers(0, 256, (6, 6, len(mode))).astype(np.uint8)
  return Image.fromarray(small, mode).resize(size, Image.Resampling.BICUBIC)


def _file(image: Image.Image, kind: str, **options: object) -> bytes:
  out = io.BytesIO()
  image.save(out, kind, **options)
  return out.getvalue()


def _record(data: bytes | np.ndarray, *captions: str) -> records.Record:
  return records.Record("a", data, captions or ("a picture",))


PICTURE = _file(_smooth((60, 40)), "PNG")


@pytest.mark.parametrize(
  ("limits", "reason"),
  [
    ({"min_side": 40, "max_aspect": 1.5, "min_caption": 9, "max_caption": 9}, ""),
    ({"min_side": 41}, "too_small"),
    ({"max_aspect": 1.49}, "aspect"),
    ({"min_caption": 10}, "caption_length"),
    ({"max_caption": 8}, "caption_length"),
  ],
)
def test_limits_are_met_at_their_very_value(limits, reason):
  for decode in (True, False):
    if reason:
      with pytest.raises(tables.Rejected) as error:
        filters.checked(_record(PICTURE), filters.Filters(**limits), decode)
      assert error.value.reason == reason
      assert any(str(value) in error.value.detail for value in limits.values())
      continue
    found = filters.checked(_record(PICTURE), filters.Filters(**limits), decode)
    assert (found.size, found.image is None) == ((60, 40), not decode)


def test_captions_are_counted_in_characters_of_any_language():
  texts = ("猫がいる", "ein Käfer", "кот", "a" * 30, "🐈")
  found = filters.checked(_record(PICTURE, *texts), filters.Filters(min_caption=3, max_caption=9))
  assert found.record.captions == ("猫がいる", "ein Käfer", "кот")


def test_limits_that_leave_nothing_are_refused():
  for wrong, words in (
    ({"max_side": 1}, "nothing to see"),
    ({"max_aspect": 0.5}, "want 1"),
    ({"max_aspect": float("nan")}, "want 1"),
    ({"min_caption": 5, "max_caption": 4}, "--min-caption 5 is over --max-caption 4"),
  ):
    with pytest.raises(jobs.PrepareError, match=words):
      filters.Filters(**wrong)
  assert filters.Filters(min_side=3).settings == {"min_side": 3}


@pytest.mark.parametrize(
  ("data", "kind"),
  [
    (_file(_smooth((60, 40)), "JPEG"), "JPEG"),
    (_file(_smooth((60, 40)), "WEBP", quality=80), "JPEG"),
    (_file(_smooth((60, 40)), "WEBP", lossless=True), "PNG"),
    (_file(_smooth((60, 40), "RGBA"), "WEBP", quality=80), "PNG"),
    (_file(_smooth((60, 40), "RGBA"), "PNG"), "PNG"),
    (_file(_smooth((60, 40)).quantize(16), "GIF"), "PNG"),
    (_file(_smooth((60, 40)), "BMP"), "PNG"),
    (np.asarray(_smooth((60, 40))), "PNG"),
  ],
)
def test_large_images_keep_what_kind_of_file_they_were(data, kind):
  asked = filters.Filters(max_side=30)
  for decode in (True, False):
    made = filters.stored(filters.checked(_record(data), asked, decode), asked)
    stored = made.record.image
    with Image.open(io.BytesIO(stored)) as image:
      assert (image.format, image.mode, image.size, made.size) == (kind, "RGB", (30, 20), (30, 20))
    wanted = images.as_image(data).resize((30, 20), Image.Resampling.LANCZOS)
    if kind == "PNG":
      assert np.array_equal(np.asarray(images.decode(stored)), np.asarray(wanted))
    else:
      assert stored == _file(wanted, "JPEG", quality=95)


def test_what_is_small_enough_keeps_its_bytes():
  asked = filters.Filters(max_side=60)
  assert filters.stored(filters.checked(_record(PICTURE), asked), asked).record.image == PICTURE
  pixels = np.asarray(_smooth((60, 40)))
  made = filters.stored(filters.checked(_record(pixels), asked), asked).record.image
  assert np.array_equal(np.asarray(images.decode(made)), pixels)


def test_a_damaged_image_is_an_error_also_where_it_was_good_before():
  with pytest.raises(images.ImageError):
    filters.checked(_record(PICTURE[:-60]), filters.Filters())
  with pytest.raises(images.ImageError):
    filters.checked(_record(b"<html>"), filters.Filters(), decode=False)
