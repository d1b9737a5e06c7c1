"""SIGTERM and Ctrl-C: served at once where nothing is to be saved, and noted where something is."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

UNFINISHED = 75  # exit code, EX_TEMPFAIL: not finished, and the same command continues


class Stopped(BaseException):
  """Ends what a signal asked to stop and has nothing to save; no `except Exception` takes it."""


class Request:
  """Whether this process was asked to stop, and by which signal; "" where it was not."""

  def __init__(self) -> None:
    self.signal_name = ""
    self._tell: Callable[[str], None] | None = None  # None: nothing to save, signals end it

  def listen(self) -> None:
    """Takes the signals, also back from a library that has taken them."""
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._handle)

  def note(self, tell: Callable[[str], None]) -> None:
    """From now on signals are noted, for the caller to look, and told. A second Ctrl-C ends all.

    Raises: Stopped where one came before and somebody's code has swallowed what it raised.
    """
    if self.signal_name:
      raise Stopped(self.signal_name)
    self._tell = tell
    self.listen()

  def _handle(self, number: int, _: Any) -> None:
    again, self.signal_name = bool(self.signal_name), signal.Signals(number).name
    if number == signal.SIGINT and (again or self._tell is None):
      raise KeyboardInterrupt
    if self._tell is None:
      raise Stopped(self.signal_name)
    self._tell(f"{self.signal_name}: stopping as soon as all is saved")


@contextlib.contextmanager
def requests() -> Iterator[Request]:
  """Inside, SIGTERM raises Stopped and Ctrl-C KeyboardInterrupt, until they are to be noted."""
  request, numbers = Request(), (signal.SIGTERM, signal.SIGINT)
  before = {number: signal.getsignal(number) for number in numbers}
  request.listen()
  try:
    yield request
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
