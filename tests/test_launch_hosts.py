"""What runs on the hosts of a TPU slice, run here."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from stand_ins import SAVES

from tools import launch_tpu


def test_the_hosts_scripts_are_shell():
  for text in (launch_tpu._SETUP, launch_tpu._START, launch_tpu._FOLLOW, launch_tpu._STATE):
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


class Host:
  """A home folder for the hosts' very commands, with stand-ins for the bucket's programs."""

  def __init__(self, folder):
    self.folder = folder
    (folder / "clip_jax").mkdir()
    self.program("mountpoint", "exit 0")
    self.environment = {
      **os.environ,
      "HOME": str(folder),
      "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }

  def program(self, name, text):
    path = self.folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)

  def ssh(self, command):
    done = subprocess.run(
      ["bash", "-c", command], env=self.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  def start(self, *words):
    text = launch_tpu._START.replace("TRAIN", shlex.join([sys.executable, "-S", "-c", *words]))
    self.ssh(text.replace("BUCKET", "mine"))

  def wait(self, name, text=""):
    """Until the file is there and has the text."""
    path, deadline = self.folder / name, time.monotonic() + 30
    while not (path.exists() and path.read_text() and text in path.read_text()):
      assert time.monotonic() < deadline, f"{name}: {path.exists() and path.read_text()}"
      time.sleep(0.01)
    return path.read_text()


@pytest.fixture
def host(tmp_path):
  return Host(tmp_path)


def test_the_start_runs_what_it_is_told_and_keeps_the_exit_code(host):
  """Quotes survive, and the log is shown to its end, during training and after it."""
  host.start("import sys; print(sys.argv[1:]); sys.exit(7)", "a[0]=it's")
  assert '["a[0]=it\'s"]' in host.ssh(launch_tpu._FOLLOW)
  assert host.wait("run.exit") == "7\n"
  assert host.ssh(launch_tpu._STATE) == "7\n"
  assert '["a[0]=it\'s"]' in host.ssh(launch_tpu._FOLLOW)


def test_a_host_that_is_stopped_saves_and_keeps_the_exit_code(host):
  """A machine that goes down sends SIGTERM to all processes, also to the shells around training."""
  host.start(SAVES)
  host.wait("run.log", "step 1")
  pid = int(host.wait("run.pid"))
  assert host.ssh(launch_tpu._STATE) == "running\n"
  host.start("a second start does nothing")
  assert int(host.wait("run.pid")) == pid
  os.killpg(pid, signal.SIGTERM)
  assert host.wait("run.exit") == "75\n"


def test_a_host_that_was_started_anew_is_unfinished_and_gets_its_bucket_again(host):
  """Its process number belongs to another program now."""
  (host.folder / "run.pid").write_text(str(os.getpid()))
  assert host.ssh(launch_tpu._STATE) == "75\n"
  host.program("mountpoint", "exit 1")
  host.program("gcsfuse", 'echo "$@" > ~/mounted')
  host.start("pass")
  assert host.wait("mounted").split()[-2:] == ["mine", str(host.folder / "bucket")]
  assert host.wait("run.exit") == "0\n"
