"""Results for people: one self-contained HTML page, and a table for the terminal."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import rich.table
import rich.text

from clip_jax.evaluation import curves as curves_lib
from clip_jax.evaluation import embedding_map as map_lib
from clip_jax.evaluation import figures, pages, retrieval, zero_shot
from clip_jax.evaluation.pages import percent

Result = zero_shot.ZeroShotResult | zero_shot.SeveralResult | retrieval.RetrievalResult


@dataclasses.dataclass(frozen=True)
class RunSummary:
  """What the page says of the run beside its results; labels and values in words.

  `headline`: figures to stand beside the results at the top, such as "pairs a second": "1,240".
  `plan`: rows of the table of the run: pairs, steps, parameters, devices, machine, time.
  `notes`: whatever a reader must know to judge the figures.
  """

  name: str
  plan: Mapping[str, str]
  headline: Mapping[str, str] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Row:
  """One figure of a result, a share between 0 and 1."""

  task: str
  kind: str  # of the task, in words
  measure: str
  value: float
  chance: float | None
  n: int
  of: str  # what there are n of
  interval: tuple[float, float] | None  # 95 %, of a share of n independent trials


def rows(result: Result) -> list[Row]:
  """The figures of a result, the one to quote first."""
  if isinstance(result, zero_shot.SeveralResult):
    return [_scored(result)]
  if isinstance(result, zero_shot.ZeroShotResult):
    classes = len(result.classes)
    shares = [("top-1", result.top1, result.chance)]
    shares += [("top-5", result.top5, 5 / classes)] if classes > 5 else []
    out = [
      Row(
        result.name,
        "zero-shot",
        measure,
        share,
        chance,
        result.n,
        "images",
        wilson(share, result.n),
      )
      for measure, share, chance in shares
    ]
    per_class = ("mean per class", result.mean_per_class, None, result.n, "images", None)
    out.append(Row(result.name, "zero-shot", *per_class))
    if result.metric == "accuracy":
      return out
    return [_scored(result), *(row for row in out if row.measure != result.metric)]
  return [
    Row(
      result.name,
      "retrieval",
      f"{words} R@{k}",
      recall.recall[k],
      recall.chance[k],
      recall.n,
      of,
      wilson(recall.recall[k], recall.n),
    )
    for words, of, recall in (
      ("text to image", "texts", result.text_to_image),
      ("image to text", "images", result.image_to_text),
    )
    for k in retrieval.KS
  ]


def _scored(result: zero_shot.ZeroShotResult | zero_shot.SeveralResult) -> Row:
  """A result's score by the metric of its data, which is no share of independent trials."""
  named = (result.name, "zero-shot", result.metric, result.score)
  return Row(*named, chance=None, n=result.n, of="images", interval=None)


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
  """The 95 % interval of a share seen in n independent trials, by Wilson's score."""
  centre = share + z * z / (2 * n)
  half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
  scale = 1 + z * z / n
  return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def table(results: Sequence[Result]) -> rich.table.Table:
  """All figures of all results, for a terminal."""
  out = rich.table.Table("task", "kind", "measure", title="evaluation")
  for heading in ("value", "95% interval", "chance", "n"):
    out.add_column(heading, justify="right")
  for row in (row for result in results for row in rows(result)):
    cells = (percent(row.value), _interval(row), _chance(row), f"{row.n:,}")
    out.add_row(rich.text.Text(row.task), row.kind, row.measure, *cells)
  return out


def _interval(row: Row) -> str:
  return (
    "" if row.interval is None else f"{100 * row.interval[0]:.1f} to {percent(row.interval[1])}"
  )


def _chance(row: Row) -> str:
  return "" if row.chance is None else percent(row.chance)


def write(
  path: str | os.PathLike[str],
  run: RunSummary,
  curves: Sequence[Mapping[str, Any]],
  results: Sequence[Result],
  embedding_map: map_lib.EmbeddingMap | None = None,
) -> None:
  """Writes the page of a run: HTML that holds its style, drawings and pictures, and no script.

  Args: curves, the lines of metrics.jsonl in order (`metrics.read`); embedding_map, from
    `embedding_map.project`.
  The file appears whole under its name or not at all. Raises: OSError when it cannot be written.
  """
  zero_shots = [r for r in results if isinstance(r, zero_shot.ZeroShotResult)]
  panels = curves_lib.panels(curves)
  page = pages.render(
    "report.html.j2",
    interval=_interval,
    chance=_chance,
    run=run,
    tables=[rows(result) for result in results],
    training=[p for p in panels if not p.evaluation],
    evaluations=[p for p in panels if p.evaluation],
    zero_shots=[(r, figures.confusion(r)) for r in zero_shots],
    retrievals=[r for r in results if isinstance(r, retrieval.RetrievalResult)],
    map=embedding_map,
    marks=embedding_map and figures.map_marks(embedding_map),
    map_size=(figures.MAP_WIDTH, figures.MAP_HEIGHT),
  )
  pages.write(path, page)
