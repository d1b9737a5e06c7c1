"""Results as lines of JSON that outlive a kill: each is on the disk as soon as it is appended."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any


class LinesError(ValueError):
  """A file of lines that cannot be read: which line, and what to do."""


@dataclasses.dataclass(frozen=True)
class Lines:
  """The objects of a file with the numbers of their lines.

  `cut` says in words that the last line was cut off, which is what a kill leaves, or is empty.
  """

  numbered: tuple[tuple[int, dict[str, Any]], ...]
  cut: str


def read(path: str | os.PathLike[str]) -> Lines:
  """All whole lines; a file that is not there has none.

  Raises: LinesError naming the line that is no object, if it is not the last one.
  """
  path = pathlib.Path(path)
  return parse(path.read_bytes() if path.exists() else b"", path)


def parse(content: bytes, path: str | os.PathLike[str]) -> Lines:
  """The same of the content of the file `path`. Raises: LinesError."""
  out, cut = [], ""
  for number, line in enumerate(content.split(b"\n"), start=1):
    if not line.strip():
      continue
    ended = number <= content.count(b"\n")
    try:
      value: Any = json.loads(line)
    except ValueError as error:
      if ended:
        raise LinesError(f"{path}:{number}: not JSON ({error}); remove this line") from None
      cut = f"{path}:{number}: the last line was cut off while it was written and is ignored"
      continue
    if not isinstance(value, dict):
      raise LinesError(f"{path}:{number}: not an object; remove this line")
    out.append((number, value))
  return Lines(tuple(out), cut)


def append(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
  """Adds one line and waits until it is on the disk; a cut last line is taken away first.

  Raises: OSError with the file's name, when it cannot be written; ValueError for a number that is
    not finite.
  """
  path = pathlib.Path(path)
  line = json.dumps(value, allow_nan=False) + "\n"
  try:
    with path.open("a+b") as file:
      file.seek(0)
      content = file.read()
      end = content.rfind(b"\n") + 1
      if content[end:].strip():
        try:
          json.loads(content[end:])
          line = "\n" + line  # only its end is missing
        except ValueError:
          file.truncate(end)
      file.write(line.encode())
      file.flush()
      os.fsync(file.fileno())
  except OSError as error:
    raise OSError(error.errno, error.strerror, str(path)) from error
