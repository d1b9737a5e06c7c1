"""Preparing data: nothing half-written whatever kills it, every input kept or named, strict tables.

(Drills 13 and 14.) All trees are made here; nothing is downloaded.
"""

import gzip
import io
import json
import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import rich.progress
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_jax.data import images, records
from clip_jax.evaluation import prompts
from tools import prepare_data
from tools.prepare import captions, held_out, packages, shards, tables

ROOT = pathlib.Path(__file__).parents[1]


def _png(seed: int, size: tuple[int, int] = (20, 30), kind: str = "PNG") -> bytes:
  """A picture of random blocks, unlike that of any other seed."""
  blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
  out = io.BytesIO()
  Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(out, kind)
  return out.getvalue()


def _write(path: pathlib.Path, data: bytes | str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data.encode() if isinstance(data, str) else data)


def _all(folder: pathlib.Path, split: str) -> list[records.Record]:
  source = records.ArrayRecordSource(folder, split)
  return [source[i] for i in range(len(source))]


def _rejected(folder: pathlib.Path) -> dict[str, str]:
  lines = (folder / "rejected.jsonl").read_text().splitlines()
  return {entry["key"]: entry["reason"] for entry in map(json.loads, lines)}


def _manifest(folder: pathlib.Path) -> dict:
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["inputs"] == manifest["kept"] + sum(manifest["rejected"].values())
  return manifest


# The writer: kills and full disks


class _Killed(BaseException):
  """Stands for a kill: no handler of the program sees it."""


def _job(version: str, count: int = 10, loads: list[str] | None = None) -> shards.Job:
  def load(i: int) -> records.Record:
    if loads is not None:
      loads.append(f"{i}")
    if i == 3:
      raise shards.Rejected("ugly", "the third")
    if i == 4:
      images.decode(b"no image")
    return records.Record(f"{i}", _png(i), (f"{version} {i}",))

  items = [
    shards.Item(f"{i}", ("test", "again") if i == 9 else ("train",), lambda i=i: load(i))
    for i in range(count)
  ]
  plan = shards.Plan(items, [shards.Rejection("x", "known")])
  return shards.Job("drill", "", "", {"it": version}, {}, lambda progress: plan)


def _run(job: shards.Job, folder: pathlib.Path) -> dict:
  with rich.progress.Progress(disable=True) as progress:
    return shards.write(job, folder, 4, progress)


def _files(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_is_written_can_be_read(tmp_path):
  manifest = _run(_job("a"), tmp_path)
  assert [r.key for r in _all(tmp_path, "train")] == ["0", "1", "2", "5", "6", "7", "8"]
  assert _all(tmp_path, "test") == _all(tmp_path, "again")
  assert (manifest["inputs"], manifest["kept"]) == (11, 8)
  assert _rejected(tmp_path) == {"x": "known", "3": "ugly", "4": "unreadable"}
  assert sorted(path.name for path in tmp_path.iterdir() if ".array_record" not in path.name) == [
    "manifest.json",
    "rejected.jsonl",
  ]


@pytest.mark.parametrize("older", [False, True])
def test_killed_anywhere_it_goes_on_to_the_same_files(tmp_path, monkeypatch, older):
  """A kill before every single rename: never a broken data set, in the end the same bytes."""
  whole = tmp_path / "whole"
  _run(_job("new"), whole)
  replace, remaining, kills = os.replace, 0, 0

  def dying(source, target):
    nonlocal remaining
    if remaining == 0:
      raise _Killed
    remaining -= 1
    replace(source, target)

  while True:
    folder = tmp_path / f"killed {kills}"
    if older:
      _run(_job("old", 30), folder)
    remaining = kills
    with monkeypatch.context() as patch:
      patch.setattr(os, "replace", dying)
      try:
        _run(_job("new"), folder)
        break
      except _Killed:
        kills += 1
    if (folder / "manifest.json").exists():  # then it is whole: the older one
      assert older
      assert {r.captions[0].split()[0] for r in _all(folder, "train")} == {"old"}
    _run(_job("new"), folder)
    assert _files(folder) == _files(whole)
  assert kills >= 14
  assert _files(folder) == _files(whole)


def test_finished_shards_are_not_made_again(tmp_path):
  loads: list[str] = []
  job = _job("a", loads=loads)
  stopping = [
    item if item.key != "6" else shards.Item("6", item.splits, _raise(_Killed))
    for item in job.plan(None).items
  ]
  with pytest.raises(_Killed):
    _run(shards.Job("drill", "", "", job.source, {}, lambda p: shards.Plan(stopping)), tmp_path)
  assert loads == ["0", "1", "2", "3", "4", "5"]
  loads.clear()
  _run(job, tmp_path)
  assert loads == ["4", "5", "6", "7", "8", "9", "9"]  # the first shard of four stood


def _raise(kind):
  def load():
    raise kind

  return load


def test_a_real_sigkill_leaves_no_manifest_and_goes_on(tmp_path):
  table, photos = _photos(tmp_path, 12)
  code = (
    "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
    "from tools import prepare_data; from tools.prepare import folder\n"
    "real, calls = folder._find, []\n"
    "def find(*a):\n"
    "  calls.append(a)\n"
    "  if len(calls) == 12 + 8: os.kill(os.getpid(), signal.SIGKILL)\n"
    "  return real(*a)\n"
    "folder._find = find\n"
    "prepare_data.main(sys.argv[2:])\n"
  )
  verb = ["folder", str(photos), str(tmp_path / "out"), "--captions", str(table)]
  verb += ["--shard-records", "5"]
  done = subprocess.run([sys.executable, "-c", code, str(ROOT), *verb], capture_output=True)
  assert done.returncode == -signal.SIGKILL
  assert not (tmp_path / "out" / "manifest.json").exists()
  assert not list((tmp_path / "out").glob("*.array_record"))
  assert len(list((tmp_path / "out" / ".unfinished").glob("*.array_record"))) == 1
  assert prepare_data.main(verb) == 0
  assert len(_all(tmp_path / "out", "train")) == 12


def test_a_full_disk_is_one_line(tmp_path, capsys):
  table, photos = _photos(tmp_path, 12)
  verb = ["folder", str(photos), str(tmp_path / "out"), "--captions", str(table)]
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
  try:
    code = prepare_data.main(verb)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  error = capsys.readouterr().err
  assert code == 2
  assert len(error.splitlines()) == 1
  assert "File too large" in error
  assert "run the same command again" in error
  assert not list((tmp_path / "out").glob("*.array_record"))
  assert prepare_data.main(verb) == 0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
  table, photos = _photos(tmp_path, 2)
  (tmp_path / "file").write_text("not a folder")
  for dest in (tmp_path / "file", tmp_path / "file" / "below"):
    assert prepare_data.main(["folder", str(photos), str(dest), "--captions", str(table)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'file'}")
    assert len(error.splitlines()) == 1


def test_two_at_once_are_refused(tmp_path):
  def second(progress):
    with pytest.raises(shards.PrepareError, match="another process is preparing"):
      _run(_job("a"), tmp_path)
    return _job("a").plan(None)

  _run(shards.Job("drill", "", "", {}, {}, second), tmp_path)


def test_nothing_kept_is_an_error_that_names_the_first(tmp_path):
  items = [shards.Item(f"{i}", ("train",), _raise(shards.Rejected("bad"))) for i in range(3)]
  job = shards.Job("drill", "", "", {}, {}, lambda progress: shards.Plan(items))
  with pytest.raises(shards.PrepareError, match=r"nothing was kept \(3 bad\)[^$]*0: bad"):
    _run(job, tmp_path / "out")
  assert not list((tmp_path / "out").iterdir())


def test_an_interruption_says_how_to_go_on(tmp_path, monkeypatch, capsys):
  table, photos = _photos(tmp_path, 2)
  monkeypatch.setattr(shards, "write", lambda *a: _raise(KeyboardInterrupt)())
  verb = ["folder", str(photos), str(tmp_path / "out"), "--captions", str(table)]
  assert prepare_data.main(verb) == 130
  assert "the same command goes on" in capsys.readouterr().err


# A folder with a table


def _photos(tmp_path: pathlib.Path, count: int) -> tuple[pathlib.Path, pathlib.Path]:
  photos = tmp_path / "photos"
  lines = ["image,caption"]
  for i in range(count):
    _write(photos / f"{i}.png", _png(i))
    lines.append(f"{i}.png,picture {i}")
  _write(tmp_path / "captions.csv", "\n".join(lines) + "\n")
  return tmp_path / "captions.csv", photos


def _folder(tmp_path: pathlib.Path, table: str | bytes, *options: str, name: str = "t.csv") -> int:
  _write(tmp_path / name, table)
  arguments = [str(tmp_path / "photos"), str(tmp_path / "out"), "--captions", str(tmp_path / name)]
  return prepare_data.main(["folder", *arguments, *options])


def test_rows_of_one_image_are_one_record(tmp_path, capsys):
  _photos(tmp_path, 3)
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
  made = _all(tmp_path / "out", "train")
  assert [(r.key, r.captions, r.label) for r in made] == [
    ("0.png", ("a cat", "the same cat"), "cat"),
    ("1.png", ("a dog, asleep",), "dog"),
    ("2.png", ("a bird",), None),
  ]
  assert made[0].image == (tmp_path / "photos" / "0.png").read_bytes()
  assert _rejected(tmp_path / "out") == {"t.csv:6": "label", "t.csv:7": "repeated"}
  manifest = _manifest(tmp_path / "out")
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


def test_every_bad_row_is_named_with_its_line_and_nothing_is_followed(tmp_path, monkeypatch):
  _photos(tmp_path, 2)
  photos = tmp_path / "photos"
  (photos / "photos").mkdir()
  _write(tmp_path / "secret.png", _png(9))
  (photos / "out.png").symlink_to(tmp_path / "secret.png")
  (photos / "circle.png").symlink_to("circle.png")
  _write(photos / "cut.png", _png(0)[:-40])
  _write(photos / "page.png", "<html>404</html>")
  for module, name in ((socket, "socket"), (subprocess, "Popen"), (os, "system")):
    monkeypatch.setattr(module, name, _raise(AssertionError))
  text = "image,caption\n" + "".join(
    f"{row}\n\n0.png,after {i}\n" for i, row in enumerate(BAD_ROWS)
  )
  assert _folder(tmp_path, text) == 0
  named = _rejected(tmp_path / "out")
  assert named == {f"t.csv:{2 + 3 * i}": reason for i, reason in enumerate(BAD_ROWS.values())}
  (record,) = _all(tmp_path / "out", "train")  # no row was swallowed by the one before it
  assert record.captions == tuple(f"after {i}" for i in range(len(BAD_ROWS)))
  assert _manifest(tmp_path / "out")["inputs"] == 2 * len(BAD_ROWS)


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


def test_json_lines(tmp_path):
  _photos(tmp_path, 2)
  good = b'{"image": "1.png", "caption": ["one", "two"], "more": 1}\n'
  lines = b"".join(b"\n" + line + b"\r\n" for line in BAD_LINES)
  assert _folder(tmp_path, good + lines + good.replace(b"two", b"three"), name="t.jsonl") == 0
  assert _all(tmp_path / "out", "train")[0].captions == ("one", "two", "three")
  named = _rejected(tmp_path / "out")
  assert named == {f"t.jsonl:{3 + 2 * i}": reason for i, reason in enumerate(BAD_LINES.values())}


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
  _photos(tmp_path, 1)
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
  except shards.PrepareError:
    assert kind != "jsonl"
    out = 0
  assert out == sum(bool(row.strip()) for row in rows) + (kind == "jsonl")


def test_held_out_images_are_the_same_whatever_their_order(tmp_path):
  table, photos = _photos(tmp_path, 40)
  header, *rows = table.read_text().splitlines()
  found = []
  for order in (rows, rows[::-1], rows[:30]):
    _write(table, "\n".join([header, *order]))
    verb = ["folder", str(photos), str(tmp_path / "out"), "--captions", str(table)]
    assert prepare_data.main([*verb, "--test-fraction", "0.3"]) == 0
    found.append({r.key for r in _all(tmp_path / "out", "test")})
  assert found[0] == found[1]
  assert found[2] == found[0] & {row.split(",")[0] for row in rows[:30]}
  assert 5 < len(found[0]) < 20


def test_large_images_are_reduced_when_asked_for(tmp_path):
  _write(tmp_path / "photos" / "a.png", _png(1, (200, 100)))
  _write(tmp_path / "photos" / "b.jpg", _png(2, (60, 90), "JPEG"))
  _write(tmp_path / "photos" / "c.png", _png(3, (30, 20)))
  rows = "image,caption\n" + "".join(f"{name},x\n" for name in ("a.png", "b.jpg", "c.png"))
  assert _folder(tmp_path, rows, "--max-side", "50") == 0
  made = [images.decode(r.image).size for r in _all(tmp_path / "out", "train")]
  assert made == [(50, 25), (33, 50), (30, 20)]


def test_a_finished_folder_is_left_alone_until_something_changes(tmp_path, capsys):
  table, photos = _photos(tmp_path, 3)
  verb = ["folder", str(photos), str(tmp_path / "out"), "--captions", str(table)]
  assert prepare_data.main(verb) == 0
  marker = tmp_path / "out" / "manifest.json"
  first = marker.stat().st_ino
  assert prepare_data.main(verb) == 0
  assert "already there" in capsys.readouterr().out
  assert marker.stat().st_ino == first
  _write(photos / "1.png", _png(77))
  assert prepare_data.main(verb) == 0
  assert _all(tmp_path / "out", "train")[1].image == _png(77)
  second = marker.stat().st_ino
  assert prepare_data.main([*verb, "--force"]) == 0
  assert marker.stat().st_ino != second


# Debian packages


def _idx(array: np.ndarray) -> bytes:
  sizes = b"".join(size.to_bytes(4) for size in array.shape)
  return gzip.compress(bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes())


def _fashion_tree(root: pathlib.Path) -> np.ndarray:
  image_NRR = np.random.default_rng(0).integers(0, 256, (40, 28, 28)).astype(np.uint8)
  labels = np.arange(40, dtype=np.uint8) % 10
  folder = root / "usr/share/datasets/fashion-mnist"
  for prefix, part in (("train", slice(0, 30)), ("t10k", slice(30, 40))):
    _write(folder / f"{prefix}-images-idx3-ubyte.gz", _idx(image_NRR[part]))
    _write(folder / f"{prefix}-labels-idx1-ubyte.gz", _idx(labels[part]))
  return image_NRR


def test_fashion_mnist(tmp_path, capsys):
  image_NRR = _fashion_tree(tmp_path / "debs" / "unpacked")
  verb = ["fashion-mnist", str(tmp_path / "out"), "--packages", str(tmp_path / "debs")]
  assert prepare_data.main([*verb, "--shard-records", "8"]) == 0
  train, test = _all(tmp_path / "out", "train"), _all(tmp_path / "out", "test")
  assert (len(train), len(test)) == (30, 10)
  classes = prompts.SETS["fashion_mnist"].classes
  assert tuple(_manifest(tmp_path / "out")["classes"]) == classes
  for i, record in enumerate(train + test):
    pixels = np.asarray(images.decode(record.image))
    np.testing.assert_array_equal(pixels, np.repeat(image_NRR[i][..., None], 3, axis=2))
    assert record.label == classes[i % 10]
    assert len(set(record.captions)) == 4
  assert any("sneaker" in caption for caption in train[7].captions)
  assert prepare_data.main(["fashion-mnist", str(tmp_path / "out")]) == 0  # nothing to download
  assert "already there" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_a_damaged_package_is_named(tmp_path, capsys, damage):
  _fashion_tree(tmp_path)
  path = tmp_path / "usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz"
  data = path.read_bytes()
  labels = _idx(np.zeros(30, np.uint8))
  path.write_bytes({"cut": data[:-200], "text": b"hello", "other": labels}[damage])
  verb = ["fashion-mnist", str(tmp_path / "out"), "--packages", str(tmp_path)]
  assert prepare_data.main(verb) == 2
  assert f"error: {path}" in capsys.readouterr().err


SVG = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:cc="http://web.resource.org/cc/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><metadata><rdf:RDF><cc:Work rdf:about="">
<dc:title>{}</dc:title><dc:description>{}</dc:description>
<dc:subject><rdf:Bag><rdf:li></rdf:li>{}</rdf:Bag></dc:subject>
<dc:creator><cc:Agent><dc:title>Ann Artist</dc:title></cc:Agent></dc:creator>
</cc:Work></rdf:RDF></metadata></svg>"""


def _clip(root: pathlib.Path, name: str, seed: int, title="", text="", keywords=()) -> None:
  _write(root / f"usr/share/openclipart/png/{name}.png", _png(seed))
  words = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
  _write(root / f"usr/share/openclipart/svg/{name}.svg", SVG.format(title, text, words))


def _stamp(root: pathlib.Path, name: str, seed: int, text: str | bytes | None) -> None:
  path = root / f"usr/share/tuxpaint/stamps/{name}"
  _write(path.with_suffix(".png"), _png(seed))
  if text is not None:
    _write(path.with_suffix(".txt"), text)


WORDS = ("apple", "boat", "cloud", "dragon", "engine", "forest", "garden", "island", "ladder")


def _art_tree(root: pathlib.Path) -> None:
  for i, word in enumerate(WORDS):
    _clip(root, f"things/{word}_artist_01", i, f"Red {word}", f"A drawn {word}.", (word, "thing"))
    _stamp(root, f"animals/birds/{word}", 100 + i, f"A {word} bird.\nde.utf8=Ein Vogel.\n")
  png = root / "usr/share/openclipart/png"
  (png / "alias.png").symlink_to("things/apple_artist_01.png")
  _clip(root, "things/twin", 3, "The same pixels")
  _clip(root, "things/say_nothing", 20, "Untitled", "Made with Inkscape", ("unsorted", "hash"))
  _clip(root, "things/white", 21, "A white thing")
  out = io.BytesIO()
  Image.new("RGBA", (9, 9), (255, 255, 255, 255)).save(out, "PNG")
  _write(png / "things/white.png", out.getvalue())
  _clip(root, "things/cut", 22, "A cut thing")
  _write(png / "things/cut.png", _png(22)[:-60])
  _write(png / "things/alone.png", _png(23))
  _write(png / "things/01_._.png", _png(24))
  _clip(root, "things/01_._", 24, "Untitled")
  for i in range(25):
    _clip(root, f"stars/star_{i}pt", 200 + i, "gramastar", keywords=("stars",))
  _stamp(root, "animals/birds/apple2", 150, "An apple bird, flying.")  # a variant of apple
  _stamp(root, "animals/birds/hen_mirror", 151, None)
  _stamp(root, "animals/birds/translated", 152, "de.utf8=Ein Vogel.\n")
  _stamp(root, "animals/birds/latin", 153, "Caf\xe9".encode("latin-1"))
  _stamp(root, "animals/frog", 154, "\ufeffA frog.")
  _write(root / "usr/share/tuxpaint/stamps/animals/birds/drawn.svg", "<svg/>")


def _clipart(tmp_path: pathlib.Path, *options: str) -> int:
  sizes = ("--test-clipart", "4", "--test-stamps", "3")
  arguments = [str(tmp_path / "out"), "--packages", str(tmp_path / "tree"), *sizes]
  return prepare_data.main(["clipart", *arguments, *options])


def test_clip_art_and_stamps(tmp_path):
  _art_tree(tmp_path / "tree")
  assert _clipart(tmp_path) == 0
  out = tmp_path / "out"
  train, test, stamps = (_all(out, split) for split in ("train", "test", "stamps_test"))
  assert len(test) == 7
  assert stamps == [r for r in test if r.key.startswith("stamps/")]
  assert {r.label for r in stamps} == {"bird"}
  named = _rejected(out)
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
  manifest = _manifest(out)
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
  _art_tree(tmp_path / "tree")
  _clip(tmp_path / "tree", "things/zebra", 60, f"A green &{name};")
  path = tmp_path / "tree/usr/share/openclipart/svg/things/zebra.svg"
  path.write_text(path.read_text().replace("<svg", f"<!DOCTYPE svg [{entities}]><svg", 1))
  assert _clipart(tmp_path) == 0
  found = {r.key: r.captions for s in ("train", "test") for r in _all(tmp_path / "out", s)}
  assert _rejected(tmp_path / "out").get("openclipart/things/zebra") == (
    None if kept else "no_metadata"
  )
  assert found.get("openclipart/things/zebra") == (("A green boat",) if kept else None)


def test_the_manifest_counts_records_and_captions(tmp_path):
  _art_tree(tmp_path / "tree")
  assert _clipart(tmp_path) == 0
  manifest = _manifest(tmp_path / "out")
  assert manifest["inputs"] == manifest["kept"] + sum(manifest["rejected"].values())
  for name, split in manifest["splits"].items():
    found = _all(tmp_path / "out", name)
    assert split["records"] == len(found)
    assert split["captions"] == sum(len(r.captions) for r in found)


def test_packages_may_stand_in_folders_of_their_own(tmp_path):
  _art_tree(tmp_path / "all")
  for part in ("openclipart/png", "openclipart/svg", "tuxpaint"):
    source, name = tmp_path / "all/usr/share" / part, part.replace("/", "-")
    target = tmp_path / f"tree/debs/{name}/usr/share" / part
    target.parent.mkdir(parents=True)
    source.rename(target)
  assert _clipart(tmp_path) == 0


def test_no_test_picture_or_caption_is_in_training(tmp_path):
  _art_tree(tmp_path / "tree")
  _clip(tmp_path / "tree", "more/boat", 300, "red  BOAT")  # the caption of another picture
  nearly = np.asarray(Image.open(io.BytesIO(_png(4)))).copy()
  nearly[0, 0] ^= 64  # the picture of things/engine, all but one pixel
  path = tmp_path / "tree/usr/share/openclipart/png/more/other.png"
  _clip(tmp_path / "tree", "more/other", 301, "Something else")
  Image.fromarray(nearly).save(path)
  assert _clipart(tmp_path, "--test-clipart", "8", "--test-stamps", "8") == 0
  train, test = (_all(tmp_path / "out", split) for split in ("train", "test"))
  firsts = [captions.letters(r.captions[0]) for r in test]
  assert len(set(firsts)) == len(firsts)
  assert not set(firsts) & {captions.letters(c) for r in train for c in r.captions}
  assert _clipart(tmp_path, "--test-clipart", "9") == 2  # these eight were all
  keys = {r.key for r in test}
  assert not keys & {"openclipart/things/boat_artist_01", "openclipart/more/boat"}
  assert not keys & {"openclipart/things/engine_artist_01", "openclipart/more/other"}
  assert not keys & {"stamps/animals/birds/apple", "stamps/animals/birds/apple2"}


def test_too_few_to_hold_out_is_an_error(tmp_path, capsys):
  _art_tree(tmp_path / "tree")
  assert _clipart(tmp_path, "--test-stamps", "99") == 2
  assert "are unlike all others; ask for fewer (--test-stamps 8)" in capsys.readouterr().err


def test_clip_art_is_reduced_to_its_longer_side(tmp_path):
  _art_tree(tmp_path / "tree")
  path = tmp_path / "tree/usr/share/openclipart/png/things/apple_artist_01.png"
  path.write_bytes(_png(0, (400, 100)))
  assert _clipart(tmp_path, "--max-side", "64") == 0
  everything = _all(tmp_path / "out", "train") + _all(tmp_path / "out", "test")
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
  image = Image.open(io.BytesIO(_png(1, (64, 64)))).convert("RGB")
  small = held_out.small_picture(image)
  larger = held_out.small_picture(image.resize((128, 128)))
  other = held_out.small_picture(Image.open(io.BytesIO(_png(2, (64, 64)))).convert("RGB"))
  assert small @ larger > 0.99
  assert small @ other < 0.95


# Where packages come from


def _fake_tools(folder: pathlib.Path, monkeypatch, apt: str) -> None:
  """An apt-get that runs these shell lines, and a dpkg whose .deb files hold a folder's path."""
  for name, lines in (("apt-get", apt), ("dpkg", 'cp -r "$(cat "$2")/." "$3"')):
    path = folder / "bin" / name
    _write(path, f"#!/bin/sh\nset -e\n{lines}\n")
    path.chmod(0o755)
  monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def test_packages_are_downloaded_unpacked_and_cleared_away(tmp_path, monkeypatch):
  _fashion_tree(tmp_path / "tree")
  _fake_tools(
    tmp_path, monkeypatch, f'for n in "$@"; do echo {tmp_path}/tree > "${{n}}_1_all.deb"; done'
  )
  assert prepare_data.main(["fashion-mnist", str(tmp_path / "out")]) == 0
  assert len(_all(tmp_path / "out", "train")) == 30
  assert not (tmp_path / "out" / "packages").exists()


def test_a_failed_download_says_how_to_get_the_files(tmp_path, monkeypatch, capsys):
  _fake_tools(tmp_path, monkeypatch, "echo E: no such package >&2; exit 100")
  assert prepare_data.main(["fashion-mnist", str(tmp_path / "out")]) == 2
  error = capsys.readouterr().err
  assert "https://packages.debian.org/stable/dataset-fashion-mnist" in error
  assert "--packages: E: no such package" in error.replace(")", "")


def test_without_apt_or_packages_it_says_how_to_get_them(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("PATH", str(tmp_path))
  assert prepare_data.main(["clipart", str(tmp_path / "out")]) == 2
  assert "packages.debian.org/stable/openclipart-svg" in capsys.readouterr().err
  assert prepare_data.main(["clipart", str(tmp_path / "out"), "--packages", str(tmp_path)]) == 2
  assert "holds no openclipart-png, openclipart-svg, tux" in capsys.readouterr().err
  _write(tmp_path / "dataset-fashion-mnist_1_all.deb", "")
  verb = ["fashion-mnist", str(tmp_path / "out"), "--packages", str(tmp_path)]
  assert prepare_data.main(verb) == 2
  assert "dpkg, which unpacks it, is not installed" in capsys.readouterr().err


def test_a_fingerprint_changes_with_any_file(tmp_path):
  _art_tree(tmp_path)
  seen = {packages.fingerprint(tmp_path, (".png", ".svg"))}
  _write(tmp_path / "new.png", b"")
  seen.add(packages.fingerprint(tmp_path, (".png", ".svg")))
  _write(tmp_path / "new.png", b"1")
  seen.add(packages.fingerprint(tmp_path, (".png", ".svg")))
  _write(tmp_path / "new.txt", b"not read")
  seen.add(packages.fingerprint(tmp_path, (".png", ".svg")))
  assert len(seen) == 3


def test_the_command_line_as_people_call_it(tmp_path):
  tool = [sys.executable, str(ROOT / "tools" / "prepare_data.py")]
  done = subprocess.run([*tool, "--help"], capture_output=True, text=True, cwd=tmp_path)
  assert done.returncode == 0
  assert "folder" in done.stdout
  for verb in ("fashion-mnist", "clipart", "folder"):
    with pytest.raises(SystemExit, match="0"):
      prepare_data.main([verb, "--help"])
