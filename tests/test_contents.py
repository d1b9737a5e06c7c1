"""Fingerprints of data by content, and when one that was kept still counts."""

import errno
import hashlib
import json
import os
import pathlib

import planted
import pytest
import trees

from clip_jax.data import contents, folder_source, tar_source
from clip_jax.evaluation import datasets
from clip_jax.evaluation.paper import units as paper_units


@pytest.fixture
def reads(monkeypatch):
  """Counts the times that files are read; they count as settled at once."""
  found, read = [], contents._of_content
  monkeypatch.setattr(contents, "_SETTLED_SECONDS", -3600.0)
  monkeypatch.setattr(contents, "_of_content", lambda parts: (found.append(1), read(parts))[1])
  return found


@pytest.fixture
def folder(tmp_path):
  for i in range(3):
    trees.write(tmp_path / "data" / "cat" / f"{i}.png", bytes([i]) * 100)
  return tmp_path / "data"


def source(folder, cache=None, label="cat", writes=True):
  out = folder_source.from_class_folders(folder, [folder], {"cat": label})
  out.cache = cache and contents.Cache(cache, writes)
  return out


def by_hand(*parts):
  """The sha256 of texts, and of the sha256 of the bytes of files."""
  shown = [p.encode() if isinstance(p, str) else hashlib.sha256(p).digest() for p in parts]
  return hashlib.sha256(b"".join(shown)).hexdigest()


def test_values_by_hand(folder, tmp_path):
  parts = [part for i in range(3) for part in (
    json.dumps([f"cat/{i}.png", "cat", []]), bytes([i]) * 100)]  # fmt: skip
  assert source(folder).fingerprint == by_hand(*parts)
  tars = tmp_path / "tars"
  for i in range(2):
    trees.tar(tars / f"{i}.tar", {f"s{i}.png": trees.png(i), f"s{i}.cls": "1"})
  trees.write(tars / "nshards.txt", "2")
  shards = [(tars / f"{i}.tar").read_bytes() for i in range(2)]
  wanted = by_hand('["a", "b"]', *shards)
  assert tar_source.TarSource(tars, ("a", "b")).fingerprint == wanted


def test_what_is_as_it_was_is_not_read_again(folder, tmp_path, reads):
  wanted, cache = source(folder).fingerprint, tmp_path / "cache"
  assert [source(folder, cache).fingerprint for _ in range(3)] == [wanted] * 3
  assert len(reads) == 2
  assert [path.suffix for path in cache.iterdir()] == [".fingerprint"]
  for other in (source(folder, cache, label="dog"), source(folder, tmp_path / "another")):
    other.fingerprint  # noqa: B018, it is read
  assert len(reads) == 4


def _same_size_and_time(path):
  """The worst that can be done to a file: other bytes, as many, and the time set back."""
  before = path.stat()
  path.write_bytes(b"x" * before.st_size)
  os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
  assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def _replaced(path):
  """Another file in its place, of the same size and time."""
  before, other = path.stat(), path.with_name("other")
  other.write_bytes(b"y" * before.st_size)
  os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
  os.replace(other, path)


@pytest.mark.parametrize(
  "change",
  [
    _same_size_and_time,
    _replaced,
    lambda path: path.write_bytes(b"longer than before" * 9),
    lambda path: path.unlink(),
    lambda path: path.rename(path.with_name("9.png")),
    lambda path: trees.write(path.with_name("9.png"), b"one more"),
  ],
  ids=["bytes", "file", "size", "gone", "name", "more"],
)
def test_what_changed_is_read_again(folder, tmp_path, reads, change):
  before = source(folder, tmp_path / "cache").fingerprint
  change(folder / "cat" / "1.png")
  found = source(folder, tmp_path / "cache").fingerprint
  assert found == source(folder).fingerprint != before
  assert len(reads) == 3


def test_another_time_alone_is_another_reading_of_the_same(folder, tmp_path, reads):
  before = source(folder, tmp_path / "cache").fingerprint
  os.utime(folder / "cat" / "1.png", (0, 0))
  assert source(folder, tmp_path / "cache").fingerprint == before
  assert len(reads) == 2


def test_what_changed_a_moment_ago_is_not_kept(folder, tmp_path):
  """Though its time says that it is old: the time of its entry, which nobody can set, tells."""
  for path in (folder / "cat").iterdir():
    os.utime(path, (0, 0))
  source(folder, tmp_path / "cache").fingerprint  # noqa: B018
  assert not (tmp_path / "cache").exists()


def test_what_changes_while_it_is_read_is_not_kept(folder, tmp_path, reads, monkeypatch):
  read = contents._of_content

  def changing(parts):
    found = read(parts)
    trees.write(folder / "cat" / "1.png", b"z" * 100)
    return found

  monkeypatch.setattr(contents, "_of_content", changing)
  source(folder, tmp_path / "cache").fingerprint  # noqa: B018
  assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("place", [0, 63, 64, 65, -1])
def test_a_damaged_or_foreign_file_does_not_count(folder, tmp_path, reads, place):
  cache = tmp_path / "cache"
  wanted = source(folder, cache).fingerprint
  (path,) = cache.iterdir()
  good = path.read_bytes()
  for bad in (good[:place] + b"\xff" + good[place:][1:], good[:-1], b"", b"0" * len(good)):
    path.write_bytes(bad)
    assert source(folder, cache).fingerprint == wanted
    assert path.read_bytes() == good
  assert len(reads) == 5
  trees.write(folder / "cat" / "1.png", b"other")
  source(folder, cache).fingerprint  # noqa: B018
  (new,) = set(cache.iterdir()) - {path}
  new.write_bytes(good)  # of other data: under another name it is nothing
  assert source(folder, cache).fingerprint == source(folder).fingerprint != wanted


def test_who_does_not_write_reads(folder, tmp_path, reads):
  cache = tmp_path / "cache"
  for _ in range(2):
    wanted = source(folder, cache, writes=False).fingerprint
  assert (len(reads), cache.exists()) == (2, False)
  source(folder, cache).fingerprint  # noqa: B018
  assert source(folder, cache, writes=False).fingerprint == wanted
  assert len(reads) == 3


def test_a_full_disk_is_a_warning_and_leaves_nothing(folder, tmp_path, reads, monkeypatch):
  cache, write = tmp_path / "cache", pathlib.Path.write_text

  def full(path, text):
    write(path, text[:9])
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(pathlib.Path, "write_text", full)
  with pytest.warns(RuntimeWarning, match="the fingerprint of data is not kept .No space left"):
    found = source(folder, cache).fingerprint
  assert found == source(folder).fingerprint
  assert not list(cache.iterdir())


@pytest.mark.parametrize("key", ["MNIST", "CIFAR10", "HatefulMemes"])
def test_the_papers_copies_are_read_once(tmp_path, reads, key):
  """Of TFDS, tar files and a list beside images."""
  world = planted.World(tmp_path / "data", tfds=key == "MNIST")
  dataset = world.test(key)
  kinds = {"MNIST": "tfds", "CIFAR10": "wds", "HatefulMemes": "folder"}
  prints = []
  for cache in (tmp_path / "cache", tmp_path / "cache", None):
    settings = paper_units.Settings(roots=(world.root,), cache=cache, batch=7)
    copy = paper_units.opener(settings)(datasets.named(dataset.key), "test", 0)
    assert copy.kind == kinds[key]
    prints.append(copy.fingerprint)
    assert len(reads) == (2 if cache is None else 1)
  assert len(set(prints)) == 1
