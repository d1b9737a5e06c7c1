"""Hosts that wait for data stop at one step or go on, all of them alike."""

import random

import jax
import pytest

from clip_jax import common_stop, stopping


class Store:
  """The coordinator's, in memory: a key is written once."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value):
    if key in self.values:
      raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
    self.values[key] = value

  def key_value_dir_get(self, folder):
    return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

  def blocking_key_value_get(self, key, _):
    return self.values[key]


class Stream:
  """A wait for data, in which the question comes `asked` times before the batch does."""

  def __init__(self, asked):
    self.asked = asked

  def take(self, stopped):
    return None if any(stopped() for _ in range(self.asked)) else "batch"


@pytest.fixture
def make(monkeypatch):
  def make(count):
    store, out = Store(), []
    for host in range(count):
      monkeypatch.setattr(jax, "process_count", lambda: count)
      monkeypatch.setattr(jax, "process_index", lambda host=host: host)
      out.append(common_stop.CommonStop(stopping.Request(), store))
    return out

  return make


def _asked(host):
  host._request.signal_name = "SIGTERM"


def test_alone_it_stops_in_the_wait_and_before_it(make):
  (host,) = make(1)
  assert host.batch(Stream(3), 5) == "batch"
  _asked(host)
  assert host.batch(Stream(0), 5) is None
  host._request.signal_name = ""
  stream = Stream(3)
  stream.take = lambda stopped: _asked(host) or (None if stopped() else "batch")
  assert host.batch(stream, 5) is None


def test_hosts_that_all_wait_stop(make):
  first, second = make(2)
  _asked(second)
  assert not first._waits(5)  # it knows of nothing yet
  assert not second._waits(5)
  assert not first._waits(5)
  assert second._waits(5)
  assert first._waits(5)


def test_a_host_that_has_begun_the_step_is_not_left_alone(make):
  first, second = make(2)
  _asked(first)
  assert second.batch(Stream(0), 5) == "batch"
  assert first.batch(Stream(9), 5) == "batch"
  assert first._store.values["clip_jax/after/5"] == "go"


def test_without_a_request_nothing_is_written(make):
  hosts = make(2)
  for host in hosts:
    assert host.batch(Stream(4), 5) == "batch"
  assert hosts[0]._store.values == {}


def test_in_any_order_all_begin_a_step_or_none(make):
  """2000 random orders of looks and arrivals at one step, of 3 hosts of which some are asked."""
  rng, ends = random.Random(0), set()
  for _ in range(2000):
    hosts = make(3)
    ended = {}
    while len(ended) < 3:
      host = rng.choice([i for i in range(3) if i not in ended])
      if rng.random() < 0.3:
        _asked(hosts[host])
      if rng.random() < 0.7:
        if hosts[host]._waits(5):
          ended[host] = "stop"
      else:
        ended[host] = "go" if hosts[host]._goes_on(5) else "stop"
    assert len(set(ended.values())) == 1, ended
    ends |= set(ended.values())
  assert ends == {"go", "stop"}
