"""What the system says of processes and shared memory. Linux only, as the drills are."""

import os
import pathlib
import time


def _stat(pid: int) -> list[str]:
  """State, parent, group, session, ... of a process; empty when it is gone. Source: proc(5)."""
  try:
    text = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return []
  return text.rpartition(") ")[2].split()


def alive(pid: int) -> bool:
  """Whether it runs: neither gone nor a zombie."""
  return (_stat(pid) or ["Z"])[0] not in "ZX"


def descendants(pid: int) -> list[int]:
  """Its children, their children and so on."""
  parents: dict[int, list[int]] = {}
  for name in os.listdir("/proc"):
    if name.isdecimal() and (fields := _stat(int(name))):
      parents.setdefault(int(fields[1]), []).append(int(name))
  out, todo = [], [pid]
  while todo:
    found = parents.get(todo.pop(), [])
    out += found
    todo += found
  return out


def of_session(number: int) -> list[int]:
  """All processes of a session, whoever their parents are by now."""
  pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
  return [pid for pid in pids if _stat(pid)[3:4] == [str(number)]]


def workers(pid: int) -> list[int]:
  """Those of its descendants that are workers of multiprocessing, by what they were started as."""
  return [child for child in descendants(pid) if b"spawn_main" in _command(child)]


def _command(pid: int) -> bytes:
  try:
    return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
  except OSError:
    return b""


def shared_memory() -> set[str]:
  """The names of all shared memory."""
  return set(os.listdir("/dev/shm"))


def left(pids: list[int], seconds: float = 10.0) -> list[int]:
  """Which of these processes still run after so long; waits no longer than they do."""
  end = time.monotonic() + seconds
  while (found := [pid for pid in pids if alive(pid)]) and time.monotonic() < end:
    time.sleep(0.1)
  return found
