"""The verbs of `clip-jax` that measure: `evaluate` and `paper`."""

import argparse
import pathlib
from collections.abc import Sequence

import rich.console
import rich.table

from clip_jax.cli_output import UsageError, show


def evaluate(options: argparse.Namespace, _: Sequence[str]) -> int:
  """The tasks of a run's config."""
  from clip_jax import summary
  from clip_jax.evaluation import report

  page = pathlib.Path(options.report) if options.report else None
  if page is not None and not page.absolute().parent.is_dir():
    raise UsageError(f"--report {page}: there is no folder {page.absolute().parent}")
  facts, results = summary.finish(pathlib.Path(options.weights), page)
  if not results:
    raise UsageError(f"--weights {options.weights}: its config has no evaluation tasks")
  show(options, report.table(results), facts)
  return 0


def paper(options: argparse.Namespace, _: Sequence[str]) -> int:
  """The paper's tables."""
  from clip_jax import hosts

  hosts.start(
    options.coordinator, options.processes, options.process, heartbeat_seconds=options.heartbeat
  )
  with hosts.watched(options.heartbeat):
    failures = _paper_here(options)
  if failures:  # told when all have come to their end: it ends no other process
    raise UsageError(
      f"{len(failures)} of the cells could not be measured; the first: {failures[0]}"
    )
  return 0


def _paper_here(options: argparse.Namespace) -> tuple[str, ...]:
  """Returns: the cells that could not be measured, and why."""
  import jax

  from clip_jax.evaluation.paper import efficiency
  from clip_jax.evaluation.paper import models as paper_models
  from clip_jax.evaluation.paper import run as paper_run
  from clip_jax.evaluation.paper import units as paper_units
  from clip_jax.evaluation.shifts import robustness

  missing = [root for root in options.data if not pathlib.Path(root).is_dir()]
  if missing:
    raise UsageError(f"--data {missing[0]}: no such folder; give folders with data sets below them")
  if options.batch < 1 or options.limit < 0:
    raise UsageError(f"--batch {options.batch} --limit {options.limit}: at least 1, and 0 or more")
  named = paper_models.parse(options.models) if options.models else ()
  output = pathlib.Path(options.output)
  settings = paper_units.Settings(
    roots=tuple(map(pathlib.Path, options.data)),
    cache=pathlib.Path(options.cache) if options.cache else output / "cache",
    batch=options.batch,
    limit=options.limit,
    skip_unreadable=options.corrupt_images == "skip",
    remeasure=options.remeasure,
    features=options.features,
    caption_prefix=options.caption_prefix,
    prompt_sets=paper_units.read_prompts(options.prompts),
  )
  beside = paper_run.Beside(
    study=efficiency.read(options.predictive) if options.predictive else None,
    standard=robustness.read(options.standard_models) if options.standard_models else (),
  )
  first = jax.process_index() == 0
  console = rich.console.Console(stderr=options.json, quiet=not first)
  tables = [word for word in options.tables.lower().replace(" ", ",").split(",") if word]
  found = paper_run.run(named, tables, options.datasets, settings, output, console, beside)
  table = rich.table.Table("table", *paper_run.KINDS)
  for grid in found.grids:
    counts = [grid.counts.get(kind, 0) for kind in paper_run.KINDS]
    table.add_row(grid.table.title, *map(str, counts))
  facts = {
    "output": str(output),
    "measured_now": found.measured,
    "tables": {grid.table.key: dict(grid.counts) for grid in found.grids},
    "not_available": dict(found.unavailable),
    "failures": list(found.failures),
    "other_code": found.other_code,
  }
  if first:
    show(options, table, facts)
  lines = [f"page: {output / 'paper.html'}"]
  if found.other_code:
    lines.append(f"note: {found.other_code}")
  if found.unavailable:
    names = ", ".join(found.unavailable)
    lines.append(f"not available: {names}; how to get them: {output / 'paper.md'}")
  for line in lines:  # paths in them, which must not be broken at the terminal's width
    console.print(line, soft_wrap=True, markup=False, highlight=False)
  return found.failures
