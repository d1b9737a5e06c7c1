"""What accelerators can do: one table, with its sources."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One JAX device. A v2, v3 or Ironwood device is one core, half a chip; all others are chips."""

  kind: str  # `device_kind`
  flops: float  # dense bfloat16 FLOP/s (V100: float16), without sparsity
  hbm_bytes: float
  hbm_bytes_per_second: float
  link_bytes_per_second: float  # out of the device to all its neighbours together, one way
  cores: int = 1  # JAX devices that make one chip, as it is rented


# Sources: the specification pages of cloud.google.com/tpu/docs (v3, v4, v5e, v5p, v6e, tpu7x) for
# FLOP/s, HBM and interconnect; NVIDIA's data sheets (V100, A100, H100, H200, all SXM) with NVLink,
# half of its bidirectional rate. A v5e reserves part of its 16 GB: XLA gives 15.75 GiB to programs.
_GIB = 2**30
CHIPS = (
  Chip("TPU v2", 23e12, 8 * _GIB, 350e9, 62e9, 2),
  Chip("TPU v3", 61.5e12, 16 * _GIB, 450e9, 82e9, 2),
  Chip("TPU v4", 275e12, 32 * _GIB, 1228e9, 300e9),
  Chip("TPU v5 lite", 197e12, 15.75 * _GIB, 819e9, 200e9),
  Chip("TPU v5", 459e12, 95 * _GIB, 2765e9, 600e9),
  Chip("TPU v5p", 459e12, 95 * _GIB, 2765e9, 600e9),
  Chip("TPU v6 lite", 918e12, 31.25 * _GIB, 1640e9, 448e9),
  Chip("TPU7x", 1153.5e12, 96 * _GIB, 3690e9, 600e9, 2),
  Chip("Tesla V100-SXM2-16GB", 125e12, 16e9, 900e9, 150e9),
  Chip("NVIDIA A100-SXM4-40GB", 312e12, 40e9, 1555e9, 300e9),
  Chip("NVIDIA A100-SXM4-80GB", 312e12, 80e9, 2039e9, 300e9),
  Chip("NVIDIA H100 80GB HBM3", 989e12, 80e9, 3350e9, 450e9),
  Chip("NVIDIA H200", 989e12, 141e9, 4800e9, 450e9),
)


def find(device_kind: str) -> Chip | None:
  """The chip of a JAX device, or None where the table does not know it."""
  return next((chip for chip in CHIPS if chip.kind == device_kind), None)
