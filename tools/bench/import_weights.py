"""Time and memory of reading a file of 428 million parameters (ViT-L/14), random weights.

Run: python tools/bench/import_weights.py [--runs N] [--folder DIR] [--json]

Needs 8 GB of disk and 6 GB of memory, and takes about four minutes. Two files are written first: a
float16 PyTorch archive, as OpenAI's (named as the released one, so that its sha256 is taken on the
way), and open_clip's float32 safetensors. Each case then runs in a process of its own, the page
cache warm:

  load    clip_jax.load(file)            import  the same, and written as an Orbax folder

`seconds` excludes the start of Python and JAX, which stands beside it. `memory` is how far the
peak of the process's resident set (VmHWM: pages of the mapped file included) rises above what it
was after the imports, over the size of the file. The goals: under 10 seconds, under 2.5 times.
"""

import argparse
import hashlib
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from clip_jax import config as config_lib
from clip_jax import inference, summary
from clip_jax.data import tokenizer
from clip_jax.interop import exports, naming, sources, weights, writers
from clip_jax.models import clip, presets

_MODEL = presets.VIT_L_14
_RELEASED = "ViT-L-14"


def write_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """The files by the name of their format, with the same random weights in both."""
  rng = np.random.default_rng(0)
  arrays: dict[str, Any] = {}
  for path, leaf in weights.flat(weights.abstract_variables(_MODEL)).items():
    arrays[path] = rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)
  params = weights.nested(arrays)["params"]
  model = inference.Clip(config_lib.Config(model=_MODEL), params, tokenizer.original())
  exports.export(model, folder / "open_clip", "open_clip")
  theirs = weights.to_theirs({"params": params}, naming.openai(_MODEL))
  half = {name: array.astype(np.float16) for name, array in theirs.items()}
  writers.torch_archive(folder / f"{_RELEASED}.pt", half)
  os.sync()  # as files that have lain there for a while
  return {
    "OpenAI .pt, float16": folder / f"{_RELEASED}.pt",
    "open_clip safetensors, float32": folder / "open_clip",
  }


def measure(path: pathlib.Path, dest: pathlib.Path | None) -> dict[str, float]:
  """One case, in this process: seconds and peak bytes; `dest` None only loads."""
  import jax

  jax.block_until_ready(jax.numpy.zeros(1) + 1)
  started_seconds = time.time() - _process_start()
  if path.suffix == ".pt":
    with path.open("rb") as file:
      sources.RELEASED[_RELEASED] = hashlib.file_digest(file, "sha256").hexdigest()
  baseline = _status("VmRSS")
  start = time.perf_counter()
  model = sources.load(path, "quick_gelu")
  jax.block_until_ready(model.params)
  if dest is not None:
    sources.save(model, dest)
  seconds = time.perf_counter() - start
  return {
    "seconds": seconds,
    "start_seconds": started_seconds,
    "peak_bytes": _status("VmHWM") - baseline,
  }


def _status(field: str) -> int:
  """Bytes. Source: proc(5), /proc/self/status."""
  text = pathlib.Path("/proc/self/status").read_text()
  found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
  assert found is not None
  return int(found[1]) * 1024


def _process_start() -> float:
  """When this process began, by the clock of time.time(), to 10 ms."""
  ticks = int(pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
  uptime = float(pathlib.Path("/proc/uptime").read_text().split()[0])
  return time.time() - uptime + ticks / 100


def run(name: str, path: pathlib.Path, verb: str, runs: int) -> dict[str, Any]:
  """Medians of `runs` processes."""
  results = []
  for _ in range(runs):
    with tempfile.TemporaryDirectory(dir=path.parent) as dest:
      command = [sys.executable, __file__, "--case", verb, str(path), f"{dest}/orbax"]
      os.sync()  # what the case before wrote
      child = subprocess.run(command, check=True, capture_output=True, text=True)
      results.append(json.loads(child.stdout.splitlines()[-1]))
  file = path / "open_clip_model.safetensors" if path.is_dir() else path
  median = {key: statistics.median(result[key] for result in results) for key in results[0]}
  return {
    "case": f"{verb} {name}",
    "file_bytes": file.stat().st_size,
    "memory_over_file": max(result["peak_bytes"] for result in results) / file.stat().st_size,
    **median,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--runs", type=int, default=3, help="processes a case")
  parser.add_argument("--folder", help="where the files are written for the time of the run")
  parser.add_argument("--json", action="store_true", help="one JSON object a line")
  parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.case:
    verb, path, dest = options.case
    print(json.dumps(measure(pathlib.Path(path), pathlib.Path(dest) if verb == "import" else None)))
    return
  machine = summary.machine()
  if not options.json:
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"ViT-L/14, {clip.parameter_counts(_MODEL)['total']:,} parameters; memory: peak / file")
  with tempfile.TemporaryDirectory(dir=options.folder) as folder:
    for name, path in write_files(pathlib.Path(folder)).items():
      for verb in ("load", "import"):
        result = run(name, path, verb, options.runs)
        if options.json:
          print(json.dumps({**result, **machine}))
          continue
        print(
          f"{result['case']:>38} of {result['file_bytes'] / 1e6:,.0f} MB: "
          f"{result['seconds']:.1f} s (+ {result['start_seconds']:.1f} s to start), "
          f"memory {result['memory_over_file']:.2f} x"
        )


if __name__ == "__main__":
  main()
