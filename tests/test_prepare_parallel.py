"""Tasks in processes of their own: who dies is named, and nothing else is lost."""

import dataclasses
import os
import pathlib
import signal

import pytest

from tools.prepare import cluster, jobs, parallel


class _Odd(Exception):
  """Cannot be unpickled: it wants two arguments."""

  def __init__(self, one: str, two: str):
    super().__init__(one + two)


@dataclasses.dataclass(frozen=True)
class _Task:
  """Writes a file of its name, if `what` does not happen to it."""

  name: str
  folder: pathlib.Path
  what: str = ""

  def __call__(self, report):
    report(3)
    tried = self.folder / f"{self.name}.tried"
    before = tried.exists()
    tried.touch()
    if self.what == "always" or (self.what == "once" and not before):
      os.kill(os.getpid(), signal.SIGKILL)
    if self.what == "mistake":
      raise jobs.PrepareError("the disk is full")
    if self.what == "odd":
      raise _Odd("an odd", " error")
    (self.folder / self.name).write_text(str(os.getpid()))
    report(4)


def _run(engine: parallel.Engine, tasks: list[_Task]) -> tuple[int, list[str]]:
  seen, warnings = [], []
  try:
    engine(tasks, seen.append, warnings.append)
  finally:
    pids = {path.read_text() for path in tasks[0].folder.iterdir() if path.suffix == ""}
    for pid in pids - {str(os.getpid()), ""}:  # empty where one was killed before it wrote
      assert not pathlib.Path(f"/proc/{pid}").exists(), "a worker is left behind"
  return sum(seen), warnings


def test_a_killed_worker_is_named_and_replaced_and_the_rest_is_done(tmp_path):
  tasks = [_Task(f"t{i}", tmp_path, {1: "once", 2: "always"}.get(i, "")) for i in range(6)]
  seen, warnings = [], []
  with pytest.raises(jobs.PrepareError) as error:
    parallel.Processes(2)(tasks, seen.append, warnings.append)
  assert "killed by SIGKILL at t2" in str(error.value)
  assert "the same command goes on" in str(error.value)
  assert sorted(w.partition(",")[0].partition(" was ")[2] for w in warnings) == [
    "killed by SIGKILL at t1",
    "killed by SIGKILL at t2",
  ]
  done = {path.name for path in tmp_path.iterdir() if path.suffix == ""}
  assert done == {"t0", "t1", "t3", "t4", "t5"}
  assert sum(seen) == 7 * len(done)  # what the dead had seen is not counted twice


def test_what_a_task_raises_comes_back_and_no_worker_stays(tmp_path):
  tasks = [_Task("good", tmp_path), _Task("bad", tmp_path, "mistake")]
  with pytest.raises(jobs.PrepareError, match="the disk is full"):
    _run(parallel.Processes(2), tasks)
  with pytest.raises(RuntimeError, match="odd: _Odd: an odd error"):
    _run(parallel.Processes(2), [_Task("odd", tmp_path, "odd"), _Task("odd", tmp_path, "odd")])


def test_one_worker_is_this_process(tmp_path):
  tasks = [_Task(f"t{i}", tmp_path) for i in range(3)]
  assert _run(parallel.Processes(1), tasks) == (21, [])
  assert {(tmp_path / t.name).read_text() for t in tasks} == {str(os.getpid())}
  assert parallel.Processes(4)([], print, print) is None
  assert parallel.cores() == len(os.sched_getaffinity(0))


def test_an_interruption_while_workers_start_is_the_parents_alone(tmp_path, capfd):
  """Else each of them prints where in its imports it was."""
  worker = parallel._Worker(0)
  for number in (signal.SIGINT, signal.SIGTERM):
    os.kill(worker.process.pid, number)
  worker.give(_Task("a", tmp_path))
  assert [worker.pipe.recv() for _ in range(2)] == [("seen", 7), ("done", None)]
  worker.end()
  assert capfd.readouterr().err == ""
  assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_ray_that_is_not_there_is_said(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "ray", None)
  with pytest.raises(jobs.PrepareError, match=r"pip install -e '\.\[cluster\]'"):
    with cluster.engine("local", 1):
      pass
