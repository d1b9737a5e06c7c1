"""Is a published figure reproduced? The rules, and the digits in which both are shown."""

import decimal
import math
from collections.abc import Mapping
from typing import Literal, get_args

from clip_jax.evaluation.paper import published, published_notes
from clip_jax.evaluation.paper import results as paper_results

Kind = Literal[
  "reproduced", "as configured", "off", "known to differ", "not available", "not published"
]
KINDS: tuple[Kind, ...] = get_args(Kind)

# One sign a verdict, so that nobody has to tell them apart by colour.
MARKS: Mapping[Kind, str] = {
  "reproduced": "✓",
  "as configured": "=",
  "off": "✗",
  "known to differ": "◆",
  "not available": "∅",
  "not published": "○",
}
MEANINGS: Mapping[Kind, str] = {
  "reproduced": "measured within the tolerance",
  "as configured": "what this project's files set is what the paper says; nothing is measured",
  "off": "outside of it, by more than anything that is known explains",
  "known to differ": "outside of it, for a reason that stands below the table, and no farther than "
  "that explains",
  "not available": "not measured; how to get it stands below the table",
  "not published": "the paper prints no such figure",
}
RULE = (
  "Reproduced: a share within 0.5 points or two standard errors of the published share over the "
  "paper's test set, whichever is more; a difference of shares within 1 point; a ratio within 5 % "
  "or half of its last digit; sizes and hyperparameters only where equal."
)

_LEAST_POINTS = decimal.Decimal("0.5")
_LEAST_RATIO = decimal.Decimal("0.05")


def tolerance(cell: published.Cell, n: int) -> decimal.Decimal:
  """How far a measured value may be from a published one and still count as reproduced.

  - A share in percent: 0.5 points, or two standard errors 2 * 100 * sqrt(p (1 - p) / n) of the
    published share p, whichever is more. n is the size of the paper's test set, and only where that
    is not published the number that the measurement rests on: measuring on fewer images must not
    make the test easier. For means per class, mAP and AUC this is an approximation.
  - A difference of two shares: twice 0.5 points.
  - A ratio (multiply-adds, efficiency): 5 %, or half a unit of the last printed digit.
  - Sizes and hyperparameters: nothing.
  """
  rule = published.TABLES[cell.table].rule
  value = _number(cell.value)
  if rule == "exact" or value is None:
    return decimal.Decimal(0)
  if rule == "ratio":
    decimals = len(cell.value.partition(".")[2])
    return max(_LEAST_RATIO * abs(value), decimal.Decimal(5).scaleb(-decimals - 1))
  if rule == "difference" or cell.model == "difference":
    return 2 * _LEAST_POINTS
  size = published_notes.test_images(cell.dataset) or n
  share = float(value) / 100
  if size < 1 or not 0 <= share <= 1:
    return _LEAST_POINTS
  error = decimal.Decimal(200 * math.sqrt(share * (1 - share) / size))
  return max(_LEAST_POINTS, error.quantize(decimal.Decimal("0.01")))


def as_printed(value: float | str, like: str) -> str:
  """A value in the digits of a published one: 81.13 like 81.1 is "81.1", 0.0005 like 5e-4 "5e-4".

  Where nothing is published: one decimal, none of a whole number.
  """
  if isinstance(value, str):
    return value
  if _number(like) is None:
    return str(value) if isinstance(value, int) else f"{value:.1f}"
  mantissa, exponential, _ = like.partition("e")
  decimals = len(mantissa.partition(".")[2])
  if exponential:
    own, _, exponent = f"{value:.{decimals}e}".partition("e")
    return f"{own}e{int(exponent)}"
  text = f"{value:.{decimals}f}"
  return text.removeprefix("-") if float(text) == 0 else text


def judge(
  cell: published.Cell, measured: paper_results.Measured, difference: decimal.Decimal | None
) -> tuple[Kind, str]:
  """The verdict of a cell that is both measured and published, and its reason."""
  limit = tolerance(cell, measured.n)
  kind: Kind = "off"
  why = ""
  equal = str(measured.value) == cell.value if difference is None else abs(difference) <= limit
  known = published_notes.known_difference(cell)
  size = published_notes.test_images(cell.dataset)
  if known and known.when == "always":
    kind, why = "known to differ", known.why
  elif equal:
    kind = "as configured" if _is_configured(cell) else "reproduced"
    why = f"within {limit}" if limit else "equal"
  elif known and known.when == "other tools":
    why = f"what is known explains the figures of other tools alone ({known.why})"
  elif known and difference is not None and (known.when, measured.n) != ("other images", size):
    kind, why = _within(known, decimal.Decimal(cell.value), difference, limit)
  if size and measured.n not in (0, size) and published.TABLES[cell.table].rule == "share":
    note = f"measured on {measured.n:,}, the paper's test set has {size:,}"
    why = f"{why}; {note}" if why else note
  return kind, why


def _within(
  known: published_notes.Known,
  printed: decimal.Decimal,
  difference: decimal.Decimal,
  limit: decimal.Decimal,
) -> tuple[Kind, str]:
  """Whether a difference beyond the tolerance `limit` is one that what is known explains."""
  beyond = max(limit, known.up_to)
  low, high = known.least - beyond, known.most + beyond
  if low <= difference <= high:
    return "known to differ", known.why
  return "off", f"only {printed + low} to {printed + high} is explained ({known.why})"


def _is_configured(cell: published.Cell) -> bool:
  """Whether a cell holds a setting, which this project's files repeat and no run measures."""
  return cell.table in ("18", "19", "20") or (cell.table, cell.metric) == ("9", "metric")


def _number(text: str) -> decimal.Decimal | None:
  try:
    number = decimal.Decimal(text)
  except decimal.InvalidOperation:
    return None
  return number if number.is_finite() else None


def difference_of(value: float | str, printed: str) -> decimal.Decimal | None:
  """Measured minus published in decimal digits, so that 81.6 - 81.1 is 0.5; None of words."""
  theirs, ours = _number(printed), _number(str(value))
  return None if theirs is None or ours is None else ours - theirs


def signed(difference: decimal.Decimal, printed: str) -> str:
  """With its sign, in the digits of the printed value; in its own where these would show zero."""
  text = as_printed(float(difference), printed.partition("e")[0])
  if float(text) == 0 and difference:
    text = f"{float(difference):.2g}"
  return text if text.startswith("-") or float(text) == 0 else f"+{text}"
