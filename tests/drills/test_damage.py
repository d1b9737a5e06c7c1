"""Checkpoints: killed at any moment of a save, damaged anywhere, also before the eyes of one host
alone (drills 23 and 25).
"""

import functools
import gc
import json
import os
import pathlib
import random
import re
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
import test_hosts
import test_train

from clip_jax import checkpoint, cli, inference, sharding, train, train_step
from clip_jax.data import pipeline
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.interop import sources

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _kill(workdir, rng):
  """One process that saves step after step, killed at a random moment. Returns: what it told."""
  here = pathlib.Path(__file__)
  paths = os.pathsep.join([str(here.parents[2]), str(here.parents[1] / "sealed")])
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
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
  assert newest >= (kills > 5) * kills // 5  # a slow machine may finish none of few


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


STEPS = 40
TEXT = (
  test_hosts.EXPERIMENT.replace("steps=40", f"steps={STEPS}")
  .replace("every_steps=8, batch=16", "batch=16")
  .replace("context_length=16", "context_length=24")
  .replace("Checkpoint(every_steps=4)", "Checkpoint(every_steps=10, keep=20)")
)


def _two_hosts(folder, *options):
  """To the last step, or from the newest checkpoint on. Each host reads its half of the leaves."""
  run = test_hosts.Run(folder, 2, 1, "--config.mesh.fsdp=2", *options, text=TEXT)
  assert run.wait() == [0, 0], run.text()
  assert run.checkpoints() == [10, 20, 30, STEPS]
  return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """It begins with weights of ours, which all hosts read, and with their vocabulary."""
  folder = tmp_path_factory.mktemp("undisturbed")
  (folder / "tiny.py").write_text(TEXT)
  config = cli.load_config(str(folder / "tiny.py"), [])
  fresh = train_step.init_state(config, sharding.one_device())
  captions = pipeline.captions(train.open_sources(config))
  vocabulary = tokenizer_lib.train(captions, 590)  # the run's own would have 600 words
  sources.save(inference.Clip(config, fresh.params, vocabulary), folder / "weights")
  run = _two_hosts(folder, f"--config.init={folder / 'weights'}")
  assert (run.workdir / "tokenizer.json").read_text() == vocabulary.to_json()
  return run


@pytest.mark.parametrize("damage", ["cut short", "a bit"])
def test_damage_that_one_of_two_hosts_meets(undisturbed, tmp_path, damage, drill):
  """In what process 1 wrote and alone reads: both fall back, one sets it aside, both train on."""
  shutil.copytree(undisturbed.workdir, tmp_path / "run")
  newest = tmp_path / "run" / "checkpoints" / f"{STEPS}"
  files = (newest / "params" / "ocdbt.process_1" / "d").iterdir()
  path = max(files, key=lambda path: path.stat().st_size)
  data = bytearray(path.read_bytes())
  if damage == "a bit":
    data[len(data) // 2] ^= 4
  path.write_bytes(data if damage == "a bit" else data[: len(data) // 2])
  run = _two_hosts(tmp_path)
  told = "checksum differs in params/" if damage == "a bit" else "cannot be read .*met by host 1"
  for host in range(2):
    fell_back = rf"{newest}: .*{told}.*; falling back to the step before"
    assert len(re.findall(fell_back, run.text(host))) == 1, run.text(host)
    assert run.text(host).count("falling back") == 1
  assert [run.text(host).count("moved to") for host in range(2)] == [1, 0]
  aside = run.workdir / "checkpoints_damaged"
  assert [folder.name for folder in aside.iterdir()] == [f"{STEPS}-0"]
  ours, theirs = (test_train._leaves(r.workdir) for r in (run, undisturbed))
  differing = sum(ours[1][name] != theirs[1][name] for name in theirs[1])
  drill(25, injected=1, detected=1, by_checksum=damage == "a bit", harmless=0)
  drill(25, fallen_back=1, leaves=len(theirs[1]), differing=differing)
  assert ours == theirs
  losses = [r.series("train/loss") for r in (run, undisturbed)]
  assert sorted(losses[1]) == list(range(1, STEPS + 1))
  assert losses[0] == losses[1]
