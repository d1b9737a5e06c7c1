"""The first of two passes: every pair is looked at, and 32 bytes are kept of it and its name.

What depends on other pairs (duplicates, evaluation sets, which pairs fill which shard) is decided
on these bytes; then shards are written. A part that was looked at is not looked at again.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from clip_jax.data import images
from clip_jax.data.tables import Rejected
from clip_jax.evaluation.overlap import search
from tools.prepare import files, filters
from tools.prepare.jobs import Part, PrepareError

FACTS = np.dtype(
  [
    ("pixels", "<u8"),  # of the sha256 of size and pixels
    ("looks", "<u8"),  # see `looks_of`; 0 where it is not asked for
    ("name_at", "<u8"),  # where its name begins in the file of names
    ("position", "<u4"),  # among the items of its part
    ("splits", "<u4"),  # which of the entry's
  ]
)


LOOKS = 2  # raise it when the same images would have other looks
_SAYS_NOTHING = (0, 1 << 63)  # no bit but that of the mean brightness


@dataclasses.dataclass(frozen=True)
class Look:
  """Looks at part `number` of the inputs and writes what it saw to `work`.

  That is `<name>.facts`, FACTS [kept], `<name>.names`, a line of JSON for each (its key and its
  inputs), and `<name>.json`, the last: what was left out, and their sizes.
  """

  kind: str  # begins the names of files: "looked", or "evaluated" for evaluation sets
  number: int
  part: Part
  filters: filters.Filters
  hashed: bool  # whether the perceptual hash is needed
  work: pathlib.Path

  @property
  def name(self) -> str:
    return f"{self.kind}-{self.number:06d}"

  def __call__(self, report: Callable[[int], None]) -> None:
    rejected: list[list[str]] = []
    splits: dict[tuple[str, ...], int] = {}
    rows, names, at = [], [], 0
    for position, item in enumerate(self.part()):
      try:
        found = filters.checked(item.read(), self.filters)
        json.dumps(found.record.captions, ensure_ascii=False).encode()
      except (Rejected, images.ImageError, UnicodeEncodeError) as error:
        rejected += [[name, reason(error), str(error)] for name in item.inputs]
      else:
        assert found.image is not None, "it was decoded to be looked at"
        looks = looks_of(found.image) if self.hashed else 0
        which = splits.setdefault(item.splits, len(splits))
        rows.append((pixels(found.image), looks, at, position, which))
        name = json.dumps([item.key, *item.origins]).encode() + b"\n"
        names.append(name)
        at += len(name)
      report(1)
    path = self.work / self.name
    facts = np.array(rows, FACTS)
    files.replace(path.with_suffix(".names"), b"".join(names))
    files.replace(path.with_suffix(".facts"), facts.tobytes())
    entry = {
      "kept": len(rows),
      "names_bytes": at,
      "sha256": hashlib.sha256(facts.tobytes()).hexdigest(),
      "splits": [list(own) for own in splits],
      "rejected": rejected,
    }
    files.replace(path.with_suffix(".json"), json.dumps(entry).encode())


def pixels(image: Any) -> int:
  """64 bits of the sha256 of an RGB image's size and pixels: the same whatever file it comes in."""
  digest = hashlib.sha256(f"{image.width}x{image.height}".encode() + image.tobytes())
  return int.from_bytes(digest.digest()[:8])


def looks_of(image: Any) -> int:
  """64 bits that nearly the same images share: the perceptual hash.

  Where it says nothing of an image, as none of its frequencies stands out (one colour, or a plain
  run from dark to light), those of its pixels: black is not much like white, but the same image is
  found still. Mirrored copies have other hashes, and are not looked for.
  """
  found = search.perceptual_hash(image)
  return pixels(image) if found in _SAYS_NOTHING else found


def reason(error: Rejected | images.ImageError | UnicodeEncodeError) -> str:
  if isinstance(error, Rejected):
    return error.reason
  return error.cause if isinstance(error, images.ImageError) else "encoding"


def entry(look: Look) -> dict[str, Any] | None:
  """What an earlier call noted, where its files are there as they were."""
  path = look.work / look.name
  try:
    found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    data = path.with_suffix(".facts").read_bytes()
    whole = path.with_suffix(".names").stat().st_size == found["names_bytes"]
    same = hashlib.sha256(data).hexdigest() == found["sha256"]
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    return None
  return found if whole and same else None


@dataclasses.dataclass(frozen=True)
class Seen:
  """All that was looked at, in the order of the inputs.

  `facts` are FACTS [N]; `ends` int64 [parts], where each part's end in it; `splits` int64 [N],
  which of `split_names`; the rejections stay on disk.
  """

  looks: Sequence[Look]
  facts: np.ndarray
  ends: np.ndarray
  splits: np.ndarray
  split_names: tuple[tuple[str, ...], ...]

  def part_of(self, index: int) -> int:
    return int(np.searchsorted(self.ends, index, side="right"))

  def names(self, index: int) -> list[str]:
    """The key of an image and its inputs, read from disk."""
    look = self.looks[self.part_of(index)]
    with (look.work / f"{look.name}.names").open("rb") as file:
      file.seek(int(self.facts["name_at"][index]))
      key, *origins = json.loads(file.readline())
    return [key, *(origins or [key])]

  def rejected(self, part: int) -> list[list[str]]:
    found = entry(self.looks[part])
    if found is None:
      raise PrepareError(f"{self.looks[part].work}: {self.looks[part].name} has gone; start again")
    return found["rejected"]


def gather(looks: Sequence[Look]) -> Seen:
  """What all of them saw. Raises: PrepareError for one that is not there."""
  parts, ends, splits = [], [], []
  known: dict[tuple[str, ...], int] = {}
  total = 0
  for look in looks:
    found = entry(look)
    if found is None:
      raise PrepareError(f"{look.work / look.name}.json: not there or damaged; start again")
    part = np.frombuffer((look.work / f"{look.name}.facts").read_bytes(), FACTS)
    own = [known.setdefault(tuple(names), len(known)) for names in found["splits"]]
    total += len(part)
    parts.append(part)
    ends.append(total)
    splits.append(np.array(own, np.int64)[part["splits"]] if own else np.zeros(0, np.int64))
  return Seen(
    looks,
    np.concatenate(parts) if parts else np.zeros(0, FACTS),
    np.array(ends, np.int64),
    np.concatenate(splits) if splits else np.zeros(0, np.int64),
    tuple(known),
  )


def share(pixels_N: np.ndarray) -> np.ndarray:
  """Numbers from 0 to 1 that are the images' own, whatever data set they are in: float64 [N]."""
  return (pixels_N >> np.uint64(11)).astype(np.float64) / 2.0**53
