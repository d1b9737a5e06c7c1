"""The embedded dataset: what the captions say is what the pixels show, and nothing leaks."""

import hashlib
import itertools
import pickle
import re

import numpy as np
import pytest
from scipy import ndimage
from sklearn.datasets import load_digits

from clip_jax.data import scenes

SHAPE_OF = {
  **{shape: shape for shape in scenes.SHAPES},
  **{f"{shape}s": shape for shape in scenes.SHAPES if shape != "cross"},
  "crosses": "cross",
}
COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
PLACE_OF = {place: place for place in scenes.PLACES}
PLACE_OF |= {"upper": "top", "lower": "bottom", "middle": "centre"}
# A reading of captions that shares nothing with the grammar that writes them.
CAPTION = re.compile(
  r"(?:(?:a (?:photo|picture|drawing) of|there (?P<be>is|are)) )?"
  r"(?:(?P<count>an?|one|two|three) )?(?:(?P<extent>small|large) )?"
  rf"(?P<colour>{'|'.join(scenes.COLOURS)}) (?P<noun>{'|'.join(SHAPE_OF)})"
  rf"(?: (?:on|at|in) the (?P<place>{'|'.join(PLACE_OF)})(?: side| part)?)?"
  r"(?:(?: on a|,) (?P<tone>light|dark) background)?"
)


def _read(caption):
  found = CAPTION.fullmatch(caption)
  assert found, caption
  return found.groupdict()


def _vividness(image):
  """float [S, S]: 0 on the neutral background, 1 in the middle of an object."""
  spread = image.astype(float).max(-1) - image.min(-1)
  low, high = np.median(spread[[0, -1]]), np.percentile(spread, 99.3)
  return np.clip((spread - low) / (high - low), 0, 1)


def _digest(records):
  digest = hashlib.sha256()
  for record in records:
    digest.update(repr((record.key, record.captions, record.label)).encode())
    digest.update(record.image.tobytes())
  return digest.hexdigest()


@pytest.fixture(scope="module")
def train():
  return list(scenes.Scenes("train", 2800))


@pytest.mark.parametrize(
  ("split", "golden"),
  [
    ("train", "c921d44c143767df3b40306b8099cc0914f2a8a4b286fe6f570c7e1d5d0b3039"),
    ("test", "b06d8a882dd42f3c5c6a472020dc7b1c2942c7d93af5cee45681c73ea5f683c7"),
    ("held_out", "4903d48409d7a2b94c6aaf86314d527c7ef896b3e47210b60928a07f5f070ef8"),
  ],
)
def test_the_same_scenes_in_every_process_and_on_every_machine(split, golden):
  # If this changes on purpose, raise scenes._VERSION; a change of Pillow's drawing shows here too.
  assert _digest(scenes.Scenes(split, 64)) == golden


def test_a_record_depends_on_seed_split_and_index_alone(train):
  again = scenes.Scenes("train", 10**9)
  assert _digest([again[1234], again[7]]) == _digest([train[1234], train[7]])
  other = scenes.Scenes("train", 100, seed=1)
  assert not any(np.array_equal(a.image, b.image) for a, b in zip(other, train, strict=False))


def test_no_scene_occurs_twice(train):
  images = [r.image.tobytes() for r in [*train, *scenes.Scenes("test", 1000)]]
  assert len(set(images)) == len(images)


def test_an_eighth_is_held_out_one_of_each_colour_and_shape():
  assert len(set(scenes.COMPOSITIONS)) == len(scenes.COMPOSITIONS) == 64
  assert set(scenes.HELD_OUT) | set(scenes.TRAINING) == set(scenes.COMPOSITIONS)
  assert (len(scenes.HELD_OUT), len(scenes.TRAINING)) == (8, 56)
  colours, shapes = zip(*map(str.split, scenes.HELD_OUT), strict=True)
  assert sorted(colours) == sorted(scenes.COLOURS)
  assert sorted(shapes) == sorted(scenes.SHAPES)


def test_held_out_compositions_never_occur_in_training(train):
  def shown(records):
    read = [_read(c) for r in records for c in r.captions]
    said = {f"{c['colour']} {SHAPE_OF[c['noun']]}" for c in read}
    return said, {r.label for r in records}

  said, labels = shown(train)
  assert not (said | labels) & set(scenes.HELD_OUT)
  assert said == labels == set(scenes.TRAINING)
  assert shown(list(scenes.Scenes("test", 200))) == (set(scenes.TRAINING), set(scenes.TRAINING))
  assert shown(list(scenes.Scenes("held_out", 100))) == (set(scenes.HELD_OUT),) * 2


def test_balance(train):
  labels = [r.label for r in train]
  assert {labels.count(name) for name in scenes.TRAINING} == {50}
  fullest = [_read(r.captions[0]) for r in train]
  share = {
    key: {value: np.mean([c[key] == value for c in fullest]) for value in values}
    for key, values in {
      "extent": ("small", "large"),
      "tone": ("light", "dark"),
      "count": ("two", "three"),
    }.items()
  }
  assert list(share["extent"].values()) == pytest.approx([0.5, 0.5], abs=0.04)
  assert list(share["tone"].values()) == pytest.approx([0.5, 0.5], abs=0.04)
  assert list(share["count"].values()) == pytest.approx([0.25, 0.25], abs=0.04)
  places = [PLACE_OF[c["place"]] for c in fullest]
  shares = [places.count(place) / len(places) for place in scenes.PLACES]
  assert shares == pytest.approx([0.2] * 5, abs=0.04)


def test_captions_are_english_and_all_different(train):
  for record in train:
    assert len(set(record.captions)) == len(record.captions) == 6
    for caption in record.captions:
      said = _read(caption)
      many = said["noun"] not in scenes.SHAPES
      if said["count"]:
        assert many == (COUNTS[said["count"]] > 1), caption
      if said["be"]:
        assert (said["be"] == "are") == many, caption
      assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|\s\s|^\s|\s$", caption), caption


def test_templates_speak_the_grammar(train):
  said = {c.replace(r.label, "{}") for r in train for c in r.captions}
  assert set(scenes.SCENE_TEMPLATES) <= said
  assert not any(
    re.search(r"\ba [aeiou]", template.format(name))
    for template in scenes.SCENE_TEMPLATES
    for name in scenes.COMPOSITIONS
  )


def _described(image):
  """What a caption could say, from the pixels alone."""
  size, vivid = len(image), _vividness(image)
  labels, count = ndimage.label(vivid > 0.5, structure=np.ones((3, 3)))
  boxes = ndimage.find_objects(labels)
  reach = max(max(s.stop - s.start for s in box) for box in boxes) / size
  paint = np.median(image[vivid > 0.9], axis=0)
  away = {name: np.linalg.norm(paint - rgb) for name, rgb in scenes.COLOURS.items()}
  y, x = np.mean([[(s.start + s.stop) / 2 for s in box] for box in boxes], axis=0) / size - 0.5
  place = ("left" if x < 0 else "right") if abs(x) > abs(y) else ("top" if y < 0 else "bottom")
  return {
    "count": count,
    "extent": "small" if reach < 0.33 else "large",
    "colour": min(away, key=away.get),
    "place": "centre" if max(abs(x), abs(y)) < 0.09 else place,
    "tone": "light" if np.median(image[vivid < 0.1]) > 128 else "dark",
  }


@pytest.mark.parametrize("size", [32, 57])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_captions_agree_with_the_picture(split, size):
  for record in scenes.Scenes(split, 800, seed=3, size=size):
    seen = _described(record.image)
    for caption in record.captions:
      said = _read(caption)
      number, place = said["count"], said["place"]
      # A bare plural says "more than one" and no number.
      told = {
        **{key: said[key] for key in ("extent", "colour", "tone") if said[key]},
        **({"count": COUNTS[number]} if number else {}),
        **({"place": PLACE_OF[place]} if place else {}),
      }
      assert told == {key: seen[key] for key in told}, (record.key, caption, seen)
      assert record.label == f"{said['colour']} {SHAPE_OF[said['noun']]}"
    assert (seen["count"] > 1) == (said["noun"] not in scenes.SHAPES)


def test_objects_stand_clear_of_the_edge_and_of_the_background(train):
  for record in train:
    vivid = _vividness(record.image)
    edge = np.concatenate([vivid[0], vivid[-1], vivid[:, 0], vivid[:, -1]])
    assert edge.max() < 0.6, record.key
    image = record.image.astype(float)
    apart = np.median(image[vivid > 0.9], axis=0) - np.median(image[vivid < 0.1], axis=0)
    assert np.linalg.norm(apart) > 70, record.key


def test_backgrounds_are_neutral_and_differ(train):
  levels = []
  for record in train[:400]:
    ground = record.image[_vividness(record.image) < 0.02].astype(int)
    assert np.abs(ground - ground.mean(1, keepdims=True)).max() < 20, record.key
    levels.append(ground.mean())
  assert (np.histogram(levels, bins=[0, 30, 50, 90])[0] > 20).all()
  assert (np.histogram(levels, bins=[170, 205, 220, 255])[0] > 20).all()


def test_edges_are_averages_of_a_finer_drawing():
  # Without anti-aliasing, edge pixels would be off by up to the whole step between the colours.
  coarse, fine = scenes.Scenes("train", 112, size=32), scenes.Scenes("train", 112, size=256)
  for small, large in zip(coarse, fine, strict=True):
    reduced = _vividness(large.image).reshape(32, 8, 32, 8).mean((1, 3))
    found = _vividness(small.image)
    assert small.captions == large.captions
    assert np.abs(found - reduced).max() < 0.3, small.key
    assert np.abs(found - reduced).mean() < 0.02, small.key
    partly = found[(reduced > 0.1) & (reduced < 0.9)]
    assert len(partly) > 8, small.key
    assert np.mean((partly > 0.02) & (partly < 0.98)) > 0.8, small.key


def test_circles_have_the_area_of_circles():
  ratios = []
  for record in scenes.Scenes("train", 1000):
    if record.label.endswith("circle") and record.captions[-2].split()[3] in ("a", "an", "one"):
      vivid = _vividness(record.image)
      height, width = vivid.sum(0).max(), vivid.sum(1).max()
      ratios.append(vivid.sum() / (height * width))
  assert len(ratios) > 30
  assert np.mean(ratios) == pytest.approx(np.pi / 4, abs=0.03)


def _cut_out(extent, split):
  """([N, 256], [N]): each object of the extent in the middle of 16 x 16 pixels, and its shape."""
  windows, shapes = [], []
  for record in scenes.Scenes(split, 900):
    if f" {extent} " not in f" {record.captions[-3]}":
      continue
    vivid = np.pad(_vividness(record.image), 16)
    labels, _ = ndimage.label(vivid > 0.5, structure=np.ones((3, 3)))
    for i, box in enumerate(ndimage.find_objects(labels)):
      y, x = ((s.start + s.stop) // 2 - 8 for s in box)
      alone = np.where(np.isin(labels, [0, i + 1]), vivid, 0)
      windows.append(alone[y : y + 16, x : x + 16].ravel())
      shapes.append(record.label.split()[1])
  return np.array(windows), np.array(shapes)


@pytest.mark.parametrize("extent", ["small", "large"])
def test_every_pair_of_shapes_can_be_told_apart(extent):
  train_NP, train_N = _cut_out(extent, "train")
  test_NP, test_N = _cut_out(extent, "test")
  mean_CP = np.stack([train_NP[train_N == shape].mean(0) for shape in scenes.SHAPES])
  far_NC = np.linalg.norm(test_NP[:, None] - mean_CP, axis=-1)
  found_N = np.array(scenes.SHAPES)[far_NC.argmin(1)]
  for a, b in itertools.permutations(scenes.SHAPES, 2):
    assert np.mean(found_N[test_N == a] == b) < 0.05, (a, b)
  assert np.mean(found_N == test_N) > 0.985


def test_sources_survive_pickling_and_print_as_they_are_made():
  for source in (scenes.Scenes("test", 20, seed=4, size=40), scenes.Digits("test", 16)):
    copy = pickle.loads(pickle.dumps(source))
    assert _digest([copy[i] for i in range(20)]) == _digest([source[i] for i in range(20)])
    assert repr(copy) == repr(source)
    assert eval(repr(source), vars(scenes)).fingerprint == source.fingerprint


def test_fingerprints_tell_all_arguments_apart():
  sources = [
    *(scenes.Scenes(split, 5, seed) for split in scenes.SPLITS for seed in (0, 1)),
    *(scenes.Scenes("train", 6), scenes.Scenes("train", 5, size=64)),
    *(scenes.Digits(split, size) for split in ("train", "test") for size in (8, 32)),
  ]
  found = [source.fingerprint for source in sources]
  assert len(set(found)) == len(found)
  assert all(re.fullmatch("[0-9a-f]{64}", f) for f in found)


@pytest.mark.parametrize("size", [32, 33, 224])
def test_sizes(size):
  for source in (scenes.Scenes("train", 3, size=size), scenes.Digits("train", size)):
    image = source[2].image
    assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)


def test_keys_and_places():
  source = scenes.Scenes("train", 100)
  assert (len(source), source[17].key, source.locate(17)) == (100, *("scenes/train/17",) * 2)
  assert source[np.int64(17)].key == source[17].key
  digits = scenes.Digits("test")
  assert digits[0].key == "digits/test/0"
  assert digits.locate(0) == f"digits/test/0 (row {digits._rows[0]})"


@pytest.mark.parametrize("index", [-1, 100])
def test_out_of_range(index):
  with pytest.raises(IndexError, match=f"records 0 to 99, asked for {index}"):
    scenes.Scenes("train", 100)[index]
  with pytest.raises(IndexError, match="Digits"):
    scenes.Digits("test")[index * 1000]


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: scenes.Scenes("val", 5), "'val'; choose one of train, test, held_out"),
    (lambda: scenes.Scenes("train", 0), "length must be at least 1, is 0"),
    (lambda: scenes.Scenes("train", 5, size=31), "at least 32 pixels, is 31"),
    (lambda: scenes.Digits("held_out"), "'held_out'; choose one of train, test"),
    (lambda: scenes.Digits("train", 7), "at least 8 pixels, is 7"),
  ],
)
def test_wrong_arguments_say_what_to_do(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_digits_are_scikit_learns_each_in_one_split():
  original = load_digits()
  seen = {}
  for split in ("train", "test"):
    source = scenes.Digits(split, size=8)
    for i, record in enumerate(source):
      row = int(re.search(r"row (\d+)", source.locate(i))[1])
      assert row not in seen
      seen[row] = split
      assert record.label == scenes.DIGIT_CLASSES[original.target[row]]
      assert np.abs(record.image - original.images[row][:, :, None] * 255 / 16).max() <= 0.5
  assert sorted(seen) == list(range(len(original.target)))
  for digit in range(10):
    tests = np.mean([seen[row] == "test" for row in np.flatnonzero(original.target == digit)])
    assert tests == pytest.approx(0.2, abs=0.01)


def test_digits_are_enlarged_bicubically():
  # Keys' cubic kernel with a = -1/2, written out; along rows, then columns, in 0..255 after each.
  far = np.abs((np.arange(32)[:, None] + 0.5) / 4 - 0.5 - np.arange(8))
  near = 1.5 * far**3 - 2.5 * far**2 + 1
  weights = np.where(far < 1, near, -0.5 * far**3 + 2.5 * far**2 - 4 * far + 2) * (far < 2)
  weights /= weights.sum(1, keepdims=True)
  for small, large in zip(scenes.Digits("test", 8), scenes.Digits("test", 32), strict=True):
    wide = np.clip(small.image[..., 0] @ weights.T, 0, 255)
    expected = np.clip(weights @ wide, 0, 255)
    assert np.abs(large.image - expected[:, :, None]).max() < 1.5
    assert large.label == small.label


def test_digit_captions_name_the_digit():
  for record in scenes.Digits("test"):
    assert len(set(record.captions)) == len(record.captions) == 6
    numeral = str(scenes.DIGIT_CLASSES.index(record.label))
    assert all({record.label, numeral} & set(c.split()) for c in record.captions)
    assert {t.format(record.label) for t in scenes.DIGIT_TEMPLATES} <= set(record.captions)
