"""Pairs of Parquet files that hold the images' bytes, read in place by row group.

An image is a binary column, or Hugging Face's struct {bytes, path}, of which the path is never
followed; a caption is a text or a list of texts. A record costs the reading of its row group,
unless that is one of the last ones read: what is trained on in random order wants small groups.
A flipped bit is noticed in pages that have checksums (pyarrow's write_page_checksum=True); in
others only where it breaks the format or the image.
"""

import collections
import concurrent.futures
import hashlib
import json
import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from clip_jax.data import images, storage, tables
from clip_jax.data.records import Record, RecordError

SUFFIXES = (".parquet",)
IMAGES = ("image", "images", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
CAPTIONS = ("caption", "captions", "text", "texts", "txt", "sentence", "sentences", "title")
CACHE_BYTES = 256 * 2**20  # of decoded row groups; the last one stays however large it is
_LARGE_BYTES = 8 * 2**20
_OPEN_FILES = 32  # at a time, of each thread
_THREADS = 16  # that read footers
_MAGIC = b"PAR1"
_MAX_FOOTER_BYTES = 2**30
_log = logging.getLogger(__name__)


class ParquetSource:
  """The rows of Parquet files, in their order, of one schema.

  `image` and `caption` name the columns; without them they are the first of IMAGES and CAPTIONS
  that is there.
  Raises: RecordError for a file that is cut short or whose footer cannot be read (naming the byte),
    that lacks a column, or has no rows; from a record, when its group or its fields do not do.
  """

  def __init__(self, files: Sequence[storage.File], image: str = "", caption: str = ""):
    digest = hashlib.sha256(b"parquet")
    self._files = tuple(files)
    self._columns: tuple[str, str] | None = None
    file_of, group_of, rows, largest = [], [], [], 0
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      footers = list(pool.map(_footer, files))
    for k, (file, footer) in enumerate(zip(files, footers, strict=True)):
      metadata = _metadata(file, footer)
      columns = _columns(file, metadata.schema.to_arrow_schema(), image, caption)
      if self._columns not in (None, columns):
        raise RecordError(
          f"{file.path}: its columns are {columns}, those of {files[0].path} {self._columns}; name "
          "them by image_column and caption_column"
        )
      self._columns = columns
      digest.update(f"{file.name} {json.dumps(columns)}".encode(errors="replace") + footer)
      for group in range(metadata.num_row_groups):
        count = metadata.row_group(group)
        largest = max(largest, count.total_byte_size if count.num_rows > 1 else 0)
        file_of.append(k)
        group_of.append(group)
        rows.append(count.num_rows)
    self._file_of, self._group_of = np.array(file_of, np.int32), np.array(group_of, np.int32)
    self._ends = np.cumsum(rows, dtype=np.int64)
    self.fingerprint = digest.hexdigest()
    if not len(self):
      raise RecordError(f"{files[0].path if files else 'Parquet'}: no rows in {len(files)} files")
    if largest > _LARGE_BYTES:
      _log.warning("%s: row groups of up to %.0f MB, and each record costs the reading of one; for "
                   "training write them small (row_group_size of a few rows)",
                   files[0].path, largest / 1e6)  # fmt: skip
    self._clear()

  def __repr__(self) -> str:
    return f"ParquetSource({self.fingerprint[:16]})"

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_groups", "_thread")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._clear()

  def _clear(self) -> None:
    self._lock = threading.Lock()
    self._groups: collections.OrderedDict[int, Any] = collections.OrderedDict()
    self._thread = threading.local()  # its own open files

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f"{self!r}: no record {index}, it has {len(self)}")
    place, row = self._position(index)
    table = self._group(place)
    assert self._columns is not None, "a source without files has no records"
    try:
      image, caption = (table.column(name)[row].as_py() for name in self._columns)
      return Record(self._key(index), _image(image), _captions(caption))
    except (tables.Rejected, UnicodeDecodeError) as error:
      raise RecordError(f"{self.locate(index)}: {error}") from error

  def locate(self, index: int) -> str:
    place, row = self._position(index)
    return f"{self._files[self._file_of[place]].path} row group {self._group_of[place]} row {row}"

  def _key(self, index: int) -> str:
    place, _ = self._position(index)
    first = int(np.searchsorted(self._file_of, self._file_of[place]))  # the file's first group
    return f"{self._files[self._file_of[place]].stem}/{index - self._start(first)}"

  def _start(self, place: int) -> int:
    return int(self._ends[place - 1]) if place else 0

  def _position(self, index: int) -> tuple[int, int]:
    """The place of the row group among all, and the row in it."""
    place = int(np.searchsorted(self._ends, index, side="right"))
    return place, int(index - self._start(place))

  def _group(self, place: int) -> Any:
    """A row group as a table, kept while there is room. Raises: RecordError, OSError."""
    with self._lock:
      if place in self._groups:
        self._groups.move_to_end(place)
        return self._groups[place]
    table = self._read(place)
    with self._lock:
      self._groups[place] = table
      while len(self._groups) > 1 and sum(t.nbytes for t in self._groups.values()) > CACHE_BYTES:
        self._groups.popitem(last=False)
    return table

  def _read(self, place: int) -> Any:
    """Raises: RecordError, OSError."""
    file, group = self._files[self._file_of[place]], int(self._group_of[place])
    opened = self._thread.__dict__.setdefault("opened", collections.OrderedDict())
    try:
      if file.path not in opened:
        opened[file.path] = _open(file)
        if len(opened) > _OPEN_FILES:
          opened.popitem(last=False)
      columns = list(self._columns or ())
      table = opened[file.path].read_row_group(group, columns=columns, use_threads=False)
    except storage.StorageError:
      raise
    except Exception as error:  # Arrow raises OSError, ValueError and its own for damage
      raise RecordError(f"{file.path} row group {group}: {error}") from error
    rows = int(self._ends[place]) - self._start(place)
    if table.num_rows != rows:
      raise RecordError(
        f"{file.path} row group {group}: {table.num_rows} rows, its footer says {rows}"
      )
    return table


def _footer(file: storage.File) -> bytes:
  """The bytes of a file's footer with its length and mark. Raises: RecordError, StorageError."""
  least = 3 * len(_MAGIC)
  why = ""
  if file.size < least or storage.read(file.path, 0, len(_MAGIC)) != _MAGIC:
    why = f"no Parquet file: {file.size:,} bytes, and no {_MAGIC.decode()} at byte 0"
  else:
    end = storage.read(file.path, file.size - 8, 8)
    size = int.from_bytes(end[:4], "little")
    if end[4:] != _MAGIC:
      why = f"cut short at byte {file.size:,}: no {_MAGIC.decode()} at its end"
    elif not 0 < size <= min(file.size - least, _MAX_FOOTER_BYTES):
      why = f"its footer of {size:,} bytes does not fit before byte {file.size - 8:,}"
    else:
      return storage.read(file.path, file.size - 8 - size, size + 8)
  raise RecordError(f"{file.path}: {why}; fetch it again, or move it out of the folder")


def _metadata(file: storage.File, footer: bytes) -> Any:
  """What the footer says. Raises: RecordError.

  Of its row groups no more than the rows: Arrow ends the process where what a damaged footer says
  of a column contradicts itself. When it reads one it compares the place with the file's size.
  """
  import pyarrow
  import pyarrow.parquet

  try:
    metadata = pyarrow.parquet.read_metadata(pyarrow.BufferReader(_MAGIC + footer))
    metadata.schema.to_arrow_schema()
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) > file.size:  # Arrow takes memory for so many
      raise ValueError(f"it says {sum(counts):,} rows, of a file of {file.size:,} bytes")
  except Exception as error:  # Arrow raises OSError, ValueError and its own for damage
    at = file.size - len(footer)
    raise RecordError(
      f"{file.path}: its footer at byte {at:,} is damaged ({error}); fetch it again, or move it "
      "out of the folder"
    ) from error
  return metadata


def _columns(file: storage.File, schema: Any, image: str, caption: str) -> tuple[str, str]:
  """The columns of image and caption. Raises: RecordError naming those that there are."""
  import pyarrow

  found = []
  for asked, usual, what in ((image, IMAGES, "image"), (caption, CAPTIONS, "caption")):
    name = next((n for n in ([asked] if asked else usual) if n in schema.names), None)
    if name is None:
      there = ", ".join(f"{field.name} ({field.type})" for field in schema)
      raise RecordError(
        f"{file.path}: no column {repr(asked) if asked else ', '.join(usual)} for the {what}; it "
        f"has {there}; name it in Source({what}_column=...)"
      )
    found.append(name)
  kind = schema.field(found[0]).type
  if pyarrow.types.is_struct(kind):
    names = [kind.field(i).name for i in range(kind.num_fields)]
    kind = kind.field("bytes").type if "bytes" in names else kind
  if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
    raise RecordError(
      f"{file.path}: column {found[0]!r} holds {kind}, not an image's bytes or a struct that "
      "has them; addresses and paths are never followed"
    )
  return found[0], found[1]


def _open(file: storage.File) -> Any:
  import pyarrow.parquet

  source = storage.open_file(file) if storage.is_remote(file.path) else file.path
  return pyarrow.parquet.ParquetFile(source, page_checksum_verification=True)


def _image(value: Any) -> bytes:
  """The bytes of a field. Raises: Rejected."""
  data = value.get("bytes") if isinstance(value, dict) else value
  if not isinstance(data, bytes):
    raise tables.Rejected("no_image", "its image has no bytes; a path or address is never followed")
  if len(data) > images.MAX_BYTES:
    raise tables.Rejected("too_large", f"its image has {len(data):,} bytes")
  return data


def _captions(value: Any) -> tuple[str, ...]:
  """The captions of a field; none when they are empty. Raises: Rejected."""
  try:
    return tuple(tables.captions_of(value))
  except tables.Rejected as error:
    if error.reason != "empty_caption":
      raise
    return ()
