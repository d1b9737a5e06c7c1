"""A stress test for people and programs: a page with curves, Markdown, CSV."""

import csv
import io
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from clip_jax import metrics
from clip_jax.evaluation import pages
from clip_jax.evaluation.markdown import escaped, heading, row
from clip_jax.evaluation.stress import corruptions
from clip_jax.evaluation.stress import curves as stress

Pictures = Mapping[str, np.ndarray]  # "clean" or a corruption -> uint8 [R, R, 3]
_FIELDS = ("corruption", "group", "severity", "accuracy", "images")


def write(
  folder: str | os.PathLike[str],
  result: stress.StressResult,
  n: int,
  chance: float,
  pictures: Pictures,
  facts: Mapping[str, str],
  notes: Sequence[str] = (),
) -> tuple[pathlib.Path, ...]:
  """Writes stress.html, .md and .csv into `folder`; the paths. Every file appears whole.

  Args: n, images; chance, the accuracy of a guess; pictures, one image under each corruption at the
    highest severity; facts, what made the figures; notes, in sentences.
  Raises: OSError with the file's name, when it cannot be written.
  """
  folder = pathlib.Path(folder)
  texts = {"stress.md": markdown(result, n, facts, notes), "stress.csv": table_csv(result, n)}
  for name, text in texts.items():
    metrics.write_atomically(folder / name, text)
  pages.write(folder / "stress.html", page(result, n, chance, pictures, facts, notes))
  return tuple(folder / name for name in ("stress.html", *texts))


def groups(result: stress.StressResult) -> dict[str, tuple[str, ...]]:
  """The corruptions of the result by kind."""
  found = {
    group: tuple(name for name in names if name in result.accuracy)
    for group, names in corruptions.GROUPS.items()
  }
  return {group: names for group, names in found.items() if names}


def _rows(result: stress.StressResult) -> Iterator[tuple[str, tuple[float, ...], float]]:
  """Lines of a table: the corruption, its accuracy at each severity, the mean of these."""
  for names in groups(result).values():
    for name in names:
      yield name.replace("_", " "), result.accuracy[name], result.means[name]
  if len(result.accuracy) > 1:
    yield "mean", result.by_severity, result.mean


def page(
  result: stress.StressResult,
  n: int,
  chance: float,
  pictures: Pictures,
  facts: Mapping[str, str],
  notes: Sequence[str] = (),
) -> str:
  """One page of HTML that holds its curves and pictures; arguments as of `write`."""
  panels = stress.panels(result, chance)
  by_name = dict(zip(result.accuracy, panels[1:], strict=True))
  return pages.render(
    "stress.html.j2",
    result=result,
    n=n,
    mean=panels[0],
    groups=[(group, [by_name[name] for name in names]) for group, names in groups(result).items()],
    rows=list(_rows(result)),
    pictures={name.replace("_", " "): image for name, image in pictures.items()},
    relative=result.relative(result.mean),
    facts=facts,
    notes=notes,
  )


def markdown(
  result: stress.StressResult, n: int, facts: Mapping[str, str], notes: Sequence[str] = ()
) -> str:
  """The table of accuracies in per cent."""
  heads = ["corruption", *(f"severity {s}" for s in result.severities), "mean"]
  out = [f"# {escaped(result.name)}: accuracy under corruption", ""]
  out.append(f"- clean: {100 * result.clean:.2f} % of {n:,} images")
  what = f"{len(result.accuracy)} corruptions and {len(result.severities)} severities"
  out.append(f"- mean over {what}: {100 * result.mean:.2f} %")
  if result.published_mean is not None:
    out.append(f"- mean over the 15 published corruptions: {100 * result.published_mean:.2f} %")
  out += ["", *heading(heads)]
  for name, values, mean in _rows(result):
    out.append(row([name, *(f"{100 * v:.2f}" for v in (*values, mean))]))
  out += ["", *(f"- {escaped(note)}" for note in notes)]
  out += [f"- {name}: {escaped(value)}" for name, value in facts.items()]
  return "\n".join(out) + "\n"


def table_csv(result: stress.StressResult, n: int) -> str:
  """One line a cell; the clean one has severity 0."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow(_FIELDS)
  writer.writerow(["clean", "", 0, result.clean, n])
  for group, names in groups(result).items():
    for name in names:
      for severity, accuracy in zip(result.severities, result.accuracy[name], strict=True):
        writer.writerow([name, group, severity, accuracy, n])
  return out.getvalue()
