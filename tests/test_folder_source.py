"""Images in folders: a folder a class, and the lists that data sets are published with."""

import json
import os

import pytest
import trees

from clip_jax.data import folder_source
from clip_jax.data.records import RecordError

NAMES = {"b": "bird", "c": "cat"}


def _tree(root):
  for i, name in enumerate(("c/10.png", "c/2.PNG", "b/deep/1.png", "other/1.png")):
    trees.write(root / name, trees.png(i))
  trees.write(root / "c" / "GT-c.csv", "beside")
  trees.write(root / "c" / ".hidden", "beside")


def _all(source):
  return [source[i] for i in range(len(source))]


def test_a_folder_a_class_sorted_by_path(tmp_path):
  _tree(tmp_path)
  assert folder_source.class_folders([tmp_path]) == ("b", "c", "other")
  source = folder_source.from_class_folders(tmp_path, [tmp_path], NAMES)
  assert [(r.key, r.label, r.image) for r in _all(source)] == [
    ("b/deep/1.png", "bird", trees.png(2)),
    ("c/10.png", "cat", trees.png(0)),
    ("c/2.PNG", "cat", trees.png(1)),
  ]
  assert source.locate(1) == str(tmp_path / "c" / "10.png")
  with pytest.raises(IndexError):
    source[-1]


def test_folders_join(tmp_path):
  for i, split in enumerate(("train", "valid")):
    trees.write(tmp_path / split / "c" / "1.png", trees.png(i))
  folders = [tmp_path / "train", tmp_path / "valid"]
  source = folder_source.from_class_folders(tmp_path, folders, NAMES)
  assert [r.key for r in _all(source)] == ["train/c/1.png", "valid/c/1.png"]


def test_a_file_that_is_no_image_is_named(tmp_path):
  trees.write(tmp_path / "c" / "1.ppm", "P6")
  with pytest.raises(RecordError, match=r"c/1\.ppm: no image of a kind that is read; convert"):
    folder_source.from_class_folders(tmp_path, [tmp_path], NAMES)


def test_the_fingerprint_is_that_of_the_content(tmp_path):
  def fingerprint(names=NAMES):
    return folder_source.from_class_folders(tmp_path, [tmp_path], names).fingerprint

  _tree(tmp_path)
  seen = {fingerprint(), fingerprint({"b": "bird", "c": "dog"})}
  os.utime(tmp_path / "c" / "10.png", (0, 0))
  assert fingerprint() in seen
  trees.write(tmp_path / "c" / "10.png", trees.png(9))
  seen.add(fingerprint())
  (tmp_path / "c" / "10.png").rename(tmp_path / "c" / "11.png")
  seen.add(fingerprint())
  assert len(seen) == 4


def test_json_lines(tmp_path):
  lines = [{"img": "img/01.png", "label": 1, "text": "x"}, {"img": "img/02.png", "label": 0}]
  for i, line in enumerate(lines):
    trees.write(tmp_path / line["img"], trees.png(i))
  trees.write(tmp_path / "dev.jsonl", "\n".join(map(json.dumps, lines)) + "\n")
  found = _all(folder_source.from_json_lines(tmp_path / "dev.jsonl", ("meme", "hateful")))
  assert [(r.key, r.label, r.image) for r in found] == [
    ("img/01.png", "hateful", trees.png(0)),
    ("img/02.png", "meme", trees.png(1)),
  ]


@pytest.mark.parametrize(
  ("line", "match"),
  [
    ('{"img": "img/1.png", "label": 2}', "label 2 is out of range"),
    ('{"img": "img/1.png"}', "no 'label'"),
    ('{"img": "img/9.png", "label": 1}', "img/9.png: no such image"),
    ('{"img": "../secret.png", "label": 1}', r"secret\.png: no such image"),
    ("no json", "Expecting value"),
    ("[]", "list indices"),
  ],
)
def test_bad_json_lines_are_named(tmp_path, line, match):
  trees.write(tmp_path / "secret.png", trees.png(0))
  trees.write(tmp_path / "data" / "img" / "1.png", trees.png(0))
  path = tmp_path / "data" / "dev.jsonl"
  trees.write(path, '{"img": "img/1.png", "label": 1}\n' + line + "\n")
  with pytest.raises(RecordError, match=rf"dev\.jsonl:2: .*{match}"):
    folder_source.from_json_lines(path, ("meme", "hateful"))


def _karpathy(root, name="coco", **changes):
  images = [
    {"filepath": "val2014", "filename": f"{i}.png", "split": split,
     "sentences": [{"raw": f"caption {i} {k}"} for k in range(6)]}
    for i, split in enumerate(("test", "train", "restval", "test"))
  ]  # fmt: skip
  images[3] |= changes
  trees.write(root / f"dataset_{name}.json", json.dumps({"images": images}))
  return root / f"dataset_{name}.json"


def test_karpathys_splits(tmp_path):
  for i in range(4):
    trees.write(tmp_path / "val2014" / f"{i}.png", trees.png(i))
  path = _karpathy(tmp_path)
  test = _all(folder_source.from_karpathy(path, ("test",)))
  assert [r.key for r in test] == ["val2014/0.png", "val2014/3.png"]
  assert test[1].captions == tuple(f"caption 3 {k}" for k in range(5))
  assert test[1].image == trees.png(3)
  train = folder_source.from_karpathy(path, ("train", "restval"), captions=6)
  assert [len(r.captions) for r in _all(train)] == [6, 6]


def test_flickrs_images_lie_in_a_folder_of_their_own(tmp_path):
  for i in (0, 3):
    trees.write(tmp_path / "flickr30k-images" / f"{i}.png", trees.png(i))
  images = [{"filename": f"{i}.png", "split": "test", "sentences": [{"raw": "x"}]} for i in (0, 3)]
  trees.write(tmp_path / "dataset_flickr30k.json", json.dumps({"images": images}))
  found = folder_source.from_karpathy(tmp_path / "dataset_flickr30k.json", ("test",))
  assert [r.image for r in _all(found)] == [trees.png(0), trees.png(3)]


def test_a_damaged_list_of_karpathys_is_named(tmp_path):
  for i in range(3):
    trees.write(tmp_path / "val2014" / f"{i}.png", trees.png(i))
  for changes, match in (
    ({}, r"image 3: val2014/3\.png: no such image"),
    ({"sentences": None}, "image 3: 'NoneType'"),
    ({"sentences": [{}]}, "image 3: no 'raw'"),
    ({"filepath": "../.."}, "image 3: .*no such image"),
  ):
    with pytest.raises(RecordError, match=match):
      folder_source.from_karpathy(_karpathy(tmp_path, **changes), ("test",))
  trees.write(tmp_path / "dataset_coco.json", "{}")
  with pytest.raises(RecordError, match="no list of Karpathy"):
    folder_source.from_karpathy(tmp_path / "dataset_coco.json", ("test",))


def _voc(root, objects, split="test"):
  """`objects`: of each image, (class, difficult) of its things."""
  for i, things in enumerate(objects):
    xml = "".join(
      f"<object><name>{name}</name><difficult>{difficult}</difficult></object>"
      for name, difficult in things
    )
    trees.write(root / "Annotations" / f"{i:06d}.xml", f"<annotation>{xml}</annotation>")
    trees.write(root / "JPEGImages" / f"{i:06d}.jpg", trees.png(i, kind="JPEG"))
  lines = "".join(f"{i:06d}\n" for i in range(len(objects)))
  trees.write(root / "ImageSets" / "Main" / f"{split}.txt", lines)


def test_pascal_vocs_annotations(tmp_path):
  names = {"dog": "dog", "diningtable": "dining table", "person": "person"}
  _voc(tmp_path, [[("dog", 0), ("person", 1), ("person", 0)], [("diningtable", 1), ("dog", 0)], []])
  found = _all(folder_source.from_voc(tmp_path, "test", names))
  assert [r.label for r in found] == ["dog; person", "dog; dining table (difficult)", ""]
  assert [r.key for r in found] == ["000000.jpg", "000001.jpg", "000002.jpg"]
  _voc(tmp_path, [[("unicorn", 0)]])
  with pytest.raises(RecordError, match=r"000000\.xml: 'unicorn' is none of the 3 classes"):
    folder_source.from_voc(tmp_path, "test", names)
  trees.write(tmp_path / "Annotations" / "000000.xml", "<annotation>")
  with pytest.raises(RecordError, match=r"000000\.xml: no element found"):
    folder_source.from_voc(tmp_path, "test", names)
  (tmp_path / "Annotations" / "000000.xml").unlink()
  with pytest.raises(RecordError, match=r"000000\.xml: cannot be read"):
    folder_source.from_voc(tmp_path, "test", names)
  with pytest.raises(RecordError, match=r"trainval\.txt: cannot be read"):
    folder_source.from_voc(tmp_path, "trainval", names)
