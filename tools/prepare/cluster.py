"""The same tasks on a Ray cluster, for what is too much for one machine.

All machines must see the source and the destination under the same paths (a shared file system);
what Ray carries are the tasks alone. The extra [cluster] brings it; nothing else here wants it.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from tools.prepare.jobs import PrepareError
from tools.prepare.parallel import Task

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_AHEAD = 2  # tasks handed over, for each core of the cluster
_RETRIES = 2  # of a task whose machine or process dies


class Ray:
  """An engine. `address` is a cluster's, "auto", or "local" for one that this process starts."""

  def __init__(self, address: str):
    self._address = address

  def __call__(
    self, tasks: Sequence[Task], report: Callable[[int], None], warn: Callable[[str], None]
  ) -> None:
    """Raises: PrepareError when Ray is not there or a task's processes died; what a task raises."""
    del warn  # Ray says itself what it does again
    if not tasks:
      return
    try:
      import ray
    except ImportError as error:
      raise PrepareError(f"--ray {self._address}: {error}; pip install -e '.[cluster]'") from error
    try:
      if not ray.is_initialized():
        # for its processes to find this module, and what this process finds
        paths = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        own = {"env_vars": {"PYTHONPATH": paths}}
        ray.init(address=self._address, runtime_env=own, log_to_driver=False)
      _run(ray, tasks, report)
    except (ConnectionError, ray.exceptions.RaySystemError) as error:
      raise PrepareError(f"--ray {self._address}: no cluster there ({error})") from error


def _run(ray: Any, tasks: Sequence[Task], report: Callable[[int], None]) -> None:
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
      f"{task.name}: {type(error).__name__}: {error}; the same command goes on from here"
    ) from error


def _do(task: Task) -> int:
  """In a process of the cluster. Returns how many inputs the task has seen."""
  seen = 0

  def report(count: int) -> None:
    nonlocal seen
    seen += count

  task(report)
  return seen
