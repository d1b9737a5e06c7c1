"""Measured cells of the paper's tables, kept as JSON lines that a killed run can go on from."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from clip_jax import json_lines
from clip_jax.evaluation.paper import published


class ResultsError(ValueError):
  """A result that cannot be kept or read: which file and line, and what to do."""


@dataclasses.dataclass(frozen=True)
class Fitted:
  """How the last fit of a linear probe ended, with the lambda that was chosen for it."""

  lambda_: float
  iterations: int
  converged: bool


@dataclasses.dataclass(frozen=True)
class Measured:
  """One measured cell, in the unit in which the paper prints it, with all that made it.

  The names are those of `published.Cell`, or one's own models and datasets. `value` is text only
  where the table prints words. Hashes are hexadecimal sha256, empty where there is nothing to hash.
  Raises: ResultsError for a value that is not finite, or a name that cannot be shown in a line.
  """

  table: str
  model: str
  dataset: str
  metric: str
  value: float | str  # in percent where the paper prints percent
  n: int  # images of the test set that the value rests on (in retrieval too), 0 where none do
  weights: str  # hash of the weights
  data: str  # hash or fingerprint of the data
  prompts: str  # hash of class names and templates
  code: str  # version or commit
  seconds: float
  # Lines of older versions are without these.
  left_out: tuple[str, ...] = ()  # where the records stand whose image cannot be decoded
  fits: tuple[Fitted, ...] = ()  # of a linear probe, one a fold

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      if field.name in _LATER:
        continue
      value, kinds = getattr(self, field.name), _KINDS[field.name]
      if not isinstance(value, kinds) or isinstance(value, bool):
        raise ResultsError(f"{field.name} is {value!r}: want {_words(kinds)}")
      if isinstance(value, str) and not value.isprintable():
        raise ResultsError(f"{field.name} is {value!r}: it has characters that cannot be shown")
      if isinstance(value, float) and not math.isfinite(value):
        raise ResultsError(f"{field.name} is {value}: not a finite number; measure it again")
    if self.n < 0 or self.seconds < 0:
      raise ResultsError(f"n is {self.n} and seconds {self.seconds}: want at least 0")
    if self.table not in published.TABLES:
      raise ResultsError(f"table is {self.table!r}: choose of {', '.join(published.TABLES)}")
    if isinstance(self.value, str) and published.TABLES[self.table].rule != "exact":
      raise ResultsError(f"value is {self.value!r}: want a number in table {self.table}")

  @property
  def key(self) -> tuple[str, str, str, str]:
    """Which cell it is."""
    return self.table, self.model, self.dataset, self.metric


_NUMBER = (int, float)
_LATER = ("left_out", "fits")
_SHOWN = {field.name: field.name.rstrip("_") for field in dataclasses.fields(Fitted)}
_KINDS: Mapping[str, tuple[type, ...]] = {
  **dict.fromkeys(("table", "model", "dataset", "metric"), (str,)),
  **dict.fromkeys(("weights", "data", "prompts", "code"), (str,)),
  "value": (int, float, str),
  "n": (int,),
  "seconds": _NUMBER,
}


def _words(kinds: tuple[type, ...]) -> str:
  return " or ".join({int: "a whole number", float: "a number", str: "text"}[k] for k in kinds)


@dataclasses.dataclass(frozen=True)
class Results:
  """What a results file holds. `cut` says in words that its last line was cut off, or is empty."""

  measured: tuple[Measured, ...]
  cut: str


def read(path: str | os.PathLike[str], weights: Mapping[str, str] | None = None) -> Results:
  """The measured cells of a file in order; of a cell measured twice both.

  A last line without its end is what a killed run leaves: it is not read, and `cut` says so. A file
  that is not there holds nothing.
  Args: weights, the hash of the weights that each model's name stands for now.
  Raises: ResultsError naming the line that is no result, or whose weights are not those of the
    other lines, or of `weights`, under the same model's name.
  """
  path = pathlib.Path(path)
  try:
    lines = json_lines.read(path)
  except json_lines.LinesError as error:
    raise ResultsError(str(error)) from None
  out = [(number, _parsed(path, number, values)) for number, values in lines.numbered]
  _check_weights(path, out, weights or {})
  return Results(tuple(measured for _, measured in out), lines.cut)


def append(path: str | os.PathLike[str], measured: Measured) -> None:
  """Adds one line and waits until it is on the disk; a cut last line is taken away first.

  Raises: OSError with the file's name, when it cannot be written.
  """
  values = dataclasses.asdict(measured)
  values["fits"] = [{_SHOWN[name]: value for name, value in fit.items()} for fit in values["fits"]]
  json_lines.append(path, values)


def _parsed(path: pathlib.Path, number: int, values: Mapping[str, Any]) -> Measured:
  """Raises: ResultsError naming the line."""
  names = {field.name for field in dataclasses.fields(Measured)}
  if odd := ", ".join(sorted(set(values) ^ names - (set(_LATER) - set(values)))):
    raise ResultsError(
      f"{path}:{number}: not a result (wrong or missing: {odd}); remove this line, or measure anew "
      "in another folder"
    )
  try:
    later = {"left_out": _places(values), "fits": _fits(values)}
    return Measured(**{**values, **later})
  except ResultsError as error:
    raise ResultsError(f"{path}:{number}: {error}") from None


def _places(values: Mapping[str, Any]) -> tuple[str, ...]:
  """Raises: ResultsError for what is no list of text."""
  found = values.get("left_out", [])
  if not isinstance(found, list) or not all(isinstance(where, str) for where in found):
    raise ResultsError(f"left_out is {found!r}: want a list of text")
  return tuple(found)


def _fits(values: Mapping[str, Any]) -> tuple[Fitted, ...]:
  """Raises: ResultsError for what is no list of fits."""
  found: Any = values.get("fits", [])
  out: list[Fitted] = []
  for fit in found if isinstance(found, list) else [None]:
    own = fit if isinstance(fit, dict) else {}
    given: list[Any] = [own.get(shown) for shown in _SHOWN.values()]
    lambda_, iterations, converged = given
    numbers = type(lambda_) in _NUMBER and math.isfinite(lambda_) and type(iterations) is int
    if set(own) != set(_SHOWN.values()) or not numbers or not isinstance(converged, bool):
      raise ResultsError(f"fits is {found!r}: want a list of {', '.join(_SHOWN.values())}")
    out.append(Fitted(lambda_, iterations, converged))
  return tuple(out)


def _check_weights(
  path: pathlib.Path, lines: list[tuple[int, Measured]], weights: Mapping[str, str]
) -> None:
  """Raises: ResultsError naming both hashes, where one model's name stands for two weights."""
  first = {name: (value, "now it is") for name, value in weights.items() if value}
  for number, measured in lines:
    if measured.weights:
      expected, where = first.setdefault(
        measured.model, (measured.weights, f"in line {number} it is")
      )
      if measured.weights != expected:
        raise ResultsError(
          f"{path}:{number}: {measured.model} was measured with weights {measured.weights}, "
          f"{where} {expected}: two weights under one name cannot share a table; write to another "
          "folder, or give one of them another name"
        )
