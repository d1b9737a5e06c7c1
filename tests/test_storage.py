"""Bytes by ranges: on the disk, and from a store over HTTP that fails and hangs on purpose."""

import itertools
import pickle
import re

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import range_server
import trees

from clip_jax import config as c
from clip_jax.data import places, records, storage, tar_index

PAUSES: list[float] = []


@pytest.fixture(autouse=True)
def _patient(tmp_path_factory, monkeypatch):
  """Pauses are noted and not waited for."""
  monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
  PAUSES.clear()
  monkeypatch.setattr(storage.time, "sleep", PAUSES.append)
  monkeypatch.setattr(storage, "failures", storage.Failures())


@pytest.fixture
def store(tmp_path):
  with range_server.serve(tmp_path / "store") as running:
    yield running


def _tars(root, *counts):
  number = itertools.count()
  for shard, count in enumerate(counts):
    pairs = [trees.pair(next(number)) for _ in range(count)]
    trees.tar(root / f"{shard:05d}.tar", {k: v for pair in pairs for k, v in pair.items()})


def _open(path, **options):
  return places.open_files(c.Source(path=str(path), **options))


def _all(source):
  return [source[i] for i in range(len(source))]


def test_files_of_this_machine(tmp_path):
  trees.write(tmp_path / "b.tar", b"0123456789")
  trees.write(tmp_path / "a.TAR", b"")
  trees.write(tmp_path / ".hidden.tar", b"")
  trees.write(tmp_path / "c.txt", b"")
  (tmp_path / "d.tar").mkdir()
  found = storage.files(str(tmp_path), (".tar",))
  assert [(f.name, f.stem, f.size) for f in found] == [("a.TAR", "a", 0), ("b.tar", "b", 10)]
  assert storage.info(found[1].path) == found[1]
  assert storage.read(found[1].path, 3, 4) == b"3456"
  assert storage.read(found[1].path, 30, 0) == b""
  with storage.open_file(found[1]) as file:
    assert (file.seek(-2, 2), file.read()) == (8, b"89")
  with pytest.raises(storage.StorageError, match=r"b\.tar: ends before byte 11; it was cut short"):
    storage.read(found[1].path, 3, 8)
  with pytest.raises(storage.StorageError, match=r"b\.tar: over 9 bytes"):
    storage.read_all(found[1].path, 9)
  for ask in (storage.info, storage.listing, lambda path: storage.read(path, 0, 1)):
    with pytest.raises(storage.NotThere, match="none: No such file"):
      ask(str(tmp_path / "none"))


def test_tar_files_over_http_are_those_on_the_disk(store):
  _tars(store.root, 3, 2)
  expected = _all(_open(store.root))
  for path in (store.url, f"{store.url}/{{00000..00001}}.tar"):
    source = _open(path)
    assert _all(source) == expected
  assert source.locate(4) == f"{store.url}/00001.tar sample 000000004"
  again = pickle.loads(pickle.dumps(source))
  assert (_all(again), repr(again)) == (expected, repr(source))
  store.requests.clear()
  _open(store.url)
  assert not store.ranges()  # the indexes are there
  assert len(source) == 5
  source[4]
  assert len(store.ranges()) == 1  # image and caption together
  _tars(store.root, 3, 4)
  assert len(_open(store.url)) == 7  # another ETag, another index
  assert not list(store.root.glob("*.index"))


def test_of_a_servers_page_only_the_wanted_files_are_asked_for(store):
  _tars(store.root, 1)
  trees.write(store.root / "00000.parquet", "img2dataset's")
  trees.write(store.root / ".hidden.tar", "")
  assert len(_open(store.url)) == 1
  paths = {path for _, path, _ in store.requests if "train" not in path and "data" not in path}
  assert paths == {"/", "/00000.tar"}


def test_a_tar_file_is_read_by_blocks_and_never_as_a_whole(store, monkeypatch):
  monkeypatch.setattr(storage, "BLOCK_BYTES", 8192)
  files = trees.pair(0) | {"0.bin": bytes(500_000)} | trees.pair(1)
  path = trees.tar(store.root / "0.tar", files)
  assert len(_open(f"{store.url}/0.tar")) == 2
  spans = [tuple(map(int, asked.removeprefix("bytes=").split("-"))) for asked in store.ranges()]
  assert max(b - a + 1 for a, b in spans) <= 8192
  assert sum(b - a + 1 for a, b in spans) < 100_000 < path.stat().st_size
  store.requests.clear()
  assert storage.read(f"{store.url}/0.tar", 5, 20_000) == path.read_bytes()[5:20_005]
  assert store.ranges() == ["bytes=5-8196", "bytes=8197-16388", "bytes=16389-20004"]


@pytest.mark.parametrize("fault", ["503", "500", "429", "408", "drop", "short", "hang"])
def test_what_may_pass_is_asked_for_again(store, monkeypatch, fault):
  _tars(store.root, 2)
  source = _open(store.url)
  expected = _all(source)
  if fault == "hang":
    monkeypatch.setattr(storage, "TIMEOUT_SECONDS", 0.2)
  for failures in (1, storage.ATTEMPTS - 1)[: 1 if fault == "hang" else 2]:
    PAUSES.clear()
    store.faults = [fault] * failures
    assert source[1] == expected[1]
    assert len(PAUSES) == failures
    assert sorted(PAUSES) == PAUSES


def test_it_gives_up_and_says_what_it_asked_for(store):
  _tars(store.root, 1)
  source = _open(store.url)
  store.faults = ["503"] * storage.ATTEMPTS
  message = r"00000\.tar: bytes \d+-\d+: failed 6 times, at last: 503"
  with pytest.raises(storage.StorageError, match=message) as error:
    source[0]
  assert len(PAUSES) == storage.ATTEMPTS - 1
  assert records._cause(error.value) == "storage"


def test_a_store_that_is_down_ends_the_run_with_its_answer_and_is_logged_once(store, caplog):
  """A record or two that it does not give are replaced, as other bad ones are."""
  _tars(store.root, 30)
  source = _open(store.url)
  resilient = records.ResilientSource(source, name="config.data.sources[1]")
  assert not storage.failures.newest()
  caplog.clear()
  for count in (1, 2):
    store.faults = ["503"] * (count * 2 * storage.ATTEMPTS)
    element = resilient[0]
    assert (records.CAUSES[element["bad"]], element["attempts"]) == ("storage", count + 1)
    assert element["key"] == source[resilient._position(0, count)].key
  assert len(caplog.messages) == 1
  assert re.fullmatch(r"storage fails .*00000\.tar: bytes \d+-\d+: 503, .*", caplog.messages[0])
  PAUSES.clear()
  store.faults = ["503"] * 10_000
  with pytest.raises(
    records.RecordError,
    match=r"config\.data\.sources\[1\]: its store is down: 3 records in a row .*: http.*"
    r"bytes \d+-\d+: failed 6 times, at last: 503",
  ):
    resilient[0]
  assert len(PAUSES) == 3 * 2 * (storage.ATTEMPTS - 1)
  assert sum(PAUSES) < 100  # seconds, of 600 after which a loader is taken for dead
  assert len(caplog.messages) == 1
  assert "503" in storage.failures.newest()


def test_after_a_minute_without_failures_the_next_one_is_told_again(monkeypatch, caplog):
  clock = [0.0]
  monkeypatch.setattr(storage.time, "monotonic", lambda: clock[0])
  failures, told = storage.Failures(), []
  for seconds in (0, 50, 100, 150, 215):
    clock[0] = seconds
    failures.add(f"at {seconds}")
    told.append(len(caplog.messages))
  assert told == [1, 1, 1, 1, 2]
  assert failures.newest() == "at 215"
  clock[0] = 276
  assert failures.newest() == ""


@pytest.mark.parametrize(
  ("fault", "message"),
  [("403", "403"), ("404", "not there"), ("whole", "it knows no ranges")],
)
def test_what_stays_wrong_is_asked_for_once(store, fault, message):
  _tars(store.root, 2)
  source = _open(store.url)
  store.faults = [fault]
  with pytest.raises(storage.StorageError, match=message):
    source[0]
  assert not PAUSES
  with pytest.raises(records.RecordError, match=r"00007\.tar"):
    _open(f"{store.url}/00007.tar")


def test_a_store_that_fails_while_it_is_listed(store):
  _tars(store.root, 1, 1)
  store.anywhere, store.faults = True, ["503", "drop", "429"]
  assert len(_open(f"{store.url}/{{00000..00001}}.tar")) == 2


def test_a_tar_file_cut_in_a_store_is_an_error_at_the_opening(store):
  _tars(store.root, 2)
  path = store.root / "00000.tar"
  path.write_bytes(path.read_bytes()[:2048])
  with pytest.raises(records.RecordError, match=r"http.*00000\.tar: cut short at byte 2,048"):
    _open(store.url)


def test_parquet_and_tables_over_http(store):
  store.root.mkdir()
  columns = {"image": [trees.png(i) for i in range(6)], "text": [f"picture {i}" for i in range(6)]}
  pq.write_table(pa.table(columns), store.root / "train-0.parquet", row_group_size=2)
  source = _open(store.url)
  assert _all(source) == _all(_open(store.root))
  store.faults = ["503", "drop", "short"]
  assert pickle.loads(pickle.dumps(source))[5].image == trees.png(5)
  assert not store.faults
  _, photos = trees.photos(store.root, 2)
  trees.write(photos / "a b#?.png", trees.png(7))
  text = "image,caption\n1.png,one\na b#?.png,odd\nhttp://127.0.0.1/x.png,no\n../x.png,no\n"
  trees.write(photos / "t.csv", text + "none.png,gone\n")
  table = _open(f"{store.url}/photos/t.csv")
  assert [table[i].image for i in range(2)] == [trees.png(1), trees.png(7)]
  for i in (2, 3):
    store.requests.clear()
    with pytest.raises(records.RecordError, match=rf"t\.csv:{i + 2}: "):
      table[i]
    assert {path for _, path, _ in store.requests} == {"/photos/t.csv"}
  with pytest.raises(storage.NotThere, match=r"none\.png"):
    table[4]


def test_pauses_grow_to_a_limit_and_are_no_ones_but_ones_own(monkeypatch):
  pauses = [storage.pause_seconds("a", attempt) for attempt in range(12)]
  limits = [min(storage.MOST_SECONDS, storage.FIRST_SECONDS * 2**k) for k in range(12)]
  for pause, limit in zip(pauses, limits, strict=True):
    assert limit / 2 <= pause <= limit
  assert pauses == [storage.pause_seconds("a", attempt) for attempt in range(12)]
  assert pauses[5] != storage.pause_seconds("b", 5)
  monkeypatch.setattr(storage.os, "getpid", lambda: 1)
  assert pauses[5] != storage.pause_seconds("a", 5)


def test_a_store_whose_package_is_not_there(monkeypatch):
  def missing(*arguments, **options):
    raise ImportError("Please install gcsfs")

  storage._filesystem.cache_clear()
  monkeypatch.setattr(fsspec, "filesystem", missing)
  with pytest.raises(records.RecordError, match=r"gs://: .*\.\[remote\]' brings fsspec and gcsfs"):
    _open("gs://bucket/pairs")
  storage._filesystem.cache_clear()


def test_array_record_and_tfds_are_of_this_machine(store):
  trees.write(store.root / "a" / "manifest.json", "{}")
  trees.write(store.root / "b" / "dataset_info.json", "{}")
  for name, what in (("a", "ArrayRecord"), ("b", "TFDS")):
    with pytest.raises(records.RecordError, match=f"{what} is read from this machine's folders"):
      _open(f"{store.url}/{name}")


def test_any_other_store_of_fsspec(tmp_path):
  """As gs:// and s3://: names without their scheme."""
  memory = fsspec.filesystem("memory")
  _tars(tmp_path, 2, 1)
  for path in sorted(tmp_path.glob("*.tar")):
    memory.pipe(f"/bucket/{path.name}", path.read_bytes())
  try:
    source = _open("memory://bucket")
    assert _all(source) == _all(_open(tmp_path))
    assert len(tar_index.open_all(storage.files("memory://bucket", (".tar",)))) == 2
  finally:
    memory.rm("/bucket", recursive=True)
