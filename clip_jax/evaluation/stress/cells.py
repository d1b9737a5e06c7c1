"""The cells of a stress test as JSON lines, so that a killed run goes on where it was."""

import dataclasses
import math
import os
from collections.abc import Mapping

from clip_jax import json_lines
from clip_jax.evaluation.stress import curves as stress


class CellsError(ValueError):
  """A results file that this run cannot go on from: which line, and what to do."""


@dataclasses.dataclass(frozen=True)
class Measure:
  """What decides every figure of a run, as sha256: weights, images, prompts."""

  weights: str
  data: str
  prompts: str


@dataclasses.dataclass(frozen=True)
class Cell:
  """The top-1 accuracy, 0 to 1, on n images under a corruption at a severity (clean: 0)."""

  corruption: str
  severity: int
  accuracy: float
  n: int
  seconds: float
  code: str = ""  # version or commit; lines of older versions are without it


Accuracies = Mapping[tuple[str, int], float]  # as `stress.stress` takes what is done


Codes = Mapping[tuple[str, int], str]  # which version measured a cell, "" where it is not known


def read(path: str | os.PathLike[str], measure: Measure) -> tuple[Accuracies, Codes, str]:
  """What is measured already, by what, and in words whether the last line was cut off.

  Raises: CellsError naming the line that is no cell, or that was measured with other weights, on
    other images or with other prompts.
  """
  wanted = dataclasses.asdict(measure)
  names = {field.name for field in dataclasses.fields(Cell)} | set(wanted)
  try:
    lines = json_lines.read(path)
  except json_lines.LinesError as error:
    raise CellsError(str(error)) from None
  done: dict[tuple[str, int], float] = {}
  codes: dict[tuple[str, int], str] = {}
  for number, line in lines.numbered:
    values = {"code": "", **line}
    if set(values) != names:
      odd = ", ".join(sorted(set(values) ^ names))
      raise CellsError(f"{path}:{number}: no cell (wrong or missing: {odd}); remove this line")
    for name, now in wanted.items():
      if values[name] != now:
        raise CellsError(
          f"{path}:{number}: measured with {name} {values[name]}, now they are {now}: give another "
          "--output, or remove the file to measure all anew"
        )
    key, accuracy = (values["corruption"], values["severity"]), values["accuracy"]
    whole, known = isinstance(key[1], int), isinstance(values["code"], str)
    if not _is_number(accuracy) or not 0 <= accuracy <= 1 or not whole or not known:
      raise CellsError(f"{path}:{number}: {key}, accuracy {accuracy!r}; remove this line")
    done[key], codes[key] = float(accuracy), values["code"]
  return done, codes, lines.cut


def append(path: str | os.PathLike[str], cell: Cell, measure: Measure) -> None:
  """Adds a cell, on the disk when it returns. Raises: OSError with the file's name."""
  json_lines.append(path, {**dataclasses.asdict(cell), **dataclasses.asdict(measure)})


def _is_number(value: object) -> bool:
  known = isinstance(value, (int, float)) and not isinstance(value, bool)
  return known and math.isfinite(value)  # type: ignore[arg-type]


def missing(done: Accuracies, names: tuple[str, ...], severities: tuple[int, ...]) -> int:
  """How many cells are not measured yet, the clean one too."""
  return len(cells(names, severities) - set(done))


def cells(names: tuple[str, ...], severities: tuple[int, ...]) -> set[tuple[str, int]]:
  """All cells of a stress test, the clean one too."""
  return {stress.CLEAN, *((name, severity) for name in names for severity in severities)}
