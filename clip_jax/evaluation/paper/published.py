"""What the paper and others have published, cell by cell, in the digits in which it was printed."""

import csv
import dataclasses
import functools
import json
import pathlib
import re
import types
from collections.abc import Iterator, Mapping
from typing import Literal

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "assets" / "paper"

# How close a measured value must be to a published one (`paper_tables.tolerance`).
Rule = Literal["share", "difference", "ratio", "exact"]


class PublishedError(ValueError):
  """A table that is not among the published ones: which, and which there are."""


@dataclasses.dataclass(frozen=True)
class Cell:
  """One published figure. `value` is the printed text; names that a table lacks are empty."""

  table: str
  model: str
  dataset: str
  metric: str
  value: str


@dataclasses.dataclass(frozen=True)
class Table:
  """A published table or figure: what it shows, and which names make its rows and columns."""

  key: str
  caption: str
  row: tuple[str, ...] = ("model",)
  column: tuple[str, ...] = ("dataset",)
  rule: Rule = "share"

  @property
  def title(self) -> str:
    return f"Table {self.key}" if self.key.isdigit() else self.key.replace("figure", "Figure ")

  def place(self, model: str, dataset: str, metric: str) -> tuple[str, str]:
    """The row and the column of a cell, as labels. "accuracy" beside a dataset is not said."""
    names = {"model": model, "dataset": dataset, "metric": metric}
    if dataset and metric == "accuracy":
      names["metric"] = ""
    row, column = (
      ", ".join(names[part] for part in parts if names[part]) for parts in (self.row, self.column)
    )
    return row, column if self.column else "value"


TABLES: Mapping[str, Table] = types.MappingProxyType(
  {
    table.key: table
    for table in (
      Table("1", "Zero-shot accuracy beside Visual N-Grams"),
      Table("9", "The 27 datasets", ("dataset",), ("metric",), "exact"),
      Table("10", "Linear probe on 27 datasets"),
      Table("11", "Zero-shot on 27 datasets"),
      Table(
        "12",
        "RN50 trained on YFCC100M's English subset, or on as many pairs of WIT",
        ("dataset",),
        ("metric", "model"),
      ),
      Table("13", "Zero-shot retrieval", ("model",), ("dataset", "metric")),
      Table("14", "Reading text in images", ("model",), ("dataset", "metric")),
      Table("15", "Action recognition", ("model",), ("dataset", "metric")),
      Table("16", "Natural distribution shifts", ("model",), ("dataset", "metric")),
      Table("18", "Hyperparameters common to all models", ("metric", "model"), (), "exact"),
      Table("19", "ResNets: hyperparameters", ("model",), ("metric",), "exact"),
      Table("20", "Vision Transformers: hyperparameters", ("model",), ("metric",), "exact"),
      Table(
        "figure2",
        "Efficiency of zero-shot transfer: how many times fewer images to the same accuracy",
        ("model", "metric"),
        (),
        "ratio",
      ),
      Table(
        "figure5",
        "Zero-shot ViT-L/14@336px minus a linear probe on ResNet-50, points",
        ("dataset",),
        ("model",),
        "difference",
      ),
      Table("figure9", "Billions of multiply-adds an image", ("model",), ("metric",), "ratio"),
      Table(
        "figure13",
        "Natural distribution shifts, ImageNet ResNet-101 beside CLIP, zero-shot and probed",
        ("model",),
        ("dataset", "metric"),
      ),
    )
  }
)

# Columns of architectures.csv as Tables 19 and 20 head them.
_SHAPES = {
  "19": {"resnet_blocks": "ResNet blocks", "resnet_width_table19": "ResNet width"},
  "20": {"vit_layers": "vision layers", "vit_width": "vision width", "vit_heads": "vision heads"},
}
_SHAPES_BEFORE = {
  "learning_rate": "learning rate",
  "embed_dim": "embedding dimension",
  "input_resolution": "input resolution",
}
_SHAPES_AFTER = {
  "text_layers": "text layers",
  "text_width": "text width",
  "text_heads": "text heads",
}

_SIZES = {"classes": "classes", "train_size": "train size", "test_size": "test size"}


def table(key: str) -> Table:
  """The table of that key. Raises: PublishedError listing the keys there are."""
  if key not in TABLES:
    raise PublishedError(f"table {key!r}: not published; choose of {', '.join(TABLES)}")
  return TABLES[key]


@functools.cache
def cells(key: str) -> tuple[Cell, ...]:
  """All cells of a table, row by row, in the printed order. Raises: PublishedError."""
  return tuple(cell for cell in places(key) if cell.value)


@functools.cache
def places(key: str) -> tuple[Cell, ...]:
  """The cells with those that the paper leaves empty, which keep their place in the order."""
  name = table(key).key
  found: Iterator[Cell]
  if name == "9":
    found = _datasets_table()
  elif name in ("10", "11"):
    found = _wide({"10": "linear_probe.csv", "11": "zero_shot.csv"}[name], name)
  elif name in ("16", "figure13"):
    found = _shifts(name)
  elif name == "13":
    found = _retrieval()
  elif name == "18":
    found = _hyperparameters()
  elif name in _SHAPES:
    found = _shapes(name)
  else:
    found = (Cell(**row) for row in rows("extra_tables.csv") if row["table"] == name)
  return tuple(found)


def model_of(label: str) -> tuple[str, bool]:
  """What "Zero-Shot CLIP (RN50)" or "Linear Probe CLIP (RN50)" is made of; whether it is probed."""
  match = re.fullmatch(r"(Zero-Shot|Linear Probe) CLIP \((.+)\)", label)
  return (match[2], match[1] == "Linear Probe") if match else (label, False)


@functools.cache
def rows(name: str) -> tuple[Mapping[str, str], ...]:
  """The rows of a CSV file of `assets/paper/`, all values as text."""
  with (FOLDER / name).open(encoding="utf-8", newline="") as file:
    return tuple(types.MappingProxyType(row) for row in csv.DictReader(file))


@functools.cache
def metrics() -> Mapping[str, str]:
  """The metric of each of the 27 datasets: accuracy unless Table 9 says otherwise."""
  return {row["key"]: row["metric"].replace("-per-", " per ") for row in rows("datasets.csv")}


@functools.cache
def means(key: str) -> Mapping[str, str]:
  """Of Tables 10 and 11: each model's mean over the 27 datasets (computed, not printed)."""
  name = {"10": "linear_probe.csv", "11": "zero_shot.csv"}[key]
  return {row["model"]: row["mean27"] for row in rows(name)}


def _wide(name: str, key: str) -> Iterator[Cell]:
  for row in rows(name):
    for dataset, metric in metrics().items():
      yield Cell(key, row["model"], dataset, metric, row[dataset])


def _shifts(key: str) -> Iterator[Cell]:
  where = TABLES[key].title
  for row in rows("robustness.csv"):
    for name, value in row.items():
      if row["where"] == where and value and name not in ("model", "where", "status"):
        dataset, _, metric = name.partition(" ")
        yield Cell(key, row["model"], dataset, metric or "accuracy", value)


def _retrieval() -> Iterator[Cell]:
  for row in rows("retrieval.csv"):
    direction = row["direction"].partition(" ")[0].replace("_", " ")
    for k in ("R@1", "R@5", "R@10"):
      yield Cell("13", row["model"], row["dataset"], f"{direction} {k}", row[k])


def _datasets_table() -> Iterator[Cell]:
  for row in rows("datasets.csv"):
    for column, metric in (*_SIZES.items(), ("metric", "metric")):
      yield Cell("9", "", row["key"], metric, row[column])


def _hyperparameters() -> Iterator[Cell]:
  text = (FOLDER / "hyperparameters.json").read_text(encoding="utf-8")
  values = json.loads(text, parse_float=str, parse_int=str)["table18"]
  for name, value in values.items():
    metric = name.replace("_", " ")
    for model, printed in value.items() if isinstance(value, dict) else (("", value),):
      yield Cell("18", model, "", metric, printed)


def _shapes(key: str) -> Iterator[Cell]:
  columns = {**_SHAPES_BEFORE, **_SHAPES[key], **_SHAPES_AFTER}
  for row in rows("architectures.csv"):
    if row[next(iter(_SHAPES[key]))]:
      for column, metric in columns.items():
        yield Cell(key, row["model"], "", metric, row[column])
