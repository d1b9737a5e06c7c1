"""Tables and figures that are made of the measured cells of Tables 10, 11 and 16, anew each time.

No figure is measured twice: what a view needs are units of the large tables, and what it shows are
their results under other names. Source: Tables 1, 12, 14 and 15, Figures 5, 9 and 13.
"""

import dataclasses
import decimal
import statistics
from collections.abc import Iterator, Mapping, Sequence

from clip_jax.evaluation.paper import origins, published
from clip_jax.evaluation.paper import units as paper_units
from clip_jax.evaluation.paper.charts import MEAN
from clip_jax.evaluation.paper.facts import Filled
from clip_jax.evaluation.paper.results import Measured
from clip_jax.evaluation.shifts import robustness
from clip_jax.models import clip, presets

EFFECTIVE = "effective robustness"
# By the ends of the 95 % interval of the line.
LOW, HIGH = f"{EFFECTIVE} (2.5 %)", f"{EFFECTIVE} (97.5 %)"

_YFCC, _WIT = "RN50, YFCC15M", "RN50, WIT subset"
_TRAIN = f"train experiments/yfcc15m_rn50.py; wants --models '{_YFCC}=WORKDIR'"
_NOTES = {
  "figure5": "Figure 5: the linear probe of ImageNet's ResNet-50 is the figure of Table 10 as "
  "published; only CLIP's is measured",
  "15": "Table 15: of every video the middle frame alone is looked at",
}
_LINES = (
  f"Figure 13: {EFFECTIVE} wants --standard-models FILE.csv, of ImageNet models whose accuracies "
  "give each shift's line; the paper prints one such model"
)


def units(key: str) -> tuple[paper_units.Unit, ...]:
  """What has to be measured for a table, in its order; nothing for those that are facts.

  Means over 27 data sets (Table 12, Figure 9) are of what is there: no view asks for all of them.
  """
  if key in paper_units.TABLES:
    return paper_units.units(key)
  shown = origins.columns(key)
  found = [unit for way in origins.WAYS.get(key, ()) for unit in paper_units.units(way.table)]
  more = paper_units.bases() if key == "figure13" else ()
  return (*(unit for unit in found if unit.column in shown), *more)


def fill(
  key: str,
  measured: Sequence[Measured],
  asked: Sequence[tuple[str, str]],
  missing: Mapping[str, Mapping[str, str]],
  standard: Sequence[robustness.Row] = (),
) -> Filled:
  """A view of what has been measured.

  Args: asked, the rows (of which large table, called what) that the command's models have; missing,
    of each large table, data set -> why; standard, ImageNet models for Figure 13's lines.
  """
  latest = list({m.key: m for m in measured}.values())
  if key == "figure9":
    return _compute(latest)
  ways, columns = origins.WAYS[key], origins.columns(key)
  found = list(_renamed(key, latest))
  notes = [_NOTES[key]] if key in _NOTES and found else []
  if key == "figure5":
    found = [_less_probe(m) for m in found]
  elif key == "12":
    found += [*_averages(latest), *_differences(found)]
  elif key == "figure13":
    found += [m for m in latest if m.table == key]
    more, said = _effective(found, standard)
    found, notes = found + more, notes + said
  rows = [way.name(key, name) for way in ways for table, name in asked if table == way.table]
  whys = dict(missing.get(key, {}))
  for own, shown in columns.items():
    said = [missing[way.table][own] for way in ways if own in missing.get(way.table, {})]
    if said:
      whys[shown] = "; ".join(dict.fromkeys(said))
  there = {m.model for m in latest} | {name for _, name in asked}
  for cell in published.places(key):
    source = origins.origin(cell)
    if source and source.model not in there:
      name, _ = published.model_of(source.model)
      whys[cell.model] = _TRAIN if name == _YFCC else f"wants --models '{name}=WEIGHTS'"
  return Filled(found, whys, list(dict.fromkeys(rows)), notes)


def _renamed(key: str, measured: Sequence[Measured]) -> Iterator[Measured]:
  columns = origins.columns(key)
  for way in origins.WAYS[key]:
    for m in measured:
      if m.table == way.table and m.dataset in columns:
        yield dataclasses.replace(
          m,
          table=key,
          model=way.name(key, m.model),
          dataset=columns[m.dataset],
          metric=way.metric or m.metric,
        )


def _minus(m: Measured, other: float | str) -> float:
  """In decimal digits, so that 93.8 - 71.3 is 22.5."""
  return float(decimal.Decimal(str(m.value)) - decimal.Decimal(str(other)))


def _less_probe(m: Measured) -> Measured:
  probe = {c.dataset: c.value for c in published.cells("10") if c.model == origins.PROBED}
  return dataclasses.replace(m, value=_minus(m, probe[m.dataset]))


def _differences(found: Sequence[Measured]) -> Iterator[Measured]:
  """Table 12's third columns: YFCC minus WIT, where both have been measured."""
  other = {(m.dataset, m.metric): m for m in found if m.model == _WIT}
  for m in found:
    if m.model == _YFCC and (m.dataset, m.metric) in other:
      value = _minus(m, other[m.dataset, m.metric].value)
      yield dataclasses.replace(m, model="difference", value=value, weights="")


def _means(measured: Sequence[Measured], table: str) -> Iterator[tuple[Measured, float]]:
  """Of every model with all 27 data sets a cell, and the mean."""
  cells: dict[str, dict[str, Measured]] = {}
  for m in measured:
    if m.table == table and m.dataset in published.metrics():
      cells.setdefault(m.model, {})[m.dataset] = m
  for own in cells.values():
    if len(own) == len(published.metrics()):
      yield next(iter(own.values())), statistics.fmean(float(m.value) for m in own.values())


def _averages(measured: Sequence[Measured]) -> Iterator[Measured]:
  for m, mean in _means(measured, "10"):
    yield _made(m, "12", m.model, "Dataset Average", "linear probe", mean)


def _made(m: Measured, table: str, model: str, dataset: str, metric: str, value: float) -> Measured:
  """A figure of several: of the weights and the code of `m`, and of no one set of data."""
  return dataclasses.replace(
    m,
    table=table,
    model=model,
    dataset=dataset,
    metric=metric,
    value=value,
    n=0,
    data="",
    prompts="",
    seconds=0,
  )


def _compute(measured: Sequence[Measured]) -> Filled:
  """Figure 9: multiply-adds by `clip.flops_per_image`, and the mean score of Table 11."""
  found = []
  for model, config in presets.PUBLISHED.items():
    billions = clip.flops_per_image(config) / 2e9
    names = ("figure9", model, "", published.cells("figure9")[0].metric, billions, 0)
    found.append(Measured(*names, weights="", data="", prompts="", code="", seconds=0))
  found += [_made(m, "figure9", m.model, "", MEAN, mean) for m, mean in _means(measured, "11")]
  why = f"{MEAN}: wants all 27 cells of Table 11 (--tables 11,figure9)"
  there = {m.model for m in measured if m.table == "11"} | set(presets.PUBLISHED)
  none = () if any(m.metric == MEAN for m in found) else (f"Figure 9: {why}",)
  return Filled(found, dict.fromkeys(there, why), notes=none)


def _effective(
  found: Sequence[Measured], standard: Sequence[robustness.Row]
) -> tuple[list[Measured], list[str]]:
  """Figure 13's gains, in points, above the line of standard models; and what there is to say."""
  if found and not standard:
    return [], [_LINES]
  given = {row.model for row in standard}
  lines = [*standard, *(row for row in robustness.published() if row.model not in given)]
  of_model: dict[str, dict[str, Measured]] = {}
  for m in found:
    of_model.setdefault(m.model, {})[m.dataset] = m
  shares = [
    robustness.Row(model, "", {name: float(m.value) / 100 for name, m in own.items()})
    for model, own in of_model.items()
  ]
  gains = robustness.over_lines(shares, lines)
  out = []
  for one in gains.effective:
    own = of_model[one.model]
    m = own.get(one.shift) or next(iter(own.values()))
    shown = {EFFECTIVE: one.effective, LOW: one.low, HIGH: one.high}
    if one.shift not in own:
      shown = {"accuracy": one.accuracy, **shown}
    for metric, share in shown.items():
      if share is not None:
        out.append(_made(m, m.table, m.model, one.shift, metric, round(100 * share, 10)))
  return out, [f"Figure 13, {EFFECTIVE}, {note}" for note in gains.notes]
