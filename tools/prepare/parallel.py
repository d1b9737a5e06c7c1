"""Tasks shared out to processes; one that is killed is replaced, and only its task done again.

A task is done when its files are there, so that nothing of it travels back, and what is written
depends neither on the number of processes nor on who died.
"""

import collections
import contextlib
import ctypes
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from tools.prepare.jobs import PrepareError

_PR_SET_PDEATHSIG = 1
_OURS = (signal.SIGINT, signal.SIGTERM)  # which the parent answers
_TRIES = 2  # of a task whose process is killed
_REPORT_SECONDS = 0.2


class Task(Protocol):
  """Does its work and tells how many more inputs it has seen. It is pickled."""

  @property
  def name(self) -> str: ...

  def __call__(self, report: Callable[[int], None]) -> None: ...


# (tasks, report of inputs seen, warn): runs all tasks, in whatever order.
Engine = Callable[[Sequence[Task], Callable[[int], None], Callable[[str], None]], None]


def here(tasks: Sequence[Task], report: Callable[[int], None], warn: Callable[[str], None]) -> None:
  """Runs the tasks in this process."""
  del warn
  for task in tasks:
    task(report)


def cores() -> int:
  """Those that this process may use."""
  return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class Processes:
  """An engine of up to `workers` new processes, which die with this one.

  Raises: PrepareError when a task's process was killed twice, after all the others are done;
    what a task raises, at once.
  """

  def __init__(self, workers: int):
    self._most = workers

  def __call__(
    self, tasks: Sequence[Task], report: Callable[[int], None], warn: Callable[[str], None]
  ) -> None:
    if min(self._most, len(tasks)) <= 1:
      here(tasks, report, warn)
      return
    pool = _Pool(tasks, report, warn)
    try:
      pool.run(min(self._most, len(tasks)))
    finally:
      pool.end()


class _Worker:
  """A process, its end of the pipe, and the task that it has."""

  def __init__(self, number: int):
    self.number = number
    context = multiprocessing.get_context("spawn")
    self.pipe, theirs = context.Pipe()
    self.process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
    with _no_signals():
      self.process.start()
    theirs.close()
    self.task: Task | None = None
    self.seen = 0  # inputs of the task

  def give(self, task: Task) -> None:
    self.task, self.seen = task, 0
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its end of the pipe tells
      self.pipe.send(task)

  def end(self) -> None:
    self.process.kill()
    self.process.join()
    self.pipe.close()


@contextlib.contextmanager
def _no_signals() -> Iterator[None]:
  """A process started in here gets neither SIGINT nor SIGTERM, from its first instant on: they are
  this process's to answer, to which they come a moment later.
  """
  multiprocessing.resource_tracker.ensure_running()  # which lets them through when it starts
  before = signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Pool:
  def __init__(
    self, tasks: Sequence[Task], report: Callable[[int], None], warn: Callable[[str], None]
  ):
    self._waiting = collections.deque(tasks)
    self._report, self._warn = report, warn
    self._workers: list[_Worker] = []
    self._deaths: collections.Counter[str] = collections.Counter()
    self._given_up: list[str] = []

  def run(self, workers: int) -> None:
    self._workers += map(_Worker, range(workers))  # all of them start before one has work
    for worker in self._workers:
      worker.give(self._waiting.popleft())
    while self._workers:
      ready = multiprocessing.connection.wait([worker.pipe for worker in self._workers])
      for worker in [w for w in self._workers if w.pipe in ready]:
        self._hear(worker)
    if self._given_up:
      raise PrepareError("\n  ".join(self._given_up))

  def end(self) -> None:
    for worker in self._workers:
      worker.end()

  def _hear(self, worker: _Worker) -> None:
    try:
      kind, value = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
      self._died(worker)
      return
    if kind == "seen":
      worker.seen += value
      self._report(value)
    elif kind == "failed":
      raise value
    elif self._waiting:
      worker.give(self._waiting.popleft())
    else:
      self._workers.remove(worker)
      worker.end()

  def _died(self, worker: _Worker) -> None:
    worker.process.join()
    self._workers.remove(worker)
    task, code = worker.task, worker.process.exitcode or 0
    assert task is not None, "a worker has a task from its start to its end"
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    where = f"worker {worker.number} {how} at {task.name}, after {worker.seen:,} inputs or more"
    self._report(-worker.seen)
    self._deaths[task.name] += 1
    if self._deaths[task.name] < _TRIES:
      self._warn(f"{where}; another one does it again")
      self._waiting.append(task)
    else:
      self._given_up.append(
        f"{where}, and so was the one before: is memory short, or is the next input harmful? "
        "All else is done and kept; the same command goes on from here"
      )
    if self._waiting:
      self._workers.append(_Worker(worker.number))
      self._workers[-1].give(self._waiting.popleft())


def _serve(pipe: Any, parent: int) -> None:
  """What a worker does: task after task, until its parent ends it."""
  for number in _OURS:
    signal.signal(number, signal.SIG_IGN)
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:
    return
  while True:
    try:
      task = pipe.recv()
      _do(task, pipe)
    except EOFError:
      return


def _do(task: Task, pipe: Any) -> None:
  seen, last = 0, time.monotonic()

  def report(count: int) -> None:
    nonlocal seen, last
    seen += count
    if time.monotonic() - last > _REPORT_SECONDS:
      pipe.send(("seen", seen))
      seen, last = 0, time.monotonic()

  try:
    task(report)
    message: tuple[str, Any] = ("done", None)
  except Exception as error:
    message = ("failed", _portable(error, task.name))
  pipe.send(("seen", seen))
  pipe.send(message)


def _portable(error: Exception, name: str) -> Exception:
  """The error itself where it survives pickling; else what it says."""
  try:
    if isinstance(pickle.loads(pickle.dumps(error)), type(error)):
      return error
  except Exception:  # of any kind: errors decide themselves how they are pickled
    pass
  return RuntimeError(f"{name}: {type(error).__name__}: {error}")
