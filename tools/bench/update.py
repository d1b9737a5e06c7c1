"""What half precision costs and saves in the optimizer's update, compiled for a TPU chip.

  python tools/bench/update.py [--config experiments/clip_vit_b32.py] [--topology v5e:1x1]

The update alone, without the loss, for each choice of `moments_dtype` and `text_weights_dtype`:
bytes of parameters, moments and gradients, bytes beside them, bytes read and written, operations a
parameter. The compiler's figures; nothing runs.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from clip_jax import cli, optimizer, preflight, program, rounding, sharding, train_step
from clip_jax import config as config_lib

_CHOICES = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
  parser.add_argument("--config", default="experiments/clip_vit_b32.py")
  parser.add_argument("--topology", default="v5e:1x1")
  options = parser.parse_args()
  config = cli.load_config(options.config, [])
  devices = preflight.devices_of(options.topology)
  for moments, text in _CHOICES:
    dtypes = {"moments_dtype": moments, "text_weights_dtype": text}
    changed = dataclasses.replace(config.optimizer, **dtypes)
    figures = measure(dataclasses.replace(config, optimizer=changed), devices)
    print(json.dumps({**dtypes, **figures}), flush=True)


def measure(config: config_lib.Config, devices: Sequence[Any]) -> dict[str, float]:
  """Of one device."""
  mesh = sharding.make_mesh(config.mesh, devices)
  state = train_step.abstract_state(config, mesh)

  def gradient(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)

  def update(gradients: Any, opt_state: Any, params: Any, step: jax.Array) -> Any:
    rng, wide = jax.random.fold_in(jax.random.key(config.seed), step), rounding.widened(params)
    return optimizer.apply(config.optimizer, config.steps, gradients, opt_state, wide, rng)

  gradients = jax.tree.map(gradient, optimizer.trained(config.optimizer, state.params))
  jitted = jax.jit(update, donate_argnums=(1, 2))
  compiled: Any = jitted.lower(gradients, state.opt_state, state.params, state.step).compile()
  memory, count = compiled.memory_analysis(), sum(x.size for x in jax.tree.leaves(state.params))
  return {
    "parameters": count,
    "arguments_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.temp_size_in_bytes,
    "traffic_bytes": program.work(compiled.as_text()).hbm_bytes,
    "operations_a_parameter": round((compiled.cost_analysis() or {}).get("flops", 0.0) / count, 1),
  }


if __name__ == "__main__":
  main()
