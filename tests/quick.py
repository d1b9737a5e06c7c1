"""Compiles what a test runs a few times on little data."""

import jax


def compiled(function, *args):
  """`function`, jitted for the shapes and shardings of `args`, in a third of the usual time.

  Without LLVM's optimisations and with XLA's older code generator, which take longer to compile for
  than they save here. The program before them, its sharding and its collectives are the usual ones.
  """
  wrapped = function if hasattr(function, "lower") else jax.jit(function)
  options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
  return wrapped.lower(*args).compile(options)
