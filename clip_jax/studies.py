"""A model looked at closely on one data set: single predictions, bad images, overlap with training.

Each study opens, measures, writes its files, and returns what it found. All devices share the work.
Of several processes all must call; the first one alone reads what is measured already, and writes.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import rich.console
import rich.progress

from clip_jax import code_version, hosts, inference, sharding
from clip_jax.data import records
from clip_jax.evaluation import chosen, encoding, pages, zero_shot
from clip_jax.evaluation import predictions as predictions_lib
from clip_jax.evaluation.overlap import effect as overlap_effect
from clip_jax.evaluation.overlap import search as overlap
from clip_jax.evaluation.overlap import writers as overlap_writers
from clip_jax.evaluation.stress import cells as stress_cells
from clip_jax.evaluation.stress import corruptions
from clip_jax.evaluation.stress import curves as stress_lib
from clip_jax.evaluation.stress import writers as stress_writers
from clip_jax.interop import sources

THRESHOLDS = {"hash": 8.0, "embedding": 0.05}  # by how near duplicates are searched
Path = str | os.PathLike[str]


class StudyError(ValueError):
  """A study that cannot be made as it was asked for: which value, and what to do."""


@dataclasses.dataclass(frozen=True)
class Setup:
  """Which weights on which data.

  `limit`: so many images, drawn with the seed; 0: all. `skip_unreadable`: leave out what cannot be
  decoded, which is an error otherwise.
  """

  weights: str
  asked: chosen.Asked
  limit: int = 0
  batch: int = 256
  seed: int = 0
  skip_unreadable: bool = False


@dataclasses.dataclass(frozen=True)
class Opened:
  """Model, data, prompts, and what made the figures."""

  model: inference.Clip
  what: chosen.Chosen
  digest: str  # of the weights
  batch: int
  evaluate: chosen.Evaluate
  facts: dict[str, str]

  def top1(self, source: records.RecordSource) -> float:
    return self.evaluate(source, examples=0).top1


def opened(setup: Setup) -> Opened:
  """Loads the model onto all devices, opens the data, encodes the prompts.

  Raises: StudyError, ChoiceError, WeightsError and what those below them raise.
  """
  if setup.batch < 1:
    raise StudyError(f"--batch {setup.batch}: want at least 1")
  model = sources.load(setup.weights)
  what = chosen.choose(setup.asked, model.resolution).by_top1().sample(setup.limit, setup.seed)
  if setup.skip_unreadable:
    what = what.readable(model)
  digest = chosen.weights_hash(model)
  _agree("weights, images or prompts", digest, what.source.fingerprint, what.prompt_set.fingerprint)
  model = inference.spread(model, sharding.make_mesh())
  evaluate = chosen.evaluator(model, what, setup.batch)
  facts = dict(chosen.facts(what, setup.weights, digest))
  return Opened(model, what, digest, setup.batch, evaluate, facts)


def _agree(what: str, *hashes: str) -> None:
  """Raises: StudyError on a process that has others than process 0."""
  mine = " ".join(hashes)
  if hosts.from_first(mine.encode()).decode() != mine:
    raise StudyError(
      f"process {jax.process_index()} has other {what} than process 0; give all of them the same"
    )


def folder_at(output: Path) -> pathlib.Path:
  """Raises: StudyError where something else is in the folder's place."""
  folder = pathlib.Path(output)
  if folder.exists() and not folder.is_dir():
    raise StudyError(f"--output {folder}: is a file; give a folder")
  return folder


@contextlib.contextmanager
def _progress(
  console: rich.console.Console, what: str, total: int
) -> Iterator[Callable[[int], None]]:
  """A bar for people; inside: a function that moves it on by so many."""
  hidden = not console.is_terminal or jax.process_index() > 0
  with rich.progress.Progress(console=console, disable=hidden) as bar:
    task = bar.add_task(what, total=total)
    yield lambda steps: bar.advance(task, steps)


def predictions(
  setup: Setup, output: Path, examples: int = 36, halves: bool = False
) -> tuple[zero_shot.ZeroShotResult, tuple[str, ...]]:
  """Writes the page of single predictions; the result and what is to be noted of the data.

  Raises: StudyError, before anything is loaded, where the page cannot be written.
  """
  target = pathlib.Path(output)
  if target.is_dir() or not target.absolute().parent.is_dir():
    raise StudyError(f"--output {target}: want a file in a folder that is there")
  if examples < 1:
    raise StudyError(f"--examples {examples}: want at least 1")
  on = opened(setup)
  what = on.what
  result = on.evaluate(what.source, examples=examples, seed=setup.seed, halves=halves)
  page = predictions_lib.page(result, setup.seed, halves, what.shown, on.facts, what.notes)
  if jax.process_index() == 0:
    pages.write(target, page)
  return result, what.notes


def stress(
  setup: Setup,
  output: Path,
  names: Sequence[str] = corruptions.NAMES,
  severities: Sequence[int] = corruptions.SEVERITIES,
  console: rich.console.Console | None = None,
) -> tuple[stress_lib.StressResult, tuple[str, ...]]:
  """Measures the cells that `output`/results.jsonl lacks, then writes page and tables.

  Returns: the result, and notes in sentences.
  Raises: CellsError when the file is of other weights, images or prompts; CorruptionError.
  """
  names, severities = tuple(names), tuple(sorted(severities))
  for name in names:
    for severity in severities:
      corruptions.check(name, severity)
  folder = folder_at(output)
  on = opened(setup)
  what, n = on.what, len(on.what.source)
  lines = folder / "results.jsonl"
  measure = stress_cells.Measure(on.digest, what.source.fingerprint, what.prompt_set.fingerprint)
  done, codes, cut = _measured(lines, measure)
  code = code_version.current()
  missing, began = stress_cells.missing(done, names, severities), time.perf_counter()
  with _progress(console or rich.console.Console(quiet=True), "corruptions", missing) as advance:

    def note(corruption: str, severity: int, accuracy: float) -> None:
      nonlocal began
      seconds, began = time.perf_counter() - began, time.perf_counter()
      if jax.process_index() == 0:
        cell = stress_cells.Cell(corruption, severity, accuracy, n, round(seconds, 3), code)
        stress_cells.append(lines, cell, measure)
      advance(1)

    fit, name = on.model.fit, what.name
    result = stress_lib.stress(
      on.top1, what.source, fit, names, severities, name=name, done=done, note=note
    )
  own = stress_cells.cells(names, severities)
  other = code_version.note((codes.get(cell, code) for cell in own), code)
  again = f"{other}; give another --output, or remove {lines}, to measure all anew" if other else ""
  notes = (*(f"{note}." for note in (cut, again) if note), *what.notes)
  if jax.process_index() == 0:
    chance = 1 / len(what.prompt_set.classes)
    images = _pictures(on, names, severities[-1], setup.seed)
    stress_writers.write(folder, result, n, chance, images, on.facts, notes)
  return result, notes


def _measured(
  lines: pathlib.Path, measure: stress_cells.Measure
) -> tuple[stress_cells.Accuracies, stress_cells.Codes, str]:
  """What process 0 has measured already, on all of them; makes the folder there."""
  done: stress_cells.Accuracies = {}
  codes: stress_cells.Codes = {}
  cut = ""
  if jax.process_index() == 0:
    lines.parent.mkdir(parents=True, exist_ok=True)
    done, codes, cut = stress_cells.read(lines, measure)
  mine = [[*cell, share, codes[cell]] for cell, share in done.items()]
  told = json.loads(hosts.from_first(json.dumps(mine).encode()))
  done = {(name, severity): share for name, severity, share, _ in told}
  return done, {(name, severity): code for name, severity, _, code in told}, cut


def _pictures(
  on: Opened, names: Sequence[str], severity: int, seed: int
) -> stress_writers.Pictures:
  """One image, drawn at random, clean and under each corruption."""
  source = on.what.source
  index = int(np.random.default_rng(seed).integers(len(source)))
  image, key = encoding.image_of(on.model, source, index), encoding.read(source, index).key
  corrupted = {name: corruptions.corrupt(image, name, severity, key) for name in names}
  return {"clean": image, **corrupted}


def overlap_with(
  setup: Setup,
  output: Path,
  training: str,
  training_split: str = "train",
  by: str = "hash",
  threshold: float | None = None,
  console: rich.console.Console | None = None,
) -> tuple[overlap_effect.Effect, overlap.Matches, tuple[str, ...]]:
  """Searches near duplicates in training data, measures what they are worth, writes all of it.

  Hashes or embeddings are kept in `output`/cache: the same call goes on after a kill.
  Args: threshold, None: that of THRESHOLDS.
  Returns: the effect; the matches, of which some lie past the threshold; notes in sentences.
  Raises: ChoiceError for training data that is not there; EvaluationError for a bad threshold.
  """
  threshold = THRESHOLDS[by] if threshold is None else threshold
  limit = overlap_writers.widened(by, threshold)
  folder = folder_at(output)
  on = opened(setup)
  what = on.what
  seen = chosen.images_at(training, training_split, on.model.resolution)
  _agree("training images", seen.fingerprint)
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
  with _progress(console or rich.console.Console(quiet=True), "training images", len(seen)) as move:
    matches = _search(on, seen, by, limit, folder / "cache", move)
  overlapping = matches.overlapping(threshold)
  effect = overlap_effect.measure(on.top1, what.source, overlapping, what.name)
  facts = {
    **on.facts,
    "training images": f"{len(seen):,}, sha256 {seen.fingerprint}",
    "near duplicates": f"by {by}, at most {threshold:g} apart",
  }
  if jax.process_index() == 0:
    groups = overlap_writers.sheet(matches, threshold, what.source, seen)
    overlap_writers.write(folder, effect, matches, groups, by, threshold, facts, what.notes)
  return effect, matches, what.notes


def _search(
  on: Opened,
  training: records.RecordSource,
  by: str,
  limit: float,
  cache: pathlib.Path,
  move: Callable[[int], None],
) -> overlap.Matches:
  before = 0

  def progress(read: int) -> None:
    nonlocal before
    move(read - before)
    before = read

  source, batch = on.what.source, on.batch
  if by == "hash":
    return overlap.search_by_hash(
      source, training, int(limit), progress=progress, batch=batch, cache_dir=cache
    )
  return overlap.search_by_embedding(
    on.model,
    source,
    training,
    batch,
    limit,
    progress=progress,
    cache_dir=cache,
    weights_hash=on.digest,
  )
