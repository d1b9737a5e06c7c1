"""Writing prepared data: nothing half-written whatever kills it (drills 13 and 14)."""

import os
import pathlib
import resource
import signal
import subprocess
import sys

import pytest
import rich.progress
import trees

from clip_jax.data import images, records, tables
from tools import prepare_data
from tools.prepare import jobs, passes, shards, sheet

ROOT = pathlib.Path(__file__).parents[1]


class _Killed(BaseException):
  """Stands for a kill: no handler of the program sees it."""


def _killed(*arguments: object) -> None:
  raise _Killed


def _job(version: str, count: int = 10, loads: list[str] | None = None) -> jobs.Job:
  def load(i: int) -> records.Record:
    if loads is not None:
      loads.append(f"{i}")
    if i == 3:
      raise tables.Rejected("ugly", "the third")
    if i == 4:
      images.decode(b"no image")
    return records.Record(f"{i}", trees.png(i), (f"{version} {i}",))

  items = [
    jobs.Item(f"{i}", ("test", "again") if i == 9 else ("train",), lambda i=i: load(i))
    for i in range(count)
  ]
  plan = jobs.Plan(items, [tables.Rejection("x", "known")])
  return jobs.Job("drill", "", "", {"it": version}, {}, lambda progress: plan)


def _run(job: jobs.Job, folder: pathlib.Path, choices: passes.Choices | None = None) -> dict:
  with rich.progress.Progress(disable=True) as progress:
    return shards.write(job, folder, 4, progress, choices, force=True)


def _files(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_is_written_can_be_read(tmp_path):
  manifest = _run(_job("a"), tmp_path)
  assert [r.key for r in trees.read_all(tmp_path, "train")] == ["0", "1", "2", "5", "6", "7", "8"]
  assert trees.read_all(tmp_path, "test") == trees.read_all(tmp_path, "again")
  assert (manifest["inputs"], manifest["kept"]) == (11, 8)
  assert trees.read_rejected(tmp_path) == {"x": "known", "3": "ugly", "4": "unreadable"}
  assert sorted(path.name for path in tmp_path.iterdir() if ".array_record" not in path.name) == [
    "contact_sheet.html",
    "manifest.json",
    "rejected.jsonl",
  ]


TWO_PASSES = passes.Choices(deduplicate="near", validation_fraction=0.3)


@pytest.mark.parametrize(("older", "choices"), [(False, None), (True, None), (False, TWO_PASSES)])
def test_killed_anywhere_it_goes_on_to_the_same_files(tmp_path, monkeypatch, older, choices):
  """A kill before every single rename: never a broken data set, in the end the same bytes."""
  whole = tmp_path / "whole"
  _run(_job("new"), whole, choices)
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
        _run(_job("new"), folder, choices)
        break
      except _Killed:
        kills += 1
    if (folder / "manifest.json").exists():  # then it is whole: the older one
      assert older
      assert {r.captions[0].split()[0] for r in trees.read_all(folder, "train")} == {"old"}
    _run(_job("new"), folder, choices)
    assert _files(folder) == _files(whole)
  assert kills >= 14
  assert _files(folder) == _files(whole)


def test_what_was_damaged_since_is_done_again(tmp_path, monkeypatch):
  """A byte of what was seen and of a shard that was written, between a kill and the next run."""
  whole = tmp_path / "whole"
  _run(_job("new"), whole, TWO_PASSES)
  for pattern, offset in (("looked-*.facts", 40), ("train-00000-*.array_record", 200)):
    loads: list[str] = []
    folder = tmp_path / pattern[:5]
    with monkeypatch.context() as patch:
      patch.setattr(sheet, "write", _killed)
      with pytest.raises(_Killed):
        _run(_job("new", loads=loads), folder, TWO_PASSES)
    (path,) = (folder / ".unfinished").glob(pattern)
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)
    loads.clear()
    _run(_job("new", loads=loads), folder, TWO_PASSES)
    assert len(loads) == (10 if pattern.startswith("looked") else 4)  # the part, or the shard
    assert _files(folder) == _files(whole)


def test_finished_shards_are_not_made_again(tmp_path):
  loads: list[str] = []
  job = _job("a", loads=loads)
  stopping = [
    item if item.key != "6" else jobs.Item("6", item.splits, trees.raising(_Killed))
    for item in job.plan(None).items
  ]
  with pytest.raises(_Killed):
    _run(jobs.Job("drill", "", "", job.source, {}, lambda p: jobs.Plan(stopping)), tmp_path)
  assert loads == ["0", "1", "2", "3", "4", "5"]
  loads.clear()
  _run(job, tmp_path)
  assert loads == ["4", "5", "6", "7", "8", "9", "9"]  # the first shard of four stood


def test_a_real_sigkill_leaves_no_manifest_and_goes_on(tmp_path):
  table, photos = trees.photos(tmp_path, 12)
  code = (
    "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n"
    "from tools import prepare_data; from clip_jax.data import tables\n"
    "real, calls = tables.find, []\n"
    "def find(*a):\n"
    "  calls.append(a)\n"
    "  if len(calls) == 12 + 8: os.kill(os.getpid(), signal.SIGKILL)\n"
    "  return real(*a)\n"
    "tables.find = find\n"
    "prepare_data.main(sys.argv[2:])\n"
  )
  verb = ["folder", str(photos), str(tmp_path / "out"), "--captions", str(table)]
  verb += ["--shard-records", "5", "--workers", "1"]
  done = subprocess.run([sys.executable, "-c", code, str(ROOT), *verb], capture_output=True)
  assert done.returncode == -signal.SIGKILL
  assert not (tmp_path / "out" / "manifest.json").exists()
  assert not list((tmp_path / "out").glob("*.array_record"))
  assert len(list((tmp_path / "out" / ".unfinished").glob("*.array_record"))) == 1
  assert prepare_data.main(verb) == 0
  assert len(trees.read_all(tmp_path / "out", "train")) == 12


def test_a_full_disk_is_one_line(tmp_path, capsys):
  table, photos = trees.photos(tmp_path, 12)
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
  table, photos = trees.photos(tmp_path, 2)
  (tmp_path / "file").write_text("not a folder")
  for dest in (tmp_path / "file", tmp_path / "file" / "below"):
    assert prepare_data.main(["folder", str(photos), str(dest), "--captions", str(table)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'file'}")
    assert len(error.splitlines()) == 1


def test_two_at_once_are_refused(tmp_path):
  def second(progress):
    with pytest.raises(jobs.PrepareError, match="another process is preparing"):
      _run(_job("a"), tmp_path)
    return _job("a").plan(None)

  _run(jobs.Job("drill", "", "", {}, {}, second), tmp_path)


def test_nothing_kept_is_an_error_that_names_the_first(tmp_path):
  items = [jobs.Item(f"{i}", ("train",), trees.raising(tables.Rejected("bad"))) for i in range(3)]
  job = jobs.Job("drill", "", "", {}, {}, lambda progress: jobs.Plan(items))
  with pytest.raises(jobs.PrepareError, match=r"nothing was kept \(3 bad\)[^$]*0: bad"):
    _run(job, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_an_interruption_says_how_to_go_on(tmp_path, monkeypatch, capsys):
  table, photos = trees.photos(tmp_path, 2)
  monkeypatch.setattr(shards, "write", lambda *a: trees.raising(KeyboardInterrupt)())
  verb = ["folder", str(photos), str(tmp_path / "out"), "--captions", str(table)]
  assert prepare_data.main(verb) == 130
  assert "the same command goes on" in capsys.readouterr().err
