"""What a pair must be to be kept, by its image's sides and its captions' lengths; images reduced.

A function of one record and of nothing else, so that it is the same in whichever process.
"""

import dataclasses
import io
from typing import Any

from PIL import Image

from clip_jax.data import images, records
from clip_jax.data.tables import Rejected
from tools.prepare.jobs import PrepareError

_QUALITY = 95  # of JPEG


@dataclasses.dataclass(frozen=True)
class Filters:
  """Limits, each of which 0 leaves out. Sides are in pixels as stored in the source.

  Captions are measured in characters (code points), which asks for no language.
  """

  max_side: int = 0  # of the longer side: larger images are reduced
  min_side: int = 0  # of the shorter side
  max_aspect: float = 0.0  # longer side / shorter side
  min_caption: int = 0
  max_caption: int = 0

  def __post_init__(self) -> None:
    if self.max_side == 1:
      raise PrepareError("--max-side 1 leaves nothing to see")
    if self.max_aspect and not self.max_aspect >= 1:
      raise PrepareError(f"--max-aspect {self.max_aspect:g}: want 1 (squares alone) or more")
    if 0 < self.max_caption < self.min_caption:
      raise PrepareError(
        f"--min-caption {self.min_caption} is over --max-caption {self.max_caption}: want less"
      )

  @property
  def settings(self) -> dict[str, Any]:
    """Those that are not left out, for the identity of a data set."""
    return {name: value for name, value in dataclasses.asdict(self).items() if value}


@dataclasses.dataclass(frozen=True)
class Checked:
  """A record that passed: `size` is (width, height); `image`, where it had to be decoded, RGB."""

  record: records.Record
  size: tuple[int, int]
  image: Image.Image | None


def checked(record: records.Record, filters: Filters, decode: bool = True) -> Checked:
  """The record with those of its captions that pass.

  decode=False is for one that has been decoded before: its header is believed.
  Raises: ImageError; Rejected for an image that is too small or too long, or captions of which
    none passes.
  """
  known = not decode and isinstance(record.image, bytes)
  image = None if known else images.as_image(record.image)
  size = _header_size(record.image) if image is None else image.size
  short, long = sorted(size)
  if short < filters.min_side:
    raise Rejected("too_small", f"{size[0]} x {size[1]} pixels, a side under {filters.min_side}")
  if filters.max_aspect and long > filters.max_aspect * short:
    aspect = f"{size[0]} x {size[1]} pixels, over {filters.max_aspect:g} times as long as wide"
    raise Rejected("aspect", aspect)
  kept = tuple(caption for caption in record.captions if _fits(caption, filters))
  if record.captions and not kept:
    lengths = ", ".join(str(len(caption)) for caption in record.captions[:5])
    limits = f"{filters.min_caption} to {filters.max_caption or 'any number of'}"
    raise Rejected("caption_length", f"{lengths} characters, want {limits}")
  return Checked(dataclasses.replace(record, captions=kept), size, image)


def stored(found: Checked, filters: Filters) -> Checked:
  """As it is written: an image over `max_side` reduced, pixels as a file, all else as it is.

  A reduced image is JPEG of quality 95 where it was lossy (JPEG, or WebP's plain lossy kind), and
  PNG where it was lossless or may have alpha, which is laid on white as decoding does.
  Raises: ImageError.
  """
  record, data = found.record, found.record.image
  reduce = filters.max_side and max(found.size) > filters.max_side
  if isinstance(data, bytes) and not reduce:
    return found
  image = images.as_image(data) if found.image is None else found.image
  kind = "JPEG" if isinstance(data, bytes) and _lossy(data) else "PNG"
  if reduce:
    image = image.copy()
    image.thumbnail((filters.max_side, filters.max_side), Image.Resampling.LANCZOS)
  out = io.BytesIO()
  image.save(out, kind, quality=_QUALITY)
  return Checked(dataclasses.replace(record, image=out.getvalue()), image.size, None)


def _fits(caption: str, filters: Filters) -> bool:
  return filters.min_caption <= len(caption) <= (filters.max_caption or len(caption))


def _lossy(data: bytes) -> bool:
  return data[:3] == b"\xff\xd8\xff" or (data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8 ")


def _header_size(data: Any) -> tuple[int, int]:
  try:
    with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
      return image.size
  except (OSError, ValueError, SyntaxError) as error:
    raise images.ImageError("unreadable", f"not an image any more ({error})") from error
