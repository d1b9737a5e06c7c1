"""Checkpoints: killed at any moment of a save, a bit flipped anywhere (drills 23 and 25)."""

import functools
import gc
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import saving
import test_checkpoint

from clip_jax import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _kill(workdir, rng):
  """One process that saves step after step, killed at a random moment. Returns: what it told."""
  here = pathlib.Path(__file__)
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(here.parents[2])}
  child = subprocess.Popen(
    [sys.executable, str(here.with_name("saving.py")), str(workdir)],
    stdout=subprocess.PIPE,
    text=True,
    env={**environment, "XLA_FLAGS": ""},
  )
  try:
    told = [child.stdout.readline()]  # it saves from here on
    time.sleep(rng.uniform(0, 0.5))
  finally:
    child.kill()
  told += child.communicate()[0].splitlines()
  assert child.returncode == -signal.SIGKILL
  assert told[0].startswith("saving"), told
  return told


@pytest.mark.parametrize("kills", [5, 21])
def test_killed_at_a_random_moment_of_a_save(tmp_path, kills, drill):
  """Each trainer begins with what the kill before left, and saves that step again."""
  rng, newest = random.Random(kills), 0
  for _ in range(kills):
    told = _kill(tmp_path, rng)
    saved = [int(line.split()[1]) for line in told if line.startswith("saved")]
    newest = max([newest, *saved])
    folders = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    checkpoints = checkpoint.Checkpoints(tmp_path)
    partial = folders - set(map(str, checkpoints.steps()))
    restored = checkpoints.restore_latest(*saving.abstract())
    checkpoints.close()
    lost = newest - min(newest, restored.step if restored else 0)
    drill(23, kills=1, partial=bool(partial), lost=lost)
    assert lost == 0, "a finished step was lost"
    if restored:
      newest = restored.step
      jax.tree.map(
        np.testing.assert_array_equal,
        (restored.params, restored.train),
        saving.trees(restored.step),
      )
      drill(23, restored=1)
  assert newest >= kills // 5


def _formats():
  plain = checkpoint.ocp.PyTreeCheckpointHandler
  return {"zarr2": plain, "zarr3": functools.partial(plain, use_zarr3=True)}


def _files(folder):
  """All files of a step but its facts, which have a checksum of their own, by their sizes."""
  found = [path for path in folder.rglob("*") if path.is_file() and "meta" not in path.parts]
  return sorted(found), [path.stat().st_size for path in sorted(found)]


@pytest.mark.parametrize("form", ["zarr2", "zarr3"])
def test_a_bit_flipped_anywhere_in_a_checkpoint(tmp_path, monkeypatch, form, drill):
  """Found by the storage layer or by our checksums; or nothing that is read has changed."""
  monkeypatch.setattr(checkpoint.ocp, "PyTreeCheckpointHandler", _formats()[form])
  whole, rng = tmp_path / "whole", random.Random(1)
  expected = test_checkpoint._trees(20)
  checkpoints = checkpoint.Checkpoints(whole)
  checkpoints.save(20, *expected, {})
  checkpoints.close()
  metadata = json.loads((whole / "checkpoints" / "20" / "params" / "_METADATA").read_text())
  assert metadata["use_zarr3"] == (form == "zarr3")
  counts = dict.fromkeys(("injected", "detected", "by_checksum", "harmless"), 0)
  for i in range(96):
    workdir = tmp_path / f"{i}"
    shutil.copytree(whole, workdir)
    files, sizes = _files(workdir / "checkpoints" / "20")
    (path,) = rng.choices(files, sizes)
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if i % 8:
      data[at] ^= 1 << rng.randrange(8)
    else:
      data[at : at + 512] = bytes(len(data[at : at + 512]))  # a hole
    path.write_bytes(data)
    counts["injected"] += 1
    _judge(workdir, expected, counts)
    shutil.rmtree(workdir)
  gc.collect()  # a restore that failed leaves what warns when it is freed: here, not at the end
  drill(25, **counts)
  assert counts["detected"] + counts["harmless"] == counts["injected"]
  assert counts["detected"] >= 60


def _judge(workdir, expected, counts):
  checkpoints = checkpoint.Checkpoints(workdir, read_only=True)
  told = ""
  try:
    restored = checkpoints.restore(20, *(test_checkpoint._abstract(tree) for tree in expected))
  except checkpoint.CheckpointError as error:
    told = str(error)
  finally:
    checkpoints.close()
  if told:
    counts["detected"] += 1
    counts["by_checksum"] += "checksum differs in" in told
  else:
    jax.tree.map(np.testing.assert_array_equal, (restored.params, restored.train), expected)
    counts["harmless"] += 1
