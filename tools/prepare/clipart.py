"""Clip art and stamps: drawings and photos with captions written by people.

Sources: the Open Clip Art Library 0.18 (PNG renderings, metadata in the SVG of the same name) and
the stamps of Tux Paint (the English caption is the first line of the text beside the image).
"""

import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rich.progress
from PIL import Image

from clip_jax.data import images, records, tables
from tools.prepare import captions, held_out, jobs, packages

PACKAGES = {
  "openclipart-png": packages.Wanted("usr/share/openclipart/png", (".png",)),
  "openclipart-svg": packages.Wanted("usr/share/openclipart/svg", (".svg",)),
  "tuxpaint-stamps-default": packages.Wanted("usr/share/tuxpaint/stamps", (".png", ".svg", ".txt")),
}
NAME = "clipart"
MAX_SIDE = 128  # pixels
TEST_CLIPART, TEST_STAMPS = 350, 150
_SAME_CAPTIONS = 20  # images with one and the same captions that are kept

# The folders of the stamps that are kinds of things, in the words that the keywords of the clip
# art use (their plurals are put into the singular); the rest has no class.
_CLASSES = {
  "animals/birds": "bird",
  "animals/fish": "fish",
  "animals/insects": "insect",
  "animals/mammals": "mammal",
  "animals/marsupials": "mammal",
  "clothes": "clothing",
  "food/fruit": "fruit",
  "food/nuts": "nut",
  "food/vegetables": "vegetable",
  "hobbies/music": "musical instrument",
  "household/dishes": "dish",
  "household/tools": "tool",
  "medical": "medicine",
  "military": "military",
  "people": "people",
  "plants/flowers": "flower",
  "plants/mushrooms": "mushroom",
  "plants/trees": "tree",
  "seasonal/christmas": "Christmas",
  "seasonal/easter": "Easter",
  "seasonal/halloween": "Halloween",
  "seasonal/hanukkah": "Hanukkah",
  "seasonal/newyears": "New Year",
  "space": "space",
  "sports": "sports",
  "symbols/alphabets": "letter",
  "symbols/chess": "chess piece",
  "symbols/faces": "face",
  "symbols/math": "mathematics",
  "symbols/money": "money",
  "symbols/music": "musical note",
  "symbols/shapes": "shape",
  "town/flags": "flag",
  "town/houses": "house",
  "town/monuments": "monument",
  "town/roadsigns": "road sign",
  "vehicles": "vehicle",
}


@dataclasses.dataclass(frozen=True)
class _Source:
  """An image file that has captions."""

  key: str
  path: pathlib.Path
  captions: tuple[str, ...]
  label: str | None = None


def settings(max_side: int, test_clipart: int, test_stamps: int) -> dict[str, Any]:
  return {"max_side": max_side, "test_clipart": test_clipart, "test_stamps": test_stamps}


def job(trees: Mapping[str, packages.Tree], chosen: Mapping[str, Any]) -> jobs.Job:
  """The data set of the three unpacked packages."""
  return jobs.Job(
    name=NAME,
    description=(
      "Clip art with its titles, descriptions and keywords, and Tux Paint's stamps with their "
      f"captions; on white, at most {chosen['max_side']} pixels a side. Split test: pairs whose "
      "image and first caption are unlike all others; stamps_test: the stamps of test, once more"
    ),
    licence="public domain (Open Clip Art Library); GPL-2 (Tux Paint stamps)",
    source={name: tree.fingerprint for name, tree in sorted(trees.items())},
    settings=chosen,
    plan=functools.partial(_plan, dict(trees), dict(chosen)),
  )


def _plan(
  trees: Mapping[str, packages.Tree], chosen: Mapping[str, Any], progress: rich.progress.Progress
) -> jobs.Plan:
  rejected: list[tables.Rejection] = []
  dropped: Counter[str] = Counter()
  sources = [
    *_clip_art(trees["openclipart-png"].root, trees["openclipart-svg"].root, rejected, dropped),
    *_stamps(trees["tuxpaint-stamps-default"].root, rejected),
  ]
  found, pixels = [], []
  task = progress.add_task("reading images", total=len(sources))
  seen: dict[str, str] = {}
  crowd: Counter[tuple[str, ...]] = Counter()
  for source in sources:
    progress.advance(task)
    try:
      record, small = _read(source, chosen["max_side"], seen)
      crowd[record.captions] += 1
      if crowd[record.captions] > _SAME_CAPTIONS:
        first = record.captions[0]
        raise tables.Rejected("same_captions", f"over {_SAME_CAPTIONS} images: {first}")
    except tables.Rejected as error:
      rejected.append(tables.Rejection(source.key, error.reason, error.detail))
    except images.ImageError as error:
      rejected.append(tables.Rejection(source.key, error.cause, str(error)))
    else:
      found.append(record)
      pixels.append(small)
  splits = _splits(found, np.array(pixels), chosen)
  items = [
    jobs.Item(record.key, splits[record.key], functools.partial(_same, record)) for record in found
  ]
  classes = sorted({r.label for r in found if r.label}, key=str.casefold)
  return jobs.Plan(items, rejected, classes, {"captions_dropped": dict(dropped.most_common())})


def _same(record: records.Record) -> records.Record:
  return record


def _clip_art(
  png: pathlib.Path,
  svg: pathlib.Path,
  rejected: list[tables.Rejection],
  dropped: Counter[str],
) -> list[_Source]:
  """All PNG files whose SVG has something to say."""
  metadata, paths = {}, {}
  for path in packages.walk(png, (".png",)):
    key = path.relative_to(png).as_posix().removesuffix(".png")
    if path.is_symlink():
      target = os.readlink(path)
      rejected.append(tables.Rejection(f"openclipart/{key}", "alias", f"a link to {target}"))
      continue
    try:
      metadata[key] = captions.read_metadata(svg / f"{key}.svg")
      paths[key] = path
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
      rejected.append(tables.Rejection(f"openclipart/{key}", "no_metadata", str(error)))
  out = []
  for key, found in captions.of_clip_art(metadata, dropped).items():
    if found:
      out.append(_Source(f"openclipart/{key}", paths[key], found))
    else:
      title = metadata[key].title
      rejected.append(tables.Rejection(f"openclipart/{key}", "no_caption", f"title {title!r}"))
  return out


def _stamps(root: pathlib.Path, rejected: list[tables.Rejection]) -> list[_Source]:
  """All PNG stamps with a caption; those that are only drawn as SVG are named as left out."""
  out = []
  for path in packages.walk(root, (".png", ".svg")):
    name = path.relative_to(root).with_suffix("").as_posix()
    key = f"stamps/{name}"
    if path.suffix == ".svg":
      if not path.with_suffix(".png").exists():
        rejected.append(tables.Rejection(key, "svg_only", "no PNG of the same name"))
      continue
    try:
      caption = captions.of_stamp(path.with_suffix(".txt"))
    except FileNotFoundError:
      rejected.append(tables.Rejection(key, "no_caption", "no text beside the image"))
      continue
    except UnicodeDecodeError as error:
      rejected.append(tables.Rejection(key, "encoding", str(error)))
      continue
    if captions.letters(caption):
      out.append(_Source(key, path, (caption,), _class_of(name)))
    else:
      rejected.append(tables.Rejection(key, "no_caption", f"first line {caption!r}"))
  return out


def _class_of(name: str) -> str | None:
  parts = name.split("/")
  return _CLASSES.get("/".join(parts[:2])) or _CLASSES.get(parts[0])


def _read(
  source: _Source, max_side: int, seen: dict[str, str]
) -> tuple[records.Record, np.ndarray]:
  """The record with its image on white, downscaled, as PNG; and a small picture of it.

  Raises: ImageError; Rejected for an image without content or that another file had already.
  """
  if not source.path.resolve().is_file():
    raise tables.Rejected("missing_file")
  image = images.as_image(source.path)
  image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
  if len(image.getcolors(max_side**2) or ()) == 1:
    raise tables.Rejected("blank", "one colour all over")
  digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
  first = seen.setdefault(digest, source.key)
  if first != source.key:
    raise tables.Rejected("duplicate", f"the same pixels as {first}")
  out = io.BytesIO()
  image.save(out, "PNG", compress_level=9)
  return (
    records.Record(source.key, out.getvalue(), source.captions, source.label),
    held_out.small_picture(image),
  )


def _splits(
  found: Sequence[records.Record], pixels_NF: np.ndarray, chosen: Mapping[str, Any]
) -> dict[str, tuple[str, ...]]:
  """Key -> the splits it goes to.

  Raises: PrepareError when fewer pairs than asked for are unlike all others.
  """
  alone = held_out.unlike_all_others(
    [_base_name(r.key) for r in found], [r.captions for r in found], pixels_NF
  )
  chances = {
    "clip art": [r for r, single in zip(found, alone, strict=True) if single and _telling(r)],
    "stamps": [r for r, single in zip(found, alone, strict=True) if single and r.label],
  }
  splits: dict[str, tuple[str, ...]] = dict.fromkeys((r.key for r in found), ("train",))
  for kind, prefix, wanted, to in (
    ("clip art", "openclipart/", chosen["test_clipart"], ("test",)),
    ("stamps", "stamps/", chosen["test_stamps"], ("test", "stamps_test")),
  ):
    keys = [r.key for r in chances[kind] if r.key.startswith(prefix)]
    if len(keys) < wanted:
      raise jobs.PrepareError(
        f"{wanted} pairs of {kind} were to be held out, and {len(keys)} are unlike all others; "
        f"ask for fewer (--test-{kind.replace(' ', '')} {len(keys)})"
      )
    splits.update(dict.fromkeys(held_out.drawn(keys, wanted), to))
  return splits


def _telling(record: records.Record) -> bool:
  """Whether the first caption says to people what is seen: two words or more, no icon of a program.

  The files of icon themes are named for programs to find: "hdd win unmount".
  """
  first = record.captions[0]
  words = len(captions.letters(first).split())
  return words > 1 and not first.startswith("clip art of") and "-theme/" not in record.key


def _base_name(key: str) -> str:
  """What variants of one picture have in common: "stamps lion" of stamps/.../lion-2 and lion."""
  kind, _, name = key.partition("/")
  stem = pathlib.PurePosixPath(name).name.casefold()
  words = re.sub(r"(mirror|flip|left|right|outlined?|filled|photo|bw|alt)(?![a-z])", " ", stem)
  return f"{kind} {captions.letters(words) or stem}"
