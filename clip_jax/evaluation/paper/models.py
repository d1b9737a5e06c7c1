"""The models of the paper's tables, from NAME=WEIGHTS: over all devices, with a hash of them."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

from clip_jax import inference, sharding
from clip_jax.evaluation import chosen
from clip_jax.evaluation.paper.cells import Weights
from clip_jax.interop import sources


class ModelsError(ValueError):
  """Models that no table can name: which, and what to do."""


@dataclasses.dataclass(frozen=True)
class Named:
  """What a model is called in the tables, and where its weights are."""

  name: str
  path: pathlib.Path


def parse(words: Sequence[str]) -> tuple[Named, ...]:
  """NAME=WEIGHTS, as often as there are models. Raises: ModelsError naming the word."""
  out: dict[str, Named] = {}
  for word in words:
    name, equals, path = word.partition("=")
    if not (name.strip() and equals and path):
      raise ModelsError(f"{word!r}: want NAME=WEIGHTS, as RN50=weights/RN50.pt")
    if not name.isprintable() or name != name.strip():
      raise ModelsError(f"{name!r}: a name without spaces around it, in one line")
    if name in out:
      raise ModelsError(f"{name!r}: two models of one name; give one of them another")
    out[name] = Named(name, pathlib.Path(path))
  if not out:
    raise ModelsError("no models: want one or more NAME=WEIGHTS")
  return tuple(out.values())


def load(named: Named) -> Weights:
  """The weights in use, by all devices of all processes: every one must call.

  Raises: as `interop.sources.load`.
  """
  model = sources.load(named.path)
  digest = fingerprint(named.path, model)
  return Weights(named.name, inference.spread(model, sharding.make_mesh()), digest)


def fingerprint(path: pathlib.Path, model: inference.Clip) -> str:
  """sha256 of a released file; of any other weights, over all that the model computes by.

  The released files are known by their own hash, by which CLIP_benchmark's users know them too.
  Of others see `chosen.weights_hash`.
  """
  if path.is_file():
    with path.open("rb") as file:
      own = hashlib.file_digest(file, "sha256").hexdigest()
    if own in sources.RELEASED.values():
      return own
  return chosen.weights_hash(model)
