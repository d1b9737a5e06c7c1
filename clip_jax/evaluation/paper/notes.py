"""What a reader of measured figures must know of them: images left out, other code, odd fits."""

from collections.abc import Iterable, Mapping, Sequence

from clip_jax import code_version
from clip_jax.evaluation.paper import results as paper_results
from clip_jax.evaluation.paper import tables as paper_tables
from clip_jax.evaluation.probe import linear_probe


def left_out(measured: Iterable[paper_results.Measured]) -> tuple[str, ...]:
  """Where the images are that figures do without, in test or in training."""
  every = ((m.dataset, where) for m in measured for where in m.left_out)
  found = (f"{key}: left out, its image cannot be decoded: {where}" for key, where in every)
  return tuple(dict.fromkeys(found))


def other_code(grids: Iterable[paper_tables.Grid], now: str) -> str:
  """Which versions of the code measured the figures shown; "" where all are of `now`."""
  shown = (c.measured for grid in grids for c in grid.cells.values() if c.measured)
  said = code_version.note((m.code for m in shown if m.code), now)
  return f"{said}; --remeasure measures what is asked for again" if said else ""


def fits(grids: Iterable[paper_tables.Grid]) -> Mapping[str, Sequence[str]]:
  """Of each table with probes: what speaks against how they were fitted, and where."""
  out: dict[str, list[str]] = {}
  for grid in grids:
    for (row, column), c in grid.cells.items():
      of_cell = c.measured.fits if c.measured and c.measured.n else ()  # of no mean of others
      said = linear_probe.doubts([f.lambda_ for f in of_cell], [f.converged for f in of_cell])
      out.setdefault(grid.table.key, []).extend(f"{row}, {column}: {words}" for words in said)
  return {key: found for key, found in out.items() if found}
