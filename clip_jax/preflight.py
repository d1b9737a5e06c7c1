"""The very step that training would run, compiled for machines that are not here: does it fit, and
how long does it take?

`libtpu` compiles for any TPU topology on any machine; for GPUs the devices must be present.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from clip_jax import chips, collectives, inference, program, sharding, train_step
from clip_jax import config as config_lib
from clip_jax.models import clip

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = (
  "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
)  # fmt: skip
# The slices that can be had. Source: cloud.google.com/tpu/docs, the page of each generation; of v4
# and v5p also others whose sides are multiples of 4. libtpu compiles for more.
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
    super().__init__(f"needs {gib(used_bytes)} of {gib(capacity_bytes)} a device")
    self.used_bytes, self.capacity_bytes = used_bytes, capacity_bytes


@dataclasses.dataclass(frozen=True)
class Report:
  """One step on one device, unless a name says otherwise. FLOPs, bytes, seconds.

  FLOPs and memory are the compiler's own. What moves, and so the times of memory and network, is
  estimated from the program's text. No step takes less than `compute_seconds` (but for the share of
  elementwise FLOPs in it, a few in a hundred, which have units of their own). `step_seconds`, and
  all that follows from it, is an estimate and no bound: bytes may be fewer, waiting is not in it.
  Of a device that is not in the table of chips the times are nan.
  """

  device_kind: str
  devices: int
  chips: int
  batch_pairs: int
  compile_seconds: float
  argument_bytes: int  # state and batch
  temporary_bytes: int
  peak_bytes: int
  capacity_bytes: float
  evaluation_bytes: int  # an estimate: see `_evaluation_bytes`
  analytic_flops: float  # matrix products of forward and backward, without recomputation
  compiled_flops: float
  flops_ratio: float  # compiled over analytic: what recomputation and all else cost
  hbm_bytes: int
  collectives: tuple[collectives.Collective, ...]
  compute_seconds: float  # the FLOPs at the chip's peak
  hbm_seconds: float
  network_seconds: float  # the slower of the chips' own links and the network between slices
  step_seconds: float  # the largest of the three
  pairs_per_second: float
  mfu: float  # analytic FLOPs in that time over the peak
  run_hours: float
  run_chip_hours: float


def devices_of(topology: str, slices: int = 1) -> Sequence[Any]:
  """The devices of `v5e:16x16` and the like; `cuda` and `cpu`: those that are present.

  Raises: PreflightError naming what is known, or what to install.
  """
  if slices < 1:
    raise PreflightError(f"--slices {slices}: must be at least 1")
  if slices > 1 and topology in ("cuda", "cpu"):
    raise PreflightError(f"--slices {slices}: only TPUs come in slices, not --topology {topology}")
  if topology in ("cuda", "cpu"):
    try:
      return jax.devices("gpu" if topology == "cuda" else "cpu")
    except RuntimeError as error:
      raise PreflightError(f"--topology {topology}: no such device here ({error})") from error
  generation, _, shape = topology.partition(":")
  if generation not in TOPOLOGIES or not shape:
    raise PreflightError(f"--topology {topology}: unknown. Known are {_known()}")
  if importlib.util.find_spec("libtpu") is None:
    raise PreflightError(
      "libtpu is not installed, which compiles for TPUs: make install-tpu (or, in the checkout, "
      "pip install -e '.[tpu]')"
    )
  from jax.experimental import topologies

  options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
  if generation == "v4":
    options["chip_config_name"] = "megacore"  # one device a chip, as on the machines
  if shape == "1x1":
    options["chips_per_host_bounds"] = [1, 1, 1]
  jax.config.update("jax_platforms", "cpu")  # no chip is needed, nor to be taken from a run
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    with _quiet():
      described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    why = " ".join(str(error).split())[:200]
    raise PreflightError(
      f"--topology {topology}: libtpu has none such ({why}). Known are {_known()}"
    ) from error
  return described.devices


def _known() -> str:
  shapes = "; ".join(f"{name}: {' '.join(shapes)}" for name, shapes in TOPOLOGIES.items())
  return f"cuda, and as v5e:16x16 {shapes}"


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

  Raises: DoesNotFit; ShardingError when mesh, weights or batch do not divide; HloError.
  """
  mesh = sharding.make_mesh(config.mesh, devices)
  sharding.check_batch(config.data.batch_pairs, mesh, config.microbatches)
  started = time.perf_counter()
  step_program = compiled(_lowered(config, mesh))
  seconds = time.perf_counter() - started
  memory = step_program.memory_analysis()
  lasting, peak = _lasting(memory), _peak(memory)
  kind = devices[0].device_kind
  chip = chips.find(kind) or chips.Chip(kind, math.nan, math.inf, math.nan, math.nan)
  capacity = _limit(devices[0]) or chip.hbm_bytes
  if peak > capacity:
    raise DoesNotFit(peak, capacity)
  done = program.work(step_program.as_text())
  flops = (step_program.cost_analysis() or {}).get("flops", 0.0) * done.loops
  pairs = config.data.batch_pairs
  a_pair = clip.training_flops_per_pair(config.model, config.optimizer.lock_image)
  analytic = pairs * a_pair / len(devices)
  hbm_seconds = done.hbm_bytes / chip.hbm_bytes_per_second
  times = (flops / chip.flops, hbm_seconds, _network_seconds(done.collectives, chip))
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
    capacity_bytes=capacity,
    evaluation_bytes=memory.argument_size_in_bytes + _evaluation_bytes(config, mesh),
    analytic_flops=analytic,
    compiled_flops=flops,
    flops_ratio=flops / analytic,
    hbm_bytes=done.hbm_bytes,
    collectives=done.collectives,
    compute_seconds=times[0],
    hbm_seconds=times[1],
    network_seconds=times[2],
    step_seconds=step,
    pairs_per_second=pairs / step,
    mfu=analytic / chip.flops / step,
    run_hours=hours,
    run_chip_hours=hours * count,
  )


def _lasting(memory: Any) -> int:
  """Bytes of what a program takes and gives, each once."""
  given = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return int(memory.argument_size_in_bytes + given)


def _peak(memory: Any) -> int:
  """The heap's highest point.

  (`temp_size_in_bytes` is half as much again on a TPU, and the compiler accepts programs in which
  that alone is more than the chip has.)
  """
  return int(memory.peak_memory_in_bytes) or _lasting(memory) + memory.temp_size_in_bytes


def _limit(device: Any) -> int | None:
  """What JAX would allocate on a GPU that is here; None for other devices."""
  stats = device.memory_stats() if device.platform == "gpu" else None
  return stats.get("bytes_limit") if stats else None


def _network_seconds(moved: Sequence[collectives.Collective], chip: chips.Chip) -> float:
  """Between slices at the chip's rate there, where it is published; the rest at its links'."""
  between = sum(c.bytes for c in moved if c.kind == collectives.BETWEEN_SLICES)
  within = sum(c.bytes for c in moved) - between
  rate = chip.slices_bytes_per_second or math.inf
  return max(within / chip.link_bytes_per_second, between / rate)


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


def compiled(lowered: jax.stages.Lowered, options: dict[str, Any] | None = None) -> Any:
  """The program. Args: options of the compiler.

  Raises: DoesNotFit; PreflightError with the compiler's own words.
  """
  try:
    return lowered.compile(options)
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


def _evaluation_bytes(config: config_lib.Config, mesh: jax.sharding.Mesh) -> int:
  """What an evaluation needs on a device beside the training state: its image encoder.

  The weights stay as they lie; those that rest in bfloat16 are there in float32 once more. Compiled
  in haste, which takes a fifth of the time. On one chip the peaks of ViT-B/32, ViT-L/14@336px and
  RN50x16 are then 14, 4 and 0 % under those of the program that an evaluation runs.
  """
  devices, state = list(mesh.devices.flat), train_step.abstract_state(config, mesh)
  weights = {"params": state.params, "batch_stats": state.batch_stats}
  hosts = len({device.process_index for device in devices})
  parts = -(-mesh.shape["data"] * mesh.shape["fsdp"] // hosts)
  rows = inference.chunk_rows(-(-config.evaluation.batch // hosts), parts) * hosts
  dtype: Any = clip.compute_dtype(config.model, devices[0].platform).name
  model = dataclasses.replace(config.model, compute_dtype=dtype, remat="none")
  side = model.image.resolution
  image = jax.ShapeDtypeStruct(
    (rows, side, side, 3), jnp.uint8, sharding=sharding.batch_sharding(mesh)
  )
  wide = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), weights
  )
  encoder = inference.image_encoder.lower(config_lib.Config(model=model), mesh, wide, image)
  widened = sum(
    4 * math.prod(x.sharding.shard_shape(x.shape))
    for x in jax.tree.leaves(weights)
    if x.dtype != jnp.float32
  )
  try:
    memory = compiled(encoder, {"exec_time_optimization_effort": -1.0}).memory_analysis()
  except DoesNotFit as error:
    return widened + int(error.used_bytes)
  return widened + _peak(memory) - int(memory.argument_size_in_bytes)


def gib(size: float) -> str:
  """For people."""
  return f"{size / 2**30:.2f} GiB"
