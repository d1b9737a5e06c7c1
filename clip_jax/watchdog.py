"""Ends a process that makes no progress, and shows where it stands.

A process that lives but hangs leaves all others waiting in a collective, and them all showing signs
of life (see `hosts.Watch`). A thread of its own still runs then, and can end the process.
"""

import contextlib
import faulthandler
import math
import os
import threading
import time
from collections.abc import Callable, Iterator

STUCK = 42  # exit code: no progress; the same command continues from the newest checkpoint


@contextlib.contextmanager
def watching(limit_seconds: float) -> Iterator[Callable[[str], None]]:
  """Once what it yields was called, `limit_seconds` must not pass until it is called again.

  Past it, the stacks of all threads and a line that names the last call go to standard error, and
  the process ends with the exit code `STUCK`, without clean-up: a hanging thread would not let it.
  Yields: a function of the words for what comes next, as "step 12".
  Raises: ValueError when `limit_seconds` is not over 0.
  """
  if not limit_seconds > 0:
    raise ValueError(f"--stuck {limit_seconds:g}: want seconds, over 0")
  since, what = math.inf, ""
  over = threading.Event()

  def begin(following: str) -> None:
    nonlocal since, what
    since, what = time.monotonic(), following

  def watch() -> None:
    while not over.wait(min(1.0, limit_seconds / 4)):
      if time.monotonic() - since > limit_seconds:
        _end(f"{what} has taken over {limit_seconds:g} s")

  thread = threading.Thread(target=watch, name="watchdog", daemon=True)
  thread.start()
  try:
    yield begin
  finally:
    over.set()
    thread.join()


def _end(what: str) -> None:
  faulthandler.dump_traceback(file=2, all_threads=True)
  line = (
    f"error: {what}: this process, or one that it waits for, is stuck; where, is told above. "
    "The same command on all hosts goes on from the newest checkpoint (--stuck sets the limit)\n"
  )
  os.write(2, line.encode())
  os._exit(STUCK)
