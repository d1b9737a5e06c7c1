"""CLIP_benchmark's WebDataset layout, as its own words describe it, whole and damaged."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import trees

from clip_jax.data import tar_source
from clip_jax.data.records import RecordError

NAMES = ("cat", "dog", None)


def _npy(flags):
  out = io.BytesIO()
  np.save(out, np.array(flags, np.float32))
  return out.getvalue()


def _split(folder, samples, shards=2):
  """`samples`: members of each, by extension; they are shared out among the tar files."""
  for shard in range(shards):
    files = {}
    for i, sample in list(enumerate(samples))[shard::shards]:
      files |= {f"s{i:07d}.{extension}": data for extension, data in sample.items()}
    trees.tar(folder / f"{shard}.tar", files)
  trees.write(folder / "nshards.txt", f"{shards}\n")
  return folder


def _labelled(*labels):
  return [{"cls": str(label), "png": trees.png(i)} for i, label in enumerate(labels)]


def test_samples_are_records_in_the_order_of_the_tar_files(tmp_path):
  source = tar_source.TarSource(_split(tmp_path, _labelled(0, 1, 1)), NAMES)
  assert len(source) == 3
  found = [source[i] for i in range(3)]
  assert [(r.key, r.label) for r in found] == [
    ("0/s0000000", "cat"),
    ("0/s0000002", "dog"),
    ("1/s0000001", "dog"),
  ]
  assert [r.image for r in found] == [trees.png(0), trees.png(2), trees.png(1)]
  assert source.locate(2) == f"{tmp_path / '1.tar'} sample s0000001"
  with pytest.raises(IndexError):
    source[3]
  copy = pickle.loads(pickle.dumps(source))
  assert copy[1] == found[1]


def test_ten_shards_come_after_nine_and_without_their_number_too(tmp_path):
  folder = _split(tmp_path, _labelled(*[0, 1] * 6), shards=12)
  expected = [f"{k}/s{k:07d}" for k in range(12)]
  for _ in range(2):
    source = tar_source.TarSource(folder, NAMES)
    assert [source[i].key for i in range(12)] == expected
    (folder / "nshards.txt").unlink(missing_ok=True)


def test_captions_and_several_classes(tmp_path):
  captions = [{"webp": trees.png(0, kind="WEBP"), "txt": "a cat\na grey cat\nMinka"}]
  source = tar_source.TarSource(_split(tmp_path / "a", captions, 1))
  assert source[0].captions == ("a cat", "a grey cat", "Minka")
  assert source[0].label is None
  flags = [{"jpg": trees.png(0, kind="JPEG"), "npy": _npy(row)} for row in ([1, 1], [0, 1], [0, 0])]
  source = tar_source.TarSource(_split(tmp_path / "b", flags, 1), ("cat", "dog"))
  assert [source[i].label for i in range(3)] == ["cat; dog", "dog", ""]


def test_the_fingerprint_is_that_of_the_content_and_of_the_names(tmp_path):
  first = tar_source.TarSource(_split(tmp_path / "a", _labelled(0, 1)), NAMES).fingerprint
  again = tar_source.TarSource(_split(tmp_path / "b", _labelled(0, 1)), NAMES).fingerprint
  assert first == again
  other = tar_source.TarSource(_split(tmp_path / "a", _labelled(1, 1)), NAMES).fingerprint
  renamed = tar_source.TarSource(tmp_path / "b", ("dog", "cat", None)).fingerprint
  assert len({first, other, renamed}) == 3


@pytest.mark.parametrize(
  ("label", "match"),
  [
    ("3", "label 3 is out of range: there are 3 classes"),
    ("-1", "label -1 is out of range"),
    ("2", "label 2 is none of the classes"),
    ("cat", "invalid literal"),
    (b"\xff", "invalid"),
  ],
)
def test_a_bad_label_names_its_record(tmp_path, label, match):
  samples = [{"cls": "0", "png": trees.png(0)}, {"cls": label, "png": trees.png(1)}]
  source = tar_source.TarSource(_split(tmp_path, samples, 1), NAMES)
  assert source[0].label == "cat"
  with pytest.raises(RecordError, match=rf"0\.tar sample s0000001: .*{match}"):
    source[1]


def test_flags_of_another_length_or_pickled_ones_are_refused(tmp_path):
  out = io.BytesIO()
  np.save(out, np.array([{}], object), allow_pickle=True)
  samples = [{"png": trees.png(0), "npy": data} for data in (_npy([1, 0]), out.getvalue())]
  source = tar_source.TarSource(_split(tmp_path, samples, 1), NAMES)
  with pytest.raises(RecordError, match=r"s0000000: its label has the shape \(2,\)"):
    source[0]
  with pytest.raises(RecordError, match=r"s0000001: Object arrays cannot be loaded"):
    source[1]


def test_damaged_folders_are_errors_at_once(tmp_path, drill):
  folder = _split(tmp_path, _labelled(0, 1, 0, 1))
  whole = (folder / "1.tar").read_bytes()
  for size in (len(whole) - 10_240, 700, 0):
    (folder / "1.tar").write_bytes(whole[:size])
    with pytest.raises(RecordError, match=r"1\.tar: cut short"):
      tar_source.TarSource(folder, NAMES)
  (folder / "1.tar").unlink()
  with pytest.raises(RecordError, match=r"1\.tar: not there, as nshards\.txt says"):
    tar_source.TarSource(folder, NAMES)
  drill(7, injected=4, detected=4)
  (folder / "nshards.txt").write_text("two")
  with pytest.raises(RecordError, match="invalid literal"):
    tar_source.TarSource(folder, NAMES)


@pytest.mark.parametrize(
  ("files", "match"),
  [
    ({"a.cls": "0"}, r"sample a: none of \.webp, \.png, \.jpg, \.jpeg"),
    ({"a.png": b"1"}, r"sample a: none of \.cls, \.npy"),
    ({"a.png": b"1", "a.cls": "0", "a.PNG": b"2"}, r"sample a: two members a\.PNG"),
    ({"a.png": trees.special("a.png", tarfile.SYMTYPE, "/b"), "a.cls": "0"}, "sample a: a link"),
    ({"a.png": b"1", "a.cls": "0" * 1_000_001}, "a label of 1,000,001 bytes"),
  ],
)
def test_samples_that_are_none_are_named(tmp_path, files, match):
  trees.tar(tmp_path / "0.tar", files)
  with pytest.raises(RecordError, match=match):
    tar_source.TarSource(tmp_path, NAMES)


def test_class_names(tmp_path):
  trees.write(tmp_path / "classnames.txt", "tench \nGroße Ente\n")
  assert tar_source.class_names(tmp_path) == ("tench", "Große Ente")
  trees.write(tmp_path / "classnames.txt", "")
  with pytest.raises(RecordError, match=r"classnames\.txt: is empty"):
    tar_source.class_names(tmp_path)
  (tmp_path / "classnames.txt").unlink()
  with pytest.raises(RecordError, match=r"classnames\.txt: cannot be read"):
    tar_source.class_names(tmp_path)
  assert not tar_source.is_split(tmp_path)
