"""Checkpoints: weights, the rest of the state, and a page of facts about them. Only user of orbax.

A step's folder holds the items `params`, `batch_stats` (running statistics of batch normalisation,
where the model has any), `train` (everything else in the state) and `meta` (JSON: format, config,
fingerprint of the data, tokenizer, every leaf's shape, dtype and checksum, and a sha256 of the page
itself). Orbax does not notice changed bits, so the checksums are compared at every restore.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import options as ocp_options

from clip_jax import hosts

FORMAT = 1
_ARRAYS = ("params", "batch_stats", "train")  # items
_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be written or used: which, why, what to do."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """One checkpoint read back and found whole."""

  step: int
  params: Any
  train: Any  # None when only the weights were asked for
  meta: dict[str, Any]
  batch_stats: Any  # empty where the model has none


class Checkpoints:
  """The checkpoints of one workdir, in its folder `checkpoints`.

  Raises: CheckpointError when the folder is missing (`read_only`) or cannot be written.
  """

  def __init__(self, workdir: str | pathlib.Path, keep: int = 3, read_only: bool = False):
    self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
    if read_only and not self.folder.is_dir():
      raise CheckpointError(f"{workdir}: no checkpoints there ({self.folder} is not a folder)")
    self.saved_step: int | None = None  # the last step known to be whole on the disk
    self._pending: int | None = None
    commit = ocp_options.AtomicityOptions(mode=ocp_options.AtomicityMode.COMMIT_FILE)
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else keep,
      create=not read_only,
      save_root_metadata=False,
      cleanup_tmp_directories=not read_only,
      atomicity_options=commit,
    )
    # Compressing random bits saves 8 % of the disk, for three times the time and a copy in memory.
    arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
    handlers = {"meta": ocp.JsonCheckpointHandler()} | dict.fromkeys(_ARRAYS, arrays)
    try:
      self._manager = ocp.CheckpointManager(self.folder, item_handlers=handlers, options=options)
    except OSError as error:
      raise CheckpointError(
        f"{self.folder}: cannot be written ({error.strerror or error})"
      ) from error

  def steps(self) -> list[int]:
    """The committed steps, oldest first; partial and foreign folders are not among them."""
    self._manager.reload()
    return sorted(self._manager.all_steps())

  def save(
    self, step: int, params: Any, train: Any, meta: dict[str, Any], batch_stats: Any = None
  ) -> None:
    """Starts writing in the background; the arrays may be donated once this returns.

    Raises: CheckpointError when the previous save failed.
    """
    self.wait()
    trees = _trees(params, train, batch_stats)
    meta = {"format": FORMAT, **meta, "leaves": leaves(trees)}
    meta["sha256"] = _digest(meta)
    arrays = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
    items = ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta))
    self._pending = step
    self._checked(lambda: self._manager.save(step, args=items, force=True))

  def poll(self) -> None:
    """Reports a finished background save. Raises: CheckpointError when it failed."""
    if self._pending is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Waits for the save under way. Raises: CheckpointError when it failed."""
    if self._pending is not None:
      self._checked(self._manager.wait_until_finished)
      self.saved_step, self._pending = self._pending, None

  def _checked(self, call: Any) -> None:
    try:
      call()
    except Exception as error:  # orbax lets through whatever its storage raised
      step, self._pending = self._pending, None
      kept = (
        f"step {self.saved_step} is the last good one" if self.saved_step else "none is saved yet"
      )
      reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
      raise CheckpointError(
        f"{self.folder}: step {step} could not be written ({reason}); {kept}. "
        "Free space there or fix its permissions, then start the same command again"
      ) from error

  def close(self) -> None:
    """Waits, then lets go. Call it before the process ends: an unfinished save is lost."""
    try:
      self.wait()
    finally:
      with contextlib.suppress(Exception):  # orbax repeats a failure that `wait` has told
        self._manager.close()

  def meta(self, step: int) -> dict[str, Any]:
    """The facts page of one step.

    Raises: CheckpointError when it cannot be read; Mismatch when it is of another format.
    """
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
    except Exception as error:
      raise CheckpointError(
        f"{self.folder / str(step)}: its meta cannot be read ({error})"
      ) from error
    if restored.meta.get("sha256") != _digest(restored.meta):
      raise CheckpointError(f"{self.folder / str(step)}: damaged, checksum differs in meta")
    if restored.meta.get("format") != FORMAT:
      raise Mismatch(
        f"{self.folder / str(step)}: of format {restored.meta.get('format')}, and this release of "
        f"clip_jax reads format {FORMAT}; go on with the release that wrote it, or export its "
        "weights with that one and import them here"
      )
    return restored.meta

  def newest_meta(self) -> tuple[int, dict[str, Any]] | None:
    """The newest step whose facts page can be read, with that page; None when there is no step.

    Raises: CheckpointError when there are steps and no page can be read.
    """
    error: CheckpointError | None = None
    for step in reversed(self.steps()):
      try:
        return step, self.meta(step)
      except Mismatch:
        raise
      except CheckpointError as found:  # `restore_latest` will tell of it
        error = error or found
    if error:
      raise error
    return None

  def restore(self, step: int, params: Any, train: Any = None, batch_stats: Any = None) -> Restored:
    """One step, onto the shapes, dtypes and shardings of `params` and `train` (None: weights only).

    `batch_stats` belongs to the weights of a model that has them; None or empty: it has none.

    Raises: CheckpointError; its subclass Mismatch when another model or optimizer wrote it.
    """
    meta = self.meta(step)
    wanted = _trees(params, train, batch_stats)
    _check_structure(self.folder / str(step), meta["leaves"], wanted)
    items = {
      name: ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
      for name, tree in wanted.items()
    }
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:
      raise CheckpointError(
        f"{self.folder / str(step)}: cannot be read ({_first_line(error)})"
      ) from error
    found = leaves({name: restored[name] for name in wanted})
    damaged = [name for name in found if found[name] != meta["leaves"][name]]
    if damaged:
      raise CheckpointError(
        f"{self.folder / str(step)}: damaged, checksum differs in {_some(damaged)}"
      )
    found_train = None if train is None else restored["train"]
    found_stats = restored["batch_stats"] if batch_stats else {}
    return Restored(step, restored["params"], found_train, meta, found_stats)

  def restore_latest(
    self, params: Any, train: Any = None, batch_stats: Any = None
  ) -> Restored | None:
    """The newest whole step, or None when there is none yet; damaged ones are passed over, loudly.

    When training goes on from it, folders of later steps are moved to `checkpoints_damaged`, so
    those steps can be saved again.
    Raises: CheckpointError when there are checkpoints and none is whole; Mismatch at once.
    """
    found, steps = None, self.steps()
    for step in reversed(steps):
      try:
        found = self.restore(step, params, train, batch_stats)
        break
      except Mismatch:
        raise
      except CheckpointError as error:
        _log.warning("%s; falling back to the step before", error)
    if found is None and steps:
      raise CheckpointError(
        f"{self.folder}: none of the steps {steps} is whole; start in a new workdir"
      )
    if train is not None:
      self._set_aside_after(found.step if found else -1)
      self.saved_step = found.step if found else None
    return found

  def _set_aside_after(self, step: int) -> None:
    aside = self.folder.with_name("checkpoints_damaged")
    for folder in sorted(self.folder.iterdir()):
      if folder.name.isdecimal() and int(folder.name) > step:
        aside.mkdir(exist_ok=True)
        target = aside / f"{folder.name}-{sum(1 for _ in aside.iterdir())}"
        _log.warning("%s is not a whole checkpoint; moved to %s", folder, target)
        folder.rename(target)
    self._manager.reload()


class Mismatch(CheckpointError):
  """The checkpoint is whole, but of another model, optimizer or run."""


def _trees(params: Any, train: Any, batch_stats: Any) -> dict[str, Any]:
  """The items that hold arrays; without batch normalisation there is no item for it."""
  trees = {"params": params}
  if batch_stats:
    trees["batch_stats"] = batch_stats
  return trees if train is None else trees | {"train": train}


def _check_structure(where: pathlib.Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
  """Every leaf must be there with its shape and dtype: orbax would cast silently."""
  expected = {name: [list(x.shape), str(x.dtype)] for name, x in _named(wanted)}
  have = {name: value[:2] for name, value in saved.items() if name.split("/")[0] in wanted}
  problems = [f"{name} is not in it" for name in expected.keys() - have.keys()]
  problems += [f"{name} is in it and not in this model" for name in have.keys() - expected.keys()]
  for name in expected.keys() & have.keys():
    if expected[name] != have[name]:
      problems.append(f"{name} is {have[name]}, this model has {expected[name]}")
  if problems:
    raise Mismatch(f"{where}: of another model or optimizer: {_some(sorted(problems), 12)}")


def leaves(tree: Any) -> dict[str, list[Any]]:
  """Each leaf's [shape, dtype, checksum]; the same on any mesh and in any number of processes."""
  named = [(name, jnp.asarray(leaf)) for name, leaf in _named(tree)]
  parts = jax.device_get([_checksums_here(leaf) for _, leaf in named])
  sums = np.array([sum(map(int, part)) % 2**32 for part in parts], np.uint32)
  spread = np.array([not leaf.is_fully_addressable for _, leaf in named], bool)
  if spread.any():
    sums = np.where(spread, hosts.sum_over_hosts(np.where(spread, sums, 0)), sums)
  return {
    name: [list(leaf.shape), str(leaf.dtype), int(checksum) % 2**32]
    for (name, leaf), checksum in zip(named, sums, strict=True)
  }


def _named(tree: Any) -> list[tuple[str, Any]]:
  paths = jax.tree_util.tree_leaves_with_path(tree)
  return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in paths]


def _checksums_here(leaf: jax.Array) -> list[jax.Array]:
  """Checksums of the parts of a leaf that are this process's to count; they add up to its own."""
  parts = []
  for shard in leaf.addressable_shards:
    if shard.replica_id == 0:
      start = jnp.array([axis.start or 0 for axis in shard.index], jnp.uint32)
      parts.append(_checksum(leaf.shape, shard.data, start))
  return parts


@functools.partial(jax.jit, static_argnums=0)
def _checksum(shape: tuple[int, ...], part: jax.Array, start: jax.Array) -> jax.Array:
  """A uint32 that any single changed element changes, of the part at `start` of a whole `shape`.

  Each element's bits are multiplied by an odd number that depends on its position; a change of
  one element by d != 0 moves the sum by d times an odd number, which is not 0 modulo 2^32.
  """
  strides = [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))]
  first = sum((start[i] * jnp.uint32(stride) for i, stride in enumerate(strides)), jnp.uint32(0))
  if part.ndim < 3:
    return _part_checksum(part, strides, first)

  # layer by layer, as XLA on a CPU holds a leaf's products in memory
  def add(layer: jax.Array, total: jax.Array) -> jax.Array:
    rows = jax.lax.dynamic_index_in_dim(part, layer, keepdims=False)
    place = first + layer.astype(jnp.uint32) * jnp.uint32(strides[0])
    return total + _part_checksum(rows, strides[1:], place)

  return jax.lax.fori_loop(0, part.shape[0], add, jnp.uint32(0))


def _part_checksum(array: jax.Array, strides: list[int], first: jax.Array) -> jax.Array:
  """Of elements whose positions are `first` and so many `strides` further."""
  unsigned = jnp.dtype(f"uint{array.dtype.itemsize * 8}")
  bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
  index = jnp.full(array.shape, first)
  for axis, stride in enumerate(strides):
    index += jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * jnp.uint32(stride)
  weight = (index * jnp.uint32(2654435761)) | jnp.uint32(1)
  return jnp.sum(bits * weight, dtype=jnp.uint32)


def _digest(meta: dict[str, Any]) -> str:
  """sha256 of everything else on the page."""
  page = {name: value for name, value in meta.items() if name != "sha256"}
  return hashlib.sha256(json.dumps(page, sort_keys=True).encode()).hexdigest()


def _some(names: list[str], limit: int = 5) -> str:
  rest = len(names) - limit
  return "; ".join(names[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0]
