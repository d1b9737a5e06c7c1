"""The models of the paper's tables, from NAME=WEIGHTS: over all devices, with a hash of them."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from clip_jax import inference, sharding
from clip_jax.evaluation.paper_cells import Weights
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
  if jax.device_count() > 1:
    everywhere = sharding.replicated(sharding.make_mesh())
    params, stats = (
      jax.tree.map(lambda x: jax.device_put(np.asarray(x), everywhere), tree)
      for tree in (model.params, model.batch_stats)
    )
    model = inference.Clip(model.config, params, model.tokenizer, model.step, stats)
  return Weights(named.name, model, digest)


def fingerprint(path: pathlib.Path, model: inference.Clip) -> str:
  """sha256 of a released file; of any other weights, over all that the model computes by.

  The released files are known by their own hash, by which CLIP_benchmark's users know them too.
  Otherwise it is made of the arrays in the order of their names, of the configuration of the model
  and of the preprocessing, and of the vocabulary.
  """
  if path.is_file():
    with path.open("rb") as file:
      own = hashlib.file_digest(file, "sha256").hexdigest()
    if own in sources.RELEASED.values():
      return own
  config = [dataclasses.asdict(part) for part in (model.config.model, model.config.preprocess)]
  vocabulary = model.tokenizer.fingerprint if model.tokenizer else ""
  digest = hashlib.sha256(json.dumps(["weights/1", config, vocabulary]).encode())
  for where, x in jax.tree_util.tree_leaves_with_path(model.variables):
    array = np.ascontiguousarray(x)
    name = jax.tree_util.keystr(where)
    digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
    digest.update(array.tobytes())
  return digest.hexdigest()
