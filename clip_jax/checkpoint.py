"""Checkpoints: weights, the rest of the state, and a page of facts about them. Only user of orbax.

A step's folder holds the items `params`, `batch_stats` (running statistics of batch normalisation,
where the model has any), `train` (everything else in the state) and `meta` (JSON: format, config,
fingerprint of the data, tokenizer, every leaf's shape, dtype and checksum, and a sha256 of the page
itself). Orbax does not notice changed bits, so the checksums are compared at every restore.

Of several hosts each reads by itself, and what one of them cannot read, no host uses: after every
read all agree on what was met, so that they fall back together. Of several hosts all must call.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import options as ocp_options

from clip_jax import checksums, hosts

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
    with _met_by_all():
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
    # The manager's own restore ends in a collective, in which a host that has read its part would
    # wait for one that could not.
    alone = ocp_options.MultiprocessingOptions(jax.process_index(), {jax.process_index()})
    self._reader = ocp.Checkpointer(
      ocp.CompositeCheckpointHandler(**handlers),
      multiprocessing_options=alone,
      atomicity_options=commit,
    )

  def steps(self) -> list[int]:
    """The committed steps, oldest first; partial and foreign folders are not among them.

    Of several hosts, those that process 0 sees: a shared folder may show them late to others.
    """
    self._manager.reload()
    steps = json.dumps(sorted(self._manager.all_steps()))
    return list(json.loads(hosts.from_first(steps.encode())))

  def save(
    self, step: int, params: Any, train: Any, meta: dict[str, Any], batch_stats: Any = None
  ) -> None:
    """Starts writing in the background; the arrays may be donated once this returns.

    Raises: CheckpointError when the previous save failed.
    """
    self.wait()
    trees = _trees(params, train, batch_stats)
    meta = {"format": FORMAT, **meta, "leaves": checksums.of_leaves(trees)}
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
    folder, items = self.folder / str(step), ocp.args.Composite(meta=ocp.args.JsonRestore())
    with _met_by_all():
      try:
        meta: dict[str, Any] = self._reader.restore(folder, args=items).meta
      except Exception as error:
        raise CheckpointError(f"{folder}: its meta cannot be read ({error})") from error
      if meta.get("sha256") != _digest(meta):
        raise CheckpointError(f"{folder}: damaged, checksum differs in meta")
    if meta.get("format") != FORMAT:
      raise Mismatch(
        f"{folder}: of format {meta.get('format')}, and this release of clip_jax reads format "
        f"{FORMAT}; go on with the release that wrote it, or export its weights with that one and "
        "import them here"
      )
    return meta

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
    meta, folder = self.meta(step), self.folder / str(step)
    wanted = _trees(params, train, batch_stats)
    _check_structure(folder, meta["leaves"], wanted)
    items = {
      name: ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
      for name, tree in wanted.items()
    }
    with _met_by_all():
      try:
        restored = self._reader.restore(folder, args=ocp.args.Composite(**items))
      except Exception as error:
        raise CheckpointError(f"{folder}: cannot be read ({_first_line(error)})") from error
    found = checksums.of_leaves({name: restored[name] for name in wanted})
    damaged = [name for name in found if found[name] != meta["leaves"][name]]
    if damaged:
      raise CheckpointError(f"{folder}: damaged, checksum differs in {_some(damaged)}")
    found_train = None if train is None else restored["train"]
    found_stats = restored["batch_stats"] if batch_stats else {}
    return Restored(step, restored["params"], found_train, meta, found_stats)

  def restore_latest(
    self, params: Any, train: Any = None, batch_stats: Any = None
  ) -> Restored | None:
    """The newest whole step, or None when there is none yet; damaged ones are passed over, loudly.

    When training goes on from it, folders of later steps are moved to `checkpoints_damaged`, so
    those steps can be saved again.
    Raises: CheckpointError when there are checkpoints and none is whole, or a folder cannot be
      moved; Mismatch at once.
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
    """Process 0 moves them; no host goes on before."""
    aside = self.folder.with_name("checkpoints_damaged")
    with _met_by_all():
      try:
        for folder in sorted(self.folder.iterdir()) if jax.process_index() == 0 else ():
          if folder.name.isdecimal() and int(folder.name) > step:
            aside.mkdir(exist_ok=True)
            target = aside / f"{folder.name}-{sum(1 for _ in aside.iterdir())}"
            _log.warning("%s is not a whole checkpoint; moved to %s", folder, target)
            folder.rename(target)
      except OSError as error:
        raise CheckpointError(
          f"{self.folder}: what is not whole there cannot be moved to {aside} ({error}); move it "
          "away, then start the same command again"
        ) from error
    self._manager.reload()


class Mismatch(CheckpointError):
  """The checkpoint is whole, but of another model, optimizer or run."""


@contextlib.contextmanager
def _met_by_all() -> Iterator[None]:
  """The CheckpointError that any host meets inside is raised on all of them, at the end.

  Inside, no host may wait for another: one that meets an error does not come to where it waits.
  """
  which = f" (met by host {jax.process_index()})" if jax.process_count() > 1 else ""
  try:
    yield
  except CheckpointError as error:
    raise CheckpointError(hosts.first_said(f"{error}{which}")) from error
  if said := hosts.first_said(""):
    raise CheckpointError(said)


def _trees(params: Any, train: Any, batch_stats: Any) -> dict[str, Any]:
  """The items that hold arrays; without batch normalisation there is no item for it."""
  trees = {"params": params}
  if batch_stats:
    trees["batch_stats"] = batch_stats
  return trees if train is None else trees | {"train": train}


def _check_structure(where: pathlib.Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
  """Every leaf must be there with its shape and dtype: orbax would cast silently."""
  expected = {name: [list(x.shape), str(x.dtype)] for name, x in checksums.named(wanted)}
  have = {name: value[:2] for name, value in saved.items() if name.split("/")[0] in wanted}
  problems = [f"{name} is not in it" for name in expected.keys() - have.keys()]
  problems += [f"{name} is in it and not in this model" for name in have.keys() - expected.keys()]
  for name in expected.keys() & have.keys():
    if expected[name] != have[name]:
      problems.append(f"{name} is {have[name]}, this model has {expected[name]}")
  if problems:
    raise Mismatch(f"{where}: of another model or optimizer: {_some(sorted(problems), 12)}")


def _digest(meta: dict[str, Any]) -> str:
  """sha256 of everything else on the page."""
  page = {name: value for name, value in meta.items() if name != "sha256"}
  return hashlib.sha256(json.dumps(page, sort_keys=True).encode()).hexdigest()


def _some(names: list[str], limit: int = 5) -> str:
  rest = len(names) - limit
  return "; ".join(names[:limit]) + (f"; and {rest} more" if rest > 0 else "")


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0]
