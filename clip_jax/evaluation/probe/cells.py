"""The figures of a probe as JSON lines, so that a killed run goes on where it was."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from clip_jax import hosts, json_lines

ZERO_SHOT, FULL, FEW = "zero-shot", "linear probe", "few-shot"


class CellsError(ValueError):
  """A results file that this run cannot go on from: which line, and what to do."""


@dataclasses.dataclass(frozen=True)
class Measure:
  """What decides every figure of a run: weights, splits and prompts as sha256, and how."""

  weights: str
  train: str
  validation: str  # or in words what of train is held back
  test: str
  prompts: str  # class names too
  features: str  # one of `features.PROBED`
  metric: str  # one of `scores.METRICS`


@dataclasses.dataclass(frozen=True)
class Cell:
  """A score, 0 to 1, on `n` test images. What a way of measuring does not have is None."""

  way: str  # ZERO_SHOT, FULL or FEW
  shots: int | None  # labelled examples a class; None: all there are
  seed: int | None  # that drew them
  score: float
  n: int
  examples: int  # that the classifier was trained on
  lambda_: float | None
  iterations: int | None  # of the last fit
  converged: bool | None
  code: str  # version or commit
  seconds: float = 0.0

  @property
  def key(self) -> "Key":
    return self.way, self.shots, self.seed


Key = tuple[str, int | None, int | None]
Cells = Mapping[Key, Cell]

_NAMES = {field.name: field.name.rstrip("_") for field in dataclasses.fields(Cell)}


def read(path: str | os.PathLike[str], measure: Measure) -> tuple[dict[Key, Cell], str]:
  """What is measured already, and in words whether the last line was cut off and is ignored.

  Every process must call it; the file is that of the first one.
  Raises: CellsError, on all of them, naming the line that is no cell, or that was measured with
    other weights, on other data or otherwise.
  """
  path = pathlib.Path(path)
  there = jax.process_index() == 0 and path.exists()
  content = hosts.from_first(path.read_bytes() if there else b"")
  try:
    lines = json_lines.parse(content, path)
  except json_lines.LinesError as error:
    raise CellsError(str(error)) from None
  wanted = dataclasses.asdict(measure)
  done: dict[Key, Cell] = {}
  for number, values in lines.numbered:
    odd = set(values) ^ {*_NAMES.values(), *wanted}
    if odd:
      words = ", ".join(sorted(odd))
      raise CellsError(f"{path}:{number}: no cell (wrong or missing: {words}); remove this line")
    for name, now in wanted.items():
      if values[name] != now:
        raise CellsError(
          f"{path}:{number}: measured with {name} {values[name]}, now it is {now}: give another "
          "--output, or remove the file to measure all anew"
        )
    cell = Cell(**{name: values[shown] for name, shown in _NAMES.items()})
    if why := _wrong(cell):
      raise CellsError(f"{path}:{number}: {why}; remove this line")
    done[cell.key] = cell
  return done, lines.cut


def append(path: str | os.PathLike[str], cell: Cell, measure: Measure) -> None:
  """Adds a cell, on the disk when it returns. Raises: OSError with the file's name."""
  own = {shown: getattr(cell, name) for name, shown in _NAMES.items()}
  json_lines.append(path, {**own, **dataclasses.asdict(measure)})


def _wrong(cell: Cell) -> str:
  """In words what of a line's values cannot be; or ""."""
  fitted = cell.way != ZERO_SHOT
  drawn = cell.way == FEW
  for name, good in (
    ("way", cell.way in (ZERO_SHOT, FULL, FEW)),
    ("shots", _is_whole(cell.shots) if cell.way != FULL else cell.shots is None),
    ("seed", _is_whole(cell.seed) if drawn else cell.seed is None),
    ("score", _is_number(cell.score) and cell.score <= 1),
    ("n", _is_whole(cell.n)),
    ("examples", _is_whole(cell.examples)),
    ("lambda_", _is_number(cell.lambda_) if fitted else cell.lambda_ is None),
    ("iterations", _is_whole(cell.iterations) if fitted else cell.iterations is None),
    ("converged", isinstance(cell.converged, bool) if fitted else cell.converged is None),
    ("code", isinstance(cell.code, str)),
    ("seconds", _is_number(cell.seconds)),
  ):
    if not good:
      return f"{_NAMES[name]} is {getattr(cell, name)!r}"
  return ""


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
  known = isinstance(value, (int, float)) and not isinstance(value, bool)
  return known and math.isfinite(value) and value >= 0
