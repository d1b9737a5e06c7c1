"""Train-test overlap for people and programs: the pairs to look at, as a page and CSV; the effect.

Source: section 5: the authors set each threshold by looking at the nearest pairs.
"""

import csv
import dataclasses
import io
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from clip_jax import metrics
from clip_jax.data import images, records
from clip_jax.evaluation import encoding, pages
from clip_jax.evaluation.overlap import effect as overlap_effect
from clip_jax.evaluation.overlap import search as overlap

_GROUP = 24  # pairs shown of each group
_FIELDS = ("index", "key", "train_index", "train_key", "distance", "counted")


@dataclasses.dataclass(frozen=True)
class Pair:
  """A match with its two pictures, uint8 [H, W, 3]."""

  match: overlap.Match
  image: np.ndarray
  train_image: np.ndarray
  counted: bool  # as a duplicate


@dataclasses.dataclass(frozen=True)
class Group:
  """Some pairs, nearest first, of `of` that are as far apart. `title` and `what` are for people."""

  title: str
  what: str
  pairs: tuple[Pair, ...]
  of: int


def widened(by: str, threshold: float) -> float:
  """The threshold to search with, so that pairs just past `threshold` can be looked at too.

  Raises: EvaluationError for a threshold that the search would not take.
  """
  if by == "hash":
    if threshold != int(threshold) or not 0 <= threshold < overlap.HASH_BITS / 2:
      raise encoding.EvaluationError(f"threshold {threshold:g}: want 0 to 31 of the hash's 64 bits")
    return min(overlap.HASH_BITS // 2 - 1, int(threshold) + 6)
  if not 0 <= threshold < 1:
    raise encoding.EvaluationError(f"threshold {threshold:g}: want 1 - cosine, from 0 to 1")
  return min(float(np.nextafter(1.0, 0.0)), 2 * threshold + 0.05)


def sheet(
  matches: overlap.Matches,
  threshold: float,
  evaluated: records.RecordSource,
  training: records.RecordSource,
  size: int = _GROUP,
) -> tuple[Group, ...]:
  """The pairs that people should look at: the nearest, and those on both sides of the threshold."""
  order = sorted(matches.pairs, key=lambda match: (match.distance, match.index))
  counted = [match for match in order if match.distance <= threshold]
  past = order[len(counted) :]
  cut = [("Nearest", "Counted as overlap.", counted[:size], len(counted))]
  if len(counted) > size:
    rest = counted[max(size, len(counted) - size) :]
    cut.append(
      ("Just under the threshold", "Counted too: are they the same picture?", rest, len(counted))
    )
  cut.append(("Just past the threshold", "Not counted: should they be?", past[:size], len(past)))
  return tuple(
    Group(
      title,
      what,
      tuple(
        Pair(
          match,
          _picture(evaluated, match.index),
          _picture(training, match.train_index),
          match.distance <= threshold,
        )
        for match in found
      ),
      of,
    )
    for title, what, found, of in cut
  )


def _picture(source: records.RecordSource, index: int) -> np.ndarray:
  """A record's image as it is, uint8 [H, W, 3]."""
  return np.asarray(images.as_image(encoding.read(source, index).image))


def pairs_csv(matches: overlap.Matches, threshold: float) -> str:
  """A line for each evaluated image with a near training image, the nearest first."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  writer.writerow(_FIELDS)
  for match in sorted(matches.pairs, key=lambda match: (match.distance, match.index)):
    counted = "yes" if match.distance <= threshold else "no"
    writer.writerow([*dataclasses.astuple(match), counted])
  return out.getvalue().encode("utf-8", "backslashreplace").decode()


def effect_rows(effect: overlap_effect.Effect) -> list[tuple[str, str, str]]:
  """The paper's table of the effect: what, its figure, how many images. For people."""
  low, high = effect.interval

  def share(value: float) -> str:
    return "none" if math.isnan(value) else pages.percent(value)

  def points(value: float) -> str:
    return "none" if math.isnan(value) else f"{100 * value:+.2f} points"

  interval = "none" if math.isnan(low) else f"{share(low)} to {share(high)}"
  p = effect.p_value
  return [
    ("accuracy on All", share(effect.accuracy), f"{effect.n:,}"),
    ("accuracy on Clean", share(effect.clean_accuracy), f"{effect.clean:,}"),
    ("accuracy on Overlap", share(effect.overlap_accuracy), f"{effect.overlapping:,}"),
    ("its 99.5% interval", interval, ""),
    ("share of Overlap", share(effect.share), f"{effect.overlapping:,}"),
    ("All - Clean", points(effect.inflation), ""),
    ("Overlap - Clean", points(effect.difference), ""),
    ("p-value (Overlap better than Clean)", "none" if math.isnan(p) else f"{p:.3g}", ""),
  ]


def results(
  effect: overlap_effect.Effect, matches: overlap.Matches, by: str, threshold: float
) -> dict[str, object]:
  """For a program; what there is none of is null."""
  known = {
    name: value if math.isfinite(value) else None for name, value in effect.metrics().items()
  }
  return {
    "name": effect.name,
    "by": by,
    "threshold": threshold,
    "training_images": matches.trained,
    "training_unreadable": matches.unreadable,
    "right_overlap": effect.right_overlap,
    "right_clean": effect.right_clean,
    **known,
  }


def write(
  folder: str | os.PathLike[str],
  effect: overlap_effect.Effect,
  matches: overlap.Matches,
  groups: Sequence[Group],
  by: str,
  threshold: float,
  facts: Mapping[str, str],
  notes: Sequence[str] = (),
) -> tuple[pathlib.Path, ...]:
  """Writes overlap.html, overlap.json and pairs.csv into `folder`; the paths. Each appears whole.

  Args: groups, of `sheet`; by, "hash" or "embedding"; facts, what made the figures.
  Raises: OSError with the file's name, when it cannot be written.
  """
  folder = pathlib.Path(folder)
  found = {**results(effect, matches, by, threshold), "made_by": dict(facts)}
  metrics.write_atomically(folder / "overlap.json", json.dumps(found, indent=1) + "\n")
  metrics.write_atomically(folder / "pairs.csv", pairs_csv(matches, threshold))
  page = pages.render(
    "overlap.html.j2",
    effect=effect,
    rows=effect_rows(effect),
    matches=matches,
    groups=groups,
    by=by,
    threshold=f"{threshold:g} bits" if by == "hash" else f"{threshold:g} (1 - cosine)",
    facts=facts,
    notes=notes,
  )
  pages.write(folder / "overlap.html", page)
  return tuple(folder / name for name in ("overlap.html", "overlap.json", "pairs.csv"))
