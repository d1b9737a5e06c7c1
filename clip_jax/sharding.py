"""The mesh, and how batches and weights lie on it."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data",)  # the mesh axes that split a batch's rows


def make_mesh(devices: int = 0) -> Mesh:
  """A mesh over the first `devices` devices (0: all), all of them data parallel."""
  chosen = jax.devices()[: devices or None]
  return jax.make_mesh((len(chosen),), BATCH_AXES, axis_types=(AxisType.Auto,), devices=chosen)


def check_batch(batch_pairs: int, mesh: Mesh) -> None:
  """Raises: ValueError when the devices or the hosts cannot share the batch evenly."""
  if batch_pairs % mesh.size:
    near = batch_pairs // mesh.size * mesh.size or mesh.size
    raise ValueError(
      f"config.data.batch_pairs: {batch_pairs} pairs cannot be split evenly over {mesh.size} "
      f"devices; {near} can"
    )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over the devices; every other axis whole."""
  return NamedSharding(mesh, P(BATCH_AXES))


def global_batch(host_batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This host's rows [B / hosts, ...] of every array -> one global array [B, ...]."""
  rows = batch_sharding(mesh)
  return {k: jax.make_array_from_process_local_data(rows, v) for k, v in host_batch.items()}


def place(tree: Any, mesh: Mesh) -> Any:
  """The shapes of `tree` with the sharding each leaf has on this mesh: what a restore asks for."""
  whole = replicated(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)
