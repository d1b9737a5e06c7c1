"""What training data in place costs on this machine: indexes, the start of an epoch, memory.

  python tools/bench/sources.py [--members 10000] [--records 100000000] [--epochs 10] [--json]

The start over many records reads indexes that were made up: the tar files beside them are holes of
the right size, so that 100 million records take 5 GB of disk in --folder while it runs. Each part
runs in a process of its own; memory is the largest that the process had at any time.
"""

import argparse
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clip_jax import config as c
from clip_jax import summary
from clip_jax.data import pipeline, places, records, storage, tar_index
from clip_jax.data import tokenizer as tokenizer_lib

_SHARD_RECORDS = 10_000
_IMAGE_BYTES = 20_000  # of the tar file that is indexed
_PAIRS = 1_000  # of each epoch whose memory is measured
_NANOSECONDS = 1_700_000_000 * 10**9  # when the files that are holes were made


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
  parser.add_argument("--members", type=int, default=10_000, help="of the tar file to index")
  parser.add_argument("--records", type=int, default=100_000_000, help="0: leave that part out")
  parser.add_argument("--epochs", type=int, default=10)
  parser.add_argument("--folder", help="for the files, which are removed afterwards")
  parser.add_argument("--json", action="store_true")
  parser.add_argument("--part", choices=_PARTS, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.part:
    print(json.dumps(_PARTS[options.part](pathlib.Path(options.folder), options)))
    return
  figures: dict[str, object] = {}
  for part in _PARTS:
    if part == "start" and not options.records:
      continue
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
      if part == "start":
        make_indexes(pathlib.Path(folder), options.records)
      command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--folder", folder]
      done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures |= json.loads(done.stdout.splitlines()[-1])
  figures |= summary.machine()
  if options.json:
    print(json.dumps(figures))
  else:
    for name, value in figures.items():
      print(f"{name:>52}  {value:,.3g}" if isinstance(value, float) else f"{name:>52}  {value}")


def index(folder: pathlib.Path, options: argparse.Namespace) -> dict[str, object]:
  """Seconds to index a tar file of .jpg, .txt and .json members, and to open it again."""
  path = folder / "00000.tar"
  with tarfile.open(path, "w") as archive:
    for i in range(options.members):
      kind, size = (("jpg", _IMAGE_BYTES), ("txt", 60), ("json", 500))[i % 3]
      member = tarfile.TarInfo(f"{i // 3:09d}.{kind}")
      member.size, member.mtime = size, 1.7e9 + i
      archive.addfile(member, io.BytesIO(bytes(size)))
  file = storage.info(str(path))
  start, start_cpu = time.perf_counter(), time.process_time()
  made = tar_index.open_one(file)
  seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
  start = time.perf_counter()
  tar_index.open_one(file)
  again = time.perf_counter() - start
  start = time.perf_counter()
  for row in np.random.default_rng(0).integers(0, made.rows, 10_000):
    made.place(int(row))
  return {
    f"index of {options.members:,} members, seconds": seconds,
    "  of one core": cpu,
    "  bytes a pair": pathlib.Path(made.path).stat().st_size / made.rows,
    "  opened again, milliseconds": 1e3 * again,
    "  a row read from it, microseconds": (time.perf_counter() - start) * 100,
  }


def make_indexes(folder: pathlib.Path, records: int) -> None:
  """Tar files that are holes, all of one size and time, each with an index of 10,000 pairs."""
  first = folder / "00000.tar"
  _hole(first)
  row = [(b"%09d" % k, (512 + k * 30_720, 30_000, 31_232 + k * 30_720, 60, 0, 0))
         for k in range(_SHARD_RECORDS)]  # fmt: skip
  content = tar_index.content(storage.info(str(first)), row, [], bytes(32))
  for k in range(-(-records // _SHARD_RECORDS)):
    path = folder / f"{k:05d}.tar"
    _hole(path)
    (folder / f"{path.name}{tar_index.SUFFIX}").write_bytes(content)


def _hole(path: pathlib.Path) -> None:
  path.touch()
  os.truncate(path, 30_720 * _SHARD_RECORDS + 1024)
  os.utime(path, ns=(_NANOSECONDS, _NANOSECONDS))


class _Places:
  """Where the records of a source lie, in place of the records."""

  def __init__(self, source: records.RecordSource):
    self._source = source

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> str:
    return self._source.locate(index)


def start(folder: pathlib.Path, options: argparse.Namespace) -> dict[str, object]:
  """Seconds and memory from the path to the places of an epoch's first records."""
  before = _peak_bytes()
  begin = time.perf_counter()
  source = places.open_files(c.Source(path=str(folder)))
  opened = time.perf_counter() - begin
  text = source.fingerprint
  shuffled = grain.MapDataset.source(_Places(source)).seed(0).shuffle()
  found = {shuffled[i] for i in range(4096)}
  assert text
  assert len(found) == 4096
  name = f"start of an epoch over {len(source):,} records"
  return {
    f"{name}, seconds": time.perf_counter() - begin,
    "  of which opening": opened,
    "  memory at its peak, MB": _peak_bytes() / 1e6,
    "  of which before": before / 1e6,
  }


def memory(folder: pathlib.Path, options: argparse.Namespace) -> dict[str, object]:
  """Memory after each of some epochs over tar files and over Parquet files."""
  figures: dict[str, object] = {}
  jpegs = []
  for i in range(_PAIRS):
    out = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize((64, 64)).save(out, "JPEG")
    jpegs.append(out.getvalue())
  captions = [f"picture {i}" for i in range(_PAIRS)]
  with tarfile.open(folder / "0.tar", "w") as archive:
    for i, (jpeg, caption) in enumerate(zip(jpegs, captions, strict=True)):
      for kind, data in (("jpg", jpeg), ("txt", caption.encode())):
        member = tarfile.TarInfo(f"{i:09d}.{kind}")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
  pq.write_table(pa.table({"image": jpegs, "text": captions}), folder / "0.parquet",
                 row_group_size=16)  # fmt: skip
  for kind in ("tar", "parquet"):
    source = c.Source(path=str(folder / f"0.{kind}"))
    config = c.Config(
      model=c.Model(image=c.Vision(resolution=32), text=c.Text(context_length=16)),
      data=c.Data(sources=(source,), batch_pairs=100, threads=1),
    )
    opened = [places.open_files(source)]
    batches = pipeline.host_batches(config, opened, tokenizer_lib.original())
    after = []
    for _ in range(options.epochs):
      for _ in range(_PAIRS // 100):
        next(batches)
      after.append(_now_bytes() / 1e6)
    figures[f"{kind}: memory after {options.epochs} epochs, MB"] = after[-1]
    figures[f"  {kind}, grown since the second, MB"] = after[-1] - after[min(1, len(after) - 1)]
    figures[f"  {kind}, after each"] = ", ".join(f"{x:.0f}" for x in after)
  return figures


def _peak_bytes() -> int:
  return _status("VmHWM")


def _now_bytes() -> int:
  return _status("VmRSS")


def _status(name: str) -> int:
  text = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(text.partition(f"{name}:")[2].split()[0])


_PARTS = {"index": index, "start": start, "memory": memory}


if __name__ == "__main__":
  main()
