"""The page and the drawing of a study, from what was found alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clip_jax.evaluation import curves as curves_lib
from clip_jax.evaluation.paper import efficiency, published
from tools.predictive import scoring

_NAMES = {
  "captions": "captions, token by token",
  "bag_of_words": "bag of words",
  "contrastive": "contrastive",
}
_COLOURS = {"captions": "#0072b2", "bag_of_words": "#e69f00", "contrastive": "#009e73"}


def page(study: Mapping[str, Any], drawing_name: str) -> str:
  """The Markdown page of a study, as `predictive_study` writes it to JSON."""
  found = efficiency.curves(study["runs"])
  return "\n".join(
    [
      *_head(study),
      *_objectives(study, found),
      "",
      f"![Zero-shot accuracy over pairs seen]({drawing_name})",
      "",
      *_found(study, found),
      "",
      *_levels(study, found),
      "",
      *_rules(study),
      "",
      *_choices(),
      "",
    ]
  )


def _head(study: Mapping[str, Any]) -> list[str]:
  seeds = sorted({run["seed"] for run in study["runs"]})
  machine = study["machine"]
  return [
    "# Predictive against contrastive",
    "",
    "The paper's Figure 2 at a small size: three objectives on one image encoder, from the same "
    "first weights of it, on the same batches.",
    "",
    f"`{study['config']}`: {study['steps']:,} steps of {study['batch_pairs']:,} pairs with seeds "
    f"{', '.join(map(str, seeds))}; zero-shot top-1 on {study['images']:,} images of "
    f"{study['task']}, {study['classes']} classes, {study['prompts']} prompts. Written by "
    f"`python tools/predictive_study.py` on {machine['processor']} ({machine['device']}, jax "
    f"{machine['jax']}).",
    "",
    *(f"> {line}".rstrip() for line in study["notes"].splitlines()),
    "",
  ]


def _objectives(study: Mapping[str, Any], found: Mapping[str, efficiency.Curves]) -> list[str]:
  lines = [
    "| objective | parameters beside the image encoder | MFLOP a pair, forward | scored by | "
    "top-1 at the end, mean (least to greatest) | minutes a run, with evaluations |",
    "| --- | ---: | ---: | --- | ---: | ---: |",
  ]
  for name, one in found.items():
    cost = study["cost"][name]
    minutes = np.mean([run["seconds"] for run in study["runs"] if run["objective"] == name]) / 60
    cells = [
      _NAMES[name],
      f"{cost['head']:,}",
      f"{cost['flops'] / 1e6:.1f}",
      one.rule,
      _spread(one.accuracy[:, -1]),
      f"{minutes:.1f}",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return lines


def _spread(values: np.ndarray) -> str:
  return f"{values.mean():.1%} ({values.min():.1%} to {values.max():.1%})"


def _found(study: Mapping[str, Any], found: Mapping[str, efficiency.Curves]) -> list[str]:
  level = efficiency.common_level(found)
  lines = [
    "## What was found",
    "",
    f"At {level:.0%}, the highest accuracy that all runs reach:",
    "",
  ]
  for slow, fast, row in efficiency.COMPARED:
    one = efficiency.ratio(found, slow, fast, level)
    compute = study["cost"][slow]["flops"] / study["cost"][fast]["flops"]
    assert one.of_means is not None  # the level is one that both reach
    spread = f", {one.spread[0]:.2g} to {one.spread[1]:.2g} by seed" if one.spread else ""
    lines.append(
      f"- {_NAMES[slow]}: {one.of_means:.2g} times the pairs of {_NAMES[fast]}{spread}; the paper: "
      f"{paper(row)}. In FLOPs {one.of_means * compute:.2g} times. That is "
      f"{efficiency.verdict(one)}."
    )
  return lines


def paper(model: str) -> str:
  """The published ratio, as printed."""
  return next(cell.value for cell in published.cells("figure2") if cell.model == model)


def _levels(study: Mapping[str, Any], found: Mapping[str, efficiency.Curves]) -> list[str]:
  lines = [
    "Pairs seen when the mean over seeds first reaches an accuracy, between evaluations along the "
    "logarithm of pairs; ratios with the least and the greatest of one seed's two runs:",
    "",
    "| top-1 | " + " | ".join(_NAMES[name] for name in found) + " | "
    "captions : words (paper 3) | words : contrastive (paper 4) |",
    "| ---: " + "| ---: " * (len(found) + len(efficiency.COMPARED)) + "|",
  ]
  for level in efficiency.levels(found, 1 / study["classes"]):
    needed = [efficiency.pairs_for(one.pairs, one.mean, level) for one in found.values()]
    cells = ["-" if pairs is None else f"{pairs:,.0f}" for pairs in needed]
    cells += [_ratio(efficiency.ratio(found, a, b, level)) for a, b, _ in efficiency.COMPARED]
    lines.append(f"| {level:.0%} | {' | '.join(cells)} |")
  return lines


def _ratio(one: efficiency.Ratio) -> str:
  if one.of_means is None:
    return "-"
  spread = f" ({one.spread[0]:.2f} to {one.spread[1]:.2f})" if one.spread else ""
  return f"{one.of_means:.2f}{spread}"


def _rules(study: Mapping[str, Any]) -> list[str]:
  lines = [
    "How a model that predicts is made to classify is not in the paper. Top-1 at the end by the "
    "three rules of `tools/predictive/scoring.py`; each objective is drawn by its best, so that "
    "what is found is not owed to the rule:",
    "",
    "| objective | " + " | ".join(scoring.RULES) + " |",
    "| --- | ---: | ---: | ---: |",
  ]
  for name in ("captions", "bag_of_words"):
    of = {one.rule: one for one in efficiency.by_rule(study["runs"], name)}
    cells = [_spread(of[rule].accuracy[:, -1]) for rule in scoring.RULES]
    lines.append(f"| {_NAMES[name]} | {' | '.join(cells)} |")
  return lines


def _choices() -> list[str]:
  return [
    "## Choices",
    "",
    "- All three see the image as the encoder's pooled features. VirTex's decoder attends to the "
    "grid of features instead; the paper does not say what its language model saw.",
    "- The decoder is the contrastive model's text Transformer with the image in place of the "
    "start token, and its table of embeddings gives the logits. The paper's had 63 million "
    "parameters and took twice the compute of its ResNet-50.",
    "- Words are the tokens of the run's own vocabulary, in which frequent words are whole. One "
    "softmax over all of them, the target shared equally by the caption's.",
    "- Learning rate, schedule, decay and batches are the same for all, tuned for none of them.",
    "- One run a seed is evaluated as it goes, so all but its last point are under a learning rate "
    "that has not come down yet.",
  ]


_WIDTH, _HEIGHT, _LEFT, _TOP = 760, 360, 60, 34


def drawing(study: Mapping[str, Any]) -> str:
  """Accuracy over pairs, both of the mean and from the least to the greatest seed. SVG."""
  found, chance = efficiency.curves(study["runs"]), 1 / study["classes"]
  right, bottom = _WIDTH - 20, _TOP + _HEIGHT
  low = min(float(one.pairs[0]) for one in found.values())
  high = max(float(one.pairs[-1]) for one in found.values())

  def x(pairs: Any) -> Any:
    return np.interp(np.log(pairs), [math.log(low), math.log(high)], [_LEFT, right])

  def y(share: Any) -> Any:
    return np.interp(share, [0, 1], [bottom, _TOP])

  body = [f'<text x="{_LEFT}" y="{_TOP - 12}" class="b">Zero-shot top-1 over pairs seen</text>']
  for tick in range(0, 101, 20):
    place = y(tick / 100)
    body.append(f'<path d="M{_LEFT} {place:.1f}H{right}" stroke="#ddd"/>')
    body.append(f'<text class="r" x="{_LEFT - 6}" y="{place + 4:.1f}">{tick}%</text>')
  for tick in _decades(low, high):
    body.append(f'<path d="M{x(tick):.1f} {_TOP}V{bottom}" stroke="#eee"/>')
    label = curves_lib.number(tick)
    body.append(f'<text class="m" x="{x(tick):.1f}" y="{bottom + 18}">{label}</text>')
  body.append(
    f'<path d="M{_LEFT} {y(chance):.1f}H{right}" stroke="#888" stroke-dasharray="4 4"/>'
    f'<text class="r" x="{right}" y="{y(chance) - 5:.1f}">chance</text>'
  )
  for i, (name, one) in enumerate(found.items()):
    body += _curve(_COLOURS[name], x(one.pairs), *(y(a) for a in _band(one)))
    place = bottom + 44 + 20 * i
    body.append(f'<path d="M{_LEFT} {place}h28" stroke="{_COLOURS[name]}" stroke-width="2.5"/>')
    words = f"{_NAMES[name]} (scored by {one.rule})"
    body.append(f'<text x="{_LEFT + 36}" y="{place + 4}">{words}</text>')
  height = bottom + 44 + 20 * len(found)
  head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" fill="none">'
  style = (
    "<style>text{font:13px sans-serif;fill:#222}.r{text-anchor:end}.m{text-anchor:middle}"
    ".b{font-weight:bold}</style>"
  )
  ground = f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>'
  return "\n".join([head, style + ground, *body, "</svg>"]) + "\n"


def _band(one: efficiency.Curves) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  return one.mean, one.accuracy.min(axis=0), one.accuracy.max(axis=0)


def _curve(
  colour: str, x: np.ndarray, mean: np.ndarray, least: np.ndarray, greatest: np.ndarray
) -> list[str]:
  around = _points([*x, *x[::-1]], [*greatest, *least[::-1]])
  dots = zip(x, mean, strict=True)
  return [
    f'<polygon points="{around}" fill="{colour}" fill-opacity="0.18"/>',
    f'<polyline points="{_points(x, mean)}" stroke="{colour}" stroke-width="2"/>',
    *(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in dots),
  ]


def _points(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> str:
  return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _decades(low: float, high: float) -> list[int]:
  """1, 2 and 5 times the powers of ten between `low` and `high`."""
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  return [n * 10**p for p in powers for n in (1, 2, 5) if low <= n * 10**p <= high]
