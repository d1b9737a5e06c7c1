"""Several processes as one run: real ones, over the loopback."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import clip_jax
from clip_jax import checkpoint, chips, cli, hosts, metrics

EXPERIMENT = """
from clip_jax import config as c

def get_config():
  test = c.Source(kind="scenes", split="test", records=40)
  return c.to_config_dict(c.Config(
    name="tiny", steps=40, log_every_steps=1,
    model=c.Model(
      image=c.Vision(resolution=32, patch=16, width=16, layers=1, heads=2),
      text=c.Text(context_length=16, vocab_size=600, width=16, layers=1, heads=2), embed_dim=8,
    ),
    data=c.Data(
      sources=(c.Source(kind="scenes", records=200),), batch_pairs=16, tokenizer="train"
    ),
    optimizer=c.Optimizer(learning_rate=1e-3, warmup_steps=2),
    evaluation=c.Evaluation(
      tasks=(c.Task("pairs", "retrieval", test), c.Task("shapes", "zero_shot", test, "scenes")),
      every_steps=8, batch=16,
    ),
    checkpoint=c.Checkpoint(every_steps=4),
  ))
"""
ROOT = pathlib.Path(__file__).parents[1]
SEALED = ROOT / "tests" / "sealed"


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


HEARTBEAT = 6


class Run:
  """`clip-jax train` in several processes on one workdir; `last` changes the start of the last."""

  def __init__(self, folder, processes, devices, *options, text=EXPERIMENT, last=None):
    (folder / "tiny.py").write_text(text)
    self.workdir, coordinator = folder / "run", f"127.0.0.1:{_free_port()}"
    self.outputs = [folder / f"{i}.out" for i in range(processes)]
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    several = ["--coordinator", coordinator, "--processes", str(processes)]
    several += ["--heartbeat", str(HEARTBEAT), "--process"]
    self.processes = []
    for i, output in enumerate(self.outputs):
      how = {"code": ROOT, "folder": folder, "workdir": self.workdir, "options": ()}
      how |= (last or {}) if i == processes - 1 else {}
      command = [sys.executable, "-m", "clip_jax.cli", "train"]
      command += ["--config", str(how["folder"] / "tiny.py"), "--workdir", str(how["workdir"])]
      command += [*options, *how["options"], *([*several, str(i)] if processes > 1 else [])]
      with output.open("w") as file:
        process = subprocess.Popen(
          command,
          stdout=file,
          stderr=subprocess.STDOUT,
          env={**environment, "PYTHONPATH": f"{how['code']}{os.pathsep}{SEALED}"},
          cwd=how["folder"],
        )
      self.processes.append(process)

  def wait(self):
    """The exit codes. Raises: subprocess.TimeoutExpired when one hangs."""
    try:
      return [process.wait(timeout=200) for process in self.processes]
    finally:
      self.kill()

  def kill(self):
    for process in self.processes:
      process.kill()
      process.wait()

  def wait_for(self, reached):
    deadline = time.monotonic() + 150
    while not reached():
      if time.monotonic() > deadline or any(p.poll() is not None for p in self.processes):
        self.kill()
        pytest.fail(self.text())
      time.sleep(0.05)

  def checkpoints(self):
    """The steps whose folders are there, whole or not."""
    folder = self.workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())

  def text(self, process=None):
    chosen = self.outputs if process is None else [self.outputs[process]]
    return "\n".join(output.read_text() for output in chosen)

  def series(self, name):
    return {line["step"]: line[name] for line in metrics.read(self.workdir) if name in line}

  def figures(self):
    """{step: {figure: value}} of the evaluations while training."""
    found = {}
    for line in metrics.read(self.workdir):
      values = {name: value for name, value in line.items() if name.startswith("eval/")}
      found |= {line["step"]: values} if values else {}
    return found


def _kill(run, victim):
  """Kills one process: the others must name it and end, in bounded time, as unfinished."""
  process = run.processes[victim]
  process.kill()
  began = time.monotonic()
  codes = run.wait()
  seconds = time.monotonic() - began
  assert seconds < HEARTBEAT + 60
  assert codes.pop(victim) == -signal.SIGKILL
  assert codes == [hosts.UNFINISHED] * len(codes), run.text()
  for i in set(range(len(run.processes))) - {victim}:
    who = (
      rf"error: host {victim} \(.*pid {process.pid}(, the coordinator)?\) .*it died; host {i} stops"
    )
    assert re.search(who, run.text(i)), run.text(i)
  return seconds


SAVED_LAST = "--config.checkpoint.every_steps=40"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """40 steps in one process with 4 devices."""
  run = Run(tmp_path_factory.mktemp("alone"), 1, 4, SAVED_LAST)
  assert run.wait() == [0], run.text()
  return run


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """The same in two processes of two devices, weights sharded over all; SIGTERM to the second."""
  run = Run(tmp_path_factory.mktemp("two"), 2, 2, "--config.mesh.fsdp=4")
  run.wait_for(lambda: 8 in run.figures())  # its evaluation is done, which SIGTERM would break off
  began = time.monotonic()
  run.processes[1].send_signal(signal.SIGTERM)
  assert run.wait() == [hosts.UNFINISHED] * 2, run.text()
  run.seconds_to_end = time.monotonic() - began
  return run


@pytest.fixture(scope="module")
def four(two, tmp_path_factory):
  """Four processes of one device go on from there; after a checkpoint of theirs, one is killed."""
  folder = tmp_path_factory.mktemp("four")
  shutil.copytree(two.workdir, folder / "run")
  before = two.checkpoints()[-1]
  run = Run(folder, 4, 1, "--accept-changes")
  # the last may be under way; the one before it is whole
  run.wait_for(lambda: sum(step > before for step in run.checkpoints()) > 1)
  run.seconds_to_end = _kill(run, 2)
  return run


def _newest(run):
  checkpoints = checkpoint.Checkpoints(run.workdir, read_only=True)
  try:
    return checkpoints.newest_meta()
  finally:
    checkpoints.close()


def test_sigterm_on_one_host_saves_on_all(two, drill):
  step = int(re.search(r"stopped at step (\d+) and saved", two.text(0).replace("\n", " "))[1])
  drill(18, stops=1, lost=step - _newest(two)[0], most_seconds=two.seconds_to_end)
  assert 8 <= step < 40
  assert _newest(two)[0] == step
  assert list(two.series("train/loss")) == list(range(1, step + 1))


def test_two_hosts_evaluate_as_one(two, alone):
  assert two.figures()[8]
  assert two.figures()[8] == alone.figures()[8]


def test_one_host_of_four_dies_and_what_they_saved_loads_in_one(two, four, drill):
  """Here the others name it. The checksums of the meta, which `load` compares, are of all four."""
  assert _newest(four)[0] > _newest(two)[0]
  drill(30, deaths=1, most_seconds=four.seconds_to_end, most_heartbeat=HEARTBEAT)
  model = clip_jax.load(four.workdir)
  assert model.step == _newest(four)[0]
  assert np.isfinite(model.encode_text(["a red circle"])).all()


def test_other_processes_and_another_mesh_go_on(alone, two, four, tmp_path):
  """Two processes end what two and four began: losses, figures, embeddings are those of one."""
  shutil.copytree(four.workdir, tmp_path / "run")
  rest = Run(tmp_path, 2, 2, "--config.mesh.fsdp=2", SAVED_LAST, "--accept-changes")
  assert rest.wait() == [0, 0], rest.text()
  got, expected = rest.series("train/loss"), alone.series("train/loss")
  assert list(got) == list(range(1, 41))
  np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=2e-5)
  assert rest.figures() == alone.figures()
  ours, theirs = (json.loads((r.workdir / "results.json").read_text()) for r in (rest, alone))
  assert ours["figures"] == theirs["figures"]
  assert ours["machine"]["device"].startswith("4 x")
  assert (rest.workdir / "report.html").exists()
  lines = metrics.read(rest.workdir)
  account = [line["seconds/total"] for line in lines if "seconds/total" in line]
  assert account == sorted(account)  # it goes on from start to start
  texts = ["a red circle", "two blue stars"]
  embeddings, wanted = (clip_jax.load(r.workdir).encode_text(texts) for r in (rest, alone))
  np.testing.assert_allclose(embeddings, wanted, atol=1e-5)


def test_a_coordinator_that_dies_is_named_and_ends_the_others(tmp_path, drill):
  run = Run(tmp_path, 2, 1, "--config.steps=100000", "--config.evaluation.every_steps=0")
  run.wait_for(lambda: run.workdir.is_dir() and run.series("train/loss"))
  drill(30, deaths=1, most_seconds=_kill(run, 0), most_heartbeat=HEARTBEAT)


def _manifest(folder, sha256):
  """A folder of one shard that is never read."""
  (folder / "pairs").mkdir(parents=True)
  (folder / "pairs" / "shard").write_bytes(b"shard")
  shard = {"file": "shard", "records": 40, "bytes": 5, "sha256": sha256}
  manifest = {"format": 1, "splits": {"train": {"shards": [shard]}}}
  (folder / "pairs" / "manifest.json").write_text(json.dumps(manifest))


def test_hosts_that_differ_do_not_start(tmp_path, drill):
  """Each thing that may differ, in one start: all are told, on both."""
  text = EXPERIMENT.replace('c.Source(kind="scenes", records=200)', 'c.Source(path="pairs")')
  other = tmp_path / "other"
  _manifest(tmp_path, "one")
  _manifest(other, "another")
  (other / "tiny.py").write_text(text + "# another file\n")
  shutil.copytree(ROOT / "clip_jax", other / "code" / "clip_jax")
  with (other / "code" / "clip_jax" / "ring.py").open("a") as module:
    module.write("# another version\n")
  last = {"folder": other, "code": other / "code", "workdir": other / "run"}
  last["options"] = ["--config.optimizer.learning_rate=0.002", "--config.data.tokenizer=original"]
  run = Run(tmp_path, 2, 1, text=text, last=last)
  assert run.wait() == [2, 2], run.text()
  sha256 = '"{}sha256 [0-9a-f]{{12}}" on host 1, "{}sha256 [0-9a-f]{{12}}" on host 0'
  for i in range(2):
    for message in (
      "error: .*the hosts differ, nothing was trained: ",
      f"workdir {other}/run: host 1 does not see what host 0 writes in {tmp_path}/run; give all "
      "hosts one shared folder",
      "config.optimizer.learning_rate is 0.002 on host 1, 0.001 on host 0",
      'config.data.tokenizer is "original" on host 1, "train" on host 0',
      "the experiment file is " + sha256.format("tiny.py, ", "tiny.py, "),
      "the code of clip_jax is " + sha256.format("", ""),
      "the data of config.data.sources.0 is " + sha256.format("40 records, ", "40 records, "),
    ):
      assert re.search(message, run.text(i)), (message, run.text(i))
  assert not list(tmp_path.rglob(".shared-*"))
  assert not list((tmp_path / "run").iterdir())
  drill(32, fields=6, named=6)  # the workdir, two of the config, its file, the code, the data


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"coordinator": "10.0.0.1:80"}, "--processes and --process: missing; the three go together"),
    ({"processes": 4, "process": 1}, "--coordinator: missing"),
    ({"coordinator": "a:1", "processes": 2, "process": 2}, "--process 2: 2 processes are 0 to 1"),
    ({"coordinator": "a", "processes": 2, "process": 0}, "--coordinator a: want HOST:PORT"),
    ({"coordinator": "a:x", "processes": 2, "process": 0}, "--coordinator a:x: want HOST:PORT"),
  ],
)
def test_flags_that_do_not_go_together(given, message):
  with pytest.raises(hosts.HostsError, match=re.escape(message)):
    hosts.start(**given)


def test_a_port_in_use_is_told():
  with socket.socket() as taken:
    taken.bind(("", 0))
    taken.listen()
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(hosts.HostsError, match=r"port \d+ is in use here .another run"):
      hosts.start(address, 2, 0)


def test_the_environment_of_a_job_set(monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "job-0:1234")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  monkeypatch.setenv("JAX_PROCESS_ID", "x")
  with pytest.raises(hosts.HostsError, match="JAX_PROCESS_ID: 'x' is no number"):
    hosts.start()
  monkeypatch.setenv("JAX_PROCESS_ID", "7")
  with pytest.raises(hosts.HostsError, match="--process 7: 2 processes are 0 to 1"):
    hosts.start()


JOIN_BY_THE_ENVIRONMENT = """
from clip_jax import hosts
hosts.start()
print(hosts.gather("who", "here"), flush=True)
"""


@pytest.mark.parametrize("manager", ["Slurm", "JobSet"])
def test_what_a_manager_says_is_enough(manager):
  port = _free_port()
  processes = []
  for process in range(2):
    known = {
      "Slurm": {
        "SLURM_JOB_ID": str(port),  # of which JAX makes the port, the first 4096 left out
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{61440 + port % 4096}",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
      },
      "JobSet": {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(process),
      },
    }[manager]
    command = [sys.executable, "-c", JOIN_BY_THE_ENVIRONMENT]
    environment = {**os.environ, **known, "JAX_PLATFORMS": "cpu"}
    processes.append(
      subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    )
  said = [process.communicate(timeout=100)[0] for process in processes]
  assert said == ["['here', 'here']\n"] * 2


JOIN = """
import os, sys, time
from clip_jax import hosts
try:
  hosts.start(sys.argv[1], *map(int, sys.argv[2:]))
except hosts.HostsError as error:
  print("error:", error, file=sys.stderr, flush=True)
  os._exit(2)
with hosts.watched(int(sys.argv[-1])):
  print(hosts.gather("who", sys.argv[3]), flush=True)
  time.sleep(100)
"""


def _join(address, processes, process, timeout=100, heartbeat=30):
  """`hosts.start` in a process of its own: JAX may be joined once only."""
  words = map(str, (processes, process, timeout, heartbeat))
  return subprocess.Popen(
    [sys.executable, "-c", JOIN, address, *words],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  )


def test_a_host_that_hangs_is_named_and_ends_the_others(drill):
  """Its connections stay open, so that nothing but its silence tells."""
  address = f"127.0.0.1:{_free_port()}"
  processes = [_join(address, 2, process, heartbeat=2) for process in range(2)]
  try:
    for process in processes:
      assert process.stdout.readline() == "['0', '1']\n"
    processes[1].send_signal(signal.SIGSTOP)
    _, said = processes[0].communicate(timeout=2 + 60)
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  assert processes[0].returncode == hosts.UNFINISHED
  assert f"pid {processes[1].pid}) has shown no sign of life for 2 s: it died" in said
  drill(31, stopped=1)


@pytest.mark.parametrize("words", ["UNKNOWN: Gloo AllGather failed", "UNAVAILABLE: gone"])
def test_the_death_of_another_is_no_error_of_ones_own(words):
  """JAX raises it as errors of several types, which Orbax and this project then wrap."""
  try:
    try:
      raise ValueError(words)
    except ValueError as error:
      raise checkpoint.CheckpointError("step 4 could not be written") from error
  except checkpoint.CheckpointError as error:
    wrapped = error
  assert hosts._of_the_runtime(ValueError(words))
  assert hosts._of_the_runtime(wrapped)
  assert hosts._of_the_runtime(jax.errors.JaxRuntimeError("anything"))
  assert not hosts._of_the_runtime(ValueError(f"config.name: {words}"))


def test_a_stale_address_is_told():
  """Nothing listens there, or something that never speaks, or the coordinator of another run."""
  seconds, another = 7, f"127.0.0.1:{_free_port()}"
  coordinator = _join(another, 2, 0)
  with socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    nobody = [f"127.0.0.1:{number}" for number in (_free_port(), silent.getsockname()[1])]
    try:
      stale = [_join(address, 3, 1, seconds) for address in nobody]
      while not hosts._answers(another):
        assert coordinator.poll() is None
        time.sleep(0.05)
      stale += [_join(another, 4, 3), _join(another, 3, 1)]
      said = [process.communicate(timeout=seconds + 60)[1] for process in stale]
    finally:
      coordinator.kill()
      coordinator.communicate()
  unreached = "error: process {} did not reach all others at {} in .* is that the address of proc"
  messages = [unreached.format("1 of 3", address) for address in nobody]
  messages += [unreached.format("3 of 4", another)]
  messages += [f"error: process 1 of 3: at {another} is the coordinator of another run, of 2 proc"]
  for text, message in zip(said, messages, strict=True):
    assert re.search(message, text), text
  assert [process.returncode for process in stale] == [2, 2, 2, 2]


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "inf", "0.5"])
def test_a_heartbeat_that_would_end_the_run_is_refused(seconds, tmp_path, capsys):
  (tmp_path / "tiny.py").write_text(EXPERIMENT)
  words = ["train", "--config", str(tmp_path / "tiny.py"), "--workdir", str(tmp_path / "run")]
  assert cli.main([*words, "--heartbeat", seconds]) == 2
  told = capsys.readouterr().err
  assert told == f"error: --heartbeat {seconds}: want seconds, from 1 to 86400\n"


def test_alone_nothing_is_asked():
  hosts.start(processes=1)
  hosts.wait_for_all("nothing")
  rows = np.ones((2, 3))
  assert hosts.sum_over_hosts(rows) is rows
  with hosts.watched():
    assert jax.process_count() == 1


def test_chips_without_their_driver_are_not_passed_over(monkeypatch):
  """JAX would train on the CPU, each host for itself."""
  found = "num_available_tpu_chips_and_device_id"
  monkeypatch.setattr(chips.hardware_utils, found, lambda: (4, 1))
  monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
  monkeypatch.setenv("JAX_PLATFORMS", "")
  monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
  with pytest.raises(hosts.HostsError, match=r"4 TPU chips are here, and libtpu, .* install-tpu"):
    hosts.start(processes=1)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  hosts.start(processes=1)
