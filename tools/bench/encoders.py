"""How fast the encoders are beside PyTorch's CLIPModel (Hugging Face) on this machine's CPU.

Run: python tools/bench/encoders.py [--runs R] [--models NAME ...] [--batches N ...] [--json]

Wants torch and transformers; takes about four minutes. The same random weights on both sides (ours
are exported to Hugging Face's folder), the same inputs as arrays (float32 images, int32 tokens),
float32 throughout, as many threads in PyTorch as XLA has: one for each core. Each side does all
that gives unit-norm embeddings as a NumPy array: `encode_image` and `encode_text` here,
`get_image_features` and `get_text_features` with the normalisation there, in inference mode. Both
are warm, take turns at going first, and are compared run by run: the ratio is the median of
PyTorch's seconds over ours (over 1: ours is faster).

Look at `others`, the share of the machine that other processes took meanwhile: PyTorch's threads
wait for one another after every operation, so company slows it far more than XLA. With 2 cores
and two busy neighbours, one image took it 20 times as long. Over a few percent, no ratio counts.
"""

import argparse
import importlib
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax import config as config_lib
from clip_jax import inference, summary
from clip_jax.data import tokenizer
from clip_jax.interop import exports
from clip_jax.models import clip, presets

Encode = Callable[[np.ndarray], np.ndarray]
_LEAST_SECONDS = 0.1  # of one side in one run


def random_model(model: config_lib.Model) -> inference.Clip:
  tokens_BL = jnp.zeros((1, model.text.context_length), jnp.int32)
  image_BRR3 = jnp.zeros((1, model.image.resolution, model.image.resolution, 3))
  params = jax.jit(clip.CLIP(model).init)(jax.random.key(0), image_BRR3, tokens_BL)["params"]
  return inference.Clip(config_lib.Config(model=model), params, tokenizer.original())


def theirs(model: inference.Clip) -> dict[str, Encode]:
  """CLIPModel with the same weights: its encoders as functions of our inputs."""
  torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
  torch.set_num_threads(os.cpu_count() or 1)
  with tempfile.TemporaryDirectory() as folder:
    exports.export(model, pathlib.Path(folder) / "model", "huggingface")
    other = transformers.CLIPModel.from_pretrained(f"{folder}/model").float().eval()

  def unit(features: Any) -> np.ndarray:
    x_BE = getattr(features, "pooler_output", features)  # a plain tensor before version 5
    return (x_BE / x_BE.norm(dim=-1, keepdim=True)).numpy()

  def encode_image(image_BRR3: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
      return unit(other.get_image_features(torch.from_numpy(image_BRR3).permute(0, 3, 1, 2)))

  def encode_text(tokens_BL: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
      return unit(other.get_text_features(torch.from_numpy(tokens_BL).long()))

  return {"encode_image": encode_image, "encode_text": encode_text}


def inputs(model: config_lib.Model, batch: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  side, text = model.image.resolution, model.text
  tokens_BL = rng.integers(1, text.vocab_size - 2, (batch, text.context_length)).astype(np.int32)
  tokens_BL[:, 0], tokens_BL[:, -1] = text.vocab_size - 2, text.vocab_size - 1
  image_BRR3 = rng.standard_normal((batch, side, side, 3), np.float32)
  return {"encode_image": image_BRR3, "encode_text": tokens_BL}


def compare(ours: Encode, torchs: Encode, x: np.ndarray, runs: int) -> dict[str, float]:
  """Medians of paired runs: milliseconds a call of both, and the ratio."""
  difference = float(np.abs(ours(x) - torchs(x)).max())
  seconds(ours, x, 1), seconds(torchs, x, 1)
  repeats = max(1, round(_LEAST_SECONDS / seconds(ours, x, 1)))
  times: dict[Encode, list[float]] = {ours: [], torchs: []}
  start, busy = time.perf_counter(), _others_seconds()
  for run in range(runs):
    for side in (ours, torchs) if run % 2 else (torchs, ours):
      times[side].append(seconds(side, x, repeats))
  machine_seconds = (time.perf_counter() - start) * (os.cpu_count() or 1)
  ratios = [slow / fast for fast, slow in zip(times[ours], times[torchs], strict=True)]
  return {
    "clip_jax_milliseconds": 1e3 * statistics.median(times[ours]),
    "torch_milliseconds": 1e3 * statistics.median(times[torchs]),
    "ratio": statistics.median(ratios),
    "ratio_least": min(ratios),
    "others": max(0.0, _others_seconds() - busy) / machine_seconds,
    "largest_difference": difference,
  }


def _others_seconds() -> float:
  """CPU seconds so far of all processes but this one, stolen time too. Source: proc(5)."""
  user, nice, system, _, _, *interrupts = map(int, _stat().split()[1:9])
  total = sum((user, nice, system, *interrupts)) / os.sysconf("SC_CLK_TCK")
  return total - time.process_time()


def _stat() -> str:
  return pathlib.Path("/proc/stat").read_text().splitlines()[0]


def seconds(encode: Encode, x: np.ndarray, repeats: int) -> float:
  start = time.perf_counter()
  for _ in range(repeats):
    encode(x)
  return (time.perf_counter() - start) / repeats


def cases(names: list[str], batches: list[int], runs: int) -> Iterator[dict[str, Any]]:
  for name in names:
    model = random_model(presets.PUBLISHED[name])
    other = theirs(model)
    for batch in batches:
      for method, x in inputs(model.config.model, batch).items():
        result = compare(getattr(model, method), other[method], x, runs)
        yield {"model": name, "method": method, "batch": batch, **result}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--models", nargs="+", default=["ViT-B/32", "ViT-B/16"])
  parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
  parser.add_argument("--runs", type=int, default=9, help="paired runs of each case")
  parser.add_argument("--json", action="store_true", help="one JSON object a line")
  options = parser.parse_args()
  machine = summary.machine()
  for package in ("torch", "transformers"):
    try:
      machine[package] = importlib.import_module(package).__version__
    except ImportError:
      raise SystemExit(f"{package} is not installed: pip install torch transformers") from None
  if not options.json:
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
  for result in cases(options.models, options.batches, options.runs):
    if options.json:
      print(json.dumps({**result, **machine}), flush=True)
      continue
    print(
      "{model} {method:>12}, batch {batch:>2}: {clip_jax_milliseconds:>6.1f} ms, CLIPModel "
      "{torch_milliseconds:>6.1f} ms, ratio {ratio:.2f} (least {ratio_least:.2f}), others "
      "{others:.0%}, embeddings differ by {largest_difference:.0e}".format(**result),
      flush=True,
    )


if __name__ == "__main__":
  main()
