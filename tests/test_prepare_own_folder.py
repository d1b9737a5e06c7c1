"""DEST is never a folder that is read, and what stands there is not replaced unasked."""

import json
import os
import pathlib
import sys

import pytest
import rich.progress
import trees

from clip_jax.data import records
from tools import prepare_data
from tools.prepare import jobs, shards


def _state(root: pathlib.Path) -> dict[str, object]:
  """Every file with its bytes, every folder and link, below `root`."""
  return {
    str(path): os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()
    for path in sorted(root.rglob("*"))
  }


def _tree(root: pathlib.Path) -> None:
  """Sources of each kind, some with links to each other."""
  trees.photos(root, 3)  # photos/, captions.csv
  made = [records.Record(f"{i}", trees.png(i), ("a picture",)) for i in range(3)]
  trees.array_record(root / "set", made)
  trees.tar(root / "tars" / "0.tar", trees.pair(1))
  (root / "alias").symlink_to("set")
  (root / "linked").mkdir()
  for path in (root / "set").iterdir():
    (root / "linked" / path.name).symlink_to(path)
  trees.fashion_tree(root / "debian" / "packages")


FOLDER = ("folder", "photos", "DEST", "--captions", "captions.csv")
PAIRS = ("pairs", "set", "DEST", "--split", "test", "--max-side", "16")


@pytest.mark.parametrize(
  ("command", "dest"),
  [
    (PAIRS, "set"),
    (PAIRS, "alias"),
    (PAIRS, "set/../set/"),
    (PAIRS, "."),
    (PAIRS, "set/test"),  # where this split would be looked for
    (("pairs", "alias", "DEST", "--split", "test"), "set"),
    (("pairs", "linked", "DEST", "--split", "test"), "set"),
    (("pairs", "tars", "DEST"), "tars"),
    (("pairs", "tars/{0..0}.tar", "DEST"), "tars"),
    (("pairs", "captions.csv", "DEST", "--images", "photos"), "photos"),
    ((*FOLDER, "--against", "set:test"), "set"),
    ((*FOLDER, "--against", "set"), "alias"),
    (FOLDER, "photos"),
    (FOLDER, "."),
    (("fashion-mnist", "DEST", "--packages", "debian/packages"), "debian"),
    (("clipart", "DEST", "--packages", "debian/packages"), "debian"),
    (("mnist", "DEST", "--files", "photos"), "photos"),
  ],
)
def test_what_is_read_is_not_written_over(tmp_path, monkeypatch, capsys, command, dest):
  _tree(tmp_path)
  monkeypatch.chdir(tmp_path)
  before = _state(tmp_path)
  assert prepare_data.main([dest if word == "DEST" else word for word in command]) == 2
  error = capsys.readouterr().err
  assert len(error.splitlines()) == 1
  assert "files in DEST are replaced, so choose a folder of its own" in error
  assert _state(tmp_path) == before


def test_below_what_is_read_there_is_room(tmp_path, monkeypatch):
  _tree(tmp_path)
  monkeypatch.chdir(tmp_path / "photos")
  assert prepare_data.main(["folder", ".", "out", "--captions", "../captions.csv"]) == 0
  assert len(trees.read_all(tmp_path / "photos" / "out", "train")) == 3


def test_another_data_set_is_replaced_with_force_only(tmp_path, capsys):
  table, photos = trees.photos(tmp_path, 4)
  out = tmp_path / "out"
  command = ["folder", str(photos), str(out), "--captions", str(table)]
  assert prepare_data.main([*command, "--max-side", "25"]) == 0
  before = _state(out)
  other = [*command, "--max-side", "24", "--min-side", "4", "--deduplicate", "exact"]
  assert prepare_data.main(other) == 2
  error = capsys.readouterr().err
  assert f"error: {out}: holds a data set that was made otherwise: " in error
  assert (
    "max_side 25, now 24; min_side not given, now 4; deduplicate not given, now exact. " in error
  )
  assert "--force" in error
  trees.write(photos / "1.png", trees.png(9))
  assert prepare_data.main([*command, "--max-side", "25"]) == 2
  assert "made otherwise: source images " in capsys.readouterr().err
  (tmp_path / "mine").mkdir()
  trees.write(tmp_path / "mine" / "manifest.json", '{"name": "an app"}')
  assert prepare_data.main([*command[:2], str(tmp_path / "mine"), *command[3:]]) == 2
  assert "holds a data set that cannot be read" in capsys.readouterr().err
  assert [path.name for path in (tmp_path / "mine").iterdir()] == ["manifest.json"]
  assert _state(out) == before
  assert prepare_data.main([*other, "--force"]) == 0
  assert trees.read_manifest(out)["identity"]["settings"]["max_side"] == 24


def test_unfinished_work_is_discarded_with_force_only(tmp_path, monkeypatch, capsys):
  table, photos = trees.photos(tmp_path, 4)
  out = tmp_path / "out"
  command = ["folder", str(photos), str(out), "--captions", str(table), "--deduplicate", "exact"]
  with monkeypatch.context() as patch:
    patch.setattr(shards, "_publish", lambda *a: trees.raising(KeyboardInterrupt)())
    assert prepare_data.main(command) == 130
  before = _state(out)
  assert any(path.endswith("train-00000-of-00001.array_record") for path in before)
  assert prepare_data.main([*command, "--near-bits", "3", "--shard-records", "3"]) == 2
  error = capsys.readouterr().err
  assert f"{out}: holds an unfinished data set that was made otherwise: " in error
  assert "shard_records 0, now 3" in error
  assert _state(out) == before
  assert prepare_data.main([*command[:-2], "--force"]) == 0
  assert (
    "deduplicate" not in json.loads((out / "manifest.json").read_text())["identity"]["settings"]
  )
  assert not (out / ".unfinished").exists()


@pytest.mark.parametrize("made_before", [False, True])
def test_an_error_before_any_work_leaves_nothing(tmp_path, monkeypatch, capsys, made_before):
  monkeypatch.setitem(sys.modules, "ray", None)
  table, photos = trees.photos(tmp_path, 2)
  trees.write(tmp_path / "bad" / "a.png", "<html>")
  out = tmp_path / "out"
  if made_before:
    out.mkdir()
  command = ["folder", str(photos), str(out), "--captions", str(table)]
  for options, words in (
    (["--against", str(tmp_path / "bad")], "a.png: unreadable"),
    (["--min-side", "5000"], "nothing was kept"),
    (["--ray", "local"], "--ray local: "),
  ):
    assert prepare_data.main([*command, *options]) == 2
    assert words in capsys.readouterr().err
    assert out.exists() == made_before
    assert not made_before or not list(out.iterdir())


def test_what_was_done_before_an_error_stays(tmp_path):
  read = []

  def part(name, error):
    read.append(name)
    if error:
      raise jobs.PrepareError("the cable is out")
    record = records.Record(name, trees.png(1), ("a picture",))
    return [jobs.Item(name, ("train",), lambda: record)]

  def run(error):
    parts = [lambda: part("a", False), lambda: part("b", error)]
    job = jobs.Job("drill", "", "", {}, {}, lambda progress: jobs.Plan(parts=parts))
    with rich.progress.Progress(disable=True) as progress:
      shards.write(job, tmp_path / "out", 0, progress)

  with pytest.raises(jobs.PrepareError, match="cable"):
    run(error=True)
  run(error=False)
  assert read == ["a", "b", "b"]
