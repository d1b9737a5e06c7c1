"""The compared tables for people and programs: Markdown, LaTeX, CSV, JSON lines and a page."""

import csv
import io
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from clip_jax import metrics
from clip_jax.evaluation.markdown import escaped, heading, row
from clip_jax.evaluation.paper import clip_benchmark, verdicts
from clip_jax.evaluation.paper import page as paper_page
from clip_jax.evaluation.paper import results as paper_results
from clip_jax.evaluation.paper import tables as paper_tables
from clip_jax.evaluation.paper.page import NONE_BELOW, Below

_LATEX_MARKS: Mapping[verdicts.Kind, str] = {
  "reproduced": r"$\surd$",
  "as configured": "$=$",
  "off": r"$\times$",
  "known to differ": r"$\diamond$",
  "not available": "--",
  "not published": r"$\circ$",
}
_LATEX = {
  "\\": r"\textbackslash{}",
  "~": r"\textasciitilde{}",
  "^": r"\textasciicircum{}",
  **{c: "\\" + c for c in "&%$#_{}"},
}
_FIELDS = ("table", "model", "dataset", "metric", "measured", "published", "difference", "verdict")
_FIELDS_OF_RUN = ("n", "weights", "data", "prompts", "code", "seconds")


def write(
  folder: str | os.PathLike[str],
  grids: Sequence[paper_tables.Grid],
  measured: Sequence[paper_results.Measured],
  notes: Sequence[str] = (),
  below: Below = NONE_BELOW,
) -> tuple[pathlib.Path, ...]:
  """Writes paper.md, .tex, .csv, .jsonl, .html and what CLIP_benchmark's users read; the paths.

  Args: measured, what CLIP_benchmark's files hold; notes, what a reader must know, such as that
    the results file had a cut line; below, the same of each table by its key.
    Every file appears whole or not at all.
  Raises: OSError with the file's name, when it cannot be written.
  """
  folder = pathlib.Path(folder)
  texts = {
    "paper.md": markdown(grids, notes, below),
    "paper.tex": latex(grids, below),
    "paper.csv": table_csv(grids),
    "paper.jsonl": json_lines(grids),
    "paper.html": paper_page.page(grids, notes, below),
    "clip_benchmark.csv": clip_benchmark.build(clip_benchmark.results(measured)),
  }
  for result in clip_benchmark.results(measured):
    texts[f"clip_benchmark/{clip_benchmark.file_name(result)}"] = json.dumps(result) + "\n"
  for name, text in texts.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_atomically(path, text)
  return tuple(folder / name for name in texts)


def turned(grid: paper_tables.Grid) -> bool:
  """Whether a table is too wide for a page of text and stands better on its side."""
  return len(grid.columns) > max(10, len(grid.rows))


def _lines(grid: paper_tables.Grid) -> tuple[Sequence[str], Sequence[Sequence[str]], bool]:
  """The heads of a table as text shows it, with a first empty one, and its rows of labels."""
  if turned(grid):
    return ["", *grid.rows], [[column, *grid.rows] for column in grid.columns], True
  return ["", *grid.columns], [[row, *grid.columns] for row in grid.rows], False


def _cells(grid: paper_tables.Grid) -> Iterator[tuple[str, list[paper_tables.Comparison]]]:
  """Rows of a table as text shows it: the label and the comparisons."""
  _, rows, on_side = _lines(grid)
  for label, *others in rows:
    yield label, [grid.cells[(o, label) if on_side else (label, o)] for o in others]


def markdown(
  grids: Sequence[paper_tables.Grid], notes: Sequence[str] = (), below: Below = NONE_BELOW
) -> str:
  """Every table as `measured mark (published)`, with the reasons beneath it."""
  out = ["# Measured beside published", "", verdicts.RULE, ""]
  out += [f"- {verdicts.MARKS[kind]} {kind}: {verdicts.MEANINGS[kind]}" for kind in verdicts.KINDS]
  out.append("")
  out += [f"- {escaped(note)}" for note in notes] + ([""] if notes else [])
  for grid in grids:
    heads, _, _ = _lines(grid)
    out += [f"## {grid.table.title}: {grid.table.caption}", "", _counts(grid), ""]
    out += heading([escaped(head) for head in heads])
    for label, comparisons in _cells(grid):
      out.append(row([escaped(label), *(_markdown_cell(c) for c in comparisons)]))
    out.append("")
    for kind, why, where in grid.all_reasons():
      mark, places = verdicts.MARKS[kind], escaped("; ".join(where))
      out.append(f"- {mark} {kind}: {escaped(why)} ({places})")
    out += [f"- {escaped(note)}" for note in below.get(grid.table.key, ())]
    out.append("")
  return "\n".join(out).rstrip() + "\n"


def _markdown_cell(c: paper_tables.Comparison) -> str:
  theirs = f" ({escaped(c.cell.value)})" if c.cell.value else ""
  if c.measured is None:
    return f"not available{theirs}" if c.kind == "not available" else "not published"
  return f"{escaped(c.shown)} {verdicts.MARKS[c.kind]}{theirs}"


def _counts(grid: paper_tables.Grid) -> str:
  counts = grid.counts.items()
  return ", ".join(f"{verdicts.MARKS[kind]} {number} {kind}" for kind, number in counts)


def latex(grids: Sequence[paper_tables.Grid], below: Below = NONE_BELOW) -> str:
  """Tables for `\\input`; they want the packages booktabs and graphicx."""
  out = [r"% \usepackage{booktabs,graphicx}", f"% {verdicts.RULE}"]
  for grid in grids:
    heads, _, _ = _lines(grid)
    marks = "; ".join(f"{_LATEX_MARKS[k]} {k}" for k in grid.counts)
    out += [r"\begin{table}", r"\centering"]
    out.append(
      rf"\caption{{{_latex(grid.table.title)}. {_latex(grid.table.caption)}: measured, "
      rf"and published in brackets; {marks}.}}"
    )
    out += [r"\resizebox{\textwidth}{!}{%", rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}"]
    out += [r"\toprule", " & ".join(map(_latex, heads)) + r" \\", r"\midrule"]
    for label, comparisons in _cells(grid):
      out.append(" & ".join([_latex(label), *map(_latex_cell, comparisons)]) + r" \\")
    out += [r"\bottomrule", r"\end{tabular}}"]
    for kind, why, where in grid.all_reasons():
      words = f"{_latex(kind)}: {_latex(why)} ({_latex('; '.join(where))})"
      out.append(rf"\par\footnotesize\raggedright {_LATEX_MARKS[kind]} {words}")
    for note in below.get(grid.table.key, ()):
      out.append(rf"\par\footnotesize\raggedright {_latex(note)}")
    out += [r"\end{table}", ""]
  return "\n".join(out)


def _latex_cell(c: paper_tables.Comparison) -> str:
  theirs = f" ({_latex(c.cell.value)})" if c.cell.value else ""
  if c.measured is None:
    return f"not available{theirs}" if c.kind == "not available" else "not published"
  return f"{_latex(c.shown)} {_LATEX_MARKS[c.kind]}{theirs}"


def _latex(text: str) -> str:
  return "".join(_LATEX.get(c, c) for c in text)


def _record(c: paper_tables.Comparison) -> dict[str, str | int | float | None]:
  """A comparison as a flat record; null (an empty field) is what is not there."""
  cell, run = c.cell, c.measured
  values = (c.shown or None, cell.value or None, c.difference or None, c.kind)
  names = (cell.table, cell.model, cell.dataset, cell.metric)
  record = dict(zip(_FIELDS, (*names, *values), strict=True))
  return {
    **record,
    "why": c.why,
    **{name: getattr(run, name) if run else None for name in _FIELDS_OF_RUN},
  }


def table_csv(grids: Sequence[paper_tables.Grid]) -> str:
  """One line a cell, with its verdict and all that made it."""
  out = io.StringIO()
  writer = csv.DictWriter(out, (*_FIELDS, "why", *_FIELDS_OF_RUN), lineterminator="\n")
  writer.writeheader()
  writer.writerows(_record(c) for grid in grids for c in grid.cells.values())
  return out.getvalue()


def json_lines(grids: Sequence[paper_tables.Grid]) -> str:
  """The same as JSON lines; `measured` is text in the printed digits, `value` every digit."""
  return "".join(
    json.dumps({**_record(c), "value": c.measured.value if c.measured else None}) + "\n"
    for grid in grids
    for c in grid.cells.values()
  )
