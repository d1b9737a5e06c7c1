"""What lies at an EVALSET's place, of whatever kind, and what counts as nearly the same."""

import io
import json
import pathlib

import pyarrow
import pyarrow.parquet
import pytest
import tfds_trees
import trees
from PIL import Image

from tools import prepare_data
from tools.prepare import evaluation_sets, look


def _colour(colour: object, size: tuple[int, int] = (24, 24), kind: str = "PNG") -> bytes:
  out = io.BytesIO()
  Image.new("RGB", size, colour).save(out, kind)
  return out.getvalue()


def _wds(root: pathlib.Path) -> list[str]:
  """CLIP_benchmark's layout: labels, no captions."""
  for split, seed in (("train", 0), ("test", 1)):
    files = {"s0.webp": trees.png(seed, kind="WEBP"), "s0.cls": "0", "s1.jpg": b"", "s1.cls": "1"}
    files["s1.jpg"] = trees.png(seed + 2, kind="JPEG")
    trees.tar(root / "wds_x" / split / "0.tar", files)
    trees.write(root / "wds_x" / split / "nshards.txt", "1")
  trees.write(root / "wds_x" / "classnames.txt", "a\nb\n")
  return ["wds_x:test", "wds_x/test", "wds_x/test/0.tar", "wds_x", "wds_x/test/{0..0}.tar"]


def _img2dataset(root: pathlib.Path) -> list[str]:
  for split, seeds in (("train", (0, 2)), ("test", (1, 3))):
    files = {f"{i}.png": trees.png(i) for i in seeds} | {f"{i}.json": "{}" for i in seeds}
    trees.tar(root / "pairs" / f"{split}-0.tar", files)
    trees.write(root / "pairs" / f"{split}-0.parquet", "no images")
  return ["pairs:test", "pairs/test-0.tar", "pairs"]


def _parquet(root: pathlib.Path) -> list[str]:
  for split, seeds in (("train", (0, 2)), ("test", (1, 3))):
    path = root / "hub" / "data" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": [{"bytes": trees.png(i), "path": None} for i in seeds], "text": ["a", ""]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
  return ["hub:test", "hub", f"hub/data/{path.name}"]


def _table(root: pathlib.Path) -> list[str]:
  rows = []
  for i in (1, 3):
    trees.write(root / "table" / f"{i}.png", trees.png(i))
    rows.append(json.dumps({"image": f"{i}.png", "caption": "a"}))
  trees.write(root / "table" / "t.jsonl", "\n".join(rows))
  return ["table/t.jsonl", "table"]  # a table, and a folder of images


def _tfds(root: pathlib.Path) -> list[str]:
  mask = tfds_trees.file(b"no image")
  shares = {
    split: [
      {"image": tfds_trees.file(trees.png(i)), "label": "a", "segmentation_mask": mask}
      for i in seeds
    ]
    for split, seeds in (("train", (0, 2)), ("test", (1, 3)))
  }
  tfds_trees.write(root, "digits", tfds_trees.classes(("a", "b")), shares)
  (version,) = (root / "digits").iterdir()
  return ["digits:test", "digits", f"{version}:test"]


def _images(places: list[str]) -> dict[str, list[object]]:
  found = {}
  for place in places:
    parts = evaluation_sets.evaluated(place).parts
    found[place] = [item.read().image for part in parts for item in part()]
  return found


@pytest.mark.parametrize("lay", [_wds, _img2dataset, _parquet, _table, _tfds])
def test_the_images_of_each_kind_of_copy(tmp_path, monkeypatch, lay):
  """Images 1 and 3 are the split "test", 0 and 2 are "train": without a split all are compared."""
  monkeypatch.chdir(tmp_path)
  kinds = ("WEBP", "WEBP", "JPEG", "JPEG") if lay is _wds else ("PNG",) * 4
  made = [trees.png(i, kind=kind) for i, kind in enumerate(kinds)]
  for place, found in _images(lay(tmp_path)).items():
    whole = ":" not in place and place in ("wds_x", "pairs", "hub", "digits")
    assert sorted(found) == sorted(made if whole else made[1::2]), place


@pytest.mark.parametrize(
  ("place", "words"),
  [
    ("pairs:val", "pairs/val: no such folder, and no .tar or .parquet file whose name has 'val'"),
    ("digits:val", "no split 'val'; it has "),
    ("cut.tar", "cut.tar: cut short at byte "),
    ("s3://bucket/x", "name its split, as s3://bucket/x:test"),
    ("pairs/train-0.parquet", "pairs/train-0.parquet: "),
  ],
)
def test_what_cannot_be_compared_is_said(tmp_path, monkeypatch, capsys, place, words):
  monkeypatch.chdir(tmp_path)
  trees.photos(tmp_path, 1)
  _img2dataset(tmp_path)
  if place.startswith("digits"):
    _tfds(tmp_path)
  trees.write(tmp_path / "cut.tar", (tmp_path / "pairs" / "test-0.tar").read_bytes()[:-600])
  command = ["folder", "photos", "out", "--captions", "captions.csv", "--against", place]
  capsys.readouterr()
  assert prepare_data.main(command) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: --against ")
  assert words in error
  assert len(error.splitlines()) == 1
  assert not (tmp_path / "out").exists()


def test_images_of_one_colour_are_like_themselves_alone(tmp_path):
  """Whose perceptual hashes are all the same, or one bit apart."""
  ramp = Image.linear_gradient("L").convert("RGB")
  out = io.BytesIO()
  ramp.save(out, "PNG")
  made = {
    "white": _colour("white"), "black": _colour("black"), "red": _colour("red"),
    "also_white": _colour("white", kind="BMP"), "photo": trees.png(1), "evaluated": _colour("blue"),
    "ramp": out.getvalue(), "green": _colour("green"), "photo_again": trees.png(1, kind="BMP"),
  }  # fmt: skip
  rows = ["image,caption"]
  for name, data in made.items():
    trees.write(tmp_path / "photos" / f"{name}.png", data)
    rows.append(f"{name}.png,a picture")
  trees.write(tmp_path / "t.csv", "\n".join(rows))
  trees.write(tmp_path / "eval" / "blue.png", _colour("blue"))
  command = ["folder", str(tmp_path / "photos"), str(tmp_path / "out"), "--deduplicate", "near"]
  command += ["--captions", str(tmp_path / "t.csv"), "--against", str(tmp_path / "eval")]
  assert prepare_data.main(command) == 0
  assert trees.read_rejected(tmp_path / "out") == {
    "t.csv:5": "duplicate",
    "t.csv:7": "in_evaluation_set",
    "t.csv:10": "duplicate",
  }
  assert look.looks_of(Image.new("RGB", (9, 9))) != look.looks_of(Image.new("RGB", (9, 9), "red"))
