"""What training on very many pairs takes, from what the benches measured of one record.

All of it is plain multiplication; tools/data_plan.py writes it down.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

_BLOCK = 512  # bytes of a tar file's header, and what a member is filled up to
_MEMBERS = 3  # of a pair as img2dataset writes it: image, text, JSON
_TEXT_BYTES, _JSON_BYTES = 60, 500
_BENCH_SHARD_PAIRS = 10_000  # in tools/bench/sources.py's start over many records
_HOUR = 3600.0


@dataclasses.dataclass(frozen=True)
class Measured:
  """Figures of one record or one shard, on one core."""

  image_bytes: float  # of a JPEG of 512 x 512 pixels
  crops: float  # training crops a second, with tokens
  member_seconds: float  # of one core, to index a tar file's member
  index_bytes: float  # a pair
  row_seconds: float  # to look a pair up in an index
  shard_seconds: float  # of a start, to open a shard's index
  shard_bytes: float  # of memory for it, in each process
  prepared: Mapping[str, float]  # pairs a second, by pass
  search_bytes: float  # of memory an image, to find near duplicates
  start_records: int  # over which a start was measured


@dataclasses.dataclass(frozen=True)
class Wanted:
  pairs: int
  hosts: int
  cores: int  # a host
  workers: int  # processes a host that read data
  rates: tuple[float, ...]  # pairs a second, of all hosts
  shard_pairs: tuple[int, ...]


def measured(document: Mapping[str, Any]) -> Measured:
  """Of the benches' figures. Raises: KeyError naming one that is not there."""
  images, sources, prepare = (document[name] for name in ("images", "sources", "prepare"))
  members, _ = _counted(sources, r"index of ([\d,]+) members, seconds")
  records, start = _counted(sources, r"start of an epoch over ([\d,]+) records, seconds")
  shards = records / _BENCH_SHARD_PAIRS
  memory = sources["  memory at its peak, MB"] - sources["  of which before"]
  return Measured(
    image_bytes=images["bytes an image"],
    crops=images["images a second, loader"],
    member_seconds=sources["  of one core"] / members,
    index_bytes=sources["  bytes a pair"],
    row_seconds=sources["  a row read from it, microseconds"] / 1e6,
    shard_seconds=start / shards,
    shard_bytes=memory * 1e6 / shards,
    prepared=prepare["pairs_a_second"],
    search_bytes=prepare["near_duplicates"]["bytes_an_image"],
    start_records=records,
  )


def _counted(figures: Mapping[str, float], pattern: str) -> tuple[int, float]:
  """The number in the name of the one figure whose name is like that, and the figure."""
  for name, value in figures.items():
    if match := re.fullmatch(pattern, name):
      return int(match[1].replace(",", "")), value
  raise KeyError(pattern)


def pair_bytes(image_bytes: float) -> int:
  """Of a pair in a tar file: each member has a header and is filled up to whole blocks."""
  sizes = (image_bytes, _TEXT_BYTES, _JSON_BYTES)
  return sum(_BLOCK + _BLOCK * math.ceil(size / _BLOCK) for size in sizes)


def layout(own: Measured, wanted: Wanted, shard_pairs: int) -> dict[str, float]:
  """Shards of so many pairs: how many, bytes of each, seconds and memory of a start on one host."""
  shards = math.ceil(wanted.pairs / shard_pairs)
  return {
    "shards": shards,
    "shard_bytes": shard_pairs * pair_bytes(own.image_bytes),
    "start_seconds": shards * own.shard_seconds,
    "process_bytes": shards * own.shard_bytes,
    "host_bytes": shards * own.shard_bytes * (1 + wanted.workers),
  }


def once(own: Measured, wanted: Wanted) -> dict[str, float]:
  """What is paid before the first step: disk, the indexes, and each pass of a preparation."""
  index_hours = wanted.pairs * _MEMBERS * own.member_seconds / _HOUR
  out = {
    "disk_bytes": wanted.pairs * pair_bytes(own.image_bytes),
    "index_bytes": wanted.pairs * own.index_bytes,
    "index_core_hours": index_hours,
    "index_hours": index_hours / wanted.hosts,  # one process a host makes them
    "search_bytes": wanted.pairs * own.search_bytes,
  }
  for name, rate in own.prepared.items():
    out[f"{name}: core-hours"] = wanted.pairs / rate / _HOUR
    out[f"{name}: hours"] = wanted.pairs / rate / _HOUR / (wanted.hosts * wanted.cores)
  return out


def flow(own: Measured, wanted: Wanted, rate: float) -> dict[str, float]:
  """What training at so many pairs a second takes all the time, of all hosts and of each."""
  cores = rate * (1 / own.crops + own.row_seconds)
  return {
    "rate": rate,
    "epoch_hours": wanted.pairs / rate / _HOUR,
    "bytes_a_second": rate * pair_bytes(own.image_bytes),
    "host_bytes_a_second": rate * pair_bytes(own.image_bytes) / wanted.hosts,
    "host_requests_a_second": rate / wanted.hosts,  # image and caption are read at once
    "host_cores": cores / wanted.hosts,
    "host_share": cores / wanted.hosts / wanted.cores,
  }
