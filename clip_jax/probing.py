"""The paper's linear probe and few-shot probe of any weights on one's own data, beside zero-shot.

Every figure is a line of `results.jsonl` as soon as it is measured, and features are kept, so that
a killed run goes on. All devices share the work; of several processes all must call, and the first
one reads and writes. Source: section 3.1.5, appendix A.3, Figures 6 and 7.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import rich.console

from clip_jax import code_version, hosts, sharding
from clip_jax.evaluation import chosen, classifier, encoding, scores
from clip_jax.evaluation.paper import models as paper_models
from clip_jax.evaluation.paper import progress as paper_progress
from clip_jax.evaluation.probe import cells, data, features, linear_probe, splits, study, writers
from clip_jax.studies import Path, Setup, StudyError, folder_at

SEEDS = (0, 1, 2)
_ZERO_SHOT = (cells.ZERO_SHOT, 0, None)


@dataclasses.dataclass(frozen=True)
class Asked:
  """What of a probe may be chosen.

  `validation_split` "": the data's own, or else a part of train is held back. `shots` None: those
  of `linear_probe.SHOTS`, where an image has one class; empty: no few shots.
  Raises: StudyError naming the option that makes no sense.
  """

  train_split: str = "train"
  validation_split: str = ""
  features: str = "penultimate"  # one of `features.PROBED`
  shots: tuple[int, ...] | None = None
  seeds: tuple[int, ...] = SEEDS

  def __post_init__(self) -> None:
    for option, values, least in (("--shots", self.shots or (), 1), ("--seeds", self.seeds, 0)):
      if any(value < least for value in values) or len(set(values)) < len(values):
        words = ",".join(map(str, values))
        raise StudyError(f"{option} {words}: want whole numbers from {least}, each once")
    if not self.seeds:
      raise StudyError("--seeds: none; want one or more, as 0,1,2")
    if self.features not in features.PROBED:
      known = ", ".join(features.PROBED)
      raise StudyError(f"--features {self.features}: choose one of {known}")


def probe(
  setup: Setup,
  output: Path,
  asked: Asked | None = None,
  console: rich.console.Console | None = None,
) -> tuple[study.Study, tuple[str, ...]]:
  """Measures what `output`/results.jsonl lacks, then writes page and tables.

  `setup.asked` is the test split; `setup.limit` counts for each split by itself.
  Returns: the study, and notes in sentences.
  Raises: StudyError, ChoiceError for what cannot be probed as asked; CellsError when the file is of
    other weights or data; EvaluationError naming a bad record; ProbeError, LogisticError; OSError.
  """
  asked, folder = asked or Asked(), folder_at(output)
  if setup.batch < 1:
    raise StudyError(f"--batch {setup.batch}: want at least 1")
  weights = paper_models.load(paper_models.Named(setup.weights, pathlib.Path(setup.weights)))
  model: Any = weights.model
  own = data.choose(setup.asked, asked.train_split, asked.validation_split, model.resolution)
  if own.test.several and asked.shots:
    raise StudyError(f"--shots: {own.test.name} has several classes an image; give --shots none")
  run = _Run(setup, asked, folder, weights.hash, model, own.sample(setup.limit, setup.seed))
  with paper_progress.bar(console or rich.console.Console(quiet=True), run.most) as run.bar:
    found = run.measure()
  notes = tuple(dict.fromkeys((*run.notes, *run.own.notes)))
  if run.first:
    writers.write(folder, found, run.facts(found), notes)
  return found, notes


class _Run:
  """One probe's model and data, and what is known so far."""

  bar: paper_progress.Bar

  def __init__(
    self,
    setup: Setup,
    asked: Asked,
    folder: pathlib.Path,
    digest: str,
    model: Any,
    own: data.Data,
  ):
    self.setup, self.asked, self.digest, self.model, self.own = setup, asked, digest, model, own
    self.first = jax.process_index() == 0
    self.lines, self.cache = folder / "results.jsonl", folder / "cache"
    self.code, self.mesh = code_version.current(), sharding.make_mesh()
    self.classes, self.metric = own.test.prompt_set.classes, own.test.metric
    shots = linear_probe.SHOTS if asked.shots is None else asked.shots
    self.shots = () if own.test.several else tuple(sorted(shots))
    self.score = functools.partial(scores.score, self.metric)
    self.identity = self._identity()
    self.done, cut = cells.read(self.lines, self.identity)
    self.notes = [f"{cut}."] if cut else []
    if self.first:
      folder.mkdir(parents=True, exist_ok=True)

  @property
  def most(self) -> int:
    """How many figures there may be."""
    return 2 + len(self.shots) * len(self.asked.seeds)

  def _identity(self) -> cells.Measure:
    """Raises: StudyError on a process that has other weights or data than the first one."""
    own = self.own
    found = cells.Measure(
      weights=self.digest,
      train=own.train.source.fingerprint,
      validation=self._validation(),
      test=own.test.source.fingerprint,
      prompts=own.test.prompt_set.fingerprint,
      features=self.asked.features,
      metric=self.metric,
    )
    said = json.dumps(dataclasses.asdict(found))
    if hosts.from_first(said.encode()).decode() != said:
      raise StudyError(
        f"process {jax.process_index()} has other weights or data than process 0; give all of them "
        "the same"
      )
    return found

  def _validation(self) -> str:
    """What lambda is chosen on: a fingerprint, or in words what of train."""
    if self.own.validation:
      return self.own.validation.source.fingerprint
    if getattr(self.own.train.source, "validation", ()):
      return "the validation split in train"
    return f"{linear_probe.HELD_BACK:.0%} of train, seed {self.setup.seed}"

  def measure(self) -> study.Study:
    """All figures, of which some may be there already."""
    class_CE = self._prompts()  # first: a prompt that is too long is told before images are encoded
    train, validation, examples = self._training()
    test, count = self._split(self.own.test), len(self.classes)
    self._check_test(test)
    shots = self._drawable(train, examples)
    given, seeds = (count, self.score), self.asked.seeds
    self._zero_shot(class_CE)

    def all_examples() -> linear_probe.ProbeResult:
      return linear_probe.probe(train, test, *given, validation, mesh=self.mesh)

    def some(k: int, seed: int) -> linear_probe.ProbeResult:
      return linear_probe.few_shot(train, validation, test, *given, k, seed, mesh=self.mesh)

    self._fitted((cells.FULL, None, None), all_examples, len(test.labels))
    for k in shots:
      for seed in seeds:
        self._fitted((cells.FEW, k, seed), functools.partial(some, k, seed), len(test.labels))
    found = study.of_cells(self.done, self.own.test.name, self.metric, count, shots, seeds)
    self._note_fits(found)
    return found

  def facts(self, found: study.Study) -> dict[str, str]:
    """What made the figures, for people."""
    own, keys = self.own, {cell.key for few in found.few for cell in few.cells}
    keys |= {(cells.FULL, None, None), _ZERO_SHOT} & set(self.done)
    facts = chosen.facts(own.test, self.setup.weights, self.digest)
    splits_of = {"train": own.train, "validation": own.validation, "test": own.test}
    return {
      "weights": facts["weights"],
      **{
        f"images, {what}": f"{len(split.source):,}, sha256 {split.source.fingerprint}"
        for what, split in splits_of.items()
        if split is not None
      },
      "prompts": facts["prompts"],
      "features": self.asked.features,
      "code": ", ".join(sorted({self.done[key].code for key in keys})),
    }

  def _encoded(self, what: chosen.Chosen, kind: str) -> features.Features:
    found = features.encode(
      self.model,
      what.source,
      kind,
      self.setup.batch,
      self.cache,
      self.digest,
      skip_unreadable=self.setup.skip_unreadable,
      progress=functools.partial(self.bar.part, what.name),
    )
    if found.left_out:
      self.notes.append(what.left_out(found.left_out))
    return found

  def _split(self, what: chosen.Chosen, kind: str = "") -> linear_probe.Split:
    """Features of a kind ("": the probe's) with labels."""
    found = self._encoded(what, kind or features.PROBED[self.asked.features])
    return splits.labelled(found, what.source, self.classes, what.several)

  def _counts(self, split: linear_probe.Split) -> np.ndarray:
    """The examples of each class."""
    if split.labels.ndim == 2:
      return (split.labels == 1).sum(axis=0)
    return np.bincount(split.labels, minlength=len(self.classes))

  def _training(self) -> tuple[linear_probe.Split, linear_probe.Split, np.ndarray]:
    """What few shots are drawn from, what lambda is chosen on, the training examples of each class.

    Raises: StudyError naming a class without any.
    """
    own, found = self.own, self._encoded(self.own.train, features.PROBED[self.asked.features])
    train = splits.labelled(found, own.train.source, self.classes, own.train.several)
    examples = self._counts(train)
    if not examples.all():
      c, none = int(np.argmin(examples)), int((examples == 0).sum())
      raise StudyError(
        f"{own.train.name}: class {self.classes[c]!r} has no images (as {none} of "
        f"{len(examples)}): a probe cannot learn it; add some, raise --limit, or name the classes "
        "without it by --classes FILE"
      )
    if own.validation is not None:
      validation = self._split(own.validation)
      self.notes.append(
        f"Lambda was chosen on the {len(validation.labels):,} images of {own.validation.name}, "
        "and the linear probe then trained on these too."
      )
      return train, validation, examples
    rest, inner = splits.own_validation(found, own.train.source, train)
    if inner is not None:
      self.notes.append(
        f"Lambda was chosen on the {len(inner.labels):,} images of {own.train.name} that are the "
        "data set's own validation split; few shots are drawn from the others."
      )
      return rest, inner, examples
    kept, held = linear_probe.hold_back(train, self.setup.seed)
    self.notes.append(
      f"There is no validation split: {len(held.labels):,} of the {len(train.labels):,} images of "
      f"{own.train.name} were held back to choose lambda, a fifth drawn with seed "
      f"{self.setup.seed}. The linear probe was then trained on all of them; few shots are drawn "
      "from the others."
    )
    return kept, held, examples

  def _check_test(self, test: linear_probe.Split) -> None:
    without = [self.classes[c] for c in np.flatnonzero(self._counts(test) == 0)]
    if without:
      self.notes.append(
        f"{len(without):,} of {len(self.classes):,} classes have no images in "
        f"{self.own.test.name}, as {without[0]!r}."
      )

  def _drawable(self, train: linear_probe.Split, examples: np.ndarray) -> tuple[int, ...]:
    """The shots of which every class has so many examples in `train`; the others are noted.

    Raises: StudyError where there are none but some were wanted.
    """
    if self.own.test.several:
      self.notes.append("No few shots: of several classes an image no number a class can be drawn.")
      return ()
    left = self._counts(train)
    c = int(np.argmin(left))
    good = tuple(k for k in self.shots if k <= left[c])
    if good == self.shots:
      return good
    held = f", of which {left[c]} are not held back" if left[c] < examples[c] else ""
    why = f"class {self.classes[c]!r} has {examples[c]} training examples{held}"
    if not good:
      raise StudyError(f"--shots {','.join(map(str, self.shots))}: {why}; ask for fewer")
    words = ", ".join(str(k) for k in self.shots if k not in good)
    self.notes.append(f"Left out: {words} shots, because {why}.")
    return good

  def _prompts(self) -> np.ndarray | None:
    """The embedding of each class [C, E]; None without a vocabulary, or where it is not needed."""
    if getattr(self.model, "tokenizer", "") is None:
      self.notes.append(
        "No zero-shot: the vocabulary of these weights is not here, and prompts are texts."
      )
      return None
    if _ZERO_SHOT in self.done:
      return None
    prompted = functools.partial(self.bar.part, "prompts")
    prompt_set, batch = self.own.test.prompt_set, self.setup.batch
    return classifier.classifier(self.model, prompt_set, self.cache, self.digest, batch, prompted)

  def _zero_shot(self, class_CE: np.ndarray | None) -> None:
    """Without the classes' embeddings only what is there counts."""
    if class_CE is None:
      self.bar.done(cells.ZERO_SHOT, "")
      return

    def measure() -> cells.Cell:
      split = self._split(self.own.test, "embedding")
      score = self.score(encoding.similarities(split.features_ND, class_CE), split.labels)
      fitted = (None, None, None)
      return cells.Cell(*_ZERO_SHOT, score, len(split.labels), 0, *fitted, self.code)

    self._figure(_ZERO_SHOT, measure)

  def _fitted(
    self, key: cells.Key, fit: Callable[[], linear_probe.ProbeResult], images: int
  ) -> None:
    def measure() -> cells.Cell:
      found = fit()
      fitted = (found.lambda_, found.iterations, found.converged)
      return cells.Cell(*key, found.score, images, found.examples, *fitted, self.code)

    self._figure(key, measure)

  def _figure(self, key: cells.Key, measure: Callable[[], cells.Cell]) -> None:
    """One figure, unless it is there."""
    way, shots, seed = key
    name = way if shots is None or seed is None else f"{study.counted(shots)}, seed {seed}"
    if key in self.done:
      self.bar.done(name, "")
      return
    self.bar.part(name, 0, 1)
    began = time.perf_counter()
    cell = measure()
    cell = dataclasses.replace(cell, seconds=round(time.perf_counter() - began, 3))
    self.done[key] = cell
    if self.first:
      cells.append(self.lines, cell, self.identity)
    self.bar.done(name, f"{self.metric} {100 * cell.score:.1f}")

  def _note_fits(self, found: study.Study) -> None:
    fits = [found.full, *(cell for few in found.few for cell in few.cells)]
    chosen_lambda = [] if found.full.lambda_ is None else [found.full.lambda_]
    converged = [bool(cell.converged) for cell in fits]
    self.notes += linear_probe.doubts(chosen_lambda, converged)
