"""Features kept on disk: goes on where it was killed, notices damage, and loses nothing."""

import dataclasses
import functools
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import two_processes
from known_model import KnownModel, Source, captioned, labelled, picture, unit

from clip_jax.data.records import Record
from clip_jax.evaluation import encoding
from clip_jax.evaluation.probe import feature_file, features, splits

BATCH, N = 3, 110  # chunks of 48, 48, 14
ROWS = unit(np.random.default_rng(0).normal(size=(N, 5)))
LABELS = [f"class {i % 7}" for i in range(N)]


class Model(KnownModel):
  """Features are three times the embeddings; counts what it is asked for."""

  def __init__(self, rows=ROWS, batch=BATCH):
    super().__init__(rows, {}, batch)
    self.asked = 0

  def encode_image(self, images):
    self.asked += len(images)
    return super().encode_image(images)

  def image_features(self, images):
    return 3 * self.encode_image(images)


def encode(folder, model=None, source=None, kind="embedding", weights="w", **options):
  model = model or Model()
  source = labelled(LABELS) if source is None else source
  found = features.encode(model, source, kind, model.batch, folder, weights, **options)
  return found, model.asked


def files(folder):
  return {path.suffix: path for path in folder.iterdir()}


def test_rows_and_what_records_say_in_order(tmp_path):
  calls = []
  found, asked = encode(tmp_path, progress=lambda *at: calls.append(at))
  np.testing.assert_array_equal(found.rows_ND, ROWS)
  assert found.rows_ND.dtype == np.float32
  assert found.labels == tuple(LABELS)
  assert found.captions == ((),) * N
  assert found.left_out == ()
  assert asked == 111  # the last batch is padded
  assert calls == [(0, 110), (48, 110), (96, 110), (110, 110)]
  again, asked = encode(tmp_path)
  assert asked == 0
  np.testing.assert_array_equal(again.rows_ND, ROWS)
  assert again.labels == tuple(LABELS)
  assert isinstance(again.rows_ND, np.memmap)
  assert not again.rows_ND.flags.writeable
  without, asked = encode(None)
  assert asked == 111
  np.testing.assert_array_equal(without.rows_ND, ROWS)


def test_captions_are_kept(tmp_path):
  own = [[f"{i}", "é\n☂"] for i in range(N)]
  for _ in range(2):
    found, _ = encode(tmp_path, source=captioned(own))
    assert found.captions == tuple(map(tuple, own))
    assert found.labels == (None,) * N


def test_the_key_is_all_that_the_rows_depend_on(tmp_path):
  model = Model()
  encode(tmp_path, model)
  other = labelled(LABELS)
  other.fingerprint = "1" * 64
  model.resolution = 8
  assert encode(tmp_path, model)[1] > 111
  for change in ({"kind": "penultimate"}, {"weights": "v"}, {"source": other}):
    found, asked = encode(tmp_path, **change)
    assert asked == 111
    scale = 3 if "kind" in change else 1
    np.testing.assert_array_equal(found.rows_ND, scale * ROWS)
  assert len(list(tmp_path.iterdir())) == 10


class Killed(BaseException):
  pass


@pytest.mark.parametrize("reads", [0, 47, 48, 95, 96, 109])
def test_goes_on_after_the_last_whole_chunk(tmp_path, reads):
  whole = labelled(LABELS)

  class Dying(Source):
    def __getitem__(self, index):
      if index >= reads:
        raise Killed
      return whole[index]

  with pytest.raises(Killed):
    encode(tmp_path, source=Dying(whole.records))
  found, asked = encode(tmp_path, Model(batch=5))  # of another size: chunks may be, too
  np.testing.assert_array_equal(found.rows_ND, ROWS)
  assert found.labels == tuple(LABELS)
  assert asked == -(-(N - reads // 48 * 48) // 5) * 5


DYING = """
import os, pathlib, signal, sys
from test_features import Model, encode
class Dying(Model):
  def encode_image(self, images):
    if self.asked >= 60:
      os.kill(os.getpid(), signal.SIGKILL)
    return super().encode_image(images)
encode(pathlib.Path(sys.argv[1]), Dying())
"""


def test_a_process_killed_in_the_middle(tmp_path):
  command = [sys.executable, "-c", DYING, str(tmp_path)]
  assert subprocess.run(command, env=environment()).returncode == -signal.SIGKILL
  found, asked = encode(tmp_path)
  assert asked == 63  # all but a chunk of 48
  np.testing.assert_array_equal(found.rows_ND, ROWS)


def environment():
  tests = pathlib.Path(__file__).parent
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests), str(tests / "sealed")]),
  }


def test_a_short_run_begins_a_long_one(tmp_path):
  found, _ = encode(tmp_path, limit=10)
  assert len(found.rows_ND) == len(found.labels) == 10
  found, asked = encode(tmp_path, limit=N)
  assert asked == 102  # 100, padded
  np.testing.assert_array_equal(found.rows_ND, ROWS)
  found, asked = encode(tmp_path, limit=50)
  assert asked == 0
  np.testing.assert_array_equal(found.rows_ND, ROWS[:50])
  assert found.labels == tuple(LABELS[:50])


def _cut_line(path):
  path.write_bytes(path.read_bytes()[:-9])


def _flip(path, at):
  content = bytearray(path.read_bytes())
  content[at] ^= 1
  path.write_bytes(content)


DAMAGE = {
  "a bit of the first row": (".rows", functools.partial(_flip, at=0), 111),
  "a bit of the last row": (".rows", functools.partial(_flip, at=-1), 15),
  "rows cut": (".rows", lambda path: os.truncate(path, 60 * 20), 63),
  "no rows": (".rows", os.unlink, 111),
  "the last line cut": (".jsonl", _cut_line, 15),
  "no lines": (".jsonl", lambda path: path.write_text(""), 111),
  "not JSON": (".jsonl", lambda path: path.write_text("junk\n"), 111),
  "not an object": (".jsonl", lambda path: path.write_text("[1]\n"), 111),
  "rows too many": (".rows", lambda path: path.write_bytes(path.read_bytes() + b"junk"), 0),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_encoded_again_and_no_more(tmp_path, name):
  encode(tmp_path)
  suffix, damage, expected = DAMAGE[name]
  damage(files(tmp_path)[suffix])
  found, asked = encode(tmp_path)
  assert asked == expected
  np.testing.assert_array_equal(found.rows_ND, ROWS)
  assert found.labels == tuple(LABELS)
  assert encode(tmp_path)[1] == 0


def test_a_full_disk_is_told_and_loses_nothing(tmp_path, monkeypatch):
  write, room = feature_file._write, [1000]

  def full(file, data):
    room[0] -= len(data)
    if room[0] < 0:
      file.write(data[: len(data) // 2])
      raise OSError(28, "No space left on device")
    write(file, data)

  monkeypatch.setattr(feature_file, "_write", full)
  room[0] = 2 * 48 * 20 + 1500  # one chunk with its line, and some of the next
  with pytest.raises(OSError, match="48 of 110 records are kept: make room") as error:
    encode(tmp_path)
  assert str(tmp_path) in error.value.filename
  monkeypatch.undo()
  found, asked = encode(tmp_path)
  assert asked == 63
  np.testing.assert_array_equal(found.rows_ND, ROWS)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match="0 of 110 records are kept"):
    encode(tmp_path / "file" / "cache")


def test_two_runs_do_not_write_the_same(tmp_path):
  key = features.cache_key(Model(), labelled(LABELS), "embedding", "w")
  with feature_file.opened(tmp_path, key, N):
    with pytest.raises(encoding.EvaluationError, match="another run is writing these features"):
      encode(tmp_path)
  encode(tmp_path)
  with feature_file.opened(tmp_path, key, N) as file:  # whole: to be read by any number
    assert file.done == N
    assert encode(tmp_path)[1] == 0


@pytest.mark.parametrize("kind", features.KINDS)
def test_rows_that_are_not_finite_name_the_record_and_are_not_kept(tmp_path, kind):
  bad = ROWS.copy()
  bad[60, 2] = np.nan
  with pytest.raises(encoding.EvaluationError, match="shard-7, record 60"):
    encode(tmp_path, Model(bad), kind=kind)
  found, asked = encode(tmp_path, kind=kind)
  assert asked == 63
  assert np.isfinite(found.rows_ND).all()


def corrupt(*indices):
  source = labelled(LABELS)
  for i in indices:
    source.records[i] = dataclasses.replace(source.records[i], image=b"no image")
  return source


def test_a_corrupt_image_is_an_error_or_left_out(tmp_path):
  with pytest.raises(encoding.EvaluationError, match="record 50: image cannot be decoded"):
    encode(tmp_path / "a", source=corrupt(50))
  for _ in range(2):
    found, _ = encode(tmp_path, source=corrupt(50, 99), skip_unreadable=True)
    good = [i for i in range(N) if i not in (50, 99)]
    np.testing.assert_array_equal(found.rows_ND, ROWS[good])
    assert found.labels == tuple(LABELS[i] for i in good)
    assert found.left_out == ("shard-7, record 50", "shard-7, record 99")
    np.testing.assert_array_equal(found.indices, good)
  with pytest.raises(encoding.EvaluationError, match=r"record 50: image .* \(as 2 of 110\)"):
    encode(tmp_path, source=corrupt(50, 99))  # what is kept says so too
  found, _ = encode(tmp_path, source=corrupt(50, 99), limit=20)
  assert found.left_out == ()
  with pytest.raises(encoding.EvaluationError, match="nor any other of 3"):
    encode(None, source=corrupt(0, 1, 2), skip_unreadable=True, limit=3)


def test_a_record_that_cannot_be_read_is_never_left_out():
  source = labelled(LABELS)
  source.records[7] = OSError("storage")
  with pytest.raises(encoding.EvaluationError, match="record 7: cannot be read"):
    encode(None, source=source, skip_unreadable=True)


def test_bad_calls_are_refused(tmp_path):
  with pytest.raises(encoding.EvaluationError, match="choose one of embedding, penultimate"):
    encode(tmp_path, kind="both")
  with pytest.raises(encoding.EvaluationError, match="weights_hash is empty"):
    encode(tmp_path, weights="")
  with pytest.raises(encoding.EvaluationError, match="no records"):
    encode(tmp_path, source=Source([]))
  assert list(tmp_path.iterdir()) == []


def test_labels_are_numbers_in_the_order_of_the_classes():
  classes = [f"class {i}" for i in (3, 1, 0, 2, 6, 5, 4, 9)]
  found, _ = encode(None)
  split = splits.labelled(found, labelled(LABELS), classes)
  assert split.features_ND is found.rows_ND
  assert [classes[k] for k in split.labels] == LABELS
  source = corrupt(50, 99)
  found, _ = encode(None, source=source, skip_unreadable=True)
  split = splits.labelled(found, source, classes)
  assert [classes[k] for k in split.labels] == [LABELS[i] for i in range(N) if i not in (50, 99)]
  for label in (None, "class 7"):
    source.records[60] = dataclasses.replace(source.records[60], label=label)
    found, _ = encode(None, source=source, skip_unreadable=True)
    with pytest.raises(encoding.EvaluationError, match=f"record 60: label {label!r} is none of"):
      splits.labelled(found, source, classes)


def test_labels_of_several_classes_an_image():
  source = labelled(["b", "a; c (difficult)", ""])
  found, _ = encode(None, source=source)
  split = splits.labelled(found, source, "abc", several=True)
  np.testing.assert_array_equal(split.labels, [[0, 1, 0], [1, 0, -1], [0, 0, 0]])
  source.records[1] = dataclasses.replace(source.records[1], label="a; d")
  found, _ = encode(None, source=source)
  with pytest.raises(encoding.EvaluationError, match="record 1: label 'a; d' is none of the 3"):
    splits.labelled(found, source, "abc", several=True)


def test_a_record_may_hold_decoded_pixels(tmp_path):
  source = Source([Record("k", picture(4), (), "x")])
  found, _ = encode(tmp_path, source=source, skip_unreadable=True)
  np.testing.assert_array_equal(found.rows_ND, ROWS[4:5])


TWO = """
  import pathlib, sys
  import numpy as np
  from clip_jax import hosts
  host, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
  hosts.start(f"127.0.0.1:{port}", 2, host, timeout_seconds=60)
  with hosts.watched(20):
    import jax
    from clip_jax.evaluation import encoding
    from known_model import labelled
    from test_features import LABELS, N, ROWS, Model, corrupt
    from clip_jax.evaluation.probe import features
    assert hosts.from_first(b"first" if host == 0 else b"another") == b"first"
    own = folder / str(host)  # only the first one's is ever filled
    for batch, limit in ((5, 30), (7, 0), (4, 0)):
      model = Model(batch=encoding.share(batch))
      found = features.encode(model, labelled(LABELS), "embedding", batch, own, "w", limit)
      n = limit or N
      np.testing.assert_array_equal(found.rows_ND, ROWS[:n])
      assert found.labels == tuple(LABELS[:n])
      assert bool(model.asked) == (batch != 4), (batch, model.asked)
    model = Model(batch=4)
    found = features.encode(
      model, corrupt(3, 50), "penultimate", 7, own, "w", skip_unreadable=True
    )
    np.testing.assert_array_equal(found.rows_ND, 3 * np.delete(ROWS, [3, 50], 0))
    assert len(found.left_out) == 2
    mine = corrupt(*[17] * host)  # for the second alone
    for batch in (7, 3):  # in which it is in the share of the first, and of the second
      model = Model(batch=encoding.share(batch))
      found = features.encode(model, mine, "embedding", batch, None, "w", skip_unreadable=True)
      np.testing.assert_array_equal(found.rows_ND, np.delete(ROWS, 17, 0))
    try:
      features.encode(Model(batch=2), mine, "embedding", 3, None, "w")
      raise AssertionError("not told")
    except encoding.EvaluationError as error:
      assert "shard-7, record 17: image cannot be decoded" in str(error), error
    model = Model(batch=2)
    model.tokens = lambda texts, truncate: None if host else int("x")  # the first alone
    try:
      encoding.encode_texts(model, ["a", "b", "c"], 3)
      raise AssertionError("not told")
    except ValueError as error:
      assert "invalid literal" in str(error), error
      assert isinstance(error, encoding.EvaluationError) == bool(host)
  print("done", own.exists())
"""


def test_two_processes_share_the_work_and_the_cache(tmp_path):
  ends = two_processes.run(TWO, tmp_path)
  assert [code for code, _ in ends] == [0, 0], ends
  assert [said.splitlines()[-1] for _, said in ends] == ["done True", "done False"]
