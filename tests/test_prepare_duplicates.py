"""Which images are the same or nearly: against a plain loop, whatever the hashes look like."""

import numpy as np
import pytest

from tools.prepare import duplicates


def _clustered(n: int, centres: int, flips: int, seed: int) -> np.ndarray:
  """uint64 [N]: a few hashes with up to `flips` bits turned, so that many are near others."""
  rng = np.random.default_rng(seed)
  own = rng.integers(0, 2**64, centres, dtype=np.uint64)[rng.integers(0, centres, n)]
  for _ in range(flips):
    turned = np.uint64(1) << rng.integers(0, 64, n, dtype=np.uint64)
    own = np.where(rng.random(n) < 0.7, own ^ turned, own)
  return own


def _plain(hashes: list[int], bits: int) -> list[int]:
  """One after the other: the first kept one within reach, or itself."""
  kept, out = [], []
  for i, value in enumerate(hashes):
    near = [k for k in kept if (hashes[k] ^ value).bit_count() <= bits]
    out.append(near[0] if near else i)
    kept += [] if near else [i]
  return out


@pytest.mark.parametrize("bits", [0, 3, 4, 6, 7, 8, 11])
def test_the_first_is_kept_as_a_plain_loop_keeps_it(monkeypatch, bits):
  monkeypatch.setattr(duplicates, "_TOGETHER", 64)  # many blocks of few images
  monkeypatch.setattr(duplicates, "_CANDIDATES", 50)
  hash_N = _clustered(900, 30, bits + 3, seed=bits)
  found = duplicates.first_near(hash_N, bits)
  assert found.tolist() == _plain([int(h) for h in hash_N], bits)
  kept = np.flatnonzero(found == np.arange(900))
  assert 30 <= len(kept) < 900
  distance = np.bitwise_count(hash_N[kept][:, None] ^ hash_N[kept][None])
  assert distance[~np.eye(len(kept), dtype=bool)].min() > bits


def test_hashes_in_one_bucket_are_found_too():
  """All hashes share three of their blocks: every one is a candidate of every other."""
  hash_N = np.random.default_rng(1).integers(0, 2**16, 3000).astype(np.uint64) << np.uint64(16)
  found = duplicates.first_near(hash_N, 2)
  assert found.tolist() == _plain([int(h) for h in hash_N], 2)


def test_nothing_and_one():
  for n in (0, 1):
    hash_N = np.arange(n, dtype=np.uint64)
    assert duplicates.first_near(hash_N, 6).tolist() == list(range(n))
    verdicts = duplicates.judge(hash_N, hash_N, np.zeros(0, np.uint64), "near")
    assert verdicts.reason.tolist() == [duplicates.KEPT] * n


def test_verdicts_in_the_order_of_their_weight():
  """Written out: pixels, looks and what must become of each."""
  far = 0x0123_4567_89AB_CDEF
  rows = [
    # pixels, looks, reason, other
    (1, far, duplicates.KEPT, 0),
    (2, far ^ 0b111, duplicates.NEAR_DUPLICATE, 0),
    (2, far ^ 0b111, duplicates.NEAR_DUPLICATE, 0),  # the same as one that was not kept
    (3, ~far & (2**64 - 1), duplicates.IN_EVALUATION, 1),
    (3, ~far & (2**64 - 1), duplicates.IN_EVALUATION, 1),
    (1, far, duplicates.DUPLICATE, 0),
    (4, 0xFF00FF00FF00FF00, duplicates.KEPT, 6),
  ]
  pixels, looks, reason, other = (np.array(column, np.uint64) for column in zip(*rows, strict=True))
  evaluated = np.array([0x5555555555555555, (~far & (2**64 - 1)) ^ 0b11], np.uint64)
  found = duplicates.judge(pixels, looks, evaluated, "near", bits=3)
  assert found.reason.tolist() == reason.tolist()
  assert found.other.tolist() == other.tolist()
  exact = duplicates.judge(pixels, looks, evaluated[:0], "exact", bits=3)
  assert np.flatnonzero(exact.reason).tolist() == [2, 4, 5]
  assert set(exact.reason.tolist()) == {duplicates.KEPT, duplicates.DUPLICATE}
  assert exact.other.tolist() == [0, 1, 1, 3, 3, 0, 6]
  assert not duplicates.judge(pixels, looks, evaluated[:0], "none").reason.any()


def test_near_an_evaluation_set_whatever_the_sizes():
  looks = _clustered(500, 10, 6, seed=2)
  evaluated = _clustered(300, 10, 6, seed=2)[::-1].copy()
  found = duplicates.judge(looks, looks, evaluated, "none", bits=5)
  distance = np.bitwise_count(looks[:, None] ^ evaluated[None]) <= 5
  assert (found.reason == duplicates.IN_EVALUATION).tolist() == distance.any(1).tolist()
  near = distance.any(1)
  assert 0 < near.sum() < 500
  assert found.other[near].tolist() == distance.argmax(1)[near].tolist()


def test_too_many_bits_are_refused():
  with pytest.raises(ValueError, match="want 0 to 11"):
    duplicates.first_near(np.zeros(2, np.uint64), 12)
