"""Feeds mutated weights' files to the readers: each is read or refused in one line, nothing else.

python tools/fuzz_archive.py [--inputs 100000] [--seed 0] [FILE...]

The files (small ones: torch.save, TorchScript, safetensors, npz; by default one of each kind that
this project writes) are cut, and have bytes changed, swapped, repeated and taken out. An exception
other than ArchiveError, an array of more bytes than the file, or over ten seconds for one input end
the run, with the input kept.
"""

import argparse
import collections
import pathlib
import random
import resource
import sys
import tempfile
import time

import numpy as np
import rich.progress

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from clip_jax.interop import archive, writers  # noqa: E402


def mutate(data: bytes, rng: random.Random) -> bytes:
  """The bytes with one to eight changes."""
  out = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 3, 8))):
    if not out:
      break
    at = rng.randrange(len(out))
    size = min(rng.choice((1, 1, 2, 4, 8, 64)), len(out) - at)
    kind = rng.randrange(6)
    if kind == 0:
      out[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
      out[at : at + size] = rng.randbytes(size)
    elif kind == 2:
      out[at : at + size] = rng.choice((b"\xff", b"\x00", b"\x7f")) * size
    elif kind == 3:
      del out[at : at + size]
    elif kind == 4:
      start = rng.randrange(len(out))
      out[at:at] = out[start : start + size]
    elif rng.random() < 0.2:
      del out[at:]
  return bytes(out)


def one(path: pathlib.Path, data: bytes, rng: random.Random) -> str:
  """Reads one mutated input. Returns: "read", or the start of why it was refused."""
  path.write_bytes(mutate(data, rng))
  start = time.perf_counter()
  try:
    found = archive.read(path)
    for array in found.arrays.values():
      assert array.nbytes <= len(data) * 2, "an array larger than its file"
      array.tobytes()  # every byte is there
    outcome = "read"
  except archive.ArchiveError as error:
    text = str(error)
    assert "\n" not in text.replace(str(path), ""), f"not one line: {text}"
    outcome = "refused"
  assert time.perf_counter() - start < 10, "over ten seconds"
  return outcome


def own_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """A PyTorch archive, a safetensors file and an npz of the same few arrays."""
  arrays: dict[str, np.ndarray] = {
    "visual.conv1.weight": np.arange(48, dtype=np.float32).reshape(4, 3, 2, 2),
    "ln_final.weight": np.ones(5, np.float16),
    "logit_scale": np.array(2.5, np.float32),
    "bn1.num_batches_tracked": np.array(7, np.int64),
  }
  wide = {name: array.astype(np.float32) for name, array in arrays.items()}
  writers.torch_archive(folder / "w.pt", arrays)
  writers.safetensors(folder / "w.safetensors", wide)
  np.savez(folder / "w.npz", **wide)  # type: ignore[arg-type]
  return sorted(folder.iterdir())


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
  parser.add_argument("files", nargs="*", type=pathlib.Path)
  parser.add_argument("--inputs", type=int, default=100_000)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  outcomes: collections.Counter[str] = collections.Counter()
  start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with tempfile.TemporaryDirectory() as folder:
    files = options.files or own_files(pathlib.Path(folder))
    samples = [file.read_bytes() for file in files]
    path = pathlib.Path(folder) / "input"
    for i in rich.progress.track(range(options.inputs), description="inputs"):
      try:
        outcomes[one(path, samples[i % len(samples)], random.Random(f"{options.seed} {i}"))] += 1
      except Exception as error:
        kept = pathlib.Path(f"fuzz-{options.seed}-{i}.bin")
        kept.write_bytes(path.read_bytes())
        print(f"input {i} ({kept}): {type(error).__name__}: {error}", file=sys.stderr)
        return 1
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  seconds = time.perf_counter() - start
  counts = ", ".join(f"{n:,} {name}" for name, n in outcomes.most_common())
  print(
    f"{options.inputs:,} inputs: {counts}; {seconds:.0f} s, memory grew by {grown / 1024:.0f} MB"
  )
  return 0


if __name__ == "__main__":
  sys.exit(main())
