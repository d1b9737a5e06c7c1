"""Data prepared on Ray's own local cluster: the same bytes, failures told, nothing left."""

import gc
import importlib.util
import pathlib
import signal
import tempfile
import time
import warnings

import network_seal
import pytest
import trees
from test_prepare_parallel import _Task

from tools import prepare_data
from tools.prepare import cluster, jobs

pytestmark = [
  pytest.mark.filterwarnings("default"),  # theirs to keep
  pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]


@pytest.fixture(autouse=True)
def what_ray_leaves_to_be_collected():
  """It never waits for its processes, of which Python warns wherever it comes upon them."""
  yield
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    gc.collect()


@pytest.fixture(autouse=True)
def nobody_is_asked_but_the_machine_for_its_cloud():
  """Ray looks at the address at which each cloud tells a machine that it is one of its own."""
  yield
  told = network_seal.attempts()
  assert all("'169.254.169.254'" in line or "'metadata.google.internal'" in line for line in told)


def _folders() -> set[str]:
  """Of temporary files: Ray's own, and those made for it."""
  places = {pathlib.Path("/tmp"), pathlib.Path("/tmp/ray"), pathlib.Path(tempfile.gettempdir())}
  found = (path for place in places if place.is_dir() for path in place.iterdir())
  return {str(path) for path in found if path.name.startswith(("ray", "session_2"))}


def _processes(folders: set[str], pids: set[str] = frozenset()) -> list[bytes]:
  """The command lines of those that name one of the folders, or are called so."""
  out = []
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      line = path.read_bytes()
    except OSError:  # has ended
      continue
    if line and (path.parent.name in pids or any(folder.encode() in line for folder in folders)):
      out.append(line)
  return out


def test_the_same_bytes_as_from_this_process_and_nothing_stays(tmp_path, capfd):
  before, terminate = _folders(), signal.getsignal(signal.SIGTERM)
  for i in range(3):
    trees.tar(tmp_path / "tars" / f"{i}.tar", trees.pair(2 * i) | trees.pair(2 * i + 1))
  trees.tar(
    tmp_path / "tars" / "3.tar", trees.pair(0) | {"x.png": trees.png(7)[:-50], "x.txt": "a"}
  )
  command = ["pairs", str(tmp_path / "tars"), "--shard-records", "2", "--deduplicate", "near"]
  assert prepare_data.main([*command, str(tmp_path / "here"), "--workers", "1"]) == 0
  capfd.readouterr()
  assert prepare_data.main([*command, str(tmp_path / "there"), "--ray", "local"]) == 0
  out, err = capfd.readouterr()
  assert err == ""
  assert "8 inputs = 6 kept + 2 left out" in out
  here, there = (
    {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    for name in ("here", "there")
  )
  assert here == there
  assert sum(name.endswith(".array_record") for name in here) == 3
  assert _folders() == before
  assert signal.getsignal(signal.SIGTERM) == terminate


def test_what_fails_is_told_and_an_interruption_leaves_no_process(tmp_path, monkeypatch):
  """In one cluster, which takes seconds to start."""
  monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parents[1]))  # for _Task
  before, found = _folders(), set()
  seen: list[int] = []

  def interrupted(count):
    raise KeyboardInterrupt

  def use():
    with cluster.engine("local", 2) as engine:
      found.update(_folders() - before)
      engine(
        [_Task("good", tmp_path), _Task("once", tmp_path, "once")], seen.append, lambda text: None
      )
      with pytest.raises(jobs.PrepareError, match="the disk is full"):
        engine([_Task("bad", tmp_path, "mistake")], seen.append, print)
      with pytest.raises(jobs.PrepareError, match=r"dead: WorkerCrashedError: .*goes on from here"):
        engine([_Task("dead", tmp_path, "always")], seen.append, print)
      assert _processes(found)
      engine([_Task("last", tmp_path)], interrupted, print)

  with pytest.raises(KeyboardInterrupt):
    use()
  assert sum(seen) == 2 * 7
  pids = {(tmp_path / name).read_text() for name in ("good", "once", "last")}
  deadline = time.monotonic() + 10
  while left := _processes(found, pids):
    assert time.monotonic() < deadline, left
  assert len(found) == 1
  assert _folders() == before


def test_a_cluster_that_is_not_there_is_one_line(tmp_path, capsys):
  table, photos = trees.photos(tmp_path, 2)
  command = ["folder", str(photos), str(tmp_path / "out"), "--captions", str(table)]
  assert prepare_data.main([*command, "--ray", "auto"]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: --ray auto: no cluster there (")
  assert len(error.splitlines()) == 1
  assert not (tmp_path / "out").exists()
