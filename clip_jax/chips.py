"""What accelerators can do: one table, with its sources; and those that JAX would not see.

Sources, as of 2026-11. TPUs: the pages of cloud.google.com/tpu/docs named beside each row. Their
"bidirectional ICI bandwidth per chip" counts both directions of all links; half of it leaves a
chip. Where a device is one core of two, it has half of its chip's figures. NVIDIA: the data sheets
named beside each row, figures without sparsity; of NVLink's and PCIe's rates, which count both
directions, half. Cards in a PCIe slot are given PCIe's rate, as an NVLink bridge joins only pairs.
"""

import dataclasses
import importlib.util
import os

from jax._src import hardware_utils  # JAX has no public way to see what it has no driver for


@dataclasses.dataclass(frozen=True)
class Chip:
  """One JAX device. A v2, v3 or Ironwood device is one core, half a chip; all others are chips."""

  kind: str  # `device_kind`
  flops: float  # dense bfloat16 FLOP/s (V100: float16), without sparsity
  hbm_bytes: float  # what programs get of a TPU's; a GPU's own limit is asked where it is present
  hbm_bytes_per_second: float
  link_bytes_per_second: float  # out of the device by all its links together, one way
  cores: int = 1  # JAX devices that make one chip, as it is rented
  # out of the device to other slices, over the data-centre network; 0: not published
  slices_bytes_per_second: float = 0.0


_GIB = 2**30
CHIPS = (
  # docs/v2, and for its links (4 of 496 Gbit/s) and 46 TFLOP/s Jouppi et al. 2020, "A
  # Domain-Specific Supercomputer for Training Deep Neural Networks"
  Chip("TPU v2", 23e12, 8 * _GIB, 350e9, 124e9, 2),
  # docs/v3, and the same paper (4 links of 656 Gbit/s); the page's 340 TB/s of all-reduce over
  # 1,024 chips agree
  Chip("TPU v3", 61.5e12, 16 * _GIB, 450e9, 164e9, 2),
  # docs/v4, and for its links (6 of 50 GB/s) Jouppi et al. 2023, "TPU v4", arXiv 2304.01433
  Chip("TPU v4", 275e12, 32 * _GIB, 1200e9, 300e9),
  # docs/v5e: 16 GB, of which XLA gives 15.75 GiB to programs; 6.4 Tbit/s between pods of 256
  Chip("TPU v5 lite", 197e12, 15.75 * _GIB, 819e9, 200e9, 1, 6.4e12 / 8 / 256),
  # docs/v5p; JAX has called it by both names
  Chip("TPU v5", 459e12, 95 * _GIB, 2765e9, 600e9, 1, 50e9 / 8),
  Chip("TPU v5p", 459e12, 95 * _GIB, 2765e9, 600e9, 1, 50e9 / 8),
  # docs/v6e: 32 GB, of which XLA gives 31.25 GiB to programs; 25.6 Tbit/s between pods of 256
  Chip("TPU v6 lite", 918e12, 31.25 * _GIB, 1638e9, 400e9, 1, 25.6e12 / 8 / 256),
  # docs/tpu7x
  Chip("TPU7x", 1153.5e12, 96 * _GIB, 3690e9, 300e9, 2, 100e9 / 8 / 2),
  # "NVIDIA V100 Tensor Core GPU" data sheet
  Chip("Tesla V100-SXM2-16GB", 125e12, 16e9, 900e9, 150e9),
  Chip("Tesla V100-SXM2-32GB", 125e12, 32e9, 900e9, 150e9),
  # "NVIDIA A100 Tensor Core GPU" data sheets, of 40 and of 80 GB
  Chip("NVIDIA A100-SXM4-40GB", 312e12, 40e9, 1555e9, 300e9),
  Chip("NVIDIA A100-PCIE-40GB", 312e12, 40e9, 1555e9, 32e9),
  Chip("NVIDIA A100-SXM4-80GB", 312e12, 80e9, 2039e9, 300e9),
  Chip("NVIDIA A100 80GB PCIe", 312e12, 80e9, 1935e9, 32e9),
  # "NVIDIA H100 Tensor Core GPU" data sheet
  Chip("NVIDIA H100 80GB HBM3", 989e12, 80e9, 3350e9, 450e9),
  Chip("NVIDIA H100 PCIe", 756e12, 80e9, 2000e9, 64e9),
  Chip("NVIDIA H100 NVL", 835e12, 94e9, 3900e9, 64e9),
  # "NVIDIA H200 Tensor Core GPU" data sheet
  Chip("NVIDIA H200", 989e12, 141e9, 4800e9, 450e9),
  # "NVIDIA L4 Tensor Core GPU" data sheet
  Chip("NVIDIA L4", 121e12, 24e9, 300e9, 32e9),
  # "NVIDIA DGX B200" data sheet, an eighth of its 72 PFLOP/s of FP8 halved, 1,440 GB and 64 TB/s
  Chip("NVIDIA B200", 2250e12, 180e9, 8000e9, 900e9),
)


def find(device_kind: str) -> Chip | None:
  """The chip of a JAX device, or None where the table does not know it."""
  return next((chip for chip in CHIPS if chip.kind == device_kind), None)


def undriven() -> int:
  """How many TPU chips of this machine JAX would pass over without a word, for want of libtpu."""
  if os.environ.get("JAX_PLATFORMS") == "cpu" or os.environ.get("TPU_LIBRARY_PATH"):
    return 0
  if importlib.util.find_spec("libtpu") is not None:
    return 0
  return hardware_utils.num_available_tpu_chips_and_device_id()[0]
