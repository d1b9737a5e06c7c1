"""Pairs of a table and a folder of images: strict rows, line by line, nothing followed."""

import json
import os
import pickle
import socket
import subprocess

import pytest
import test_prepare_folder
import trees
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data import storage, table_source, tables
from clip_jax.data.records import RecordError
from clip_jax.data.table_source import TableSource


def _open(path, **options):
  return TableSource(storage.info(str(path)), **options)


def test_rows_are_pairs(tmp_path):
  trees.photos(tmp_path, 3)
  text = '\ufeffimage,caption\r\n0.png,"a dog, asleep"\r\n\r\n  \n2.png,the  same\tdog\n0.png,again'
  trees.write(tmp_path / "t.csv", text)
  source = _open(tmp_path / "t.csv", folder=str(tmp_path / "photos"))
  assert [(source[i].key, source[i].captions) for i in range(len(source))] == [
    ("0.png", ("a dog, asleep",)),
    ("2.png", ("the same dog",)),
    ("0.png", ("again",)),
  ]
  assert source[1].image == trees.png(2)
  assert [source.locate(i) for i in range(3)] == [f"{tmp_path / 't.csv'}:{n}" for n in (2, 5, 6)]
  again = pickle.loads(pickle.dumps(source))
  assert again[1] == source[1]
  assert repr(again) == repr(source) == f"TableSource({source.fingerprint[:16]})"
  with pytest.raises(IndexError, match="no record 3, it has 3"):
    source[3]
  trees.write(tmp_path / "t.csv", text + "!")
  assert _open(tmp_path / "t.csv").fingerprint != source.fingerprint


@pytest.mark.parametrize(
  ("name", "text", "options"),
  [
    ("photos/metadata.csv", "file_name,text\n1.png,x\n", {}),  # Hugging Face's imagefolder
    ("t.tsv", "filepath\ttitle\n photos/1.png\tx\n", {}),  # open_clip's
    ("t.jsonl", '{"image": "photos/1.png", "caption": ["x"], "n": {"m": 1}}', {}),
    ("t.csv", "a,b,caption\nphotos/1.png,x,other\n", {"image": "a", "caption": "b"}),
  ],
)
def test_the_usual_columns_and_others_by_name(tmp_path, name, text, options):
  trees.photos(tmp_path, 2)
  trees.write(tmp_path / name, text)
  source = _open(tmp_path / name, **options)
  assert (source[0].image, source[0].captions) == (trees.png(1), ("x",))


def test_every_bad_row_is_its_records_error_and_nothing_is_followed(tmp_path, monkeypatch):
  trees.photos(tmp_path, 2)
  photos = tmp_path / "photos"
  (photos / "photos").mkdir()
  trees.write(tmp_path / "secret.png", trees.png(9))
  (photos / "out.png").symlink_to(tmp_path / "secret.png")
  (photos / "circle.png").symlink_to("circle.png")
  for module, name in ((socket, "socket"), (subprocess, "Popen"), (os, "system")):
    monkeypatch.setattr(module, name, trees.raising(AssertionError))
  decoded = ("truncated", "unreadable")  # what the decoder says later
  bad = {row: why for row, why in test_prepare_folder.BAD_ROWS.items() if why not in decoded}
  trees.write(
    tmp_path / "t.csv",
    "image,caption\n" + "".join(f"{row}\n\n0.png,after {i}\n" for i, row in enumerate(bad)),
  )
  source = _open(tmp_path / "t.csv", folder=str(photos))
  assert len(source) == 2 * len(bad)
  for i, (row, why) in enumerate(bad.items()):
    if why == "empty_caption":
      assert source[2 * i].captions == ()
    else:
      with pytest.raises(RecordError, match=rf"t\.csv:{2 + 3 * i}: "):
        assert source[2 * i], row
    assert source[2 * i + 1].captions == (f"after {i}",)  # no row was swallowed


def test_bad_json_lines(tmp_path):
  trees.photos(tmp_path, 1)
  good = json.dumps({"image": "photos/0.png", "caption": "x"}).encode()
  bad = [line.replace(b"0.png", b"photos/0.png") for line in test_prepare_folder.BAD_LINES]
  trees.write(tmp_path / "t.jsonl", b"\n".join([bad[0], good, *bad[1:], good]))
  source = _open(tmp_path / "t.jsonl")
  assert len(source) == len(bad) + 2
  found = []
  for i in range(len(source)):
    try:
      found.append(source[i].captions)
    except RecordError as error:
      found.append(str(error).split(": ")[0].rpartition(":")[2])
  empty = [w == "empty_caption" for w in test_prepare_folder.BAD_LINES.values()]
  expected = [() if e else str(i + 1 + (i > 0)) for i, e in enumerate(empty)]
  assert found == [expected[0], ("x",), *expected[1:], ("x",)]


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("t.csv", "", r"t\.csv: empty; wants rows"),
    ("t.csv", "\ufeff\n \n", r"t\.csv: empty; wants rows"),
    ("t.csv", "image,caption\n", "has a header and no row"),
    ("t.csv", "a,text\nb,c\n", r"no column image, file_name.* for the image; there are a, text"),
    ("t.csv", "image,text,image\na,b,c\n", r"t\.csv:1: column 'image' stands twice"),
    ("t.csv", '"image,caption\na,b', r"t\.csv:1: the header cannot be read"),
    ("t.csv", "image,caption\n1,a".encode("utf-16"), "the header cannot be read.*save as UTF-8"),
    ("t.jsonl", "\n[1]\n[2]", r"t\.jsonl:2: no row can be read \(not a JSON object\)"),
  ],
)
def test_a_table_that_is_wrong_as_a_whole_is_an_error(tmp_path, name, text, message):
  trees.write(tmp_path / name, text)
  with pytest.raises(RecordError, match=message):
    _open(tmp_path / name)


@settings(max_examples=200, deadline=None)
@given(
  rows=st.lists(st.text(alphabet='ab,"\t\\ \x00\x0b\x1c\x85\xa0\u2028é\r', max_size=6), max_size=8),
  mark=st.booleans(),
  end=st.sampled_from(["", "\n"]),
  chunk=st.integers(1, 9),
)
def test_rows_are_the_lines_that_the_strict_reader_has(tmp_path_factory, rows, mark, end, chunk):
  path = tmp_path_factory.mktemp("t") / "t.jsonl"
  path.write_bytes(("\ufeff" * mark + "\n".join(rows) + end).encode())
  with path.open("rb") as file:
    expected = list(tables._lines(file, "t"))
  saved, table_source._CHUNK_BYTES = table_source._CHUNK_BYTES, chunk
  try:
    with path.open("rb") as file:
      starts, blank, _ = table_source._rows(file)
  finally:
    table_source._CHUNK_BYTES = saved
  made = TableSource.__new__(TableSource)
  made._path, made._starts, made._blank = str(path), starts, blank
  numbers = [made._where(i).rpartition(":")[2] for i in range(len(starts) - 1)]
  assert [(f"t:{n}", made._text(i)) for i, n in enumerate(numbers)] == expected
