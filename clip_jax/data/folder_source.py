"""Records of images that lie in folders: a folder a class, or a list of files beside them.

The lists are those that data sets are published with: JSON lines (Hateful Memes), the splits of
Karpathy and Li (captions), the annotations of Pascal VOC. No path leads out of the folder.
"""

import dataclasses
import json
import os
import pathlib
import xml.etree.ElementTree
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clip_jax.data import contents, labels
from clip_jax.data.records import Record, RecordError

IMAGES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
_BESIDE = frozenset((".csv", ".txt", ".json", ".md", ".db"))  # what is published beside images


@dataclasses.dataclass(frozen=True)
class Entry:
  """One image file and what is said of it; `key` is its path below the data set's folder."""

  path: pathlib.Path
  key: str
  label: str | None = None
  captions: tuple[str, ...] = ()


class FileSource(contents.Contents):
  """The images of a list of entries, in its order."""

  def __init__(self, entries: Sequence[Entry]):
    self.entries = tuple(entries)

  def __repr__(self) -> str:
    return f"FileSource({len(self)} images)"

  def parts(self) -> Iterator[str | pathlib.Path]:
    for entry in self.entries:
      yield json.dumps([entry.key, entry.label, entry.captions])
      yield entry.path

  def __len__(self) -> int:
    return len(self.entries)

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f"no record {index} of {len(self)}")
    entry = self.entries[index]
    return Record(entry.key, entry.path.read_bytes(), entry.captions, entry.label)

  def locate(self, index: int) -> str:
    return str(self.entries[index].path)


def class_folders(folders: Sequence[pathlib.Path]) -> tuple[str, ...]:
  """The names of the folders of classes, sorted; hidden ones are none."""
  found = {p.name for folder in folders for p in folder.iterdir() if p.is_dir()}
  return tuple(sorted(name for name in found if not name.startswith(".")))


def from_class_folders(
  root: pathlib.Path, folders: Sequence[pathlib.Path], names: Mapping[str, str]
) -> FileSource:
  """The images below `folders`/<class>, sorted by path; `names`: folder of a class -> its label.

  Folders that `names` lacks are left out. Raises: RecordError naming a file that is no image.
  """
  entries = []
  for folder in folders:
    for name in sorted(set(names) & set(class_folders([folder]))):
      for path in sorted((folder / name).rglob("*")):
        if path.is_dir() or path.name.startswith(".") or path.suffix.lower() in _BESIDE:
          continue
        if path.suffix.lower() not in IMAGES:
          raise RecordError(f"{path}: no image of a kind that is read; convert it or move it away")
        entries.append(Entry(path, path.relative_to(root).as_posix(), names[name]))
  return FileSource(entries)


def from_json_lines(path: pathlib.Path, names: Sequence[str | None]) -> FileSource:
  """A line {"img": ..., "label": number} an image, as Hateful Memes has.

  Raises: RecordError naming the line that is anything else, or whose image is not there.
  """
  entries = []
  for number, line in enumerate(_text(path).splitlines(), start=1):
    try:
      fields = json.loads(line)
      label = labels.at(names, int(fields["label"]))
      entries.append(Entry(_below(path.parent, fields["img"]), fields["img"], label))
    except (ValueError, TypeError, KeyError) as error:
      raise RecordError(f"{path}:{number}: {_why(error)}") from error
  return FileSource(entries)


def from_karpathy(path: pathlib.Path, splits: Sequence[str], captions: int = 5) -> FileSource:
  """The images of some splits of Karpathy and Li's list, with their first captions.

  The images lie beside the list, in a folder "images" or "<name>-images", or (COCO) in the folder
  that their entry names. Source: Table 13; Karpathy and Li 2015 (arXiv 1412.2306), section 4.
  Raises: RecordError naming the entry that is damaged or whose image is not there.
  """
  folders = ["", "images", f"{path.stem.removeprefix('dataset_')}-images"]
  entries = []
  try:
    images = json.loads(_text(path))["images"]
  except (ValueError, TypeError, KeyError) as error:
    raise RecordError(f"{path}: no list of Karpathy and Li's ({_why(error)})") from error
  for number, image in enumerate(images):
    try:
      if image["split"] not in splits:
        continue
      texts = tuple(str(sentence["raw"]) for sentence in image["sentences"][:captions])
      name = os.path.join(image.get("filepath", ""), image["filename"])
      where = next((f for f in folders if (path.parent / f / name).is_file()), "")
      entries.append(Entry(_below(path.parent, os.path.join(where, name)), name, None, texts))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise RecordError(f"{path}: image {number}: {_why(error)}") from error
  return FileSource(entries)


def from_voc(root: pathlib.Path, split: str, names: Mapping[str, str]) -> FileSource:
  """The images of a split of Pascal VOC, labelled with all their classes (see `labels.join`).

  `names`: class of the annotations -> label. A class is difficult where all its objects are.
  Raises: RecordError naming the annotation that is missing, damaged or of no class.
  """
  entries = []
  for line in _text(root / "ImageSets" / "Main" / f"{split}.txt").split():
    path = root / "Annotations" / f"{line}.xml"
    try:
      found: dict[str, bool] = {}  # of each class, whether all its objects are difficult
      for thing in xml.etree.ElementTree.fromstring(_text(path)).iter("object"):
        name, difficult = thing.findtext("name", ""), thing.findtext("difficult") == "1"
        if name not in names:
          raise RecordError(f"{name!r} is none of the {len(names)} classes")
        found[names[name]] = found.get(names[name], True) and difficult
      shown, difficult_only = ([c for c, d in found.items() if d == which] for which in (0, 1))
      label = labels.join(sorted(shown), sorted(difficult_only))
      image = _below(root, f"JPEGImages/{line}.jpg")
    except (ValueError, xml.etree.ElementTree.ParseError) as error:
      raise RecordError(f"{path}: {_why(error)}") from error
    entries.append(Entry(image, image.name, label))
  return FileSource(entries)


def _below(root: pathlib.Path, name: Any) -> pathlib.Path:
  """The file of that name below `root`. Raises: RecordError when it is elsewhere or not there."""
  path = root / str(name)
  if not path.resolve().is_relative_to(root.resolve()) or not path.is_file():
    raise RecordError(f"{name}: no such image in {root}")
  return path


def _text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise RecordError(f"{path}: cannot be read ({error})") from error


def _why(error: Exception) -> str:
  return f"no {error}" if isinstance(error, KeyError) else str(error)
