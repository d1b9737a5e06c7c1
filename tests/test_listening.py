"""The coordinator listens on one address, not on all. No process is started here."""

import socket

import jax
import pytest

from clip_jax import hosts, listening


@pytest.fixture(autouse=True)
def names(monkeypatch):
  """What names stand for, as a resolver of one's own: {name: addresses}."""
  monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
  known, numbers = {}, socket.getaddrinfo

  def look_up(host, port, **how):
    found = known.get(host)
    if found == []:
      raise socket.gaierror(-2, "Name or service not known")
    return [place for name in found or [host] for place in numbers(name, port, **how)]

  monkeypatch.setattr(socket, "getaddrinfo", look_up)
  return known


@pytest.mark.parametrize("address", ["127.0.0.1:8476", "127.0.0.2:8476"])
def test_the_address_that_the_others_call(address):
  assert listening.bind_address(address, 0) == address


def test_names_become_addresses(names):
  names["localhost"] = ["127.0.0.1"]
  assert listening.bind_address("localhost:80", 0) == "127.0.0.1:80"
  names["localhost"] = ["192.0.2.1", "127.0.0.3"]  # the first is of nobody: RFC 5737
  assert listening.bind_address("localhost:80", 0) == "127.0.0.3:80"


def test_addresses_of_version_6(monkeypatch):
  monkeypatch.setattr(listening, "_is_here", lambda _: True)
  assert listening.bind_address("[::1]:8476", 0) == "[::1]:8476"
  assert listening.bind_address("[2001:db8::7]:8476", 0) == "[2001:db8::7]:8476"


@pytest.mark.parametrize("found", [["192.0.2.1"], ["127.0.1.1"], []])
def test_what_is_no_address_of_this_machine_is_told(names, found, capsys):
  """A translated address, Debian's own name for itself, a name that nobody knows yet."""
  names["trainer-0"] = found
  assert listening.bind_address("trainer-0:8476", 0) is None
  told = capsys.readouterr().err
  assert told.startswith(
    "note: trainer-0 is no address of this machine, so the coordinator listens"
  )


def test_where_jax_decides(monkeypatch, capsys):
  assert listening.bind_address(None, None) is None
  assert listening.bind_address("127.0.0.1:8476", 1) is None
  monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "127.0.0.9:8476")
  assert listening.bind_address("127.0.0.1:8476", 0) is None
  assert capsys.readouterr().err == ""


def test_a_run_starts_with_it(monkeypatch):
  given = {}

  def initialize(*_, **how):
    given.update(how)
    raise RuntimeError("far enough")

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  with pytest.raises(hosts.HostsError, match="far enough"):
    hosts.start("127.0.0.1:8476", 2, 0)
  assert given["coordinator_bind_address"] == "127.0.0.1:8476"
