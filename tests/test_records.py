"""Records: packing, shards with damage, replacements that are exact."""

import dataclasses
import hashlib
import io
import json
import pickle
import re

import msgpack
import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from clip_jax.data import images, records


def _png(value: int) -> bytes:
  out = io.BytesIO()
  Image.new("RGB", (8, 8), (value % 256, 0, 0)).save(out, "PNG")
  return out.getvalue()


def _record(i: int) -> records.Record:
  return records.Record(f"key-{i}", _png(i), (f"caption {i}", "another"), "even" if i % 2 else None)


@pytest.fixture
def folder(tmp_path):
  """Two shards of 30 and 20 records."""
  shards = []
  for number, span in enumerate((range(30), range(30, 50))):
    path = tmp_path / f"train-{number:05d}-of-00002.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for i in span:
      writer.write(records.pack(_record(i)))
    writer.close()
    data = path.read_bytes()
    shards.append(
      {
        "file": path.name,
        "records": len(span),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
      }
    )
  manifest = {"format": 1, "splits": {"train": {"shards": shards}}, "classes": ["even", "odd"]}
  (tmp_path / "manifest.json").write_text(json.dumps(manifest))
  return tmp_path


def test_pack_and_unpack():
  for i in range(3):
    assert records.unpack(records.pack(_record(i))) == _record(i)


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"\xc1",
    b"not msgpack at all",
    msgpack.packb([1, 2]),
    msgpack.packb({"key": "a"}),
    msgpack.packb({"key": 1, "image": b"", "captions": [], "label": None}),
    msgpack.packb({"key": "a", "image": "text", "captions": [], "label": None}),
    msgpack.packb({"key": "a", "image": b"", "captions": [b"x"], "label": None}),
    msgpack.packb({"key": "a", "image": b"", "captions": [], "label": 3}),
    msgpack.packb({"key": "a", "image": b"", "captions": ["x"], "label": None}) + b"more",
    b"\x81\xa3key\xa2\xff\xfe",  # invalid UTF-8
    pickle.dumps({"key": "a", "image": b"", "captions": [], "label": None}),
  ],
)
def test_anything_else_is_refused(data):
  with pytest.raises(records.RecordError, match="not a record"):
    records.unpack(data)


def test_a_decoded_image_is_not_written():
  with pytest.raises(records.RecordError, match="only encoded images"):
    records.pack(records.Record("a", np.zeros((2, 2, 3), np.uint8), ("x",)))


def test_shards_are_one_source(folder):
  source = records.ArrayRecordSource(folder, "train")
  assert len(source) == 50
  assert [source[i] for i in (0, 29, 30, 49)] == [_record(i) for i in (0, 29, 30, 49)]
  assert source.classes == ("even", "odd")
  assert source.locate(31).endswith("train-00001-of-00002.array_record record 1")
  copy = pickle.loads(pickle.dumps(source))
  assert copy[7] == _record(7)
  assert copy.fingerprint == source.fingerprint
  assert repr(copy) == repr(source)
  with pytest.raises(IndexError, match="no record 50"):
    source[50]


def test_a_missing_folder_says_what_to_do(tmp_path):
  with pytest.raises(records.RecordError, match=r"manifest.json: not found; prepare the data"):
    records.ArrayRecordSource(tmp_path / "none", "train")


def test_a_missing_split_names_those_there_are(folder):
  with pytest.raises(records.RecordError, match="no split 'test'; it has train"):
    records.ArrayRecordSource(folder, "test")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1}'])
def test_a_broken_manifest_is_named(folder, text):
  (folder / "manifest.json").write_text(text)
  with pytest.raises(records.RecordError, match=r"manifest.json: (cannot be read|not a manifest)"):
    records.ArrayRecordSource(folder, "train")


def test_a_missing_or_cut_shard_is_found_at_once(folder, drill):
  shard = folder / "train-00001-of-00002.array_record"
  whole = shard.read_bytes()
  for kept in (0, 1, len(whole) // 2, len(whole) - 1):
    shard.write_bytes(whole[:kept])
    with pytest.raises(records.RecordError, match=r"00001.* bytes, the manifest says"):
      records.ArrayRecordSource(folder, "train")
  shard.unlink()
  with pytest.raises(records.RecordError, match=r"00001.*: missing"):
    records.ArrayRecordSource(folder, "train")
  drill(7, injected=5, detected=5, harmless=0)


def test_a_shard_of_the_right_size_and_other_content_is_found(folder):
  """Its second half is empty, as a copy that was cut and preallocated has it."""
  shard = folder / "train-00001-of-00002.array_record"
  whole = shard.read_bytes()
  shard.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
  with pytest.raises(records.RecordError, match="00001"):
    [records.ArrayRecordSource(folder, "train")[i] for i in range(30, 50)]


def test_a_flipped_bit_is_found_when_it_is_read(folder, drill):
  shard = folder / "train-00000-of-00002.array_record"
  good = shard.read_bytes()
  found = 0
  filled = np.flatnonzero(np.frombuffer(good, np.uint8))  # the rest is padding
  for at in filled[np.linspace(70, len(filled) - 70, 12).astype(int)]:
    data = bytearray(good)
    data[at] ^= 16
    shard.write_bytes(data)
    source = records.ArrayRecordSource(folder, "train")
    wrong = 0
    for i in range(30):
      try:
        assert source[i] == _record(i), "damaged data was taken for good"
      except records.RecordError:
        wrong += 1
    found += wrong > 0
  assert found >= 10
  drill(7, injected=12, detected=found, harmless=12 - found)


class _Faulty(records.MemorySource):
  """5 % bad records, in four ways by turns."""

  def __getitem__(self, index):
    record = super().__getitem__(index)
    if index % 20 != 7:
      return record
    kind = index // 20 % 4
    if kind == 0:
      return dataclasses.replace(record, image=record.image[:-30])
    if kind == 1:
      return dataclasses.replace(record, captions=("", "  "))
    if kind == 2:
      raise StopIteration
    raise SystemExit(0)


def test_bad_records_are_replaced_exactly(drill):
  source = _Faulty([_record(i) for i in range(400)], "memory")
  resilient = records.ResilientSource(source)
  elements = [resilient[i] for i in range(400)]
  bad = [i for i, element in enumerate(elements) if element["bad"]]
  assert bad == list(range(7, 400, 20))
  causes = [records.CAUSES[elements[i]["bad"]] for i in bad[:4]]
  assert causes == ["truncated", "caption", "record", "record"]
  again = records.ResilientSource(_Faulty([_record(i) for i in range(400)], "memory"))
  for i in bad:
    assert elements[i]["index"] == i
    assert elements[i]["key"] == again[i]["key"] != f"key-{i}"
    np.testing.assert_array_equal(elements[i]["image"], again[i]["image"])
  drill(5, injected=20, counted=len(bad), most_causes=len(set(causes)))


def test_a_passing_fault_of_storage_is_tried_again():
  class Shaky(records.MemorySource):
    failures = 0

    def __getitem__(self, index):
      if index == 3 and not Shaky.failures:
        Shaky.failures += 1
        raise OSError("passing")
      return super().__getitem__(index)

  resilient = records.ResilientSource(Shaky([_record(i) for i in range(5)], "memory"))
  assert (resilient[3]["bad"], resilient[3]["key"]) == (0, "key-3")


def test_nothing_but_bad_records_is_an_error():
  """The first ten of a large source are named, of a small one each once."""
  empty = records.Record("a", b"", ("x",))
  for count in (4, 1000):
    source = records.ResilientSource(records.MemorySource([empty] * count, "memory"))
    with pytest.raises(records.RecordError, match="no substitute for it among 100 draws") as error:
      source[2]
    named = re.findall(r"memory record (\d+) \(empty\)", str(error.value))
    assert named[0] == "2"
    assert len(named) == len(set(named)) == min(count, 10)
    assert str(error.value).startswith("MemorySource(memory, ")
    assert str(error.value).endswith("; the last error: no bytes at all")


def test_memory_that_is_short_is_a_cause():
  """Also where a decoder has made an error of its own of it."""

  class Short(records.MemorySource):
    def __getitem__(self, index):
      if index % 2:
        raise MemoryError
      return super().__getitem__(index)

  def decode(image):
    try:
      raise MemoryError
    except MemoryError as error:
      raise images.ImageError("truncated", "cannot be decoded") from error

  resilient = records.ResilientSource(Short([_record(i) for i in range(20)], "memory"))
  assert [records.CAUSES[resilient[i]["bad"]] for i in (0, 1)] == ["good", "memory"]
  with pytest.raises(records.RecordError, match=r"memory record 2 \(memory\)"):
    records.ResilientSource(records.MemorySource([_record(0)] * 9, "memory"), decode)[2]
