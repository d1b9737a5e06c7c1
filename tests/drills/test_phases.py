"""Two hosts, stopped or killed in every phase of a run, one of them or both (drills 18, 21, 30)."""

import re
import signal
import time

import jax
import numpy as np
import pytest
import test_hosts
import test_train

import clip_jax
from clip_jax import hosts

STEPS, INTERVAL = 36, 4
# A config file is code, and the same on all hosts. Each tells by a file that it has come into the
# phase, and stays there until the signals are sent. The compilation it only tells of: that takes a
# second, and no Python runs in it.
IN_PHASES = """
import pathlib
import time
import jax
from clip_jax import checkpoint, summary, train, train_step
from clip_jax.evaluation import tasks

phase = pathlib.Path("phase").read_text()
told = []

def tell(stay=True):
  if not told:
    told.append(phase)
    pathlib.Path(f"in-{jax.process_index()}").touch()
    while stay and not pathlib.Path("sent").exists():
      time.sleep(0.01)

def before(owner, name, due=lambda *_: True):
  real = getattr(owner, name)
  def call(*args, **named):
    if due(*args):
      tell()
    return real(*args, **named)
  setattr(owner, name, call)

def in_the_first_call(make):
  def made(*args):
    real, called = make(*args), []
    def step(*args):
      tell(stay=False)
      out = real(*args)
      if not called:
        called.append(True)
        pathlib.Path(f"out-{jax.process_index()}").touch()
      return out
    return step
  return made

def saves(real):
  def save(*args, **named):
    real(*args, **named)
    if jax.process_index():
      tell(stay=False)  # it waits for the first to commit
  return save

def in_the_last(finish):
  def run(*args, **named):
    before(tasks, "run")
    return finish(*args, **named)
  return run

if phase == "compile":
  train_step.make_train_step = in_the_first_call(train_step.make_train_step)
if phase == "step":
  before(train._Reader, "read", lambda reader, metrics, step, *_: step > 4 and step % 4 == 2)
if phase == "restore":
  before(checkpoint.Checkpoints, "restore")
if phase == "save":  # all is written, nothing is committed: a thread of the first host stays there
  before(checkpoint.ocp.PyTreeCheckpointHandler, "finalize")
  checkpoint.Checkpoints.save = saves(checkpoint.Checkpoints.save)
if phase == "evaluation":
  before(tasks, "run")
if phase == "last_evaluation":
  summary.finish = in_the_last(summary.finish)
"""
TEXT = IN_PHASES + (
  test_hosts.EXPERIMENT.replace("steps=40", f"steps={STEPS}")
  .replace("every_steps=8, batch=16", "every_steps=6, batch=16")
  .replace("Checkpoint(every_steps=4)", f"Checkpoint(every_steps={INTERVAL})")
)
# In this order each start has what its phase needs. Which host alone gets the signal: the first is
# the coordinator, and the one that commits a save.
PHASES = {"compile": 1, "step": 0, "restore": 1, "save": 0, "evaluation": 1, "last_evaluation": 0}


def _start(folder, phase):
  for name in ("sent", "in-0", "in-1", "out-0", "out-1"):
    (folder / name).unlink(missing_ok=True)
  (folder / "phase").write_text(phase)
  return test_hosts.Run(folder, 2, 1, text=TEXT)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  run = _start(tmp_path_factory.mktemp("unbroken"), "none")
  assert run.wait() == [0, 0], run.text()
  return run


def _whole(run):
  """The newest step whose save is committed; 0: none."""
  commits = (run.workdir / "checkpoints").glob("*/commit_success.txt")
  return max((int(path.parent.name) for path in commits), default=0)


def _reached(run):
  """The last step whose loss is written; 0: none."""
  return max(run.series("train/loss"), default=0) if run.workdir.is_dir() else 0


def _send(run, folder, phase, number, who):
  """The signal in that phase, to `who` of the hosts. Returns: exit codes, seconds to the last."""

  def inside():
    told = all((folder / f"in-{i}").exists() for i in range(2))
    return told and (phase != "step" or _whole(run) > 0)  # there is something to go on from

  run.wait_for(inside)
  for i in who:
    run.processes[i].send_signal(number)
  began = time.monotonic()
  over = {"compile": list(folder.glob("out-*")), "save": run.checkpoints()[-1:] == [_whole(run)]}
  (folder / "sent").touch()
  codes = run.wait()
  assert not over.get(phase), f"{phase}: it was over before the signal"
  return codes, time.monotonic() - began


def _judge(run, phase, codes, who):
  """Exit codes, and what the survivor of a death says."""
  killed = [i for i, code in enumerate(codes) if code == -signal.SIGKILL]
  assert killed in ([], who), (phase, codes)
  for i in {0, 1} - set(killed):
    assert codes[i] == hosts.UNFINISHED, (phase, codes, run.text())
  if len(killed) == 1:
    (dead,) = killed
    named = rf"error: host {dead} \(.*pid {run.processes[dead].pid}.*it died; host {1 - dead} stops"
    assert re.search(named, run.text(1 - dead)), (phase, run.text())


def _chain(folder, unbroken, number, everyone, row, counted, drill):
  """One run, with a signal at each start in another phase, to its end: that of the unbroken."""
  kind, most = ("redone", INTERVAL + 2) if number == signal.SIGKILL else ("lost", 0)
  for phase, alone in PHASES.items():
    who = [0, 1] if everyone else [alone]
    run = _start(folder, phase)
    codes, seconds = _send(run, folder, phase, number, who)
    unsaved = _reached(run) - _whole(run)  # steps
    drill(row, most_seconds=seconds, **{counted: 1, phase: 1, kind: unsaved})
    _judge(run, phase, codes, who)
    assert (number == signal.SIGKILL) == (-number in codes), (phase, codes)
    assert 0 <= unsaved <= most, (phase, run.text())
    assert number == signal.SIGTERM or seconds <= 2 * test_hosts.HEARTBEAT, phase
  run = _start(folder, "none")
  assert run.wait() == [0, 0], run.text()
  _compare(run, unbroken, row, drill)


def _compare(run, unbroken, row, drill):
  """All arrays by their checksums, the weights by their bits, and all that was logged."""
  ours, theirs = (test_train._leaves(r.workdir) for r in (run, unbroken))
  weights = [
    jax.tree.leaves(jax.device_get(clip_jax.load(r.workdir).params)) for r in (run, unbroken)
  ]
  differing = sum(ours[1].get(name) != theirs[1][name] for name in theirs[1])
  differing += sum(not np.array_equal(a, b) for a, b in zip(*weights, strict=True))
  drill(row, runs=1, leaves=len(theirs[1]), differing=differing)
  losses = [test_train._history(r.workdir) for r in (run, unbroken)]
  assert sorted(losses[1]) == list(range(1, STEPS + 1))
  wrong = sum(losses[0].get(step) != losses[1][step] for step in losses[1])
  drill(row, losses=STEPS, losses_differing=wrong)
  assert differing == wrong == 0
  assert ours == theirs
  assert run.figures() == unbroken.figures()


@pytest.mark.parametrize("everyone", [False, True], ids=["one", "all"])
def test_sigterm_in_each_phase_of_two_hosts(tmp_path, unbroken, everyone, drill):
  _chain(tmp_path, unbroken, signal.SIGTERM, everyone, 18, "stops", drill)


def test_one_host_killed_in_each_phase(tmp_path, unbroken, drill):
  _chain(tmp_path, unbroken, signal.SIGKILL, False, 30, "deaths", drill)


def test_all_hosts_killed_in_each_phase(tmp_path, unbroken, drill):
  _chain(tmp_path, unbroken, signal.SIGKILL, True, 21, "kills", drill)
