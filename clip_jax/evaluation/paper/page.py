"""The compared tables as one page of HTML, with all that made a figure behind each cell."""

from collections.abc import Mapping, Sequence

from clip_jax.evaluation import pages
from clip_jax.evaluation.paper import charts, published_notes
from clip_jax.evaluation.paper import tables as paper_tables
from clip_jax.evaluation.paper import verdicts as paper_verdicts

Below = Mapping[str, Sequence[str]]  # a table's key -> what a reader must know of it
NONE_BELOW: Below = {}


def page(
  grids: Sequence[paper_tables.Grid], notes: Sequence[str] = (), below: Below = NONE_BELOW
) -> str:
  """One page of HTML that holds its style, without scripts; nothing is fetched."""
  runs = [c.measured for grid in grids for c in grid.cells.values() if c.measured]
  return pages.render(
    "paper.html.j2",
    grids=grids,
    notes=notes,
    below=below,
    kinds=paper_verdicts.KINDS,
    marks=paper_verdicts.MARKS,
    meanings=paper_verdicts.MEANINGS,
    rule=paper_verdicts.RULE,
    provenance=provenance,
    chart=charts.chart,
    chart_width=charts.WIDTH,
    weights=sorted({(m.model, m.weights) for m in runs if m.weights}),
    codes=sorted({m.code for m in runs if m.code}),
  )


def provenance(c: paper_tables.Comparison) -> str:
  """All that is known of a cell, a line each."""
  cell, run = c.cell, c.measured
  lines = [", ".join(n for n in (cell.model, cell.dataset, cell.metric) if n), c.verdict]
  if run:
    lines.append(f"measured {run.value}" + (f" on {run.n:,} images" if run.n else ""))
  if cell.value:
    lines.append(f"published {cell.value}" + (f", difference {c.difference}" * bool(c.difference)))
    known = published_notes.known_difference(cell)
    lines += [f"see {known.source}"] if known and known.source else []
    for r in published_notes.references(cell):
      lines.append(f"{r.source}: {r.metric} {r.value}" + (f" ({r.note})" if r.note else ""))
  if run:
    for name in ("weights", "data", "prompts", "code"):
      lines.append(f"{name} {getattr(run, name) or 'none'}")
    lines += [f"lambda {fit.lambda_:g}, {fit.iterations:,} iterations" for fit in run.fits]
    lines.append(f"{run.seconds:.1f} seconds")
  return "\n".join(lines)
