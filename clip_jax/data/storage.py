"""Bytes of files, on this machine or in an object store: listed, and read from any place in them.

A path with a scheme (gs://, s3://, https://) is read range by range through fsspec, with time
limits and retries; any other path is one of this machine. Nothing is downloaded as a whole. Of
requests that fail one line is logged, until a minute has passed without another failure.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import logging
import math
import os
import pathlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, TypeVar

ATTEMPTS = 6  # of one request
FIRST_SECONDS, MOST_SECONDS = 0.5, 20.0  # of the pause after a failure: doubled each time
TIMEOUT_SECONDS = 30.0  # of one request
BLOCK_BYTES = 4 * 2**20  # that are asked for at most, and where a file is read in order
STORM_SECONDS = 60.0  # more than lie between two failures of one request
_THREADS = 16  # requests at a time
_REMOTE = re.compile(r"[a-z][a-z0-9+]*://")
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_NUMBERS = 1_000_000
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "http": "aiohttp", "https": "aiohttp"}
_STAMPS = ("ETag", "etag", "md5Hash", "Content-MD5", "generation", "LastModified", "Last-Modified",
           "mtime", "created")  # fmt: skip  # by which stores tell two contents of a name apart
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError,
          NotImplementedError, TypeError)  # fmt: skip
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class StorageError(OSError):
  """Bytes that cannot be had: of which file, why, what to do."""


class NotThere(StorageError):
  """A path at which there is nothing."""


class Unavailable(StorageError):
  """Bytes that a store did not give, however often it was asked: what may pass, and did not."""


class Failures:
  """The newest failure of a request to a store, in this process."""

  def __init__(self) -> None:
    self._lock, self._time, self._text = threading.Lock(), -math.inf, ""

  def add(self, text: str) -> None:
    """Notes it, and logs it when it is the first one for a while."""
    with self._lock:
      first = time.monotonic() - self._time > STORM_SECONDS
      self._time, self._text = time.monotonic(), text
    if first:
      _log.warning("storage fails and is asked again: %s", text)

  def newest(self) -> str:
    """What failed in the last minute; empty: nothing."""
    with self._lock:
      return self._text if time.monotonic() - self._time <= STORM_SECONDS else ""


failures = Failures()


@dataclasses.dataclass(frozen=True)
class File:
  """A file as it was found. `stamp` changes when its content does (a time in ns, or an ETag)."""

  path: str
  size: int  # bytes; -1: a listing did not say, see `known`
  stamp: str

  @property
  def name(self) -> str:
    return self.path.rstrip("/").rpartition("/")[2]

  @property
  def stem(self) -> str:
    return self.name.rpartition(".")[0] or self.name


def is_remote(path: str) -> bool:
  return _REMOTE.match(path) is not None


def cache_folder() -> pathlib.Path:
  """Where files of this package's own lie that can be made anew: CLIP_JAX_CACHE, or ~/.cache."""
  own = os.environ.get("CLIP_JAX_CACHE")
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(own) if own else pathlib.Path(base) / "clip_jax"


def expand(path: str) -> list[str]:
  """ "a/{000..123}.tar" -> its 124 paths; any other path -> itself. Raises: StorageError."""
  found = _NUMBERS.search(path)
  if found is None:
    return [path]
  first, last = map(int, found.groups())
  if not first <= last < first + _MOST_NUMBERS:
    raise StorageError(f"{path}: {found[0]} names no files, or over {_MOST_NUMBERS:,}")
  width = len(found[1])
  return [
    f"{path[: found.start()]}{number:0{width}}{path[found.end() :]}"
    for number in range(first, last + 1)
  ]


def files(path: str, suffixes: Sequence[str]) -> list[File]:
  """The file at a path, those of a range in it, or those of a folder, by name.

  Of a folder only names that end in one of `suffixes` count, and no hidden ones.
  Raises: StorageError when a path is not there or a folder cannot be listed.
  """
  if _NUMBERS.search(path) or path.lower().endswith(tuple(suffixes)):
    return known([File(own, -1, "") for own in expand(path)])
  return known([f for f in listing(path) if f.name.lower().endswith(tuple(suffixes))])


def known(files: Sequence[File]) -> list[File]:
  """The files with sizes and stamps, asked for where they are missing. Raises: StorageError."""
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(lambda file: info(file.path) if file.size < 0 else file, files))


def listing(path: str) -> list[File]:
  """All files of a folder but hidden ones, by name; over http as the server's page has them.

  Raises: StorageError.
  """
  if is_remote(path):
    return _remote_listing(path)
  found = []
  try:
    with os.scandir(path) as entries:
      for entry in entries:
        if not entry.name.startswith(".") and entry.is_file():
          status = entry.stat()
          found.append(File(entry.path, status.st_size, str(status.st_mtime_ns)))
  except OSError as error:
    raise _local_error(path, error) from error
  return sorted(found, key=lambda file: file.name)


def info(path: str) -> File:
  """What is known of one file. Raises: StorageError."""
  if is_remote(path):
    return _remote_file(path, _request(path, "info", lambda fs, own: fs.info(own, **_limit(fs))))
  try:
    status = os.stat(path)
  except OSError as error:
    raise _local_error(path, error) from error
  return File(path, status.st_size, str(status.st_mtime_ns))


def read(path: str, start: int, size: int) -> bytes:
  """`size` bytes from byte `start`, all of them. Raises: StorageError."""
  if size == 0:
    return b""
  if is_remote(path):
    starts = range(start, start + size, BLOCK_BYTES)
    sizes = [min(BLOCK_BYTES, start + size - first) for first in starts]
    return b"".join(
      _request(path, f"bytes {first}-{first + own - 1}", _range(first, own))
      for first, own in zip(starts, sizes, strict=True)
    )
  try:
    with open(path, "rb", buffering=0) as file:
      file.seek(start)
      data = file.read(size)
      while data and len(data) < size:
        more = file.read(size - len(data))
        data = data + more if more else b""
  except OSError as error:
    raise _local_error(path, error) from error
  if len(data) < size:
    raise StorageError(f"{path}: ends before byte {start + size:,}; it was cut short")
  return data


def open_file(file: File) -> BinaryIO:
  """The file for reading, with `seek`; a remote one by blocks. Raises: StorageError."""
  if is_remote(file.path):
    return io.BufferedReader(_Ranged(file), BLOCK_BYTES)
  try:
    return open(file.path, "rb")
  except OSError as error:
    raise _local_error(file.path, error) from error


def _local_error(path: str, error: OSError) -> StorageError:
  gone = isinstance(error, (FileNotFoundError, NotADirectoryError))
  return (NotThere if gone else StorageError)(f"{path}: {error.strerror or error}")


def read_all(path: str, most: int) -> bytes:
  """A whole file of at most so many bytes. Raises: StorageError."""
  if is_remote(path):
    data = _request(path, "read", lambda fs, own: fs.cat_file(own, end=most + 1, **_limit(fs)))
  else:
    try:
      with open(path, "rb") as file:
        data = file.read(most + 1)
    except OSError as error:
      raise _local_error(path, error) from error
  if len(data) > most:
    raise StorageError(f"{path}: over {most:,} bytes")
  return data


class _Ranged(io.RawIOBase):
  """A remote file, of which each read is one request."""

  def __init__(self, file: File):
    self._file, self._position = file, 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = 0) -> int:
    self._position = offset + (0, self._position, self._file.size)[whence]
    return self._position

  def readinto(self, buffer: Any) -> int:
    size = max(0, min(len(buffer), self._file.size - self._position))
    buffer[:size] = read(self._file.path, self._position, size)
    self._position += size
    return size


def pause_seconds(what: str, attempt: int) -> float:
  """How long to wait after failure number `attempt` (from 0): doubled each time, with a limit.

  Up to half of it is left out, by a hash of the request and of this process, so that those who
  failed together do not come back together.
  """
  who = f"{what} {attempt} {os.uname().nodename} {os.getpid()}"
  share = int.from_bytes(hashlib.sha256(who.encode()).digest()[:8]) / 2**64
  return min(MOST_SECONDS, FIRST_SECONDS * 2**attempt) * (1 - share / 2)


def _request(path: str, what: str, ask: Callable[[Any, str], _T]) -> _T:
  """Asks a store, again after what may pass. Raises: StorageError; Unavailable in the end."""
  scheme, _, rest = path.partition("://")
  filesystem = _filesystem(scheme)
  own = path if scheme in ("http", "https") else rest
  for attempt in range(ATTEMPTS):
    try:
      return ask(filesystem, own)
    except Exception as error:  # each store's client raises its own kinds
      if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what fsspec's http calls whatever happened
      why = str(error).strip() or type(error).__name__
      status = getattr(error, "status", None) or getattr(error, "code", None)
      refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
      if refused or isinstance(error, _FINAL):
        if status == 404 or isinstance(error, FileNotFoundError):
          raise NotThere(f"{path}: {what}: not there") from error
        raise StorageError(f"{path}: {what}: {why}") from error
      failures.add(f"{path}: {what}: {why}")
      if attempt + 1 == ATTEMPTS:
        raise Unavailable(f"{path}: {what}: failed {ATTEMPTS} times, at last: {why}") from error
      time.sleep(pause_seconds(f"{path} {what}", attempt))
  raise AssertionError("the loop ends in a value or an error")


def _range(start: int, size: int) -> Callable[[Any, str], bytes]:
  def ask(filesystem: Any, own: str) -> bytes:
    data = filesystem.cat_file(own, start=start, end=start + size, **_limit(filesystem))
    if len(data) > size:
      raise NotImplementedError("the server sends whole files: it knows no ranges (HTTP 206)")
    if len(data) < size:
      raise OSError(f"{len(data):,} bytes came of {size:,}")
    return data

  return ask


def _limit(filesystem: Any) -> dict[str, float]:
  return {"timeout": TIMEOUT_SECONDS} if filesystem.async_impl else {}


@functools.lru_cache(maxsize=8)
def _filesystem(scheme: str) -> Any:
  try:
    import fsspec

    return fsspec.filesystem(scheme, use_listings_cache=False)
  except (ImportError, ValueError) as error:
    package = _PACKAGES.get(scheme, "fsspec")
    raise StorageError(
      f"{scheme}://: cannot be read here ({error}); pip install -e '.[remote]' brings fsspec and "
      f"{package}"
    ) from error


def _remote_listing(path: str) -> list[File]:
  scheme, _, _ = path.partition("://")
  found = []
  for entry in _request(path, "list", lambda fs, own: fs.ls(own, detail=True, **_limit(fs))):
    name = entry["name"] if "://" in entry["name"] else f"{scheme}://{entry['name']}"
    if entry.get("type") == "file" and not name.rpartition("/")[2].startswith("."):
      sized = entry.get("size") is not None
      found.append(_remote_file(name, entry) if sized else File(name, -1, ""))
  return sorted(found, key=lambda file: file.name)


def _remote_file(path: str, entry: dict[str, Any]) -> File:
  if entry.get("type") == "directory" or entry.get("size") is None:
    raise StorageError(f"{path}: no file whose size the store tells")
  stamps = [str(entry[name]) for name in _STAMPS if entry.get(name)]
  return File(path, int(entry["size"]), " ".join(stamps))
