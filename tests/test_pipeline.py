"""Batches addressed by step: the same for any restart, host count and worker count (drills 1-6)."""

import collections
import dataclasses
import errno
import io
import itertools
import logging
import multiprocessing
import re
import threading
import time

import numpy as np
import pytest
from PIL import Image

from clip_jax import config as c
from clip_jax.data import pipeline, records, scenes
from clip_jax.data import tokenizer as tokenizer_lib

CONFIG = c.Config(
  seed=3,
  model=c.Model(
    image=c.Vision(resolution=24, patch=8, width=16, layers=1, heads=2),
    text=c.Text(context_length=10, vocab_size=49408, width=16, layers=1, heads=2),
  ),
  preprocess=c.Preprocess(train_short_side=28),
  data=c.Data(
    sources=(
      c.Source(kind="scenes", records=40, weight=3.0),
      c.Source(kind="digits", weight=1.0),
    ),
    batch_pairs=16,
  ),
)
SOURCES = [scenes.Scenes("train", 40), scenes.Digits("train")]


def _batches(count, config=CONFIG, sources=None, start=0, host=0, hosts=1):
  stream = pipeline.host_batches(
    config, sources or SOURCES, tokenizer_lib.original(), start, host, hosts
  )
  return list(itertools.islice(stream, count))


def _with_workers(workers):
  return dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, workers=workers))


def _assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_array_equal(x[name], y[name])


def _differing(a, b):
  """How many of the batches differ in any array, after the same number of them."""
  return sum(
    any(not np.array_equal(x[name], y[name]) for name in x | y) for x, y in zip(a, b, strict=True)
  )


@pytest.fixture(scope="module")
def reference():
  return _batches(12)


def test_shapes_and_dtypes(reference):
  batch = reference[0]
  assert batch["image"].shape == (16, 24, 24, 3)
  assert batch["image"].dtype == np.uint8
  assert batch["tokens"].shape == (16, 10)
  assert batch["tokens"].dtype == np.int32
  assert (batch["tokens"][:, 0] == 49406).all()
  assert not batch["bad"].any()


def test_two_runs_agree(reference, drill):
  again = _batches(12)
  drill(1, steps=12, mismatches=_differing(again, reference))
  _assert_same(again, reference)


def test_every_restart_continues(reference, drill):
  """Drill 2: restored at every step, images and captions (the random draws) included."""
  for start in range(12):
    found = _batches(12 - start, start=start)
    drill(2, starts=1, steps=len(found), mismatches=_differing(found, reference[start:]))
    _assert_same(found, reference[start:])


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("start", [0, 5])
def test_any_number_of_hosts_agrees(reference, hosts, start, drill):
  """Drill 3: the hosts' rows, one host after the other, are the one host's batch."""
  parts = [_batches(4, start=start, host=host, hosts=hosts) for host in range(hosts)]
  for step, rows in enumerate(zip(*parts, strict=True)):
    joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    drill(3, batches=1, equal=1 - _differing([joined], [reference[start + step]]))
    _assert_same([joined], [reference[start + step]])


def test_worker_processes_agree(reference, drill):
  found = _batches(6, _with_workers(2))
  drill(1, steps=6, mismatches=_differing(found, reference[:6]))
  _assert_same(found, reference[:6])
  _assert_same(_batches(3, _with_workers(2), start=5, host=1, hosts=2), [
    {name: value[8:] for name, value in batch.items()} for batch in reference[5:8]
  ])  # fmt: skip


def test_the_seed_changes_the_order_and_nothing_is_constant(reference):
  other = _batches(1, dataclasses.replace(CONFIG, seed=4))[0]
  assert (other["record"] != reference[0]["record"]).any()
  assert (reference[0]["image"] != reference[1]["image"]).any()


def test_epochs_are_exact():
  """Each record once an epoch, in a new order every epoch, across batches."""
  data = dataclasses.replace(CONFIG.data, sources=CONFIG.data.sources[:1])
  config = dataclasses.replace(CONFIG, data=data)
  seen = np.concatenate([b["record"] for b in _batches(10, config, SOURCES[:1])])
  epochs = seen[:160].reshape(4, 40)
  for epoch in epochs:
    assert sorted(epoch) == list(range(40))
  assert (epochs[0] != epochs[1]).any()


@pytest.mark.parametrize(
  "weights",
  [(3.0, 1.0), (1e-3, 1e3), (0.7, 0.003, 1.9, 0.01), (0.37, 1.9, 0.05, 0.11, 2.3)],
  ids=str,
)
def test_the_mixture_has_its_weights(weights):
  """After every record each source is as near its share as there are other sources."""
  part = (records.Record("one", np.zeros((30, 30, 3), np.uint8), ("one",)),)
  sources = [records.MemorySource(part * 5000, f"{i}") for i in range(len(weights))]
  config = _replace_data(CONFIG, sources=tuple(c.Source(weight=w) for w in weights))
  seen = pipeline.example_dataset(config, sources, tokenizer_lib.original())
  shares, most = np.array(weights) / sum(weights), len(weights) - 1
  for start in (0, 50_000):
    source = np.array([seen[start + k]["source"] for k in range(400)])
    counts = np.cumsum(source[:, None] == np.arange(len(weights)), axis=0)
    off = np.abs(counts - np.arange(1, 401)[:, None] * shares).max()
    assert off <= (2 * most if start else most)  # what came before may be as far off


def test_captions_and_crops_are_drawn_anew_at_every_visit():
  one = [records.MemorySource([SOURCES[0][0]], "one")]
  data = dataclasses.replace(CONFIG.data, sources=CONFIG.data.sources[:1])
  batch = _batches(1, dataclasses.replace(CONFIG, data=data), one)[0]
  assert len(np.unique(batch["tokens"], axis=0)) > 1
  assert len(np.unique(batch["image"].reshape(16, -1), axis=0)) > 1


def _photos():
  """JPEGs of 70 x 64 pixels of noise, which crops of 28 need at half their size."""
  rng, found = np.random.default_rng(0), []
  for i in range(4):
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 70, 3)).astype(np.uint8)).save(out, "JPEG")
    found.append(records.Record(f"{i}", out.getvalue(), (f"photo {i}",)))
  return records.MemorySource(found, "photos")


@pytest.mark.parametrize("scaled", [True, False])
def test_jpegs_are_decoded_as_the_config_says(scaled):
  """The crops come from the right pixels, and are the same in worker processes."""
  photos = _photos()
  config = _replace_data(CONFIG, sources=CONFIG.data.sources[:1], scaled_decode=scaled)
  batches = _batches(2, config, [photos])
  for image, index in zip(batches[0]["image"], batches[0]["record"], strict=True):
    file = Image.open(io.BytesIO(photos[index].image))
    if scaled:
      file.draft(None, (28, 28))
      assert file.size == (35, 32)
    resized = np.asarray(file.resize((30, 28), Image.Resampling.BICUBIC)).astype(int)
    squares = [resized[y : y + 24, x : x + 24] for y in range(5) for x in range(7)]
    nearest = min(np.abs(square - image).max() for square in squares)
    assert nearest <= 1 if scaled else nearest == 0
  _assert_same(_batches(2, _replace_data(config, workers=2), [photos]), batches)


def test_hosts_must_divide_the_batch():
  with pytest.raises(ValueError, match="16 does not split over 3 hosts"):
    _batches(1, hosts=3)


class _Hostile(records.MemorySource):
  """Records 0, 20, 40, ... are bad in five ways (drill 5: 5 %)."""

  def __getitem__(self, index):
    record = super().__getitem__(index)
    if index % 20:
      return record
    kind = index // 20 % 5
    if kind == 0:
      raise StopIteration
    if kind == 4 and multiprocessing.parent_process() is None:
      raise MemoryError
    if kind == 4:  # twice a worker's limit: had at once where there is none, as it is not touched
      return dataclasses.replace(record, image=np.zeros((2, 2**15, 2**14, 2), np.uint8)[0, :8, :8])
    if kind == 1:
      return dataclasses.replace(record, image=b"not an image")
    if kind == 2:
      return dataclasses.replace(record, captions=(" ",))
    raise OSError("the disk says no")


def _hostile_sources():
  drawn = scenes.Scenes("train", 400)
  return [_Hostile([drawn[i] for i in range(400)], "hostile")]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_records_are_replaced_and_counted_exactly(workers, drill):
  data = dataclasses.replace(
    CONFIG.data,
    sources=CONFIG.data.sources[:1],
    workers=workers,
    batch_pairs=20,
    worker_memory_gib=1.0,
  )
  config = dataclasses.replace(CONFIG, data=data)
  batches = _batches(20, config, _hostile_sources())
  causes = collections.Counter(records.CAUSES[i] for b in batches for i in b["bad"] if i)
  assert causes == dict.fromkeys(("record", "unreadable", "caption", "storage", "memory"), 4)
  drill(5, injected=20, counted=causes.total(), most_causes=len(causes))
  halves = [_batches(20, config, _hostile_sources(), host=h, hosts=2) for h in range(2)]
  for step, rows in enumerate(zip(*halves, strict=True)):
    joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    _assert_same([joined], [batches[step]])


def test_a_record_that_no_example_can_be_made_of_is_replaced():
  """Its image decodes, but its only caption is an entity of 5,000 digits: nothing reads that."""
  pixels = np.zeros((8, 8, 3), np.uint8)
  captions = ["a fine caption"] * 20
  captions[3] = f"&#{'9' * 5000};"
  source = records.MemorySource(
    [records.Record(f"{i}", pixels, (text,)) for i, text in enumerate(captions)], "memory"
  )
  data = dataclasses.replace(CONFIG.data, sources=CONFIG.data.sources[:1], batch_pairs=20)
  first = _batches(1, dataclasses.replace(CONFIG, data=data), [source])[0]
  again = _batches(1, dataclasses.replace(CONFIG, data=data), [source])[0]
  assert [records.CAUSES[i] for i in first["bad"] if i] == ["caption"]
  assert first["record"][first["bad"] != 0].tolist() == [3]
  np.testing.assert_array_equal(first["tokens"], again["tokens"])


def test_too_many_bad_records_stop_the_run_and_are_named(drill):
  sources = _hostile_sources()
  bad = pipeline.BadRecords(sources, c.Data(max_bad_fraction=0.01))
  data = dataclasses.replace(CONFIG.data, sources=CONFIG.data.sources[:1])
  batches = _batches(40, dataclasses.replace(CONFIG, data=data), sources)

  def count_all():
    for step, batch in enumerate(batches, start=1):
      drill(6, most_steps=step)
      bad.name(batch)
      bad.count(np.bincount(batch["bad"], minlength=len(records.CAUSES)), len(batch["bad"]))

  with pytest.raises(
    pipeline.DataError, match=r"1\d of \d+ records \(.*caption.*\) are bad.*hostile"
  ) as error:
    count_all()
  named = str(error.value).partition("the first on this host: ")[2]
  assert len(named.split("; ")) == 10
  assert sum(bad.counts()["bad_records"].values()) > 10
  _assert_a_wholly_bad_source_is_named(drill)


def _assert_a_wholly_bad_source_is_named(drill):
  """Also where it is one record in a hundred of the mixture."""
  drawn = scenes.Scenes("train", 40)
  broken = [dataclasses.replace(drawn[0], key=f"{i}", image=b"no image") for i in range(40)]
  both = [SOURCES[0], records.MemorySource(broken, "broken")]
  mixture = (c.Source(kind="scenes"), c.Source(path="/data/broken", weight=0.01))
  for used, steps in ((mixture, 7), ((c.Source(weight=0.0), mixture[1]), 1)):
    config = _replace_data(CONFIG, sources=used)
    with pytest.raises(records.RecordError, match="and no substitute") as error:
      _batches(steps, config, both)
    assert str(error.value).startswith("config.data.sources[1] (/data/broken): a bad record")
    named = re.findall(r"broken record (\d+) \(unreadable\)", str(error.value))
    assert len(set(named)) == len(named) == 10
    drill(6, most_steps=steps)


MUTATIONS = {
  "seed": lambda k: dataclasses.replace(k, seed=9),
  "batch_pairs": lambda k: _replace_data(k, batch_pairs=32),
  "context_length": lambda k: dataclasses.replace(
    k, model=dataclasses.replace(k.model, text=dataclasses.replace(k.model.text, context_length=9))
  ),
  "resolution": lambda k: dataclasses.replace(
    k, model=dataclasses.replace(k.model, image=dataclasses.replace(k.model.image, resolution=32))
  ),
  "train_short_side": lambda k: dataclasses.replace(k, preprocess=c.Preprocess()),
  "transform_version": lambda k: _replace_data(k, scaled_decode=False),
  "sources": lambda k: _replace_data(
    k, sources=(dataclasses.replace(k.data.sources[0], weight=2.0), k.data.sources[1])
  ),
}


def _replace_data(config, **fields):
  return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


@pytest.mark.parametrize("field", MUTATIONS)
def test_the_fingerprint_names_each_change(field, drill):
  """Drill 4, with another dataset and another vocabulary below."""
  tokenizer = tokenizer_lib.original()
  before = pipeline.fingerprint(CONFIG, SOURCES, tokenizer)
  after = pipeline.fingerprint(MUTATIONS[field](CONFIG), SOURCES, tokenizer)
  assert {name for name in before if before[name] != after[name]} == {field}
  drill(4, changed=1, named=1)


def test_the_fingerprint_sees_the_records_and_the_vocabulary(drill, monkeypatch):
  tokenizer = tokenizer_lib.original()
  before = pipeline.fingerprint(CONFIG, SOURCES, tokenizer)
  others = [scenes.Scenes("train", 41), SOURCES[1]]
  assert pipeline.fingerprint(CONFIG, others, tokenizer)["sources"] != before["sources"]
  small = tokenizer_lib.train(["a red circle", "a blue square"], 530)
  assert pipeline.fingerprint(CONFIG, SOURCES, small)["tokenizer"] != before["tokenizer"]
  monkeypatch.setattr(pipeline.crops, "VERSION", 99)
  after = pipeline.fingerprint(CONFIG, SOURCES, tokenizer)
  assert {name for name in before if before[name] != after[name]} == {"transform_version"}
  drill(4, changed=3, named=3)


def test_the_prefetcher_hands_on_batches_and_errors():
  def batches():
    yield 1
    yield 2
    raise RuntimeError("worker 3 was killed")

  stream = pipeline.Prefetcher(batches(), lambda x: 10 * x, depth=1)
  assert (next(stream), next(stream)) == (10, 20)
  with pytest.raises(RuntimeError, match="worker 3 was killed"):
    next(stream)
  stream.close()


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_memory_that_is_short_in_the_loader_is_told_with_what_to_do(error):
  def batches():
    yield 1
    raise error

  stream = pipeline.Prefetcher(batches(), lambda x: x, depth=1)
  assert next(stream) == 1
  with pytest.raises(pipeline.DataError, match=r"config\.data\.worker_memory_gib.*emory"):
    next(stream)
  stream.close()


def test_the_prefetcher_does_not_wait_for_ever(monkeypatch):
  monkeypatch.setattr(pipeline.storage, "failures", pipeline.storage.Failures())
  pipeline.storage.failures.add("gs://a/0.tar: bytes 5-9: 503")
  release = threading.Event()

  def hangs():
    release.wait()
    yield 1

  stream = pipeline.Prefetcher(hangs(), lambda x: x, depth=1, stall_seconds=0.05)
  with pytest.raises(pipeline.DataError, match=r"no batch for .* answer: gs://a/0\.tar: .* 503"):
    next(stream)
  release.set()
  stream.close()


def test_slow_storage_is_told_and_counted(caplog, drill):
  """Drill 10. The storage gives a batch when the wait for it was told, and not before."""
  told = threading.Event()

  class Listener(logging.Handler):
    def emit(self, record):
      told.set()

  def batches():
    told.wait()
    yield 1
    yield 2

  listener, logger = Listener(), logging.getLogger("clip_jax.data.pipeline")
  logger.addHandler(listener)
  limit = 0.2
  stream = pipeline.Prefetcher(batches(), lambda x: x, depth=1, slow_seconds=limit)
  start = time.perf_counter()
  try:
    assert [next(stream), next(stream)] == [1, 2]
  finally:
    logger.removeHandler(listener)
    told.set()
    stream.close()
  assert len(re.findall("waiting for data for .* slow storage", caplog.text)) == 1
  assert limit <= stream.wait_seconds <= time.perf_counter() - start
  share = stream.wait_seconds / (time.perf_counter() - start)
  drill(10, most_share=share, most_limit=limit, most_usual=pipeline._SLOW_SECONDS)


def test_an_endless_stream_that_ends_is_an_error():
  stream = pipeline.Prefetcher(iter([]), lambda x: x, depth=1)
  with pytest.raises(RuntimeError, match="the loader ended"):
    next(stream)
  stream.close()


def test_scenes_need_a_count():
  with pytest.raises(ValueError, match="needs records"):
    pipeline.open_source(c.Source(kind="scenes"), 32, 0)
