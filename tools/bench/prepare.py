"""How fast data are prepared, on one core: pairs a second of each pass, and duplicates among many.

Run: python tools/bench/prepare.py [--pairs N] [--hashes N] [--runs R] [--json]

Pairs are smooth images with noise, 512 x 512, JPEG of quality 85 (some 90 kB, as photographs
are), read from memory and written to a temporary folder. Of each pass the median of the runs, by
this process's own time; `decode` beside them is what Pillow alone takes. Hashes are random, a
tenth of them near others: what is measured is the search, whose time grows with the square of
their number past some millions.
"""

import argparse
import functools
import io
import json
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

if __package__ in (None, ""):
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from clip_jax.data import images, records
from tools.prepare import duplicates, look, shard_file
from tools.prepare.filters import Filters
from tools.prepare.jobs import Item, Listed

_SIDE, _REDUCED = 512, 256  # pixels
_DIFFERENT = 32  # images; the same ones again and again


def photo(seed: int) -> bytes:
  rng = np.random.default_rng(seed)
  small = Image.fromarray(rng.integers(0, 256, (24, 24, 3)).astype(np.uint8))
  smooth = np.asarray(small.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), np.float32)
  noisy = (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
  out = io.BytesIO()
  Image.fromarray(noisy).save(out, "JPEG", quality=85)
  return out.getvalue()


def passes(pairs: int, work: pathlib.Path) -> dict[str, Callable[[], object]]:
  """What is measured, by name."""
  files = [photo(seed) for seed in range(_DIFFERENT)]
  found = [records.Record(f"{i}", files[i % _DIFFERENT], ("a caption",)) for i in range(pairs)]
  items = tuple(
    Item(r.key, ("train",), functools.partial(records.Record, **vars(r))) for r in found
  )
  part, all_of_it = Listed(items), Filters()

  def looking(hashed: bool) -> Callable[[], object]:
    return lambda: look.Look("looked", 0, part, all_of_it, hashed, work)(lambda seen: None)

  def writing(side: int, looked: bool) -> Callable[[], object]:
    picks, asked = (shard_file.Pick(part),), Filters(max_side=side)
    return lambda: shard_file.Shard("a.array_record", "train", picks, asked, looked, work)(
      lambda seen: None
    )

  return {
    "decode": lambda: [images.decode(file) for file in files * (pairs // _DIFFERENT)],
    "look, exact duplicates": looking(False),
    "look, near duplicates": looking(True),
    "write after a look": writing(0, True),
    f"write after a look, {_REDUCED} px": writing(_REDUCED, True),
    "write in one pass": writing(0, False),
    f"write in one pass, {_REDUCED} px": writing(_REDUCED, False),
  }


def judged(count: int) -> dict[str, float]:
  """Seconds and bytes of memory an image that the search for near duplicates takes."""
  rng = np.random.default_rng(0)
  looks_N = rng.integers(0, 2**64, count, dtype=np.uint64)
  near = rng.integers(0, count, (2, count // 10))
  looks_N[near[0]] = looks_N[near[1]] ^ np.uint64(0b101)
  before, start = _most_bytes(), time.process_time()
  verdicts = duplicates.judge(looks_N, looks_N, looks_N[:0], "near")
  return {
    "hashes": count,
    "left_out": int(np.count_nonzero(verdicts.reason)),
    "seconds": time.process_time() - start,
    "bytes_an_image": (_most_bytes() - before) / count,
  }


def _most_bytes() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("--pairs", type=int, default=256, metavar="N", help="a run (256)")
  parser.add_argument("--hashes", type=int, default=1_000_000, metavar="N", help="(1,000,000)")
  parser.add_argument("--runs", type=int, default=3, metavar="R", help="of each pass (3)")
  parser.add_argument("--json", action="store_true")
  options = parser.parse_args()
  found = judged(options.hashes)  # first, as memory is measured by its peak
  with tempfile.TemporaryDirectory() as folder:
    todo = passes(options.pairs, pathlib.Path(folder))
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    for _ in range(options.runs + 1):  # the first one warms up
      for name, run in todo.items():
        start = time.process_time()
        run()
        seconds[name].append(time.process_time() - start)
  rates = {name: options.pairs / statistics.median(own[1:]) for name, own in seconds.items()}
  if options.json:
    print(json.dumps({"pairs_a_second": rates, "near_duplicates": found}))
    return
  for name, rate in rates.items():
    print(f"{name:<32} {rate:>8,.0f} pairs/s")
  print(
    f"near duplicates among {found['hashes']:,} hashes: {found['seconds']:.1f} s, "
    f"{found['bytes_an_image']:.0f} bytes of memory an image"
  )


if __name__ == "__main__":
  main()
