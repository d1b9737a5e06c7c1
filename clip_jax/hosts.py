"""Several processes as one run: start-up, what they tell each other, and the death of one.

Each process trains with the devices of its host. A process that dies leaves the others waiting in a
collective; a thread in each of them watches the signs of life of all, and ends its process with a
line that names the dead.
"""

import contextlib
import ctypes
import math
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # JAX offers no public way to the coordinator's store

from clip_jax import chips, listening
from clip_jax.stopping import UNFINISHED

_ERROR = 2
_ADVICE = "The same command on all hosts goes on from the newest checkpoint"


class HostsError(RuntimeError):
  """Processes that cannot start together, or that would not compute the same."""


def start(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  timeout_seconds: int = 300,
  heartbeat_seconds: float = 30.0,
) -> None:
  """Joins the run's processes; must come before any other use of JAX.

  With no arguments the environment decides: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID (as a JobSet's manifest sets them), or what JAX itself finds: a Cloud TPU's
  metadata, GKE's, Slurm's, Open MPI's. Where there is none of it, this process is alone.
  Args: coordinator, HOST:PORT of process 0, the same everywhere; processes, how many; process,
    which of them this is; heartbeat_seconds, as for `watched`.
  Raises: HostsError. Where JAX itself ends the process, the same line and exit code 2.
  """
  if not 1 <= heartbeat_seconds <= 86400:
    raise HostsError(f"--heartbeat {heartbeat_seconds:g}: want seconds, from 1 to 86400")
  if count := chips.undriven():
    raise HostsError(
      f"{count} TPU chips are here, and libtpu, which drives them, is not installed: make "
      "install-tpu (or set JAX_PLATFORMS=cpu to do without them)"
    )
  coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
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
  who = "this process" if process is None else f"process {process} of {processes}"
  where, began = coordinator or "the address that JAX found", time.monotonic()

  def unreached() -> str:
    return (
      f"{who} did not reach all others at {where} in {time.monotonic() - began:.0f} s: is that the "
      "address of process 0 in this run, does its port pass the firewall, were all processes "
      "started?"
    )

  try:
    with _last_word(lambda: _end(unreached(), _ERROR)):
      jax.distributed.initialize(
        coordinator,
        processes,
        process,
        initialization_timeout=max(1, timeout_seconds - 5),  # to which JAX adds 5
        coordinator_bind_address=listening.bind_address(coordinator, process),
        # later than this module's own watch, which can say who it was
        heartbeat_timeout_seconds=2 * math.ceil(heartbeat_seconds) + 30,
      )
  except ValueError as error:
    if coordinator is None and "coordinator_address" in str(error):
      return  # no cluster: alone
    raise HostsError(f"processes cannot start together: {error}") from error
  except RuntimeError as error:
    raise HostsError(f"{unreached()} ({' '.join(str(error).split())[:200]})") from error
  _check_size(where, timeout_seconds)
  # Of CPUs only: two programs under way at once can wait for each other's collectives forever.
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_cpu_enable_async_dispatch", False)


@contextlib.contextmanager
def _last_word(speak: Callable[[], None]) -> Iterator[None]:
  """Inside, `speak` runs where a library aborts this process; if it returns, the abort goes on.

  JAX aborts, in a thread of its own, where it does not reach the coordinator. The callback that it
  has for this cannot be written in Python (it ends in std::bad_cast).
  """
  libc = ctypes.CDLL(None)
  libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: speak())
  before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
  try:
    yield
  finally:
    libc.signal(signal.SIGABRT, before)


def _end(line: str, code: int) -> None:
  os.write(2, f"error: {line}\n".encode())
  os._exit(code)


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


def _check_size(where: str, timeout_seconds: int) -> None:
  """Raises: HostsError when process 0, as it was reached, is of another run."""
  state, store, key = distributed.global_state, _store(), "clip_jax/processes"
  count = str(state.num_processes)
  if state.process_id == 0:
    store.key_value_set(key, count)
  try:
    theirs = store.blocking_key_value_get(key, 1000 * timeout_seconds)
  except RuntimeError:
    theirs = "an unknown number of"
  if theirs != count:
    raise HostsError(
      f"process {state.process_id} of {count}: at {where} is the coordinator of another run, of "
      f"{theirs} processes; is that the address of process 0 in this run?"
    )


def gather(topic: str, text: str) -> list[str]:
  """The text of every process, in their order, by the coordinator's store: uses no device.

  Args: topic, another one for each call.
  """
  state, store = distributed.global_state, _store()
  store.key_value_set(f"clip_jax/{topic}/{state.process_id}", text)
  day = 86_400_000  # milliseconds: the watch ends the wait for a process that died
  everyone = range(state.num_processes)
  return [store.blocking_key_value_get(f"clip_jax/{topic}/{i}", day) for i in everyone]


def _store() -> Any:
  """The coordinator's keys and values, which every process reads and writes."""
  return distributed.global_state.client


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


def from_first(data: bytes) -> bytes:
  """What process 0 gives, on each of them; what the others give is not looked at."""
  return _from(0, data)


def first_said(text: str) -> str:
  """Of what the processes say the first that is not empty, on each of them; "" where none is."""
  data = text.encode(errors="backslashreplace")
  mine_P = len(data) * np.eye(jax.process_count(), dtype=np.int32)[jax.process_index()]
  said_P = sum_over_hosts(mine_P) > 0
  return _from(int(np.argmax(said_P)), data).decode() if said_P.any() else ""


def _from(process: int, data: bytes) -> bytes:
  mine = data if jax.process_index() == process else b""
  size = int(sum_over_hosts(np.array([len(mine)], np.int32))[0])
  if size == 0:
    return b""
  padded = np.frombuffer(mine.ljust(size, b"\0"), np.uint8)
  return sum_over_hosts(padded).astype(np.uint8).tobytes()


class Watch:
  """Signs of life of all processes, in the coordinator's store.

  A process writes its name once and a growing number every few seconds; on an error of its own, the
  error. One whose number stands still for `heartbeat_seconds` ends all others with the exit code
  `UNFINISHED`, one that left an error with 2, and one line on standard error. All have ended before
  twice `heartbeat_seconds`; where the coordinator hangs, 30 seconds later.
  """

  def __init__(self, heartbeat_seconds: float = 30.0):
    state = distributed.global_state
    self._store = _store()
    self._me, self._count = state.process_id, state.num_processes
    self._coordinator = str(state.coordinator_address)
    self._limit, self._pause = heartbeat_seconds, heartbeat_seconds / 6
    self._over = threading.Event()
    self._reached = time.monotonic()  # when the store last answered
    self._names: dict[int, str] = {}
    self._seen: dict[int, tuple[str, float]] = {}
    self._set("name", f"{socket.gethostname()}, pid {os.getpid()}")
    self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
    self._thread.start()

  def _set(self, kind: str, value: str) -> None:
    self._store.key_value_set(f"clip_jax/{kind}/{self._me}", value, allow_overwrite=True)

  def _all(self, kind: str) -> dict[int, str]:
    found = self._store.key_value_dir_get(f"clip_jax/{kind}/")
    return {int(key.rsplit("/", 1)[1]): value for key, value in found}

  def _run(self) -> None:
    beats = 0
    while not self._over.wait(self._pause):
      beats += 1
      try:
        self._set("beat", str(beats))
        numbers, failures, self._names = self._all("beat"), self._all("failed"), self._all("name")
        finished = self._all("finished")
        self._reached = time.monotonic()
      except Exception:
        if self._silent():
          self._stop(0, f"has not answered for {self._limit:g} s: it died", UNFINISHED)
        continue
      for host, why in failures.items():
        if host != self._me:
          self._stop(host, f"failed: {why}", _ERROR)
      for host in set(range(self._count)) - {self._me} - finished.keys():
        number, now = numbers.get(host, "none yet"), time.monotonic()
        if self._seen.get(host, ("", 0.0))[0] != number:
          self._seen[host] = (number, now)
        elif now - self._seen[host][1] > self._limit:
          what = f"has shown no sign of life for {self._limit:g} s: it died"
          self._stop(host, what, UNFINISHED)

  def _silent(self) -> bool:
    return time.monotonic() - self._reached > self._limit

  def aborted(self) -> None:
    """JAX aborts this process: ends it with a line if that is because the coordinator is gone."""
    if self._me and (self._silent() or not _answers(self._coordinator)):
      self._stop(0, "does not answer: it died", UNFINISHED)

  def _stop(self, host: int, what: str, code: int) -> None:
    if self._over.is_set():
      return
    if self._me == 0:
      time.sleep(3 * self._pause)  # the coordinator must outlive the others' next look
    name = self._names.get(host, "name unknown") + (", the coordinator" if host == 0 else "")
    _end(f"host {host} ({name}) {what}; host {self._me} stops too. {_ADVICE}", code)

  def fail(self, why: str) -> None:
    """Tells the others that this process ends by an error of its own; theirs no longer matter."""
    self._over.set()
    with contextlib.suppress(Exception):
      self._set("failed", why)
      if self._me == 0:
        time.sleep(3 * self._pause)  # as in _stop

  def lost(self) -> None:
    """After a collective broke: waits until the watch has named who left, and ends this process."""
    self._over.wait(2 * self._limit)

  def close(self) -> None:
    """This process has finished its work. Returns when all have, so that they leave together."""
    self._set("finished", "yes")
    jax.distributed.shutdown()
    self._over.set()
    self._thread.join()


def _answers(address: str) -> bool:
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
  except OSError:
    return False
  return True


def _of_the_runtime(error: BaseException) -> bool:
  """Whether JAX's runtime raised it, or what it was raised from: known by its status code."""
  causes: list[BaseException | None] = [error]
  while (last := causes[-1]) is not None and len(causes) < 20:
    causes.append(last.__cause__ or last.__context__)
  codes = r"(CANCELLED|UNKNOWN|DEADLINE_EXCEEDED|ABORTED|INTERNAL|UNAVAILABLE): "
  return any(
    isinstance(cause, jax.errors.JaxRuntimeError) or re.match(codes, str(cause)) for cause in causes
  )


@contextlib.contextmanager
def watched(heartbeat_seconds: float = 30.0) -> Iterator[None]:
  """While inside, a process that dies ends all: see `Watch`. Alone, nothing."""
  if distributed.global_state.num_processes == 1:
    yield
    return
  watch = Watch(heartbeat_seconds)
  with _last_word(watch.aborted):
    try:
      yield
    except BaseException as error:
      text = " ".join(str(error).split()) or type(error).__name__
      if _of_the_runtime(error):  # what the death of another looks like
        watch.lost()
      watch.fail(text[:500])
      raise
    watch.close()
