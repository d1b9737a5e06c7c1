"""What lies at a path -> a source of its pairs, read in place.

Kinds are known by what lies there: an ArrayRecord folder by its manifest.json, a TFDS data set by
its dataset_info.json, WebDataset by .tar files, Parquet by .parquet files, a table of captions by
a .csv, .tsv or .jsonl file. img2dataset's .parquet files beside .tar files are not read.
"""

import collections
import os
import pathlib
import re
from collections.abc import Collection, Sequence

from clip_jax import config as config_lib
from clip_jax.data import (
  parquet_source,
  records,
  storage,
  table_source,
  tfds_source,
  webdataset_source,
)

ACCEPTED = (
  "a folder with manifest.json (tools/prepare_data.py), .tar files of images and captions "
  "(WebDataset), .parquet files, one .csv, .tsv or .jsonl table, or a TFDS data set; or one such "
  "file, or several, as 'pairs/{000..123}.tar'"
)
_SPLITS = ("train", "test", "val", "valid", "validation", "dev")
_SUFFIXES = {
  "webdataset": webdataset_source.SUFFIXES,
  "parquet": parquet_source.SUFFIXES,
  "table": table_source.SUFFIXES,
}  # by kind; where a folder has several, the first one counts
_OPTIONS: dict[str, tuple[str, ...]] = {
  "array_record": (),
  "tfds": ("caption_column",),
  "webdataset": ("caption_column",),
  "parquet": ("image_column", "caption_column"),
  "table": ("image_column", "caption_column", "images"),
}


def open_files(source: config_lib.Source) -> records.RecordSource:
  """The pairs at `source.path`, of its split.

  A split is a folder of that name below the path, or the files whose name has it as a word
  (train-00000.tar); where no file's name has any split in it, all are of the split "train". A
  path of files is these files, whatever the split.
  Raises: RecordError saying what is there and what would be accepted, or what opening it raises.
  """
  if not source.path:
    raise records.RecordError("a source without path: give one in Source(path=...), or a kind of "
                              "'scenes' or 'digits'")  # fmt: skip
  try:
    return _open(source)
  except storage.StorageError as error:
    raise records.RecordError(str(error)) from error


def _open(source: config_lib.Source) -> records.RecordSource:
  kind, found = _found(source)
  own = source.image_column, source.caption_column
  for name in _OPTIONS["table"]:
    if getattr(source, name) and name not in _OPTIONS[kind]:
      raise records.RecordError(
        f"{source.path}: {name} is {getattr(source, name)!r}, but {kind} has no such option; leave "
        "it empty"
      )
  if kind == "array_record":
    return records.ArrayRecordSource(source.path, source.split)
  if kind == "tfds":
    return _tfds(source)
  by_name = source.path.lower().endswith(_SUFFIXES[kind])  # of the files themselves
  files = found if by_name else _of_split(found, source)
  if kind == "parquet":
    return parquet_source.ParquetSource(files, *own)
  if kind == "webdataset":
    return webdataset_source.WebdatasetSource(files, source.caption_column)
  if len(files) > 1:
    names = ", ".join(file.name for file in files[:5])
    raise records.RecordError(f"{source.path}: {len(files)} tables ({names}); name one of them")
  return table_source.TableSource(files[0], source.images, *own)


def _found(source: config_lib.Source) -> tuple[str, list[storage.File]]:
  """The kind of what lies at the path, and its files. Raises: RecordError, StorageError."""
  path, wanted = source.path.rstrip("/"), source.kind
  kinds = [kind for kind in _SUFFIXES if wanted in ("auto", kind)]
  for kind in kinds:  # a file, or a range of files
    if path.lower().endswith(_SUFFIXES[kind]):
      return kind, storage.files(path, _SUFFIXES[kind])
  if not storage.is_remote(path) and os.path.isfile(path):
    raise records.RecordError(f"{path}: no file of a kind that is read. Wanted: {ACCEPTED}")
  try:
    files = storage.listing(path)
  except storage.NotThere as error:
    raise records.RecordError(
      f"{path}: nothing is there (make prepare makes what experiments/ use). Wanted: {ACCEPTED}"
    ) from error
  names = {file.name for file in files}
  if wanted == "array_record" or (wanted == "auto" and records.MANIFEST in names):
    _check_local(path, "ArrayRecord")
    return "array_record", []
  if wanted == "tfds" or (wanted == "auto" and _tfds_folder(path, names)):
    _check_local(path, "TFDS")
    return "tfds", []
  for folder in (f"{path}/{source.split}", path, f"{path}/data"):
    there = files if folder == path else _listing(folder)
    for kind in kinds:
      if own := [file for file in there if file.name.lower().endswith(_SUFFIXES[kind])]:
        return kind, storage.known(own)
  asked = "" if wanted == "auto" else f" of kind {wanted!r}"
  raise records.RecordError(
    f"{path}: no pairs{asked} there; it has {_summary(path, files)}. Wanted: {ACCEPTED}"
  )


def _tfds_folder(path: str, names: Collection[str]) -> pathlib.Path | None:
  """The folder of a TFDS data set's newest version at a path, if it is one."""
  if "dataset_info.json" in names:
    return pathlib.Path(path)
  if storage.is_remote(path):
    return None
  place = pathlib.Path(path)
  return tfds_source.newest_version(place.parent, place.name)


def _tfds(source: config_lib.Source) -> records.RecordSource:
  """A split of a TFDS data set. Raises: RecordError."""
  names = {file.name for file in storage.listing(source.path)}
  folder = _tfds_folder(source.path, names)
  if folder is None:
    raise records.RecordError(f"{source.path}: no dataset_info.json in it or in a version below it")
  found = tfds_source.file_format(folder)
  if found != "array_record":
    raise records.RecordError(
      f"{folder}: its format is {found}, of which no single record can be read; make it with "
      "--file_format=array_record"
    )
  return tfds_source.TfdsPairs(folder, source.split, source.caption_column)


def _listing(folder: str) -> list[storage.File]:
  try:
    return storage.listing(folder)
  except storage.NotThere:
    return []


def _check_local(path: str, what: str) -> None:
  if storage.is_remote(path):
    raise records.RecordError(
      f"{path}: {what} is read from this machine's folders only; mount the bucket or copy it "
      "(WebDataset and Parquet are read from object stores)"
    )


def _of_split(files: Sequence[storage.File], source: config_lib.Source) -> list[storage.File]:
  """Those of the files that are of the source's split. Raises: RecordError."""
  split = source.split
  folder = f"{source.path.rstrip('/')}/{split}/"
  if any(file.path.startswith(folder) for file in files):
    return list(files)
  words = {file.path: set(re.split(r"[-_.]", file.stem)) for file in files}
  splits = {word for own in words.values() for word in own if word in {*_SPLITS, split}}
  if not splits and split == "train":
    return list(files)
  own = [file for file in files if split in words[file.path]]
  if not own:
    there = ", ".join(sorted(splits)) or "no split in its files' names, which counts as 'train'"
    raise records.RecordError(f"{source.path}: no split {split!r}; it has {there}")
  return own


def _summary(path: str, files: Sequence[storage.File]) -> str:
  """What a folder holds, for a message."""
  kinds = collections.Counter(os.path.splitext(file.name)[1] or "other" for file in files)
  parts = [f"{n} {kind} file{'s' * (n > 1)}" for kind, n in kinds.most_common(5)]
  if not storage.is_remote(path):
    with os.scandir(path) as entries:
      folders = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    if folders:
      more = ", ..." if len(folders) > 5 else ""
      parts.append(f"folders ({', '.join(folders[:5])}{more})")
  return ", ".join(parts) or "nothing"
