"""Preparing the packages of clip art and stamps, from small ones made up."""

import io

import numpy as np
import pytest
import trees
from PIL import Image

from clip_jax.data import images
from tools.prepare import captions, held_out


def test_clip_art_and_stamps(tmp_path):
  trees.art_tree(tmp_path / "tree")
  assert trees.prepare_clipart(tmp_path) == 0
  out = tmp_path / "out"
  train, test, stamps = (trees.read_all(out, split) for split in ("train", "test", "stamps_test"))
  assert len(test) == 7
  assert stamps == [r for r in test if r.key.startswith("stamps/")]
  assert {r.label for r in stamps} == {"bird"}
  named = trees.read_rejected(out)
  assert {k: v for k, v in named.items() if v != "same_captions"} == {
    "openclipart/alias": "alias",
    "openclipart/things/twin": "duplicate",
    "openclipart/things/white": "blank",
    "openclipart/things/cut": "truncated",
    "openclipart/things/alone": "no_metadata",
    "openclipart/things/01_._": "no_caption",
    "stamps/animals/birds/hen_mirror": "no_caption",
    "stamps/animals/birds/translated": "no_caption",
    "stamps/animals/birds/latin": "encoding",
    "stamps/animals/birds/drawn": "svg_only",
  }
  assert sum(v == "same_captions" for v in named.values()) == 5
  manifest = trees.read_manifest(out)
  assert manifest["classes"] == ["bird"]
  assert manifest["captions_dropped"]["title: about the file"] == 2
  by_key = {r.key: r for r in train + test}
  boat = by_key["openclipart/things/boat_artist_01"]
  assert boat.captions == ("Red boat", "A drawn boat.", "clip art of boat, thing")
  assert by_key["stamps/animals/frog"].captions == ("A frog.",)
  assert by_key["stamps/animals/frog"].label is None
  assert by_key["openclipart/things/say_nothing"].captions == ("say nothing",)
  assert images.decode(boat.image).size == (20, 30)


@pytest.mark.parametrize(
  ("entities", "name", "kept"),
  [
    ('<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;">', "b", False),
    ('<!ENTITY x SYSTEM "file:///etc/passwd">', "x", False),
    (f'<!ENTITY x "{"a" * 1000}">', "x", False),
    ('<!ENTITY % x "boat">', "amp", False),
    ('<!ENTITY x "boat">', "x", True),  # as drawing programs abbreviate namespaces
  ],
)
def test_entities_that_could_grow_or_read_files_are_refused(tmp_path, entities, name, kept):
  trees.art_tree(tmp_path / "tree")
  trees.clip_art(tmp_path / "tree", "things/zebra", 60, f"A green &{name};")
  path = tmp_path / "tree/usr/share/openclipart/svg/things/zebra.svg"
  path.write_text(path.read_text().replace("<svg", f"<!DOCTYPE svg [{entities}]><svg", 1))
  assert trees.prepare_clipart(tmp_path) == 0
  found = {
    r.key: r.captions for s in ("train", "test") for r in trees.read_all(tmp_path / "out", s)
  }
  assert trees.read_rejected(tmp_path / "out").get("openclipart/things/zebra") == (
    None if kept else "no_metadata"
  )
  assert found.get("openclipart/things/zebra") == (("A green boat",) if kept else None)


def test_the_manifest_counts_records_and_captions(tmp_path):
  trees.art_tree(tmp_path / "tree")
  assert trees.prepare_clipart(tmp_path) == 0
  manifest = trees.read_manifest(tmp_path / "out")
  assert manifest["inputs"] == manifest["kept"] + sum(manifest["rejected"].values())
  for name, split in manifest["splits"].items():
    found = trees.read_all(tmp_path / "out", name)
    assert split["records"] == len(found)
    assert split["captions"] == sum(len(r.captions) for r in found)


def test_packages_may_stand_in_folders_of_their_own(tmp_path):
  trees.art_tree(tmp_path / "all")
  for part in ("openclipart/png", "openclipart/svg", "tuxpaint"):
    source, name = tmp_path / "all/usr/share" / part, part.replace("/", "-")
    target = tmp_path / f"tree/debs/{name}/usr/share" / part
    target.parent.mkdir(parents=True)
    source.rename(target)
  assert trees.prepare_clipart(tmp_path) == 0


def test_no_test_picture_or_caption_is_in_training(tmp_path):
  trees.art_tree(tmp_path / "tree")
  trees.clip_art(tmp_path / "tree", "more/boat", 300, "red  BOAT")  # the caption of another picture
  nearly = np.asarray(Image.open(io.BytesIO(trees.png(4)))).copy()
  nearly[0, 0] ^= 64  # the picture of things/engine, all but one pixel
  path = tmp_path / "tree/usr/share/openclipart/png/more/other.png"
  trees.clip_art(tmp_path / "tree", "more/other", 301, "Something else")
  Image.fromarray(nearly).save(path)
  assert trees.prepare_clipart(tmp_path, "--test-clipart", "8", "--test-stamps", "8") == 0
  train, test = (trees.read_all(tmp_path / "out", split) for split in ("train", "test"))
  firsts = [captions.letters(r.captions[0]) for r in test]
  assert len(set(firsts)) == len(firsts)
  assert not set(firsts) & {captions.letters(c) for r in train for c in r.captions}
  assert trees.prepare_clipart(tmp_path, "--test-clipart", "9") == 2  # these eight were all
  keys = {r.key for r in test}
  assert not keys & {"openclipart/things/boat_artist_01", "openclipart/more/boat"}
  assert not keys & {"openclipart/things/engine_artist_01", "openclipart/more/other"}
  assert not keys & {"stamps/animals/birds/apple", "stamps/animals/birds/apple2"}


def test_too_few_to_hold_out_is_an_error(tmp_path, capsys):
  trees.art_tree(tmp_path / "tree")
  assert trees.prepare_clipart(tmp_path, "--test-stamps", "99") == 2
  assert "are unlike all others; ask for fewer (--test-stamps 8)" in capsys.readouterr().err


def test_clip_art_is_reduced_to_its_longer_side(tmp_path):
  trees.art_tree(tmp_path / "tree")
  path = tmp_path / "tree/usr/share/openclipart/png/things/apple_artist_01.png"
  path.write_bytes(trees.png(0, (400, 100)))
  assert trees.prepare_clipart(tmp_path, "--max-side", "64") == 0
  everything = trees.read_all(tmp_path / "out", "train") + trees.read_all(tmp_path / "out", "test")
  sizes = {r.key: images.decode(r.image).size for r in everything}
  assert sizes["openclipart/things/apple_artist_01"] == (64, 16)
  assert max(map(max, sizes.values())) == 64


@pytest.mark.parametrize(
  ("key", "title", "text", "keywords", "expected"),
  [
    ("a/x", "guitar2", "acoustic guitar", (), ("guitar", "acoustic guitar")),
    ("a/x", "arrow-up_red", "", ("arrow",), ("arrow up red", "clip art of arrow")),
    ("a/x", "Clipart by Some One - bee", "", (), ("bee",)),
    ("a/no_entry_02", "Part of the Flat Icon Collection", "", (), ("no entry",)),
    ("a/dog_ann_artis_01", "", "", (), ("dog",)),
    ("a/x", "Cat", "CAT!", (), ("Cat",)),
    ("a/x", "Cat", "someone@example.org", (), ("Cat",)),
    (
      "a/x",
      "Cat",
      "A fat cat. Made with Inkscape. It sleeps.",
      (),
      ("Cat", "A fat cat. It sleeps."),
    ),
    ("a/x", "Cat", "", ("hash", "0x12ab", "pet_shop", "pet_shop"), ("Cat", "clip art of pet shop")),
    ("a/x", "x", "", (), ()),
  ],
)
def test_captions_of_clip_art(key, title, text, keywords, expected):
  metadata = {key: captions.Metadata(title, text, keywords, "Ann Artist")}
  assert captions.of_clip_art(metadata, captions.Counter())[key] == expected


def test_a_long_description_ends_with_a_sentence():
  text = "One sentence that says a thing or two about it. " * 9
  metadata = {"a/x": captions.Metadata("Cat", text)}
  (_, found) = captions.of_clip_art(metadata, captions.Counter())["a/x"]
  assert 40 < len(found) <= 200
  assert found.endswith("about it.")


def test_the_small_pictures_tell_sizes_apart_from_pictures():
  image = Image.open(io.BytesIO(trees.png(1, (64, 64)))).convert("RGB")
  small = held_out.small_picture(image)
  larger = held_out.small_picture(image.resize((128, 128)))
  other = held_out.small_picture(Image.open(io.BytesIO(trees.png(2, (64, 64)))).convert("RGB"))
  assert small @ larger > 0.99
  assert small @ other < 0.95
