"""The very step that training would run, compiled for machines that are not here: does it fit, and
how fast can it be?

`libtpu` compiles for any TPU topology on any machine; for GPUs the devices must be present.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax import chips, program, sharding, train_step
from clip_jax import config as config_lib
from clip_jax.models import clip

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = (
  "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
)  # fmt: skip
# What libtpu compiles for. Source: cloud.google.com/tpu/docs, the page of each generation.
TOPOLOGIES = {
  "v3": ("2x2", "4x4", "8x8", "16x16", "32x32"),
  "v4": _DEEP,
  "v5e": _FLAT,
  "v5p": _DEEP,
  "v6e": _FLAT,
  "tpu7x": _DEEP[:-1],
}


class PreflightError(ValueError):
  """A topology or a program that cannot be compiled, and what to do."""


class DoesNotFit(PreflightError):
  """The program needs more memory than a device has."""

  def __init__(self, used_bytes: float, capacity_bytes: float):
    super().__init__(f"needs {_gib(used_bytes)} of {_gib(capacity_bytes)} a device")
    self.used_bytes, self.capacity_bytes = used_bytes, capacity_bytes


@dataclasses.dataclass(frozen=True)
class Report:
  """One step on one device, unless a name says otherwise. FLOPs, bytes, seconds."""

  device_kind: str
  devices: int
  chips: int
  batch_pairs: int
  compile_seconds: float
  argument_bytes: int  # state and batch
  temporary_bytes: int
  peak_bytes: int
  capacity_bytes: float
  analytic_flops: float  # matrix products of forward and backward, without recomputation
  compiled_flops: float
  flops_ratio: float  # compiled over analytic: what recomputation and all else cost
  hbm_bytes: int
  collectives: tuple[program.Collective, ...]
  compute_seconds: float
  hbm_seconds: float
  network_seconds: float
  step_seconds: float  # the largest of the three: no step can be faster
  pairs_per_second: float
  mfu: float  # analytic FLOPs in that time over the peak
  run_hours: float
  run_chip_hours: float


def devices_of(topology: str, slices: int = 1) -> Sequence[Any]:
  """The devices of `v5e:16x16` and the like; `cuda` and `cpu`: those that are present.

  Raises: PreflightError naming what is known, or what to install.
  """
  if topology in ("cuda", "cpu"):
    try:
      return jax.devices("gpu" if topology == "cuda" else "cpu")
    except RuntimeError as error:
      raise PreflightError(f"--topology {topology}: no such device here ({error})") from error
  generation, _, shape = topology.partition(":")
  if shape not in TOPOLOGIES.get(generation, ()):
    known = "; ".join(f"{name}: {' '.join(shapes)}" for name, shapes in TOPOLOGIES.items())
    raise PreflightError(
      f"--topology {topology}: unknown. Known are cuda, and as v5e:16x16 {known}"
    )
  if importlib.util.find_spec("libtpu") is None:
    raise PreflightError("libtpu is not installed, which compiles for TPUs: make install-tpu")
  from jax.experimental import topologies

  options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
  if generation == "v4":
    options["chip_config_name"] = "megacore"  # one device a chip, as on the machines
  if shape == "1x1":
    options["chips_per_host_bounds"] = [1, 1, 1]
  jax.config.update("jax_platforms", "cpu")  # no chip is needed, nor to be taken from a run
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  with _quiet():
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
  return described.devices


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """libtpu looks for the machine that it is not on, and says so on the process's standard error."""
  kept = os.dup(2)
  with open(os.devnull, "wb") as nowhere:
    os.dup2(nowhere.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)


def report(config: config_lib.Config, devices: Sequence[Any]) -> Report:
  """Compiles the training step of `config` and reads what it will do.

  Raises: DoesNotFit; ShardingError when mesh or batch do not divide.
  """
  mesh = sharding.make_mesh(config.mesh, devices)
  sharding.check_batch(config.data.batch_pairs, mesh, config.microbatches)
  started = time.perf_counter()
  step_program = compiled(_lowered(config, mesh))
  seconds = time.perf_counter() - started
  memory = step_program.memory_analysis()
  lasting = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  # The heap's highest point. (`temp_size_in_bytes` is half as much again on a TPU, and the compiler
  # accepts programs in which that alone is more than the chip has.)
  peak = memory.peak_memory_in_bytes or lasting + memory.temp_size_in_bytes
  kind = devices[0].device_kind
  # a CPU, and a GPU that is not in the table: no roofline, nothing that overflows
  chip = chips.find(kind) or chips.Chip(kind, *(float("inf"),) * 4)
  if peak > chip.hbm_bytes:
    raise DoesNotFit(peak, chip.hbm_bytes)
  done = program.work(step_program.as_text())
  flops = (step_program.cost_analysis() or {}).get("flops", 0.0) * done.loops
  pairs = config.data.batch_pairs
  a_pair = clip.training_flops_per_pair(config.model, config.optimizer.lock_image)
  analytic = pairs * a_pair / len(devices)
  network = sum(c.bytes for c in done.collectives)
  times = (
    flops / chip.flops,
    done.hbm_bytes / chip.hbm_bytes_per_second,
    network / chip.link_bytes_per_second,
  )
  step = max(times)
  hours, count = config.steps * step / 3600, len(devices) // chip.cores
  return Report(
    device_kind=kind,
    devices=len(devices),
    chips=count,
    batch_pairs=pairs,
    compile_seconds=round(seconds, 1),
    argument_bytes=memory.argument_size_in_bytes,
    temporary_bytes=peak - lasting,
    peak_bytes=peak,
    capacity_bytes=chip.hbm_bytes,
    analytic_flops=analytic,
    compiled_flops=flops,
    flops_ratio=flops / analytic,
    hbm_bytes=done.hbm_bytes,
    collectives=done.collectives,
    compute_seconds=times[0],
    hbm_seconds=times[1],
    network_seconds=times[2],
    step_seconds=step,
    pairs_per_second=pairs / step if step else float("inf"),
    mfu=analytic / chip.flops / step if step else 0.0,
    run_hours=hours,
    run_chip_hours=hours * count,
  )


def _lowered(config: config_lib.Config, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
  rows, model, pairs = sharding.batch_sharding(mesh), config.model, config.data.batch_pairs

  def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((pairs, *shape), dtype, sharding=rows)

  side = model.image.resolution
  batch = {
    "image": array(jnp.uint8, side, side, 3),
    "tokens": array(jnp.int32, model.text.context_length),
    "bad": array(jnp.int32),
    "stop": array(jnp.int32),
  }
  return train_step.make_train_step(config, mesh).lower(
    train_step.abstract_state(config, mesh), batch
  )


def compiled(lowered: jax.stages.Lowered) -> Any:
  """The program. Raises: DoesNotFit; PreflightError with the compiler's own words."""
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    used = re.search(
      r"(?:Used |temporaries \()([\d.]+)([KMGT]?)\)?(?: of | exceeds available HBM \()"
      r"([\d.]+)([KMGT]?)",
      str(error),
    )
    if used is None:
      raise PreflightError(f"the compiler refuses the program: {str(error)[:500]}") from error
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    number = [float(used[i]) * units[used[i + 1]] for i in (1, 3)]
    raise DoesNotFit(*number) from error


def remedies(
  config: config_lib.Config,
  parts: int,
  too_large: DoesNotFit,
  measure: Callable[[config_lib.Config], Report],
) -> Iterator[tuple[str, config_lib.Config, Report | DoesNotFit]]:
  """What would make a program fit: (the command-line options, the config, its report), in turn.

  First less memory for the same batch, each way until one fits: recomputation, weights over the
  devices, microbatches; then the largest batch of this config that fits.
  Args: parts, devices that split the batch; measure, compiles a config, raises DoesNotFit.
  """
  for options, changed in _variants(config, parts):
    try:
      found: Report | DoesNotFit = measure(changed)
    except DoesNotFit as error:
      found = error
    yield options, changed, found
    if isinstance(found, Report):
      break
  yield from _largest_batch(config, parts, too_large, measure)


def _variants(config: config_lib.Config, parts: int) -> Iterator[tuple[str, config_lib.Config]]:
  """Cheapest first; each keeps what the one before it changed."""
  words: list[str] = []
  order = ("none", "dots", "tuned", "full")
  for remat in ("tuned", "full"):
    if order.index(config.model.remat) < order.index(remat):
      config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
      yield f"--config.model.remat={remat}", config
  words += [f"--config.model.remat={config.model.remat}"] if config.model.remat != "none" else []
  if config.loss.exchange == "gather" and config.data.batch_pairs >= 2**17:
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, exchange="ring"))
    words.append("--config.loss.exchange=ring")
    yield " ".join(words), config
  if config.mesh.fsdp == 1 and parts % 16 == 0:
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=16))
    words.append("--config.mesh.fsdp=16")
    yield " ".join(words), config
  if config.model.image.blocks:  # batch normalisation does not take microbatches
    return
  microbatches = config.microbatches * 2
  while config.data.batch_pairs % (microbatches * parts) == 0 and microbatches <= 256:
    changed = dataclasses.replace(config, microbatches=microbatches)
    yield " ".join([*words, f"--config.microbatches={microbatches}"]), changed
    microbatches *= 2


def _largest_batch(
  config: config_lib.Config,
  parts: int,
  too_large: DoesNotFit,
  measure: Callable[[config_lib.Config], Report],
) -> Iterator[tuple[str, config_lib.Config, Report | DoesNotFit]]:
  """Memory is nearly affine in the batch: a line through two batches, then down until one fits."""
  unit = parts * config.microbatches

  def of(pairs: int) -> config_lib.Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, batch_pairs=pairs))

  pairs, used = config.data.batch_pairs, too_large.used_bytes
  following = pairs // 2 // unit * unit
  while following >= unit:
    try:
      found: Report | DoesNotFit = measure(of(following))
    except DoesNotFit as error:
      found = error
    now = found.peak_bytes if isinstance(found, Report) else found.used_bytes
    slope = max((used - now) / (pairs - following), 1.0)
    best = int(following + 0.98 * (found.capacity_bytes - now) / slope) // unit * unit
    if isinstance(found, Report) and best <= following * 1.03:
      yield f"--config.data.batch_pairs={following}", of(following), found
      return
    if isinstance(found, Report):
      kept, kept_pairs = found, following
      try:
        found, following = measure(of(best)), best
      except DoesNotFit:
        found, following = kept, kept_pairs
      yield f"--config.data.batch_pairs={following}", of(following), found
      return
    pairs, used, following = following, now, min(best, following // 2) // unit * unit


def lines(found: Report, price: float = 0.0) -> list[tuple[str, str]]:
  """(what, figure) of a report, for people. price: dollars a chip-hour; 0: not given."""
  moved = [f"{c.kind} x{c.count}, {_gib(c.bytes)}" for c in found.collectives] or ["none"]
  out = [
    ("chips", f"{found.chips} ({found.devices} devices), {found.device_kind}"),
    ("batch", f"{found.batch_pairs:,} pairs, {found.batch_pairs / found.devices:g} a device"),
    ("memory a device", f"{_gib(found.peak_bytes)} of {_gib(found.capacity_bytes)}"),
    ("  state and batch", _gib(found.argument_bytes)),
    ("  temporaries", _gib(found.temporary_bytes)),
    ("FLOPs a device, analytic", f"{found.analytic_flops:.3e}"),
    ("FLOPs a device, compiled", f"{found.compiled_flops:.3e}, ratio {found.flops_ratio:.2f}"),
    ("memory traffic", _gib(found.hbm_bytes)),
    ("collectives, sent a device", "; ".join(moved)),
    ("compiled in", f"{found.compile_seconds:.0f} s"),
  ]
  if np.isinf(found.capacity_bytes):
    return out
  run = f"{found.run_hours:,.1f} h, {found.run_chip_hours:,.0f} chip-hours"
  parts = (found.compute_seconds, found.hbm_seconds, found.network_seconds)
  step = "at least {:.3f} s (compute {:.3f}, memory {:.3f}, network {:.3f})"
  out += [
    ("step, by the roofline", step.format(found.step_seconds, *parts)),
    ("pairs a second", f"at most {found.pairs_per_second:,.0f} (MFU {found.mfu:.0%})"),
    ("the run", f"at least {run}"),
  ]
  if price:
    out.append(
      ("money", f"at least ${found.run_chip_hours * price:,.0f} at ${price:g} a chip-hour")
    )
  return out


def _gib(size: float) -> str:
  return f"{size / 2**30:.2f} GiB"
