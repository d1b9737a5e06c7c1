"""Speed of an experiment's training step on this machine: pairs a second, and what limits it.

  python tools/bench/step.py [--config experiments/demo.py] [--rounds 5] [--json]

The step is the one that training runs, on a batch that is already on the device. Beside it, by
turns in the same process, a large float32 matrix product shows what the machine gives at that
moment (neighbours change it): the ratio of the two is the figure to compare between machines.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clip_jax import cli, sharding, summary, train_step
from clip_jax import config as config_lib
from clip_jax.models import clip

_STEPS = 10
_SIDE = 2048


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
  parser.add_argument("--config", default="experiments/demo.py")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--json", action="store_true")
  options = parser.parse_args()
  figures = measure(options.config, options.rounds)
  if options.json:
    print(json.dumps(figures))
  else:
    for name, value in figures.items():
      print(f"{name:>32}  {value:,.3g}" if isinstance(value, float) else f"{name:>32}  {value}")


def measure(path: str, rounds: int) -> dict[str, object]:
  """Medians over `rounds` of paired timings."""
  config = cli.load_config(path, [])
  mesh = sharding.make_mesh()
  state = train_step.init_state(config, mesh)
  step = train_step.make_train_step(config, mesh)
  batch = _batch(config, mesh)
  product = jax.jit(lambda a: a @ a)
  square = jnp.ones((_SIDE, _SIDE), jnp.float32)
  state, _ = step(state, batch)
  product(square).block_until_ready()
  step_seconds, product_seconds = [], []
  for _ in range(rounds):
    start = time.perf_counter()
    for _ in range(_STEPS):
      state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    step_seconds.append((time.perf_counter() - start) / _STEPS)
    start = time.perf_counter()
    product(square).block_until_ready()
    product_seconds.append(time.perf_counter() - start)
  flops = 3 * config.data.batch_pairs * clip.flops_per_pair(config.model)
  rates = [flops / seconds for seconds in step_seconds]
  peaks = [2 * _SIDE**3 / seconds for seconds in product_seconds]
  ratios = [rate / peak for rate, peak in zip(rates, peaks, strict=True)]
  return {
    "config": path,
    "pairs a step": config.data.batch_pairs,
    "milliseconds a step": 1e3 * statistics.median(step_seconds),
    "pairs a second": config.data.batch_pairs / statistics.median(step_seconds),
    "GFLOP/s of the step": statistics.median(rates) / 1e9,
    "GFLOP/s of a matrix product": statistics.median(peaks) / 1e9,
    "step / matrix product": statistics.median(ratios),
    **summary.machine(),
  }


def _batch(config: config_lib.Config, mesh: Mesh) -> dict[str, jax.Array]:
  rng = np.random.default_rng(0)
  pairs, side = config.data.batch_pairs, config.model.image.resolution
  text = config.model.text
  tokens = rng.integers(1, text.vocab_size - 2, (pairs, text.context_length)).astype(np.int32)
  tokens[:, -1] = text.vocab_size - 1
  arrays: dict[str, np.ndarray] = {
    "image": rng.integers(0, 256, (pairs, side, side, 3)).astype(np.uint8),
    "tokens": tokens,
    "bad": np.zeros(pairs, np.int32),
    "stop": np.zeros(pairs, np.int32),
  }
  return sharding.global_batch(arrays, mesh)


if __name__ == "__main__":
  main()
