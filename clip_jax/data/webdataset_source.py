"""Pairs of WebDataset's tar files, as img2dataset and DataComp write them, read where they lie.

Members of the same name up to its first dot are one pair: an image (.jpg, .jpeg, .png, .webp) and
its caption, a .txt file or the field "caption" of a .json file. All else in a tar file and beside
it (img2dataset's .parquet and _stats.json) is passed over. Nothing is extracted.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence

import numpy as np

from clip_jax.data import images, storage, tables, tar_index
from clip_jax.data.records import Record, RecordError
from clip_jax.data.tables import Rejected
from clip_jax.data.tar import TarError

SUFFIXES = (".tar",)
_MAX_TEXT_BYTES = 1_000_000
_NEAR_BYTES = 65_536  # between image and caption that are read at once
_log = logging.getLogger(__name__)


class WebdatasetSource:
  """The pairs of tar files, in their order.

  `caption` names the field of the .json files that holds the caption (a text or several); without
  it the .txt file is the caption where there is one. A sample that lacks its image or its caption,
  or has two, is no pair: it is left out, and a warning says how many there are.
  Raises: RecordError when there are no pairs, or for a tar file that is cut short or none, naming
    file and byte; from a record, when its caption or its size does not do.
  """

  def __init__(self, files: Sequence[storage.File], caption: str = ""):
    try:
      self._indexes = tar_index.open_all(files)
    except (TarError, tar_index.IndexFileError) as error:
      raise RecordError(str(error)) from error
    self._paths, self._caption = [file.path for file in files], caption
    self._ends = np.cumsum([index.rows for index in self._indexes], dtype=np.int64)
    if not len(self):
      where = f"{self._paths[0]}: " if files else ""
      why = next((index.note for index in self._indexes if index.note), "they are empty")
      raise RecordError(
        f"{where}no pairs of an image and a caption in {len(files)} tar files: {why}"
      )
    left_out = [k for k, index in enumerate(self._indexes) if index.left_out]
    if left_out:
      total = sum(index.left_out for index in self._indexes)
      first = f"{self._paths[left_out[0]]} sample {self._indexes[left_out[0]].note}"
      _log.warning("%d of %d samples are no pairs and left out; first %s",
                   total, total + len(self), first)  # fmt: skip

  def __repr__(self) -> str:
    return f"WebdatasetSource({self.fingerprint[:16]})"

  @functools.cached_property
  def fingerprint(self) -> str:
    """The sha256 of the tar files' names and sizes and of all headers in them.

    Differs: what was altered in place, at the same size and with the same times in the headers,
    goes unseen; to see it, all bytes would have to be read at every start.
    """
    digest = hashlib.sha256(json.dumps(["webdataset", self._caption]).encode())
    for path, index in zip(self._paths, self._indexes, strict=True):
      name = path.rpartition("/")[2]
      digest.update(f"{name}\n{index.rows} {index.digest.hex()}\n".encode(errors="replace"))
    return digest.hexdigest()

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f"{self!r}: no record {index}, it has {len(self)}")
    shard, row = self._position(index)
    try:
      place = self._indexes[shard].place(row)
      plain = bool(place.text[0]) and not self._caption
      path, said = self._paths[shard], place.text if plain else place.json
      image, text = self._read(path, place.image, said)
      key = f"{path.rpartition('/')[2].removesuffix('.tar')}/{place.key}"
      return Record(key, image, self._captions(text.decode(), plain))
    except (Rejected, UnicodeDecodeError, tar_index.IndexFileError) as error:
      raise RecordError(f"{self.locate(index)}: {error}") from error

  def locate(self, index: int) -> str:
    shard, row = self._position(index)
    try:
      return f"{self._paths[shard]} sample {self._indexes[shard].place(row).key}"
    except (OSError, tar_index.IndexFileError):
      return f"{self._paths[shard]} pair {row}"

  def left_out(self) -> Iterator[tables.Rejection]:
    """The samples that are no pairs, by file and key; their tar files' headers are read again."""
    for path, index in zip(self._paths, self._indexes, strict=True):
      if index.left_out:
        for found in tar_index.left_out(storage.info(path)):
          yield tables.Rejection(f"{path} sample {found.key}", found.reason, found.detail)

  def _position(self, index: int) -> tuple[int, int]:
    shard = int(np.searchsorted(self._ends, index, side="right"))
    return shard, int(index - (self._ends[shard - 1] if shard else 0))

  def _captions(self, text: str, plain: bool) -> tuple[str, ...]:
    """The captions that a .txt (plain) or .json file says; none when they are empty."""
    name = self._caption or "caption"
    fields = {name: text} if plain else tables.json_object(text)
    if name not in fields:
      raise Rejected("columns", f"no field {name!r} in its .json, which has {', '.join(fields)}")
    try:
      return tuple(tables.captions_of(fields[name]))
    except Rejected as error:
      if error.reason != "empty_caption":
        raise
      return ()

  def _read(self, path: str, image: tuple[int, int], text: tuple[int, int]) -> tuple[bytes, bytes]:
    """Both parts, in one read where they lie close together. Raises: Rejected; OSError."""
    for (offset, size), most, what in (
      (image, images.MAX_BYTES, "image"), (text, _MAX_TEXT_BYTES, "caption"),
    ):  # fmt: skip
      if not offset:
        raise Rejected("no_caption", "no .json file, whose field was asked for as the caption")
      if size > most:
        raise Rejected("too_large", f"its {what} has {size:,} bytes, over {most:,}")
    (first, first_bytes), (second, second_bytes) = sorted((image, text))
    if second - first - first_bytes > _NEAR_BYTES:
      return storage.read(path, *image), storage.read(path, *text)
    data = storage.read(path, first, second + second_bytes - first)
    parts = data[:first_bytes], data[second - first :]
    return parts if image < text else parts[::-1]
