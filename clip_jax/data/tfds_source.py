"""Records of a split of a TFDS data set that is on this machine, read without TensorFlow.

The data set must have been made with the file format array_record: of the older tfrecord no single
record can be read. Images stay encoded, as they lie there.
"""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from clip_jax.data import contents
from clip_jax.data.records import Record, RecordError

Example = Mapping[str, Any]
_KEYS = ("file_name", "filename", "image/filename", "image/file_name", "id")
CAPTIONS = ("captions/text", "captions", "caption", "text", "texts", "title")
_SAMPLE_BYTES = 2**20


def newest_version(root: pathlib.Path, name: str) -> pathlib.Path | None:
  """The folder of the newest version of `name` ("voc/2007") below a TFDS data folder, if any."""
  versions = [p.parent for p in (root / name).glob("*/dataset_info.json")]
  numbers = {p: tuple(map(int, p.name.split("."))) for p in versions if _is_version(p.name)}
  return max(numbers, key=numbers.__getitem__) if numbers else None


def file_format(directory: pathlib.Path) -> str:
  """The format of a data set's files, "array_record" or another. Raises: RecordError."""
  path = directory / "dataset_info.json"
  try:
    return str(json.loads(path.read_text(encoding="utf-8")).get("fileFormat", "tfrecord"))
  except (OSError, ValueError, AttributeError) as error:
    raise RecordError(f"{path}: cannot be read ({error}); make the data set anew") from error


def _is_version(name: str) -> bool:
  return all(part.isascii() and part.isdecimal() for part in name.split("."))


class NoSplitError(RecordError):
  """A copy that was made without the split."""


class TfdsSource(contents.Contents):
  """The records of `split` ("train+validation") of a data set's folder, in its order.

  `label` makes the label of an example, of TFDS's features (None: they get none); captions are
  those of the feature `caption` ("captions/text": the texts of a sequence), if it is there.
  `sizes` counts the records of each split.
  Raises: NoSplitError when a split is not there; RecordError when the folder cannot be read, or a
    file is not there; from a record, when it cannot be read or has no label.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    split: str,
    label: Callable[[Example], str | None] | None,
    caption: str = "captions/text",
  ):
    self.directory, self.split, self._label = pathlib.Path(directory), split, label
    self._caption = caption.split("/")
    builder = _builder(self.directory)
    missing = [name for name in split.split("+") if name not in builder.info.splits]
    if missing:
      there = ", ".join(builder.info.splits)
      raise NoSplitError(f"{self.directory}: no split {missing[0]!r}; it has {there}")
    self._files = [
      pathlib.Path(path)
      for name in split.split("+")
      for path in builder.info.splits[name].filepaths
    ]
    for file in self._files:
      if not file.is_file():
        raise RecordError(f"{file}: not there, as dataset_info.json says; make the data set anew")
    self.sizes = [builder.info.splits[name].num_examples for name in split.split("+")]
    self._data: Any = None  # opened at the first read, in whichever process reads

  def __repr__(self) -> str:
    return f"TfdsSource({self.directory}, {self.split})"

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_data": None}

  def parts(self) -> Iterator[str | pathlib.Path]:
    yield json.dumps(self.split)
    yield from sorted(self.directory.glob("*.labels.txt"))
    yield from self._files

  def __len__(self) -> int:
    return sum(self.sizes)

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f"{self!r}: no record {index}, it has {len(self)}")
    try:
      if self._data is None:
        self._data = _open(self.directory, self.split)
      example = self._data[index]
      key = next((_text(example[name]) for name in _KEYS if name in example), str(index))
      captions = self._captions(example)
      label = self._label(example) if self._label else None
      return Record(key, example["image"], captions, label)
    except Exception as error:  # TFDS, ArrayRecord and protobuf raise theirs
      raise RecordError(f"{self.locate(index)}: {error}") from error

  def locate(self, index: int) -> str:
    return f"{self.directory} {self.split} record {index}"

  def _captions(self, example: Example) -> tuple[str, ...]:
    found: Any = example
    for name in self._caption:
      found = found.get(name, {})
    several = not isinstance(found, (str, bytes))
    return tuple(_text(text) for text in (found if several else [found]))


class TfdsPairs(TfdsSource):
  """The pairs of a split, for training: `caption` names the feature; "": the first of CAPTIONS.

  Raises: as TfdsSource; RecordError naming the features when none has captions or an image.
  """

  def __init__(self, directory: str | os.PathLike[str], split: str, caption: str = ""):
    there = _features(pathlib.Path(directory))
    name = next((n for n in ([caption] if caption else CAPTIONS) if n in there), None)
    if name is None or "image" not in there:
      lacking = "feature 'image'" if name else f"caption {caption or ', '.join(CAPTIONS)}"
      raise RecordError(
        f"{directory}: no {lacking}; it has {', '.join(there)}; name the caption's feature in "
        "Source(caption_column=...)"
      )
    super().__init__(directory, split, None, name)

  def __repr__(self) -> str:
    return f"TfdsPairs({self.fingerprint[:16]})"

  @functools.cached_property
  def fingerprint(self) -> str:
    """The sha256 of the features, of the record files' sizes, and of their first and last MiB.

    Differs: what was altered between, at the same size, goes unseen; ArrayRecord itself tells it
    by its checksums when it is read.
    """
    digest = hashlib.sha256(json.dumps(["pairs", self.split, self._caption]).encode())
    digest.update((self.directory / "features.json").read_bytes())
    for path in self._files:
      with path.open("rb") as file:
        size = file.seek(0, 2)
        digest.update(f"{path.name} {size}\n".encode())
        for start in (0, max(0, size - _SAMPLE_BYTES)):
          file.seek(start)
          digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _features(directory: pathlib.Path) -> list[str]:
  """The names of the features, those of a sequence of several as "sequence/feature"."""
  names = []
  for name, kind in dict(_builder(directory).info.features.items()).items():
    inner = getattr(getattr(kind, "feature", kind), "keys", None)
    names += [f"{name}/{part}" for part in inner()] if inner else [name]
  return sorted(names)


def class_names(directory: pathlib.Path, feature: str = "label") -> tuple[str, ...]:
  """The names of the classes of a feature, by number. Raises: RecordError when it has none."""
  found = dict(_builder(directory).info.features.items()).get(feature)
  names = getattr(getattr(found, "feature", found), "names", None)
  if not names:
    raise RecordError(f"{directory}: its feature {feature!r} has no class names; make it anew")
  return tuple(names)


def _builder(directory: pathlib.Path) -> Any:
  """What TFDS knows of a folder, from its own files alone. Raises: RecordError."""
  import tensorflow_datasets as tfds

  try:
    return tfds.builder_from_directory(directory)
  except Exception as error:  # of many kinds: damaged JSON, features that want TensorFlow
    raise RecordError(
      f"{directory}: TFDS cannot read it ({error}); make the data set anew"
    ) from error


def _open(directory: pathlib.Path, split: str) -> Any:
  import tensorflow_datasets as tfds

  builder = _builder(directory)
  kinds = dict(builder.info.features.items())
  encoded = [name for name, kind in kinds.items() if isinstance(kind, tfds.features.Image)]
  decoders = {name: tfds.decode.SkipDecoding() for name in encoded}  # the pets' masks too
  return builder.as_data_source(split, decoders=decoders)


def _text(value: Any) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)
