"""The units of work that the paper's tables are made of, with their data and prompts.

Source: Tables 10, 11, 13 and 16, sections 3.1 to 3.3, appendices A and E.1.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from clip_jax.data import contents, labels
from clip_jax.evaluation import datasets, opening, prompts
from clip_jax.evaluation.shifts import robustness

TABLES = ("10", "11", "13", "16")
CAPTIONS = 5  # of an image, in retrieval
CAPTION_PREFIX = "a photo of "

_NO_MEMBERS = (
  "which of ImageNet's classes its own consist of is not known here; with that, "
  "evaluation.shifts.accuracy makes the figure of the scores"
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """How cells are measured."""

  roots: tuple[pathlib.Path, ...]  # below which copies of data sets lie
  cache: pathlib.Path | None  # of features, classifier weights, probes and fingerprints of data
  batch: int
  limit: int = 0  # first records of every split; 0: all
  skip_unreadable: bool = False  # leave images out that cannot be decoded
  remeasure: bool = False  # what is measured already too, and of nothing that older code kept
  features: str = "penultimate"  # one of `features.PROBED`
  caption_prefix: str = CAPTION_PREFIX
  # by data set's key, in place of the published ones
  prompt_sets: Mapping[str, prompts.PromptSet] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Unit:
  """One unit of work: a model on a data set, zero-shot or by a linear probe.

  `within`: a data set of fewer of ImageNet's classes, to measure on these alone.
  """

  table: str
  dataset: datasets.Dataset
  probed: bool
  within: datasets.Dataset | None = None

  @property
  def column(self) -> str:
    """What the table calls the data set."""
    if self.within:
      return robustness.restricted(self.within.key)
    return self.dataset.key.removesuffix(" captions")

  @property
  def metrics(self) -> tuple[str, ...]:
    """What is measured; the paper's "text retrieval" finds texts for images."""
    if self.table == "13":
      return tuple(f"{what} retrieval R@{k}" for what in ("text", "image") for k in (1, 5, 10))
    return (self.dataset.metric,)

  def row(self, name: str, settings: Settings, left_out: bool = False) -> str:
    """What the table calls the model `name`; another name where the figure is not the paper's.

    Args: left_out, whether the figure does without some images that cannot be decoded.
    """
    odd = [f"first {settings.limit:,} records"] if settings.limit else []
    odd += ["corrupt images left out"] * left_out
    if self.probed:
      odd += [f"{settings.features} features"] * (settings.features != "penultimate")
    elif self.table == "13":
      prefix = settings.caption_prefix
      odd += [f"captions after {prefix!r}"] * (prefix != CAPTION_PREFIX)
    elif self.dataset.prompts and self.dataset.key in settings.prompt_sets:
      odd.append("own prompts")
    row = f"{name} [{', '.join(odd)}]" if odd else name
    if self.table in ("16", "figure13"):
      return f"{'Linear Probe' if self.probed else 'Zero-Shot'} CLIP ({row})"
    return row

  def rows(self, name: str, settings: Settings) -> tuple[str, ...]:
    """All that `row` may come to, which is known when the images have been decoded."""
    ways = (False, True) if settings.skip_unreadable else (False,)
    return tuple(self.row(name, settings, left_out) for left_out in ways)


@dataclasses.dataclass(frozen=True)
class Fold:
  """A test split, and the one to train on where a probe is trained."""

  test: datasets.Copy
  train: datasets.Copy | None


@dataclasses.dataclass(frozen=True)
class Task:
  """A unit with its data and prompts, and the sha256 of all of them."""

  unit: Unit
  folds: tuple[Fold, ...]
  prompt_set: prompts.PromptSet | None
  data: str
  prompts: str

  @property
  def notes(self) -> tuple[str, ...]:
    """In what the data are not the paper's."""
    dataset, number = self.unit.dataset, len(self.folds)
    copies = [copy for fold in self.folds for copy in (fold.train, fold.test) if copy]
    found = [f"{c.dataset.key}, {c.split}: {note}" for c in copies for note in c.notes]
    if _by_folds(self.unit) and number < dataset.folds:
      found.append(f"{dataset.key}: {number} of its {dataset.folds} folds can be told apart here")
    return tuple(dict.fromkeys(found))


Opener = Callable[[datasets.Dataset, str, int], datasets.Copy]  # of a split and a fold


def units(table: str) -> tuple[Unit, ...]:
  """All units of a table, in its order."""
  groups = {"10": "paper", "11": "paper", "13": "retrieval", "16": "shift"}
  found = [d for d in datasets.all_datasets() if d.group == groups[table]]
  if table == "16":
    found.insert(0, datasets.named("ImageNet"))
  ways = {"10": (True,), "16": (False, True)}.get(table, (False,))
  return tuple(Unit(table, dataset, probed) for probed in ways for dataset in found)


def bases() -> tuple[Unit, ...]:
  """ImageNet on the classes of each shift that has fewer and of which they are known: Figure 13's.

  Scores are of features that Table 16 has, so these cost no image.
  """
  imagenet = datasets.named("ImageNet")
  shifts = [d for d in datasets.all_datasets() if d.group == "shift"]
  fewer = [d for d in shifts if 0 < len(d.imagenet_indices) < imagenet.classes]
  return tuple(Unit("figure13", imagenet, probed, d) for probed in (False, True) for d in fewer)


def dataset_of(word: str) -> datasets.Dataset:
  """A data set by its key, or as a table calls it. Raises: DatasetError listing the keys."""
  columns = {labels.plain(unit.column): unit.dataset for unit in units("13")}
  return columns.get(labels.plain(word)) or datasets.named(word)


def opener(settings: Settings) -> Opener:
  """Opens copies below the roots, each one once; the first process keeps their fingerprints."""
  cache = None
  if settings.cache is not None:
    cache = contents.Cache(settings.cache, writes=jax.process_index() == 0)

  def copy_of(dataset: datasets.Dataset, split: str, fold: int) -> datasets.Copy:
    prompt_set = prompts_of(dataset, settings)
    names = [own[0] for own in prompt_set.names] if prompt_set else []
    names = [names[k] for k in dataset.imagenet_indices] if len(names) > dataset.classes else names
    copy = opening.open_dataset(dataset, split, settings.roots, names, fold)
    if isinstance(copy.source, contents.Contents):
      copy.source.cache = cache
    return copy

  return functools.cache(copy_of)


def prompts_of(dataset: datasets.Dataset, settings: Settings) -> prompts.PromptSet | None:
  """The user's own prompts for a data set, or the published ones."""
  if dataset.key in settings.prompt_sets:
    return settings.prompt_sets[dataset.key]
  return prompts.named(dataset.prompts) if dataset.prompts else None


def read_prompts(words: Sequence[str]) -> dict[str, prompts.PromptSet]:
  """KEY=FILE, as often as wanted -> prompt sets by data set's key.

  Raises: DatasetError for a key that there is not; PromptError; OSError.
  """
  out = {}
  for word in words:
    key, equals, path = word.partition("=")
    if not equals:
      raise prompts.PromptError(f"{word!r}: want KEY=FILE, as ObjectNet=objectnet.json")
    known = dataset_of(key).key
    out[known] = prompts.read(path)
  return out


def task(unit: Unit, settings: Settings, copy_of: Opener) -> Task:
  """Opens the data of a unit. Raises: NotAvailable, DatasetError, PromptError."""
  dataset = unit.dataset
  prompt_set = prompts_of(dataset, settings)
  if unit.table != "13" and prompt_set is None:
    if dataset.classes == 0 or unit.probed:
      raise datasets.NotAvailable(f"{dataset.key}: {_NO_MEMBERS}")
    raise datasets.NotAvailable(
      f"{dataset.key}: its {dataset.classes} classes are not named here; give --prompts "
      f"'{dataset.key}=FILE.json' with their names and templates"
    )
  if unit.probed and dataset.group == "shift" and not dataset.imagenet_indices:
    raise datasets.NotAvailable(f"{dataset.key}: {_NO_MEMBERS}")
  folds = _folds(unit, copy_of)
  prints = [[c.fingerprint if c else None for c in (f.train, f.test)] for f in folds]
  if unit.probed:
    how = _hash(["linear probe/1", settings.features])
  elif unit.table == "13":
    how = _hash(["retrieval/2", settings.caption_prefix, CAPTIONS])
  else:
    assert prompt_set is not None
    how = prompt_set.fingerprint
  data = _hash(["data/1", prints, settings.limit, settings.skip_unreadable])
  return Task(unit, folds, prompt_set, data, how)


def _folds(unit: Unit, copy_of: Opener) -> tuple[Fold, ...]:
  """The folds that the copies tell apart, or the one that they are together."""
  dataset = unit.dataset
  trained_on = datasets.named("ImageNet") if dataset.group == "shift" else dataset

  def opened(fold: int) -> Fold:
    test = copy_of(dataset, "test", fold)
    same = trained_on is dataset
    train = copy_of(trained_on, "train", fold if same else 0) if unit.probed else None
    return Fold(test, train)

  if not _by_folds(unit):
    return (opened(0),)
  try:
    first = opened(1)
  except datasets.NotAvailable:
    return (opened(0),)
  return (first, *(opened(fold) for fold in range(2, dataset.folds + 1)))


def _by_folds(unit: Unit) -> bool:
  """Whether the figure is a mean over folds: STL10's are of training alone."""
  return unit.dataset.folds > 1 and (unit.probed or unit.dataset.rule != "fold_indices")


def _hash(parts: list[Any]) -> str:
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
