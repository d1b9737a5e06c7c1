"""What a run writes about itself: JSON lines, TensorBoard, a progress bar or lines for people."""

import collections
import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import rich.console
import rich.progress
import tensorboardX

from clip_jax import alarms, chips, goodput
from clip_jax import config as config_lib

_ACCOUNT_SECONDS = 10.0  # of steps, after which the account of time is written


def peak_flops() -> float | None:
  """Peak FLOP/s of all devices together, where `chips` knows them."""
  chip = chips.find(jax.devices()[0].device_kind)
  return None if chip is None else chip.flops * jax.device_count()


class Log:
  """Takes every step's metrics; writes `metrics.jsonl` and TensorBoard, and tells people.

  A run that continues from `start_step` first drops the lines of later steps: those steps were
  lost and are done again. Only the first host writes. As a context it ends with `finish`, whatever
  ends it.
  """

  def __init__(
    self,
    config: config_lib.Config,
    workdir: pathlib.Path,
    console: rich.console.Console,
    start_step: int,
    training_flops_per_pair: int,
    started: float | None = None,
  ):
    """`started`: when this start of the run began, by `time.perf_counter`; None: now."""
    self._config, self._console = config, console
    self._writes = jax.process_index() == 0
    self._seconds: dict[str, float] = collections.defaultdict(float)
    self._flops_per_step = config.data.batch_pairs * training_flops_per_pair
    self._peak = peak_flops()
    now = time.perf_counter()
    self._started = now if started is None else started
    self._seconds["start"] = now - self._started
    self._before = goodput.carried(read(workdir), start_step)
    self._step, self._told = start_step, now
    self._window = (start_step, now, 0.0)
    self._progress = _progress_bar(console)
    self._task = self._progress.add_task("train", total=config.steps, completed=start_step, note="")
    if self._writes:
      kept = [line for line in read(workdir) if line["step"] <= start_step]
      kept.append({"step": start_step, **self._account(now)})  # also if this start is soon killed
      self._path = workdir / "metrics.jsonl"
      write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
      self._lines = self._path.open("a", encoding="utf-8")
      self._board = tensorboardX.SummaryWriter(
        str(workdir / "tensorboard"), purge_step=start_step + 1
      )
      self._progress.start()

  @contextlib.contextmanager
  def time(self, part: str) -> Iterator[None]:
    """Counts the seconds inside towards `part` of the final split."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self._seconds[part] += time.perf_counter() - start

  def step(self, step: int, values: Mapping[str, float]) -> None:
    """One step's metrics; every `log_every_steps` they are written, with the rates since."""
    self._step, now = step, time.perf_counter()
    self._progress.update(self._task, completed=step)
    if step % self._config.log_every_steps and step != self._config.steps:
      if now - self._told >= _ACCOUNT_SECONDS:
        self.account()
      return
    self._told = now
    figures = {**values, **self._rates(step, now)}
    named = {f"train/{name}": value for name, value in figures.items()}
    self.write(step, {**named, **self._account(now)})
    note = (
      f"loss {figures['loss']:.3f}  accuracy {figures['accuracy']:.0%}  "
      f"{figures['pairs_per_second']:.0f} pairs/s  data wait {figures['data_wait']:.0%}"
    )
    self._progress.update(self._task, note=note)
    if self._writes and not self._console.is_terminal:
      self._console.print(f"step {step}/{self._config.steps}  {note}", highlight=False)

  def _rates(self, step: int, now: float) -> dict[str, float]:
    """Since the last call: pairs a second, share of time waiting for data, MFU where known.

    Compiling, evaluations and checkpoints do not count as time.
    """
    step_before, time_before, wait_before = self._window
    wait_seconds = self._seconds["data wait"]
    now -= sum(self._seconds[part] for part in ("first step", "evaluation", "checkpoint"))
    self._window = (step, now, wait_seconds)
    steps, seconds = step - step_before, now - time_before
    rates = {
      "pairs_per_second": steps * self._config.data.batch_pairs / seconds,
      "data_wait": (wait_seconds - wait_before) / seconds,
    }
    if self._peak is not None:
      rates["mfu"] = steps * self._flops_per_step / seconds / self._peak
    return rates

  def warn(self, step: int, found: Sequence[alarms.Alarm]) -> None:
    """Alarms for people, and as 1 (begins) or 0 (over) in `metrics.jsonl` and TensorBoard."""
    if found:
      self.write(step, {f"alarm/{alarm.name}": float(alarm.on) for alarm in found})
    for alarm in found if self._writes else ():
      self._console.print(f"{'warning: ' if alarm.on else ''}{alarm.text}", highlight=False)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """One line of figures; those that are not finite are written as null.

    Raises: OSError, with the file's name, when it cannot be written.
    """
    if not self._writes:
      return
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    with _naming(self._path):
      self._lines.write(json.dumps({"step": step, **finite}) + "\n")
      self._lines.flush()
    for name, value in finite.items():
      if value is not None:  # of which TensorBoard's writer prints a warning of its own
        self._board.add_scalar(name, value, step)

  def tell(self, text: str) -> None:
    """A line for people."""
    if self._writes:
      self._console.print(text, highlight=False)

  def account(self) -> dict[str, float]:
    """Writes where the wall time of the run went so far, in seconds, and returns it."""
    self._told = time.perf_counter()
    account = self._account(self._told)
    self.write(self._step, account)
    return account

  def finish(self) -> dict[str, float]:
    """The same, told to people too, though the disk be full. Raises: OSError."""
    try:
      return self.account()
    finally:
      self.tell(f"time: {goodput.sentence(self._account(self._told))}")

  def __enter__(self) -> "Log":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    try:
      with contextlib.suppress(*([OSError] if kind else [])):  # what ends the run is told already
        self.finish()
    finally:
      self.close()

  def _account(self, now: float) -> dict[str, float]:
    return goodput.figures(self._before, {"total": now - self._started, **self._seconds})

  def close(self) -> None:
    """Lets go of the files. Every line was flushed when written: an error here loses none."""
    if self._writes:
      self._progress.stop()
      for file in (self._lines, self._board):
        with contextlib.suppress(OSError):
          file.close()


def _progress_bar(console: rich.console.Console) -> rich.progress.Progress:
  return rich.progress.Progress(
    "{task.description}",
    rich.progress.BarColumn(),
    "{task.completed}/{task.total}",
    rich.progress.TimeElapsedColumn(),
    "left",
    rich.progress.TimeRemainingColumn(),
    "{task.fields[note]}",
    console=console,
    disable=not console.is_terminal,
  )


@contextlib.contextmanager
def timed_after(workdir: pathlib.Path, part: str, console: rich.console.Console) -> Iterator[None]:
  """Counts the seconds inside towards `part` of the account of a run whose log is closed."""
  began = time.perf_counter()
  try:
    yield
  finally:
    seconds = time.perf_counter() - began
    lines = [] if jax.process_index() else read(workdir)
    if line := goodput.with_more(lines, part, seconds):
      with contextlib.suppress(OSError), (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
      console.print(f"time: {goodput.sentence(line)}", highlight=False)


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The lines of `metrics.jsonl`, in order; a last line cut off by a crash is left out."""
  path = pathlib.Path(workdir) / "metrics.jsonl"
  lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
  out = []
  for number, line in enumerate(lines, start=1):
    try:
      out.append(json.loads(line))
    except json.JSONDecodeError:
      if number < len(lines):
        raise ValueError(f"{path}:{number}: not JSON; remove this line") from None
  return out


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
  """The whole content under its name, or nothing. Raises: OSError with the name."""
  temporary = path.with_name(path.name + ".tmp")
  try:
    with _naming(path):
      temporary.write_bytes(content.encode() if isinstance(content, str) else content)
      os.replace(temporary, path)
  except OSError:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """A full disk's OSError does not say which file; this one does."""
  try:
    yield
  except OSError as error:
    raise OSError(error.errno, error.strerror, str(path)) from error
