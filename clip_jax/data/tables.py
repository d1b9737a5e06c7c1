"""Strict reading of captions: CSV, TSV or JSON lines, one row a line, no row lost in another.

A line is read by itself, so a quotation mark that is never closed spoils its own row alone. What
is wrong with a file as a whole is an error; what is wrong with one row makes a named rejection.
A row's image is named by a path below a folder: no address is fetched, no command run, no link out
of the folder followed.
"""

import csv
import dataclasses
import json
import pathlib
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

MAX_LINE_BYTES = 1_000_000
DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*DELIMITERS, ".jsonl")
_URL = re.compile(r"^(\w[\w+.-]+:)?//|^(https?|ftp|file|data|gs|s3):", re.IGNORECASE)
_PIPE = re.compile(r"^pipe:|^\||\|$", re.IGNORECASE)
_DRIVE = re.compile(r"^[A-Za-z]:|^~")


class TableError(ValueError):
  """A table that cannot be read as a whole: which, why, what to do."""


class Rejected(Exception):
  """One row or item that is left out. `reason` is one word, for counts."""

  def __init__(self, reason: str, detail: str = ""):
    super().__init__(detail or reason)
    self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Rejection:
  """Which input was left out, the reason, and more where there is more."""

  key: str
  reason: str
  detail: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
  """The asked-for fields of one row, in the order asked for; `where` is file:line."""

  where: str
  fields: tuple[Any, ...]


def read(path: pathlib.Path, columns: Sequence[str]) -> Iterator[Row | Rejection]:
  """All rows of a file, each as its fields or as a rejection; blank lines are no rows.

  Raises: TableError for a file of another kind, without a row, without a column asked for, or
    whose header cannot be read; OSError.
  """
  if path.suffix not in SUFFIXES:
    raise TableError(f"{path}: wants a name that ends in .csv, .tsv or .jsonl")
  with path.open("rb") as file:
    lines = _lines(file, path.name)
    if path.suffix == ".jsonl":
      yield from _json_lines(lines, path, columns)
    else:
      yield from _delimited(lines, path, columns, DELIMITERS[path.suffix])


def _lines(file: Any, name: str) -> Iterator[tuple[str, str | Rejected]]:
  """(file:line, the line's text or why it has none); blank lines are passed over."""
  number = 0
  while line := file.readline(MAX_LINE_BYTES + 1):
    number += 1
    where, rest = f"{name}:{number}", line
    while len(line) > MAX_LINE_BYTES and rest and not rest.endswith(b"\n"):  # to this line's end
      rest = file.readline(MAX_LINE_BYTES)
    try:
      text = text_of(line, first=number == 1)
    except Rejected as error:
      yield where, error
      continue
    if text.strip():
      yield where, text


def text_of(line: bytes, first: bool) -> str:
  """A line's text, without its end; `first`: of the file, where a byte-order mark may stand.

  Raises: Rejected.
  """
  if len(line) > MAX_LINE_BYTES:
    raise Rejected("too_long", f"over {MAX_LINE_BYTES:,} bytes in one line")
  try:
    return line.decode("utf-8-sig" if first else "utf-8").rstrip("\r\n")
  except UnicodeDecodeError as error:
    raise Rejected("encoding", f"not UTF-8 at byte {error.start}") from None


def _delimited(
  lines: Iterator[tuple[str, str | Rejected]],
  path: pathlib.Path,
  columns: Sequence[str],
  delimiter: str,
) -> Iterator[Row | Rejection]:
  where, first = next(lines, ("", ""))
  if not where:
    raise TableError(f"{path}: empty; wants a header that names {', '.join(columns)}")
  names = header(first, delimiter, where)
  check_columns(where, names, columns)
  places = [names.index(name) for name in columns]
  rows = 0
  for where, line in lines:
    rows += 1
    try:
      fields = split(line, delimiter, len(names))
      yield Row(where, tuple(fields[i] for i in places))
    except Rejected as error:
      yield Rejection(where, error.reason, error.detail)
  if not rows:
    raise TableError(f"{path}: has a header and no row")


def header(line: str | Rejected, delimiter: str, where: str) -> list[str]:
  """The names of a table's columns. Raises: TableError."""
  try:
    return [name.strip() for name in _fields(line, delimiter)]
  except Rejected as error:
    raise TableError(f"{where}: the header cannot be read ({error}); save as UTF-8") from None


def split(line: str | Rejected, delimiter: str, columns: int) -> list[str]:
  """The fields of one line below a header of so many. Raises: Rejected."""
  fields = _fields(line, delimiter)
  if len(fields) != columns:
    raise Rejected("columns", f"{len(fields)} fields under a header of {columns}")
  if "\0" in "".join(fields):
    raise Rejected("malformed", "a NUL character")
  return fields


def _fields(line: str | Rejected, delimiter: str) -> list[str]:
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
      fields = json_object(line)
      if not seen:  # the first row that can be read stands for a header
        check_columns(where, list(fields), columns)
        seen = True
      missing = [name for name in columns if name not in fields]
      if missing:
        raise Rejected("columns", f"no {', '.join(missing)}")
      yield Row(where, tuple(fields[name] for name in columns))
    except Rejected as error:
      yield Rejection(where, error.reason, error.detail)
  if not rows:
    raise TableError(f"{path}: empty; wants a JSON object a line, with {', '.join(columns)}")


def json_object(line: str | Rejected) -> Mapping[str, Any]:
  """Strict JSON: no NaN, no key twice, no half of a surrogate pair. Raises: Rejected."""
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


def check_columns(where: str, there: Sequence[str], wanted: Sequence[str]) -> None:
  """Raises: TableError when a wanted column is not there, or twice."""
  repeated = [name for name in wanted if there.count(name) > 1]
  if repeated:
    raise TableError(f"{where}: column {repeated[0]!r} stands twice in the header")
  missing = [name for name in wanted if name not in there]
  if missing:
    raise TableError(
      f"{where}: no column {', '.join(map(repr, missing))}; there are {', '.join(there)}; say by "
      "the options that end in column which are the image's and the caption's"
    )


def captions_of(value: Any) -> list[str]:
  """One caption or a list of them, white space made even. Raises: Rejected, also for none."""
  texts = [text_field(v, "caption") for v in (value if isinstance(value, list) else [value])]
  found = [text for text in dict.fromkeys(texts) if text and text.casefold() != "nan"]
  if not found:
    raise Rejected("empty_caption")
  return found


def text_field(value: Any, what: str) -> str:
  """A field of text, white space made even; "" where there is none. Raises: Rejected."""
  if value is None:
    return ""
  if not isinstance(value, str):
    raise Rejected("type", f"the {what} is {type(value).__name__}, not text")
  return " ".join(value.split())


def safe_name(value: Any) -> str:
  """A path below the folder, plain. Raises: Rejected for what is none; it is not looked up."""
  if not isinstance(value, str) or not value.strip():
    raise Rejected("no_image", f"{value!r} names no image")
  name = value.strip()
  shown = name[:200]
  if _URL.search(name):
    raise Rejected("url", f"{shown}: addresses are never fetched; download the images first")
  if _PIPE.search(name):
    raise Rejected("pipe", f"{shown}: commands are never run")
  normal = posixpath.normpath(name.replace("\\", "/"))
  outside = normal.startswith(("/", "../")) or normal in ("..", ".") or _DRIVE.search(name)
  if outside or not name.isprintable():
    raise Rejected("path", f"{shown!r} is no path below the folder")
  return normal


def find(root: pathlib.Path, name: str) -> pathlib.Path:
  """The file of that name, links followed. Raises: Rejected when it is not below `root`."""
  try:
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
      raise Rejected("path", f"{name}: a link that leads out of the folder")
    if not path.exists():
      raise Rejected("missing_file", f"{name}: not in {root}")
    if not path.is_file():
      raise Rejected("not_a_file", f"{name}: no plain file")
  except (OSError, RuntimeError) as error:  # too long a name, a circle of links
    raise Rejected("storage", f"{name}: {error}") from error
  return path
