"""Any source of records prepared anew, and what the other kinds of input share with it."""

import json
import pathlib
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import rich.progress
import trees

from clip_jax.data import images, records
from tools import prepare_data
from tools.prepare import duplicates, passes, shards, source


def _prepared(tmp_path: pathlib.Path) -> pathlib.Path:
  """A prepared folder of 25 pictures in shards of ten, split "test"."""
  texts = ("  a\tpicture ", " ")
  made = [records.Record(f"{i}", trees.png(i), texts) for i in range(25)]
  trees.array_record(tmp_path / "source", made)
  return tmp_path / "source"


def test_a_prepared_folder_is_prepared_anew(tmp_path, capsys):
  place = _prepared(tmp_path)
  command = ["pairs", str(place), str(tmp_path / "out"), "--split", "test"]
  command += ["--max-side", "15", "--shard-records", "9", "--workers", "1"]
  assert prepare_data.main(command) == 0
  made = trees.read_all(tmp_path / "out", "train")
  assert [r.key for r in made] == [f"{i}" for i in range(25)]
  assert {r.captions for r in made} == {("a picture",)}
  assert {images.decode(r.image).size for r in made} == {(10, 15)}
  entry = trees.read_manifest(tmp_path / "out")["splits"]["train"]
  assert [s["records"] for s in entry["shards"]] == [9, 9, 7]
  assert prepare_data.main(command) == 0
  assert "already there" in capsys.readouterr().out
  command += ["--force", "--min-side", "21"]  # all are 20 x 30
  assert prepare_data.main(command) == 2
  error = capsys.readouterr().err
  assert "nothing was kept (25 too_small)" in error
  assert "\n  test-00000-of-00003.array_record record 0: too_small 20 x 30" in error
  assert len(trees.read_all(tmp_path / "out", "train")) == 25  # the older one stands


def _as_tars(root: pathlib.Path, made: list[tuple[bytes, str]]) -> str:
  for start in (0, 7):
    part = {}
    for i, (image, caption) in list(enumerate(made))[start : start + 7]:
      part |= {f"{i:02d}.png": image, f"{i:02d}.txt": caption}
    trees.tar(root / f"{start}.tar", part)
  return str(root)


def _as_parquet(root: pathlib.Path, made: list[tuple[bytes, str]]) -> str:
  root.mkdir()
  columns = {"image": [image for image, _ in made], "caption": [caption for _, caption in made]}
  pyarrow.parquet.write_table(pyarrow.table(columns), root / "0.parquet", row_group_size=4)
  return str(root)


def _as_table(root: pathlib.Path, made: list[tuple[bytes, str]]) -> str:
  for i, (image, _) in enumerate(made):
    trees.write(root / f"{i:02d}.png", image)
  rows = [json.dumps({"image": f"{i:02d}.png", "caption": c}) for i, (_, c) in enumerate(made)]
  trees.write(root / "t.jsonl", "\n".join(rows))
  return str(root / "t.jsonl")


@pytest.mark.parametrize("lay", [_as_tars, _as_parquet, _as_table])
def test_what_training_reads_in_place_is_prepared_alike(tmp_path, monkeypatch, lay):
  """Each part is pickled, as it is for another process."""
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
  made = [(trees.png(i % 12), f"picture {i}") for i in range(14)]
  called = source.Run.__call__
  monkeypatch.setattr(source.Run, "__call__", lambda part: called(pickle.loads(pickle.dumps(part))))
  place = lay(tmp_path / "raw", made)
  command = ["pairs", place, str(tmp_path / "out"), "--deduplicate", "exact", "--workers", "1"]
  assert prepare_data.main([*command, "--shard-records", "5"]) == 0
  found = trees.read_all(tmp_path / "out", "train")
  assert [(r.image, r.captions) for r in found] == [(i, (c,)) for i, c in made[:12]]
  rejected = trees.read_rejected(tmp_path / "out")
  assert list(rejected.values()) == ["duplicate", "duplicate"]
  assert not any(str(tmp_path) in where for where in rejected)  # the folder is the source's
  assert next(iter(rejected)) in ("7.tar sample 12", "0.parquet row group 3 row 0", "t.jsonl:13")


def test_each_kind_of_bad_row_is_counted_by_its_cause(tmp_path):
  """As `folder` counts them: what a source says of a record is not lost on the way."""
  lines = {
    b'{"image": "0.png", "caption": "good"}': "",
    b'{"image": "0.png", "caption": "a"': "malformed",
    b'{"image": "0.png", "caption": "\xff\xfe"}': "encoding",
    b'{"image": "0.png", "caption": NaN}': "not_a_number",
    b'{"image": "0.png", "caption": "\\ud800"}': "surrogate",
    b'{"image": "0.png"}': "columns",
    b'{"image": "0.png", "caption": 3}': "type",
    b'{"image": "0.png", "caption": ""}': "empty_caption",
    b'{"image": "http://example.org/a.png", "caption": "a"}': "url",
    b'{"image": "pipe:cat /etc/passwd", "caption": "a"}': "pipe",
    b'{"image": "../t.jsonl", "caption": "a"}': "path",
    b'{"image": "none.png", "caption": "a"}': "missing_file",
    b'{"image": "cut.png", "caption": "a"}': "truncated",
    b'{"image": "0.png", "caption": "' + b"a" * 1_100_000 + b'"}': "too_long",
  }
  trees.write(tmp_path / "raw" / "0.png", trees.png(0))
  trees.write(tmp_path / "raw" / "cut.png", trees.png(0)[:-40])
  trees.write(tmp_path / "raw" / "t.jsonl", b"\n".join(lines))
  command = ["pairs", str(tmp_path / "raw" / "t.jsonl"), str(tmp_path / "out"), "--workers", "1"]
  assert prepare_data.main(command) == 0
  wanted = {f"t.jsonl:{i}": reason for i, reason in enumerate(lines.values(), start=1) if reason}
  assert trees.read_rejected(tmp_path / "out") == wanted
  assert trees.read_manifest(tmp_path / "out")["rejected"] == dict.fromkeys(wanted.values(), 1)
  said = (tmp_path / "out" / "rejected.jsonl").read_text()
  assert '"detail": "not UTF-8 at byte ' in said  # without the place, which is the key


class _Broken:
  """One good record, already decoded; one that is none, one that storage refuses, one odd error."""

  fingerprint = "broken"

  def __len__(self):
    return 4

  def __getitem__(self, index):
    if index == 1:
      raise records.RecordError("record 1 is none")
    if index == 2:
      raise OSError("the disk is on fire")
    if index == 3:
      raise RuntimeError("something odd")
    return records.Record("good", np.full((8, 9, 3), 7, np.uint8), ("a caption",))

  def locate(self, index):
    return f"broken.file record {index}"


@pytest.mark.parametrize("choices", [passes.Choices(), passes.Choices(deduplicate="exact")])
def test_what_a_source_raises_is_named_by_file_and_record(tmp_path, choices):
  with rich.progress.Progress(disable=True) as progress:
    job = source.job(_Broken(), "broken", 2)
    manifest = shards.write(job, tmp_path, 0, progress, choices)
  assert manifest["rejected"] == {"record": 1, "storage": 1, "other": 1}
  assert trees.read_rejected(tmp_path) == {
    "broken.file record 1": "record",
    "broken.file record 2": "storage",
    "broken.file record 3": "other",
  }
  (made,) = trees.read_all(tmp_path, "train")
  assert np.array_equal(np.asarray(images.decode(made.image)), np.full((8, 9, 3), 7))


def test_rows_of_a_duplicate_are_all_named(tmp_path):
  rows = ["image,caption", "a.png,one", "b.png,two", "a.png,three", "b.png,four", "c.png,five"]
  for name, seed in (("a", 1), ("b", 1), ("c", 2)):
    trees.write(tmp_path / "photos" / f"{name}.png", trees.png(seed))
  trees.write(tmp_path / "t.csv", "\n".join(rows))
  places = [str(tmp_path / "photos"), str(tmp_path / "out")]
  command = ["folder", *places, "--captions", str(tmp_path / "t.csv"), "--deduplicate", "exact"]
  assert prepare_data.main(command) == 0
  assert trees.read_rejected(tmp_path / "out") == {"t.csv:3": "duplicate", "t.csv:5": "duplicate"}
  line = json.loads((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()[0])
  assert line["detail"] == "the same pixels as a.png"
  assert trees.read_manifest(tmp_path / "out")["kept"] == 3
  made = trees.read_all(tmp_path / "out", "train")
  assert [(r.key, r.captions) for r in made] == [("a.png", ("one", "three")), ("c.png", ("five",))]


def test_a_test_split_by_name_stays_beside_the_validation_split(tmp_path):
  trees.photos(tmp_path, 60)
  places = [str(tmp_path / "photos"), str(tmp_path / "out")]
  command = ["folder", *places, "--captions", str(tmp_path / "captions.csv")]
  command += ["--test-fraction", "0.3", "--validation-fraction", "0.5"]
  assert prepare_data.main(command) == 0
  keys = {s: {r.key for r in trees.read_all(tmp_path / "out", s)} for s in ("train", "test")}
  keys["validation"] = {r.key for r in trees.read_all(tmp_path / "out", "validation")}
  assert sum(map(len, keys.values())) == len(set().union(*keys.values())) == 60
  assert min(map(len, keys.values())) > 8
  assert prepare_data.main([*command[:-2], "--deduplicate", "near", "--force"]) == 0
  assert {r.key for r in trees.read_all(tmp_path / "out", "test")} == keys["test"]


@pytest.mark.parametrize(
  ("options", "words"),
  [
    (["--against", "nowhere"], "--against nowhere: no such folder"),
    (["--against", "empty"], "no images there; want a prepared folder"),
    (["--against", "bad"], "bad/a.png: unreadable"),
    (["--against", "bad:train"], "bad/train: no such folder"),
    (["--min-caption", "5", "--max-caption", "4"], "--min-caption 5 is over --max-caption 4"),
    (["--max-side", "1"], "nothing to see"),
  ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, options, words):
  monkeypatch.chdir(tmp_path)
  trees.photos(tmp_path, 2)
  (tmp_path / "empty").mkdir()
  trees.write(tmp_path / "bad" / "a.png", "<html>")
  assert prepare_data.main(["folder", "photos", "out", "--captions", "captions.csv", *options]) == 2
  error = capsys.readouterr().err
  assert len(error.splitlines()) == 1
  assert words in error


@pytest.mark.parametrize(
  "options",
  [
    ["--max-aspect", "0.5"],
    ["--near-bits", str(duplicates.MOST_BITS + 1)],
    ["--validation-fraction", "1"],
    ["--workers", "0"],
    ["--deduplicate", "all"],
  ],
)
def test_options_that_make_no_sense_are_refused(options, capsys):
  with pytest.raises(SystemExit) as stopped:
    prepare_data.main(["pairs", "a", "b", *options])
  assert stopped.value.code == 2
  assert options[0] in capsys.readouterr().err


def test_a_source_that_is_not_there_is_one_line(tmp_path, capsys):
  assert prepare_data.main(["pairs", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
  assert str(tmp_path / "none") in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
