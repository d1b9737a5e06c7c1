"""Train-test overlap: which images of an evaluation set training has seen, and what that is worth.

Near duplicates are found by a perceptual hash or by an embedding, the nearest training image of
each evaluated one. The training data is read once, part by part: what stays in memory is one hash
or embedding of every evaluated image, those of one part of the training images, and one block of
either side's distances. With a cache folder hashes and embeddings are kept there as soon as they
are made, by the content of the data: a killed search goes on.
Source: section 5 and figure 17.
Differs: the paper's detector is a model of its own, trained for it, with a threshold per dataset
that people set by looking at pairs; here it is a hash or any image encoder, and the threshold is an
argument. Look at the pairs before you believe a threshold.
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.fft

from clip_jax.data import images, records
from clip_jax.evaluation import encoding
from clip_jax.evaluation.probe import features

HASH_BITS = 64
_HASH_SIDE = 32  # pixels that the hash looks at, a side
_LOW = 8  # frequencies that it keeps, a side
_LUMA = np.array([0.299, 0.587, 0.114])  # of red, green, blue. Source: ITU-R BT.601
_HASH = "perceptual hash/1"  # part of what hashes are kept by: raise it when they change
_PART = 32768  # training records whose hashes or embeddings are in memory, and in one file
_UNREADABLE = "cannot be decoded"  # the label under which a training record is kept

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Match:
  """An evaluated image and its nearest training image.

  `distance` is in bits of the hash, or 1 - cosine: the less, the more alike.
  """

  index: int  # of the evaluated record
  key: str
  train_index: int
  train_key: str
  distance: float


@dataclasses.dataclass(frozen=True)
class Matches:
  """All pairs at most `threshold` apart, in the order of the evaluated records."""

  pairs: tuple[Match, ...]
  threshold: float
  evaluated: int  # images
  trained: int  # images, of which `unreadable` could not be compared
  unreadable: int

  def overlapping(self, threshold: float | None = None) -> np.ndarray:
    """bool [N]: which evaluated records have a pair, at a stricter threshold if one is given.

    Raises: EvaluationError for a threshold over that of the search, which found no such pairs.
    """
    limit = self.threshold if threshold is None else threshold
    if limit > self.threshold:
      raise encoding.EvaluationError(
        f"threshold {limit} is over {self.threshold}, that of the search: search again with it"
      )
    out = np.zeros(self.evaluated, bool)
    out[[match.index for match in self.pairs if match.distance <= limit]] = True
    return out


def perceptual_hash(image: Any) -> int:
  """An image of any kind that `images.as_image` takes -> 64 bits that near duplicates share.

  The image in grey at 32 x 32; of its cosine transform the 8 x 8 lowest frequencies; the bit of one
  is 1 where it is above their median, row by row from the highest bit. Images of one colour have
  equal hashes, and so have simple drawings on plain ground more often than photographs.
  Source: pHash's DCT hash (Zauner 2010), with the first row and column kept, as in ImageHash.
  """
  return int(_hashes(images.squash(images.as_image(image), _HASH_SIDE)[None])[0])


def _hashes(image_NRR3: np.ndarray) -> np.ndarray:
  """uint8 [N, 32, 32, 3] -> uint64 [N]."""
  low_NVU = scipy.fft.dctn(image_NRR3 @ _LUMA, type=2, axes=(1, 2))[:, :_LOW, :_LOW]
  low_NF = low_NVU.reshape(len(image_NRR3), -1).round(6)  # exact zeros
  bit_NF = low_NF > np.median(low_NF, axis=1, keepdims=True)
  return np.packbits(bit_NF, axis=1).view(">u8")[:, 0].astype(np.uint64)


class _Hasher:
  """Hashes as `features.encode` asks for features: four numbers of 16 bits, exact in float32."""

  def fit(self, image: Any) -> np.ndarray:
    return images.squash(images.as_image(image), _HASH_SIDE)

  def image_features(self, image_NRR3: np.ndarray) -> np.ndarray:
    return _hashes(image_NRR3).astype(">u8").view(">u2").reshape(-1, 4).astype(np.float32)


def _of_features(row_N4: np.ndarray) -> np.ndarray:
  """What `_Hasher` gave -> uint64 [N]."""
  return row_N4.astype(">u2").view(">u8")[:, 0].astype(np.uint64)


def search_by_hash(
  evaluated: records.RecordSource,
  training: records.RecordSource,
  threshold: int = 8,
  block: int = 2048,
  progress: Callable[[int], None] = lambda read: None,
  *,
  batch: int = 256,
  cache_dir: Path | None = None,
) -> Matches:
  """Pairs whose hashes differ in at most `threshold` of 64 bits.

  Drawings that were resized or recompressed differ in up to 6 bits, those cropped by 2 % in 4 at
  the median and in up to 12; of 80,000 pairs of unrelated ones none in less than 14. Random hashes
  differ in 8 or less once in 3.6 thousand million pairs: look, or take less for much training data.
  Training records that cannot be decoded are counted and left out; in a cache they stay so until
  the data change. Of several processes all must call, and each hashes its part of every `batch`.
  Args: block, so many rows and columns of distances at a time; progress, gets the number of
    training records read so far; cache_dir, keeps the hashes, for a search to go on with.
  Raises: EvaluationError naming the evaluated record that cannot be decoded, or for a source
    without records or a bad threshold or block; OSError when the cache cannot be written.
  """
  if not 0 <= threshold < HASH_BITS / 2:
    raise encoding.EvaluationError(f"threshold {threshold}: want 0 to 31 of the 64 bits")
  kept = _Kept(_Hasher(), "penultimate", batch, cache_dir, _HASH)

  def hashes(part: "_Part", read: Callable[[int], None]) -> _Block:
    found = kept(part, read)
    return dataclasses.replace(found, features=_of_features(found.features))

  def distances(row_b: np.ndarray, column_m: np.ndarray) -> np.ndarray:
    return np.bitwise_count(row_b[:, None] ^ column_m[None])

  return _search(hashes, evaluated, training, distances, float(threshold), block, progress)


def search_by_embedding(
  model: encoding.FeatureModel,
  evaluated: records.RecordSource,
  training: records.RecordSource,
  batch: int,
  threshold: float = 0.05,
  block: int = 2048,
  progress: Callable[[int], None] = lambda read: None,
  *,
  cache_dir: Path | None = None,
  weights_hash: str = "",
) -> Matches:
  """Pairs whose embeddings' cosine is at least 1 - `threshold`; `batch` images are encoded at once.

  Runs on all hosts, each of which encodes its part. What suits as a threshold depends on the model.
  Args: as those of `search_by_hash`; weights_hash, of all that the model computes by, for a cache.
  Raises: as `search_by_hash` does, and EvaluationError for an embedding that is not finite.
  """
  if not 0 <= threshold < 1:
    raise encoding.EvaluationError(f"threshold {threshold}: want 1 - cosine, from 0 to 1")
  kept = _Kept(model, "embedding", batch, cache_dir, weights_hash)

  def distances(row_bE: np.ndarray, column_mE: np.ndarray) -> np.ndarray:
    return np.float32(1) - encoding.similarities(row_bE, column_mE)

  return _search(kept, evaluated, training, distances, threshold, block, progress)


@dataclasses.dataclass(frozen=True)
class _Block:
  """Some training records: where they start, their keys and features, and which are unreadable."""

  start: int
  keys: Sequence[str]
  features: np.ndarray
  bad: Collection[int]

  def cut(self, start: int, stop: int) -> "_Block":
    """Some of them."""
    bad = {i - start for i in self.bad if start <= i < stop}
    rows = self.features[start:stop]
    return _Block(self.start + start, self.keys[start:stop], rows, bad)


@dataclasses.dataclass(frozen=True)
class _Kept:
  """Features of a part, from the cache where they are there."""

  model: Any  # what `features.encode` asks of one for features of that kind
  kind: str
  batch: int
  cache_dir: Path | None
  weights_hash: str

  def __call__(self, part: "_Part", read: Callable[[int], None]) -> _Block:
    """`read` is told how many records of the part are done."""
    found = features.encode(
      self.model,
      part,
      self.kind,
      self.batch,
      self.cache_dir,
      self.weights_hash,
      progress=lambda done, of: read(done),
    )
    bad = {i for i, label in enumerate(found.labels) if label == _UNREADABLE}
    return _Block(part.start, [key for (key,) in found.captions], found.rows_ND, bad)


def _search(
  encode: Callable[["_Part", Callable[[int], None]], _Block],
  evaluated: records.RecordSource,
  training: records.RecordSource,
  distances: Callable[[np.ndarray, np.ndarray], np.ndarray],
  threshold: float,
  block: int,
  progress: Callable[[int], None],
) -> Matches:
  """Encodes both sides, the training images part by part, and compares them block by block."""
  n, of = encoding.count(evaluated, block, 0), encoding.count(training, block, 0)
  own = encode(_Part(evaluated, 0, n, whole=True), lambda done: None)

  def blocks() -> Iterator[_Block]:
    for start, stop in _ranges(of, _PART):

      def read(done: int, start: int = start) -> None:
        progress(start + done)

      part = encode(_Part(training, start, stop), read)
      for first, last in _ranges(stop - start, block):
        yield part.cut(first, last)

  return _nearest(own.features, own.keys, blocks(), distances, threshold, block)


def _ranges(n: int, block: int) -> Iterator[tuple[int, int]]:
  for start in range(0, n, block):
    yield start, min(start + block, n)


def _nearest(
  features: np.ndarray,
  keys: Sequence[str],
  blocks: Iterator[_Block],
  distances: Callable[[np.ndarray, np.ndarray], np.ndarray],
  threshold: float,
  block: int,
) -> Matches:
  """The nearest training record of each row, at most [block, block] distances at a time.

  Among equally near ones the first counts, whatever the size of the blocks.
  """
  n, limit = len(features), np.nextafter(np.float32(threshold), np.float32(np.inf))
  best = np.full(n, np.inf, np.float32)
  best_index, best_key = np.zeros(n, np.int64), [""] * n
  trained = unreadable = 0
  for part in blocks:
    trained, unreadable = trained + len(part.keys), unreadable + len(part.bad)
    good = np.setdiff1d(np.arange(len(part.keys)), list(part.bad))
    for start, stop in _ranges(n, block) if len(good) else ():
      found_bm = distances(features[start:stop], part.features[good])
      nearest = found_bm.argmin(axis=1)
      distance = np.take_along_axis(found_bm, nearest[:, None], axis=1)[:, 0]
      for row in np.flatnonzero(distance < np.minimum(best[start:stop], limit)):
        best[start + row] = distance[row]
        best_index[start + row] = part.start + good[nearest[row]]
        best_key[start + row] = part.keys[int(good[nearest[row]])]
  # The cosine of equal embeddings may be over 1 by a rounding: the distance is none.
  pairs = tuple(
    Match(int(i), keys[int(i)], int(best_index[i]), best_key[i], max(0.0, float(best[i])))
    for i in np.flatnonzero(best < limit)
  )
  return Matches(pairs, threshold, n, trained, unreadable)


class _Part:
  """Records `start` to `stop` of `source`, each with its key as a caption.

  One that cannot be decoded is an error where the `whole` must be there; else it is a grey pixel
  with a label that says so.
  """

  def __init__(self, source: records.RecordSource, start: int, stop: int, whole: bool = False):
    self._source, self.start, self._stop, self._whole = source, start, stop, whole

  @property
  def fingerprint(self) -> str:
    return f"overlap/1 {self._source.fingerprint} {self.start} {self._stop} {self._whole}"

  def __len__(self) -> int:
    return self._stop - self.start

  def __getitem__(self, index: int) -> records.Record:
    if self._whole:
      record = self._source[self.start + index]
      return dataclasses.replace(record, captions=(record.key,), label=None)
    try:
      record = self._source[self.start + index]
      pixels_HW3 = np.asarray(images.as_image(record.image))
    except Exception:  # of any kind: a training set is searched although some of it is broken
      grey_113 = np.full((1, 1, 3), 128, np.uint8)
      return records.Record("", grey_113, (self.locate(index),), _UNREADABLE)
    return dataclasses.replace(record, image=pixels_HW3, captions=(record.key,), label=None)

  def locate(self, index: int) -> str:
    return self._source.locate(self.start + index)
