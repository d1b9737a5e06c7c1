"""The training loop, top to bottom."""

import contextlib
import fcntl
import hashlib
import pathlib
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import rich.console

from clip_jax import (
  checkpoint,
  hosts,
  inference,
  initial,
  metrics,
  parsing,
  sharding,
  summary,
  train_step,
)
from clip_jax import config as config_lib
from clip_jax.data import pipeline, records
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.evaluation import prompts, tasks
from clip_jax.models import clip


class TrainingError(RuntimeError):
  """Training that must not go on: why, and what to do."""


def train(
  config: config_lib.Config,
  workdir: pathlib.Path,
  console: rich.console.Console,
  accept_changes: bool = False,
) -> bool:
  """Trains from the newest checkpoint of `workdir`, or from the start, to `config.steps`.

  Returns: True when the last step is reached and saved; False when a signal ended the run early
    (its state is saved, and the same call continues).
  Raises: TrainingError, CheckpointError, DataStall, ValueError, OSError.
  """
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch(config.data.batch_pairs, mesh, config.microbatches)
  sources, held_out = open_sources(config), open_tasks(config)
  workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    stack.enter_context(_alone_in(workdir))
    tokenizer = workdir_tokenizer(config, sources, workdir)
    stop = stack.enter_context(_stop_requests(console))
    checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint.keep)
    stack.callback(checkpoints.close)
    facts = _facts(config, sources, tokenizer)
    hosts.agree(_agreement(facts, checkpoints))
    state, meta = _restore_or_init(config, mesh, checkpoints, facts, accept_changes)
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
    log = metrics.Log(config, workdir, console, done, a_pair)
    stack.callback(log.close)
    step_fn = train_step.make_train_step(config, mesh)

    previous: dict[str, jax.Array] | None = None
    stopping = False
    while done < config.steps and not stopping:
      batch = next(stream)
      with log.time("first step" if done == start else "dispatch"):
        state, current = step_fn(state, batch)
      done += 1
      if previous is not None:  # read while the device is busy with the step after it
        stopping = _read(config, previous, done - 1, bad_records, checkpoints, log, stream)
      previous = current
      checkpoints.poll()
      evaluate_now = config.evaluation.every_steps and done % config.evaluation.every_steps == 0
      if evaluate_now and done < config.steps:
        with log.time("evaluation"):
          params, batch_stats = sharding.on_this_host((state.params, state.batch_stats), mesh)
          model = inference.Clip(config, params, tokenizer, batch_stats=batch_stats)
          results = tasks.run(model, config, held_out)
          del model, params, batch_stats  # on a CPU they hold what the next step replaces
        log.write(done, tasks.figures(results))
      if done % config.checkpoint.every_steps == 0 or done == config.steps or stopping:
        rest = {"step": state.step, "opt_state": state.opt_state, "guard": state.guard}
        with log.time("checkpoint"):
          page = {**facts, **bad_records.counts()}
          checkpoints.save(done, state.params, rest, page, state.batch_stats)
    if previous is not None:
      _read(config, previous, done, bad_records, checkpoints, log, stream)
    with log.time("checkpoint"):
      checkpoints.wait()
    log.finish(done)
    if bad_records.counts()["bad_records"]:
      console.print(f"bad records replaced: {bad_records}")
  return done == config.steps


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


def open_tasks(config: config_lib.Config) -> list[records.RecordSource]:
  """The evaluation sources, one a task: opened before any device time is spent."""
  resolution = config.model.image.resolution
  found = [pipeline.open_source(t.source, resolution, config.seed) for t in config.evaluation.tasks]
  for task in config.evaluation.tasks:
    if task.kind == "zero_shot":
      prompts.named(task.prompts)
  return found


def workdir_tokenizer(
  config: config_lib.Config, sources: Sequence[records.RecordSource], workdir: pathlib.Path
) -> tokenizer_lib.Tokenizer:
  """The original tokenizer, or the workdir's own, which the first start trains on the captions."""
  if config.data.tokenizer == "original":
    tokenizer = tokenizer_lib.original()
  else:
    path = workdir / "tokenizer.json"
    if jax.process_index() == 0 and not path.exists():
      trained = initial.vocabulary(config) or tokenizer_lib.train(
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


def _facts(
  config: config_lib.Config,
  sources: Sequence[records.RecordSource],
  tokenizer: tokenizer_lib.Tokenizer,
) -> dict[str, Any]:
  """What a checkpoint says of its run beside the arrays."""
  return {
    "config": config_lib.to_dict(config),
    "data": pipeline.fingerprint(config, sources, tokenizer),
    "tokenizer": "original" if config.data.tokenizer == "original" else tokenizer.to_json(),
  }


def _agreement(facts: dict[str, Any], checkpoints: checkpoint.Checkpoints) -> dict[str, Any]:
  """What has to be the same on all hosts before the first step."""
  package = pathlib.Path(__file__).parent
  code = hashlib.sha256()
  for path in sorted(package.rglob("*.py")):
    code.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
  newest = checkpoints.newest_meta()
  vocabulary = hashlib.sha256(facts["tokenizer"].encode()).hexdigest()[:12]
  return {
    **{f"config.{name}": value for name, value in _flat(facts["config"]).items()},
    **{f"data.{name}": value for name, value in _flat(facts["data"]).items()},
    "the vocabulary": vocabulary,
    "the code of clip_jax": code.hexdigest()[:12],
    "the version of jax": jax.__version__,
    "the newest checkpoint": newest[0] if newest else "none",
  }


def _restore_or_init(
  config: config_lib.Config,
  mesh: jax.sharding.Mesh,
  checkpoints: checkpoint.Checkpoints,
  facts: dict[str, Any],
  accept_changes: bool,
) -> tuple[train_step.TrainState, dict[str, Any]]:
  """The newest whole checkpoint's state and meta, or a fresh state.

  Raises: TrainingError when the checkpoint is of other data or another config.
  """
  newest = checkpoints.newest_meta()
  if newest and not accept_changes:
    step, meta = newest
    changed = _differences({**meta, "config": parsing.upgrade(meta["config"])}, facts)
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


# Changing these between a save and a restart changes nothing that training computes.
_FREE = (
  "name", "init", "log_every_steps", "evaluation", "checkpoint", "data.sources", "data.workers",
  "data.threads", "data.prefetch_batches", "data.max_bad_fraction",
)  # fmt: skip


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """The fields in which a checkpoint's run and this one compute different things."""
  changed = []
  for group in ("config", "data"):
    before, after = _flat(saved[group]), _flat(now[group])
    for name in sorted(before.keys() | after.keys()):
      free = group == "config" and any(name == f or name.startswith(f + ".") for f in _FREE)
      if not free and before.get(name) != after.get(name):
        changed.append(f"{group}.{name} was {_short(before, name)}, is {_short(after, name)}")
  return changed


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  out: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, list) and value and isinstance(value[0], dict):
      value = dict(enumerate(value))
    nested = isinstance(value, dict)
    out |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
  return out


def _short(values: dict[str, Any], name: str) -> str:
  text = repr(values[name]) if name in values else "not there"
  return text if len(text) <= 60 else f"{text[:24]}..."


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


def _read(
  config: config_lib.Config,
  device_metrics: dict[str, jax.Array],
  step: int,
  bad_records: pipeline.BadRecords,
  checkpoints: checkpoint.Checkpoints,
  log: metrics.Log,
  stream: pipeline.Prefetcher,
) -> bool:
  """Fetches and logs one step's metrics. Returns: whether any host was asked to stop.

  Raises: TrainingError when the run must end: not finite for too long, too many bad records.
  """
  with log.time("step"):
    fetched = jax.device_get(device_metrics)
  by_cause = fetched.pop("bad_by_cause")
  values = {name: float(value) for name, value in fetched.items()}
  values["bad_records"] = bad_records.count(by_cause, config.data.batch_pairs)
  log.step(step, values, stream.wait_seconds)
  in_row, limit = int(values["skipped_in_row"]), config.optimizer.max_skipped_in_row
  if in_row >= limit:
    kept = checkpoints.saved_step
    raise TrainingError(
      f"step {step}: {in_row} steps in a row skipped (loss {values['loss']}, gradient norm "
      f"{values['gradient_norm']}); "
      + (f"step {kept} is the last checkpoint" if kept else "there is no checkpoint yet")
      + ". Lower config.optimizer.learning_rate or look at the data, then start again"
    )
  return values["stop"] > 0
