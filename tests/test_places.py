"""What lies at a path: each kind known by itself, splits by folder or name, mistakes told."""

import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tfds_trees
import trees

from clip_jax import config as c
from clip_jax import parsing
from clip_jax.data import (
  parquet_source,
  pipeline,
  places,
  records,
  storage,
  table_source,
  tfds_source,
  webdataset_source,
)
from clip_jax.data.records import RecordError


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def _open(path, split="train", **options):
  return pipeline.open_source(c.Source(path=str(path), split=split, **options), 32, 0)


def _tar(path, *numbers):
  pairs = {}
  for i in numbers:
    pairs |= trees.pair(i)
  return trees.tar(path, pairs)


def _parquet(path, *numbers):
  path.parent.mkdir(parents=True, exist_ok=True)
  columns = {"image": [trees.png(i) for i in numbers], "text": [f"picture {i}" for i in numbers]}
  pq.write_table(pa.table(columns), path)
  return path


def _captions(source):
  return [source[i].captions[0] for i in range(len(source))]


def test_each_kind_is_known_by_what_lies_there(tmp_path):
  record = records.Record("a", trees.png(1), ("picture 1",))
  trees.array_record(tmp_path / "ours", [record])
  assert isinstance(_open(tmp_path / "ours", "test"), records.ArrayRecordSource)
  _tar(tmp_path / "tars" / "0.tar", 1)
  trees.write(tmp_path / "tars" / "0.parquet", "img2dataset's, not read")
  _parquet(tmp_path / "hf" / "data" / "train-00000-of-00001.parquet", 1)
  trees.write(tmp_path / "hf" / "README.md", "")
  trees.photos(tmp_path / "own", 2)
  kinds = {
    "tars": webdataset_source.WebdatasetSource,
    "tars/0.tar": webdataset_source.WebdatasetSource,
    "hf": parquet_source.ParquetSource,
    "hf/data/train-00000-of-00001.parquet": parquet_source.ParquetSource,
  }
  for path, kind in kinds.items():
    source = _open(tmp_path / path)
    assert isinstance(source, kind)
    assert _captions(source) == ["picture 1"]
  source = _open(tmp_path / "own", images=str(tmp_path / "own" / "photos"))
  assert isinstance(source, table_source.TableSource)
  assert _captions(source) == ["picture 0", "picture 1"]
  table = tmp_path / "own" / "captions.csv"
  assert _captions(_open(table, images=str(tmp_path / "own" / "photos"))) == _captions(source)


def test_a_kind_by_name_where_a_folder_has_several(tmp_path):
  _tar(tmp_path / "0.tar", 1)
  _parquet(tmp_path / "0.parquet", 2)
  assert _captions(_open(tmp_path)) == ["picture 1"]
  assert _captions(_open(tmp_path, kind="parquet")) == ["picture 2"]
  with pytest.raises(
    RecordError, match=r"no pairs of kind 'table' there; it has 1 \.parquet file, 1 \.t"
  ):
    _open(tmp_path, kind="table")
  with pytest.raises(RecordError, match=r"manifest\.json: not found"):
    _open(tmp_path, kind="array_record")
  with pytest.raises(RecordError, match=r"no dataset_info\.json in it"):
    _open(tmp_path, kind="tfds")


def test_splits(tmp_path):
  for name, number in (("train", 1), ("val", 2)):
    _tar(tmp_path / "folders" / name / "0.tar", number)
    _tar(tmp_path / "names" / f"cc3m-{name}-0000.tar", number)
  for place in ("folders", "names"):
    assert _captions(_open(tmp_path / place)) == ["picture 1"]
    assert _captions(_open(tmp_path / place, "val")) == ["picture 2"]
  assert _captions(_open(tmp_path / "folders" / "val")) == ["picture 2"]
  with pytest.raises(RecordError, match="no split 'test'; it has train, val"):
    _open(tmp_path / "names", "test")
  with pytest.raises(RecordError, match=r"no pairs there; it has folders \(train, val\)\. W"):
    _open(tmp_path / "folders", "test")
  assert _captions(_open(tmp_path / "names" / "cc3m-val-0000.tar")) == ["picture 2"]
  _tar(tmp_path / "plain" / "0.tar", 3)
  with pytest.raises(RecordError, match="no split 'val'; it has no split in its files' names"):
    _open(tmp_path / "plain", "val")


def test_ranges_of_files(tmp_path):
  for i in range(12):
    _tar(tmp_path / f"{i:03d}.tar", i)
  assert _captions(_open(tmp_path / "{003..010}.tar")) == [f"picture {i}" for i in range(3, 11)]
  with pytest.raises(RecordError, match=r"012\.tar: No such file"):
    _open(tmp_path / "{000..012}.tar")
  with pytest.raises(RecordError, match=r"\{5\.\.2\} names no files"):
    _open(tmp_path / "{5..2}.tar")


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({}, "no pairs there; it has nothing. Wanted: a folder with manifest.json"),
    ({"a.jpg": "", "b.jpg": "", "c.txt": ""}, "it has 2 .jpg files, 1 .txt file. Wanted"),
    ({"a.csv": "image,text\n", "b.csv": ""}, r"2 tables \(a\.csv, b\.csv\); name one of them"),
    ({"0.tar": ""}, r"0\.tar: cut short at byte 0"),
  ],
)
def test_what_is_there_and_what_would_do_is_said(tmp_path, files, message):
  for name, text in files.items():
    trees.write(tmp_path / "data" / name, text)
  (tmp_path / "data").mkdir(exist_ok=True)
  with pytest.raises(RecordError, match=message):
    _open(tmp_path / "data")


def test_a_path_that_is_not_there(tmp_path):
  with pytest.raises(RecordError, match=r"none: nothing is there .*Wanted: a folder with"):
    _open(tmp_path / "none")
  trees.write(tmp_path / "pairs.txt", "")
  with pytest.raises(RecordError, match=r"pairs\.txt: no file of a kind that is read\. Wanted"):
    _open(tmp_path / "pairs.txt")
  with pytest.raises(RecordError, match="a source without path"):
    places.open_files(c.Source())


def _tfds(root, features, example, **options):
  return tfds_trees.write(root, "pairs", features, {"train": [example(i) for i in range(3)]})


def test_options_that_a_kind_does_not_have_are_refused(tmp_path):
  _tar(tmp_path / "0.tar", 1)
  for name in ("image_column", "images"):
    with pytest.raises(RecordError, match=f"{name} is 'x', but webdataset has no such option"):
      _open(tmp_path, **{name: "x"})


def test_tfds_is_trained_on(tmp_path):
  def example(i):
    texts = [{"id": k, "text": f"picture {i} {k}"} for k in range(2)]
    image = tfds_trees.file(trees.png(i))
    return {"image": image, "image/filename": f"{i}.png", "captions": texts}

  place = _tfds(tmp_path, tfds_trees.captions(), example)
  by_name, by_version = _open(tmp_path / "pairs"), _open(place)
  assert isinstance(by_name, tfds_source.TfdsPairs)
  assert repr(by_name) == repr(by_version)
  found = {by_name[i].key: by_name[i] for i in range(3)}
  assert found["1.png"].captions == ("picture 1 0", "picture 1 1")
  assert found["1.png"].image == trees.png(1)
  with pytest.raises(RecordError, match="no split 'val'; it has train"):
    _open(place, "val")
  shard = next(place.glob("*.array_record*"))
  before = by_name.fingerprint
  shard.write_bytes(shard.read_bytes()[:-1] + b"x")
  assert _open(place).fingerprint != before


def test_tfds_without_captions_or_in_the_older_format(tmp_path):
  features = tfds_trees.classes(["a", "b"])

  def example(i):
    mask = tfds_trees.file(b"")
    return {"image": tfds_trees.file(trees.png(i)), "label": "a", "segmentation_mask": mask}

  place = _tfds(tmp_path, features, example)
  message = r"no caption captions/text, .*; it has image, label, segmentation_mask; name the"
  with pytest.raises(RecordError, match=message):
    _open(place)
  info = place / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(RecordError, match=r"its format is tfrecord.*--file_format=array_record"):
    _open(place)


def test_an_older_config_is_completed():
  saved = c.to_dict(
    c.Config(
      data=c.Data(sources=(c.Source("array_record", "p"),)),
      evaluation=c.Evaluation(tasks=(c.Task("t", source=c.Source("digits")),)),
    )
  )
  sources = [saved["data"]["sources"][0], saved["evaluation"]["tasks"][0]["source"]]
  for source in sources:
    for name in ("image_column", "caption_column", "images"):
      del source[name]
  config = parsing.parse(parsing.upgrade(saved))
  assert config.data.sources == (c.Source("array_record", "p"),)
  assert "images" not in sources[0]


def test_opening_says_that_it_indexes(tmp_path, caplog):
  _tar(tmp_path / "0.tar", 1)
  with caplog.at_level(logging.WARNING):
    _open(tmp_path)
    assert "indexing 1 of 1 tar files, once" in caplog.text
    caplog.clear()
    _open(tmp_path)
  assert not caplog.records
  assert storage.listing(str(tmp_path))[0].name == "0.tar"
