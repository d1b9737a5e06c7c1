"""Pairs of WebDataset's tar files, read in place: indexes, cuts, several processes, batches."""

import json
import logging
import os
import pathlib
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import test_pipeline
import trees

from clip_jax import config as c
from clip_jax.data import places, storage, tar, tar_index
from clip_jax.data.records import RecordError
from clip_jax.data.webdataset_source import SUFFIXES, WebdatasetSource


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.delenv("CLIP_JAX_CACHE", raising=False)


def _open(folder, **options):
  return WebdatasetSource(storage.files(str(folder), SUFFIXES), **options)


def _img2dataset(folder, shards=2, pairs=4):
  """As img2dataset writes them, with what lies beside."""
  for shard in range(shards):
    files = {}
    for i in range(shard * pairs, shard * pairs + pairs):
      said = {"caption": f"told {i}", "url": "http://example.org", "status": "success", "n": [1]}
      files |= trees.pair(i) | {f"{i:09d}.json": json.dumps(said)}
    trees.tar(folder / f"{shard:05d}.tar", files)
    trees.write(folder / f"{shard:05d}.parquet", "not read")
    trees.write(folder / f"{shard:05d}_stats.json", "not read")
  return folder


def test_the_pairs_are_those_that_tarfile_reads(tmp_path):
  source = _open(_img2dataset(tmp_path))
  expected = {}
  for path in sorted(tmp_path.glob("*.tar")):
    with tarfile.open(path) as archive:
      for member in archive:
        expected[f"{path.stem}/{member.name}"] = archive.extractfile(member).read()
  assert len(source) == 8
  for i in range(8):
    record = source[i]
    assert record.image == expected[record.key + ".jpg"]
    assert record.captions == (expected[record.key + ".txt"].decode(),)
  assert [source[i].key for i in (0, 7)] == ["00000/000000000", "00001/000000007"]
  assert source.locate(5) == f"{tmp_path / '00001.tar'} sample 000000005"
  told = _open(tmp_path, caption="caption")
  assert told[5].captions == ("told 5",)
  assert told.fingerprint != source.fingerprint
  with pytest.raises(IndexError, match="no record 8, it has 8"):
    source[8]
  assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".index") == [
    "00000.tar.index",
    "00001.tar.index",
  ]


def test_a_source_is_pickled_and_is_called_by_its_content(tmp_path):
  one, two = (_open(_img2dataset(tmp_path / name)) for name in "ab")
  again = pickle.loads(pickle.dumps(one))
  assert again[3] == one[3]
  assert repr(one) == repr(two) == repr(again) == f"WebdatasetSource({two.fingerprint[:16]})"
  trees.tar(tmp_path / "a" / "00001.tar", trees.pair(4) | trees.pair(9))
  assert _open(tmp_path / "a").fingerprint != one.fingerprint


def test_what_is_no_pair_is_left_out_and_counted(tmp_path, caplog):
  picture = trees.png(1)
  files = {
    "alone.jpg": picture,
    "text.txt": "no image",
    "link.png": trees.special("link.png", tarfile.SYMTYPE, "/etc/passwd"),
    "link.txt": "a link",
    "../up/good.PNG": picture,
    "../up/good.txt": "  a name is\n no path ",
    "seg.mask.png": picture,
    "seg.txt": "a mask is no image",
    "größe.webp": picture,
    "größe.json": '{"caption": ["one", "two"]}',
    "nan.jpg": picture,
    "nan.json": '{"caption": NaN}',
    "other.jpg": picture,
    "other.json": '{"text": "x"}',
    "latin.jpg": picture,
    "latin.txt": "größe".encode("latin-1"),
    "empty.jpg": picture,
    "empty.txt": "",
    "long.jpg": picture,
    "long.txt": "a" * 1_000_001,
    "x" * 200 + "/far.txt": "far",
    "far.bin": bytes(200_000),
    "x" * 200 + "/far.jpg": picture,
  }
  trees.tar(tmp_path / "0.tar", files)
  with caplog.at_level(logging.WARNING):
    source = _open(tmp_path)
  assert "5 of 13 samples are no pairs and left out; first" in caplog.text
  assert "0.tar sample alone: no caption (.txt, .json)" in caplog.text
  assert [source[i].captions for i in (0, 1, 5, 7)] == [
    ("a name is no path",),
    ("one", "two"),
    (),
    ("far",),
  ]
  assert [source[i].key for i in (0, 1)] == ["0/../up/good", "0/größe"]
  assert source[7].image == picture
  for i, why in ((2, "NaN is no JSON"), (3, "no field 'caption' in its .json, which has text"),
                 (4, "can't decode"), (6, "its caption has 1,000,001 bytes")):  # fmt: skip
    with pytest.raises(RecordError, match=f"0.tar sample .*{why}"):
      source[i]
  with pytest.raises(RecordError, match=r"no \.json file, whose field was asked for"):
    _open(tmp_path, caption="caption")[0]
  trees.tar(tmp_path / "none" / "0.tar", {"a.txt": "x"})
  with pytest.raises(RecordError, match=r"0\.tar: no pairs .* in 1 tar files: a: no image \(\.jpg"):
    _open(tmp_path / "none")


def test_a_shard_cut_at_every_block_is_an_error_or_whole(tmp_path):
  """Drill 7. The error names file and byte, also where an index of the whole file is there."""
  whole = trees.tar(tmp_path / "0.tar", trees.pair(0) | trees.pair(1)).read_bytes()
  expected = [_open(tmp_path)[i] for i in range(2)]
  end = max(m.offset + m.size for m in tar.members(tmp_path / "0.tar"))
  end += -end % tar.BLOCK + 2 * tar.BLOCK  # what must be there
  cuts = [*range(0, len(whole), tar.BLOCK), *range(77, len(whole), 1111)]
  found = 0
  for size in cuts:
    (tmp_path / "0.tar").write_bytes(whole[:size])
    if size >= end and size % tar.BLOCK == 0:
      source = _open(tmp_path)
      assert [source[i] for i in range(len(source))] == expected
      continue
    with pytest.raises(RecordError, match=rf"0\.tar: cut short at byte {size:,}: .*fetch it again"):
      _open(tmp_path)
    found += 1
  assert found > len(cuts) / 2


def _touched(path, nanoseconds):
  status = path.stat()
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + nanoseconds))


def test_an_index_is_used_again_until_its_tar_file_changes(tmp_path, monkeypatch):
  path = trees.tar(tmp_path / "0.tar", trees.pair(0))
  built = []
  build = tar_index._build
  monkeypatch.setattr(tar_index, "_build", lambda file: built.append(file) or build(file))
  index = tmp_path / "0.tar.index"
  for damage, makes in (
    (lambda: None, 1),
    (lambda: None, 0),
    (lambda: _touched(path, 1), 1),
    (lambda: path.write_bytes(path.read_bytes() + bytes(512)), 1),
    (lambda: index.write_bytes(index.read_bytes()[:-1]), 1),
    (lambda: index.write_bytes(b"\0" + index.read_bytes()[1:]), 1),
    (lambda: index.write_bytes(b""), 1),
    (lambda: index.unlink(), 1),
    (lambda: None, 0),
  ):
    damage()
    built.clear()
    assert _open(tmp_path)[0].captions == ("picture 0",)
    assert len(built) == makes
  trees.tar(path, trees.pair(0) | trees.pair(1))
  assert len(_open(tmp_path)) == 2
  assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_every_damaged_byte_of_an_index_is_noticed(tmp_path):
  """By the header at the opening, by the row when it is read; no wrong pair is ever given."""
  trees.tar(tmp_path / "0.tar", trees.pair(0) | trees.pair(1))
  expected = [_open(tmp_path)[i] for i in range(2)]
  index = tmp_path / "0.tar.index"
  whole, refused = index.read_bytes(), 0
  source = _open(tmp_path)
  for at in range(len(whole)):
    index.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    for i in range(2):
      try:
        assert source[i] == expected[i]
      except RecordError as error:
        refused += "row" in str(error)
  header = tar_index._HEADER_BYTES
  assert refused == len(whole) - header  # each byte of rows and keys spoils one pair alone


def test_where_the_folder_cannot_be_written_the_cache_is_used(tmp_path, monkeypatch):
  folder = tmp_path / "tars"
  trees.tar(folder / "0.tar", trees.pair(0))
  replace = tar_index._replace

  def read_only(path, content):
    if path.parent == folder:
      raise OSError(30, "Read-only file system", str(path))
    replace(path, content)

  monkeypatch.setattr(tar_index, "_replace", read_only)
  assert len(_open(folder)) == 1
  assert [p.suffix for p in (tmp_path / "cache" / "clip_jax" / "tar").iterdir()] == [".index"]
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "own"))
  assert len(_open(folder)) == 1
  assert len(list((tmp_path / "own" / "tar").iterdir())) == 1

  def full(path, content):
    raise OSError(28, "No space left on device", str(path))

  monkeypatch.setattr(tar_index, "_replace", full)
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "third"))
  with pytest.raises(RecordError, match=r"its index cannot be written to .* set CLIP_JAX_CACHE"):
    _open(folder)


_INDEX_ALL = """
import os, sys, time
from clip_jax.data import storage, tar_index
files = storage.files(sys.argv[1], (".tar",))
print("ready", flush=True)
sys.stdin.readline()
print([i.digest.hex() for i in tar_index.open_all(files)], "jax" in sys.modules)
"""


def test_processes_that_make_the_same_indexes_agree(tmp_path):
  _img2dataset(tmp_path / "tars", shards=12)
  command = [sys.executable, "-c", _INDEX_ALL, str(tmp_path / "tars")]
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  started = [subprocess.Popen(command, **pipes) for _ in range(4)]
  for process in started:
    assert process.stdout.readline() == "ready\n"
  for process in started:
    process.stdin.write("\n")
    process.stdin.flush()
  found = {process.communicate()[0] for process in started}
  indexes = tar_index.open_all(storage.files(str(tmp_path / "tars"), SUFFIXES))
  assert found == {f"{[index.digest.hex() for index in indexes]} False\n"}
  names = sorted(p.name for p in (tmp_path / "tars").iterdir() if "index" in p.name)
  assert names == [f"{i:05d}.tar.index" for i in range(12)]  # and no temporary file


def test_batches_are_the_same_for_any_number_of_workers(tmp_path):
  """Drill 3, from a tar source with a bad record, which every layout replaces alike."""
  _img2dataset(tmp_path, shards=3, pairs=8)
  trees.tar(tmp_path / "00003.tar", {"bad.jpg": trees.png(0)[:-50], "bad.txt": "cut"})
  data = c.Data(sources=(c.Source(path=str(tmp_path)),), batch_pairs=4)
  sources = [places.open_files(data.sources[0])]
  assert len(sources[0]) == 25

  def batches(workers, start=0, host=0, hosts=1):
    own = c.Data(data.sources, data.batch_pairs, workers=workers)
    config = test_pipeline.dataclasses.replace(test_pipeline.CONFIG, data=own)
    return test_pipeline._batches(7 - start, config, sources, start, host, hosts)

  reference = batches(0)
  test_pipeline._assert_same(batches(2), reference)
  test_pipeline._assert_same(batches(0, start=3), reference[3:])
  halves = [batches(0, host=host, hosts=2) for host in range(2)]
  for step, rows in enumerate(zip(*halves, strict=True)):
    joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    test_pipeline._assert_same([joined], [reference[step]])
  bad, seen = (np.concatenate([batch[name] for batch in reference]) for name in ("bad", "record"))
  np.testing.assert_array_equal(bad != 0, seen == 24)
  assert bad.any()


def test_the_tools_path_is_left_alone(tmp_path):
  """tools/prepare_data.py reads a folder with indexes, and makes no others."""
  from tools import prepare_data

  _open(_img2dataset(tmp_path / "tars"))
  assert prepare_data.main(["pairs", str(tmp_path / "tars"), str(tmp_path / "out")]) == 0
  assert len(trees.read_all(tmp_path / "out", "train")) == 8
  assert pathlib.Path(tmp_path / "tars" / "00000.tar.index").is_file()
