import io

import numpy as np
import pytest
import scipy.fft
from known_model import Source, unit
from PIL import Image, ImageDraw

from clip_jax.data import images as images_lib
from clip_jax.data.records import MemorySource, Record
from clip_jax.evaluation import encoding
from clip_jax.evaluation.overlap import search as overlap

SIDE = 16


def drawing(seed, size=160):
  """Six shapes on white, like clip art."""
  rng = np.random.default_rng(seed)
  image = Image.new("RGB", (size, size), (255, 255, 255))
  draw = ImageDraw.Draw(image)
  for _ in range(6):
    (x, y), r = rng.integers(0, size, 2), rng.integers(size // 10, size // 3)
    colour, kind = tuple(int(v) for v in rng.integers(0, 230, 3)), rng.integers(3)
    if kind == 0:
      draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif kind == 1:
      draw.rectangle((x - r, y - r // 2, x + r, y + r // 2), fill=colour)
    else:
      draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r // 2)], fill=colour)
  return image


def encoded(image, kind="PNG", **settings):
  file = io.BytesIO()
  image.save(file, kind, **settings)
  return file.getvalue()


# What of drawing(i) training has seen, by i; the rest of both sides are drawings of their own.
PLANTED = {
  3: encoded(drawing(3)),
  5: encoded(drawing(5).resize((97, 97))),
  8: encoded(drawing(8), "JPEG", quality=20),
  12: encoded(drawing(12).crop((2, 2, 158, 158)), "JPEG", quality=70),
  17: encoded(drawing(17).resize((230, 240)), "WEBP", quality=50),
}
BAD = (4, 31)  # training records that nobody can decode


def sources():
  evaluated = MemorySource(
    [Record(f"eval {i}", encoded(drawing(i)), (), "a") for i in range(20)], "evaluated"
  )
  training = [Record(f"own {i}", encoded(drawing(1000 + i)), ()) for i in range(40)]
  for place, (i, data) in zip((0, 7, 8, 22, 39), PLANTED.items(), strict=True):
    training[place] = Record(f"copy {i}", data, ())
  training[BAD[0]] = Record("broken", b"no image", ())
  training[BAD[1]] = OSError("the disk is gone")
  return evaluated, Source(training)


class Thumbnails:
  """Embeds an image as its grey thumbnail less its mean."""

  logit_scale = 1.0

  def __init__(self, batch):
    self.batch = batch

  def fit(self, image):
    return images_lib.squash(images_lib.as_image(image), SIDE)

  def encode_image(self, images):
    assert images.shape == (self.batch, SIDE, SIDE, 3)
    grey = images.mean(axis=3).reshape(len(images), -1)
    grey = grey - grey.mean(axis=1, keepdims=True)
    grey[:, 0] += 1e-3  # a flat image has a direction too
    return unit(grey)

  def tokens(self, texts, truncate=False):
    raise NotImplementedError

  def encode_text(self, texts, truncate=False):
    raise NotImplementedError


def test_the_hash_is_that_of_a_cosine_transform_by_hand():
  image = np.asarray(drawing(0).resize((32, 32), Image.Resampling.BICUBIC)).astype(float)
  grey = image @ [0.299, 0.587, 0.114]
  n = np.arange(32)
  basis = np.cos(np.pi * (2 * n[None] + 1) * n[:8, None] / 64)  # [frequency, place]
  low = [(basis[v] @ grey @ basis[u]) for v in range(8) for u in range(8)]
  above = [value > sorted(low)[31] / 2 + sorted(low)[32] / 2 for value in low]
  want = sum(1 << (63 - i) for i, bit in enumerate(above) if bit)
  assert overlap.perceptual_hash(drawing(0)) == want
  assert want.bit_count() == 32


def test_a_wave_sets_the_bit_of_its_frequency():
  """A picture that is one basis function, of frequencies 2 down and 3 across: one large bit."""
  n = (2 * np.arange(32) + 1) * np.pi / 64
  wave = 128 + 100 * np.outer(np.cos(2 * n), np.cos(3 * n))
  image = np.repeat(np.rint(wave).astype(np.uint8)[..., None], 3, axis=2)
  low = scipy.fft.dctn(wave)[:8, :8]
  assert np.unravel_index(np.argsort(low.ravel())[-2], low.shape) == (2, 3)
  assert overlap.perceptual_hash(image) >> (63 - (2 * 8 + 3)) & 1


@pytest.mark.parametrize("level", [0, 128, 255])
def test_plain_images_have_the_hash_of_plain_images(level):
  found = overlap.perceptual_hash(np.full((40, 30, 3), level, np.uint8))
  assert found == (0 if level == 0 else 1 << 63)


@pytest.mark.parametrize("block", [1, 3, 7, 20, 1000])
def test_planted_duplicates_are_found_by_hash_whatever_the_block(block):
  evaluated, training = sources()
  seen = []
  found = overlap.search_by_hash(evaluated, training, block=block, progress=seen.append)
  assert [(m.index, m.key, m.train_key) for m in found.pairs] == [
    (i, f"eval {i}", f"copy {i}") for i in PLANTED
  ]
  assert [m.train_index for m in found.pairs] == [0, 7, 8, 22, 39]
  assert (found.evaluated, found.trained, found.unreadable) == (20, 40, 2)
  assert found == overlap.search_by_hash(*sources())
  assert seen == [0, 40]
  np.testing.assert_array_equal(np.flatnonzero(found.overlapping()), list(PLANTED))


@pytest.mark.parametrize(("batch", "block"), [(1, 5), (8, 3), (8, 20), (3, 1000)])
def test_planted_duplicates_are_found_by_embedding_whatever_the_block(batch, block):
  evaluated, training = sources()
  found = overlap.search_by_embedding(
    Thumbnails(batch), evaluated, training, batch, threshold=0.05, block=block
  )
  assert [(m.index, m.train_key) for m in found.pairs] == [(i, f"copy {i}") for i in PLANTED]
  assert [m.train_index for m in found.pairs] == [0, 7, 8, 22, 39]
  assert (found.evaluated, found.trained, found.unreadable) == (20, 40, 2)
  assert found.pairs[0].distance == pytest.approx(0, abs=1e-6)
  assert found == overlap.search_by_embedding(Thumbnails(8), *sources(), 8)


class Killed(BaseException):
  pass


class Counted(Source):
  """A source that counts what is read of it; dies at the record numbered `dies`."""

  def __init__(self, source, fingerprint, dies=None):
    super().__init__(source)
    self.fingerprint, self.dies, self.read = fingerprint, dies, []

  def __getitem__(self, index):
    if index == self.dies:
      raise Killed
    self.read.append(index)
    return self.records[index]


def search(by, evaluated, training, folder=None, weights="w", **more):
  if by == "hash":
    return overlap.search_by_hash(evaluated, training, batch=1, cache_dir=folder, **more)
  kept = {"cache_dir": folder, "weights_hash": weights}
  return overlap.search_by_embedding(Thumbnails(1), evaluated, training, 1, **kept, **more)


@pytest.mark.parametrize("by", ["hash", "embedding"])
@pytest.mark.parametrize(("dies", "kept"), [(3, 0), (20, 16), (26, 24), (39, 24)])
def test_a_killed_search_goes_on(tmp_path, monkeypatch, by, dies, kept):
  """In parts of 24 and chunks of 16: what is whole is not read again, nor is the other side."""
  monkeypatch.setattr(overlap, "_PART", 24)
  evaluated, training = sources()
  whole = search(by, evaluated, training)
  assert [m.key for m in whole.pairs] == [f"eval {i}" for i in PLANTED]
  assert (whole.trained, whole.unreadable) == (40, 2)

  def sides(dies=None):
    return Counted(evaluated, "e" * 64), Counted(training, "t" * 64, dies)

  with pytest.raises(Killed):
    search(by, *sides(dies), tmp_path)
  seen, (left, right) = [], sides()
  assert search(by, left, right, tmp_path, progress=seen.append) == whole
  assert (left.read, right.read) == ([], list(range(kept, 40)))
  assert seen[-1] == 40
  left, right = sides()
  assert search(by, left, right, tmp_path, block=7) == whole
  assert (left.read, right.read) == ([], [])
  # Other training data is read; so is the same for other weights, which no hash asks for.
  right.fingerprint = "u" * 64
  assert search(by, left, right, tmp_path) == whole
  assert (left.read, right.read) == ([], list(range(40)))
  left, right = sides()
  assert search(by, left, right, tmp_path, weights="v") == whole
  assert len(right.read) == (40 if by == "embedding" else 0)


def test_what_was_kept_as_training_hides_no_bad_evaluated_image(tmp_path):
  broken = Source([Record("a", b"junk", ()), Record("b", encoded(drawing(1)), ())])
  left = MemorySource([Record("e", encoded(drawing(1)), ())], "e")
  found = overlap.search_by_hash(left, broken, cache_dir=tmp_path)
  assert ([m.train_key for m in found.pairs], found.unreadable) == (["b"], 1)
  with pytest.raises(encoding.EvaluationError, match="record 0: image cannot be decoded"):
    overlap.search_by_hash(broken, broken, cache_dir=tmp_path)


def test_distances_are_those_of_every_pair():
  """At a threshold that most images reach, the nearest of a full table of distances."""
  evaluated, training = sources()
  numbers = [i for i in range(40) if i not in BAD]
  ours = [overlap.perceptual_hash(evaluated[i].image) for i in range(20)]
  theirs = [overlap.perceptual_hash(training[i].image) for i in numbers]
  table = [[(a ^ b).bit_count() for b in theirs] for a in ours]
  found = overlap.search_by_hash(evaluated, training, threshold=24, block=7)
  assert len(found.pairs) > 10
  by_index = {m.index: m for m in found.pairs}
  for i, row in enumerate(table):
    assert (i in by_index) == (min(row) <= 24)
    if i in by_index:
      assert by_index[i].distance == min(row)
      assert by_index[i].train_index == numbers[row.index(min(row))]  # the first of equal ones


def test_the_first_of_equal_copies_counts():
  one = MemorySource([Record("e", encoded(drawing(1)), ())], "one")
  many = MemorySource([Record(f"t{i}", encoded(drawing(1)), ()) for i in range(9)], "many")
  for block in (1, 2, 4, 100):
    (match,) = overlap.search_by_hash(one, many, block=block).pairs
    assert (match.train_index, match.train_key, match.distance) == (0, "t0", 0.0)
    (match,) = overlap.search_by_embedding(Thumbnails(2), one, many, 2, block=block).pairs
    assert (match.train_index, match.distance) == (0, pytest.approx(0, abs=1e-6))


def test_a_stricter_threshold_needs_no_other_search():
  found = overlap.search_by_hash(*sources(), threshold=20)
  for threshold in (0, 4, 8, 20):
    fresh = overlap.search_by_hash(*sources(), threshold=threshold)
    np.testing.assert_array_equal(found.overlapping(threshold), fresh.overlapping())
  assert found.overlapping(0).sum() < found.overlapping().sum()
  with pytest.raises(encoding.EvaluationError, match="search again"):
    found.overlapping(21)


def test_nothing_in_common_is_no_pair():
  evaluated, _ = sources()
  training = MemorySource([Record(f"t{i}", encoded(drawing(500 + i)), ()) for i in range(9)], "t")
  assert overlap.search_by_hash(evaluated, training).pairs == ()
  assert not overlap.search_by_hash(evaluated, training).overlapping().any()


def test_training_data_of_which_nothing_can_be_read():
  """Not even a grey image has a pair among what could not be read."""
  grey = Record("grey", encoded(Image.new("RGB", (50, 40), (128, 128, 128))), ())
  evaluated = MemorySource([grey, Record("e", encoded(drawing(0)), ())], "evaluated")
  training = Source([Record("a", b"", ()), Record("b", b"junk", ())])
  found = overlap.search_by_hash(evaluated, training)
  assert (found.pairs, found.trained, found.unreadable) == ((), 2, 2)
  found = overlap.search_by_embedding(Thumbnails(4), evaluated, training, 4)
  assert (found.pairs, found.trained, found.unreadable) == ((), 2, 2)
  training.records.append(grey)
  for found in (
    overlap.search_by_hash(evaluated, training),
    overlap.search_by_embedding(Thumbnails(4), evaluated, training, 4),
  ):
    assert [(m.key, m.train_key, m.train_index) for m in found.pairs] == [("grey", "grey", 2)]


def test_a_bad_evaluated_record_is_an_error_that_names_it():
  evaluated, training = Source([Record("e", b"junk", ())]), sources()[1]
  words = "shard-7, record 0: image cannot be decoded"
  with pytest.raises(encoding.EvaluationError, match=words):
    overlap.search_by_hash(evaluated, training)
  with pytest.raises(encoding.EvaluationError, match=words):
    overlap.search_by_embedding(Thumbnails(2), evaluated, training, 2)


def test_bad_arguments_are_refused():
  for threshold in (-1, 32, 2**40):
    with pytest.raises(encoding.EvaluationError, match="want 0 to 31"):
      overlap.search_by_hash(*sources(), threshold=threshold)
  with pytest.raises(encoding.EvaluationError, match="1 - cosine"):
    overlap.search_by_embedding(Thumbnails(2), *sources(), 2, threshold=1.5)
  empty = MemorySource([], "empty")
  with pytest.raises(encoding.EvaluationError, match="no records"):
    overlap.search_by_hash(sources()[0], empty)
  with pytest.raises(encoding.EvaluationError, match="at least 1"):
    overlap.search_by_hash(*sources(), block=0)
