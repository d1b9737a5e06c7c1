"""Copies of a data set below a folder, in each of the four layouts: found, and read as records.

Below a root lie TFDS's folders, CLIP_benchmark's (`wds_vtab-dtd`), or a folder of the data set's
key with images or ArrayRecord shards. A copy that is there and does not do says why.

The rules by which labels are made: "kitti", "clevr" (from TFDS's objects), "several" (classes an
image), "captions" (and no classes), "jsonl" (a list with labels), "synset" (WordNet ids; "_a" and
"_r": of 200 classes), "some" (folders of other classes are left out), "draw" (and "clevr": our own
random split), "fold_indices" (folds by the numbers of images).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

from clip_jax.data import folder_source, labels, records, tar_source, tfds_source
from clip_jax.evaluation.datasets import Copy, Dataset, DatasetError, wds_folder

_SPLITS = ("train", "test")
_VOC = (
  "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
  "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
  "tvmonitor",
)  # fmt: skip  # as the annotations of Pascal VOC spell them


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What is looked for. `missing` gathers why a copy that is there does not do."""

  dataset: Dataset
  split: str
  classes: tuple[str, ...]
  fold: int
  missing: list[str]

  def folders(self) -> tuple[str, ...]:
    """Alternatives for the split's folder, in order; the split's name itself is the first."""
    own = self.dataset.train_folders if self.split == "train" else self.dataset.test_folders
    if self.dataset.rule != "fold_indices" and self.dataset.folds > 1:  # a folder a fold
      return (f"{self.split}_{self.fold}",) if self.fold else (*own, f"{self.split}_1")
    return own

  @property
  def drawn(self) -> bool:
    return self.dataset.rule in ("draw", "clevr")

  def found(self, kind: str, place: pathlib.Path, source: records.RecordSource,
            names: Sequence[str], notes: Sequence[str] = ()) -> Copy:  # fmt: skip
    classes = labels.distinct(self.classes or tuple(names))
    return Copy(self.dataset, self.split, kind, place, source, classes, tuple(notes))

  def labels_of(self, names: Sequence[str], partly: bool = False) -> tuple[str | None, ...]:
    """The label of each of a copy's classes; None, if it may be `partly`, of no class."""
    if not self.classes:
      return labels.distinct(names)
    place = {labels.plain(name): k for k, name in enumerate(self.classes)}
    aliases = {
      name: k if isinstance(k, int) else place[labels.plain(k)]
      for name, k in self.dataset.aliases.items()
      if isinstance(k, int) or labels.plain(k) in place
    }
    found = labels.match(
      names,
      self.classes,
      aliases,
      bool(self.dataset.numbered),
      self.dataset.numbered == "sorted",
    )
    if not partly:
      labels.check(found, names, self.classes)
    own = labels.distinct(self.classes)
    return tuple(None if k is None else own[k] for k in found)

  def drawn_from(self, copy: Copy) -> Copy:
    """Our own random split of a copy that holds the whole pool."""
    sizes = (self.dataset.train_size or 0, self.dataset.test_size or 0)
    train, test = labels.draw(len(copy.source), *sizes)
    indices = tuple(map(int, train if self.split == "train" else test))
    note = "the paper's random split was not released: this is our own, with seed 0"
    return dataclasses.replace(copy, indices=indices, notes=(*copy.notes, note))


def in_tfds(wanted: Wanted, root: pathlib.Path) -> Copy | None:
  """The copy in TFDS's folders below `root`, if it is there and can be read."""
  dataset = wanted.dataset
  split = dataset.tfds_train if wanted.split == "train" else dataset.tfds_test
  place = tfds_source.newest_version(root, dataset.tfds) if split else None
  if place is None:
    return None
  why = ""
  if (form := tfds_source.file_format(place)) != "array_record":
    why = f"its format is {form}, and only of array_record can single records be read"
  if wanted.fold:
    why = dataset.tfds_is_the_papers
  if why:
    wanted.missing.append(f"{place} is there, but {why}")
    return None
  names = {"kitti": tuple("0123"), "clevr": tuple(map(str, range(3, 11))), "captions": ()}.get(
    dataset.rule
  )
  if names is None:
    feature = "labels" if dataset.rule == "several" else "label"
    names = tfds_source.class_names(place, feature)
  # ImageNet-A and -R keep ImageNet's 1,000 names and numbers: a label of another is an error then.
  label_of = wanted.labels_of(names, dataset.rule.startswith("synset_"))
  label = functools.partial(_label, dataset.rule, label_of)
  try:
    source = tfds_source.TfdsSource(place, split, label)
  except tfds_source.NoSplitError as error:
    wanted.missing.append(str(error))
    return None
  same = dataset.tfds_is_the_papers
  notes = [] if same == "yes" else [f"TFDS {dataset.tfds} {split} is not the paper's split: {same}"]
  copy = wanted.found("tfds", place, source, names, notes)
  if wanted.drawn:
    return wanted.drawn_from(copy)
  return copy if dataset.rule == "captions" else _with_validation(copy, source.sizes[0])


def _with_validation(copy: Copy, first: int) -> Copy:
  """Of train: the records from number `first` on are the data set's own validation split."""
  if copy.split != "train":
    return copy
  return dataclasses.replace(copy, validation=tuple(range(first, len(copy.source))))


def _label(rule: str, names: Sequence[str | None], example: tfds_source.Example) -> str | None:
  """The label that TFDS's features of an example make. `names`: label by its number."""
  match rule:
    case "captions":
      return None
    case "several":
      shown, every = (set(map(int, example[f])) for f in ("labels_no_difficult", "labels"))
      parts = ([labels.at(names, k) for k in sorted(p)] for p in (shown, every - shown))
      return labels.join(*parts)
    case "kitti":
      things = example["objects"]
      depths = [place[2] for place in things["location"]]
      return labels.at(names, labels.vehicle_distance(things["type"], depths))
    case "clevr":
      return labels.at(names, labels.object_count(len(example["objects"]["color"])))
  return labels.at(names, int(example["label"]))


def in_wds(wanted: Wanted, root: pathlib.Path) -> Copy | None:
  """The copy in CLIP_benchmark's WebDataset layout, below `root` or in the data set's folder."""
  dataset = wanted.dataset
  places = [root / wds_folder(name) for name in dataset.wds]
  own = [p for p in _own_folders(dataset, root) if tar_source.is_split(p / wanted.split)]
  for place in filter(pathlib.Path.is_dir, [*places, *own]):
    if not tar_source.is_split(place / wanted.split):
      wanted.missing.append(f"{place / wanted.split} has no tar files")
    elif wanted.fold:
      wanted.missing.append(f"{place} does not tell the folds")
    elif dataset.rule == "captions":
      return wanted.found("wds", place, tar_source.TarSource(place / wanted.split), ())
    else:
      names = tar_source.class_names(place)
      source = tar_source.TarSource(place / wanted.split, wanted.labels_of(names))
      return wanted.found("wds", place, source, names)
  return None


def _own_folders(dataset: Dataset, root: pathlib.Path) -> list[pathlib.Path]:
  """The folders of a root that are called as the data set is."""
  own = {labels.plain(name) for name in (dataset.key, dataset.name)}
  return [p for p in sorted(root.glob("*/")) if labels.plain(p.name) in own]


def in_folder(wanted: Wanted, root: pathlib.Path) -> Copy | None:
  """The copy as images in the data set's folder: of its published layout, or a folder a class."""
  dataset, train = wanted.dataset, wanted.split == "train"
  for place in _own_folders(dataset, root):
    match dataset.rule:
      case "jsonl":
        lists = [place / f"{name}.jsonl" for name in wanted.folders()]
        if path := next(filter(pathlib.Path.is_file, lists), None):
          names = wanted.labels_of(("0", "1"))
          source = folder_source.from_json_lines(path, names)
          return wanted.found("folder", place, source, ("0", "1"))
        wanted.missing.append(f"{place} has no {lists[0].name}")
      case "several":
        below = [place / "VOCdevkit" / "VOC2007", place / "VOC2007", place]
        if base := next((p for p in below if (p / "ImageSets" / "Main").is_dir()), None):
          own = wanted.classes or _VOC
          of_name = {n: c for n, c in zip(_VOC, wanted.labels_of(_VOC), strict=True) if c}
          parts = [folder_source.from_voc(base, part, of_name) for part in _voc_parts(base, train)]
          voc = folder_source.FileSource([e for part in parts for e in part.entries])
          return _with_validation(wanted.found("folder", place, voc, own), len(parts[0]))
        wanted.missing.append(f"{place} has no VOCdevkit/VOC2007/ImageSets/Main")
      case "captions":
        if path := next(iter(sorted(place.glob("dataset_*.json"))), None):
          splits = ("train", "restval") if train else ("test",)
          return wanted.found("folder", place, folder_source.from_karpathy(path, splits), ())
        wanted.missing.append(f"{place} has no dataset_*.json, Karpathy's list of the splits")
      case _:
        copy = _class_folders(wanted, place)
        if copy is not None:
          return copy
  return None


def _voc_parts(base: pathlib.Path, train: bool) -> tuple[str, ...]:
  """The lists of Pascal VOC that make a split; of its trainval the two halves, where they lie."""
  halves = ("train", "val")
  lists = [base / "ImageSets" / "Main" / f"{name}.txt" for name in halves]
  if not train:
    return ("test",)
  return halves if all(map(pathlib.Path.is_file, lists)) else ("trainval",)


def _class_folders(wanted: Wanted, place: pathlib.Path) -> Copy | None:
  """The copy with a folder a class, in folders of the split, or the pool of our own split."""
  choices = [[place / name for name in choice.split("+")] for choice in wanted.folders()]
  folders = next((c for c in choices if all(map(pathlib.Path.is_dir, c))), None)
  pool = folders is None and wanted.drawn and not any((place / s).is_dir() for s in _SPLITS)
  if pool:
    folders = [place]
  names = folder_source.class_folders(folders) if folders else ()
  if not folders or not names:
    looked = folders[0] if folders else choices[0][0] if choices else place
    wanted.missing.append(f"{looked} has no folders of classes")
    return None
  some = wanted.dataset.rule == "some"
  if some and not wanted.classes:
    raise DatasetError(f"{place}: name the {wanted.dataset.classes} classes to evaluate")
  found = dict(zip(names, wanted.labels_of(names, some), strict=True))
  of_folder = {name: label for name, label in found.items() if label is not None}
  left_out = len(found) - len(of_folder)
  notes = [f"{left_out} folders of other classes are left out"] if left_out else []
  source = folder_source.from_class_folders(place, folders, of_folder)
  copy = wanted.found("folder", place, source, names, notes)
  if pool:
    return wanted.drawn_from(copy)
  if wanted.dataset.rule == "fold_indices":
    return _fold(wanted, copy, source)
  first = sum(entry.path.is_relative_to(folders[0]) for entry in source.entries)
  return _with_validation(copy, first)


def _fold(wanted: Wanted, copy: Copy, source: folder_source.FileSource) -> Copy:
  """The images of a fold: a line of `fold_indices.txt` with the numbers that are their names."""
  if not wanted.fold:
    return copy
  path = copy.place / "fold_indices.txt"
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
    numbers = set(map(int, lines[wanted.fold - 1].split()))
    places = {int(entry.path.stem): k for k, entry in enumerate(source.entries)}
  except (ValueError, IndexError, OSError) as error:
    raise DatasetError(
      f"{path}: fold {wanted.fold} cannot be told ({error}); it wants a line a fold with the "
      "numbers that images of train are named by"
    ) from error
  if missing := numbers - set(places):
    raise DatasetError(f"{path}: fold {wanted.fold} has image {min(missing)}, which is not there")
  return dataclasses.replace(copy, indices=tuple(sorted(places[k] for k in numbers)))


def in_array_record(wanted: Wanted, root: pathlib.Path) -> Copy | None:
  """The copy that `tools/prepare_data.py` wrote into the data set's folder."""
  for place in _own_folders(wanted.dataset, root):
    if not (place / records.MANIFEST).is_file():
      continue
    if wanted.split not in records.read_manifest(place)["splits"]:
      wanted.missing.append(f"{place / records.MANIFEST} has no split {wanted.split!r}")
    elif wanted.fold:
      wanted.missing.append(f"{place} does not tell the folds")
    else:
      source = records.ArrayRecordSource(place, wanted.split)
      copy = wanted.found("arrayrecord", place, source, source.classes)
      if not source.classes:
        return copy
      own = zip(source.classes, wanted.labels_of(source.classes), strict=True)
      return dataclasses.replace(copy, renamed={name: label for name, label in own if label})
  return None
