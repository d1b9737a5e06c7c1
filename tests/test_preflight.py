"""A step compiled for devices, and what would make it fit. TPUs only where libtpu is installed."""

import dataclasses
import functools
import importlib.util
import json
import math
import types

import jax
import pytest

from clip_jax import (
  chips,
  cli,
  collectives,
  preflight,
  preflight_text,
  remedies,
  sharding,
  train_step,
)
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


LOWERED = preflight._lowered


@functools.cache
def _step(config):
  return LOWERED(config, sharding.make_mesh(config.mesh)).compile()


@pytest.fixture
def steps_compiled_once(monkeypatch):
  """On the CPU's devices."""
  lowered = lambda config, _: types.SimpleNamespace(compile=lambda _: _step(config))  # noqa: E731
  monkeypatch.setattr(preflight, "_lowered", lowered)


def test_the_real_step_on_8_cpu_devices(monkeypatch, steps_compiled_once):
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
  # of one process the weights stay as they lie; beside them the encoder's temporaries
  assert found.argument_bytes < found.evaluation_bytes < found.argument_bytes + 2**23
  remat = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, remat="full"))
  assert preflight.report(remat, jax.devices()).flops_ratio > found.flops_ratio + 0.15


def test_what_does_not_fit_is_told(monkeypatch, steps_compiled_once):
  v5e = chips.find("TPU v5 lite")
  small = dataclasses.replace(v5e, kind="cpu", hbm_bytes=2**20)
  monkeypatch.setattr(chips, "CHIPS", (small,))
  with pytest.raises(preflight.DoesNotFit, match=r"needs 0\.\d\d GiB of 0\.00 GiB a device"):
    preflight.report(SMALL, jax.devices())


def _machine(fixed, per_pair, parts=8, capacity=10 * GIB, divides=16):
  """A compiler in whose programs memory is affine in the batch; remembers what it was asked.

  The weights divide by `divides` and what divides that.
  """
  asked = []

  def measure(config):
    if divides % config.mesh.fsdp or (config.mesh.data and config.mesh.fsdp > 1):
      raise sharding.ShardingError("of weights or devices")
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
  found = list(remedies.search(config, parts, caught.value, measure))
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


@pytest.mark.parametrize(
  ("parts", "divides", "mesh", "fsdp"),
  [(8, 16, c.Mesh(), 8), (24, 4, c.Mesh(fsdp=2), 4), (16, 1, c.Mesh(), None)],
)
def test_weights_over_as_many_devices_as_divide_them(parts, divides, mesh, fsdp):
  measure, asked = _machine(fixed=40 * GIB, per_pair=4 * GIB, parts=parts, divides=divides)
  batch = c.Data(batch_pairs=96 * parts)
  found = _search(dataclasses.replace(SMALL, mesh=mesh, data=batch), measure, parts)
  offered = [words.split("fsdp=")[1].split()[0] for words, _ in found if "fsdp" in words]
  assert set(offered) == ({str(fsdp)} if fsdp else set())
  assert any("microbatches=2" in words for words, _ in found)
  assert {a.mesh.fsdp for a in asked} == {mesh.fsdp, fsdp or 1}


def test_a_mesh_that_names_its_data_axis_keeps_it():
  measure, _ = _machine(fixed=4 * GIB, per_pair=4 * GIB)
  found = _search(dataclasses.replace(SMALL, mesh=c.Mesh(data=8)), measure)
  assert not any("fsdp" in words for words, _ in found)
  assert any("microbatches" in words for words, _ in found)


def test_a_resnet_is_told_why_it_has_no_microbatches():
  vision = c.Vision(32, 32, width=16, layers=0, heads=8, blocks=(1, 1, 1, 1))
  resnet = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, image=vision))
  measure, _ = _machine(fixed=1 * GIB, per_pair=4 * GIB)
  with pytest.raises(preflight.DoesNotFit) as caught:
    measure(resnet)
  found = list(remedies.search(resnet, 8, caught.value, measure))
  told = [(words, result) for words, _, result in found if "microbatches" in words]
  assert told == [("microbatches", "batch normalisation is over the whole batch")]
  locked = dataclasses.replace(resnet, optimizer=c.Optimizer(lock_image=True))
  assert any("microbatches=2" in words for words, _ in _search(locked, measure))


def test_weights_that_are_too_large_for_any_batch():
  measure, _ = _machine(fixed=300 * GIB, per_pair=GIB // 2)
  found = _search(SMALL, measure)
  assert not any(fits for _, fits in found)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    pytest.param(
      "v5e:3x5",
      r"--topology v5e:3x5: libtpu has none such .* Known are .* v5e: 1x1 2x2 .*16x16; v5p: 2x2x1",
      marks=needs_libtpu,
    ),
    pytest.param("v5e:x", "v5e:x: libtpu has none such", marks=needs_libtpu),
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
  install = r"make install-tpu \(or, in the checkout, pip install -e '.\[tpu\]'\)"
  with pytest.raises(preflight.PreflightError, match=install):
    preflight.devices_of("v5e:4x4")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (("--slices", "0"), "--slices 0: must be at least 1"),
    (("--slices", "-1"), "--slices -1: must be at least 1"),
    (("--slices", "3"), "--slices 3: only TPUs come in slices, not --topology cpu"),
    (("--price", "-2"), "--price -2.0: dollars a chip-hour, 0 or more"),
    (("--price", "nan"), "--price nan: dollars a chip-hour, 0 or more"),
    (("--price", "inf"), "--price inf: dollars a chip-hour, 0 or more"),
  ],
)
def test_options_that_make_no_sense(capsys, options, message):
  arguments = ["preflight", "--config", "experiments/demo.py", "--topology", "cpu"]
  assert cli.main([*arguments, *options]) == 2
  assert capsys.readouterr().err == f"error: {message}\n"


def test_the_command_on_the_cpu(capsys):
  arguments = ["preflight", "--config", "experiments/demo.py", "--topology", "cpu"]
  assert cli.main([*arguments, "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert (found["fits"], found["devices"], found["batch_pairs"]) == (True, 8, 128)
  assert (found["experiment"], found["topology"], found["slices"]) == ("demo", "cpu", 1)
  assert found["options"] == []
  assert found["versions"]["jax"] == jax.__version__
  assert found["collectives"][0]["kind"] == "all-gather"
  assert found["step_seconds"] is found["capacity_bytes"] is None  # a CPU is not in the table
  assert cli.main([*arguments, "--config.data.batch_pairs=100"]) == 2
  assert "100 pairs cannot be split evenly over 8 devices; 96 can" in capsys.readouterr().err
  assert cli.main([*arguments, "--config.mesh.fsdp=3"]) == 2
  assert "config.mesh: data 2 x fsdp 3" in capsys.readouterr().err


def test_the_command_tells_what_does_not_fit_and_why(capsys, monkeypatch):
  def report(config, devices):
    assert len(devices) == 8
    raise preflight.DoesNotFit(30 * GIB, 16 * GIB)

  monkeypatch.setattr(preflight, "report", report)
  words = ["preflight", "--config", "experiments/fashion_mnist_resnet.py", "--topology", "cpu"]
  assert cli.main([*words, "--json"]) == 1
  found = json.loads(capsys.readouterr().out)
  assert (found["used_bytes"], found["capacity_bytes"]) == (30 * GIB, 16 * GIB)
  tried = {entry["options"]: entry for entry in found["tried"]}
  assert tried["--config.model.remat=full"]["used_bytes"] == 30 * GIB
  assert tried["microbatches"]["why"] == "batch normalisation is over the whole batch"
  assert not any(entry["fits"] for entry in found["tried"])
  assert cli.main(words) == 1
  assert "batch normalisation" in capsys.readouterr().out


@needs_libtpu
def test_a_tpu_slice_that_is_not_here():
  devices = preflight.devices_of("v5e:2x2")
  assert len(devices) == 4
  found = preflight.report(SMALL, devices)
  assert found.device_kind == "TPU v5 lite"
  assert found.capacity_bytes == 15.75 * GIB
  assert 0 < found.argument_bytes < found.evaluation_bytes < GIB
  assert found.argument_bytes < found.peak_bytes < GIB
  assert 0.9 < found.flops_ratio < 1.3


@needs_libtpu
def test_an_evaluation_on_several_hosts_leaves_the_weights_where_they_are():
  """v5e:4x4 are four hosts of four chips."""
  optimizer = c.Optimizer(warmup_steps=10, text_weights_dtype="bfloat16")
  config = dataclasses.replace(SMALL, mesh=c.Mesh(fsdp=16), optimizer=optimizer)
  mesh = sharding.make_mesh(config.mesh, preflight.devices_of("v5e:4x4"))
  weights = jax.tree.leaves(train_step.abstract_state(config, mesh).params)
  wide_text = sum(x.size * 4 for x in weights if x.dtype == "bfloat16") / 16
  images = 256 // 16 * 32 * 32 * 3 * 4  # of one chip, in float32
  beside = preflight._evaluation_bytes(config, mesh) - wide_text
  assert images < beside < 20 * images


@needs_libtpu
@pytest.mark.parametrize("generation", preflight.TOPOLOGIES)
def test_every_generation_is_in_the_table(generation):
  shape = preflight.TOPOLOGIES[generation][1]
  devices = preflight.devices_of(f"{generation}:{shape}")
  chip = chips.find(devices[0].device_kind)
  assert len(devices) // chip.cores == math.prod(map(int, shape.split("x")))


@needs_libtpu
def test_slices_that_are_not_listed_are_libtpus_to_know():
  assert "4x4x12" not in preflight.TOPOLOGIES["v5p"]
  assert len(preflight.devices_of("v5p:4x4x12")) == 4 * 4 * 12


def test_a_gpu_has_the_memory_that_jax_may_take():
  a100 = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 60 * GIB})
  assert preflight._limit(a100) == 60 * GIB
  assert preflight._limit(types.SimpleNamespace(platform="gpu", memory_stats=lambda: None)) is None
  assert preflight._limit(jax.devices()[0]) is None


def _report(**changed):
  ones = {f.name: 1 for f in dataclasses.fields(preflight.Report)}
  moved = (collectives.Collective("all-gather", 3, 2 * GIB),)
  known = {"device_kind": "TPU v5 lite", "collectives": moved, "run_chip_hours": 1000.0}
  return preflight.Report(**{**ones, **known, **changed})


def test_people_read_what_matters():
  shown = dict(preflight_text.lines(_report(step_seconds=2.0, compute_seconds=0.5), price=1.2))
  assert shown["money, estimated"] == "$1,200 at $1.2 a chip-hour"
  assert shown["collectives, sent a device"] == "all-gather x3, 2.00 GiB"
  assert shown["step, estimated"].startswith("2.000 s (the largest of compute 0.500, memory 1.000")
  assert shown["step, at the least"] == "0.500 s: its FLOPs at the chip's peak"
  assert not any("money" in name for name in dict(preflight_text.lines(_report())))


def test_people_read_whether_an_evaluation_fits():
  shown = dict(preflight_text.lines(_report(evaluation_bytes=GIB, capacity_bytes=2 * GIB)))
  assert shown["evaluation beside it"] == "fits: 1.00 GiB, estimated"
  shown = dict(preflight_text.lines(_report(evaluation_bytes=3 * GIB, capacity_bytes=2 * GIB)))
  assert shown["evaluation beside it"] == "does not fit: 3.00 GiB, estimated"


def test_people_read_that_a_device_is_not_in_the_table():
  unknown = {"device_kind": "NVIDIA T4", "capacity_bytes": 12.0 * GIB, "step_seconds": math.nan}
  shown = dict(preflight_text.lines(_report(**unknown)))
  assert shown["NVIDIA T4"] == "not in the table of chips: no roofline"
  assert not any("step" in name for name in shown)
  shown = dict(preflight_text.lines(_report(**{**unknown, "capacity_bytes": math.inf})))
  assert shown["NVIDIA T4"] == "not in the table of chips: no capacity, no roofline"


def test_the_network_between_slices_has_its_own_rate():
  within = collectives.Collective("all-gather", 1, 4 * 10**9)
  between = collectives.Collective(collectives.BETWEEN_SLICES, 1, 10**9)
  v5e, v4 = chips.find("TPU v5 lite"), chips.find("TPU v4")
  assert preflight._network_seconds((within,), v5e) == pytest.approx(4 / 200)
  assert preflight._network_seconds((within, between), v5e) == pytest.approx(1 / 3.125)
  assert preflight._network_seconds((within, between), v4) == pytest.approx(4 / 300)
  shown = dict(preflight_text.lines(_report(device_kind="TPU v4", collectives=(between,))))
  assert shown["network between slices"] == "not in the estimate: no rate is published"
  shown = dict(preflight_text.lines(_report(collectives=(between,))))
  assert "network between slices" not in shown
