"""Records of one split of a data set in the WebDataset layout of CLIP_benchmark.

A split is a folder of tar files 0.tar, 1.tar, ... with their number in `nshards.txt`. Members of
the same name up to its first dot are one sample: an image, and its label as a number (.cls) or one
flag a class (.npy), or its captions, one a line (.txt). The class names stand in
`classnames.txt` beside the splits. Nothing is extracted: members are read where they lie.
Source: `webdataset_builder.py` of clip_benchmark 1.6.2.
"""

import io
import json
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from clip_jax.data import contents, labels, tar
from clip_jax.data.records import Record, RecordError

IMAGES = ("webp", "png", "jpg", "jpeg")
_LABELS = ("cls", "npy")
_MAX_TEXT_BYTES = 1_000_000


def is_split(folder: pathlib.Path) -> bool:
  """Whether tar files or their number are there."""
  return (folder / "nshards.txt").is_file() or next(folder.glob("*.tar"), None) is not None


def class_names(root: pathlib.Path) -> tuple[str, ...]:
  """The lines of `classnames.txt`. Raises: RecordError when it cannot be read or is empty."""
  path = root / "classnames.txt"
  try:
    if lines := path.read_text(encoding="utf-8").splitlines():
      return tuple(line.strip() for line in lines)
    raise RecordError(f"{path}: is empty; fetch it again")
  except (OSError, UnicodeDecodeError) as error:
    raise RecordError(
      f"{path}: cannot be read ({error}); it says what the labels' numbers mean: fetch it with the "
      "tar files"
    ) from error


class TarSource(contents.Contents):
  """The samples of all tar files of a folder, in their order.

  `names` are the classes by the number of their label, None for one that is not evaluated;
  without any, samples have captions.
  Raises: RecordError for a tar file that is missing or cut short, or naming the sample that
    lacks its image or label, has two of them, or whose image is no plain member.
  """

  def __init__(self, folder: str | os.PathLike[str], names: Sequence[str | None] = ()):
    self.folder, self.names = pathlib.Path(folder), tuple(names)
    self._files = _shards(self.folder)
    rows: list[tuple[int, ...]] = []
    self._keys: list[str] = []
    self._kinds: list[str] = []  # of label or captions, by sample
    for shard, file in enumerate(self._files):
      for key, image, kind, text in _samples(file, _LABELS if names else ("txt",)):
        rows.append((shard, image.offset, image.size, text.offset, text.size))
        self._keys.append(key)
        self._kinds.append(kind)
    self._places = np.array(rows, np.int64).reshape(-1, 5)

  def __repr__(self) -> str:
    return f"TarSource({self.folder})"

  def parts(self) -> Iterator[str | pathlib.Path]:
    yield json.dumps(self.names)
    yield from self._files

  def __len__(self) -> int:
    return len(self._keys)

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f"{self.folder}: no record {index}, it has {len(self)}")
    shard, image, image_bytes, text, text_bytes = map(int, self._places[index])
    with self._files[shard].open("rb") as file:
      file.seek(image)
      data = file.read(image_bytes)
      file.seek(text)
      value = file.read(text_bytes)
    try:
      label, captions = self._meaning(self._kinds[index], value)
    except (ValueError, TypeError) as error:  # what numbers, UTF-8 and NumPy's files raise
      raise RecordError(f"{self.locate(index)}: {error}") from error
    return Record(self._keys[index], data, captions, label)

  def locate(self, index: int) -> str:
    return f"{self._files[self._places[index, 0]]} sample {self._keys[index].partition('/')[2]}"

  def _meaning(self, kind: str, value: bytes) -> tuple[str | None, tuple[str, ...]]:
    """The label and the captions that a member's bytes say. Raises: ValueError."""
    if kind == "txt":
      return None, tuple(value.decode().splitlines())
    if kind == "cls":
      return labels.at(self.names, int(value)), ()
    flags = np.load(io.BytesIO(value), allow_pickle=False)
    if flags.shape != (len(self.names),):
      raise RecordError(f"its label has the shape {flags.shape}, want ({len(self.names)},)")
    return labels.join([labels.at(self.names, int(k)) for k in np.flatnonzero(flags)]), ()


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
  """The tar files, in order. Raises: RecordError when one is missing or cut short."""
  number = folder / "nshards.txt"
  try:
    if number.is_file():
      files = [folder / f"{k}.tar" for k in range(int(number.read_text()))]
    else:
      files = sorted(folder.glob("*.tar"), key=lambda path: (len(path.name), path.name))
    for file in files:
      tar.check_end(file)
  except FileNotFoundError as error:
    raise RecordError(
      f"{error.filename}: not there, as {number.name} says it is; fetch it"
    ) from error
  except ValueError as error:  # a TarError too
    raise RecordError(f"{folder}: {error}") from error
  return files


def _samples(
  file: pathlib.Path, kinds: Sequence[str]
) -> list[tuple[str, tar.Member, str, tar.Member]]:
  """Key, image, kind of text and text of all samples of a tar file. Raises: RecordError."""
  found: dict[str, dict[str, tar.Member]] = {}
  try:
    for member in tar.members(file):
      directory, slash, name = member.name.rpartition("/")
      stem, _, extension = name.partition(".")
      sample = found.setdefault(directory + slash + stem, {})
      if extension.lower() in sample:
        raise RecordError(f"{file} sample {stem}: two members {member.name}")
      sample[extension.lower()] = member
  except tar.TarError as error:
    raise RecordError(str(error)) from error
  out = []
  for key, sample in found.items():
    image = next((sample[kind] for kind in IMAGES if kind in sample), None)
    kind = next((kind for kind in kinds if kind in sample), None)
    if image is None or kind is None:
      missing = IMAGES if image is None else kinds
      raise RecordError(f"{file} sample {key}: none of .{', .'.join(missing)}; fetch it again")
    text = sample[kind]
    if not (image.plain and text.plain) or text.size > _MAX_TEXT_BYTES:
      raise RecordError(f"{file} sample {key}: a link, or a label of {text.size:,} bytes")
    out.append((f"{file.stem}/{key}", image, kind, text))
  return out
