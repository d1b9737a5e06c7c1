"""The paper's tables measured cell by cell, in a run that can be killed and goes on."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Mapping, Sequence

import jax
import rich.console

from clip_jax import code_version, hosts
from clip_jax.data import bytepairs
from clip_jax.evaluation import datasets, encoding, prompts
from clip_jax.evaluation.paper import cells as paper_cells
from clip_jax.evaluation.paper import efficiency, facts, published, views
from clip_jax.evaluation.paper import models as paper_models
from clip_jax.evaluation.paper import notes as paper_notes
from clip_jax.evaluation.paper import progress as paper_progress
from clip_jax.evaluation.paper import results as paper_results
from clip_jax.evaluation.paper import tables as paper_tables
from clip_jax.evaluation.paper import units as paper_units
from clip_jax.evaluation.paper import verdicts as paper_verdicts
from clip_jax.evaluation.paper import writers as paper_writers
from clip_jax.evaluation.probe import linear_probe, logistic
from clip_jax.evaluation.shifts import robustness as shifts

RESULTS = "results.jsonl"
KINDS = paper_verdicts.KINDS

# Of one cell: the others are measured all the same.
_OF_A_CELL = (
  bytepairs.TokenizerError,  # a prompt longer than this model reads
  datasets.DatasetError,
  encoding.EvaluationError,
  linear_probe.ProbeError,
  logistic.LogisticError,
  prompts.PromptError,
  shifts.ShiftError,
)


class RunError(ValueError):
  """Tables that cannot be measured as asked: what, and why."""


@dataclasses.dataclass(frozen=True)
class Beside:
  """What is measured elsewhere: Figure 2's study, and the models of Figure 13's lines."""

  study: efficiency.Study | None = None
  standard: tuple[shifts.Row, ...] = ()


NOTHING = Beside()


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a run came to: `unavailable` are data sets with how to get them."""

  grids: tuple[paper_tables.Grid, ...]
  measured: int  # figures, in this run
  unavailable: Mapping[str, str]
  failures: tuple[str, ...]  # cells that could not be measured though their data are there
  other_code: str  # in words which figures other versions of the code measured; or ""


def run(
  named: Sequence[paper_models.Named],
  tables: Sequence[str],
  only: Sequence[str],
  settings: paper_units.Settings,
  output: pathlib.Path,
  console: rich.console.Console,
  beside: Beside = NOTHING,
) -> Outcome:
  """Measures what `output`/results.jsonl does not hold yet, and writes the tables into `output`.

  A cell is measured again where its data, prompts or settings are others than in the file, or all
  are (`settings.remeasure`). Ctrl-C and SIGTERM end the run with the tables of what is there; the
  same command goes on. Every process must call it alike; the first one reads and writes. What one
  of them cannot measure, all leave out.
  Args: tables, keys of `published.TABLES`; only, keys of data sets, to measure no others (none:
    all).
  Raises: RunError for tables or data sets that there are not; ResultsError when the file is of
    other weights; as `paper_models.load`; OSError with the file's name.
  """
  keys, wanted = _keys(tables), {paper_units.dataset_of(word).key for word in only}
  units = list(dict.fromkeys(unit for key in keys for unit in views.units(key)))
  chosen = [unit for unit in units if not wanted or unit.dataset.key in wanted]
  if units and not chosen:
    raise RunError(f"none of {', '.join(sorted(wanted))} is in table {', '.join(keys)}")
  if chosen and not (named and settings.roots):
    raise RunError(
      f"table {', '.join(k for k in keys if views.units(k))}: made of what is measured; give "
      "--models NAME=WEIGHTS and --data ROOT"
    )
  state = _Run(settings, output, code_version.current())
  for unit in units:
    if unit not in chosen:
      state.miss(unit, facts.NOT_ASKED)
  state.know(keys, wanted, beside)
  with paper_progress.stoppable():
    last = state.begin(named, chosen)
    try:
      with paper_progress.bar(console, len(named) * len(chosen)) as bar:
        for model in named if chosen else ():
          here = last if last is not None and last.name == model.name else None
          weights = here or paper_models.load(model)
          for unit in chosen:
            state.measure(unit, weights, bar)
    except BaseException:
      with contextlib.suppress(OSError):
        state.write(named, keys, beside)
      raise
    grids = state.write(named, keys, beside)
    other_code = paper_notes.other_code(grids, state.code)
    return Outcome(grids, state.new, state.unavailable, tuple(state.failures), other_code)


def _keys(tables: Sequence[str]) -> list[str]:
  """Raises: RunError for a table that there is not, or none."""
  unknown = [table for table in tables if table not in published.TABLES]
  if unknown or not tables:
    raise RunError(f"table {' '.join(unknown)!r}: choose of {', '.join(published.TABLES)}")
  return list(dict.fromkeys(tables))


class _Run:
  """What is known so far."""

  def __init__(self, settings: paper_units.Settings, output: pathlib.Path, code: str):
    self.settings, self.output, self.code = settings, output, code
    self.first = jax.process_index() == 0
    self.new, self.failures, self.unavailable = 0, list[str](), dict[str, str]()
    self._measured: list[paper_results.Measured] = []
    self._missing: dict[str, dict[str, str]] = {}  # of each table, data set -> why
    self._notes: dict[str, None] = {}
    self._copy_of = paper_units.opener(settings)
    self._facts: dict[str, facts.Filled] = {}  # by table

  def know(self, keys: Sequence[str], wanted: set[str], beside: Beside) -> None:
    """The tables for which nothing is run. Raises: ConfigError for an experiment file."""
    for key in keys:
      if key == "9":
        self._facts[key] = found = facts.sizes(self._copy_of, wanted, self.code)
        self.unavailable |= {k: w for k, w in found.missing.items() if w != facts.NOT_ASKED}
      elif key == "figure2":
        self._facts[key] = facts.ratios(beside.study, self.code)
      elif key in ("18", "19", "20"):
        self._facts[key] = facts.settings(key, self.code)
    for filled in self._facts.values():
      self.failures += filled.failures

  def begin(
    self, named: Sequence[paper_models.Named], units: Sequence[paper_units.Unit]
  ) -> paper_cells.Weights | None:
    """Reads what is measured, before anything is. Returns: the last model, loaded."""
    hashes: dict[str, str] = {}
    weights = None
    for model in named if units else ():
      weights = paper_models.load(model)
      for unit in units:
        hashes |= dict.fromkeys(unit.rows(model.name, self.settings), weights.hash)
    if self.first:
      self.output.mkdir(parents=True, exist_ok=True)
      found = paper_results.read(self.output / RESULTS, hashes)
      self._measured = list(found.measured)
      if found.cut:
        self._notes[found.cut] = None
    return weights

  def miss(self, unit: paper_units.Unit, why: str) -> None:
    of_table = self._missing.setdefault(unit.table, {})
    seen = of_table.get(unit.column)
    of_table[unit.column] = f"{seen}; {why}" if seen and why not in seen else why

  def measure(
    self, unit: paper_units.Unit, weights: paper_cells.Weights, bar: paper_progress.Bar
  ) -> None:
    """One unit of work, unless it is done."""
    title = published.table(unit.table).title
    name = f"{title}, {unit.row(weights.name, self.settings)}, {unit.column}"
    try:
      task = self._task(unit)
      if task is None or self._is_done(task, weights):
        bar.done(name, "")
        return
      began = time.monotonic()
      found = self._measured_by_all(task, weights, bar)
    except datasets.NotAvailable as error:  # of no image here is there anything to measure
      self.miss(unit, str(error))
      bar.done(name, "not available")
      return
    except _OF_A_CELL as error:
      self.failures.append(f"{name}: {error}")
      self.miss(unit, f"{weights.name} could not be measured: {error}")
      bar.done(name, "could not be measured")
      return
    self._keep(task, weights, found, time.monotonic() - began)
    bar.done(name, f"{found.values[0].metric} {found.values[0].percent:.1f}")

  def _measured_by_all(
    self, task: paper_units.Task, weights: paper_cells.Weights, bar: paper_progress.Bar
  ) -> paper_cells.Found:
    """Raises: of _OF_A_CELL, on all processes where it is raised on one."""
    if self.settings.remeasure:  # what other code kept of these weights is of no use
      weights = dataclasses.replace(weights, hash=f"{weights.hash} by {self.code}")
    return encoding.agreed(lambda: paper_cells.measure(task, weights, self.settings, bar.part))

  def _task(self, unit: paper_units.Unit) -> paper_units.Task | None:
    """The unit's data and prompts, the same on all processes; None where they are not available.

    Raises: of _OF_A_CELL, on all processes where it is raised on one.
    """

    def opened() -> paper_units.Task | str:
      try:
        return paper_units.task(unit, self.settings, self._copy_of)
      except datasets.NotAvailable as error:
        return str(error)

    found = encoding.agreed(opened)
    task = None if isinstance(found, str) else found
    said = "not available" if task is None else f"{task.data} {task.prompts}"
    if isinstance(found, str):
      self.miss(unit, found)
      self.unavailable.setdefault(unit.dataset.key, found)
    else:
      self._notes |= dict.fromkeys(found.notes)
    if hosts.from_first(said.encode()).decode() != said:
      raise RunError(
        f"{unit.dataset.key}: process {jax.process_index()} has other data or prompts than process "
        "0; give all of them the same"
      )
    return task

  def _is_done(self, task: paper_units.Task, weights: paper_cells.Weights) -> bool:
    """Whether all figures are there, of these data and prompts; others of the cell are dropped."""
    unit, now = task.unit, (task.data, task.prompts)
    rows = [
      {(unit.table, row, unit.column, metric) for metric in unit.metrics}
      for row in unit.rows(weights.name, self.settings)
    ]
    latest = {m.key: m for m in self._measured if any(m.key in keys for keys in rows)}
    same = {key for key, m in latest.items() if (m.data, m.prompts) == now}
    there = not self.settings.remeasure and any(keys <= same for keys in rows)
    done = hosts.from_first(b"1" if there else b"0") == b"1"
    drop = set(latest) - (same if done else set())
    self._measured = [m for m in self._measured if m.key not in drop]
    return done

  def _keep(
    self,
    task: paper_units.Task,
    weights: paper_cells.Weights,
    found: paper_cells.Found,
    seconds: float,
  ) -> None:
    unit = task.unit
    for value in found.values:
      measured = paper_results.Measured(
        table=unit.table,
        model=unit.row(weights.name, self.settings, bool(found.left_out)),
        dataset=unit.column,
        metric=value.metric,
        value=value.percent,
        n=value.n,
        weights=weights.hash,
        data=task.data,
        prompts=task.prompts,
        code=self.code,
        seconds=round(seconds, 3),
        left_out=found.left_out,
        fits=found.fits,
      )
      self._measured.append(measured)
      self.new += 1
      if self.first:
        paper_results.append(self.output / RESULTS, measured)

  def write(
    self, named: Sequence[paper_models.Named], keys: Sequence[str], beside: Beside
  ) -> tuple[paper_tables.Grid, ...]:
    """The tables of what is there; the first process alone writes them."""
    grids: list[paper_tables.Grid] = []
    latest = list({m.key: m for m in self._measured}.values())
    notes = dict.fromkeys(self._notes)
    for key in keys:
      units = views.units(key)
      rows = [(u.table, u.row(model.name, self.settings)) for model in named for u in units]
      filled = self._facts.get(key)
      if filled is None and key in paper_units.TABLES:
        rows += [(key, m.model) for m in self._measured if m.table == key]  # of earlier runs too
        names = list(dict.fromkeys(name for _, name in rows))
        filled = facts.Filled(self._measured, self._missing.get(key, {}), names)
      elif filled is None:
        filled = views.fill(key, self._measured, rows, self._missing, beside.standard)
      grids += paper_tables.compare(filled.measured, [key], filled.rows, filled.missing)
      notes |= dict.fromkeys(filled.notes)
    if self.first:
      large = {unit.table for key in keys for unit in views.units(key)}
      shown = [m for m in latest if m.table in large]
      notes |= dict.fromkeys(paper_notes.left_out(shown))
      notes |= dict.fromkeys([paper_notes.other_code(grids, self.code)])
      notes.pop("", None)
      paper_writers.write(self.output, grids, shown, tuple(notes), paper_notes.fits(grids))
    return tuple(grids)
