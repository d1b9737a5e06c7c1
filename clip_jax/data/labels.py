"""What a copy of a data set calls its classes -> what we call them; labels by rule; our own splits.

Copies number and name the same classes in different ways: TFDS sorts the pets without regard to
case, the published prompts do not. So classes are matched by name, and by number only where the
numbers are known to be the same.
"""

import collections
import hashlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

_DIFFICULT = " (difficult)"
_BETWEEN = "; "


class LabelError(ValueError):
  """A label or class that is none of the data set's: which, and what to do."""


def distinct(classes: Sequence[str]) -> tuple[str, ...]:
  """The classes as labels that no two share: of equal names the later ones get their number.

  ImageNet has two classes "missile" and two "sunglasses" in the published prompts.
  """
  first = {name: k for k, name in reversed(list(enumerate(classes)))}
  return tuple(name if first[name] == k else f"{name} ({k})" for k, name in enumerate(classes))


def match(
  names: Sequence[str],
  classes: Sequence[str],
  aliases: Mapping[str, int],
  numbered: bool = False,
  in_order: bool = False,
) -> tuple[int | None, ...]:
  """Which of `classes` each of a copy's class names is; None: of no class.

  Names are the same if their letters and digits are, in any case; `aliases` are other names of
  classes. Where not one name is known, and all numbers from 0 stand there and `numbered`
  says that they count as `classes` do, the numbers decide; or with `in_order` the places, if
  there are as many names as classes.
  Raises: LabelError when that fails, or when two names are the same class.
  """
  if [plain(name) for name in names] == [plain(name) for name in classes]:
    return tuple(range(len(classes)))
  known = {plain(name): k for k, name in reversed(list(enumerate(classes)))}
  known = {plain(alias): k for alias, k in aliases.items()} | known
  found = tuple(known.get(plain(name)) for name in names)
  if any(k is not None for k in found):
    twice = [k for k, times in collections.Counter(found).items() if times > 1 and k is not None]
    if twice:
      same = [name for name, k in zip(names, found, strict=True) if k == twice[0]]
      raise LabelError(f"{' and '.join(map(repr, same))} are both {classes[twice[0]]!r}")
    return found
  numbers = [int(name) if name.isascii() and name.isdecimal() else -1 for name in names]
  if numbered and sorted(numbers) == list(range(len(classes))):
    return tuple(numbers)
  if in_order and len(names) == len(classes):
    return tuple(range(len(classes)))
  return found


def check(found: Sequence[int | None], names: Sequence[str], classes: Sequence[str]) -> None:
  """Raises: LabelError naming the first class of a copy that `match` found no class for."""
  if None in found:
    name = names[list(found).index(None)]
    shown = ", ".join(map(repr, classes[:3]))
    raise LabelError(
      f"class {name!r} is none of the {len(classes)} ({shown}, ...), as {list(found).count(None)} "
      f"of {len(names)}; name the classes of the copy as these"
    )


def plain(name: str) -> str:
  """The letters and digits of a class name; of SUN397's "/a/abbey" without the first letter."""
  return "".join(c for c in re.sub(r"^/\w/", "", name).casefold() if c.isalnum())


def at(names: Sequence[str | None] | None, number: int) -> str:
  """The class name of a label's number. Raises: LabelError when it is out of range."""
  if not names or not 0 <= number < len(names):
    raise LabelError(f"label {number} is out of range: there are {len(names or ())} classes")
  name = names[number]
  if name is None:
    raise LabelError(f"label {number} is none of the classes that are evaluated")
  return name


def join(shown: Sequence[str], difficult: Sequence[str] = ()) -> str:
  """One text for an image of several classes; `difficult`: those that it shows only so."""
  return _BETWEEN.join([*shown, *(name + _DIFFICULT for name in difficult)])


def row(label: str, classes: Sequence[str]) -> np.ndarray:
  """The text of `join` -> int8 [C]: 1 shown, 0 not, -1 difficult. Raises: LabelError."""
  out, place = np.zeros(len(classes), np.int8), {name: k for k, name in enumerate(classes)}
  for part in filter(None, label.split(_BETWEEN)):
    name = part.removesuffix(_DIFFICULT)
    if name not in place:
      raise LabelError(f"label {label!r}: {name!r} is none of the {len(classes)} classes")
    out[place[name]] = -1 if part.endswith(_DIFFICULT) else 1
  return out


def vehicle_distance(kinds: Sequence[int], depths: Sequence[float]) -> int:
  """KITTI's task, from its objects' kinds and depths in metres -> class 0 to 3.

  The nearest car, van or truck (kinds 0, 1, 2) stands up to 8 m away, up to 20 m, farther; or
  there is none.
  Source: the task `closest_vehicle_distance` of VTAB (Zhai et al. 2019, arXiv 1910.04867).
  """
  vehicles = [float(z) for kind, z in zip(kinds, depths, strict=True) if kind < 3]
  return int(np.searchsorted([8.0, 20.0, 999.0], min(vehicles, default=1000.0)))


def object_count(objects: int) -> int:
  """CLEVR's task: 3 to 10 objects -> class 0 to 7. Raises: LabelError. Source: VTAB, as above."""
  if not 3 <= objects <= 10:
    raise LabelError(f"{objects} objects: CLEVR's images have 3 to 10")
  return objects - 3


def draw(pool: int, train: int, test: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Our own split of a pool of records: the indices of train and of test, each sorted.

  The records are ordered by the sha256 of "seed index": the first `test` are for test, the next
  `train` for train. In a pool too small for both each gets its part of it. (The paper drew its
  own and did not release them.)
  """
  keys = [hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(pool)]
  order = np.array(sorted(range(pool), key=keys.__getitem__), np.int64)
  if train + test > pool:
    test = round(pool * test / (train + test))
    train = pool - test
  return np.sort(order[test : test + train]), np.sort(order[:test])
