"""Pairs of Parquet files: every layout of the columns, damage named, memory that stays small."""

import concurrent.futures
import logging
import pickle
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trees

from clip_jax.data import parquet_source, storage
from clip_jax.data.parquet_source import SUFFIXES, ParquetSource
from clip_jax.data.records import RecordError


def _table(start, stop):
  """As Hugging Face writes images: a struct of bytes and path."""
  image = [{"bytes": trees.png(i), "path": f"/etc/{i}.png"} for i in range(start, stop)]
  return {"image": image, "caption": [f"picture {i}" for i in range(start, stop)]}


def _write(path, columns, group=2, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.table(columns), path, row_group_size=group, **options)
  return path


def _open(folder, **options):
  return ParquetSource(storage.files(str(folder), SUFFIXES), **options)


def test_rows_in_any_order_are_those_that_were_written(tmp_path):
  _write(tmp_path / "a-0.parquet", _table(0, 5))
  _write(tmp_path / "a-1.parquet", _table(5, 12), group=3, compression="zstd")
  source = _open(tmp_path)
  assert len(source) == 12
  for i in (11, 0, 4, 5, 7, 8, 4, 11):
    record = source[i]
    assert (record.image, record.captions) == (trees.png(i), (f"picture {i}",))
  assert [source[i].key for i in (4, 5, 11)] == ["a-0/4", "a-1/0", "a-1/6"]
  assert source.locate(9) == f"{tmp_path / 'a-1.parquet'} row group 1 row 1"
  again = pickle.loads(pickle.dumps(source))
  assert again[7] == source[7]
  assert repr(again) == repr(source) == f"ParquetSource({source.fingerprint[:16]})"
  with pytest.raises(IndexError, match="no record 12, it has 12"):
    source[12]
  _write(tmp_path / "a-1.parquet", _table(6, 13), group=3)
  assert _open(tmp_path).fingerprint != source.fingerprint


@pytest.mark.parametrize(
  ("columns", "options", "captions"),
  [
    ({"jpg": [b"1"], "txt": ["a  b\n"]}, {}, ("a b",)),
    ({"image": pa.array([b"1"], pa.large_binary()), "text": [["a", "b", "a"]]}, {}, ("a", "b")),
    ({"image": [b"1"], "caption": ["x"], "syn": ["y"]}, {"caption": "syn"}, ("y",)),
    ({"image": ["http://x"], "raw": [b"1"], "title": ["x"]}, {"image": "raw"}, ("x",)),
    ({"image": [b"1"], "caption": pa.array([None], pa.string())}, {}, ()),
    ({"image": [b"1"], "caption": [" "]}, {}, ()),
  ],
)
def test_columns(tmp_path, columns, options, captions):
  source = _open(_write(tmp_path / "a.parquet", columns), **options)
  assert (source[0].image, source[0].captions) == (b"1", captions)


@pytest.mark.parametrize(
  ("columns", "options", "message"),
  [
    ({"image": [b"1"], "words": ["x"]}, {}, r"no column caption, .* for the caption; it has image "
     r"\(binary\), words \(string\); name it in Source\(caption_column"),
    ({"image": [b"1"], "text": ["x"]}, {"image": "photo"}, "no column 'photo' for the image"),
    ({"image": ["http://a/b.png"], "text": ["x"]}, {}, "'image' holds string, not an image"),
    ({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}, {}, "no rows in 1"),
  ],
)  # fmt: skip
def test_columns_that_do_not_do_are_named(tmp_path, columns, options, message):
  with pytest.raises(RecordError, match=message):
    _open(_write(tmp_path / "a.parquet", columns), **options)


def test_files_of_different_columns_are_told(tmp_path):
  _write(tmp_path / "a.parquet", {"image": [b"1"], "caption": ["x"]})
  _write(tmp_path / "b.parquet", {"image": [b"1"], "text": ["x"]})
  with pytest.raises(RecordError, match=r"b\.parquet: its columns are .*'text'.* of .*a\.parquet"):
    _open(tmp_path)


def test_bad_rows_are_errors_of_their_records(tmp_path):
  kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
  rows = [{"bytes": b"1", "path": None}, {"bytes": None, "path": "/etc/passwd"}, None]
  path = _write(tmp_path / "a.parquet", {"image": pa.array(rows, kind), "text": ["x", "y", "z"]})
  source = _open(path)
  assert source[0].image == b"1"
  for i in (1, 2):
    with pytest.raises(RecordError, match=r"a\.parquet row group . row .: its image has no bytes"):
      source[i]
  source = _open(_write(path, {"image": [b"1"], "text": pa.array([3])}))
  with pytest.raises(RecordError, match="the caption is int, not text"):
    source[0]


def test_a_file_cut_anywhere_is_an_error_that_names_the_byte(tmp_path):
  path = _write(tmp_path / "a.parquet", _table(0, 6))
  whole = path.read_bytes()
  for size in [*range(0, len(whole), 97), len(whole) - 1]:
    path.write_bytes(whole[:size])
    with pytest.raises(RecordError, match=r"a\.parquet: (no Parquet file|cut short at byte \d)"):
      _open(path)
  path.write_bytes(whole[100:])
  with pytest.raises(RecordError, match=r"no Parquet file: .* no PAR1 at byte 0"):
    _open(path)
  path.write_bytes(whole[:-8] + (10**9).to_bytes(4, "little") + b"PAR1")
  with pytest.raises(RecordError, match=r"its footer of 1,000,000,000 bytes does not fit before"):
    _open(path)


def test_more_rows_than_bytes_are_an_error_at_the_start(tmp_path):
  """Arrow would take memory for them: columns of nulls, whose number alone is written."""
  columns = {"jpg": pa.nulls(100_000, pa.binary()), "txt": ["a"] * 100_000}
  path = _write(tmp_path / "a.parquet", columns, group=100_000)
  told = r"its footer at byte [\d,]+ is damaged \(it says 100,000 rows, of a file of [\d,]+ bytes\)"
  with pytest.raises(RecordError, match=told):
    _open(path)


def test_a_piece_that_is_missing_in_the_middle_is_an_error_of_the_records_that_lie_there(tmp_path):
  path = _write(tmp_path / "a.parquet", _table(0, 6))
  whole, expected = path.read_bytes(), list(_open(path))
  for start in range(4, 600, 50):
    path.write_bytes(whole[:start] + whole[start + 100 :])
    source, refused = _open(path), []
    for i, record in enumerate(expected):
      try:
        assert source[i] == record, start
      except RecordError as error:
        refused.append(str(error))
    assert refused, start
    assert all("a.parquet row group " in told for told in refused)


def test_flipped_bits_in_checked_pages_are_noticed(tmp_path):
  path = _write(tmp_path / "a.parquet", _table(0, 4), compression="none", write_page_checksum=True)
  whole, expected = path.read_bytes(), [_open(path)[i] for i in range(4)]
  end = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
  refused = 0
  for at in range(4, end, end // 60):
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
    source = _open(path)
    for i in range(4):
      try:
        assert source[i] == expected[i]
      except RecordError:
        refused += 1
  assert refused >= 55


def test_threads_share_a_source(tmp_path, monkeypatch):
  monkeypatch.setattr(parquet_source, "CACHE_BYTES", 1)
  for k in range(3):
    _write(tmp_path / f"{k}.parquet", _table(8 * k, 8 * k + 8))
  source = _open(tmp_path)
  order = random.Random(0).choices(range(24), k=200)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for i, record in zip(order, pool.map(source.__getitem__, order), strict=True):
      assert record.captions == (f"picture {i}",)


def test_a_few_groups_are_kept_and_no_more(tmp_path, monkeypatch, caplog):
  big = [bytes([i]) * 100_000 for i in range(40)]
  path = _write(tmp_path / "a.parquet", {"image": big, "text": ["x"] * 40}, group=4,
                use_dictionary=False, compression="none")  # fmt: skip
  source = _open(path)
  assert not caplog.records
  reads = []
  opened = parquet_source._open

  class Counting:
    def __init__(self, file):
      self.file = opened(file)

    def read_row_group(self, group, **options):
      reads.append(group)
      return self.file.read_row_group(group, **options)

  monkeypatch.setattr(parquet_source, "_open", Counting)
  monkeypatch.setattr(parquet_source, "CACHE_BYTES", 1_000_000)
  for i in (0, 1, 4, 3, 8, 0, 4, 39, 39):
    assert source[i].image == big[i]
  assert reads == [0, 1, 2, 1, 9]  # two groups of 400,000 bytes are kept
  assert len(source._groups) == 2
  monkeypatch.setattr(parquet_source, "_LARGE_BYTES", 300_000)
  with caplog.at_level(logging.WARNING):
    _open(path)
  assert "each record costs the reading of one" in caplog.text
