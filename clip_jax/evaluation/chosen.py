"""Which images, classes and prompts a command is about: what was asked for, and what lies there."""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from clip_jax import checksums, inference
from clip_jax import config as config_lib
from clip_jax.data import folder_source, labels, records, scenes, tar_source
from clip_jax.evaluation import classifier, datasets, encoding, opening, prompts, zero_shot
from clip_jax.evaluation.overlap import effect as overlap_effect

EMBEDDED = ("digits", "scenes")  # data that the package holds or draws
TEMPLATES = ("a photo of a {}.",)  # where nothing else is said. Source: section 3.1.4
_SCENES = 1000
_NAMED = 5  # of images that are left out
_SPLITS = frozenset(("train", "test", "val", "valid", "validation"))


class ChoiceError(ValueError):
  """Data or prompts that cannot be evaluated as they were asked for: which, and what to do."""


@dataclasses.dataclass(frozen=True)
class Asked:
  """What a command line says of data and prompts. Empty: not said.

  `data` is a prepared folder (with a manifest), a folder of images in a folder a class, one of
  EMBEDDED, or, with the key of a `dataset` of the paper, the folder below which a copy is.
  """

  data: str
  split: str = "test"
  dataset: str = ""
  fold: int = 0
  prompts: str = ""  # the name of a prompt set
  classes: str = ""  # a file, see `prompts.read`
  templates: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Chosen:
  """Labelled images and the prompts of their classes; the labels are `prompt_set.classes`.

  With `several`, those of `labels.join`: of more than one class an image.
  """

  name: str
  source: records.RecordSource
  prompt_set: prompts.PromptSet
  notes: tuple[str, ...] = ()  # what a reader must know to judge the figures
  metric: str = "accuracy"  # one of `scores.METRICS`: the paper's on these data
  several: bool = False

  @property
  def shown(self) -> dict[str, str]:
    """Of each class, the name that its first prompt has, which may be another than its label."""
    pairs = zip(self.prompt_set.classes, self.prompt_set.names, strict=True)
    return {label: own[0] for label, own in pairs}

  def by_top1(self) -> "Chosen":
    """The same, with a note where the paper's metric is another than top-1 accuracy.

    Raises: ChoiceError where an image is of several classes.
    """
    if self.several:
      raise ChoiceError(
        f"{self.name}: its images show several classes at once, so that there is no one right "
        f"answer; the paper's metric is {self.metric}"
      )
    if self.metric == "accuracy":
      return self
    note = f"The paper's metric here is {self.metric}; this is top-1 accuracy."
    return dataclasses.replace(self, notes=(note, *self.notes))

  def sample(self, limit: int, seed: int) -> "Chosen":
    """At most `limit` of the images (0: all), drawn at random. Raises: ChoiceError."""
    if limit < 0:
      raise ChoiceError(f"--limit {limit}: want a number of images, or 0 for all of them")
    n = len(self.source)
    if limit in (0, n) or limit > n:
      return self
    drawn = np.sort(np.random.default_rng(seed).permutation(n)[:limit])
    note = f"{limit:,} of the {n:,} images of {self.name} were taken, drawn with seed {seed}."
    source = overlap_effect.Selection(self.source, [int(i) for i in drawn])
    return dataclasses.replace(self, source=source, notes=(note, *self.notes))

  def readable(self, model: encoding.Model) -> "Chosen":
    """Without the images that cannot be decoded, with a note that names them.

    Decodes all of them once. Raises: ChoiceError where none is left.
    """
    good, bad = [], []
    for i in range(len(self.source)):
      try:
        encoding.image_of(model, self.source, i)
        good.append(i)
      except encoding.EvaluationError:
        bad.append(self.source.locate(i))
    if not bad:
      return self
    if not good:
      raise ChoiceError(f"{self.name}: none of {len(bad):,} images can be decoded, as {bad[0]}")
    source = overlap_effect.Selection(self.source, good)
    return dataclasses.replace(self, source=source, notes=(self.left_out(bad), *self.notes))

  def left_out(self, bad: Sequence[str]) -> str:
    """A note on the images that cannot be decoded. Args: bad, where they stand."""
    more = f" and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
    return (
      f"{len(bad):,} of {len(self.source):,} images of {self.name} cannot be decoded and were left "
      "out, so that the figures are not comparable with others: "
      f"{', '.join(bad[:_NAMED])}{more}."
    )


def choose(asked: Asked, resolution: int) -> Chosen:
  """Opens the data and finds the prompts of its classes; drawn images have `resolution` pixels.

  Prompts are those that were asked for (`classes` or `prompts`), or those of the dataset; else the
  classes are the data's own. `templates` go before the prompts' own; without any: TEMPLATES.
  Raises: ChoiceError; PromptError, RecordError, LabelError or DatasetError from what is read.
  """
  if asked.dataset:
    return _checked(_of_the_paper(asked), asked)
  given, place = _given(asked), pathlib.Path(asked.data)
  source, own = _labelled(asked, given, resolution)
  name = place.resolve().name if place.exists() else asked.data
  if given is None:
    if not own:
      raise ChoiceError(
        f"--data {asked.data}: it names no classes; give --classes FILE, a line a class, or "
        "--prompts NAME"
      )
    given = prompts.PromptSet(own, asked.templates or TEMPLATES)
  elif not given.classes:
    given = dataclasses.replace(given, classes=own)
  if strange := sorted(set(own) - set(given.classes)):
    raise ChoiceError(
      f"--data {asked.data}: class {strange[0]!r} has no prompts, as {len(strange)} of {len(own)}: "
      f"it is none of the {len(given.classes)} of {asked.classes or asked.prompts or 'the prompts'}"
    )
  return _checked(Chosen(f"{name} {asked.split}", source, given), asked)


def _checked(chosen: Chosen, asked: Asked) -> Chosen:
  """Raises: ChoiceError where there is nothing to evaluate, or a template takes no class."""
  if not len(chosen.source):
    raise ChoiceError(f"--data {asked.data}: split {asked.split!r} has no images")
  if not chosen.prompt_set.classes:
    raise ChoiceError(f"--data {asked.data}: neither it nor the prompts name any classes")
  return chosen


def _given(asked: Asked) -> prompts.PromptSet | None:
  """The prompts asked for, or those of embedded data. Raises: ChoiceError, PromptError."""
  if asked.prompts and asked.classes:
    raise ChoiceError("--prompts and --classes: give one of them")
  if asked.classes:
    plain = not asked.classes.endswith(".json")  # a plain file has no templates of its own
    return prompts.read(asked.classes, asked.templates or (TEMPLATES if plain else ()))
  name = asked.prompts
  if not name and not asked.dataset and asked.data in EMBEDDED and not _exists(asked.data):
    name = asked.data
  if not name:
    return None
  found = prompts.named(name)
  return dataclasses.replace(found, templates=asked.templates or found.templates)


def _exists(data: str) -> bool:
  return pathlib.Path(data).exists()


def _embedded(data: str, split: str, resolution: int) -> records.RecordSource:
  if data == "digits":
    return scenes.Digits(split, max(resolution, 32))
  return scenes.Scenes(split, _SCENES, size=max(resolution, 32))


def _labelled(
  asked: Asked, given: prompts.PromptSet | None, resolution: int
) -> tuple[records.RecordSource, tuple[str, ...]]:
  """What lies at the path, and the classes that it names itself."""
  place = pathlib.Path(asked.data)
  if not place.exists() and asked.data in EMBEDDED:
    return _embedded(asked.data, asked.split, resolution), ()
  if (place / records.MANIFEST).is_file():
    prepared = records.ArrayRecordSource(place, asked.split)
    return prepared, prepared.classes
  base = _split_folder(place, asked)
  names = folder_source.class_folders([base])
  if not names:
    raise ChoiceError(
      f"--data {asked.data}: {base} has no folders of classes (want CLASS/IMAGE) and no "
      f"{records.MANIFEST}; a dataset of the paper below it is opened by --dataset KEY"
    )
  label_of = {name: name.replace("_", " ") for name in names}
  if given is not None and given.classes:
    # Where two classes share a name, it is the first one's.
    aliases = {n: k for k, own in reversed(list(enumerate(given.names))) for n in own}
    found = labels.match(names, given.classes, aliases, numbered=True)
    labels.check(found, names, given.classes)
    label_of = {n: given.classes[k] for n, k in zip(names, found, strict=True) if k is not None}
  return folder_source.from_class_folders(place, [base], label_of), tuple(label_of.values())


def _split_folder(place: pathlib.Path, asked: Asked) -> pathlib.Path:
  """The folder of a split below `place`, or `place` itself. Raises: ChoiceError."""
  if not place.is_dir():
    words = ", ".join(EMBEDDED)
    raise ChoiceError(f"--data {asked.data}: no such folder; give one, or the word for {words}")
  if (place / asked.split).is_dir():
    return place / asked.split
  splits = sorted(p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
  if splits and set(splits) <= _SPLITS:
    raise ChoiceError(f"--data {asked.data}: no split {asked.split!r}; it has {', '.join(splits)}")
  return place


def _of_the_paper(asked: Asked) -> Chosen:
  """A dataset by its key, from whatever copy of it lies below the path."""
  dataset = datasets.named(asked.dataset)
  if dataset.rule == "captions":
    raise ChoiceError(f"--dataset {dataset.key}: it has captions and no classes to choose from")
  given = _given(asked)
  if given is None and not dataset.prompts:
    raise ChoiceError(
      f"--dataset {dataset.key}: no prompts are published for it; give --classes FILE, a line a "
      "class in the order of its labels"
    )
  if given is None:
    given = prompts.named(dataset.prompts)
    given = dataclasses.replace(given, templates=asked.templates or given.templates)
  names = given.names
  if dataset.imagenet_indices and len(names) > dataset.classes:
    names = tuple(names[k] for k in dataset.imagenet_indices)
  roots, first = [asked.data], [own[0] for own in names]
  copy = opening.open_dataset(dataset, asked.split, roots, first, asked.fold)
  notes = tuple(f"{note[:1].upper()}{note[1:]}." for note in copy.notes)
  prompt_set = prompts.PromptSet(copy.classes, given.templates, synonyms=names)
  several = dataset.rule == "several"
  name = f"{dataset.key} {asked.split}"
  return Chosen(name, copy, prompt_set, notes, dataset.metric, several)


def images_at(data: str, split: str, resolution: int) -> records.RecordSource:
  """The images of a prepared folder, of tar files, of a folder of whatever depth, or of EMBEDDED.

  Of a folder with one of the split's name in it only that one counts. Labels are not asked for.
  Raises: ChoiceError when there are none; RecordError from what is read.
  """
  place = pathlib.Path(data)
  if not place.exists() and data in EMBEDDED:
    return _embedded(data, split, resolution)
  if (place / records.MANIFEST).is_file():
    return records.ArrayRecordSource(place, split)
  if not place.is_dir():
    raise ChoiceError(f"{data}: no such folder; give one, or the word for {', '.join(EMBEDDED)}")
  base = place / split if (place / split).is_dir() else place
  if tar_source.is_split(base):
    named = next((p for p in (base, place) if (p / "classnames.txt").is_file()), None)
    return tar_source.TarSource(base, tar_source.class_names(named) if named else ())
  paths = [p for p in sorted(base.rglob("*")) if p.suffix.lower() in folder_source.IMAGES]
  if not paths:
    raise ChoiceError(f"{base}: no images below it, no tar files, no {records.MANIFEST}")
  entries = [folder_source.Entry(p, p.relative_to(place).as_posix()) for p in paths]
  return folder_source.FileSource(entries)


Evaluate = Callable[..., zero_shot.ZeroShotResult]


def evaluator(model: encoding.Model, chosen: Chosen, batch: int) -> Evaluate:
  """A source -> its zero-shot result on the chosen prompts, which are encoded once.

  More arguments are those of `zero_shot.evaluate`.
  """
  return functools.partial(
    zero_shot.evaluate,
    model,
    classes=chosen.prompt_set.classes,
    templates=chosen.prompt_set.templates,
    batch=batch,
    name=chosen.name,
    held_out=chosen.prompt_set.held_out,
    class_CE=classifier.classifier(model, chosen.prompt_set, None, "", batch),
  )


def weights_hash(model: inference.Clip) -> str:
  """sha256 of all that decides an embedding: weights, architecture, preprocessing, vocabulary.

  The weights go in as checksums of their leaves, the same on however many devices they lie.
  """
  config = config_lib.to_dict(model.config)
  tokenizer = "" if model.tokenizer is None else model.tokenizer.fingerprint
  parts = [checksums.of_leaves(model.variables), config["model"], config["preprocess"], tokenizer]
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def facts(chosen: Chosen, weights: str, digest: str) -> Mapping[str, str]:
  """What made a figure, for people. Args: the weights' name and their hash."""
  own = chosen.prompt_set
  prompts_each = collections.Counter(len(names) * len(own.templates) for names in own.names)
  each = " or ".join(f"{n:,}" for n in sorted(prompts_each))
  return {
    "weights": f"{weights}, sha256 {digest}",
    "images": f"{len(chosen.source):,}, sha256 {chosen.source.fingerprint}",
    "prompts": f"{len(own.classes):,} classes, {each} prompts each, sha256 {own.fingerprint}",
  }
