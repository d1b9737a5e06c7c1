"""Train-test overlap: which images of an evaluation set training has seen, and what that is worth.

Near duplicates are found by a perceptual hash or by an embedding, the nearest training image of
each evaluated one. The training data is read once, block by block: what stays in memory is one hash
or embedding of every evaluated image, and one block of either side's distances.
Source: section 5 and figure 17.
Differs: the paper's detector is a model of its own, trained for it, with a threshold per dataset
that people set by looking at pairs; here it is a hash or any image encoder, and the threshold is an
argument. Look at the pairs before you believe a threshold.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import scipy.fft

from clip_jax.data import images, records
from clip_jax.evaluation import encoding

HASH_BITS = 64
_HASH_SIDE = 32  # pixels that the hash looks at, a side
_LOW = 8  # frequencies that it keeps, a side
_LUMA = np.array([0.299, 0.587, 0.114])  # of red, green, blue. Source: ITU-R BT.601


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
  small_RR3 = images.squash(images.as_image(image), _HASH_SIDE)
  low = scipy.fft.dctn(small_RR3 @ _LUMA, type=2)[:_LOW, :_LOW].ravel().round(6)  # exact zeros
  bits = low > np.median(low)
  return int.from_bytes(np.packbits(bits).tobytes())


def search_by_hash(
  evaluated: records.RecordSource,
  training: records.RecordSource,
  threshold: int = 8,
  block: int = 2048,
  progress: Callable[[int], None] = lambda read: None,
) -> Matches:
  """Pairs whose hashes differ in at most `threshold` of 64 bits.

  Drawings that were resized or recompressed differ in up to 6 bits, those cropped by 2 % in 4 at
  the median and in up to 12; of 80,000 pairs of unrelated ones none in less than 14. Random hashes
  differ in 8 or less once in 3.6 thousand million pairs: look, or take less for much training data.
  Training records that cannot be decoded are counted and left out. `progress` gets the number of
  training records read so far after every block.
  Raises: EvaluationError naming the evaluated record that cannot be decoded, or for a source
    without records or a bad threshold or block.
  """
  if not 0 <= threshold < HASH_BITS / 2:
    raise encoding.EvaluationError(f"threshold {threshold}: want 0 to 31 of the 64 bits")
  n = encoding.count(evaluated, block, 0)
  hash_N, keys = np.zeros(n, np.uint64), []
  for i in range(n):
    record = encoding.read(evaluated, i)
    try:
      hash_N[i] = perceptual_hash(record.image)
    except images.ImageError as error:
      where = evaluated.locate(i)
      raise encoding.EvaluationError(f"{where}: image cannot be decoded ({error})") from error
    keys.append(record.key)

  def blocks() -> Iterator[_Block]:
    for start, stop in _ranges(len(training), block):
      part = _Part(training, start, stop)
      hashes = [perceptual_hash(part[i].image) for i in range(len(part))]
      yield _Block(start, part.keys, np.array(hashes, np.uint64), part.bad)
      progress(stop)

  def distances(rows_b: np.ndarray, columns_m: np.ndarray) -> np.ndarray:
    return np.bitwise_count(rows_b[:, None] ^ columns_m[None])

  encoding.count(training, block, 0)
  return _nearest(hash_N, keys, blocks(), distances, float(threshold), block)


def search_by_embedding(
  model: encoding.Model,
  evaluated: records.RecordSource,
  training: records.RecordSource,
  batch: int,
  threshold: float = 0.05,
  block: int = 2048,
  progress: Callable[[int], None] = lambda read: None,
) -> Matches:
  """Pairs whose embeddings' cosine is at least 1 - `threshold`; `batch` images are encoded at once.

  Runs on all hosts, each of which encodes its part. What suits as a threshold depends on the model.
  Raises: EvaluationError as `search_by_hash` does, and for an embedding that is not finite.
  """
  if not 0 <= threshold < 1:
    raise encoding.EvaluationError(f"threshold {threshold}: want 1 - cosine, from 0 to 1")
  n, keys = encoding.count(evaluated, batch, 0), []
  image_NE = encoding.encode_images(
    model, evaluated, n, batch, lambda i, record: keys.append(record.key)
  )
  encoding.count(training, block, 0)

  def blocks() -> Iterator[_Block]:
    for start, stop in _ranges(len(training), block):
      part = _Part(training, start, stop)
      train_ME = encoding.encode_images(model, part, len(part), batch, lambda i, record: None)
      yield _Block(start, part.keys, train_ME, part.bad)
      progress(stop)

  def distances(rows_bE: np.ndarray, columns_mE: np.ndarray) -> np.ndarray:
    return np.float32(1) - encoding.similarities(rows_bE, columns_mE)

  return _nearest(image_NE, keys, blocks(), distances, threshold, block)


@dataclasses.dataclass(frozen=True)
class _Block:
  """Some training records: where they start, their keys and features, and which are unreadable."""

  start: int
  keys: Sequence[str]
  features: np.ndarray
  bad: Collection[int]


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
  """Records `start` to `stop` of `source`, decoded; in place of an unreadable one a grey pixel.

  `bad` and `keys` are whole once every record was read.
  """

  fingerprint = ""

  def __init__(self, source: records.RecordSource, start: int, stop: int):
    self._source, self._start, self._stop = source, start, stop
    self.bad: set[int] = set()
    self.keys = [""] * (stop - start)

  def __len__(self) -> int:
    return self._stop - self._start

  def __getitem__(self, index: int) -> records.Record:
    try:
      record = self._source[self._start + index]
      image = np.asarray(images.as_image(record.image))
    except Exception:  # of any kind: a training set is searched although some of it is broken
      self.bad.add(index)
      record = records.Record(self.locate(index), b"", ())
      image = np.full((1, 1, 3), 128, np.uint8)
    self.keys[index] = record.key
    return dataclasses.replace(record, image=image)

  def locate(self, index: int) -> str:
    return self._source.locate(self._start + index)
