"""Records whose reading ends, stops or breaks a worker process. It imports little: workers do."""

import multiprocessing
import os
import threading

from clip_jax.data import records


class _CannotBePickled(Exception):
  def __init__(self):
    super().__init__("holds a lock")
    self.lock = threading.Lock()


class _CannotBeUnpickled(Exception):
  def __reduce__(self):
    return _refuse, ()


def _refuse():
  raise RuntimeError("not to be had again")


class Source(records.MemorySource):
  """In a worker process, record 13 does what `mode` says."""

  mode = ""

  def __getitem__(self, index):
    if index != 13 or multiprocessing.parent_process() is None:
      return super().__getitem__(index)
    if self.mode == "exits":
      os._exit(0)
    if self.mode == "hangs":
      threading.Event().wait()
    raise {
      "asks to exit": SystemExit(0),
      "cannot be pickled": _CannotBePickled(),
      "cannot be unpickled": _CannotBeUnpickled(),
    }[self.mode]
