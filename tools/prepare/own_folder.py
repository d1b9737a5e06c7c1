"""DEST is a folder of its own: what is written there replaces files, and must not replace any that
are read.
"""

import argparse
import os
import pathlib
from collections.abc import Iterator

from clip_jax.data import parquet_source, storage, table_source, webdataset_source
from tools.prepare.evaluation_sets import parted
from tools.prepare.jobs import PrepareError

_FILES = (*webdataset_source.SUFFIXES, *parquet_source.SUFFIXES, *table_source.SUFFIXES)


def check(asked: argparse.Namespace) -> None:
  """Raises: PrepareError when DEST is one of the folders that are read from, or has one in it,
  links followed. Nothing was written until then.
  """
  dest = asked.dest.resolve()
  for path in _read(asked):
    found = path.resolve()
    if any(_same(dest, folder) for folder in (found, *found.parents)):
      raise PrepareError(
        f"{asked.dest}: {path} is read, and lies there; files in DEST are replaced, so choose a "
        "folder of its own"
      )


def of_source(path: str) -> str:
  """The folder that what lies at a path is in: itself, or a file's own."""
  return path.rpartition("/")[0] if path.lower().endswith(_FILES) else path.rstrip("/")


def _read(asked: argparse.Namespace) -> Iterator[pathlib.Path]:
  """The files and folders of this machine that the verb reads, with what may be links in them."""
  for name in ("images", "captions", "packages", "files"):  # options of one verb or another
    if (path := getattr(asked, name, None)) and not storage.is_remote(str(path)):
      yield pathlib.Path(path)
  places = [parted(place) for place in getattr(asked, "against", ())]
  if asked.verb == "pairs":
    places.append((asked.pairs, asked.split))
  for path, split in places:
    if storage.is_remote(path):
      continue
    root = pathlib.Path(path)
    folders = {root, root / "data", *([root / split] if split else [])}
    if path.lower().endswith(_FILES):
      folders = {pathlib.Path(file).parent for file in storage.expand(path)}
    for folder in sorted(folders):
      yield folder
      yield from _links(folder)


def _links(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Of files: what they name may lie anywhere."""
  if folder.is_dir():
    with os.scandir(folder) as entries:
      yield from (pathlib.Path(e.path) for e in entries if e.is_symlink() and e.is_file())


def _same(one: pathlib.Path, other: pathlib.Path) -> bool:
  """Also where a file system takes two names for one, or has a folder at two places."""
  return one == other or (one.exists() and other.exists() and one.samefile(other))
