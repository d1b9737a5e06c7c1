"""The training loop, top to bottom."""

import contextlib
import dataclasses
import fcntl
import pathlib
import signal
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
  culprit,
  hosts,
  inference,
  initial,
  metrics,
  parsing,
  sharding,
  summary,
  train_step,
  watchdog,
)
from clip_jax import config as config_lib
from clip_jax.data import pipeline, records
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.evaluation import encoding, tasks
from clip_jax.models import clip

STUCK_SECONDS = 1800.0


class TrainingError(RuntimeError):
  """Training that must not go on: why, and what to do."""


def train(
  config: config_lib.Config,
  workdir: pathlib.Path,
  console: rich.console.Console,
  accept_changes: bool = False,
  experiment: pathlib.Path | None = None,
  stuck_seconds: float = STUCK_SECONDS,
) -> bool:
  """Trains from the newest checkpoint of `workdir`, or from the start, to `config.steps`.

  Args: experiment, the file that the config is from, which several hosts then compare too;
    stuck_seconds, the longest that the start, a step, a checkpoint or an evaluation may take before
    the process ends itself (see `watchdog`).
  Returns: True when the last step is reached and saved; False when a signal ended the run early
    (its state is saved, and the same call continues).
  Raises: TrainingError, CheckpointError, DataError, HostsError, ValueError, OSError.
  """
  began = time.perf_counter()
  sources, evaluated = open_sources(config), tasks.ready(config)
  agreement.of_hosts(config, experiment, sources, [task.source for task in evaluated], workdir)
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch(config.data.batch_pairs, mesh, config.microbatches)
  workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    stack.enter_context(_alone_in(workdir))
    tokenizer = workdir_tokenizer(config, sources, workdir)
    stop = stack.enter_context(_stop_requests(console))
    begin = stack.enter_context(watchdog.watching(stuck_seconds))
    checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
    stack.callback(checkpoints.close)
    newest = checkpoints.newest_meta()
    agreement.of_start(tokenizer, newest[0] if newest else None)
    page = agreement.page(config, sources, tokenizer)
    state, meta = _restore_or_init(config, mesh, checkpoints, newest, page, accept_changes)
    start = done = int(state.step)
    console.print(summary.plan(config, mesh, sources, done))
    bad_records = pipeline.BadRecords(
      sources, config.data, meta["bad_records"], meta["seen_records"]
    )
    host = (jax.process_index(), jax.process_count())
    batches = pipeline.host_batches(config, sources, tokenizer, done, *host)
    stream = pipeline.Prefetcher(batches, lambda b: _place(b, bad_records, stop, mesh), depth=2)
    stack.callback(stream.close)
    a_pair = clip.training_flops_per_pair(config.model, config.optimizer.lock_image)
    suspects = culprit.suspects(config, state.params, sources, tokenizer)
    log = metrics.Log(config, workdir, console, done, a_pair, began)
    stack.callback(log.close)
    watch = alarms.Alarms(config)
    reader = _Reader(config, bad_records, checkpoints, log, stream, suspects, watch)
    step_fn = train_step.make_train_step(config, mesh)

    if _evaluation_due(config, start) and not _evaluated(workdir, start):
      _evaluate(config, state, tokenizer, evaluated, log, begin)
    previous: dict[str, jax.Array] | None = None
    stopping = False
    while done < config.steps and not stopping:
      begin(f"step {done + 1}")
      batch = next(stream)
      with log.time("first step" if done == start else "step"):
        state, current = step_fn(state, batch)
      done += 1
      if previous is not None:  # read while the device is busy with the step after it
        stopping = reader.read(previous, done - 1)
      previous = current
      checkpoints.poll()
      due = _evaluation_due(config, done)
      if due:  # its line comes before its evaluation's, which may fail
        stopping, previous = reader.read(current, done) or stopping, None
      save = done % config.checkpoint.every_steps == 0 or done == config.steps or stopping
      if save:
        begin(f"the checkpoint of step {done}")
        _save(state, page, bad_records, checkpoints, log)
      if due and not stopping:
        try:
          _evaluate(config, state, tokenizer, evaluated, log, begin)
        except encoding.EvaluationError:  # no step is lost by it
          if not save:
            _save(state, page, bad_records, checkpoints, log)
          checkpoints.wait()
          raise
    if previous is not None:
      reader.read(previous, done)
    with log.time("checkpoint"):
      checkpoints.wait()
    log.finish(done)
    if bad_records.counts()["bad_records"]:
      console.print(f"bad records replaced: {bad_records}")
  if done < config.steps:
    console.print(f"stopped at step {done} and saved in {workdir}; the same command continues")
  return done == config.steps


def _evaluation_due(config: config_lib.Config, done: int) -> bool:
  """Whether to evaluate after `done` steps; after the last of all `summary.finish` does."""
  every = config.evaluation.every_steps
  return 0 < done < config.steps and every > 0 and done % every == 0


def _evaluated(workdir: pathlib.Path, step: int) -> bool:
  """Whether the figures of that step are written, as the first process sees it."""
  lines = metrics.read(workdir)
  found = any(line["step"] == step and any("eval/" in k for k in line) for line in lines)
  return bool(hosts.from_first(b"yes" if found else b""))


def _evaluate(
  config: config_lib.Config,
  state: train_step.TrainState,
  tokenizer: tokenizer_lib.Tokenizer,
  evaluated: Sequence[tasks.Ready],
  log: metrics.Log,
  begin: Callable[[str], None],
) -> None:
  """Evaluates the weights of a step on all tasks, and logs the figures."""
  step, results = int(state.step), list[tasks.Result]()
  with log.time("evaluation"):
    model = inference.Clip(config, state.params, tokenizer, batch_stats=state.batch_stats)
    for task in evaluated:
      begin(f"the evaluation of {task.name} after step {step}")
      results += tasks.run(model, config, [task])
  log.write(step, tasks.figures(results))


def _save(
  state: train_step.TrainState,
  page: dict[str, Any],
  bad_records: pipeline.BadRecords,
  checkpoints: checkpoint.Checkpoints,
  log: metrics.Log,
) -> None:
  """Begins to write the checkpoint of a step."""
  rest = {"step": state.step, "opt_state": state.opt_state, "guard": state.guard}
  with log.time("checkpoint"):
    facts = {**page, **bad_records.counts()}
    checkpoints.save(int(state.step), state.params, rest, facts, state.batch_stats)


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


class _StopRequest:
  """Whether this process was asked to stop, and by which signal."""

  signal_name = ""


@contextlib.contextmanager
def _stop_requests(console: rich.console.Console) -> Iterator[_StopRequest]:
  """SIGTERM and the first Ctrl-C ask the loop to save and end; a second Ctrl-C ends it at once."""
  request = _StopRequest()

  def handle(number: int, _: Any) -> None:
    if request.signal_name and number == signal.SIGINT:
      raise KeyboardInterrupt
    request.signal_name = signal.Signals(number).name
    console.print(f"{request.signal_name}: saving after the steps under way")

  before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield request
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _place(
  batch: dict[str, np.ndarray],
  bad_records: pipeline.BadRecords,
  stop: _StopRequest,
  mesh: jax.sharding.Mesh,
) -> dict[str, jax.Array]:
  """This host's rows -> the global batch; the request to stop travels with it to every host."""
  bad_records.name(batch)
  arrays = {name: batch[name] for name in ("image", "tokens", "bad")}
  arrays["stop"] = np.full_like(batch["bad"], bool(stop.signal_name))
  return sharding.global_batch(arrays, mesh)


@dataclasses.dataclass
class _Reader:
  """Takes what a step on the device gave: logs it, and judges whether the run can go on."""

  config: config_lib.Config
  bad_records: pipeline.BadRecords
  checkpoints: checkpoint.Checkpoints
  log: metrics.Log
  stream: pipeline.Prefetcher
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
    self.log.step(step, logged, self.stream.wait_seconds)
    self.log.warn(step, self.watch.step(step, values))
    if values["skipped_in_row"] >= self.config.optimizer.max_skipped_in_row:
      raise TrainingError(self._skipped(step, values))
    return values["stop"] > 0

  def _skipped(self, step: int, values: dict[str, float]) -> str:
    kept = self.checkpoints.saved_step
    return (
      f"step {step}: {values['skipped_in_row']:.0f} steps in a row skipped (loss {values['loss']}, "
      f"gradient norm {values['gradient_norm']}); {self.suspects.sentence(step, values)}; "
      + (f"step {kept} is the last checkpoint" if kept else "there is no checkpoint yet")
      + ". Lower config.optimizer.learning_rate or look at the data, then start again"
    )
