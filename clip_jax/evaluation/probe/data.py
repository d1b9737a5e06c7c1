"""The splits that a probe is trained, tuned and tested on, as the command line names them."""

import dataclasses
import itertools
import pathlib

from clip_jax.data import records
from clip_jax.evaluation import chosen

_VALIDATION = ("validation", "valid", "val")  # what data call the split that lambda is chosen on


@dataclasses.dataclass(frozen=True)
class Data:
  """Splits of the same classes. `validation` None: there is none, a part of train is held back."""

  train: chosen.Chosen
  validation: chosen.Chosen | None
  test: chosen.Chosen

  @property
  def splits(self) -> tuple[chosen.Chosen, ...]:
    return (self.train, *((self.validation,) if self.validation else ()), self.test)

  @property
  def notes(self) -> tuple[str, ...]:
    """In sentences; what is to be said of several splits once."""
    return tuple(dict.fromkeys(note for split in self.splits for note in split.notes))

  def sample(self, limit: int, seed: int) -> "Data":
    """At most `limit` images of every split (0: all), drawn at random. Raises: ChoiceError."""
    validation = self.validation and self.validation.sample(limit, seed)
    return Data(self.train.sample(limit, seed), validation, self.test.sample(limit, seed))


def choose(asked: chosen.Asked, train: str, validation: str, resolution: int) -> Data:
  """Opens the test split, which is what is asked for, and the splits `train` and `validation`.

  `validation` "": the data's own, where one of their splits is called so; or none. Of the paper's
  datasets the training set holds it, where they have one (`splits.own_validation`).
  Raises: ChoiceError where a split is not there, two are the same images, or one has a class that
    the other lacks; and as `chosen.choose`.
  """
  validation = validation or _own_validation(asked, (asked.split, train))
  test = chosen.choose(asked, resolution)
  found = Data(
    _beside(asked, train, resolution),
    _beside(asked, validation, resolution) if validation else None,
    test,
  )
  names = (train, *((validation,) if validation else ()), asked.split)
  for (name, one), (other, two) in itertools.combinations(zip(names, found.splits, strict=True), 2):
    if one.source.fingerprint == two.source.fingerprint:
      raise chosen.ChoiceError(
        f"--data {asked.data}: splits {name!r} and {other!r} are the same {len(one.source):,} "
        "images; a probe wants others to test on than to learn from"
      )
  for name, split in zip(names[1:], found.splits[1:], strict=True):
    _check_known(asked, (name, split), (train, found.train))
  _check_known(asked, (train, found.train), (asked.split, test))
  return found


def _beside(asked: chosen.Asked, split: str, resolution: int) -> chosen.Chosen:
  """Another split of the same data."""
  place = pathlib.Path(asked.data)
  prepared = asked.dataset or (place / records.MANIFEST).is_file()
  if not prepared and (place / asked.split).is_dir() and not (place / split).is_dir():
    known = ", ".join(sorted(p.name for p in place.iterdir() if p.is_dir()))
    raise chosen.ChoiceError(f"--data {asked.data}: no split {split!r}; it has {known}")
  return chosen.choose(dataclasses.replace(asked, split=split), resolution)


def _own_validation(asked: chosen.Asked, others: tuple[str, ...]) -> str:
  """What the data's own validation split is called, where it is none of `others`; or ""."""
  place, own = pathlib.Path(asked.data), set[str]()
  if asked.dataset or not place.is_dir():
    return ""
  if (place / records.MANIFEST).is_file():
    own = set(records.read_manifest(place)["splits"])
  elif (place / asked.split).is_dir():
    own = {name for name in _VALIDATION if (place / name).is_dir()}
  return next((name for name in _VALIDATION if name in own and name not in others), "")


def _check_known(
  asked: chosen.Asked, one: tuple[str, chosen.Chosen], other: tuple[str, chosen.Chosen]
) -> None:
  """Raises: ChoiceError where one split has a class that the other does not have."""
  classes = one[1].prompt_set.classes
  known = set(other[1].prompt_set.classes)
  strange = [name for name in classes if name not in known]
  if strange:
    raise chosen.ChoiceError(
      f"--data {asked.data}: class {strange[0]!r} is in split {one[0]!r} and not in {other[0]!r} "
      f"(as {len(strange)} of {len(classes)}): a probe wants the same classes in both; where that "
      "is meant, give all of them by --classes FILE"
    )
