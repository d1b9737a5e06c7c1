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

  A cell is measured again where its data, prompts or settings are others than in the file. Ctrl-C
  and SIGTERM end the run with the tables of what is there; the same command goes on. Every process
  must call it alike; the first one reads and writes.
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
    return Outcome(grids, state.new, state.unavailable, tuple(state.failures))


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
      hashes |= {unit.row(model.name, self.settings): weights.hash for unit in units}
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
      found = paper_cells.measure(task, weights, self.settings, bar.part)
    except datasets.NotAvailable as error:  # of no image here is there anything to measure
      self.miss(unit, str(error))
      bar.done(name, "not available")
      return
    except _OF_A_CELL as error:
      if jax.process_count() > 1:  # the others may be waiting for this one
        raise
      self.failures.append(f"{name}: {error}")
      self.miss(unit, f"{weights.name} could not be measured: {error}")
      bar.done(name, "could not be measured")
      return
    self._keep(task, weights, found, time.monotonic() - began)
    bar.done(name, f"{found.values[0].metric} {found.values[0].percent:.1f}")

  def _task(self, unit: paper_units.Unit) -> paper_units.Task | None:
    """The unit's data and prompts, the same on all processes; None where they are not available."""
    task, said = None, "not available"
    try:
      task = paper_units.task(unit, self.settings, self._copy_of)
      said = f"{task.data} {task.prompts}"
      self._notes |= dict.fromkeys(task.notes)
    except datasets.NotAvailable as error:
      self.miss(unit, str(error))
      self.unavailable.setdefault(unit.dataset.key, str(error))
    if hosts.from_first(said.encode()).decode() != said:
      raise RunError(
        f"{unit.dataset.key}: process {jax.process_index()} has other data or prompts than process "
        "0; give all of them the same"
      )
    return task

  def _is_done(self, task: paper_units.Task, weights: paper_cells.Weights) -> bool:
    """Whether all figures are there, of these data and prompts; others of the cell are dropped."""
    unit, row = task.unit, task.unit.row(weights.name, self.settings)
    keys = {(unit.table, row, unit.column, metric) for metric in unit.metrics}
    latest = {m.key: m for m in self._measured if m.key in keys}
    same = {k for k, m in latest.items() if (m.data, m.prompts) == (task.data, task.prompts)}
    done = hosts.from_first(b"1" if same == keys else b"0") == b"1"
    if not done:
      self._measured = [m for m in self._measured if m.key not in keys]
    return done

  def _keep(
    self,
    task: paper_units.Task,
    weights: paper_cells.Weights,
    found: paper_cells.Found,
    seconds: float,
  ) -> None:
    unit = task.unit
    key = unit.dataset.key
    left_out = (f"{key}: left out, its image cannot be decoded: {w}" for w in found.left_out)
    self._notes |= dict.fromkeys(left_out)
    for value in found.values:
      measured = paper_results.Measured(
        table=unit.table,
        model=unit.row(weights.name, self.settings),
        dataset=unit.column,
        metric=value.metric,
        value=value.percent,
        n=value.n,
        weights=weights.hash,
        data=task.data,
        prompts=task.prompts,
        code=self.code,
        seconds=round(seconds, 3),
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
      shown = [m for m in self._measured if m.table in large]
      paper_writers.write(self.output, grids, shown, tuple(notes))
    return tuple(grids)
