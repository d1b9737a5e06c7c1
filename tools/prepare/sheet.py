"""The contact sheet: some pairs of every split on one page, for people to look at."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module

from clip_jax.data import images, records
from clip_jax.evaluation import pages
from tools.prepare.shard_file import SHOWN

NAME = "contact_sheet.html"
_SIDE = 400  # pixels that are kept of an image before it is drawn at half of it


@dataclasses.dataclass(frozen=True)
class Shown:
  """A pair on the page."""

  key: str
  image: np.ndarray
  captions: tuple[str, ...]
  label: str | None


def write(
  path: pathlib.Path,
  manifest: Mapping[str, Any],
  splits: Mapping[str, Sequence[Mapping[str, Any]]],
  folders: Sequence[pathlib.Path],
) -> None:
  """Draws up to 100 pairs of each split by the hash of their keys; shards lie in any of `folders`.

  The same pairs whatever the shards are, and in the order of the hash, which is none of the data's.
  Raises: OSError.
  """
  shown = {split: _drawn(entries, folders) for split, entries in splits.items()}
  pages.write(path, pages.render("contact_sheet.html.j2", manifest=manifest, splits=shown))


def _drawn(entries: Sequence[Mapping[str, Any]], folders: Sequence[pathlib.Path]) -> list[Shown]:
  chances = sorted(
    (value, number, place)
    for number, entry in enumerate(entries)
    for value, place in entry["drawn"]
  )[:SHOWN]
  out = []
  for _, number, place in chances:
    name = entries[number]["file"]
    path = next(folder / name for folder in folders if (folder / name).is_file())
    reader = array_record_module.ArrayRecordReader(str(path))
    record = records.unpack(reader.read([place])[0])
    image = images.as_image(record.image)
    image.thumbnail((_SIDE, _SIDE))
    out.append(Shown(record.key, np.asarray(image), record.captions, record.label))
  return out
