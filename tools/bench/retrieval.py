"""How fast retrieval ranks: as `evaluation.retrieval` does, and in plain NumPy beside it.

  python tools/bench/retrieval.py [--queries 20000] [--items 20000] [--width 512] [--runs 5]

Random embeddings, one own item a query. NumPy is float64 in blocks, one product and one comparison
each. The two take turns; medians, and the median of the paired ratios. Prints a line of JSON each:
pairs of a query and an item a second, and the hours that a million queries against a million items
would take at that speed in one direction.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from clip_jax.evaluation import retrieval

_BLOCK = 1024  # rows and columns of NumPy's products


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
  parser.add_argument("--queries", type=int, default=20_000)
  parser.add_argument("--items", type=int, default=20_000)
  parser.add_argument("--width", type=int, default=512)
  parser.add_argument("--runs", type=int, default=5)
  options = parser.parse_args()
  rng = np.random.default_rng(0)
  query_QE, item_NE = (
    _unit(rng.normal(size=(rows, options.width))) for rows in (options.queries, options.items)
  )
  own_Q = rng.integers(0, options.items, options.queries)
  own_Q2 = np.stack([own_Q, own_Q + 1], axis=1)
  ways: dict[str, Callable[[], np.ndarray]] = {
    "clip_jax": lambda: retrieval.ranks(query_QE, item_NE, own_Q2),
    "numpy float64": lambda: in_numpy(query_QE, item_NE, own_Q),
  }
  ranks = {name: rank() for name, rank in ways.items()}  # compiles, too
  first, other = ranks.values()
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for _ in range(options.runs):
    for name, rank in ways.items():
      began = time.perf_counter()
      rank()
      seconds[name].append(time.perf_counter() - began)
  for name, taken in seconds.items():
    speed = options.queries * options.items / statistics.median(taken)
    hours = 1e12 / speed / 3600
    print(json.dumps({"what": name, "pairs_per_second": speed, "million_by_million_hours": hours}))
  ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
  figures = {
    "ratio": statistics.median(ratios),
    "ranks_that_differ": float(np.mean(first != other)),
    "by_at_most": int(np.abs(first - other).max()),
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
  }
  print(json.dumps(figures))


def in_numpy(query_QE: np.ndarray, item_NE: np.ndarray, own_Q: np.ndarray) -> np.ndarray:
  """The ranks, of equal scores the first one first: the definition, in blocks."""
  ranks = np.ones(len(query_QE), np.int64)
  query_QE, item_NE = query_QE.astype(np.float64), item_NE.astype(np.float64)
  best_Q1 = np.einsum("qe,qe->q", query_QE, item_NE[own_Q])[:, None]
  for start in range(0, len(query_QE), _BLOCK):
    rows = slice(start, start + _BLOCK)
    for first in range(0, len(item_NE), _BLOCK):
      item_iE = item_NE[first : first + _BLOCK]
      number_1i = np.arange(first, first + len(item_iE))[None]
      cosines_bi = query_QE[rows] @ item_iE.T
      ahead_bi = (cosines_bi > best_Q1[rows]) & (number_1i != own_Q[rows, None])
      ahead_bi |= (cosines_bi == best_Q1[rows]) & (number_1i < own_Q[rows, None])
      ranks[rows] += ahead_bi.sum(axis=1)
  return ranks


def _unit(rows: np.ndarray) -> np.ndarray:
  return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


if __name__ == "__main__":
  main()
