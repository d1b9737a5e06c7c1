"""A step compiled for devices, and what would make it fit. TPUs only where libtpu is installed."""

import dataclasses
import importlib.util
import json

import jax
import pytest

from clip_jax import chips, cli, preflight, program
from clip_jax import config as c

SMALL = c.Config(
  name="small",
  steps=1000,
  model=c.Model(
    image=c.Vision(resolution=32, patch=8, width=64, layers=2, heads=2),
    text=c.Text(context_length=8, vocab_size=64, width=64, layers=2, heads=2),
    embed_dim=32,
    scan_layers=True,
  ),
  data=c.Data(batch_pairs=256),
  optimizer=c.Optimizer(warmup_steps=10),
)
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="compiles for TPUs: make install-tpu"
)
GIB = 2**30


def test_the_real_step_on_8_cpu_devices(monkeypatch):
  """With the peaks of a v5e: the roofline is arithmetic over what the program does."""
  v5e = chips.find("TPU v5 lite")
  monkeypatch.setattr(chips, "CHIPS", (dataclasses.replace(v5e, kind="cpu"),))
  found = preflight.report(SMALL, jax.devices())
  assert (found.devices, found.chips, found.batch_pairs) == (8, 8, 256)
  assert 1.0 < found.flops_ratio < 1.2  # elementwise work of a narrow model counts too
  assert found.compute_seconds == pytest.approx(found.compiled_flops / 197e12)
  assert found.hbm_seconds == pytest.approx(found.hbm_bytes / 819e9)
  assert found.network_seconds == sum(k.bytes for k in found.collectives) / 200e9
  times = (found.compute_seconds, found.hbm_seconds, found.network_seconds)
  assert found.step_seconds == max(times)
  assert found.run_chip_hours == pytest.approx(1000 * found.step_seconds / 3600 * 8)
  assert found.pairs_per_second == pytest.approx(256 / found.step_seconds)
  kinds = {k.kind for k in found.collectives}
  assert {"all-gather", "all-reduce"} <= kinds
  remat = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, remat="full"))
  assert preflight.report(remat, jax.devices()).flops_ratio > found.flops_ratio + 0.15


def test_what_does_not_fit_is_told(monkeypatch):
  v5e = chips.find("TPU v5 lite")
  small = dataclasses.replace(v5e, kind="cpu", hbm_bytes=2**20)
  monkeypatch.setattr(chips, "CHIPS", (small,))
  with pytest.raises(preflight.DoesNotFit, match=r"needs 0\.\d\d GiB of 0\.00 GiB a device"):
    preflight.report(SMALL, jax.devices())


def _machine(fixed, per_pair, parts=8, capacity=10 * GIB):
  """A compiler in whose programs memory is affine in the batch; remembers what it was asked."""
  asked = []

  def measure(config):
    asked.append(config)
    save = {"none": 1, "dots": 0.8, "tuned": 0.5, "full": 0.3}[config.model.remat]
    weights = fixed / config.mesh.fsdp
    used = weights + save * per_pair * config.data.batch_pairs / parts / config.microbatches
    if used > capacity:
      raise preflight.DoesNotFit(used, capacity)
    zeros = {f.name: 0 for f in dataclasses.fields(preflight.Report)}
    return preflight.Report(**{**zeros, "peak_bytes": int(used), "capacity_bytes": capacity})

  return measure, asked


def _search(config, measure, parts=8):
  with pytest.raises(preflight.DoesNotFit) as caught:
    measure(config)
  found = list(preflight.remedies(config, parts, caught.value, measure))
  return [(words, isinstance(result, preflight.Report)) for words, _, result in found]


def test_remedies_stop_at_the_first_that_fits_and_find_the_largest_batch():
  measure, asked = _machine(fixed=1 * GIB, per_pair=GIB // 2)
  found = _search(SMALL, measure)
  assert found[0] == ("--config.model.remat=tuned", True)
  # 9 GiB over half a GiB a pair, on 8 devices: 144 pairs, 2 % of the room kept free
  assert found[1:] == [("--config.data.batch_pairs=136", True)]
  assert len(asked) <= 6


def test_remedies_go_on_to_weights_and_microbatches():
  measure, _ = _machine(fixed=4 * GIB, per_pair=4 * GIB, parts=16)
  found = _search(SMALL, measure, parts=16)
  assert [words for words, _ in found[:4]] == [
    "--config.model.remat=tuned",
    "--config.model.remat=full",
    "--config.model.remat=full --config.mesh.fsdp=16",
    "--config.model.remat=full --config.mesh.fsdp=16 --config.microbatches=2",
  ]
  assert [fits for _, fits in found[:4]] == [False, False, False, True]
  assert found[-1][0].startswith("--config.data.batch_pairs=")
  assert found[-1][1]


def test_weights_that_are_too_large_for_any_batch():
  measure, _ = _machine(fixed=300 * GIB, per_pair=GIB // 2)
  found = _search(SMALL, measure)
  assert not any(fits for _, fits in found)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("v5e:3x5", r"--topology v5e:3x5: unknown. Known are .* v5e: 1x1 2x2 .*16x16; v5p: 2x2x1"),
    ("v9:4x4", "v9:4x4: unknown"),
    ("v5e", "v5e: unknown"),
    ("cuda", "--topology cuda: no such device here"),
  ],
)
def test_unknown_topologies_are_told_with_the_known_ones(name, message):
  with pytest.raises(preflight.PreflightError, match=message):
    preflight.devices_of(name)


def test_without_libtpu_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  with pytest.raises(preflight.PreflightError, match="make install-tpu"):
    preflight.devices_of("v5e:4x4")


def test_the_command_on_the_cpu(capsys):
  arguments = ["preflight", "--config", "experiments/demo.py", "--topology", "cpu"]
  assert cli.main([*arguments, "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert (found["fits"], found["devices"], found["batch_pairs"]) == (True, 8, 128)
  assert found["collectives"][0]["kind"] == "all-gather"
  assert cli.main([*arguments, "--config.data.batch_pairs=100"]) == 2
  assert "100 pairs cannot be split evenly over 8 devices; 96 can" in capsys.readouterr().err
  assert cli.main([*arguments, "--config.mesh.fsdp=3"]) == 2
  assert "config.mesh: data 2 x fsdp 3" in capsys.readouterr().err


@needs_libtpu
def test_a_tpu_slice_that_is_not_here():
  devices = preflight.devices_of("v5e:2x2")
  assert len(devices) == 4
  found = preflight.report(SMALL, devices)
  assert found.device_kind == "TPU v5 lite"
  assert found.capacity_bytes == 15.75 * GIB
  assert 0 < found.peak_bytes < GIB
  assert 0.9 < found.flops_ratio < 1.3


def test_people_read_what_matters():
  zeros = {f.name: 1 for f in dataclasses.fields(preflight.Report)}
  moved = (program.Collective("all-gather", 3, 2 * GIB),)
  found = preflight.Report(**{**zeros, "collectives": moved, "run_chip_hours": 1000.0})
  shown = dict(preflight.lines(found, price=1.2))
  assert shown["money"] == "at least $1,200 at $1.2 a chip-hour"
  assert shown["collectives, sent a device"] == "all-gather x3, 2.00 GiB"
  assert "money" not in dict(preflight.lines(found))
