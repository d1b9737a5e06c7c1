"""A process that makes no progress ends itself and shows where it stood."""

import pathlib
import subprocess
import sys
import threading
import types

import pytest

from clip_jax import watchdog

ROOT = pathlib.Path(__file__).parents[1]
STUCK = """
import threading
from clip_jax import watchdog

def waits_for_ever():
  threading.Event().wait()

with watchdog.watching(0.2) as begin:
  begin("step 1")
  begin("step 2")
  waits_for_ever()
"""


def test_a_stuck_process_shows_its_stacks_and_ends(drill):
  done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == watchdog.STUCK
  assert "in waits_for_ever" in done.stderr
  last = done.stderr.splitlines()[-1]
  assert last.startswith(
    "error: step 2 has taken over 0.2 s: this process, or one that it waits for"
  )
  drill(31, stuck=1, shown=1)


def test_progress_goes_on_past_the_limit(monkeypatch):
  """Far more time in all than the limit, but never between two steps; then once."""
  now, looks, ended = [0.0], threading.Semaphore(0), threading.Event()

  def clock():
    if threading.current_thread().name == "watchdog":
      looks.release()
    return now[0]

  monkeypatch.setattr(watchdog, "time", types.SimpleNamespace(monotonic=clock))
  monkeypatch.setattr(watchdog, "_end", lambda what: ended.set())
  with watchdog.watching(0.02) as begin:
    now[0] += 100.0  # before the first call there is no limit
    looks.acquire(timeout=60)
    for step in range(20):
      now[0] += 0.018
      looks.acquire(timeout=60)
      begin(f"step {step}")
    assert not ended.is_set()
    now[0] += 0.021
    assert ended.wait(60)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_limit_that_would_end_every_run_is_refused(seconds):
  with pytest.raises(ValueError, match=r"--stuck .*want seconds, over 0"):
    with watchdog.watching(seconds):
      pass
