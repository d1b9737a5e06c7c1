"""Probes for people and programs: a page with the few-shot curve, Markdown, CSV."""

import csv
import io
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from clip_jax import metrics
from clip_jax.evaluation import pages
from clip_jax.evaluation.markdown import escaped, heading, row
from clip_jax.evaluation.probe import cells, drawing
from clip_jax.evaluation.probe.study import Study

_FIELDS = (
  *("way", "shots", "seed", "metric", "score", "images", "examples"),
  *("lambda", "iterations", "converged"),
)


def write(
  folder: str | os.PathLike[str],
  study: Study,
  facts: Mapping[str, str],
  notes: Sequence[str] = (),
) -> tuple[pathlib.Path, ...]:
  """Writes probe.html, .md and .csv into `folder`; the paths. Every file appears whole.

  Args: facts, what made the figures; notes, in sentences.
  Raises: OSError with the file's name, when it cannot be written.
  """
  folder = pathlib.Path(folder)
  texts = {"probe.md": markdown(study, facts, notes), "probe.csv": table_csv(study)}
  for name, text in texts.items():
    metrics.write_atomically(folder / name, text)
  pages.write(folder / "probe.html", page(study, facts, notes))
  return tuple(folder / name for name in ("probe.html", *texts))


def page(study: Study, facts: Mapping[str, str], notes: Sequence[str] = ()) -> str:
  """One page of HTML that holds its drawing; arguments as of `write`."""
  return pages.render(
    "probe.html.j2",
    study=study,
    drawing=drawing.draw(study) if study.few else None,
    plot=drawing,
    equal=equal_words(study),
    full=full_rows(study),
    facts=facts,
    notes=notes,
  )


def equal_words(study: Study) -> str:
  """How many examples zero-shot is worth, as a sentence; "" where nothing was compared."""
  equal = study.equal
  if equal is None:
    return ""
  if equal.bound == "less than":
    return f"A probe of {study.few[0].shots} a class is better than zero-shot already."
  if equal.bound:
    return "Zero-shot is better than the probe of all examples."
  return f"Zero-shot is as good as a probe of {equal} labelled examples a class."


def full_rows(study: Study) -> dict[str, str]:
  """The probe of all examples, for people."""
  full = study.full
  return {
    study.metric: pages.percent(full.score),
    "training examples": f"{full.examples:,} ({study.examples_a_class:,.1f} a class)",
    "lambda": f"{full.lambda_:.4g}",
    "iterations of the last fit": f"{full.iterations:,}",
    "converged": "yes" if full.converged else "no",
  }


def markdown(study: Study, facts: Mapping[str, str], notes: Sequence[str] = ()) -> str:
  """Scores in per cent."""
  out = [f"# {escaped(study.name)}: linear probe", "", f"- metric: {escaped(study.metric)}"]
  if study.zero_shot is not None:
    out.append(f"- zero-shot: {100 * study.zero_shot.score:.2f} % of {study.zero_shot.n:,} images")
  out.append(f"- linear probe: {100 * study.full.score:.2f} % of {study.full.n:,} images")
  out += [f"- linear probe, {name}: {value}" for name, value in list(full_rows(study).items())[1:]]
  if words := equal_words(study):
    out.append(f"- {words}")
  if study.few:
    seeds = [f"seed {cell.seed}" for cell in study.few[0].cells]
    out += ["", *heading(["examples a class", "mean", *seeds])]
    for few in study.few:
      scores = (few.mean, *(cell.score for cell in few.cells))
      out.append(row([str(few.shots), *(f"{100 * score:.2f}" for score in scores)]))
  out += ["", *(f"- {escaped(note)}" for note in notes)]
  out += [f"- {name}: {escaped(value)}" for name, value in facts.items()]
  return "\n".join(out) + "\n"


def table_csv(study: Study) -> str:
  """One line a figure; what there is none of is empty."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow(_FIELDS)
  for cell in _cells(study):
    converged = {True: "yes", False: "no", None: ""}[cell.converged]
    line = [cell.way, cell.shots, cell.seed, study.metric, cell.score, cell.n, cell.examples]
    writer.writerow([*line, cell.lambda_, cell.iterations, converged])
  return out.getvalue()


def _cells(study: Study) -> Iterator[cells.Cell]:
  if study.zero_shot is not None:
    yield study.zero_shot
  for few in study.few:
    yield from few.cells
  yield study.full
