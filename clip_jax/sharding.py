"""The mesh, the rules of what lies where on it, and global batches.

Every weight's axes have names (`_AXES`). Two short tables map names to mesh axes: `PARAMETERS` says
where weights rest, with their moments; `COMPUTE` how activations lie while the model runs. XLA
gathers and scatters between the two: that is all there is to fully sharded and tensor parallelism.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import config as config_lib

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the mesh axes that split a batch's rows

# Logical axis -> mesh axes. What is not named here is whole on every device.
PARAMETERS = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor"}
COMPUTE = {"batch": BATCH_AXES, "heads": "tensor", "mlp": "tensor"}

# The logical axes of each weight, by the end of its path. Stacked layers add one axis in front.
# Vectors rest whole: they are small. "mlp" is also what lies inside a bottleneck.
_AXES: dict[str, tuple[str | None, ...]] = {
  "qkv/kernel": ("embed", None, "heads", None),
  "qkv/bias": (None, "heads", None),
  "kv/kernel": ("embed", None, "heads", None),
  "kv/bias": (None, "heads", None),
  **{f"{name}/kernel": ("embed", "heads", None) for name in "qkv"},
  **{f"{name}/bias": ("heads", None) for name in "qkv"},
  "out/kernel": ("heads", None, "embed"),
  "c/kernel": ("heads", None, "embed"),
  "fc/kernel": ("embed", "mlp"),
  "fc/bias": ("mlp",),
  "proj/kernel": ("mlp", "embed"),
  "patch_embedding/kernel": (None, "embed"),
  "token_embedding/embedding": (None, "embed"),
  "project/kernel": (None, "embed"),
  "image_projection": ("embed", None),
  "text_projection": ("embed", None),
  "positional_embedding": (None, None),
  # bottlenecks: the 3x3 convolution and the one after it are split over "mlp"
  "conv_1/kernel": (None, None, "embed", None),
  "conv_2/kernel": (None, None, "embed", "mlp"),
  "conv_3/kernel": (None, None, "mlp", "embed"),
  "shortcut_conv/kernel": (None, None, None, "embed"),
  # the stems: small
  **{f"image/conv_{i}/kernel": (None,) * 4 for i in (1, 2, 3)},
  **{f"stem/conv_{i}/kernel": (None,) * 4 for i in range(8)},
  **dict.fromkeys(("bias", "scale", "mean", "variance", "class_embedding", "probe"), (None,)),
  "text_projection_bias": (None,),
}


class ShardingError(ValueError):
  """Devices, weights or batches that do not divide: which, and what would."""


def make_mesh(config: config_lib.Mesh | None = None, devices: Sequence[Any] | None = None) -> Mesh:
  """`devices` (None: all there are) as a mesh of the axes `AXES`, near neighbours innermost.

  Slices of a TPU that only a data-centre network joins split `data`.
  Raises: ShardingError when the axes do not multiply to the devices.
  """
  config = config or config_lib.Mesh()
  devices = jax.devices() if devices is None else list(devices)
  inner = config.fsdp * config.tensor
  data = config.data or max(1, len(devices) // inner)
  if data * inner != len(devices):
    raise ShardingError(
      f"config.mesh: data {config.data or data} x fsdp {config.fsdp} x tensor {config.tensor} is "
      f"{data * inner} devices, there are {len(devices)}"
    )
  slices: dict[int, list[Any]] = {}
  for device in devices:
    slices.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
  if data % len(slices):
    raise ShardingError(
      f"config.mesh: {len(slices)} slices do not divide data ({data}), the only axis that may "
      "reach from one slice to another; make fsdp x tensor smaller"
    )
  shape = (data // len(slices), config.fsdp, config.tensor)
  parts = [
    mesh_utils.create_device_mesh(shape, slices[index], allow_split_physical_axes=True)
    for index in sorted(slices)
  ]
  mesh = Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * len(AXES))
  _check_hosts(mesh)
  return mesh


def _check_hosts(mesh: Mesh) -> None:
  """Raises: ShardingError when two hosts would have to read the same rows of a batch."""
  for group in mesh.devices.reshape(-1, mesh.shape["tensor"]):
    hosts = {device.process_index for device in group}
    if len(hosts) > 1:
      raise ShardingError(
        f"config.mesh.tensor: {mesh.shape['tensor']} devices in a row belong to hosts "
        f"{sorted(hosts)}, which would have to read the same pairs; make it smaller"
      )


def one_device() -> Mesh:
  """A mesh of the first device of this host.

  One, because a TPU runs no program over some chips of a slice: libtpu refuses them on a v5e slice
  of several hosts.
  """
  return make_mesh(devices=jax.local_devices()[:1])


def check_batch(batch_pairs: int, mesh: Mesh, microbatches: int = 1) -> None:
  """Raises: ShardingError when the devices cannot share the batch's parts evenly."""
  rows = mesh.shape["data"] * mesh.shape["fsdp"] * microbatches
  if batch_pairs % rows:
    near = batch_pairs // rows * rows or rows
    parts = f" in {microbatches} microbatches" if microbatches > 1 else ""
    raise ShardingError(
      f"config.data.batch_pairs: {batch_pairs} pairs cannot be split evenly over "
      f"{rows // microbatches} devices{parts}; {near} can"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over the devices; every other axis whole."""
  return NamedSharding(mesh, P(BATCH_AXES))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
  """`x` laid out by `COMPUTE`, one name an axis; as it is where no mesh is in use."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  spec = P(*(COMPUTE.get(name) if name else None for name in names))
  return jax.lax.with_sharding_constraint(x, spec)


def global_batch(host_batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This host's rows [B / hosts, ...] of every array -> one global array [B, ...]."""
  rows = batch_sharding(mesh)
  return {k: jax.make_array_from_process_local_data(rows, v) for k, v in host_batch.items()}


def host_parts(mesh: Mesh) -> int:
  """In how many parts this host's devices split its rows of a batch."""
  first = mesh.devices.reshape(-1, mesh.shape["tensor"])[:, 0]
  return sum(device.process_index == jax.process_index() for device in first)


def host_rows(x: jax.Array) -> np.ndarray:
  """This host's rows of an array that lies by `batch_sharding`: the inverse of `global_batch`."""
  parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  return np.concatenate([parts[start] for start in sorted(parts)])


def place(tree: Any, mesh: Mesh) -> Any:
  """The shapes of `tree` with the sharding each leaf has on this mesh: what a restore asks for.

  A leaf is known by the end of its path, so moments lie as their weights do.
  Raises: ShardingError naming every weight with an axis that the mesh does not divide.
  """
  problems: list[str] = []

  def put(path: tuple[Any, ...], x: Any) -> jax.ShapeDtypeStruct:
    spec = _spec(path, x.shape)
    problems.extend(_indivisible(path, x.shape, spec, mesh))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  placed = jax.tree_util.tree_map_with_path(put, tree)
  if problems:
    shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if problems[3:] else "")
    raise ShardingError(shown)
  return placed


def _spec(path: tuple[Any, ...], shape: tuple[int, ...]) -> P:
  if not shape:
    return P()
  words = _words(path)
  found = next((_AXES[end] for n in (3, 2, 1) if (end := "/".join(words[-n:])) in _AXES), None)
  if found is None:
    raise ShardingError(f"{'/'.join(words)}: which axes has it? name them in sharding.py")
  layers = (None,) * (len(shape) - len(found))
  return P(*layers, *(PARAMETERS.get(name) if name else None for name in found))


def _indivisible(path: tuple[Any, ...], shape: tuple[int, ...], spec: P, mesh: Mesh) -> list[str]:
  return [
    f"{'/'.join(_words(path))}: config.mesh.{axis} = {mesh.shape[axis]} does not divide axis {i} "
    f"of {list(shape)}; use a divisor of {size}, and more of the axis data"
    for i, (size, axis) in enumerate(zip(shape, spec, strict=False))
    if axis and size % mesh.shape[axis]
  ]


def _words(path: tuple[Any, ...]) -> list[str]:
  return [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
