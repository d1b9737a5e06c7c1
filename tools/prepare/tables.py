"""Strict reading of captions: CSV, TSV or JSON lines, one row a line, no row lost in another.

A line is read by itself, so a quotation mark that is never closed spoils its own row alone. What
is wrong with a file as a whole is an error; what is wrong with one row makes a named rejection.
"""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from tools.prepare.jobs import PrepareError, Rejected, Rejection

MAX_LINE_BYTES = 1_000_000
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclasses.dataclass(frozen=True)
class Row:
  """The asked-for fields of one row, in the order asked for; `where` is file:line."""

  where: str
  fields: tuple[Any, ...]


def read(path: pathlib.Path, columns: Sequence[str]) -> Iterator[Row | Rejection]:
  """All rows of a file, each as its fields or as a rejection; blank lines are no rows.

  Raises: PrepareError for a file of another kind, without a row, without a column asked for, or
    whose header cannot be read; OSError.
  """
  if path.suffix not in (*_DELIMITERS, ".jsonl"):
    raise PrepareError(f"{path}: wants a name that ends in .csv, .tsv or .jsonl")
  with path.open("rb") as file:
    lines = _lines(file, path.name)
    if path.suffix == ".jsonl":
      yield from _json_lines(lines, path, columns)
    else:
      yield from _delimited(lines, path, columns, _DELIMITERS[path.suffix])


def _lines(file: Any, name: str) -> Iterator[tuple[str, str | Rejected]]:
  """(file:line, the line's text or why it has none); blank lines are passed over."""
  number = 0
  while line := file.readline(MAX_LINE_BYTES + 1):
    number += 1
    where, long = f"{name}:{number}", len(line) > MAX_LINE_BYTES
    while long and line and not line.endswith(b"\n"):  # to the end of this very line
      line = file.readline(MAX_LINE_BYTES)
    if long:
      yield where, Rejected("too_long", f"over {MAX_LINE_BYTES:,} bytes in one line")
      continue
    try:
      text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
      yield where, Rejected("encoding", f"not UTF-8 at byte {error.start}")
      continue
    if text.strip():
      yield where, text


def _delimited(
  lines: Iterator[tuple[str, str | Rejected]],
  path: pathlib.Path,
  columns: Sequence[str],
  delimiter: str,
) -> Iterator[Row | Rejection]:
  where, first = next(lines, ("", ""))
  if not where:
    raise PrepareError(f"{path}: empty; wants a header that names {', '.join(columns)}")
  try:
    header = [name.strip() for name in _split(first, delimiter)]
  except Rejected as error:
    raise PrepareError(f"{where}: the header cannot be read ({error}); save as UTF-8") from None
  _check_columns(where, header, columns)
  places = [header.index(name) for name in columns]
  rows = 0
  for where, line in lines:
    rows += 1
    try:
      fields = _split(line, delimiter)
      if len(fields) != len(header):
        raise Rejected("columns", f"{len(fields)} fields under a header of {len(header)}")
      if "\0" in "".join(fields):
        raise Rejected("malformed", "a NUL character")
      yield Row(where, tuple(fields[i] for i in places))
    except Rejected as error:
      yield Rejection(where, error.reason, error.detail)
  if not rows:
    raise PrepareError(f"{path}: has a header and no row")


def _split(line: str | Rejected, delimiter: str) -> list[str]:
  """One line -> its fields. Raises: Rejected; a line break inside quotation marks among others."""
  if isinstance(line, Rejected):
    raise line
  try:
    return next(csv.reader([line], delimiter=delimiter, strict=True))
  except csv.Error as error:
    words = str(error)
    if "unexpected end of data" in words:
      words = "a quotation mark is not closed on its line; one row is one line here"
    raise Rejected("malformed", words) from None


def _json_lines(
  lines: Iterator[tuple[str, str | Rejected]], path: pathlib.Path, columns: Sequence[str]
) -> Iterator[Row | Rejection]:
  rows, seen = 0, False
  for where, line in lines:
    rows += 1
    try:
      fields = _parse(line)
      if not seen:  # the first row that can be read stands for a header
        _check_columns(where, list(fields), columns)
        seen = True
      missing = [name for name in columns if name not in fields]
      if missing:
        raise Rejected("columns", f"no {', '.join(missing)}")
      yield Row(where, tuple(fields[name] for name in columns))
    except Rejected as error:
      yield Rejection(where, error.reason, error.detail)
  if not rows:
    raise PrepareError(f"{path}: empty; wants a JSON object a line, with {', '.join(columns)}")


def _parse(line: str | Rejected) -> Mapping[str, Any]:
  if isinstance(line, Rejected):
    raise line
  try:
    fields = json.loads(line, parse_constant=_refuse, object_pairs_hook=_unique)
    json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is no text
  except UnicodeEncodeError:
    raise Rejected("surrogate", "half a surrogate pair, which is no text") from None
  except RecursionError:
    raise Rejected("malformed", "nested too deeply") from None
  except ValueError as error:
    raise Rejected("malformed", str(error)) from None
  if not isinstance(fields, dict):
    raise Rejected("malformed", "not a JSON object")
  return fields


def _refuse(name: str) -> NoReturn:
  raise Rejected("not_a_number", f"{name} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  fields = dict(pairs)
  if len(fields) != len(pairs):
    raise Rejected("malformed", "a key stands twice")
  return fields


def _check_columns(where: str, there: Sequence[str], wanted: Sequence[str]) -> None:
  repeated = [name for name in wanted if there.count(name) > 1]
  if repeated:
    raise PrepareError(f"{where}: column {repeated[0]!r} stands twice in the header")
  missing = [name for name in wanted if name not in there]
  if missing:
    raise PrepareError(
      f"{where}: no column {', '.join(map(repr, missing))}; there are {', '.join(there)}; choose "
      "by --image-column, --caption-column, --label-column"
    )
