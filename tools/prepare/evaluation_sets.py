"""Evaluation sets, whose images training data should not have: of whatever kind their copy is.

Only images are read: a set for classification has no captions. Where a place does not say which
split is meant all of them are, so that none is passed over.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence

from clip_jax import config as config_lib
from clip_jax.data import (
  folder_source,
  parquet_source,
  places,
  records,
  storage,
  table_source,
  tar,
  tfds_source,
)
from tools.prepare.jobs import Part, PrepareError
from tools.prepare.source import parts_of

_TARS = (".tar",)
ACCEPTED = (
  f"a prepared folder (with {records.MANIFEST}), a TFDS data set, a folder of images "
  f"({', '.join(sorted(folder_source.IMAGES))}), of .tar or .parquet files, such a file, or a "
  "table (.csv, .tsv, .jsonl)"
)


@dataclasses.dataclass(frozen=True)
class Evaluated:
  """The images of an evaluation set."""

  fingerprint: str
  parts: tuple[Part, ...]


def evaluated(place: str) -> Evaluated:
  """A split of what lies at a place ("FOLDER:SPLIT"), or all of it ("FOLDER"), or a file.

  Raises: PrepareError when there are no images, or they cannot be read; OSError.
  """
  try:
    sources = _sources(*parted(place))
  except (records.RecordError, tar.TarError) as error:
    raise PrepareError(f"--against {error}") from error
  found = [part for own in sources for part in parts_of(own, "test", captions=False)]
  if not found:
    raise PrepareError(f"--against {place}: no images there; want {ACCEPTED}")
  return Evaluated(" ".join(own.fingerprint for own in sources), tuple(found))


def parted(place: str) -> tuple[str, str]:
  """FOLDER:SPLIT -> its parts; without a split, or where a path has that name, the split is ""."""
  folder, colon, split = place.rpartition(":")
  if not colon or "/" in split or pathlib.Path(place).exists():
    return place, ""
  return folder, split


def _sources(path: str, split: str) -> Sequence[records.RecordSource]:
  """Raises: RecordError, TarError, OSError."""
  where = config_lib.Source(path=path, split=split or "train")
  if path.lower().endswith(_TARS):
    return [TarImages(storage.files(path, _TARS))]
  if path.lower().endswith((*parquet_source.SUFFIXES, *table_source.SUFFIXES)):
    return [places.open_files(where)]
  if storage.is_remote(path):
    if not split:
      raise records.RecordError(f"{path}: name its split, as {path}:test")
    return [places.open_files(where)]
  root = pathlib.Path(path)
  if (root / records.MANIFEST).is_file():
    splits = [split] if split else list(records.read_manifest(root)["splits"])
    return [records.ArrayRecordSource(root, own) for own in splits]
  info = root / "dataset_info.json"
  version = root if info.is_file() else tfds_source.newest_version(root.parent, root.name)
  if version is not None:
    return _tfds(version, split)
  return _below(root, split)


def _tfds(folder: pathlib.Path, split: str) -> list[records.RecordSource]:
  """Raises: RecordError."""
  found = tfds_source.file_format(folder)
  if found != "array_record":
    raise records.RecordError(
      f"{folder}: its format is {found}, of which no single record can be read; make it with "
      "--file_format=array_record"
    )
  path = folder / "dataset_info.json"
  said = json.loads(path.read_text(encoding="utf-8"))
  splits = [split] if split else [own["name"] for own in said.get("splits", ())]
  return [tfds_source.TfdsSource(folder, own, None) for own in splits]


def _below(root: pathlib.Path, split: str) -> list[records.RecordSource]:
  """All images, tar files and Parquet files in a folder and in those below it.

  A split is a folder of that name, or the tar and Parquet files with it as a word of their names.
  img2dataset's Parquet files beside its tar files hold no images. Raises: RecordError, TarError.
  """
  own = root / split
  folder = own if own.is_dir() else root
  if not folder.is_dir():
    raise records.RecordError(f"{own}: no such folder")
  kinds: dict[str, list[pathlib.Path]] = {"image": [], "tar": [], "parquet": []}
  for path in sorted(folder.rglob("*")):
    kind = path.suffix.lower()
    name = "image" if kind in folder_source.IMAGES else kind.removeprefix(".")
    if name in kinds and not path.name.startswith(".") and path.is_file():
      kinds[name].append(path)
  with_tars = {path.parent for path in kinds["tar"]}
  kinds["parquet"] = [path for path in kinds["parquet"] if path.parent not in with_tars]
  if folder != own:
    kinds["image"] = []
    for name in ("tar", "parquet"):
      kinds[name] = [p for p in kinds[name] if split in re.split(r"[-_.]", p.stem)]
    if not any(kinds.values()):
      raise records.RecordError(
        f"{own}: no such folder, and no .tar or .parquet file whose name has {split!r} as a word"
      )
  out: list[records.RecordSource] = []
  if images := kinds["image"]:
    entries = [folder_source.Entry(p, p.relative_to(folder).as_posix()) for p in images]
    out.append(folder_source.FileSource(entries))
  if tars := kinds["tar"]:
    out.append(TarImages([storage.info(str(path)) for path in tars]))
  if tables := kinds["parquet"]:
    out.append(parquet_source.ParquetSource([storage.info(str(path)) for path in tables]))
  return out


class TarImages:
  """The images among the members of tar files, whatever else is in them: pairs of WebDataset, or
  labels, as CLIP_benchmark has.

  Raises: TarError for a file that is cut short or none; OSError.
  """

  def __init__(self, files: Sequence[storage.File]):
    digest = hashlib.sha256(b"images of tar files")
    self._found: list[tuple[str, tar.Member]] = []
    for file in files:
      with storage.open_file(file) as stream:
        members = tar.scan(stream, file.path, digest.update)
      for member in members:
        if pathlib.PurePath(member.name).suffix.lower() in folder_source.IMAGES:
          self._found.append((file.path, member))
    self.fingerprint = digest.hexdigest()

  def __len__(self) -> int:
    return len(self._found)

  def __getitem__(self, index: int) -> records.Record:
    path, member = self._found[index]
    if not member.plain:
      raise records.RecordError(f"{self.locate(index)}: a link or the like, which is not followed")
    return records.Record(member.name, storage.read(path, member.offset, member.size), ())

  def locate(self, index: int) -> str:
    path, member = self._found[index]
    return f"{path} member {member.name}"
