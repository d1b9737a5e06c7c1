"""tools/prepare_data.py, in which a process is sent a signal when it comes to a certain record.

Workers import this file as their main module, so that it happens in them, too. The environment
says which: WHEN, "look" or "write"; KEY of the record; SIGNAL; WHO, "parent" or "self"; ONCE, a
file that says it has happened; LOG, where each record that is worked on is noted.
"""

import os
import pathlib
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from tools import prepare_data
from tools.prepare import filters

_checked = filters.checked


def checked(record, limits, decode=True):
  when, once = "look" if decode else "write", pathlib.Path(os.environ["ONCE"])
  with pathlib.Path(os.environ["LOG"]).open("a") as log:
    log.write(f"{os.getpid()} {when} {record.key}\n")
  if (when, record.key) == (os.environ["WHEN"], os.environ["KEY"]) and not once.exists():
    once.touch()
    who = os.getppid() if os.environ["WHO"] == "parent" else os.getpid()
    os.kill(who, signal.Signals[os.environ["SIGNAL"]])
    if os.environ["WHO"] == "parent":
      signal.pause()  # until the parent's end is this process's end, too
  return _checked(record, limits, decode)


filters.checked = checked

if __name__ == "__main__":
  sys.exit(prepare_data.main())
