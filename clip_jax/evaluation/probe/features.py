"""What an encoder gives for the records of a source, kept on disk by its content."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from clip_jax import hosts
from clip_jax.data import images, records
from clip_jax.evaluation import encoding
from clip_jax.evaluation.probe import feature_file

# "embedding": of unit norm, projected. "penultimate": before the projection, a linear probe's.
KINDS = ("embedding", "penultimate")
# What a probe is called by -> the kind of its features. The paper's are "penultimate", as they are;
# "projected" is what other tools probe.
PROBED = {"penultimate": "penultimate", "projected": "embedding"}

_FORMAT = "features/1"  # part of every key: raise it when the same key would mean other values
_BATCHES = 16  # in a chunk


@dataclasses.dataclass(frozen=True)
class Features:
  """Rows float32 [N, D] of records, and what these say. The rows may lie on the disk, read-only."""

  rows_ND: np.ndarray
  labels: tuple[str | None, ...]
  captions: tuple[tuple[str, ...], ...]
  indices: np.ndarray  # int64 [N]: the records' places in the source
  left_out: tuple[str, ...]  # where the records stand whose image cannot be decoded


def encode(
  model: encoding.FeatureModel,
  source: records.RecordSource,
  kind: str,
  batch: int,
  cache_dir: str | os.PathLike[str] | None,
  weights_hash: str,
  limit: int = 0,
  *,
  skip_unreadable: bool = False,
  progress: Callable[[int, int], None] | None = None,
) -> Features:
  """Features of one of KINDS for the first `limit` records of `source` (0: all).

  Holds a chunk of images and of rows in memory, whatever N; without a cache, and on all processes
  but the first, all rows. Every process must call it with the same arguments; the first one reads
  and writes the cache and tells the others what is in it.
  Args: weights_hash, of the weights and all else that `model` computes by; skip_unreadable, leaves
    records out whose image cannot be decoded (each process then decodes all images); progress, is
    told how many records are done and how many there are.
  Raises: EvaluationError naming the record that is bad or whose features are not finite, on
    another kind, without a weights_hash, or when another run is writing the same; OSError with the
    file's name when it cannot be written: what is there then is kept.
  """
  if kind not in KINDS:
    raise encoding.EvaluationError(f"features {kind!r}: choose one of {', '.join(KINDS)}")
  if cache_dir is not None and not weights_hash:
    raise encoding.EvaluationError("weights_hash is empty: the cache could not tell the weights")
  n, step = encoding.count(source, batch, limit), _BATCHES * batch
  opened: contextlib.AbstractContextManager[feature_file.FeatureFile | None]
  opened = contextlib.nullcontext()
  if cache_dir is not None and jax.process_index() == 0:
    key = cache_key(model, source, kind, weights_hash)
    opened = feature_file.opened(pathlib.Path(cache_dir), key, n)
  with contextlib.ExitStack() as stack:
    file = encoding.agreed(lambda: stack.enter_context(opened))
    chunks, parts = _kept(file)
    done = sum(chunk.rows for chunk in chunks)
    while done < n:
      if progress is not None:
        progress(done, n)
      part = _Part(source, range(done, min(done + step, n)), skip_unreadable)
      rows_bD, labels, captions = _encode(model, part, kind, batch)
      chunk = feature_file.chunk(rows_bD, labels, captions, part.unreadable)
      if file is not None:
        file.append(rows_bD, chunk)
      else:
        parts.append(rows_bD)
      chunks.append(chunk)
      done += chunk.rows
    rows_ND = np.concatenate(parts)[:n] if file is None else file.rows()
  if progress is not None:
    progress(n, n)
  return _whole(source, rows_ND, chunks, skip_unreadable)


def cache_key(
  model: encoding.Model, source: records.RecordSource, kind: str, weights_hash: str
) -> str:
  """sha256 over all that the features depend on; the platform too, whose bfloat16 rounds."""
  preprocessing = repr((getattr(model, "preprocess", ""), getattr(model, "resolution", "")))
  platform = jax.default_backend()
  parts = [_FORMAT, weights_hash, source.fingerprint, kind, preprocessing, platform]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _kept(
  file: feature_file.FeatureFile | None,
) -> tuple[list[feature_file.Chunk], list[np.ndarray]]:
  """The chunks that the first process has in its file, and their rows where they are in no file."""
  chunks, parts = list(file.chunks) if file else [], []
  if jax.process_count() > 1:
    told = json.dumps([dataclasses.asdict(chunk) for chunk in chunks])
    told = hosts.from_first(told.encode()).decode()
    chunks = [feature_file.Chunk(**chunk) for chunk in json.loads(told)]
    for k, chunk in enumerate(chunks):
      data = hosts.from_first(file.read(k) if file else b"")
      if file is None:
        parts.append(np.frombuffer(data, np.float32).reshape(chunk.rows, chunk.width))
  return chunks, parts


def _encode(
  model: encoding.FeatureModel, part: "_Part", kind: str, batch: int
) -> tuple[np.ndarray, list[str | None], list[Sequence[str]]]:
  """Rows, labels and captions of the records of a part."""
  labels: list[str | None] = []
  captions: list[Sequence[str]] = []

  def visit(i: int, record: records.Record) -> None:
    del i
    labels.append(record.label)
    captions.append(record.captions)

  run = encoding.encode_features if kind == "penultimate" else encoding.encode_images
  rows_bD = run(model, part, len(part), batch, visit)
  bad = np.zeros(len(part), np.int32)
  bad[part.unreadable] = 1
  part.unreadable = np.flatnonzero(hosts.sum_over_hosts(bad)).tolist()  # on any process
  return rows_bD, labels, captions


def _whole(
  source: records.RecordSource,
  rows_ND: np.ndarray,
  chunks: Sequence[feature_file.Chunk],
  skip_unreadable: bool,
) -> Features:
  """The chunks together, without the records that are left out."""
  n = len(rows_ND)
  labels = [label for chunk in chunks for label in chunk.labels][:n]
  captions = [tuple(own) for chunk in chunks for own in chunk.captions][:n]
  starts = np.cumsum([0, *(chunk.rows for chunk in chunks)])
  pairs = zip(starts, chunks, strict=False)
  bad = sorted(int(start) + i for start, c in pairs for i in c.unreadable if start + i < n)
  if not bad:
    return Features(rows_ND, tuple(labels), tuple(captions), np.arange(n), ())
  where = tuple(source.locate(i) for i in bad)
  if not skip_unreadable:
    raise encoding.EvaluationError(
      f"{where[0]}: image cannot be decoded (as {len(bad)} of {n}); repair it, because an "
      "evaluation that leaves records out cannot be compared with any other"
    )
  good = np.setdiff1d(np.arange(n), bad)
  if not len(good):
    raise encoding.EvaluationError(f"{where[0]}: image cannot be decoded, nor any other of {n}")
  kept_labels, kept_captions = tuple(labels[i] for i in good), tuple(captions[i] for i in good)
  return Features(rows_ND[good], kept_labels, kept_captions, good, where)


class _Part:
  """Some records of a source, as a source. Where they are skipped, `unreadable` gathers places."""

  fingerprint = ""  # of no use to an encoder

  def __init__(self, source: records.RecordSource, rows: range, skip: bool):
    self._source, self._rows, self._skip = source, rows, skip
    self.unreadable: list[int] = []

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> records.Record:
    record = self._source[self._rows[index]]
    if not self._skip:
      return record
    try:
      pixels_HW3 = np.asarray(images.as_image(record.image))
    except images.ImageError:
      self.unreadable.append(index)
      pixels_HW3 = np.zeros((8, 8, 3), np.uint8)  # its row is encoded, and left out later
    return dataclasses.replace(record, image=pixels_HW3)

  def locate(self, index: int) -> str:
    return self._source.locate(self._rows[index])
