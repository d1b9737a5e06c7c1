"""Several processes as one run: real ones, over the loopback."""

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
from clip_jax import hosts, metrics

EXPERIMENT = """
from clip_jax import config as c

def get_config():
  test = c.Source(kind="scenes", split="test", records=40)
  return c.to_config_dict(c.Config(
    name="tiny", steps=24, log_every_steps=1,
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
      every_steps=12, batch=16,
    ),
    checkpoint=c.Checkpoint(every_steps=4),
  ))
"""
ROOT = pathlib.Path(__file__).parents[1]


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


class Run:
  """`clip-jax train` in several processes on one workdir."""

  def __init__(self, folder, processes, devices, *options, workdir="run", own=None):
    (folder / "tiny.py").write_text(EXPERIMENT)
    self.workdir, coordinator = folder / workdir, f"127.0.0.1:{_free_port()}"
    self.outputs = [folder / f"{workdir}_{i}.out" for i in range(processes)]
    environment = {
      **os.environ,
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
    }
    several = ["--coordinator", coordinator, "--processes", str(processes), "--heartbeat", "6"]
    self.processes = []
    for i, output in enumerate(self.outputs):
      command = [sys.executable, "-m", "clip_jax.cli", "train", "--config", str(folder / "tiny.py")]
      command += ["--workdir", str(self.workdir), *options, *((own or {}).get(i, ()))]
      command += [*several, "--process", str(i)] if processes > 1 else []
      with output.open("w") as file:
        self.processes.append(
          subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        )

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

  def wait_for_checkpoint(self):
    deadline = time.monotonic() + 150
    while not (self.workdir / "checkpoints" / "4").is_dir():
      if time.monotonic() > deadline or any(p.poll() is not None for p in self.processes):
        self.kill()
        pytest.fail(self.text())
      time.sleep(0.1)

  def text(self, process=None):
    chosen = self.outputs if process is None else [self.outputs[process]]
    return "\n".join(output.read_text() for output in chosen)

  def series(self, name):
    return {line["step"]: line[name] for line in metrics.read(self.workdir) if name in line}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """24 steps in one process with 4 devices."""
  run = Run(tmp_path_factory.mktemp("alone"), 1, 4)
  assert run.wait() == [0], run.text()
  return run


@pytest.fixture(scope="module")
def together(tmp_path_factory):
  """The same in two processes of two devices, weights sharded over all; SIGTERM to the second."""
  run = Run(tmp_path_factory.mktemp("together"), 2, 2, "--config.mesh.fsdp=4")
  run.wait_for_checkpoint()
  run.processes[1].send_signal(signal.SIGTERM)
  assert run.wait() == [0, 0], run.text()
  return run


def test_sigterm_on_one_host_saves_on_all(together):
  step = int(re.search(r"stopped at step (\d+) and saved", together.text(0))[1])
  assert 4 <= step < 24
  assert (together.workdir / "checkpoints" / str(step)).is_dir()
  assert list(together.series("train/loss")) == list(range(1, step + 1))


def test_a_checkpoint_of_two_processes_loads_in_one(together):
  model = clip_jax.load(together.workdir)
  assert np.isfinite(model.encode_text(["a red circle"])).all()


def test_other_processes_and_another_mesh_go_on(alone, together, tmp_path):
  """Four processes of one device end the run of two: losses and figures are those of one."""
  shutil.copytree(together.workdir, tmp_path / "run")
  rest = Run(tmp_path, 4, 1, "--accept-changes")
  assert rest.wait() == [0, 0, 0, 0], rest.text()
  got, expected = rest.series("train/loss"), alone.series("train/loss")
  assert list(got) == list(range(1, 25))
  np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=2e-5)
  ours, theirs = (json.loads((r.workdir / "results.json").read_text()) for r in (rest, alone))
  assert ours["figures"] == theirs["figures"]
  assert ours["machine"]["device"].startswith("4 x")
  assert (rest.workdir / "report.html").exists()
  middle = [name for name in metrics.read(alone.workdir)[-1] if name.startswith("seconds/")]
  assert middle  # the last line is of the whole run, written once
  assert len([line for line in metrics.read(rest.workdir) if "seconds/total" in line]) == 2


@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_dies_is_named_and_ends_the_others(victim, tmp_path):
  run = Run(tmp_path, 2, 1, "--config.steps=100000")
  run.wait_for_checkpoint()
  run.processes[victim].kill()
  codes = run.wait()
  assert codes[victim] == -signal.SIGKILL
  assert codes[1 - victim] != 0
  deadline = time.monotonic() + 20  # its last word may come after its end
  while f"host {victim} (" not in run.text(1 - victim) and time.monotonic() < deadline:
    time.sleep(0.1)
  pid = run.processes[victim].pid
  who = rf"pid {pid}\) has shown no sign of life for 6 s" if victim else "the coordinator, .* died"
  assert re.search(rf"error: host {victim} \(.*{who}", run.text(1 - victim)), run.text(1 - victim)


def test_hosts_that_differ_do_not_start(tmp_path):
  run = Run(tmp_path, 2, 1, own={1: ["--config.optimizer.learning_rate=0.002", "--config.seed=3"]})
  assert run.wait() == [2, 2], run.text()
  for i in range(2):
    assert "the hosts differ, nothing was trained" in run.text(i)
    message = "config.optimizer.learning_rate is 0.002 on host 1, 0.001 on host 0"
    assert message in run.text(i)
    assert "config.seed is 3 on host 1, 0 on host 0" in run.text(i)
  assert not metrics.read(run.workdir)


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


def test_a_stale_address_is_told():
  """In a process of its own: JAX may be joined once only."""
  code = (
    f"from clip_jax import hosts\nhosts.start('127.0.0.1:{_free_port()}', 2, 1, timeout_seconds=3)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT, check=False
  )
  assert done.returncode != 0
  assert "did not reach all others at 127.0.0.1:" in done.stderr, done.stderr


def test_alone_nothing_is_asked():
  hosts.start(processes=1)
  hosts.agree({"a": 1})
  hosts.wait_for_all("nothing")
  rows = np.ones((2, 3))
  assert hosts.sum_over_hosts(rows) is rows
  with hosts.watched():
    assert jax.process_count() == 1
