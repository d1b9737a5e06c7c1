"""Sources -> mixture -> shuffle -> transform -> this host's rows of step n's batch -> global array.

Data is addressed by step: the batch of step n is a pure function of (sources, seed, batch size, n),
whatever the number of hosts, workers and restarts. There is no position to save.
"""

import collections
import contextlib
import ctypes
import dataclasses
import errno
import functools
import logging
import math
import multiprocessing
import multiprocessing.process
import queue
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from clip_jax import config as config_lib
from clip_jax.data import crops, images, places, records, scenes, storage, workers
from clip_jax.data.tokenizer import Tokenizer

# Without scaled_decode; raise it whenever the same record would give another example.
_TRANSFORM_VERSION = 1
_STALL_SECONDS = 600.0  # a loader that gives nothing for this long is taken for dead
_SLOW_SECONDS = 10.0  # after which people are told of a wait
_FIRST_LOOKS_SECONDS = 0.2  # between looks at worker processes that start, which takes longer
_LAST_WORDS_SECONDS = 5.0  # that an error of a worker may need to get here after the worker ended
_log = logging.getLogger(__name__)


class DataError(RuntimeError):
  """The data cannot be trained on: the loader hangs, or too many records are bad."""


def open_source(source: config_lib.Source, resolution: int, seed: int) -> records.RecordSource:
  """The records that a config's source names; drawn ones at `resolution` pixels."""
  if source.kind == "scenes":
    if source.records < 1:
      raise ValueError(
        "config.data.sources: kind 'scenes' needs records, the number of scenes to draw"
      )
    return scenes.Scenes(source.split, source.records, seed, max(resolution, 32))
  if source.kind == "digits":
    return scenes.Digits(source.split, max(resolution, 32))
  return places.open_files(source)


@dataclasses.dataclass(frozen=True)
class ToExample:
  """One decoded record -> one training example: a random square crop and one of its captions.

  A caption over the context length is cut. A record that cannot be made into an example is
  replaced by another of `records`, as a bad one is.
  """

  records: records.ResilientSource
  tokenizer: Tokenizer
  context_length: int
  resolution: int
  short_side: int
  source: int
  crop: Callable[..., np.ndarray]  # images.fit, or the faster crops.crop

  def __call__(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    while True:
      try:
        return self._example(record, rng)
      except Exception as error:  # of any kind: see records.ResilientSource
        record = self.records.replacement(record, error)

  def _example(self, record: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    caption = record["captions"][rng.integers(len(record["captions"]))]
    return {
      "image": self.crop(record["image"], self.resolution, self.short_side, rng),
      "tokens": self.tokenizer(caption, self.context_length, truncate=True)[0],
      "bad": np.int32(record["bad"]),
      "source": np.int32(self.source),
      "record": np.int64(record["index"]),
    }


def example_dataset(
  config: config_lib.Config, sources: Sequence[records.RecordSource], tokenizer: Tokenizer
) -> grain.MapDataset:
  """The endless sequence of training examples; element i is the same on every host and restart.

  Each source is shuffled anew every epoch and seen exactly once an epoch; sources are
  interleaved in the proportion of their weights.
  """
  resolution = config.model.image.resolution
  short_side = config.preprocess.train_short_side or resolution
  decode: Callable[[Any], Any] = images.as_image
  crop: Callable[..., np.ndarray] = images.fit
  if config.data.scaled_decode:
    decode, crop = functools.partial(crops.decode, short_side=short_side), crops.crop
  parts, weights = [], []
  for i, (source, settings) in enumerate(zip(sources, config.data.sources, strict=True)):
    if settings.weight <= 0:
      continue
    where = f"config.data.sources[{i}] ({settings.path or settings.kind})"
    resilient = records.ResilientSource(source, decode, where)
    to_example = ToExample(
      resilient,
      tokenizer,
      config.model.text.context_length,
      resolution,
      short_side,
      i,
      crop,
    )
    part = grain.MapDataset.source(resilient).seed(config.seed + i)
    parts.append(part.shuffle().repeat().random_map(to_example))
    weights.append(settings.weight)
  return grain.MapDataset.mix(parts, weights) if len(parts) > 1 else parts[0]


def host_batches(
  config: config_lib.Config,
  sources: Sequence[records.RecordSource],
  tokenizer: Tokenizer,
  start_step: int = 0,
  host: int = 0,
  hosts: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """This host's rows of the batches of steps `start_step`, `start_step + 1`, ... without end.

  Yields: image uint8 [B / hosts, R, R, 3], tokens int32 [B / hosts, L], and int [B / hosts]
    `bad` (cause code, 0 where the record was good), `source` and `record` (where it stands).
  Raises: ValueError when the hosts cannot share the batch evenly.
  """
  if config.data.batch_pairs % hosts:
    raise ValueError(
      f"config.data.batch_pairs: {config.data.batch_pairs} does not split over {hosts} hosts"
    )
  batches = example_dataset(config, sources, tokenizer).batch(config.data.batch_pairs // hosts)
  mine = batches[host + start_step * hosts :: hosts]
  count, prefetch = config.data.workers, config.data.prefetch_batches
  threads = 1 if count else config.data.threads
  stream = mine.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
  )
  if count:
    if not flags.FLAGS.is_parsed():  # grain's workers read absl's flags, which only absl.app parses
      flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=count, per_worker_buffer_size=prefetch)
    start = functools.partial(workers.start, workers.memory_bytes(config, hosts))
    stream = stream.mp_prefetch(options, worker_init_fn=start)
  return iter(stream)


def fingerprint(
  config: config_lib.Config, sources: Sequence[records.RecordSource], tokenizer: Tokenizer
) -> dict[str, Any]:
  """All that decides what the batch of step n holds, field by field, for a checkpoint to keep."""
  settings = zip(sources, config.data.sources, strict=True)
  return {
    "sources": [
      {"content": source.fingerprint, "records": len(source), "weight": s.weight}
      for source, s in settings
    ],
    "seed": config.seed,
    "batch_pairs": config.data.batch_pairs,
    "tokenizer": tokenizer.fingerprint,
    "context_length": config.model.text.context_length,
    "resolution": config.model.image.resolution,
    "train_short_side": config.preprocess.train_short_side,
    "transform_version": crops.VERSION if config.data.scaled_decode else _TRANSFORM_VERSION,
  }


def captions(sources: Sequence[records.RecordSource], limit: int = 20_000) -> Iterator[str]:
  """The captions of an evenly spaced sample of each source: what a vocabulary is trained on."""
  for source in sources:
    for i in range(0, len(source), max(1, len(source) // limit)):
      with contextlib.suppress(Exception):  # training will replace and count it
        yield from source[i].captions


class BadRecords:
  """How many records of a run were bad and replaced, by cause, and the first ten by name.

  Each host names what it sees itself; the counts are of all hosts and survive a restart.
  """

  def __init__(
    self,
    sources: Sequence[records.RecordSource],
    config: config_lib.Data,
    bad_records: Mapping[str, int] = types.MappingProxyType({}),
    seen_records: int = 0,
  ):
    self._sources, self._max_fraction = sources, config.max_bad_fraction
    self._bad, self._seen = collections.Counter(bad_records), seen_records
    self._names: list[str] = []

  def name(self, batch: dict[str, np.ndarray]) -> None:
    """Notes which records of this host's batch were replaced, and why."""
    for i in np.flatnonzero(batch["bad"])[: 10 - len(self._names)]:
      source = self._sources[batch["source"][i]]
      cause = records.CAUSES[batch["bad"][i]]
      self._names.append(f"{source.locate(int(batch['record'][i]))} ({cause})")
      _log.warning("bad record replaced: %s", self._names[-1])

  def count(self, by_cause: np.ndarray, seen: int) -> int:
    """Adds one global batch: its records by index into CAUSES. Returns: the bad ones of the run.

    Raises: DataError past the limit of the config.
    """
    self._bad.update({records.CAUSES[i]: int(by_cause[i]) for i in np.flatnonzero(by_cause) if i})
    self._seen += seen
    if self._bad.total() > max(10, self._max_fraction * self._seen):
      raise DataError(
        f"{self} are bad, over config.data.max_bad_fraction ({self._max_fraction:g}); the first on "
        f"this host: {'; '.join(self._names)}"
      )
    return self._bad.total()

  def __str__(self) -> str:
    causes = ", ".join(f"{cause} {n}" for cause, n in self._bad.most_common())
    return f"{self._bad.total()} of {self._seen} records" + (f" ({causes})" if causes else "")

  def counts(self) -> dict[str, Any]:
    """For a checkpoint to keep."""
    return {"bad_records": dict(self._bad), "seen_records": self._seen}


class Prefetcher:
  """Runs `batches` through `place` in a thread, a few ahead, and measures what the loop waits.

  An exception of the loader reaches the consumer and ends the stream for good (a loader that
  raised once has lost records, so it is never asked again); so does a worker process that ended.
  """

  def __init__(
    self,
    batches: Iterator[Any],
    place: Any,
    depth: int,
    stall_seconds: float = _STALL_SECONDS,
    slow_seconds: float = _SLOW_SECONDS,
  ):
    self.wait_seconds = 0.0  # spent in next(), in total
    self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    self._stall_seconds, self._slow_seconds = stall_seconds, slow_seconds
    self._look_seconds = _FIRST_LOOKS_SECONDS
    self._workers: dict[int | None, multiprocessing.process.BaseProcess] = {}
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._fill, args=(batches, place), daemon=True)
    self._thread.start()

  def _fill(self, batches: Iterator[Any], place: Any) -> None:
    try:
      for batch in batches:
        self._put((place(batch), None))
        if self._closed.is_set():
          return
      raise RuntimeError("the loader ended, though training data repeats without end")
    except BaseException as error:  # carried to the consumer, which ends the run
      # Kept for ever: its end may wait for a lock that a killed worker had.
      ctypes.pythonapi.Py_IncRef(ctypes.py_object(batches))
      self._put((None, error))

  def _put(self, item: tuple[Any, BaseException | None]) -> None:
    while not self._closed.is_set():
      try:
        self._queue.put(item, timeout=0.2)
        return
      except queue.Full:
        continue

  def __iter__(self) -> "Prefetcher":
    return self

  def __next__(self) -> Any:
    return self.take(lambda: False)

  def take(self, stopped: Callable[[], bool]) -> Any | None:
    """The next batch; None where `stopped`, asked every second of the wait, says so."""
    start = time.perf_counter()
    try:
      batch, error = self._get(start, stopped)
    finally:
      self.wait_seconds += time.perf_counter() - start
    self._ended_workers()  # for all of them to be known before one ends
    self._look_seconds = 1.0
    if error is None:
      return batch
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
      raise DataError(f"{workers.NO_MEMORY} ({str(error) or type(error).__name__})") from error
    if isinstance(error, RuntimeError) and (ended := self._ended_workers()):
      raise DataError(f"{ended}; the loader says: {error}") from error
    raise error

  def _get(self, start: float, stopped: Callable[[], bool]) -> tuple[Any, BaseException | None]:
    """Waits for what the thread hands on. Raises: DataError where nothing more will come."""
    told, ended_since = False, math.inf
    while True:
      waited = time.perf_counter() - start
      pause = min(self._look_seconds, self._stall_seconds - waited, self._slow_seconds)
      try:
        return self._queue.get(timeout=max(0.0, pause))
      except queue.Empty:
        waited = time.perf_counter() - start
      if stopped():
        return None, None
      if waited >= self._stall_seconds:
        said = storage.failures.newest()  # of threads; worker processes have logged theirs
        why = f"; a store's last answer: {said}" if said else ""
        raise DataError(
          f"no batch for {self._stall_seconds:.0f} s: a loader or its storage hangs{why}"
        )
      if waited >= self._slow_seconds and not told:
        told = True
        _log.warning("waiting for data for %.0f s: slow storage?", waited)
      if ended := self._ended_workers():  # an exit code of 0 is no failure to grain, which waits on
        ended_since = min(ended_since, waited)
        if waited - ended_since >= _LAST_WORDS_SECONDS:
          raise DataError(f"{ended}; its records are missing, so nothing more is read")

  def _ended_workers(self) -> str:
    """Names the worker processes that have ended, which none should; empty: all live."""
    for child in multiprocessing.active_children():
      if child.name.startswith("grain"):
        self._workers[child.pid] = child
    ended = [
      f"{pid} (exit code {w.exitcode})" for pid, w in self._workers.items() if not w.is_alive()
    ]
    return f"of {len(self._workers)} worker processes ended: {', '.join(ended)}" if ended else ""

  def close(self) -> None:
    """Stops the thread; the loader's own threads and workers end with its iterator."""
    self._closed.set()
    self._thread.join(timeout=5.0)
