"""Measured figures beside the paper's: for every cell the difference and a verdict."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from clip_jax.evaluation.paper import published, published_notes
from clip_jax.evaluation.paper import results as paper_results
from clip_jax.evaluation.paper import verdicts as paper_verdicts

_NOT_PRINTED = "the paper prints no figure here"
# Tables that any model can have a row in.
_OF_MODELS = ("1", "10", "11", "13", "14", "15", "figure13")
_OWN = "the paper's table has no such model or dataset"


class TablesError(ValueError):
  """Measured cells that cannot stand in a table: which, and why."""


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A cell of a table: what was measured, what is published, and what to make of both.

  `shown` is the measured value in the digits of the published one, `why` the verdict's reason.
  """

  cell: published.Cell  # its value is empty where none is published
  measured: paper_results.Measured | None
  shown: str
  difference: str
  kind: paper_verdicts.Kind
  why: str

  @property
  def verdict(self) -> str:
    """In words: "reproduced: within 0.5", "off by +1.2", "not available: how to get it"."""
    if self.kind == "off":
      by = f"off by {self.difference}" if self.difference else "off"
      return f"{by}: {self.why}" if self.why else by
    return f"{self.kind}: {self.why}"


@dataclasses.dataclass(frozen=True)
class Grid:
  """A table as it is printed: the comparison of every row and column."""

  table: published.Table
  rows: tuple[str, ...]
  columns: tuple[str, ...]
  cells: Mapping[tuple[str, str], Comparison]

  @property
  def counts(self) -> Mapping[paper_verdicts.Kind, int]:
    """How many cells there are of each kind."""
    found = collections.Counter(c.kind for c in self.cells.values())
    return {kind: found[kind] for kind in paper_verdicts.KINDS if found[kind]}

  def reasons(self, kind: paper_verdicts.Kind) -> Mapping[str, tuple[str, ...]]:
    """Why cells of that kind are so -> where: the columns (or rows) that it is true of."""
    out: dict[str, dict[str, None]] = {}
    by_row = "dataset" in self.table.row or "metric" in self.table.row
    for (row, column), c in self.cells.items():
      if c.kind == kind:
        out.setdefault(c.why, {})[row if by_row else column] = None
    return {why: tuple(where) for why, where in out.items()}

  def all_reasons(self) -> tuple[tuple[paper_verdicts.Kind, str, tuple[str, ...]], ...]:
    """The reasons of all cells that are not as published: the verdict, why, and where."""
    kinds = [k for k in paper_verdicts.KINDS if k not in ("reproduced", "as configured")]
    return tuple((k, why, where) for k in kinds for why, where in self.reasons(k).items() if why)


def compare(
  measured: Iterable[paper_results.Measured],
  tables: Sequence[str],
  models: Sequence[str] = (),
  missing: Mapping[str, str] | None = None,
) -> tuple[Grid, ...]:
  """The tables of those keys with every cell compared. Of a cell measured twice the later counts.

  Args: models, to show only these of Table 10's models, and these whether measured or not (all of
    them and whatever was measured, where it is empty); missing, what to tell of models and datasets
    that are not there: their name -> how to get it.
  Raises: TablesError where a metric is not the one that the paper prints; PublishedError for a
    table that there is not.
  """
  latest = {m.key: m for m in measured}.values()
  return tuple(
    _grid(published.table(key), [m for m in latest if m.table == key], models, missing or {})
    for key in dict.fromkeys(tables)
  )


@dataclasses.dataclass(frozen=True)
class _Line:
  """A row or a column: the names it stands for, and whether the paper has it."""

  names: Mapping[str, str]
  theirs: bool


def _grid(
  table: published.Table,
  measured: Sequence[paper_results.Measured],
  models: Sequence[str],
  missing: Mapping[str, str],
) -> Grid:
  rows: dict[str, _Line] = {}
  columns: dict[str, _Line] = {}
  cells: dict[tuple[str, str], published.Cell] = {}
  own = [published.Cell(m.table, m.model, m.dataset, m.metric, "") for m in measured]
  theirs = published.places(table.key)
  names = table.column if "metric" in table.row else (*table.column, "metric")
  for i, cell in enumerate((*theirs, *own)):
    row, column = _place(table, cell)
    rows.setdefault(row, _Line({n: getattr(cell, n) for n in table.row}, i < len(theirs)))
    line = _Line({n: getattr(cell, n) for n in names}, i < len(theirs))
    expected = columns.setdefault(column, line).names
    if expected != line.names:
      raise TablesError(
        f"{table.title}, {row}, {column}: measured as {cell.metric!r} where the column has "
        f"{expected['metric']!r}; measure that"
      )
    cells.setdefault((row, column), cell)
  if models and table.row == ("model",):
    drop = {cell.model for cell in published.cells("10")} - set(models)
    rows = {row: line for row, line in rows.items() if row not in drop}
    if table.key in _OF_MODELS:
      rows |= {name: _Line({"model": name}, False) for name in models if name not in rows}
  found = {_place(table, published.Cell(*m.key, value="")): m for m in measured}
  out = {}
  for row, of_row in rows.items():
    for column, of_column in columns.items():
      names_of = {"model": "", "dataset": "", "metric": "", **of_row.names, **of_column.names}
      cell = cells.get((row, column)) or published.Cell(table.key, **names_of, value="")
      known = of_row.theirs and of_column.theirs
      out[row, column] = _comparison(cell, found.get((row, column)), known, missing)
  return Grid(table, tuple(rows), tuple(columns), out)


def _place(table: published.Table, cell: published.Cell) -> tuple[str, str]:
  """Raises: TablesError where a name that the row or the column is called by is empty."""
  row, column = table.place(cell.model, cell.dataset, cell.metric)
  if not row or not column:
    raise TablesError(
      f"{table.title}: a cell of model {cell.model!r}, dataset {cell.dataset!r} and metric "
      f"{cell.metric!r} has no place; its {' and '.join((*table.row, *table.column))} must be named"
    )
  return row, column


def _comparison(
  cell: published.Cell,
  measured: paper_results.Measured | None,
  theirs: bool,
  missing: Mapping[str, str],
) -> Comparison:
  """`theirs`: the paper has the row and the column, though it may print nothing where they meet."""
  if measured is None:
    if theirs and not cell.value:
      return Comparison(cell, None, "", "", "not published", _NOT_PRINTED)
    how = [missing[name] for name in (cell.model, cell.dataset) if name in missing]
    never = published_notes.never(cell.model, cell.dataset)
    why = never or "; ".join(dict.fromkeys(how))
    why = why or published_notes.how_to_get(cell.model, cell.dataset)
    return Comparison(cell, None, "", "", "not available", why)
  shown = paper_verdicts.as_printed(measured.value, cell.value)
  if not cell.value:
    why = _NOT_PRINTED if theirs else _OWN
    return Comparison(cell, measured, shown, "", "not published", why)
  difference = paper_verdicts.difference_of(measured.value, cell.value)
  rule = published.TABLES[cell.table].rule
  if difference and rule == "exact":
    shown = str(measured.value)  # every digit: here any difference counts
  elif rule == "ratio" and "." not in cell.value and float(measured.value) < 10:
    shown = f"{float(measured.value):.2g}"  # of a printed 3 one digit says too little
  words = "" if difference is None else paper_verdicts.signed(difference, cell.value)
  kind, why = paper_verdicts.judge(cell, measured, difference)
  return Comparison(cell, measured, shown, words, kind, why)
