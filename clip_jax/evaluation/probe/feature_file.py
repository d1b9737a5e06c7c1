"""Rows of features in a file that a killed run goes on with, and that knows when it is damaged.

`KEY.rows` holds float32 rows one after the other, `KEY.jsonl` a line a chunk with the sha256 of its
rows and with what its records say. A chunk is there when its line is whole and its rows are those:
whatever comes after the first that is not so is cut away and made again. The first rows of a set of
features are the same whether more of them are wanted or not: a short run begins a long one.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from clip_jax.evaluation.encoding import EvaluationError


@dataclasses.dataclass(frozen=True)
class Chunk:
  """A line of the file: what the records of some rows say, and whose image cannot be decoded."""

  rows: int
  width: int
  sha256: str
  labels: Sequence[str | None]
  captions: Sequence[Sequence[str]]
  unreadable: Sequence[int]  # from 0 in each chunk

  @property
  def bytes(self) -> int:
    return 4 * self.rows * self.width


def chunk(
  rows_bD: np.ndarray,
  labels: Sequence[str | None],
  captions: Sequence[Sequence[str]],
  unreadable: Sequence[int],
) -> Chunk:
  """The line of these float32 rows."""
  rows, width = rows_bD.shape
  digest = hashlib.sha256(rows_bD.tobytes()).hexdigest()
  return Chunk(rows, width, digest, labels, captions, unreadable)


class FeatureFile:
  """The two files of a set of features, of which `n` rows are wanted; `chunks` are the whole ones.

  Rows are written as any file is, not through a memory map: where the disk is full a write is
  refused, and a map would end the process.
  """

  def __init__(self, folder: pathlib.Path, key: str, n: int):
    self._rows, self._lines, self._n = folder / f"{key}.rows", folder / f"{key}.jsonl", n
    self._read()

  @property
  def done(self) -> int:
    """How many rows are there; may be more than `n`."""
    return sum(chunk.rows for chunk in self.chunks)

  def _read(self) -> None:
    self.chunks: list[Chunk] = []
    self._line_bytes = 0
    if not (self._rows.is_file() and self._lines.is_file()):
      return
    with self._lines.open("rb") as lines:
      for line in lines:
        chunk = _parsed(line)
        if chunk is None or self.done >= self._n:
          break
        if chunk.width != (self.chunks or [chunk])[0].width:
          break
        self.chunks.append(chunk)
        if hashlib.sha256(self.read(len(self.chunks) - 1)).hexdigest() != chunk.sha256:
          self.chunks.pop()
          break
        self._line_bytes += len(line)

  def read(self, index: int) -> bytes:
    """The bytes of a chunk's rows; fewer where the file is cut short."""
    with self._rows.open("rb") as file:
      file.seek(sum(chunk.bytes for chunk in self.chunks[:index]))
      return file.read(self.chunks[index].bytes)

  @contextlib.contextmanager
  def writing(self) -> Iterator[None]:
    """Inside, chunks can be appended to those that are whole, by one run alone.

    Raises: EvaluationError when another run is at it; OSError.
    """
    with contextlib.ExitStack() as stack:
      with self._naming(self._lines):
        self._lines.parent.mkdir(parents=True, exist_ok=True)
        self._line_file = _append_to(self._lines, stack)
        self._row_file = _append_to(self._rows, stack)
      try:
        fcntl.flock(self._line_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError:
        raise EvaluationError(
          f"{self._lines}: another run is writing these features; wait for its end, or give "
          "another cache folder"
        ) from None
      self._read()  # what another run may have written before it let go
      self._line_file.truncate(self._line_bytes)
      self._row_file.truncate(sum(chunk.bytes for chunk in self.chunks))
      yield

  def append(self, rows_bD: np.ndarray, chunk: Chunk) -> None:
    """The rows first, then their line: a chunk is there whole or not at all.

    Raises: OSError with the file's name, and in words that what was done is kept.
    """
    with self._naming(self._rows):
      _write(self._row_file, rows_bD.tobytes())
    with self._naming(self._lines):
      _write(self._line_file, json.dumps(dataclasses.asdict(chunk)).encode() + b"\n")
    self.chunks.append(chunk)

  def rows(self) -> np.ndarray:
    """float32 [n, D] as it lies on the disk, not to be written."""
    return np.memmap(self._rows, np.float32, "r", shape=(self._n, self.chunks[0].width))

  @contextlib.contextmanager
  def _naming(self, path: pathlib.Path) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      words = (
        f"{error.strerror}; the features of {self.done:,} of {self._n:,} records are kept: make "
        "room or give another cache folder, and the same command goes on"
      )
      raise OSError(error.errno, words, str(path)) from error


@contextlib.contextmanager
def opened(folder: pathlib.Path, key: str, n: int) -> Iterator[FeatureFile]:
  """The features of that key, to be read, and where there are fewer than `n` rows to be written."""
  file = FeatureFile(folder, key, n)
  with file.writing() if file.done < n else contextlib.nullcontext():
    yield file


def _append_to(path: pathlib.Path, stack: contextlib.ExitStack) -> Any:
  file = path.open("ab")
  stack.callback(_close, file)
  return file


def _write(file: Any, data: bytes) -> None:
  """Returns when it is on the disk."""
  file.write(data)
  file.flush()
  os.fsync(file.fileno())


def _close(file: Any) -> None:
  """What could not be written was told; closing must not hide it."""
  with contextlib.suppress(OSError):
    file.close()


def _parsed(line: bytes) -> Chunk | None:
  """A line that is whole and sound, or None."""
  try:
    fields = json.loads(line)
    found = Chunk(**fields)
    same = found.rows == len(found.labels) == len(found.captions)
    sound = same and min(map(int, (found.rows, found.width))) > 0
  except (ValueError, TypeError):
    return None
  return found if sound and line.endswith(b"\n") else None
