"""The paper's datasets, their natural shifts and the retrieval sets: what is known of each.

Facts are data: `assets/paper/` has the paper's sizes and metrics, `assets/datasets.csv` how a copy
is found and read, `assets/class_aliases.csv` what copies call classes otherwise. `opening` opens
them. Source: Table 9, Table 13, section 3.3, appendix A.
"""

import csv
import dataclasses
import functools
import hashlib
import importlib.resources
import json
import pathlib
from collections.abc import Mapping, Sequence

from clip_jax.data import labels, records

_PAGES = "https://huggingface.co/datasets/clip-benchmark"
_LISTS = ("wds", "train_folders", "test_folders")


class DatasetError(ValueError):
  """A data set that cannot be used as it is: which, why, what to do."""


class NotAvailable(DatasetError):
  """A data set, or the images a figure is of, that are not on this machine: how to get them."""


@dataclasses.dataclass(frozen=True)
class Dataset:
  """What is known of a data set. Sizes are the paper's, misprints included; None: not stated."""

  key: str
  name: str
  group: str  # "paper", "shift" or "retrieval"
  classes: int  # 0: captions instead, or not known
  train_size: int | None
  test_size: int | None
  metric: str  # one of `scores.METRICS`, or "recall"
  prompts: str  # the name of its prompt set; "" where there is none
  numbered: str  # "yes": labels are numbered as the prompts' classes; "sorted": sorted folders too
  rule: str  # how labels are made where they are not simply one class each; see `copies`
  folds: int  # predefined ones
  tfds: str  # name/config of the TFDS builder
  tfds_train: str  # "" where TFDS cannot be read
  tfds_test: str
  tfds_is_the_papers: str  # "yes", or in what TFDS's splits differ
  wds: tuple[str, ...]  # CLIP_benchmark's name of it, "vtab/dtd", and older ones
  train_folders: tuple[str, ...]  # alternatives; + joins several
  test_folders: tuple[str, ...]
  note: str  # on the paper's split or its copies
  how: str  # to get it, where it does not come by itself

  def size(self, split: str) -> int | None:
    """The paper's number of images in train or test."""
    return self.train_size if split == "train" else self.test_size

  @property
  def folder(self) -> str:
    """The folder of its images below a root."""
    return self.key.replace(" ", "_")

  @property
  def imagenet_indices(self) -> tuple[int, ...]:
    """The places of its classes among ImageNet's 1,000, in order; empty for other data sets."""
    return tuple(k for k, own in enumerate(_in_imagenet(self.rule).values()) if own)

  @property
  def aliases(self) -> dict[str, str | int]:
    """Other names of its classes: a name of the prompt set, or the place of a WordNet id."""
    synsets = [synset for synset, own in _in_imagenet(self.rule).items() if own]
    named = {r["name"]: r["class"] for r in _rows("class_aliases.csv") if r["key"] == self.key}
    return {**{synset: k for k, synset in enumerate(synsets)}, **named}


@dataclasses.dataclass(frozen=True)
class Copy:
  """A split of a data set as a source of records. `notes` say in what it is not the paper's."""

  dataset: Dataset
  split: str
  kind: str  # "tfds", "wds", "folder" or "arrayrecord"
  place: pathlib.Path
  source: records.RecordSource
  classes: tuple[str, ...]  # the labels that records have, in the order of the prompts' classes
  notes: tuple[str, ...] = ()
  indices: tuple[int, ...] | None = None  # of the records of `source`; None: all of them
  renamed: Mapping[str, str] | None = None  # label of a record of `source` -> its label here
  validation: tuple[int, ...] = ()  # records of train that are a validation split of its own

  @functools.cached_property
  def fingerprint(self) -> str:
    chosen = [self.source.fingerprint, self.classes, self.indices, self.renamed]
    chosen += [self.validation] if self.validation else []
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()

  def __len__(self) -> int:
    return len(self.source) if self.indices is None else len(self.indices)

  def __getitem__(self, index: int) -> records.Record:
    record = self.source[self._at(index)]
    if self.renamed is None:
      return record
    label = self.renamed.get(record.label or "")
    if label is None:
      raise DatasetError(
        f"{self.locate(index)}: label {record.label!r} is none of the {len(self.classes)} classes"
      )
    return dataclasses.replace(record, label=label)

  def locate(self, index: int) -> str:
    return self.source.locate(self._at(index))

  def _at(self, index: int) -> int:
    if not 0 <= index < len(self):
      raise IndexError(f"{self.dataset.key} {self.split}: no record {index}, it has {len(self)}")
    return index if self.indices is None else self.indices[index]


@functools.cache
def all_datasets() -> tuple[Dataset, ...]:
  """The paper's 27, the seven shifts, the two retrieval sets, in the order of the paper's lists."""
  facts = {row["key"]: row for row in _rows("datasets.csv")}
  rows = [
    *(row | {"name": row["table9_name"], "group": "paper"} for row in _rows("paper/datasets.csv")),
    *(
      row | {"key": row["dataset"], "name": row["dataset"], "test_size": row["test_images"]}
      for row in _rows("paper/datasets_shift.csv")
    ),
  ]
  return tuple(_dataset(row, facts[row["key"]]) for row in rows)


def _dataset(row: dict[str, str], facts: dict[str, str]) -> Dataset:
  """One data set, of the paper's row and ours."""
  retrieval = facts["rule"] == "captions"
  sizes = [int(size) if (size := row.get(f"{s}_size")) else None for s in ("train", "test")]
  metric = row.get("metric", "recall" if retrieval else "accuracy")
  lists = {k: tuple(facts[k].split("|")) if facts[k] else () for k in _LISTS}
  return Dataset(
    key=row["key"],
    name=row["name"],
    group=row.get("group", "retrieval" if retrieval else "shift"),
    classes=int(facts["classes"]),
    train_size=sizes[0],
    test_size=sizes[1],
    metric=metric.replace("-per-", " per "),  # Table 9 is typed both ways
    prompts=facts["prompts"],
    numbered=facts["numbered"],
    rule=facts["rule"],
    folds=int(facts["folds"]),
    tfds=facts["tfds"],
    tfds_train=facts["tfds_train"],
    tfds_test=facts["tfds_test"],
    tfds_is_the_papers=facts["tfds_is_the_papers"],
    wds=lists["wds"],
    train_folders=lists["train_folders"],
    test_folders=lists["test_folders"],
    note="; ".join(filter(None, (row["note"], facts["note"]))),
    how=facts["how"],
  )


def named(key: str) -> Dataset:
  """The data set of that key, in any case. Raises: DatasetError listing those there are."""
  for dataset in all_datasets():
    if labels.plain(dataset.key) == labels.plain(key):
      return dataset
  known = ", ".join(dataset.key for dataset in all_datasets())
  raise DatasetError(f"dataset {key!r}: no such dataset; choose one of {known}")


def how_to_get(dataset: Dataset, split: str) -> str:
  """The ways to bring a split of a data set to this machine, below a folder ROOT."""
  ways = []
  if dataset.tfds_train or dataset.tfds_test:
    ways.append(f"tfds build {dataset.tfds} --file_format=array_record --data_dir=ROOT")
  elif dataset.tfds:
    ways.append(f"(not by TFDS: its {dataset.tfds} {dataset.tfds_is_the_papers})")
  if dataset.wds:
    name = wds_folder(dataset.wds[0])
    ways.append(f"fetch {_PAGES}/{name} to ROOT/{name}")
  what = "<image>" if dataset.rule == "captions" else "<class>/<image>"
  ways.append(f"put images into ROOT/{dataset.folder}/{split}/{what}")
  if dataset.rule == "captions":
    ways[-1] = f"put the images and Karpathy's list of the splits into ROOT/{dataset.folder}"
  return "; or ".join(ways) + (f" ({dataset.how})" if dataset.how else "")


def wds_folder(name: str) -> str:
  """What CLIP_benchmark calls the folder and the repository of "vtab/dtd": "wds_vtab-dtd"."""
  return f"wds_{name.replace('/', '-')}"


def _in_imagenet(rule: str) -> dict[str, bool]:
  """Of ImageNet's WordNet ids in order, whether the classes of that rule have them."""
  column = {"synset": "synset", "synset_a": "imagenet_a", "synset_r": "imagenet_r"}.get(rule)
  if column is None:
    return {}
  return {row["synset"]: row[column] != "0" for row in _rows("imagenet_synsets.csv")}


@functools.cache
def _rows(name: str) -> Sequence[dict[str, str]]:
  asset = importlib.resources.files("clip_jax") / "assets" / pathlib.PurePosixPath(name)
  return list(csv.DictReader(asset.read_text(encoding="utf-8").splitlines()))
