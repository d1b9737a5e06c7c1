"""What a run writes: lines of JSON that survive crashes, and rates by hand."""

import dataclasses
import json
import pathlib
import re

import pytest
import rich.console

from clip_jax import chips, metrics
from clip_jax import config as c

CONFIG = c.Config(steps=10, log_every_steps=2, data=c.Data(batch_pairs=8))
VALUES = {"loss": 1.5, "accuracy": 0.25}


def _log(workdir, start=0, console=None):
  console = console or rich.console.Console(quiet=True)
  return metrics.Log(CONFIG, workdir, console, start, training_flops_per_pair=300)


def _steps(workdir):
  """The lines that tell of steps; the others are accounts of time."""
  return [line for line in metrics.read(workdir) if "train/loss" in line]


def test_lines_every_so_often_and_at_the_end(tmp_path):
  log = _log(tmp_path)
  for step in range(1, 11):
    log.step(step, VALUES)
  log.close()
  lines = _steps(tmp_path)
  assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
  assert lines[0]["train/loss"] == 1.5
  assert lines[0]["train/pairs_per_second"] > 0
  assert lines[0]["train/data_wait"] == 0


def test_rates_by_hand(tmp_path, monkeypatch):
  now = iter([100.0, 104.0, 105.0])
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
  monkeypatch.setattr(metrics, "peak_flops", lambda: 1000.0)
  log = _log(tmp_path)
  for step, wait_seconds in ((2, 1.0), (4, 1.25)):
    log._seconds["data wait"] = wait_seconds
    log.step(step, VALUES)
  log.close()
  first, second = _steps(tmp_path)
  assert first["train/pairs_per_second"] == pytest.approx(2 * 8 / 4)
  assert first["train/data_wait"] == pytest.approx(0.25)
  assert first["train/mfu"] == pytest.approx(3 * 8 * 100 * 2 / 4 / 1000)
  assert second["train/pairs_per_second"] == pytest.approx(16)
  assert second["train/data_wait"] == pytest.approx(0.25)


def test_a_restart_drops_the_lost_steps_and_keeps_the_others(tmp_path):
  log = _log(tmp_path)
  for step in range(1, 9):
    log.step(step, VALUES)
  log.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 9, "train/lo')  # cut off by a crash
  log = _log(tmp_path, start=5)
  for step in range(6, 11):
    log.step(step, {**VALUES, "loss": 2.5})
  log.close()
  lines = _steps(tmp_path)
  assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
  assert [line["train/loss"] for line in lines] == [1.5, 1.5, 2.5, 2.5, 2.5]


def test_what_is_not_finite_is_null_and_kept_from_tensorboard(tmp_path, caplog):
  log = _log(tmp_path)
  log.write(1, {"a": float("nan"), "b": float("inf"), "c": 1.0})
  log.close()
  assert "NaN" not in caplog.text  # its writer's own words on it
  assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == {
    "step": 1,
    "a": None,
    "b": None,
    "c": 1.0,
  }


def test_a_damaged_line_is_named(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
  with pytest.raises(ValueError, match=r"metrics.jsonl:2: not JSON"):
    metrics.read(tmp_path)


def test_people_get_lines_where_there_is_no_terminal(tmp_path):
  with (tmp_path / "out.txt").open("w") as file:
    log = _log(tmp_path, console=rich.console.Console(file=file, width=200))
    log.step(2, VALUES)
    log.close()
  assert "step 2/10  loss 1.500  accuracy 25%" in (tmp_path / "out.txt").read_text()


def test_the_split_of_time_adds_up(tmp_path):
  log = _log(tmp_path)
  with log.time("evaluation"):
    pass
  log.step(10, VALUES)
  split = log.finish()
  log.close()
  assert split["seconds/total"] >= split["seconds/evaluation"] >= 0
  assert metrics.read(tmp_path)[-1] == {"step": 10, **split}


def test_the_account_goes_on_over_starts(tmp_path, monkeypatch):
  """By hand: 2 s to start, steps of 3 s; killed after step 6, goes on from step 4."""
  clock = [100.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])

  def run(log, steps):
    for step in steps:
      with log.time("step"):
        clock[0] += 3.0
      log.step(step, VALUES)

  clock[0] += 2.0
  quiet = rich.console.Console(quiet=True)
  first = metrics.Log(CONFIG, tmp_path, quiet, 0, 1, started=100.0)
  run(first, range(1, 8))
  first.close()
  clock[0] += 1000.0
  clock[0] += 4.0
  killed = metrics.Log(CONFIG, tmp_path, quiet, 4, 1, started=clock[0] - 4.0)
  killed.close()  # when it was ready
  clock[0] += 1000.0  # until somebody starts it again
  clock[0] += 5.0
  with (tmp_path / "out.txt").open("w") as file:
    console = rich.console.Console(file=file, width=200)
    log = metrics.Log(CONFIG, tmp_path, console, 4, 1, started=clock[0] - 5.0)
    run(log, range(5, 11))
    found = log.finish()
    log.close()
    clock[0] += 500.0
    with metrics.timed_after(tmp_path, "evaluation", console):
      clock[0] += 13.0
  assert {part: s for part, s in found.items() if s} == {
    "seconds/start": 2.0 + 4.0 + 5.0,
    "seconds/step": 4 * 3.0 + 6 * 3.0,
    "seconds/redone": 2 * 3.0,  # of steps 5 and 6; step 7 was never written
    "seconds/total": 2.0 + 18.0 + 4.0 + 5.0 + 18.0,
  }
  told = (tmp_path / "out.txt").read_text()
  assert "time: 47 s: 64% step, 23% start, 13% redone" in told
  assert "time: 60 s: 50% step, 22% evaluation, 18% start, 10% redone" in told
  last = metrics.read(tmp_path)[-1]
  assert (last["step"], last["seconds/evaluation"], last["seconds/total"]) == (10, 13.0, 60.0)


def test_the_account_is_written_between_the_lines_of_steps(tmp_path, monkeypatch):
  """What was before a checkpoint between two of them is not called redone by who starts from it."""
  config = dataclasses.replace(CONFIG, steps=100, log_every_steps=50)
  clock = [0.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
  log = metrics.Log(config, tmp_path, rich.console.Console(quiet=True), 0, 1)
  for step in range(1, 13):
    with log.time("step"):
      clock[0] += 3.0
    log.step(step, VALUES)
    if step == 6:
      log.account()  # as after a save
  log.close()
  told = [(line["step"], line["seconds/total"]) for line in metrics.read(tmp_path)]
  assert told == [(0, 0.0), (4, 12.0), (6, 18.0), (10, 30.0)]
  log = metrics.Log(config, tmp_path, rich.console.Console(quiet=True), 6, 1)
  log.close()
  account = metrics.read(tmp_path)[-1]
  assert (account["seconds/step"], account["seconds/redone"]) == (18.0, 12.0)


def test_what_ends_a_run_does_not_take_its_account(tmp_path):
  with (tmp_path / "out.txt").open("w") as file:
    console = rich.console.Console(file=file, width=200)
    log = _log(tmp_path, console=console)
    log._lines.close()
    log._lines = pathlib.Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(ZeroDivisionError), log, log.time("evaluation"):
      raise ZeroDivisionError
  assert re.search(r"time: 0 s: .*% redone", (tmp_path / "out.txt").read_text())


def test_a_full_disk_names_the_file_once(tmp_path):
  log = _log(tmp_path)
  log._lines.close()
  log._lines = pathlib.Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115
  with pytest.raises(OSError, match="No space left") as caught:
    log.write(1, {"a": 1.0})
  assert caught.value.filename == str(tmp_path / "metrics.jsonl")
  log.close()  # does not talk over the error


def test_an_unknown_device_has_no_peak(monkeypatch):
  monkeypatch.setattr(chips, "CHIPS", ())
  assert metrics.peak_flops() is None


def test_what_cannot_be_written_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
  path = tmp_path / "page.md"
  metrics.write_atomically(path, "größer")

  def full(*_):
    raise OSError(28, "No space left on device")

  for broken in ((metrics.os, "replace"), (pathlib.Path, "write_bytes")):
    with monkeypatch.context() as patch:
      patch.setattr(*broken, full)
      with pytest.raises(OSError, match="No space left") as caught:
        metrics.write_atomically(path, b"new")
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text(encoding="utf-8") == "größer"
