"""What there is to prepare: a data set as a job, its inputs as items, and why one is left out."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import rich.progress

from clip_jax.data import images, records
from clip_jax.data.tables import Rejected, Rejection

VERSION = 4  # raise it whenever the same source would give other records


class PrepareError(ValueError):
  """The data cannot be prepared: what is wrong, where, what to do."""


@dataclasses.dataclass(frozen=True)
class Item:
  """A record to be. `load` makes it or raises Rejected or ImageError.

  Its image is the bytes of a file, not decoded yet, or uint8 [H, W, 3]. It is written to every
  split of `splits` and counted once. `origins` names the inputs that it stands for (rows of a
  table), where that is not its key alone.
  """

  key: str
  splits: tuple[str, ...]
  load: Callable[[], records.Record]
  origins: tuple[str, ...] = ()

  @property
  def inputs(self) -> tuple[str, ...]:
    return self.origins or (self.key,)

  def read(self) -> records.Record:
    """`load`, which may meet anything in millions of inputs. Raises: Rejected, ImageError."""
    try:
      return self.load()
    except (Rejected, images.ImageError):
      raise
    except OSError as error:
      raise Rejected("storage", str(error)) from error
    except Exception as error:  # of any kind: libraries that read files of strangers
      raise Rejected("other", f"{type(error).__name__}: {error}") from error


Part = Callable[[], Sequence[Item]]  # a run of the inputs; called in whichever process works on it


@dataclasses.dataclass(frozen=True)
class Listed:
  """A part whose items are there already."""

  items: tuple[Item, ...]

  def __call__(self) -> Sequence[Item]:
    return self.items


@dataclasses.dataclass(frozen=True)
class Plan:
  """What there is to write, and what is already known to be left out.

  Several processes may share the work: items and parts are then pickled.
  """

  items: Sequence[Item] = ()
  rejected: Iterable[Rejection] = ()  # gone through once
  classes: Sequence[str] = ()
  notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # into the manifest
  # In place of items, where they are too many to hold: those of the split "train", part by part.
  parts: Sequence[Part] = ()


@dataclasses.dataclass(frozen=True)
class Job:
  """A data set: its description for the manifest, and how to plan it.

  `settings` and `source` (what was read, by name, with its sha256) are its identity: a finished
  folder of the same identity is left alone, an unfinished one goes on.
  """

  name: str
  description: str
  licence: str
  source: Mapping[str, str]
  settings: Mapping[str, Any]
  plan: Callable[[rich.progress.Progress], Plan]

  @property
  def identity(self) -> dict[str, Any]:
    return {**request(self.name, self.settings), "source": dict(self.source)}


def request(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
  """The part of an identity that is known before the source is."""
  return {"version": VERSION, "name": name, "settings": dict(settings)}
