"""No test reaches another machine: what tries to is stopped, and noted.

By the interpreter's own audit events, which no library's import order gets around, in the tests and
in those of their child processes that are Python and read PYTHONPATH (`sitecustomize` beside this).
Not seen: sockets opened in C++ (gRPC, gloo, Arrow's clients of stores) and other programs.
"""

import atexit
import ipaddress
import os
import pathlib
import socket
import sys
import tempfile

NOTES = (
  "CLIP_JAX_TESTS_NETWORK_NOTES"  # the file of the attempts, of a test process and its children
)
_started: list[bool] = []


def start() -> None:
  """From here on, for the life of the process."""
  if not _started:
    _started.append(True)
    sys.addaudithook(_hook)


def start_with_children() -> None:
  """The same, for those that this process starts too; all note their attempts in one file."""
  own = str(pathlib.Path(__file__).parent)
  others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path != own]
  os.environ["PYTHONPATH"] = os.pathsep.join([own, *filter(None, others)])
  notes = tempfile.NamedTemporaryFile(prefix="network-")  # noqa: SIM115
  atexit.register(notes.close)
  os.environ[NOTES] = notes.name
  start()


def attempts() -> list[str]:
  """What tried since the last call: a line each."""
  with open(os.environ[NOTES], "r+", encoding="utf-8") as file:
    found = file.read().splitlines()
    if found:
      file.truncate(0)
  return found


def check() -> None:
  """Raises: AssertionError when something tried since the last call."""
  tried = attempts()
  assert not tried, f"another machine was reached for: {tried}"


def _hook(event: str, arguments: tuple) -> None:
  if not event.startswith("socket."):
    return
  if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
    place = arguments[1]  # a path where it is a socket of the file system
    allowed = not isinstance(place, tuple) or _is_here(place[0])
  elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
    place = arguments[0]
    allowed = _is_number(place) or _is_here(place)
  elif event == "socket.gethostbyaddr":
    place = arguments[0]
    allowed = _is_here(place)
  else:
    return
  if not allowed:
    with open(os.environ[NOTES], "a", encoding="utf-8") as file:
      file.write(f"{event} {place!r} in process {os.getpid()}: {sys.argv[:3]}\n")
    raise PermissionError(f"sealed: a test reaches for another machine: {event} {place!r}")


def _is_number(host: object) -> bool:
  """Whether nobody is asked what it stands for."""
  try:
    ipaddress.ip_address(host.decode() if isinstance(host, bytes) else str(host))
  except ValueError:
    return False
  return True


def _is_here(host: object) -> bool:
  """Whether it is this machine: a name or an address of it, or nothing of the kind."""
  if isinstance(host, bytes):
    host = host.decode()
  if not isinstance(host, str) or host in ("", "localhost", socket.gethostname()):
    return True
  if not _is_number(host):
    return False
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  with socket.socket(family, socket.SOCK_DGRAM) as probe:
    try:
      probe.bind((host, 0))
    except OSError:
      return False
  return not ipaddress.ip_address(host).is_multicast
