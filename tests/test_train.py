"""The loop: kill it however you like, and the resumed run is bit for bit the unbroken one."""

import dataclasses
import functools
import io
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import rich.console

from clip_jax import (
  checkpoint,
  cli,
  hosts,
  inference,
  metrics,
  sharding,
  summary,
  train,
  train_step,
)
from clip_jax import config as c
from clip_jax.data import pipeline, records
from clip_jax.evaluation import encoding, tasks
from clip_jax.interop import exports, sources

STEPS = 60
EXPERIMENT = """
from clip_jax import config as c

def get_config():
  return c.to_config_dict(c.Config(
    name="tiny",
    steps=60,
    log_every_steps=1,
    model=c.Model(
      image=c.Vision(resolution=32, patch=8, width=16, layers=1, heads=2),
      text=c.Text(context_length=20, vocab_size=600, width=16, layers=1, heads=2),
      embed_dim=8,
    ),
    data=c.Data(
      sources=(c.Source("scenes", records=200), c.Source("digits")),
      batch_pairs=16,
      tokenizer="train",
    ),
    optimizer=c.Optimizer(learning_rate=1e-3, warmup_steps=5),
    evaluation=c.Evaluation(
      (c.Task("d", "zero_shot", c.Source("digits", split="test"), "digits"),)
    ),
    checkpoint=c.Checkpoint(every_steps=5, keep=20),
  ))
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
  path = tmp_path_factory.mktemp("experiment") / "tiny.py"
  path.write_text(EXPERIMENT)
  return path


@pytest.fixture
def config(experiment):
  return cli.load_config(str(experiment), [])


def _environment():
  flags = "--xla_backend_optimization_level=0"  # as in conftest.py
  return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def _start(experiment, workdir, *more):
  words = ["train", "--config", str(experiment), "--workdir", str(workdir), *more]
  return subprocess.Popen(
    [sys.executable, "-m", "clip_jax.cli", *words],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=_environment(),
  )


def _wait_for_step(workdir: pathlib.Path, step: int, process) -> None:
  """Returns as soon as the metrics of that step are on the disk."""
  while process.poll() is None:
    lines = metrics.read(workdir) if workdir.exists() else []
    if any(line["step"] >= step for line in lines):
      return
    time.sleep(0.01)
  raise AssertionError(f"ended before step {step}: {process.stdout.read()}")


def _leaves(workdir):
  checkpoints = checkpoint.Checkpoints(workdir, read_only=True)
  last = checkpoints.steps()[-1]
  meta = checkpoints.meta(last)
  checkpoints.close()
  return last, meta["leaves"]


def _counts(workdir):
  """What the newest checkpoint says of bad records: by cause, and of how many."""
  checkpoints = checkpoint.Checkpoints(workdir, read_only=True)
  _, meta = checkpoints.newest_meta()
  checkpoints.close()
  return meta["bad_records"], meta["seen_records"]


def _history(workdir):
  """{step: (loss, gradient norm)} as written."""
  lines = [line for line in metrics.read(workdir) if "train/loss" in line]
  history = {line["step"]: (line["train/loss"], line["train/gradient_norm"]) for line in lines}
  assert len(history) == len(lines), "a step was written twice"
  return history


@pytest.fixture(scope="module")
def unbroken(experiment, tmp_path_factory):
  """The workdir of a run of 60 steps that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("unbroken")
  process = _start(experiment, workdir)
  output = process.communicate()[0]
  assert process.returncode == 0, output
  return workdir


def test_a_finished_run_leaves_everything(unbroken):
  assert _leaves(unbroken)[0] == STEPS
  assert sorted(_history(unbroken)) == list(range(1, STEPS + 1))
  results = json.loads((unbroken / "results.json").read_text())
  assert results["step"] == STEPS
  assert 0 <= results["figures"]["eval/d/top1"] <= 1
  assert "<html" in (unbroken / "report.html").read_text()
  assert _counts(unbroken) == ({}, STEPS * 16)
  account = [line for line in metrics.read(unbroken) if "seconds/total" in line][-1]
  assert account["seconds/evaluation"] > 0  # the last is the only one
  assert list((unbroken / "tensorboard").glob("events*"))


def test_killed_twice_and_stopped_and_resumed_is_bit_for_bit_the_same(
  experiment, unbroken, tmp_path, drill
):
  """Drills 18, 20, 21 in one process: parameters, optimizer, data order, every step's loss."""
  workdir = tmp_path / "run"
  for step, kill in ((12, signal.SIGKILL), (20, signal.SIGKILL), (28, signal.SIGTERM)):
    process = _start(experiment, workdir)
    _wait_for_step(workdir, step, process)
    process.send_signal(kill)
    output = process.communicate()[0]
    if kill == signal.SIGTERM:
      assert process.returncode == hosts.UNFINISHED, output
      assert re.search(r"stopped at step \d+ and saved", output.replace("\n", " ")), output
      saved = _leaves(workdir)[0]
      assert step <= saved  # the steps under way too: none is lost
      assert max(_history(workdir)) == saved
      assert _counts(workdir) == ({}, saved * 16)
    else:
      assert process.returncode == -signal.SIGKILL, output
  process = _start(experiment, workdir)
  output = process.communicate()[0]
  assert process.returncode == 0, output
  ours, theirs = ((_leaves(path)[1], _history(path)) for path in (workdir, unbroken))
  differing, wrong = (
    sum(a.get(name) != b[name] for name in b) for a, b in zip(ours, theirs, strict=True)
  )
  drill(20, runs=1, leaves=len(theirs[0]), differing=differing)
  drill(20, losses=len(theirs[1]), losses_differing=wrong)
  assert _leaves(workdir) == _leaves(unbroken)
  assert ours == theirs
  assert _counts(workdir) == _counts(unbroken)


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
  """Runs of one config share their step: nothing of a run is in it."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_step, "make_train_step", functools.cache(train_step.make_train_step))
    yield


def _run(config, workdir, **more):
  return train.train(config, workdir, rich.console.Console(quiet=True), **more)


def _short(config, steps=6, **data):
  return dataclasses.replace(config, steps=steps, data=dataclasses.replace(config.data, **data))


@pytest.fixture(scope="module")
def trained(experiment, tmp_path_factory):
  """A workdir with 6 of 6 steps, trained on 8 devices, and its config."""
  config = _short(cli.load_config(str(experiment), []))
  workdir = tmp_path_factory.mktemp("trained")
  assert _run(config, workdir)
  return config, workdir


CHANGES = {
  "config.seed": lambda k: dataclasses.replace(k, seed=1),
  "config.steps": lambda k: dataclasses.replace(k, steps=9),
  "config.model.embed_dim": lambda k: dataclasses.replace(
    k, model=dataclasses.replace(k.model, embed_dim=16)
  ),
  "config.model.activation": lambda k: dataclasses.replace(
    k, model=dataclasses.replace(k.model, activation="gelu")
  ),
  "config.optimizer.learning_rate": lambda k: dataclasses.replace(
    k, optimizer=dataclasses.replace(k.optimizer, learning_rate=1.0)
  ),
  "config.preprocess.mean": lambda k: dataclasses.replace(
    k, preprocess=c.Preprocess(mean=(0.5, 0.5, 0.5))
  ),
  "data.batch_pairs": lambda k: _short(k, batch_pairs=32),
  "data.sources.0.content": lambda k: _short(
    k, sources=(c.Source("scenes", records=201), c.Source("digits"))
  ),
}


@pytest.mark.parametrize("field", CHANGES)
def test_another_run_is_refused_by_field(trained, field, drill):
  config, workdir = trained
  with pytest.raises(train.TrainingError, match=rf"{field} was .*--accept-changes"):
    _run(CHANGES[field](config), workdir)
  drill(4, changed=1, named=1)


def test_accepted_changes_go_on(trained, tmp_path):
  config, workdir = trained
  copied = tmp_path / "copy"
  subprocess.run(["cp", "-r", str(workdir), str(copied)], check=True)
  assert _run(dataclasses.replace(config, steps=8), copied, accept_changes=True)
  assert _leaves(copied)[0] == 8


def test_a_step_without_its_facts_is_passed_over(trained, tmp_path):
  config, workdir = trained
  copied = tmp_path / "copy"
  last, leaves = _leaves(workdir)
  shutil.copytree(workdir, copied)
  shutil.rmtree(copied / "checkpoints" / str(last) / "meta")
  assert inference.load(copied).step < last
  assert _run(config, copied)
  assert _leaves(copied) == (last, leaves)


def test_two_in_one_workdir_are_refused(config, tmp_path):
  with (
    train._alone_in(tmp_path),
    pytest.raises(train.TrainingError, match="another process trains there"),
  ):
    _run(config, tmp_path)


def test_what_changes_no_value_is_not_refused(trained):
  config, workdir = trained
  assert _run(dataclasses.replace(config, name="another", log_every_steps=3), workdir)


class _Gone(Exception):
  """What ends a run in the tests below."""


def _watched_evaluations(monkeypatch, fail=False):
  """The steps that are evaluated from now on; with `fail` every evaluation raises."""
  steps, run_tasks, write = [], tasks.run, metrics.Log.write

  def run(*given):
    if fail:
      raise encoding.EvaluationError("a bad image")
    return run_tasks(*given)

  def watch(log, step, values):
    steps.extend({step for name in values if name.startswith("eval/")})
    write(log, step, values)

  monkeypatch.setattr(tasks, "run", run)
  monkeypatch.setattr(metrics.Log, "write", watch)
  return steps


def _evaluating(config, every_steps, saved_every=100):
  """Of the first digits only."""
  (digits,) = config.evaluation.tasks
  tasks_of = (dataclasses.replace(digits, limit=8),)
  evaluation = c.Evaluation(tasks_of, every_steps=every_steps, batch=8)
  kept = c.Checkpoint(every_steps=saved_every)
  return dataclasses.replace(config, evaluation=evaluation, checkpoint=kept)


def test_an_evaluation_that_fails_loses_no_step_and_is_made_up_for(trained, tmp_path, monkeypatch):
  config, unbroken = trained
  config = _evaluating(config, 4)
  with monkeypatch.context() as patch:
    assert _watched_evaluations(patch, fail=True) == []
    for _ in range(2):  # until it is repaired no step is lost, and none is left out
      with pytest.raises(encoding.EvaluationError, match="a bad image"):
        _run(config, tmp_path)
      assert _leaves(tmp_path)[0] == 4
      assert sorted(_history(tmp_path)) == [1, 2, 3, 4]
  evaluated = _watched_evaluations(monkeypatch)
  assert _run(config, tmp_path)
  assert evaluated == [4]
  assert [line["step"] for line in metrics.read(tmp_path) if "eval/d/top1" in line] == [4]
  assert _leaves(tmp_path) == _leaves(unbroken)
  assert _history(tmp_path) == _history(unbroken)


def test_an_evaluation_that_was_made_is_not_made_again(trained, tmp_path, monkeypatch):
  config, unbroken = trained
  config = _evaluating(config, 4, saved_every=4)
  evaluated, place = _watched_evaluations(monkeypatch), train._place
  calls = itertools.count(1)

  def failing(*given):
    if next(calls) > 5:
      raise _Gone
    return place(*given)

  monkeypatch.setattr(train, "_place", failing)
  with pytest.raises(_Gone):
    _run(config, tmp_path)
  assert (_leaves(tmp_path)[0], evaluated) == (4, [4])
  monkeypatch.setattr(train, "_place", place)
  assert _run(config, tmp_path)
  assert evaluated == [4]
  assert _history(tmp_path) == _history(unbroken)


def test_bad_records_count_the_same_over_a_restart(config, tmp_path, monkeypatch):
  """Every checkpoint has those of its own step too: R3, exact."""
  config = dataclasses.replace(_short(config), checkpoint=c.Checkpoint(every_steps=2))
  read, place, calls = pipeline.scenes.Scenes.__getitem__, train._place, itertools.count(1)

  def getitem(self, index):
    if index % 7 == 0:
      raise OSError("gone")
    return read(self, index)

  def failing(*given):
    if next(calls) > 5:
      raise _Gone
    return place(*given)

  monkeypatch.setattr(pipeline.scenes.Scenes, "__getitem__", getitem)
  assert _run(config, tmp_path / "whole")
  monkeypatch.setattr(train, "_place", failing)
  with pytest.raises(_Gone):
    _run(config, tmp_path / "broken")
  bad, seen = _counts(tmp_path / "broken")
  assert (seen, bad["storage"] > 0) == (4 * 16, True)
  monkeypatch.setattr(train, "_place", place)
  assert _run(config, tmp_path / "broken")
  assert _counts(tmp_path / "broken") == _counts(tmp_path / "whole")
  assert _counts(tmp_path / "whole")[1] == 6 * 16


def test_sigterm_in_an_evaluation_is_served_between_two_batches(trained, tmp_path, monkeypatch):
  """Its step is saved already; the next start makes the whole evaluation."""
  config, unbroken = trained
  config = _evaluating(config, 4)
  config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, batch=2))
  encode, save, calls = inference.Clip.encode_image, checkpoint.Checkpoints.save, []

  def saved(checkpoints, step, *given):
    calls.append(f"saved {step}")
    save(checkpoints, step, *given)

  def asked(model, images):
    calls.append(f"{len(images)} images")
    os.kill(os.getpid(), signal.SIGTERM)
    return encode(model, images)

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, "save", saved)
    patch.setattr(inference.Clip, "encode_image", asked)
    assert not _run(config, tmp_path)
  assert calls == ["saved 4", "2 images"]  # of eight
  assert _leaves(tmp_path)[0] == max(_history(tmp_path)) == 4
  evaluated = _watched_evaluations(monkeypatch)
  assert _run(config, tmp_path)
  assert evaluated == [4]
  assert _leaves(tmp_path) == _leaves(unbroken)
  assert _history(tmp_path) == _history(unbroken)


def test_sigterm_in_a_wait_for_data_saves_what_is_done(trained, tmp_path, monkeypatch):
  config, unbroken = trained
  _stalling(monkeypatch, 4)
  assert not _run(config, tmp_path)
  saved = _leaves(tmp_path)[0]
  assert 1 <= saved == max(_history(tmp_path)) <= 3
  monkeypatch.undo()
  assert _run(config, tmp_path)
  assert _leaves(tmp_path) == _leaves(unbroken)


def _stalling(monkeypatch, number):
  """Of its batch of that number on the storage gives nothing; then comes SIGTERM. Returns: when."""
  place, close = train._place, pipeline.Prefetcher.close
  calls, sent, released = itertools.count(1), [], threading.Event()

  def stalls(*given):
    if next(calls) == number:
      sent.append(time.monotonic())
      os.kill(os.getpid(), signal.SIGTERM)
      assert released.wait(60)
    return place(*given)

  def closing(stream):
    released.set()
    close(stream)

  monkeypatch.setattr(train, "_place", stalls)
  monkeypatch.setattr(pipeline.Prefetcher, "close", closing)
  return sent


def test_sigterm_in_the_last_evaluation(experiment, trained, tmp_path, monkeypatch):
  """The watchdog looks at it too. Training is over: the same command evaluates."""
  copied, seen = tmp_path / "copy", []
  shutil.copytree(trained[1], copied)
  words = ["train", "--config", str(experiment), "--workdir", str(copied), "--processes", "1"]

  def asked(model, images):
    seen.extend(thread.name for thread in threading.enumerate() if thread.name == "watchdog")
    os.kill(os.getpid(), signal.SIGTERM)
    return np.tile(np.eye(1, 8, dtype=np.float32), (len(images), 1))

  monkeypatch.setattr(inference.Clip, "encode_image", asked)
  small = "--config.evaluation.batch=64"
  assert cli.main([*words, "--config.steps=6", small]) == hosts.UNFINISHED
  assert seen == ["watchdog"]
  assert not (copied / "results.json").exists()
  account = metrics.read(copied)[-1]
  assert account["seconds/evaluation"] > 0


def test_a_finished_workdir_trains_no_more(trained):
  config, workdir = trained
  before = _leaves(workdir)
  assert _run(config, workdir)
  assert _leaves(workdir) == before


def test_bad_batch_and_devices_are_told_first(config, tmp_path):
  with pytest.raises(ValueError, match=r"12 pairs .* 8 devices"):
    _run(_short(config, batch_pairs=12), tmp_path / "none")
  assert not (tmp_path / "none").exists()


def test_nothing_to_train_on(config, tmp_path):
  with pytest.raises(ValueError, match=r"config.data.sources: empty"):
    _run(_short(config, sources=()), tmp_path)


def test_more_processes_than_records(config, monkeypatch):
  few = _short(config, sources=(c.Source("scenes", records=3), c.Source("scenes", records=4)))
  monkeypatch.setattr(jax, "process_count", lambda: 7)
  assert len(train.open_sources(few)) == 2
  monkeypatch.setattr(jax, "process_count", lambda: 8)
  message = "config.data.sources: 7 records for 8 processes; each needs one at least"
  with pytest.raises(ValueError, match=message):
    train.open_sources(few)


def test_the_plan_counts_the_bytes_of_one_device(config):
  """Against arrays that lie on eight devices: weights and moments in parts, rows over fsdp only."""
  mesh = sharding.make_mesh(c.Mesh(fsdp=4, tensor=2))
  state = jax.tree.map(
    lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
    train_step.abstract_state(config, mesh),
  )
  first = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)]
  rows = {"image": np.zeros((16, 32, 32, 3), np.uint8), "tokens": np.zeros((16, 20), np.int32)}
  batch = sharding.global_batch(rows, mesh)
  given = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(batch)]
  told = io.StringIO()
  plan = summary.plan(config, mesh, train.open_sources(config), 0)
  rich.console.Console(width=200, file=told).print(plan)
  assert f"{sum(first):,} bytes of state a device, {sum(given):,} of input" in told.getvalue()


def test_a_vocabulary_too_large_for_the_model(config, tmp_path):
  text = dataclasses.replace(config.model.text, vocab_size=600)
  small = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
  with pytest.raises(ValueError, match=r"vocab_size: 600 is under the tokenizer's 49408"):
    _run(_short(small, tokenizer="original"), tmp_path)


def test_not_finite_for_too_long_ends_the_run(config, tmp_path, monkeypatch, drill):
  """Drill 16: the run ends, names the step to go on from, and what is saved is finite."""
  place, seen = train._place, []

  def poisoned(batch, bad_records, stop, mesh):
    arrays = place(batch, bad_records, stop, mesh)
    seen.append((int(batch["source"][2]), int(batch["record"][2])))
    if len(seen) > 7:
      pixels = np.array(arrays["image"], np.float32)
      pixels[2, 5, 5, 0] = np.nan
      arrays["image"] = jax.device_put(pixels, arrays["image"].sharding)
    return arrays

  monkeypatch.setattr(train, "_place", poisoned)
  monkeypatch.setattr(checkpoint.Checkpoints, "poll", lambda _: None)  # the last is still written
  told = io.StringIO()
  with pytest.raises(train.TrainingError, match="10 steps in a row skipped") as caught:
    train.train(config, tmp_path, rich.console.Console(file=told, width=200))
  source, record = seen[16]  # of step 17, the tenth
  where = train.open_sources(config)[source].locate(record)
  pairs = config.data.batch_pairs
  said = f"1 of {pairs} pairs have embeddings that are not finite, the first is {where}; step"
  assert said in str(caught.value)
  checkpoints = checkpoint.Checkpoints(tmp_path, read_only=True)
  last = checkpoints.steps()[-1]
  checkpoints.close()
  assert last == 15
  assert f"; step {last} is the last checkpoint. " in str(caught.value)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(inference.load(tmp_path).params))
  assert "warning: step 8 is not finite and changes nothing (loss nan" in told.getvalue()
  assert re.search("time: .*% redone", told.getvalue())
  lost = [line for line in metrics.read(tmp_path) if line.get("train/loss", 0) is None]
  assert len(lost) == 10
  drill(16, most_steps=len(lost))


def test_a_shard_of_bad_records_ends_the_run(config, tmp_path, monkeypatch, drill):
  """Drill 6: past the limit the run stops and names them."""
  text = dataclasses.replace(config.model.text, vocab_size=49408)
  large = dataclasses.replace(config, model=dataclasses.replace(config.model, text=text))
  only = _short(large, tokenizer="original", sources=(c.Source("scenes", records=200),))
  read = pipeline.scenes.Scenes.__getitem__

  def failing(every):
    def getitem(self, index):
      if index % every == 0:
        raise OSError("gone")
      return read(self, index)

    return getitem

  monkeypatch.setattr(pipeline.scenes.Scenes, "__getitem__", failing(every=1))
  with pytest.raises(records.RecordError, match=r"no substitute for it among 100 .*storage.*gone"):
    _run(only, tmp_path)
  monkeypatch.setattr(pipeline.scenes.Scenes, "__getitem__", failing(every=2))
  message = r"\d+ of (\d+) records \(storage \d+\) are bad"
  with pytest.raises(pipeline.DataError, match=message) as error:
    _run(only, tmp_path)
  drill(6, most_steps=int(re.search(message, str(error.value))[1]) / only.data.batch_pairs)


def test_a_workdir_that_cannot_be_made_is_named(config, tmp_path):
  blocked = tmp_path / "file"
  blocked.write_text("not a folder")
  with pytest.raises(OSError, match="file"):
    _run(config, blocked / "run")


HALF = {"moments_dtype": "bfloat16", "text_weights_dtype": "bfloat16"}


def _halved(config):
  return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **HALF))


def _dtypes(workdir):
  """{the end of a leaf's path: its dtype} of the newest checkpoint, by what starts its path."""
  leaves = _leaves(workdir)[1]
  return {
    name: {kept[1] for path, kept in leaves.items() if path.startswith(prefix) and kept[0]}
    for name, prefix in (
      ("image", "params/image/"), ("text", "params/text/"), ("moments", "train/opt_state/"),
    )
  }  # fmt: skip


def test_a_run_in_halves_saves_resumes_and_exports(config, tmp_path):
  """Bit for bit from the step before the last; read and exported as float32 of the same values."""
  config, workdir = _halved(_short(config)), tmp_path / "run"
  assert _run(config, workdir)
  halves = {"image": {"float32"}, "text": {"float32", "bfloat16"}, "moments": {"bfloat16"}}
  assert _dtypes(workdir) == halves
  last, leaves = _leaves(workdir)
  shutil.rmtree(workdir / "checkpoints" / str(last))
  assert _leaves(workdir)[0] == 5
  assert _run(config, workdir)
  assert _leaves(workdir) == (last, leaves)
  model = inference.load(workdir)
  assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {"float32"}
  exports.export(model, tmp_path / "out", "open_clip")
  again = sources.load(tmp_path / "out")
  jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
  embeddings = model.encode_text(["a red circle", "the digit 3"])
  np.testing.assert_array_equal(again.encode_text(["a red circle", "the digit 3"]), embeddings)
  projection = np.asarray(model.params["text_projection"])
  assert (projection.view(np.uint32) & 0xFFFF == 0).all()  # what bfloat16 holds


def test_another_precision_is_refused_or_taken_over(trained, tmp_path):
  """From float32 to halves and back: the weights are the same, rounded to nearest."""
  config, workdir = trained
  copied = tmp_path / "copy"
  shutil.copytree(workdir, copied)
  half = _halved(dataclasses.replace(config, steps=7))
  message = r"moments_dtype was 'float32', is 'bfloat16'.*text_weights_dtype was 'float32'"
  with pytest.raises(train.TrainingError, match=message):
    _run(half, copied)
  assert _run(half, copied, accept_changes=True)
  assert _leaves(copied)[0] == 7
  assert _dtypes(copied)["moments"] == {"bfloat16"}
  assert _run(dataclasses.replace(config, steps=8), copied, accept_changes=True)
  assert _leaves(copied)[0] == 8
  assert _dtypes(copied) == _dtypes(workdir)
