"""Files that are there as a whole or not at all."""

import hashlib
import os
import pathlib


def replace(path: pathlib.Path, data: bytes) -> None:
  """Writes a small file whole: under a temporary name, onto the disk, then under its own."""
  temporary = temporary_of(path)
  temporary.write_bytes(data)
  finish(temporary, path)


def temporary_of(path: pathlib.Path) -> pathlib.Path:
  """A name of this process alone: one that was left behind may still be writing to its own."""
  return path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")


def finish(temporary: pathlib.Path, path: pathlib.Path) -> None:
  """What was written is on the disk before it has its name."""
  with temporary.open("rb") as file:
    os.fsync(file.fileno())
  os.replace(temporary, path)


def sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
