"""Which images stand more than once, and which stand in an evaluation set: the first one is kept.

What is compared are 64 bits an image: of the sha256 of its pixels, for the same image, and the
perceptual hash of `evaluation/overlap/search.py`, for nearly the same. Of 5 billion different
images less than one is expected to be taken for another by the former. In memory are about
100 bytes an image and nothing of the images themselves.

Two hashes of four blocks of 16 bits that differ in k bits have a block in which they differ in
k // 4 at most: candidates are looked up by their blocks, and none is missed.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

BITS = 6  # in which nearly the same images may differ where nothing else is said
MOST_BITS = 11
_BLOCKS, _BLOCK_BITS = 4, 16
_TOGETHER = 1024  # images that are looked up at a time
_CANDIDATES = 4_000_000  # compared at a time

KEPT, IN_EVALUATION, DUPLICATE, NEAR_DUPLICATE = range(4)
REASONS = ("", "in_evaluation_set", "duplicate", "near_duplicate")


@dataclasses.dataclass(frozen=True)
class Verdicts:
  """Of each image: `reason` uint8 [N], KEPT or why not, and `other` int64 [N], the image that it
  is like: of the evaluation set for IN_EVALUATION, else the earlier one that is kept.
  """

  reason: np.ndarray
  other: np.ndarray


def judge(
  pixels_N: np.ndarray,
  looks_N: np.ndarray,
  evaluated_M: np.ndarray,
  deduplicate: str,
  bits: int = BITS,
) -> Verdicts:
  """Judges images in their order, one after the other.

  Args: uint64 [N], of the pixels and of the looks; the looks of the evaluation set, uint64 [M];
    deduplicate, "none", "exact" or "near" (both).
  """
  n = len(pixels_N)
  reason, other = np.zeros(n, np.uint8), np.arange(n, dtype=np.int64)
  if len(evaluated_M):
    found = _near_any(looks_N, evaluated_M, bits)
    reason[found >= 0] = IN_EVALUATION
    other[found >= 0] = found[found >= 0]
  steps = {"none": (), "exact": (DUPLICATE,), "near": (DUPLICATE, NEAR_DUPLICATE)}[deduplicate]
  for step in steps:
    left = np.flatnonzero(reason == KEPT)
    first = first_equal(pixels_N[left]) if step == DUPLICATE else first_near(looks_N[left], bits)
    twins = np.flatnonzero(first != np.arange(len(left)))
    reason[left[twins]] = step
    other[left[twins]] = left[first[twins]]
  # What was the same as an image that then turned out to be near another is near that one.
  chained = (reason == DUPLICATE) & (reason[other] == NEAR_DUPLICATE)
  other[chained] = other[other[chained]]
  reason[chained] = NEAR_DUPLICATE
  return Verdicts(reason, other)


def first_equal(value_N: np.ndarray) -> np.ndarray:
  """Of each of uint64 [N], the place of the first that equals it: int64 [N]."""
  _, first, inverse = np.unique(value_N, return_index=True, return_inverse=True)
  return first[inverse]


def first_near(hash_N: np.ndarray, bits: int) -> np.ndarray:
  """Of each hash, the first kept one before it that differs in at most `bits`, or itself: int64
  [N]. A hash is kept when there is none, so that chains of neighbours do not grow.
  """
  out = first_equal(hash_N)
  distinct = np.flatnonzero(out == np.arange(len(out)))
  own = hash_N[distinct]
  index, owner = _Index(own, bits), np.arange(len(own), dtype=np.int64)
  for start in range(0, len(own), _TOGETHER):
    ids = owner[start : start + _TOGETHER].copy()
    found = index.first(own[ids])
    owner[ids[found >= 0]] = found[found >= 0]
    fresh = ids[found < 0]
    close_ff = np.tril(np.bitwise_count(own[fresh][:, None] ^ own[fresh][None]) <= bits, -1)
    kept_f = np.ones(len(fresh), bool)
    for row in np.flatnonzero(close_ff.any(1)):
      before = np.flatnonzero(close_ff[row] & kept_f)
      if len(before):
        kept_f[row] = False
        owner[fresh[row]] = fresh[before[0]]
    index.add(fresh[kept_f], own[fresh[kept_f]])
  return distinct[owner][np.searchsorted(distinct, out)]


def _near_any(hash_N: np.ndarray, evaluated_M: np.ndarray, bits: int) -> np.ndarray:
  """Of each of uint64 [N], the first of [M] that differs in at most `bits`, or -1: int64 [N]."""
  index = _Index(evaluated_M, bits)
  index.add(np.arange(len(evaluated_M), dtype=np.int64), evaluated_M)
  out = np.full(len(hash_N), -1, np.int64)
  for start in range(0, len(hash_N), _TOGETHER):
    out[start : start + _TOGETHER] = index.first(hash_N[start : start + _TOGETHER])
  return out


class _Index:
  """Some of the hashes of uint64 [N], found by any of their four blocks; filled in their order."""

  def __init__(self, hash_N: np.ndarray, bits: int):
    if not 0 <= bits <= MOST_BITS:
      raise ValueError(f"{bits} bits: want 0 to {MOST_BITS}")
    self._bits = bits
    self._masks = np.array(
      [
        sum(1 << bit for bit in chosen)
        for flips in range(bits // _BLOCKS + 1)
        for chosen in itertools.combinations(range(_BLOCK_BITS), flips)
      ]
    )
    size = 1 << _BLOCK_BITS
    counts = [np.bincount(values, minlength=size) for values in _blocks(hash_N)]
    self._starts = [np.cumsum(count) - count for count in counts]
    self._filled = [np.zeros(size, np.int64) for _ in counts]
    self._hashes = np.zeros((_BLOCKS, len(hash_N)), np.uint64)
    self._ids = np.zeros((_BLOCKS, len(hash_N)), np.uint32)

  def add(self, ids: np.ndarray, hashes: np.ndarray) -> None:
    """Ids come in their order, each once."""
    for block, values in enumerate(_blocks(hashes)):
      order = np.argsort(values, kind="stable")
      value, first, count = np.unique(values[order], return_index=True, return_counts=True)
      rank = np.arange(len(order)) - np.repeat(first, count)
      at = (self._starts[block] + self._filled[block])[values[order]] + rank
      self._hashes[block, at], self._ids[block, at] = hashes[order], ids[order]
      self._filled[block][value] += count

  def first(self, hash_b: np.ndarray) -> np.ndarray:
    """The smallest id within reach of each, or -1: int64 [b]."""
    best = np.full(len(hash_b), np.iinfo(np.int64).max)
    for block, values in enumerate(_blocks(hash_b)):
      for mask in self._masks:
        start, count = (a[block][values ^ mask] for a in (self._starts, self._filled))
        for row, at in _pairs(start, count):
          close = np.bitwise_count(self._hashes[block, at] ^ hash_b[row]) <= self._bits
          np.minimum.at(best, row[close], self._ids[block, at[close]].astype(np.int64))
    return np.where(best == np.iinfo(np.int64).max, -1, best)


def _blocks(hash_N: np.ndarray) -> list[np.ndarray]:
  """The four blocks of each hash, int64 [N]."""
  shifts = range(0, _BLOCKS * _BLOCK_BITS, _BLOCK_BITS)
  return [((hash_N >> np.uint64(s)) & np.uint64(0xFFFF)).astype(np.int64) for s in shifts]


def _pairs(start_b: np.ndarray, count_b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """(row, place) of all places start, start + 1, ... of each row, not too many at a time."""
  rows = np.flatnonzero(count_b)
  ends = np.cumsum(count_b[rows])
  begin = 0
  while begin < len(rows):
    before = ends[begin - 1] if begin else 0
    stop = max(begin + 1, int(np.searchsorted(ends, before + _CANDIDATES, side="right")))
    own = rows[begin:stop]
    count = count_b[own]
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    yield np.repeat(own, count), np.repeat(start_b[own], count) + offset
    begin = stop
