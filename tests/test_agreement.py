"""What hosts compare before they train. Here they are threads; in test_hosts.py, processes."""

import dataclasses
import re
import threading

import jax
import pytest

from clip_jax import agreement, hosts
from clip_jax import config as c
from clip_jax.data import scenes
from clip_jax.data import tokenizer as tokenizer_lib

CONFIG = c.Config(data=c.Data(sources=(c.Source("scenes", records=8),)))


@pytest.fixture
def on_hosts(monkeypatch):
  """Runs a function of the host's number on each of several; returns what each raised."""
  me = threading.local()

  def run(count, work):
    together = threading.Barrier(count, timeout=60)
    told, raised = {}, [""] * count

    def gather(topic, text):
      told[topic, me.host] = text
      together.wait()
      return [told[topic, host] for host in range(count)]

    def host(number):
      me.host = number
      try:
        work(number)
      except hosts.HostsError as error:
        raised[number] = str(error)

    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: me.host)
    monkeypatch.setattr(hosts, "gather", gather)
    threads = [threading.Thread(target=host, args=(number,)) for number in range(count)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    return raised

  return run


def _compare(folder, config=CONFIG, seed=0, held_out=()):
  source = scenes.Scenes("train", 8, seed, 32)
  agreement.of_hosts(config, None, [source], held_out, folder)


def test_hosts_that_are_the_same_may_start(on_hosts, tmp_path):
  assert on_hosts(3, lambda _: _compare(tmp_path / "new" / "run")) == ["", "", ""]
  assert not list((tmp_path / "new" / "run").iterdir())


def test_a_workdir_that_is_not_shared(on_hosts, tmp_path):
  told = on_hosts(3, lambda host: _compare(tmp_path / ("b" if host == 1 else "a")))
  expected = (
    f"the hosts differ, nothing was trained: workdir {tmp_path}/b: host 1 does not see what host 0 "
    f"writes in {tmp_path}/a; give all hosts one shared folder"
  )
  assert told == [expected] * 3
  assert not list(tmp_path.rglob(".shared-*"))


def test_each_host_is_named_with_what_it_has(on_hosts, tmp_path):
  told = on_hosts(
    4, lambda host: _compare(tmp_path, dataclasses.replace(CONFIG, seed=(5, 7, 5, 6)[host]))
  )
  message = "config.seed is 7 on host 1, 6 on host 3, 5 on host 0, 2"
  assert told == [f"the hosts differ, nothing was trained: {message}"] * 4


@pytest.mark.parametrize("part", ["data.sources", "evaluation.tasks"])
def test_other_records_under_one_config(on_hosts, tmp_path, part, drill):
  held_out = [scenes.Scenes("test", 8, 0, 32)], [scenes.Scenes("test", 9, 0, 32)]
  training = part == "data.sources"
  told = on_hosts(
    2,
    lambda host: _compare(tmp_path, seed=training * host, held_out=held_out[not training and host]),
  )
  assert told[0] == told[1]
  counts = (8, 8) if training else (9, 8)
  for host, count in zip((1, 0), counts, strict=True):
    assert f'"{count} records, sha256 ' in told[0]
    assert f'" on host {host}' in told[0]
  assert re.findall(r"the data of config\.(\S+) is", told[0]) == [f"{part}.0"]
  drill(32, fields=1, named=1)


def test_another_vocabulary_or_start(on_hosts, drill):
  original = tokenizer_lib.original()
  assert on_hosts(2, lambda _: agreement.of_start(original, 8)) == ["", ""]
  told = on_hosts(2, lambda host: agreement.of_start(original, 8 if host else None))
  message = 'the newest checkpoint is 8 on host 1, "none" on host 0'
  assert told == [f"the hosts differ, nothing was trained: {message}"] * 2
  small = tokenizer_lib.train(["a red circle", "a blue square"], 530)
  told = on_hosts(2, lambda host: agreement.of_start(small if host else original, 8))
  assert all(re.search(r"the vocabulary is .* on host 1, .* on host 0$", line) for line in told)
  drill(32, fields=2, named=2)
