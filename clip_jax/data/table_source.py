"""Pairs of a table (CSV, TSV or JSON lines) and the folder of its images, read where they lie.

A row is a pair; in JSON lines its captions may be several. Of the table only where each row begins
is held in memory (8 bytes a row); a row is read, strictly, when its turn comes.
"""

import hashlib
import json
import pathlib
import urllib.parse
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from clip_jax.data import images, storage, tables
from clip_jax.data.records import Record, RecordError
from clip_jax.data.tables import Rejected

SUFFIXES = tables.SUFFIXES
IMAGES = ("image", "file_name", "filename", "filepath", "file", "path", "image_path")
CAPTIONS = ("caption", "captions", "text", "texts", "title", "sentence")
_CHUNK_BYTES = 16 * 2**20
_HEADER_ROWS = 100  # of JSON lines, among which one must be readable


class TableSource:
  """The rows of a table, in their order; `folder` is where their images lie, if not beside it.

  `image` and `caption` name the columns; without them they are the first of IMAGES and CAPTIONS
  that is there. Lines of white space are no rows.
  Raises: RecordError for a table without rows or without a column, or whose header (of JSON lines,
    the first rows) cannot be read; from a record, naming the line, when it cannot be read or its
    image is not there or not below the folder.
  """

  def __init__(self, file: storage.File, folder: str = "", image: str = "", caption: str = ""):
    self._path, self._folder = file.path, folder or file.path.rpartition("/")[0] or "."
    self._delimiter = tables.DELIMITERS.get(f".{file.name.lower().rpartition('.')[2]}", "")
    with storage.open_file(file) as stream:
      self._starts, self._blank, content = _rows(stream)
    self._header = 1 if self._delimiter else 0  # rows that are no pairs
    if len(self._starts) == 1:
      raise RecordError(f"{self._path}: empty; wants rows of an image and a caption")
    try:
      there = self._names()
      columns = [
        _column(self._path, there, asked, usual, what)
        for asked, usual, what in ((image, IMAGES, "image"), (caption, CAPTIONS, "caption"))
      ]
      tables.check_columns(self._where(0), there, columns)
    except tables.TableError as error:
      raise RecordError(str(error)) from error
    self._columns, self._places = columns, [there.index(name) for name in columns]
    self._width = len(there)
    if not len(self):
      raise RecordError(f"{self._path}: has a header and no row")
    self._digest = hashlib.sha256(f"table {json.dumps(columns)} {content}".encode()).hexdigest()

  def __repr__(self) -> str:
    return f"TableSource({self.fingerprint[:16]})"

  @property
  def fingerprint(self) -> str:
    """The sha256 of the table and of the columns' names.

    Differs: an image that is replaced under its name goes unseen; to see it, all would have to be
    looked at at every start.
    """
    return self._digest

  def __len__(self) -> int:
    return len(self._starts) - 1 - self._header

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f"{self!r}: no record {index}, it has {len(self)}")
    try:
      named, said = self._fields(index + self._header)
      name = tables.safe_name(named)
      return Record(name, self._image(name), _captions(said))
    except Rejected as error:
      raise RecordError(f"{self.locate(index)}: {error}") from error

  def locate(self, index: int) -> str:
    return self._where(index + self._header)

  def _where(self, row: int) -> str:
    """Path and line; blank lines count as lines."""
    return f"{self._path}:{row + 1 + int(np.searchsorted(self._blank, row, side='right'))}"

  def _names(self) -> list[str]:
    """The columns that there are. Raises: TableError, StorageError."""
    if self._delimiter:
      try:
        line: str | Rejected = self._text(0)
      except Rejected as error:
        line = error
      return tables.header(line, self._delimiter, self._where(0))
    why = Rejected("")
    for row in range(min(_HEADER_ROWS, len(self._starts) - 1)):
      try:
        return list(tables.json_object(self._text(row)))
      except Rejected as error:
        why = error
    raise tables.TableError(f"{self._where(0)}: no row can be read ({why}); a row is a JSON object")

  def _text(self, row: int) -> str:
    """A row's line. Raises: Rejected, StorageError."""
    start, end = int(self._starts[row]), int(self._starts[row + 1])
    line = storage.read(self._path, start, min(end - start, tables.MAX_LINE_BYTES + 1))
    return tables.text_of(line.split(b"\n", 1)[0], first=start == 0)

  def _fields(self, row: int) -> tuple[Any, ...]:
    """What stands in the columns of image and caption. Raises: Rejected, StorageError."""
    line = self._text(row)
    if self._delimiter:
      fields = tables.split(line, self._delimiter, self._width)
      return tuple(fields[place] for place in self._places)
    found = tables.json_object(line)
    if missing := [name for name in self._columns if name not in found]:
      raise Rejected("columns", f"no {', '.join(missing)}")
    return tuple(found[name] for name in self._columns)

  def _image(self, name: str) -> bytes:
    """The bytes of the image of that name below the folder. Raises: Rejected, StorageError."""
    if not storage.is_remote(self._folder):
      path = str(tables.find(pathlib.Path(self._folder), name))
    elif self._folder.startswith("http"):
      path = f"{self._folder}/{urllib.parse.quote(name)}"
    else:
      path = f"{self._folder}/{name}"
    return storage.read_all(path, images.MAX_BYTES)


def _column(path: str, there: Sequence[str], asked: str, usual: Sequence[str], what: str) -> str:
  """The name of a column. Raises: TableError naming those that there are."""
  name = next((n for n in ([asked] if asked else usual) if n in there), None)
  if name is None:
    raise tables.TableError(
      f"{path}: no column {repr(asked) if asked else ', '.join(usual)} for the {what}; there are "
      f"{', '.join(there)}; name it in Source({what}_column=...)"
    )
  return name


def _captions(value: Any) -> tuple[str, ...]:
  """The captions of a field; none when they are empty. Raises: Rejected."""
  try:
    return tuple(tables.captions_of(value))
  except Rejected as error:
    if error.reason != "empty_caption":
      raise
    return ()


def _is_blank(line: bytes, first: bool) -> bool:
  try:
    return not tables.text_of(line, first).strip()
  except Rejected:
    return False


def _rows(stream: BinaryIO) -> tuple[np.ndarray, np.ndarray, str]:
  """Where each row begins and the last one ends; how many rows come before each blank line; the
  sha256 of all. Rows are lines that are not all white space.
  """
  digest, starts, blank = hashlib.sha256(), [], []
  at, rows, rest = 0, 0, b""  # rest: of a line whose end is not read yet
  while True:
    chunk = stream.read(_CHUNK_BYTES)
    digest.update(chunk)
    data = rest + chunk
    ends: np.ndarray = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
    if not chunk and data:
      ends = np.array([len(data)])  # a last line without an end
    begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends
    head = np.frombuffer(data, np.uint8)[begins]
    full = (head > ord(" ")) & (head < 128)  # surely; of the others each is looked at
    for k in np.flatnonzero(~full):
      full[k] = not _is_blank(data[begins[k] : ends[k]], first=at + begins[k] == 0)
    order = np.cumsum(full) - full  # rows before each line
    starts.append(begins[full] + at)
    blank.append(order[~full] + rows)
    rows += int(full.sum())
    used = int(ends[-1]) if len(ends) else 0
    at, rest = at + used, data[used:]
    if not chunk:
      break
  starts.append(np.array([at]))
  return (
    np.concatenate(starts).astype(np.int64),
    np.concatenate(blank).astype(np.int64),
    digest.hexdigest(),
  )
