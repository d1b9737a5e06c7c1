"""The fingerprint of what a data set consists of, texts and files, and keeping it between starts.

A fingerprint is a hash of content: in a line of results it says on which data a figure was
measured. To read every byte again at each start, only to find that nothing is left to measure,
takes minutes for the larger data sets. So a command that has a cache keeps fingerprints there,
under all that the file system says of the files: where any of it differs, they are read again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Iterable

_FORMAT = "contents/1"  # part of every key: raise it when the same key would mean another value
# A file may change once more within one tick of the file system's clock, or of a server's that lags
# behind: what changed so short a time ago is not kept.
_SETTLED_SECONDS = 60.0

Parts = Callable[[], Iterable[str | pathlib.Path]]  # texts, and files for what is in them


@dataclasses.dataclass(frozen=True)
class Cache:
  """A folder of fingerprints. `writes`: whether this process adds to it."""

  folder: pathlib.Path
  writes: bool


class Contents:
  """What has a fingerprint of its `parts`. `cache` counts until that is first asked for."""

  cache: Cache | None = None

  def parts(self) -> Iterable[str | pathlib.Path]:
    raise NotImplementedError

  @functools.cached_property
  def fingerprint(self) -> str:
    """The sha256 of all parts; reads all files, unless they are known from the cache."""
    return fingerprint(self.parts, self.cache)


def fingerprint(parts: Parts, cache: Cache | None = None) -> str:
  """The sha256 of the texts and of the sha256 of each file, in order. Raises: OSError."""
  if cache is None:
    return _of_content(parts())
  key, _ = _of_entries(parts())
  path = cache.folder / f"{key}.fingerprint"
  if kept := _kept(path):
    return kept
  found = _of_content(parts())
  after, changed = _of_entries(parts())
  if cache.writes and after == key and changed < time.time() - _SETTLED_SECONDS:
    _keep(path, found)
  return found


def _of_content(parts: Iterable[str | pathlib.Path]) -> str:
  digest = hashlib.sha256()
  for part in parts:
    if isinstance(part, str):
      digest.update(part.encode())
      continue
    with part.open("rb") as file:
      digest.update(hashlib.file_digest(file, "sha256").digest())
  return digest.hexdigest()


def _of_entries(parts: Iterable[str | pathlib.Path]) -> tuple[str, float]:
  """A sha256 of the texts and of what the file system says of the files, without reading them.

  That is path, device, inode, size, and when content and entry changed last: a time of content that
  was set back changes the entry. Second: the latest of those times, in seconds.
  """
  digest, latest = hashlib.sha256(_FORMAT.encode()), 0
  for part in parts:
    said: list[str | int] = [part] if isinstance(part, str) else [os.path.abspath(part)]
    if not isinstance(part, str):
      s = part.stat()
      said += [s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns]
      latest = max(latest, s.st_mtime_ns, s.st_ctime_ns)
    digest.update(json.dumps(said).encode())
  return digest.hexdigest(), latest / 1e9


def _kept(path: pathlib.Path) -> str:
  """The fingerprint in a file, or an empty text where there is none or it is damaged."""
  try:
    found = path.read_bytes().decode("ascii", "replace")
  except OSError:
    return ""
  return found[:64] if found == _line(path, found[:64]) else ""


def _line(path: pathlib.Path, value: str) -> str:
  """A value with a check of it and of its file's name."""
  return f"{value} {hashlib.sha256(f'{path.name} {value}'.encode()).hexdigest()}"


def _keep(path: pathlib.Path, value: str) -> None:
  """All of the file or nothing. A full disk loses no result: it is a warning."""
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(_line(path, value))
    os.replace(temporary, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink()
    warnings.warn(
      f"{path.parent}: the fingerprint of data is not kept ({error.strerror}); the data will be "
      "read again at the next start",
      RuntimeWarning,
      stacklevel=4,
    )
