"""The address on which the coordinator, process 0, waits for the others.

JAX's coordinator listens on all addresses of its host unless it is told one, and believes whoever
reaches it.
"""

import ipaddress
import os
import socket
import sys


def bind_address(coordinator: str | None, process: int | None) -> str | None:
  """ADDRESS:PORT for process 0 to listen on: that by which the others call it.

  Args: coordinator, HOST:PORT of process 0; process, which of them this is.
  Returns: None where JAX decides: not process 0; JAX_COORDINATOR_BIND_ADDRESS is set; JAX finds the
    coordinator itself; or HOST is no address of this machine (a translated one, a name that is not
    yet known), which a line on standard error tells, as JAX then listens on all addresses.
  """
  if coordinator is None or process != 0 or "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
    return None
  host, _, port = coordinator.rpartition(":")
  host = host.removeprefix("[").removesuffix("]")
  for address in _addresses(host):
    if _is_here(address) and not _only_inside(host, address):
      return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
  print(
    f"note: {host} is no address of this machine, so the coordinator listens on all that it has; "
    "JAX_COORDINATOR_BIND_ADDRESS=ADDRESS:PORT names one",
    file=sys.stderr,
  )
  return None


def _addresses(host: str) -> list[str]:
  try:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
  except OSError:
    return []
  return [str(place[0]) for *_, place in found]


def _is_here(address: str) -> bool:
  """Whether this machine has the address."""
  family = socket.AF_INET6 if ":" in address else socket.AF_INET
  with socket.socket(family, socket.SOCK_STREAM) as probe:
    try:
      probe.bind((address, 0))
    except OSError:
      return False
  return True


def _only_inside(host: str, address: str) -> bool:
  """Whether a name that others use stands for the loopback here, as in Debian's /etc/hosts."""
  return ipaddress.ip_address(address).is_loopback and host not in (address, "localhost")
