"""Strict switches for all tests: 8 virtual CPU devices, no implicit rank promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # after the switches above

jax.config.update("jax_numpy_rank_promotion", "raise")
