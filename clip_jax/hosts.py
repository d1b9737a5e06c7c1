"""Several processes as one run: start-up, agreement before the first step, and the death of one.

Each process trains with the devices of its host. A process that dies leaves the others waiting in a
collective; a thread in each of them watches the signs of life of all, and ends its process with a
line that names the dead.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

DIED = 75  # exit code of a process that stops because another one did
_ADVICE = "The same command on all hosts goes on from the newest checkpoint"


class HostsError(RuntimeError):
  """Processes that cannot start together, or that would not compute the same."""


def start(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  timeout_seconds: int = 300,
  heartbeat_seconds: int = 30,
) -> None:
  """Joins the run's processes; must come before any other use of JAX.

  With no arguments the environment decides: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID (as a JobSet's manifest sets them), or what JAX itself finds: a Cloud TPU's
  metadata, GKE's, Slurm's, Open MPI's. Where there is none of it, this process is alone.
  Args: coordinator, HOST:PORT of process 0, the same everywhere; processes, how many; process,
    which of them this is.
  Raises: HostsError.
  """
  environment = os.environ
  coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
  processes = _number(processes, "JAX_NUM_PROCESSES")
  process = _number(process, "JAX_PROCESS_ID")
  given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
  missing = [name for name, value in given.items() if value is None]
  if processes == 1 and coordinator is None:
    return
  if missing and len(missing) < 3:
    raise HostsError(f"{' and '.join(missing)}: missing; the three go together (or none of them)")
  if coordinator is not None:
    _check(coordinator, int(processes or 0), int(process or 0))
  where = coordinator or "the address that JAX found"
  unreached = (
    f"process {process} of {processes} did not reach all others at {where} in {timeout_seconds} s: "
    "is that the address of process 0 in this run, does its port pass the firewall, were all "
    "processes started?"
  )
  herald = Herald(unreached, after_seconds=timeout_seconds) if coordinator else None
  try:
    jax.distributed.initialize(
      coordinator,
      processes,
      process,
      initialization_timeout=timeout_seconds,
      # later than this module's own watch, which can say who it was
      heartbeat_timeout_seconds=heartbeat_seconds + 30,
    )
  except ValueError as error:
    if coordinator is None and "coordinator_address" in str(error):
      return  # no cluster: alone
    raise HostsError(f"processes cannot start together: {error}") from error
  except RuntimeError as error:
    raise HostsError(f"{unreached} ({' '.join(str(error).split())[:200]})") from error
  finally:
    if herald:
      herald.dismiss()
  # Of CPUs only: two programs under way at once can wait for each other's collectives forever.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_cpu_enable_async_dispatch", False)


class Herald:
  """A process that says why this one ended, where JAX aborts it without a chance of a last word.

  It speaks when this process ends without `dismiss`, not before `after_seconds`, and with an
  `address` (HOST:PORT) only if nothing answers there.
  """

  _PROGRAM = """
import socket, sys, time
line, address, seconds = sys.argv[1:]
start = time.monotonic()
if not sys.stdin.read() and time.monotonic() - start > float(seconds):
  host, _, port = address.rpartition(":")
  try:
    if address:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      sys.exit()
  except OSError:
    pass
  sys.stderr.write("error: " + line + chr(10))
"""

  def __init__(self, line: str, address: str = "", after_seconds: float = 0.0):
    command = [sys.executable, "-c", self._PROGRAM, line, address, str(0.9 * after_seconds)]
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE)

  def dismiss(self) -> None:
    """It has nothing to say."""
    with contextlib.suppress(OSError, ValueError):
      self._process.communicate(b"over")


def _number(value: int | None, name: str) -> int | None:
  if value is not None or name not in os.environ:
    return value
  try:
    return int(os.environ[name])
  except ValueError:
    raise HostsError(f"{name}: {os.environ[name]!r} is no number") from None


def _check(coordinator: str, processes: int, process: int) -> None:
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise HostsError(f"--coordinator {coordinator}: want HOST:PORT, as 10.0.0.2:8476")
  if not 0 <= process < processes:
    raise HostsError(f"--process {process}: {processes} processes are 0 to {processes - 1}")
  if process:
    return
  with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(("", int(port)))
    except OSError as error:
      raise HostsError(
        f"--coordinator {coordinator}: port {port} is in use here (another run?); choose another"
      ) from error


def agree(facts: Mapping[str, Any]) -> None:
  """Compares `facts` (JSON values by name) over all processes.

  Raises: HostsError, on every process alike, naming each difference and who differs.
  """
  if jax.process_count() == 1:
    return
  everyone = [json.loads(text) for text in _gather(json.dumps(dict(facts)))]
  problems = []
  for name in sorted({name for one in everyone for name in one}):
    values = [json.dumps(one.get(name, "missing")) for one in everyone]
    others = [i for i, value in enumerate(values) if value != values[0]]
    if others:
      hosts = ", ".join(map(str, others))
      problems.append(
        f"{name} is {_short(values[others[0]])} on host {hosts}, {_short(values[0])} on host 0"
      )
  if problems:
    raise HostsError(f"the hosts differ, nothing was trained: {'; '.join(problems[:10])}")


def _short(text: str) -> str:
  return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _gather(text: str) -> list[str]:
  """The text of every process, in their order."""
  from jax.experimental import multihost_utils

  raw = np.frombuffer(text.encode(), np.uint8)
  sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(raw)))).reshape(-1)
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: len(raw)] = raw
  rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
  return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def wait_for_all(what: str) -> None:
  """Returns once every process has come here."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(what)


def sum_over_hosts(rows: np.ndarray) -> np.ndarray:
  """The sum of an array over all processes, on each of them."""
  if jax.process_count() == 1:
    return rows
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(rows)).reshape(-1, *rows.shape).sum(0)


class Watch:
  """Signs of life of all processes, in the coordination service's store.

  A process writes its name once and a growing number every few seconds; on an error of its own, the
  error. One whose number stands still for `heartbeat_seconds`, or that left an error, ends all
  others: exit code `DIED`, one line on standard error.
  """

  def __init__(self, heartbeat_seconds: float = 30.0):
    from jax._src import distributed  # JAX offers no public way to its store

    self._client: Any = distributed.global_state.client
    self._me, self._count = jax.process_index(), jax.process_count()
    self._limit, self._pause = heartbeat_seconds, heartbeat_seconds / 6
    self._over = threading.Event()
    self._names: dict[int, str] = {}
    self._seen: dict[int, tuple[str, float]] = {}
    self._set("name", f"{socket.gethostname()}, pid {os.getpid()}")
    self._herald: Herald | None = None
    if self._me:
      address = distributed.global_state.coordinator_address
      line = f"host 0 (the coordinator, {address}) died; host {self._me} stops too. {_ADVICE}"
      self._herald = Herald(line, str(address))
    self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
    self._thread.start()

  def _set(self, kind: str, value: str) -> None:
    self._client.key_value_set(f"clip_jax/{kind}/{self._me}", value, allow_overwrite=True)

  def _all(self, kind: str) -> dict[int, str]:
    found = self._client.key_value_dir_get(f"clip_jax/{kind}/")
    return {int(key.rsplit("/", 1)[1]): value for key, value in found}

  def _run(self) -> None:
    beats, reached = 0, time.monotonic()
    while not self._over.wait(self._pause):
      beats += 1
      try:
        self._set("beat", str(beats))
        numbers, failures, self._names = self._all("beat"), self._all("failed"), self._all("name")
        finished = self._all("finished")
        reached = time.monotonic()
      except Exception:
        if time.monotonic() - reached > self._limit:
          self._end(0, f"(the coordinator) has not answered for {self._limit:.0f} s: it died")
        continue
      for host, why in failures.items():
        if host != self._me:
          self._end(host, f"failed: {why}")
      for host in set(range(self._count)) - {self._me} - finished.keys():
        number, now = numbers.get(host, "none yet"), time.monotonic()
        if self._seen.get(host, ("", 0.0))[0] != number:
          self._seen[host] = (number, now)
        elif now - self._seen[host][1] > self._limit:
          self._end(host, f"has shown no sign of life for {self._limit:.0f} s: it died")

  def _end(self, host: int, what: str) -> None:
    if self._over.is_set():
      return
    name = self._names.get(host, "name unknown")
    line = f"error: host {host} ({name}) {what}; host {self._me} stops too. {_ADVICE}\n"
    self._dismiss()
    os.write(2, line.encode())
    os._exit(DIED)

  def _dismiss(self) -> None:
    """The herald has nothing to say."""
    if self._herald is not None:
      self._herald.dismiss()

  def fail(self, why: str) -> None:
    """Tells the others that this process ends by an error of its own; theirs no longer matter."""
    self._over.set()
    self._dismiss()
    with contextlib.suppress(Exception):
      self._set("failed", why)
      if self._me == 0:
        time.sleep(3 * self._pause)  # the coordinator must outlive the others' next look

  def lost(self) -> None:
    """After a collective broke: waits until the watch has named who left, and ends this process."""
    self._over.wait(self._limit + 2 * self._pause)

  def close(self) -> None:
    """This process has finished its work, and so may others."""
    with contextlib.suppress(Exception):
      self._set("finished", "yes")
    self._over.set()
    self._thread.join()
    self._dismiss()


@contextlib.contextmanager
def watched(heartbeat_seconds: float = 30.0) -> Iterator[None]:
  """While inside, a process that dies ends all: see `Watch`. Alone, nothing."""
  if jax.process_count() == 1:
    yield
    return
  watch = Watch(heartbeat_seconds)
  try:
    yield
  except BaseException as error:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, jax.errors.JaxRuntimeError):  # what a broken connection looks like
      watch.lost()
    watch.fail(text[:500])
    raise
  watch.close()
