"""How far a measurement of the paper's tables is, for people; and how it is stopped."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import rich.console
import rich.progress


class Bar:
  """Which cell is measured, and how far it is: a bar on a terminal, otherwise a line a cell."""

  def __init__(self, progress: rich.progress.Progress, units: int):
    self._progress = progress
    self._all = progress.add_task("cells", total=units)
    self._part = progress.add_task("", total=None)

  def part(self, what: str, done: int, total: int) -> None:
    self._progress.update(self._part, description=what, completed=done, total=total)

  def done(self, name: str, what: str) -> None:
    self._progress.advance(self._all)
    if what and not self._progress.console.is_terminal:
      self._progress.console.print(f"{name}: {what}", highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def bar(console: rich.console.Console, units: int) -> Iterator[Bar]:
  columns: list[Any] = [
    "{task.description}",
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeElapsedColumn(),
    "left",
    rich.progress.TimeRemainingColumn(),
  ]
  off = not console.is_terminal
  with rich.progress.Progress(*columns, console=console, disable=off) as progress:
    yield Bar(progress, units)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
  """Inside, SIGTERM is what Ctrl-C is."""

  def stop(*_: object) -> None:
    raise KeyboardInterrupt

  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
