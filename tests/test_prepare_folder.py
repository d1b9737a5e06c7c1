"""Preparing a folder with a table: every row kept or named, strict tables."""

import os
import pathlib
import re
import socket
import subprocess

import pytest
import trees
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data import images, tables
from tools import prepare_data


def _folder(tmp_path: pathlib.Path, table: str | bytes, *options: str, name: str = "t.csv") -> int:
  trees.write(tmp_path / name, table)
  arguments = [str(tmp_path / "photos"), str(tmp_path / "out"), "--captions", str(tmp_path / name)]
  return prepare_data.main(["folder", *arguments, *options])


def test_rows_of_one_image_are_one_record(tmp_path, capsys):
  trees.photos(tmp_path, 3)
  text = "\ufeffimage,caption,kind\r\n" + "".join(
    f"{i}.png,{words},{kind}\r\n"
    for i, words, kind in (
      (0, "a cat", "cat"),
      (1, '"a dog, asleep"', "dog"),
      (0, "the  same\tcat", "cat"),
      (2, "a bird", ""),
      (0, "a dog", "dog"),
      (1, '"a dog, asleep"', "dog"),
    )
  )
  assert _folder(tmp_path, text, "--label-column", "kind") == 0
  made = trees.read_all(tmp_path / "out", "train")
  assert [(r.key, r.captions, r.label) for r in made] == [
    ("0.png", ("a cat", "the same cat"), "cat"),
    ("1.png", ("a dog, asleep",), "dog"),
    ("2.png", ("a bird",), None),
  ]
  assert made[0].image == (tmp_path / "photos" / "0.png").read_bytes()
  assert trees.read_rejected(tmp_path / "out") == {"t.csv:6": "label", "t.csv:7": "repeated"}
  manifest = trees.read_manifest(tmp_path / "out")
  assert (manifest["inputs"], manifest["kept"], manifest["classes"]) == (6, 4, ["cat", "dog"])
  assert "6 inputs = 4 kept + 2 left out" in capsys.readouterr().out


BAD_ROWS = {
  "missing.png,a cat": "missing_file",
  "photos,a folder": "not_a_file",
  "cut.png,a cat": "truncated",
  "page.png,a cat": "unreadable",
  "0.png,": "empty_caption",
  "0.png,  ": "empty_caption",
  "0.png,NaN": "empty_caption",
  ",a cat": "no_image",
  "0.png": "columns",
  "0.png,a,b": "columns",
  '0.png,"never closed': "malformed",
  '0.png,"closed" too early': "malformed",
  "0.png,nul\0": "malformed",
  "http://example.org/a.png,a cat": "url",
  "file:///etc/passwd,a cat": "url",
  "//host/a.png,a cat": "url",
  "data:image/png;base64,aaaa": "url",
  "s3:bucket/a.png,a cat": "url",
  "pipe:cat /etc/passwd,a cat": "pipe",
  "touch owned |,a cat": "pipe",
  "../secret.png,a cat": "path",
  "a/../../secret.png,a cat": "path",
  "..\\secret.png,a cat": "path",
  "/etc/passwd,a cat": "path",
  "C:\\a.png,a cat": "path",
  "~/a.png,a cat": "path",
  "out.png,a link outside": "path",
  "circle.png,a circle of links": "storage",
  "a" * 300 + ".png,too long a name": "storage",
}


def test_every_bad_row_is_named_with_its_line_and_nothing_is_followed(tmp_path, monkeypatch, drill):
  trees.photos(tmp_path, 2)
  photos = tmp_path / "photos"
  (photos / "photos").mkdir()
  trees.write(tmp_path / "secret.png", trees.png(9))
  (photos / "out.png").symlink_to(tmp_path / "secret.png")
  (photos / "circle.png").symlink_to("circle.png")
  trees.write(photos / "cut.png", trees.png(0)[:-40])
  trees.write(photos / "page.png", "<html>404</html>")
  for module, name in ((socket, "socket"), (subprocess, "Popen"), (os, "system")):
    monkeypatch.setattr(module, name, trees.raising(AssertionError))
  text = "image,caption\n" + "".join(
    f"{row}\n\n0.png,after {i}\n" for i, row in enumerate(BAD_ROWS)
  )
  assert _folder(tmp_path, text) == 0
  named = trees.read_rejected(tmp_path / "out")
  assert named == {f"t.csv:{2 + 3 * i}": reason for i, reason in enumerate(BAD_ROWS.values())}
  (record,) = trees.read_all(tmp_path / "out", "train")  # no row was swallowed by the one before it
  assert record.captions == tuple(f"after {i}" for i in range(len(BAD_ROWS)))
  assert trees.read_manifest(tmp_path / "out")["inputs"] == 2 * len(BAD_ROWS)
  drill(13, rows_in=2 * len(BAD_ROWS), rows_out=len(record.captions) + len(named))


BAD_LINES = {
  b'{"image": "0.png", "caption": NaN}': "not_a_number",
  b'{"image": "0.png", "caption": "a", "size": -Infinity}': "not_a_number",
  b'{"image": "0.png", "caption": "\\ud800"}': "surrogate",
  b'{"image": "0.png", "caption": "a", "caption": "b"}': "malformed",
  b'{"image": "0.png", "caption": "a"': "malformed",
  b'["0.png", "a"]': "malformed",
  b"[" * 100_000: "malformed",
  b'{"image": "0.png", "n": ' + b"9" * 5000 + b"}": "malformed",
  b'{"image": "0.png"}': "columns",
  b'{"image": "0.png", "caption": 3}': "type",
  b'{"image": "0.png", "caption": ["a", 3]}': "type",
  b'{"image": "0.png", "caption": null}': "empty_caption",
  b'{"image": "0.png", "caption": []}': "empty_caption",
  b'{"image": ["0.png"], "caption": "a"}': "no_image",
  b'{"image": "0.png", "caption": "\xff\xfe"}': "encoding",
  b'{"image": "0.png", "caption": "' + b"a" * 1_100_000 + b'"}': "too_long",
}


def test_json_lines(tmp_path, drill):
  trees.photos(tmp_path, 2)
  good = b'{"image": "1.png", "caption": ["one", "two"], "more": 1}\n'
  lines = b"".join(b"\n" + line + b"\r\n" for line in BAD_LINES)
  assert _folder(tmp_path, good + lines + good.replace(b"two", b"three"), name="t.jsonl") == 0
  assert trees.read_all(tmp_path / "out", "train")[0].captions == ("one", "two", "three")
  named = trees.read_rejected(tmp_path / "out")
  assert named == {f"t.jsonl:{3 + 2 * i}": reason for i, reason in enumerate(BAD_LINES.values())}
  drill(13, rows_in=2 + len(BAD_LINES), rows_out=2 + len(named))


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("t.csv", "", r"t\.csv: empty; wants a header that names image, caption"),
    ("t.csv", "image,caption\n", "has a header and no row"),
    ("t.csv", "file,text\na,b\n", r"t\.csv:1: no column 'image', 'caption'; there are file, text"),
    ("t.csv", "image,caption,image\na,b,c\n", "column 'image' stands twice"),
    ("t.csv", '"image,caption\n', r"t\.csv:1: the header cannot be read"),
    ("t.csv", "image,caption\n1,a".encode("utf-16"), "the header cannot be read.*save as UTF-8"),
    ("t.jsonl", '\n{"file": "a", "text": "b"}', r"t\.jsonl:2: no column.*there are file, text"),
    ("t.jsonl", "", "empty; wants a JSON object"),
    ("t.parquet", "", r"ends in \.csv, \.tsv or \.jsonl"),
  ],
)
def test_a_table_that_is_wrong_as_a_whole_is_an_error(tmp_path, capsys, name, text, message):
  trees.photos(tmp_path, 1)
  assert _folder(tmp_path, text, name=name) == 2
  error = capsys.readouterr().err
  assert len(error.splitlines()) == 1
  assert re.search(message, error)
  assert not (tmp_path / "out").exists()


@settings(max_examples=200, deadline=None)
@given(
  rows=st.lists(st.text(alphabet='ab,"\t\\ \x00\x85\u2028é', min_size=1), max_size=8),
  kind=st.sampled_from(["csv", "tsv", "jsonl"]),
)
def test_as_many_rows_come_out_as_go_in(tmp_path_factory, rows, kind):
  path = tmp_path_factory.mktemp("t") / f"t.{kind}"
  head = '{"a": 1}\n' if kind == "jsonl" else "a\n"
  path.write_bytes((head + "".join(row + "\n" for row in rows)).encode())
  try:
    out = len(list(tables.read(path, ["a"])))
  except tables.TableError:
    assert kind != "jsonl"
    out = 0
  assert out == sum(bool(row.strip()) for row in rows) + (kind == "jsonl")


def test_held_out_images_are_the_same_whatever_their_order(tmp_path):
  table, photos = trees.photos(tmp_path, 40)
  header, *rows = table.read_text().splitlines()
  found = []
  for order in (rows, rows[::-1], rows[:30]):
    trees.write(table, "\n".join([header, *order]))
    verb = ["folder", str(photos), str(tmp_path / "out"), "--captions", str(table)]
    assert prepare_data.main([*verb, "--test-fraction", "0.3", "--force"]) == 0
    found.append({r.key for r in trees.read_all(tmp_path / "out", "test")})
  assert found[0] == found[1]
  assert found[2] == found[0] & {row.split(",")[0] for row in rows[:30]}
  assert 5 < len(found[0]) < 20


def test_large_images_are_reduced_when_asked_for(tmp_path):
  trees.write(tmp_path / "photos" / "a.png", trees.png(1, (200, 100)))
  trees.write(tmp_path / "photos" / "b.jpg", trees.png(2, (60, 90), "JPEG"))
  trees.write(tmp_path / "photos" / "c.png", trees.png(3, (30, 20)))
  rows = "image,caption\n" + "".join(f"{name},x\n" for name in ("a.png", "b.jpg", "c.png"))
  assert _folder(tmp_path, rows, "--max-side", "50") == 0
  made = [images.decode(r.image).size for r in trees.read_all(tmp_path / "out", "train")]
  assert made == [(50, 25), (33, 50), (30, 20)]


def test_a_finished_folder_is_left_alone_unless_it_is_forced(tmp_path, capsys):
  table, photos = trees.photos(tmp_path, 3)
  verb = ["folder", str(photos), str(tmp_path / "out"), "--captions", str(table)]
  assert prepare_data.main(verb) == 0
  marker = tmp_path / "out" / "manifest.json"
  first = marker.stat().st_mtime_ns
  assert prepare_data.main(verb) == 0
  assert "already there" in capsys.readouterr().out
  assert marker.stat().st_mtime_ns == first
  assert prepare_data.main([*verb, "--force"]) == 0
  second = marker.stat().st_mtime_ns
  assert second != first
  trees.write(photos / "1.png", trees.png(77))
  assert prepare_data.main(verb) == 2
  assert "holds a data set that was made otherwise: source images " in capsys.readouterr().err
  assert marker.stat().st_mtime_ns == second
  assert prepare_data.main([*verb, "--force"]) == 0
  assert trees.read_all(tmp_path / "out", "train")[1].image == trees.png(77)
