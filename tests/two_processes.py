"""A script in two processes that are one run, on the loopback."""

import os
import pathlib
import socket
import subprocess
import sys
import textwrap

TESTS = pathlib.Path(__file__).parent


def run(script, *words, devices=1, folder=None, last=()):
  """[(exit code, what it said)] of `script HOST PORT words...`; `last` go to the second alone."""
  flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
  paths = os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS / "sealed")])
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": paths}
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
  command = [sys.executable, "-c", textwrap.dedent(script)]
  processes = [
    subprocess.Popen(
      [*command, str(host), port, *map(str, words), *(last if host else ())],
      env=environment,
      cwd=folder,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for host in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=170)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
      process.wait()
  return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]
