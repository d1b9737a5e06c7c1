"""Two processes of two devices: preempted, killed, moved to other machines (drills 20, 21, 22)."""

import math
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

STEPS = 60
TEXT = (
  test_hosts.EXPERIMENT.replace("steps=40", f"steps={STEPS}")
  .replace("every_steps=8, batch=16", "batch=16")
  .replace("Checkpoint(every_steps=4)", "Checkpoint(every_steps=5, keep=20)")
)


def _start(folder, processes=2, devices=2):
  return test_hosts.Run(folder, processes, devices, text=TEXT)


def _last(run):
  """The last step whose loss is on the disk."""
  return max(run.series("train/loss"), default=0) if run.workdir.is_dir() else 0


def _wait_for(run, step):
  run.wait_for(lambda: _last(run) >= step)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  run = _start(tmp_path_factory.mktemp("unbroken"))
  assert run.wait() == [0, 0], run.text()
  return run


def _disturbed(folder, disturb):
  """Runs to the end, disturbed past the steps 12 and 30.

  Returns: the run, the steps done again, and seconds from each disturbance to the next new step.
  """
  redone, back = 0, []
  run = _start(folder)
  for step in (12, 30):
    _wait_for(run, step)
    began = time.monotonic()
    disturb(run)
    reached = _last(run)
    run = _start(folder)
    _wait_for(run, reached + 1)
    back.append(time.monotonic() - began)
    found = re.search(r"pairs, (\d+) of them done", run.text(0))  # in the plan of the new start
    redone += reached - int(found[1] if found else 0)
  assert run.wait() == [0, 0], run.text()
  return run, redone, back


def _compare(run, unbroken, row, drill, **more):
  ours, theirs = (test_train._leaves(r.workdir) for r in (run, unbroken))
  differing = sum(ours[1].get(name) != theirs[1][name] for name in theirs[1])
  losses = [(r.series("train/loss"), r.series("train/gradient_norm")) for r in (run, unbroken)]
  assert sorted(losses[1][0]) == list(range(1, STEPS + 1))
  wrong = sum(
    any(ours.get(step) != theirs[step] for ours, theirs in zip(*losses, strict=True))
    for step in losses[1][0]
  )
  drill(row, runs=1, leaves=len(theirs[1]), differing=differing, **more)
  drill(row, losses=STEPS, losses_differing=wrong)
  assert ours == theirs
  assert test_train._counts(run.workdir) == test_train._counts(unbroken.workdir)
  assert wrong == 0


def test_preempted_twice(unbroken, tmp_path, drill):
  def preempt(run):
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.wait() == [hosts.UNFINISHED] * 2, run.text()

  run, redone, back = _disturbed(tmp_path, preempt)
  assert redone == 0
  saves = unbroken.series("seconds/checkpoint")[STEPS] / (STEPS // 5)
  newest = unbroken.workdir / "checkpoints" / f"{STEPS}"
  size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
  drill(20, most_save_milliseconds=1000 * saves, most_save_bytes=size)
  _compare(run, unbroken, 20, drill, most_back_seconds=max(back))


def test_killed_twice(unbroken, tmp_path, drill):
  def kill(run):
    run.kill()

  run, redone, back = _disturbed(tmp_path, kill)
  assert redone <= 2 * (5 + 2)  # the interval, and those whose save was under way
  _compare(run, unbroken, 21, drill, redone=redone, most_back_seconds=max(back))


def _key_bias_apart(params):
  """Softmax ignores the bias of keys: its gradient is rounding noise, which Adam makes large.

  Returns: all other weights; the biases of the keys.
  """
  apart = {}
  for encoder in ("image", "text"):
    qkv = params[encoder]["transformer"]["blocks"]["attention"]["qkv"]
    apart[encoder], qkv["bias"] = qkv["bias"][:, 1], qkv["bias"][:, [0, 2]]
  return params, apart


def _largest_difference(a, b):
  return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), a, b)))


def test_another_topology_at_each_start(unbroken, tmp_path, drill):
  for until, processes, devices in ((20, 2, 2), (40, 1, 4), (math.inf, 2, 1)):
    run = _start(tmp_path, processes, devices)
    if until < STEPS:
      _wait_for(run, until)
      run.processes[-1].send_signal(signal.SIGTERM)
    expected = hosts.UNFINISHED if until < STEPS else 0
    assert run.wait() == [expected] * processes, run.text()
  losses, wanted = (r.series("train/loss") for r in (run, unbroken))
  assert list(losses) == list(wanted) == list(range(1, STEPS + 1))
  of_loss = max(abs(losses[step] - wanted[step]) for step in wanted)
  parts = (
    _key_bias_apart(jax.device_get(clip_jax.load(r.workdir).params)) for r in (run, unbroken)
  )
  largest, of_key_bias = (_largest_difference(*part) for part in zip(*parts, strict=True))
  drill(22, most_difference=largest, most_loss_difference=of_loss, most_key_bias=of_key_bias)
  assert largest < 1e-6
  assert of_loss < 1e-5
