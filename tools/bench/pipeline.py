"""Speed of an experiment's data pipeline on this machine: images a second, by threads and workers.

  python tools/bench/pipeline.py [--config experiments/demo.py] [--batches 100] [--json]

From the sources to uint8 host batches (read, decode, resize, crop, tokenise, batch), with no
training beside it. Compare it with the pairs a second of tools/bench/step.py.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import tempfile
import time

from clip_jax import cli, summary, train
from clip_jax.data import pipeline

_SETTINGS = ((0, 1), (0, 2), (2, 1))  # (worker processes, threads)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
  parser.add_argument("--config", default="experiments/demo.py")
  parser.add_argument("--batches", type=int, default=100)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--json", action="store_true")
  options = parser.parse_args()
  figures = measure(options.config, options.batches, options.rounds)
  if options.json:
    print(json.dumps(figures))
  else:
    for name, value in figures.items():
      print(f"{name:>32}  {value:,.0f}" if isinstance(value, float) else f"{name:>32}  {value}")


def measure(path: str, batches: int, rounds: int) -> dict[str, object]:
  """Images a second, the median over rounds, each of `batches` batches after a warm-up of five."""
  config = cli.load_config(path, [])
  sources = train.open_sources(config)
  with tempfile.TemporaryDirectory() as folder:
    tokenizer = train.workdir_tokenizer(config, sources, pathlib.Path(folder))
  figures: dict[str, object] = {"config": path}
  for workers, threads in _SETTINGS:
    data = dataclasses.replace(config.data, workers=workers, threads=threads)
    settings = dataclasses.replace(config, data=data)
    rates = []
    for _ in range(rounds):
      stream = pipeline.host_batches(settings, sources, tokenizer)
      for _ in itertools.islice(stream, 5):
        pass
      start = time.perf_counter()
      for _ in itertools.islice(stream, batches):
        pass
      rates.append(batches * config.data.batch_pairs / (time.perf_counter() - start))
    name = f"{workers} workers" if workers else f"{threads} thread{'s' * (threads > 1)}"
    figures[f"images a second, {name}"] = statistics.median(rates)
  return figures | summary.machine()


if __name__ == "__main__":
  main()
