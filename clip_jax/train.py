"""The training loop, top to bottom."""

import contextlib
import dataclasses
import fcntl
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import rich.console

from clip_jax import (
  agreement,
  alarms,
  checkpoint,
  common_stop,
  culprit,
  evaluating,
  hosts,
  initial,
  metrics,
  parsing,
  sharding,
  stopping,
  summary,
  train_step,
)
from clip_jax import config as config_lib
from clip_jax.data import pipeline, records
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.evaluation import tasks
from clip_jax.models import clip


class TrainingError(RuntimeError):
  """Training that must not go on: why, and what to do."""


def train(
  config: config_lib.Config,
  workdir: pathlib.Path,
  console: rich.console.Console,
  accept_changes: bool = False,
  experiment: pathlib.Path | None = None,
  signals: stopping.Request | None = None,
  begin: Callable[[str], None] = lambda _: None,
) -> bool:
  """Trains from the newest checkpoint of `workdir`, or from the start, to `config.steps`.

  Args: experiment, the file that the config is from, which several hosts then compare too;
    signals, where the caller takes them already: from the restore on they are noted; begin, is told
    what comes next, as `watchdog.watching` wants it.
  Returns: True when the last step is reached and saved; False when a signal ended the run early
    (its state is saved, and the same call continues).
  Raises: TrainingError, CheckpointError, DataError, HostsError, ValueError, OSError; Stopped where
    a signal comes while there is nothing to save.
  """
  began = time.perf_counter()
  with contextlib.ExitStack() as stack:
    request = signals or stack.enter_context(stopping.requests())
    sources, evaluated = open_sources(config), tasks.ready(config)
    agreement.of_hosts(config, experiment, sources, [task.source for task in evaluated], workdir)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.data.batch_pairs, mesh, config.microbatches)
    workdir.mkdir(parents=True, exist_ok=True)
    stack.enter_context(_alone_in(workdir))
    tokenizer = workdir_tokenizer(config, sources, workdir)
    request.note(console.print)
    begin("the start")
    checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
    stack.callback(checkpoints.close)
    newest = checkpoints.newest_meta()
    agreement.of_start(tokenizer, newest[0] if newest else None)
    page = agreement.page(config, sources, tokenizer)
    state, meta = _restore_or_init(config, mesh, checkpoints, newest, page, accept_changes)
    start = done = saved = int(state.step)
    console.print(summary.plan(config, mesh, sources, done))
    bad_records = pipeline.BadRecords(
      sources, config.data, meta["bad_records"], meta["seen_records"]
    )
    host = (jax.process_index(), jax.process_count())
    batches = pipeline.host_batches(config, sources, tokenizer, done, *host)
    stream = pipeline.Prefetcher(batches, lambda b: _place(b, bad_records, request, mesh), depth=2)
    stack.callback(stream.close)
    a_pair = clip.training_flops_per_pair(config.model, config.optimizer.lock_image)
    suspects = culprit.suspects(config, state.params, sources, tokenizer)
    log = stack.enter_context(metrics.Log(config, workdir, console, done, a_pair, began))
    reader = _Reader(config, bad_records, checkpoints, log, suspects, alarms.Alarms(config))
    step_fn, stop = train_step.make_train_step(config, mesh), common_stop.CommonStop(request)

    def evaluate() -> bool:
      return evaluating.on_the_way(config, state, tokenizer, evaluated, log, stop, begin)

    over = False  # a host was asked to stop
    if evaluating.due(config, start) and not evaluating.made(workdir, start):
      over = not evaluate()
    previous: dict[str, jax.Array] | None = None
    while done < config.steps and not over:
      begin(f"step {done + 1}")
      with log.time("data wait"):
        batch = stop.batch(stream, done)
      if batch is None:
        break
      with log.time("first step" if done == start else "step"):
        state, current = step_fn(state, batch)
      done += 1
      if previous is not None:  # read while the device is busy with the step after it
        over = reader.read(previous, done - 1)
      previous = current
      checkpoints.poll()
      due = evaluating.due(config, done)
      if due or done % config.checkpoint.every_steps == 0:
        over, previous = reader.read(current, done) or over, None  # what it counted is saved too
        saved = _save(state, page, bad_records, checkpoints, log, begin)
      if due and not over:
        over = not evaluate()
    if previous is not None:
      reader.read(previous, done)
    if saved < done:
      _save(state, page, bad_records, checkpoints, log, begin)
    with log.time("checkpoint"):
      checkpoints.wait()
    if bad_records.counts()["bad_records"]:
      console.print(f"bad records replaced: {bad_records}")
  if done < config.steps:
    kept = f"and saved in {workdir}" if done else "with nothing to save"
    console.print(f"stopped at step {done} {kept}; the same command continues")
  return done == config.steps


def _save(
  state: train_step.TrainState,
  page: dict[str, Any],
  bad_records: pipeline.BadRecords,
  checkpoints: checkpoint.Checkpoints,
  log: metrics.Log,
  begin: Callable[[str], None],
) -> int:
  """Begins to write the checkpoint of a step whose metrics are read. Returns: its number."""
  step = int(state.step)
  begin(f"the checkpoint of step {step}")
  rest = {"step": state.step, "opt_state": state.opt_state, "guard": state.guard}
  with log.time("checkpoint"):
    facts = {**page, **bad_records.counts()}
    checkpoints.save(step, state.params, rest, facts, state.batch_stats)
  log.account()  # with which a start from here goes on
  return step


@contextlib.contextmanager
def _alone_in(workdir: pathlib.Path) -> Iterator[None]:
  """Raises: TrainingError while another process trains in `workdir`. Only the first host asks."""
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      file = stack.enter_context((workdir / "lock").open("w"))
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as error:
        raise TrainingError(
          f"{workdir}: another process trains there; stop it, or choose another --workdir"
        ) from error
    yield


def open_sources(config: config_lib.Config) -> list[records.RecordSource]:
  """The training sources. Raises: ValueError when there are none or one is unusable."""
  if not config.data.sources:
    raise ValueError("config.data.sources: empty, nothing to train on")
  resolution = config.model.image.resolution
  opened = [pipeline.open_source(s, resolution, config.seed) for s in config.data.sources]
  if sum(map(len, opened)) < jax.process_count():
    raise ValueError(
      f"config.data.sources: {sum(map(len, opened))} records for {jax.process_count()} processes; "
      "each needs one at least"
    )
  return opened


def workdir_tokenizer(
  config: config_lib.Config, sources: Sequence[records.RecordSource], workdir: pathlib.Path
) -> tokenizer_lib.Tokenizer:
  """The original tokenizer, or the workdir's own, which the first start trains on the captions."""
  if config.data.tokenizer == "original":
    tokenizer = tokenizer_lib.original()
  else:
    path = workdir / "tokenizer.json"
    if hosts.from_first(b"" if path.exists() else b"first start"):
      theirs = initial.vocabulary(config)
      if jax.process_index() == 0:
        trained = theirs or tokenizer_lib.train(
          pipeline.captions(sources), config.model.text.vocab_size
        )
        metrics.write_atomically(path, trained.to_json())
      hosts.wait_for_all("tokenizer")
    try:
      tokenizer = tokenizer_lib.Tokenizer.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error
  if tokenizer.vocab_size > config.model.text.vocab_size:
    raise ValueError(
      f"config.model.text.vocab_size: {config.model.text.vocab_size} is under the tokenizer's "
      f"{tokenizer.vocab_size}"
    )
  return tokenizer


def _restore_or_init(
  config: config_lib.Config,
  mesh: jax.sharding.Mesh,
  checkpoints: checkpoint.Checkpoints,
  newest: tuple[int, dict[str, Any]] | None,
  page: dict[str, Any],
  accept_changes: bool,
) -> tuple[train_step.TrainState, dict[str, Any]]:
  """The newest whole checkpoint's state and meta, or a fresh state.

  Raises: TrainingError when the checkpoint is of other data or another config.
  """
  if newest and not accept_changes:
    step, meta = newest
    saved_page = {**meta, "config": parsing.upgrade(meta["config"])}
    changed = agreement.differences(saved_page, page)
    if changed:
      raise TrainingError(
        f"{checkpoints.folder}: step {step} is of another run: {'; '.join(changed)}. "
        "Train in a new --workdir, or pass --accept-changes to go on from it all the same"
      )
  saved = parsing.upgrade(newest[1]["config"]) if newest else None
  wanted = train_step.abstract_state(initial.as_saved(config, saved) if saved else config, mesh)
  rest = {"step": wanted.step, "opt_state": wanted.opt_state, "guard": wanted.guard}
  restored = checkpoints.restore_latest(wanted.params, rest, wanted.batch_stats)
  if restored is None:
    return initial.state(config, mesh), {"bad_records": {}, "seen_records": 0}
  weights = {"params": restored.params, "batch_stats": restored.batch_stats}
  state = train_step.TrainState(**weights, **restored.train)
  return initial.recast(state, config, mesh), restored.meta


def _place(
  batch: dict[str, np.ndarray],
  bad_records: pipeline.BadRecords,
  request: stopping.Request,
  mesh: jax.sharding.Mesh,
) -> dict[str, jax.Array]:
  """This host's rows -> the global batch; the request to stop travels with it to every host."""
  bad_records.name(batch)
  arrays = {name: batch[name] for name in ("image", "tokens", "bad")}
  arrays["stop"] = np.full_like(batch["bad"], bool(request.signal_name))
  return sharding.global_batch(arrays, mesh)


@dataclasses.dataclass
class _Reader:
  """Takes what a step on the device gave: logs it, and judges whether the run can go on."""

  config: config_lib.Config
  bad_records: pipeline.BadRecords
  checkpoints: checkpoint.Checkpoints
  log: metrics.Log
  suspects: culprit.Suspects
  watch: alarms.Alarms

  def read(self, device_metrics: dict[str, jax.Array], step: int) -> bool:
    """Fetches and logs one step's metrics. Returns: whether any host was asked to stop.

    Raises: TrainingError when the run must end: not finite for too long, too many bad records.
    """
    with self.log.time("step"):
      fetched = jax.device_get(device_metrics)
    by_cause = fetched.pop("bad_by_cause")
    values = {name: float(value) for name, value in fetched.items()}
    logged = {name: v for name, v in values.items() if not name.startswith("first_not_finite")}
    logged["bad_records"] = self.bad_records.count(by_cause, self.config.data.batch_pairs)
    self.log.step(step, logged)
    self.log.warn(step, self.watch.step(step, values))
    finite = math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])
    if values["skipped_in_row"] == 1 and not finite:
      self.log.tell(f"warning: step {step} is not finite and changes nothing ({_both(values)})")
    if values["skipped_in_row"] >= self.config.optimizer.max_skipped_in_row:
      raise TrainingError(self._skipped(step, values))
    return values["stop"] > 0

  def _skipped(self, step: int, values: dict[str, float]) -> str:
    failed = ""
    try:
      self.checkpoints.wait()  # for the one under way, which may be the last
    except checkpoint.CheckpointError as error:
      failed = f"; {error}"
    kept = self.checkpoints.saved_step
    return (
      f"step {step}: {values['skipped_in_row']:.0f} steps in a row skipped ({_both(values)}); "
      f"{self.suspects.sentence(step, values)}{failed}; "
      + (f"step {kept} is the last checkpoint" if kept else "there is no checkpoint yet")
      + ". Lower config.optimizer.learning_rate or look at the data, then start again"
    )


def _both(values: dict[str, float]) -> str:
  return f"loss {values['loss']}, gradient norm {values['gradient_norm']}"
