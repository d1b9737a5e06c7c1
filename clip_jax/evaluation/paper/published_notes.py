"""What is known about published cells: why some do not reproduce, what others measured."""

import dataclasses
import decimal
import functools
from collections.abc import Mapping

from clip_jax.evaluation.paper import origins, published


@functools.cache
def test_images(dataset: str) -> int | None:
  """How many images the paper's test set of `dataset` has, where that is published."""
  sizes = {row["key"]: row["test_size"] for row in published.rows("datasets.csv")}
  sizes |= {row["dataset"]: row["test_images"] for row in published.rows("datasets_shift.csv")}
  sizes |= {row["dataset"]: row["test_images"] for row in published.rows("retrieval.csv")}
  size = sizes.get(origins.dataset(dataset))
  return int(size) if size else None


@dataclasses.dataclass(frozen=True)
class Known:
  """Why a cell does not reproduce, and from where to where around the published figure.

  `least` and `most`: differences from it, at most and at least 0, that the reason explains: to the
  figure that should stand there, or to what others measure with the same released weights. `up_to`:
  how far beyond these, 0 where the tolerance alone is. `when`: "other images", no reason for a
  measurement on as many images as the paper's test set has; "other tools", no reason for one by
  this project at all, as it does what the paper did; "always", nothing is compared at all.
  """

  why: str
  source: str
  when: str
  least: decimal.Decimal
  most: decimal.Decimal
  up_to: decimal.Decimal


def known_difference(cell: published.Cell) -> Known | None:
  """What is known of a cell that does not reproduce, or of the one that it is made of, or None."""
  for place in filter(None, (cell, origins.origin(cell))):
    for row in published.rows("known_differences.csv"):
      names = ("model", "dataset", "metric")
      if row["table"] == place.table and all(row[n] in ("", getattr(place, n)) for n in names):
        if row["figure"]:
          explained = [decimal.Decimal(row["figure"]) - decimal.Decimal(cell.value)]
        else:
          explained = [] if row["up_to"] else _others(place)
        return Known(
          row["why"],
          row["source"],
          row["when"],
          min([decimal.Decimal(0), *explained]),
          max([decimal.Decimal(0), *explained]),
          decimal.Decimal(row["up_to"] or 0),
        )
  return None


def _others(place: published.Cell) -> list[decimal.Decimal]:
  """What others measure minus what is published: of the cell's model, or else of all that have it.

  Models that nobody measured are given what all others of the data set have together.
  """
  found = {
    cell.model: [decimal.Decimal(r.value) - decimal.Decimal(cell.value) for r in references(cell)]
    for cell in published.cells(place.table)
    if cell.dataset == place.dataset
  }
  return found.get(place.model) or [one for own in found.values() for one in own]


@functools.cache
def clip_benchmark_names() -> Mapping[str, str]:
  """What CLIP_benchmark calls a dataset of the paper."""
  rows = published.rows("clip_benchmark_names.csv")
  return {row["dataset"]: row["clip_benchmark"] for row in rows}


@dataclasses.dataclass(frozen=True)
class Reference:
  """Somebody else's measurement of the same cell with the released weights, in percent."""

  source: str
  metric: str
  value: str
  note: str


def references(cell: published.Cell) -> tuple[Reference, ...]:
  """Others' measurements that can be set beside a published cell of Tables 10, 11, 13 and 16."""
  model, probed = published.model_of(cell.model)
  key = "openclip_reference.csv"
  found = [
    row
    for row in (published.rows(key) if cell.table in ("11", "13", "16") and not probed else ())
    if (row["model"], row["dataset"], row["paper_value"]) == (model, cell.dataset, cell.value)
    and (cell.table != "13" or row["metric"].replace("_", " ") == cell.metric)
  ]
  out = [Reference(r["source"], r["metric"], r["value"], r["note"]) for r in found]
  if cell.table == "10":
    names = clip_benchmark_names()
    for row in published.rows("openclip_linear_probe_reference.csv"):
      name = row["dataset"].removeprefix("vtab/").removesuffix("-unverified")
      if row["model"] == model and name == names.get(cell.dataset, "").removeprefix("vtab/"):
        out.append(Reference(row["source"], "acc1", row["acc1"], row["note"]))
  return tuple(out)


_QUOTED = frozenset(
  {
    "Visual N-Grams",
    "NS EfficientNet-L2",
    "FixResNeXt101-32x48d V2",
    "ImageNet ResNet-101",
    "ResNet-50",
    "ResNet-101",
    "ResNet-152",
    "LM RN50",
  }
)

_OUTSIDE = "not one of the paper's 27 data sets: no class names or prompts of it are published"
_NOT_HERE = {
  "aYahoo": _OUTSIDE,
  "SVHN": _OUTSIDE,
  "IIIT5K 1k": f"{_OUTSIDE}, and each image has its own list of words",
  "RareAct": "videos, scored over all their frames; nothing here reads videos",
  "RN50, WIT subset": "its training pairs were never published",
  "difference": "of both models, where both are measured",
  "Dataset Wins": "the paper does not say what a win is, nor over which data sets: its 18 and 19 "
  "zero-shot are of more than 27",
  "Dataset Average": "linear probe: the mean of all 27 of a model, --tables 10,12; zero-shot: the "
  "paper averages over more than those 27 and does not list them",
}


def never(model: str, dataset: str) -> str:
  """Why a cell cannot be measured here, whatever lies on the machine; "" where it can."""
  if model in _QUOTED:
    return "not one of the released CLIP models: the paper's own figure only"
  return _NOT_HERE.get(dataset) or _NOT_HERE.get(model, "")


def how_to_get(model: str, dataset: str) -> str:
  """Where a cell that has not been measured would come from, in words."""
  if why := never(model, dataset):
    return why
  dataset = origins.dataset(dataset)
  for row in published.rows("datasets.csv"):
    if row["key"] == dataset:
      name = "/".join(part for part in (row["tfds_name"], row["tfds_config"]) if part)
      return _source(name)
  for row in published.rows("datasets_shift.csv"):
    if row["dataset"].removesuffix(" captions") == dataset:
      return _source(row["tfds_name"])
  return "not measured yet"


def _source(name: str) -> str:
  layouts = "an image folder, or CLIP_benchmark's WebDataset layout"
  return f"prepare {name} with TFDS, or bring {layouts}" if name else f"bring {layouts}"
