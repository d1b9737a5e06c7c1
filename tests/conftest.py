"""Strict switches for all tests: 8 virtual CPU devices, no implicit rank promotion."""

import importlib.util
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax  # after the switches above

jax.config.update("jax_numpy_rank_promotion", "raise")

# The full comparison is `make test-interop`, which installs what it needs.
collect_ignore = [] if importlib.util.find_spec("transformers") else ["interop"]
