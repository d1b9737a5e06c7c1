"""A plan for training on billions of pairs, computed from what one machine measured of a record.

Run: python tools/data_plan.py [--pairs 5e9] [--hosts 64] [--cores 56] [--workers 32]
       [--pairs-per-second 41500 182000] [--shard-pairs 10000 100000]

Reads docs/data_at_scale.json, which holds what tools/bench/sources.py, prepare.py and images.py
print with --json, under their names; writes docs/data_at_scale.md.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

if __package__ in (None, ""):
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from clip_jax import metrics
from tools import data_costs
from tools.data_costs import Measured, Wanted

ROOT = pathlib.Path(__file__).resolve().parents[1]
_GB, _TB = 1e9, 1e12

_NOT_MEASURED = """## Not measured

- **An object store or a network.** Every read here was of a local disk, and much of it of the
  system's cache. What a store gives is asked of it in requests and bytes a second, as the table
  above has them. Reading and its retries are tested against a local HTTP server that fails
  and is slow (`tests/test_storage.py`), which says nothing of speed. Indexing a tar file there
  reads all of it, in blocks of 4 MiB: once the bytes of the data set.
- **The start on a shared file system.** Each host opens each index once, 8 at a time; at a
  millisecond an opening that alone is {shared_seconds:,.0f} s for {most_shards:,} shards. The index
  of a data set in a store lies in each host's own cache, or once in a folder that all share
  (`CLIP_JAX_CACHE`): {index_gb:,.0f} GB.
- **So many records.** The start was measured over {records} records whose tar files were holes,
  and multiplied. That a shuffle of 5 billion repeats none, beyond what 32 bits count, is tested on
  a sample (`tests/test_data_plan.py`).
- **Worker processes at this size.** Each is taken to hold what the first one holds. That is the
  growth of a process's peak over its earlier peak, and so the least that it can be.
- **Many cores.** Cores are multiplied as if none waited for another: memory bandwidth, the two
  threads of a core and the accelerator's own traffic are left out. Plan for half of each rate.
- **Other pictures.** Images were 512 x 512 pixels, JPEG, of {image_kb:.0f} kB; larger ones cost
  their bytes and their decoding. Downloading from the web, of which img2dataset is the tool, is not
  counted.
"""

_ADVICE = """## What follows

- Large shards: start, memory and the number of files go with the shards, not with the pairs. A read
  takes one pair wherever it lies.
- Read tar shards where they are, or prepare them once into ArrayRecord shards. ArrayRecord keeps a
  file open for each shard that a process has read from: with {most_shards:,} shards raise
  `ulimit -n` above that. It is read from a mounted folder, not from a store.
- Duplicates: all hashes are compared in one process, which takes {search_gb:,.0f} GB of memory here
  and, for near ones, time that grows with the square of their number. Past some hundred million
  images split the data by source and prepare each part alone; what is the same in two parts then
  stays. `--against` (evaluation sets) and `--validation-fraction` go by the image alone and
  hold over all parts.
- Make no source of a mixture tiny. grain's shuffle walks through 65,536 numbers an epoch however
  few the records are: each costs some 0.6 ms of it in a source of 64, 0.03 ms in one of 1,000,
  under 0.01 ms from 10,000 on. The same order cannot be had for less.
- Any host may die: the batch of a step is a function of the step, so that nothing of the data's
  position is saved, on however many hosts.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def page(document: Mapping[str, Any], wanted: Wanted) -> str:
  own = data_costs.measured(document)
  paid = data_costs.once(own, wanted)
  layouts = [data_costs.layout(own, wanted, count) for count in wanted.shard_pairs]
  facts = {
    "shared_seconds": max(x["shards"] for x in layouts) / 8 / 1000,
    "most_shards": int(max(x["shards"] for x in layouts)),
    "index_gb": paid["index_bytes"] / _GB,
    "search_gb": paid["search_bytes"] / _GB,
    "image_kb": own.image_bytes / 1e3,
    "records": f"{own.start_records:,}",
  }
  parts = (
    _head(document, wanted),
    _measured(own),
    _once(own, wanted, paid),
    _starts(wanted, layouts),
    _flow(own, wanted),
    _ADVICE.format(**facts),
    _NOT_MEASURED.format(**facts),
  )
  return "\n".join(parts)


def _head(document: Mapping[str, Any], wanted: Wanted) -> str:
  machine = document["sources"]
  names = [name for name in ("processor", "python", "jax") if name in machine]
  where = "; ".join(f"{name}: {machine[name]}" for name in names)
  return f"""# A plan for {wanted.pairs:,} pairs

Written by `python tools/data_plan.py` from docs/data_at_scale.json: what `tools/bench/sources.py`,
`prepare.py` and `images.py` measured on one machine, multiplied. Nothing here was run at this size.
The machine: {where}.
Hosts: {wanted.hosts}, of {wanted.cores} cores and {wanted.workers} worker processes each
(`--hosts`, `--cores`, `--workers`); a core is one of the measured machine.
"""


def _measured(own: Measured) -> str:
  rows = [
    (
      "a pair in a tar file: image, text, JSON",
      f"{data_costs.pair_bytes(own.image_bytes):,} bytes",
    ),
    ("its place in an index", f"{own.index_bytes:.0f} bytes"),
    ("to index it (three members)", f"{3e6 * own.member_seconds:.0f} us of a core"),
    ("to look it up", f"{1e6 * own.row_seconds:.0f} us"),
    ("a training crop of 224 pixels, with tokens", f"{1e3 / own.crops:.2f} ms of a core"),
    ("a start, each shard", f"{1e3 * own.shard_seconds:.2f} ms"),
    ("memory, each shard and process", f"{own.shard_bytes:,.0f} bytes"),
    ("memory to find near duplicates, each image", f"{own.search_bytes:.0f} bytes"),
  ]
  return "## Measured, of one record\n\n" + table(("what", "figure"), rows)


def _once(own: Measured, wanted: Wanted, paid: Mapping[str, float]) -> str:
  rows = [
    ("disk", f"{paid['disk_bytes'] / _TB:,.0f} TB", ""),
    ("indexes", f"{paid['index_bytes'] / _GB:,.0f} GB", ""),
    ("indexing, a process a host", f"{paid['index_core_hours']:,.0f} core-hours",
     f"{paid['index_hours']:,.2f} h"),
  ]  # fmt: skip
  for name in own.prepared:
    hours = paid[f"{name}: core-hours"], paid[f"{name}: hours"]
    rows.append((f"prepare: {name}", f"{hours[0]:,.0f} core-hours", f"{hours[1]:,.2f} h"))
  note = """
Training needs the indexes alone; they are made at the first start. A preparation is a look (for
duplicates) and a write after it, or a write in one pass; `decode` is Pillow alone, beside them.
Without a resize a write after a look copies bytes. Disks are not counted.
"""
  return "## Once\n\n" + table(("what", "in all", "on all hosts"), rows) + note


def _starts(wanted: Wanted, layouts: Sequence[Mapping[str, float]]) -> str:
  rows = [
    (f"{count:,}", f"{x['shards']:,.0f}", f"{x['shard_bytes'] / _GB:,.1f} GB",
     f"{x['start_seconds']:,.0f} s", f"{x['process_bytes'] / _GB:,.2f} GB",
     f"{x['host_bytes'] / _GB:,.1f} GB")
    for count, x in zip(wanted.shard_pairs, layouts, strict=True)
  ]  # fmt: skip
  head = ("pairs a shard", "shards", "each", "until the first record", "memory a process", "a host")
  return "## Each start, on each host\n\n" + table(head, rows)


def _flow(own: Measured, wanted: Wanted) -> str:
  found = [data_costs.flow(own, wanted, rate) for rate in wanted.rates]
  rows = [
    (f"{x['rate']:,.0f}", f"{x['epoch_hours']:,.1f} h", f"{x['bytes_a_second'] / _GB:,.1f} GB/s",
     f"{x['host_bytes_a_second'] / 1e6:,.0f} MB/s", f"{x['host_requests_a_second']:,.0f}",
     f"{x['host_cores']:,.1f}", f"{x['host_share']:.0%}")
    for x in found
  ]  # fmt: skip
  head = ("pairs a second", "an epoch", "read, in all", "a host", "reads a second, a host",
          "cores busy, a host", "of its cores")  # fmt: skip
  note = (
    "\nThe rates that are there without `--pairs-per-second` are what docs/preflight.md estimates\n"
  )
  note += "for ViT-L/14 and ViT-B/16 at a batch of 32,768 on 256 v5e chips. Beside each read of a\n"
  note += "pair, which is one request, stand two small ones of its index.\n"
  return "## All the time\n\n" + table(head, rows) + note


def main(arguments: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("--pairs", type=float, default=5e9)
  parser.add_argument("--hosts", type=int, default=64)
  parser.add_argument("--cores", type=int, default=56, help="a host (56)")
  parser.add_argument("--workers", type=int, default=32, help="processes a host (32)")
  parser.add_argument("--pairs-per-second", type=float, nargs="+", default=[41_500.0, 182_000.0])
  parser.add_argument("--shard-pairs", type=int, nargs="+", default=[10_000, 100_000])
  parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "docs")
  asked = parser.parse_args(arguments)
  wanted = Wanted(
    int(asked.pairs), asked.hosts, asked.cores, asked.workers,
    tuple(asked.pairs_per_second), tuple(asked.shard_pairs),
  )  # fmt: skip
  document = json.loads((asked.folder / "data_at_scale.json").read_text())
  metrics.write_atomically(asked.folder / "data_at_scale.md", page(document, wanted))


if __name__ == "__main__":
  main()
