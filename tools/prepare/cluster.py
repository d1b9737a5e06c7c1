"""The same tasks on a Ray cluster, for what is too much for one machine.

All machines must see the source and the destination under the same paths (a shared file system);
what Ray carries are the tasks alone. The extra [cluster] brings it; nothing else here wants it.
"""

import contextlib
import os
import pathlib
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tools.prepare.jobs import PrepareError
from tools.prepare.parallel import Engine, Task

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_AHEAD = 2  # tasks handed over, for each core of the cluster
_MOST_LETTERS = 30  # of the folder below which a socket's path of 107 must find room
_RETRIES = 2  # of a task whose machine or process dies


@contextlib.contextmanager
def engine(address: str, workers: int) -> Iterator[Engine]:
  """An engine. `address` is a cluster's, "auto", or "local" for one that is started here, with so
  many workers, and ended with all that it has written of its own.

  Nothing is reported to Ray's makers; Ray asks the machine at its clouds' own addresses which cloud
  it is in. The cluster that is started has no dashboard, and a secret
  of its own: Ray listens to the whole network, and obeys whoever may talk to it. (Of another
  cluster its own settings count.) SIGKILL of this process leaves two of Ray's own processes for
  a minute or so, and its temporary folder. Raises: PrepareError when Ray or the cluster is not
  there.
  """
  os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported, as the next one
  os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # or it warns of what will be
  if address == "local" and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
    os.environ["RAY_AUTH_MODE"] = "token"  # else Ray keeps a secret for all in ~/.ray
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
  terminate = signal.getsignal(signal.SIGTERM)
  try:
    import ray
  except ImportError as error:
    raise PrepareError(f"--ray {address}: {error}; pip install -e '.[cluster]'") from error
  own = ""
  if address == "local":
    short = len(tempfile.gettempdir()) <= _MOST_LETTERS
    own = tempfile.mkdtemp(prefix="ray-", dir=None if short else "/tmp")
  try:
    _start(ray, address, workers, own)
    signal.signal(signal.SIGTERM, terminate)  # Ray has put its own in its place
    yield lambda tasks, report, warn: _run(ray, tasks, report)
  except ray.exceptions.RaySystemError as error:
    raise PrepareError(f"--ray {address}: the cluster has gone ({_line(error)})") from error
  finally:
    ray.shutdown()
    signal.signal(signal.SIGTERM, terminate)
    if own:
      shutil.rmtree(own, ignore_errors=True)


def _start(ray: Any, address: str, workers: int, folder: str) -> None:
  """Raises: PrepareError."""
  # for its processes to find this module, and what this process finds
  paths = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
  asked: dict[str, Any] = {
    "runtime_env": {"env_vars": {"PYTHONPATH": paths}},
    "log_to_driver": False,
    "logging_level": "ERROR",
  }
  if folder:
    asked |= {"num_cpus": workers, "include_dashboard": False, "_temp_dir": folder}
  try:
    ray.init(address=address, **asked)
  except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
    raise PrepareError(f"--ray {address}: no cluster there ({_line(error)})") from error


def _run(ray: Any, tasks: Sequence[Task], report: Callable[[int], None]) -> None:
  """Raises: PrepareError when a task's processes died; what a task raises."""
  remote = ray.remote(max_retries=_RETRIES)(_do)
  most = _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
  waiting: list[Task] = list(reversed(tasks))
  running: dict[Any, Task] = {}
  try:
    while waiting or running:
      while waiting and len(running) < most:
        task = waiting.pop()
        running[remote.remote(task)] = task
      for reference in ray.wait(list(running))[0]:
        task = running.pop(reference)
        report(_seen(ray, reference, task))
  finally:
    for reference in running:
      ray.cancel(reference, force=True)


def _seen(ray: Any, reference: Any, task: Task) -> int:
  try:
    return int(ray.get(reference))
  except ray.exceptions.RayTaskError as error:
    raise error.cause from error
  except ray.exceptions.RayError as error:
    raise PrepareError(
      f"{task.name}: {type(error).__name__}: {_line(error)}; the same command goes on from here"
    ) from error


def _line(error: Exception) -> str:
  """The first line of what Ray says, which may be a page."""
  return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _do(task: Task) -> int:
  """In a process of the cluster. Returns how many inputs the task has seen."""
  seen = 0

  def report(count: int) -> None:
    nonlocal seen
    seen += count

  task(report)
  return seen
