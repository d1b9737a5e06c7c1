"""Data by step in worker processes and hosts; damage in shards; what a bad record costs."""

import random
import time

import numpy as np
import pytest
import test_pipeline
import test_records

from clip_jax.data import records

folder = test_records.folder


@pytest.fixture(scope="module")
def reference():
  return test_pipeline._batches(12)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_agrees(reference, workers, drill):
  """Drill 1; with 2 workers on every push."""
  found = test_pipeline._batches(12, test_pipeline._with_workers(workers))
  differing = test_pipeline._differing(found, reference)
  drill(1, steps=12, mismatches=differing)
  assert differing == 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_by_workers_agree(reference, hosts, workers, drill):
  """Drill 3: from step 5 on, of a mixture of two sources."""
  config = test_pipeline._with_workers(workers)
  parts = [
    test_pipeline._batches(6, config, start=5, host=host, hosts=hosts) for host in range(hosts)
  ]
  joined = [
    {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    for rows in zip(*parts, strict=True)
  ]
  differing = test_pipeline._differing(joined, reference[5:11])
  drill(3, batches=6, equal=6 - differing)
  assert {0, 1} == set(np.unique(joined[0]["source"]))
  assert differing == 0


def test_the_cost_of_a_bad_record(drill):
  """Drill 5: one in twenty, of four kinds, against the same records without damage."""
  good = [test_records._record(i) for i in range(2000)]
  whole, faulty = (
    records.ResilientSource(source)
    for source in (records.MemorySource(good, "good"), test_records._Faulty(good, "faulty"))
  )
  bad = [i for i in range(len(good)) if faulty[i]["bad"]]
  assert len(bad) == 100

  def seconds(source):
    start = time.perf_counter()
    for i in bad:
      source[i]
    return time.perf_counter() - start

  cost = min(seconds(faulty) for _ in range(5)) - min(seconds(whole) for _ in range(5))
  drill(5, most_milliseconds=1000 * cost / len(bad))


def test_a_bit_flipped_anywhere_in_a_shard(folder, drill):
  """Drill 7: a read of all records finds it, or it lies where nothing is read.

  Not in the padding: these small shards are mostly zeros.
  """
  shard = folder / "train-00000-of-00002.array_record"
  good, rng = shard.read_bytes(), random.Random(0)
  expected = [test_records._record(i) for i in range(30)]
  filled = [at for at, byte in enumerate(good) if byte]
  detected = harmless = 0
  for _ in range(100):
    data = bytearray(good)
    data[rng.choice(filled)] ^= 1 << rng.randrange(8)
    shard.write_bytes(data)
    source = records.ArrayRecordSource(folder, "train")
    told = ""
    try:
      found = [source[i] for i in range(30)]
    except records.RecordError as error:
      told = str(error)
    if told:
      assert shard.name in told
      detected += 1
    else:
      assert found == expected, "damaged data was taken for good"
      harmless += 1
  drill(7, injected=100, detected=detected, harmless=harmless)
  assert detected > 80
