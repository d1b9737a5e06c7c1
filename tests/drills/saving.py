"""A process that saves step after step, until it is killed: `python saving.py WORKDIR`."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax import checkpoint


def trees(step):
  """Parameters and the rest of a step, 8 MB, other numbers in every step."""
  rng = np.random.default_rng(step)
  kernel, moments = (jnp.asarray(rng.normal(size=(1000, 1000)), jnp.float32) for _ in range(2))
  params = {"kernel": kernel, "bias": jnp.full(7, step, jnp.bfloat16)}
  return params, {"step": jnp.int32(step), "moments": moments}


def abstract():
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trees(0)
  )


def _save_for_ever(workdir):
  checkpoints = checkpoint.Checkpoints(workdir)
  restored = checkpoints.restore_latest(*abstract())
  step = restored.step if restored else 0
  while True:
    step += 1
    made = trees(step)
    print("saving", step, flush=True)
    checkpoints.save(step, *made, {})
    checkpoints.wait()
    print("saved", step, flush=True)


if __name__ == "__main__":
  _save_for_ever(sys.argv[1])
