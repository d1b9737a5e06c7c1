"""SIGTERM at the worst moments, to everybody at once, and a host that hangs (drills 18, 19, 31)."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time

import processes
import pytest
import test_hosts
import test_train

from clip_jax import checkpoint, cli, hosts, train, train_step, watchdog
from clip_jax import config as c
from clip_jax.evaluation import tasks

STEPS = 30


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp("experiment") / "tiny.py"
  path.write_text(test_train.EXPERIMENT)
  config = cli.load_config(str(path), [])
  evaluation = dataclasses.replace(config.evaluation, every_steps=4)
  saves = c.Checkpoint(every_steps=5, keep=20)
  return dataclasses.replace(config, steps=STEPS, evaluation=evaluation, checkpoint=saves)


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("unbroken")
  assert test_train._run(config, workdir)
  return workdir


def _sigterm(after_seconds):
  threading.Timer(after_seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()


def _at_call(monkeypatch, owner, name, number, after_seconds):
  """SIGTERM so long after the call of that number, or in it where that is 0. Returns: when."""
  real, calls, sent = getattr(owner, name), [], []

  def call(*args, **named):
    calls.append(name)
    if len(calls) == number:
      sent.append(time.monotonic())
      if after_seconds:
        _sigterm(after_seconds)
      else:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(*args, **named)

  monkeypatch.setattr(owner, name, call)
  return sent


def _in_the_compilation(monkeypatch):
  """SIGTERM a moment after the step is called for the first time, which compiles it."""
  real, sent = train_step.make_train_step, []

  def make(*args):
    step = real(*args)

    def call(state, batch):
      if not sent:
        sent.append(time.monotonic())
        _sigterm(0.3)
      return step(state, batch)

    return call

  monkeypatch.setattr(train_step, "make_train_step", make)
  return sent


PHASES = {
  "restore": lambda m: _at_call(m, checkpoint.Checkpoints, "restore_latest", 1, 0.0),
  "compilation": _in_the_compilation,
  "step": lambda m: _at_call(m, train._Reader, "read", 3, 0.0),
  "data wait": lambda m: test_train._stalling(m, 3),
  "evaluation": lambda m: _at_call(m, tasks, "run", 1, 0.02),
  "save": lambda m: _at_call(m, checkpoint.Checkpoints, "save", 1, 0.0),
  "wait for a save": lambda m: _at_call(m, checkpoint.Checkpoints, "wait", 1, 0.0),
}


@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_in_each_phase(config, unbroken, tmp_path, phase, drill):
  with pytest.MonkeyPatch.context() as first:  # there is a checkpoint to restore
    PHASES["step"](first)
    assert not test_train._run(config, tmp_path)
  saved = [test_train._leaves(tmp_path)[0]]
  with pytest.MonkeyPatch.context() as second:
    sent = PHASES[phase](second)
    assert not test_train._run(config, tmp_path), "it was not asked to stop, or went on"
    seconds = time.monotonic() - sent[0]
  saved.append(test_train._leaves(tmp_path)[0])
  assert saved[0] <= saved[1] < STEPS  # equal where it came before another step was begun
  lost = max(test_train._history(tmp_path)) - saved[1]  # of steps that were done
  drill(18, stops=2, lost=lost, most_seconds=seconds)
  assert lost == 0
  assert test_train._run(config, tmp_path)
  assert test_train._leaves(tmp_path) == test_train._leaves(unbroken)
  assert test_train._history(tmp_path) == test_train._history(unbroken)


# From its eighth batch on the storage of every host gives nothing.
STALLS = """
import threading
from clip_jax import train

place, batches = train._place, []

def stalls(*given):
  batches.append(1)
  if len(batches) > 7:
    threading.Event().wait()
  return place(*given)

train._place = stalls
"""


def test_sigterm_to_one_of_two_hosts_that_wait_for_data(tmp_path, drill):
  run = test_hosts.Run(
    tmp_path, 2, 1, "--config.evaluation.every_steps=0", text=STALLS + test_hosts.EXPERIMENT
  )
  run.wait_for(lambda: run.workdir.is_dir() and 6 in run.series("train/loss"))
  start = time.monotonic()
  run.processes[1].send_signal(signal.SIGTERM)
  assert run.wait() == [hosts.UNFINISHED] * 2, run.text()
  drill(18, stops=1, lost=0, most_seconds=time.monotonic() - start)
  assert test_train._leaves(run.workdir)[0] == max(run.series("train/loss")) == 7


def _start(experiment, workdir, *more):
  """`clip-jax train` as the first of a process group of its own, with two workers."""
  words = ["train", "--config", str(experiment), "--workdir", str(workdir), *more]
  return subprocess.Popen(
    [sys.executable, "-m", "clip_jax.cli", *words, "--config.data.workers=2"],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=test_train._environment(),
    start_new_session=True,
  )


def test_sigterm_to_the_group(tmp_path, drill):
  experiment, whole, workdir = tmp_path / "tiny.py", tmp_path / "whole", tmp_path / "run"
  experiment.write_text(test_train.EXPERIMENT)
  before = processes.shared_memory()
  unbroken = test_train._start(experiment, whole)
  output = unbroken.communicate()[0]
  assert unbroken.returncode == 0, output
  for step in (12, 25):
    run = _start(experiment, workdir)
    test_train._wait_for_step(workdir, step, run)
    members = processes.descendants(run.pid)
    assert len(processes.workers(run.pid)) == 2
    start = time.monotonic()
    os.killpg(run.pid, signal.SIGTERM)
    output = run.communicate(timeout=120)[0]
    seconds = time.monotonic() - start
    assert run.returncode == hosts.UNFINISHED, output
    assert max(test_train._history(workdir)) == test_train._leaves(workdir)[0] >= step
    left, shm = processes.left(members), processes.shared_memory() - before
    drill(19, stops=1, most_seconds=seconds, left=len(left), shm=len(shm))
    assert not left
    assert not shm
  run = _start(experiment, workdir)
  output = run.communicate(timeout=300)[0]
  assert run.returncode == 0, output
  ours, theirs = test_train._leaves(workdir), test_train._leaves(whole)
  differing = sum(ours[1][name] != theirs[1][name] for name in theirs[1])
  drill(19, leaves=len(theirs[1]), differing=differing)
  assert ours == theirs
  assert test_train._history(workdir) == test_train._history(whole)


LIMIT = 30
# A config file is code, and the same on all hosts: one of them will hang.
HANGS = """
import threading
import jax
from clip_jax import train

read = train._Reader.read

def waits_for_ever(reader, metrics, step):
  if step == 6 and jax.process_index() == 1:
    threading.Event().wait()
  return read(reader, metrics, step)

train._Reader.read = waits_for_ever
"""


def test_a_stuck_host_ends_all(tmp_path, drill):
  """It lives and shows signs of life; the other waits for it in a collective."""
  before = processes.shared_memory()
  more = ["--config.evaluation.every_steps=0", "--config.data.workers=2"]
  run = test_hosts.Run(
    tmp_path, 2, 1, *more, f"--stuck={LIMIT}", text=HANGS + test_hosts.EXPERIMENT
  )
  run.wait_for(lambda: run.workdir.is_dir() and 5 in run.series("train/loss"))
  start = time.monotonic()
  members = [pid for one in run.processes for pid in processes.descendants(one.pid)]
  assert len(members) >= 4
  codes = run.wait()
  seconds = time.monotonic() - start
  shown = sum("most recent call first" in run.text(i) for i in range(2))
  drill(31, stuck=1, shown=shown)
  assert codes[1] == watchdog.STUCK, run.text()
  assert codes[0] in (watchdog.STUCK, hosts.UNFINISHED), run.text()
  assert "in waits_for_ever" in run.text(1)
  assert re.search(rf"error: step \d+ has taken over {LIMIT} s", run.text(1))
  assert seconds < LIMIT + 15
  left, shm = processes.left(members), processes.shared_memory() - before
  drill(31, most_seconds=seconds, most_limit=LIMIT, left=len(left), shm=len(shm))
  assert not left
  assert not shm
