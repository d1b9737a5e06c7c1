"""A folder of images with a table of captions: rows of the same image make one record."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence

from clip_jax.data import images, records, tables
from clip_jax.data.tables import Rejected, Rejection
from tools.prepare.jobs import Item, Job, Plan, PrepareError

NAME = "folder"


@dataclasses.dataclass
class _Group:
  """All good rows of one image."""

  captions: list[str] = dataclasses.field(default_factory=list)
  label: str | None = None
  rows: list[str] = dataclasses.field(default_factory=list)


def job(
  root: pathlib.Path,
  table: pathlib.Path,
  columns: tuple[str, str, str | None],
  test_fraction: float,
) -> Job:
  """The data set of a folder and its table; `columns` are those of image, caption and label.

  Raises: TableError for a table that cannot be read; PrepareError for a folder that is none;
    OSError.
  """
  if not root.is_dir():
    raise PrepareError(f"{root}: no such folder of images")
  groups: dict[str, _Group] = {}
  rejected: list[Rejection] = []
  for row in tables.read(table, [name for name in columns if name is not None]):
    if isinstance(row, Rejection):
      rejected.append(row)
      continue
    try:
      _add(groups, row)
    except Rejected as error:
      rejected.append(Rejection(row.where, error.reason, error.detail))
  classes = sorted({group.label for group in groups.values() if group.label})
  items = [
    Item(
      key=name,
      splits=("test" if _share(name) < test_fraction else "train",),
      load=functools.partial(_record, root, name, group),
      origins=tuple(group.rows),
    )
    for name, group in groups.items()
  ]
  return Job(
    name=NAME,
    description=f"images of {root.name} with the captions of {table.name}",
    licence="not stated",
    source={
      "table": hashlib.sha256(table.read_bytes()).hexdigest(),
      "images": _stamp(root, list(groups)),
    },
    settings={"columns": list(columns), "test_fraction": test_fraction},
    plan=lambda progress: Plan(items, rejected, classes),
  )


def _add(groups: dict[str, _Group], row: tables.Row) -> None:
  """Puts a row with its image. Raises: Rejected."""
  name = tables.safe_name(row.fields[0])
  found = tables.captions_of(row.fields[1])
  label = tables.text_field(row.fields[2], "label") if len(row.fields) > 2 else ""
  group = groups.get(name, _Group(label=label or None))
  if group.label != (label or None):
    raise Rejected("label", f"{name}: {label!r} here, {group.label!r} in {group.rows[0]}")
  fresh = [caption for caption in found if caption not in group.captions]
  if not fresh:
    raise Rejected("repeated", f"{name}: the same caption as before")
  groups[name] = group
  group.captions += fresh
  group.rows.append(row.where)


def _record(root: pathlib.Path, name: str, group: _Group) -> records.Record:
  """Reads one image. Raises: Rejected, ImageError."""
  path = tables.find(root, name)
  try:
    if path.stat().st_size > images.MAX_BYTES:
      raise images.ImageError("too_large", f"{name}: over the limit of {images.MAX_BYTES:,} bytes")
    return records.Record(name, path.read_bytes(), tuple(group.captions), group.label)
  except OSError as error:
    raise Rejected("storage", f"{name}: {error.strerror or error}") from error


def _share(name: str) -> float:
  """A number from 0 to 1 that is the name's own."""
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def _stamp(root: pathlib.Path, names: Sequence[str]) -> str:
  """Changes when an image does: sha256 over names, sizes and times of change."""
  digest = hashlib.sha256()
  for name in names:
    try:
      status = tables.find(root, name).stat()
      digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    except (Rejected, OSError):
      digest.update(f"{name} -\n".encode())
  return digest.hexdigest()
