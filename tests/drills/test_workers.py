"""Worker processes of the loader that die, hang, or end as if all were well (drills 8 and 9)."""

import contextlib
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import breaking
import processes
import pytest
import test_pipeline
import test_train

from clip_jax.data import pipeline, scenes
from clip_jax.data import tokenizer as tokenizer_lib

STALL_SECONDS = 20.0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=lambda n: n.name)
def test_a_killed_worker_ends_the_run(tmp_path, number, drill):
  (tmp_path / "tiny.py").write_text(test_train.EXPERIMENT)
  workdir, before = tmp_path / "run", processes.shared_memory()
  more = ["--config.data.workers=2", "--config.steps=1000000"]
  run = test_train._start(tmp_path / "tiny.py", workdir, *more)
  try:
    test_train._wait_for_step(workdir, 5, run)
    all_of_it, workers = processes.descendants(run.pid), processes.workers(run.pid)
    assert len(workers) == 2
    start = time.monotonic()
    os.kill(workers[1], number)
    output = " ".join(run.communicate(timeout=120)[0].split())
    seconds = time.monotonic() - start
  finally:
    run.kill()
    run.wait()
  assert run.returncode == 2, output
  assert f"error: of 2 worker processes ended: {workers[1]} (exit code -{number.value})" in output
  assert seconds <= 10
  assert processes.left(all_of_it) == []
  assert processes.shared_memory() <= before
  drill(8, killed=1, most_seconds=seconds)


@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.4, 0.6])
def test_a_trainer_killed_while_its_workers_start(tmp_path, seconds, drill):
  """So long after there is a worker, which imports for some seconds before it can be told."""
  before, here = processes.shared_memory(), pathlib.Path(__file__)
  paths = os.pathsep.join(map(str, (here.parents[2], here.parents[1])))
  with (tmp_path / "output").open("w") as output:
    run = subprocess.Popen(
      [sys.executable, str(here.with_name("loading.py"))],
      stdout=output,
      stderr=output,
      env={**test_train._environment(), "PYTHONPATH": paths},
      start_new_session=True,
    )
  try:
    while not processes.workers(run.pid):
      assert run.poll() is None, (tmp_path / "output").read_text()
      time.sleep(0.01)
    time.sleep(seconds)
  finally:
    run.kill()
    run.wait()
  start = time.monotonic()
  left = processes.left(processes.of_session(run.pid), 20.0)
  gone, shm = time.monotonic() - start, processes.shared_memory() - before
  told = (tmp_path / "output").read_text()
  for pid in left:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)
  assert "a batch" not in told, "the workers had begun"
  drill(19, kills=1, most_gone_seconds=gone, left=len(left), shm=len(shm))
  assert not left, told
  assert not shm


ENDS = {
  "exits": r"of 2 worker processes ended: \d+ \(exit code 0\)(, \d+ \(exit code 0\))?; its records "
  "are missing",  # both, where both have come to the record
  "hangs": rf"no batch for {STALL_SECONDS:.0f} s: a loader or its storage hangs",
}


def _batches(mode):
  """Ten epochs of 40 records by two workers; the bad one is among them."""
  drawn = scenes.Scenes("train", 40)
  source = breaking.Source([drawn[i] for i in range(40)], "memory")
  source.mode = mode
  config = test_pipeline._with_workers(2)
  config = test_pipeline._replace_data(config, sources=config.data.sources[:1])
  return pipeline.host_batches(config, [source], tokenizer_lib.original())


@pytest.mark.parametrize(
  "mode", ["exits", "hangs", "asks to exit", "cannot be pickled", "cannot be unpickled"]
)
def test_a_worker_that_grain_would_wait_for(mode, drill):
  stream = pipeline.Prefetcher(_batches(mode), lambda x: x, 2, stall_seconds=STALL_SECONDS)
  found, seconds, told = [], 0.0, ""
  try:
    for _ in range(25):
      start = time.monotonic()
      found.append(next(stream))
  except pipeline.DataError as error:
    seconds, told = time.monotonic() - start, str(error)
  finally:
    for child in multiprocessing.active_children():
      child.kill()
    stream.close()
  if mode in ENDS:
    assert re.fullmatch(ENDS[mode] + ".*", told)
  else:
    assert told == ""
    assert sum((batch["bad"] != 0).sum() for batch in found) == 10  # once an epoch
  assert seconds < STALL_SECONDS + 10
  drill(9, modes=1, most_seconds=seconds)
  drill(9, most_limit=STALL_SECONDS, most_usual=pipeline._STALL_SECONDS)
