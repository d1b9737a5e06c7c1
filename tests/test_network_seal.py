"""conftest.py's seal: other machines are out of reach of the tests and of their children."""

import asyncio
import multiprocessing
import os
import socket
import subprocess
import sys
import urllib.request

import network_seal
import pytest

NOBODY = "192.0.2.1"  # RFC 5737: of no machine, so that a broken seal does no harm


def _connect():
  with socket.socket() as one:
    one.settimeout(1)
    one.connect((NOBODY, 80))


def _send():
  with socket.socket(type=socket.SOCK_DGRAM) as one:
    one.sendto(b"", (NOBODY, 53))


WAYS_OUT = {
  "connect": _connect,
  "send": _send,
  "look up": lambda: socket.getaddrinfo("name.invalid", 80),
  "look up as of old": lambda: socket.gethostbyname("name.invalid"),
  "look up a number": lambda: socket.gethostbyaddr(NOBODY),
  "fetch": lambda: urllib.request.urlopen(f"http://{NOBODY}/", timeout=1),
  "fetch by name": lambda: urllib.request.urlopen("https://name.invalid/", timeout=1),
  "asyncio": lambda: asyncio.run(asyncio.open_connection(NOBODY, 80)),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_no_way_out(way):
  with pytest.raises(OSError, match="sealed: a test reaches for another machine"):
    WAYS_OUT[way]()
  (noted,) = network_seal.attempts()
  assert f"in process {os.getpid()}" in noted


@pytest.mark.parametrize("start", ["run", "spawn"])
def test_children_are_sealed_too(start):
  """Even if they take the error for a network that is not there."""
  code = "import socket\ntry: socket.create_connection(('192.0.2.1', 80), 1)\nexcept OSError: pass"
  if start == "run":
    subprocess.run([sys.executable, "-c", code], check=True)
  else:
    child = multiprocessing.get_context("spawn").Process(target=exec, args=(code,))
    child.start()
    child.join()
  (noted,) = network_seal.attempts()
  assert "socket.connect ('192.0.2.1', 80)" in noted
  assert f"in process {os.getpid()}:" not in noted


def test_this_machine_is_free(tmp_path):
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
    for host in ("127.0.0.1", "localhost"):
      socket.create_connection((host, port), timeout=5).close()
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(str(tmp_path / "socket"))
    server.listen()
    with socket.socket(socket.AF_UNIX) as one:
      one.connect(str(tmp_path / "socket"))
  assert socket.getfqdn("127.0.0.1")
  assert socket.getaddrinfo(NOBODY, 80)  # a number, about which nobody is asked
  assert network_seal.attempts() == []


def test_an_attempt_fails_the_test_that_made_it():
  """What the fixture does after each."""
  network_seal.check()
  with pytest.raises(PermissionError):
    _connect()
  with pytest.raises(AssertionError, match=r"another machine was reached for: .*192\.0\.2\.1"):
    network_seal.check()
  network_seal.check()
