"""Fields of records that ask to be fetched, run or followed: none is (drill 14)."""

import contextlib
import hashlib
import itertools
import json
import os
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import trees
from array_record.python import array_record_module

from clip_jax import config as c
from clip_jax.data import folder_source, pipeline, records, tar_source
from clip_jax.data import tokenizer as tokenizer_lib

_WAYS_OUT = (
  "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
  "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty",
  "urllib.Request", "http.client.connect", "ftplib.connect",
)  # fmt: skip
_SECRET = "/etc/passwd"
_watching: list[list[str]] = []  # where attempts are noted; empty: nobody asks


def _hook(event, arguments):
  if not _watching:
    return
  asked = event in _WAYS_OUT or (event == "open" and str(arguments[0]) == _SECRET)
  if asked:
    _watching[-1].append(f"{event} {arguments}")
    raise PermissionError(f"sealed: {event}")


@contextlib.contextmanager
def _sealed():
  """Inside, Python can reach no host, start no program and not open the secret. Yields: attempts.

  By the interpreter's own audit events, which no library's import order gets around.
  """
  if not hasattr(sys, "_sealed_by_tests"):
    sys._sealed_by_tests = True  # a hook stays for the life of the process
    sys.addaudithook(_hook)
  _watching.append([])
  try:
    yield _watching[-1]
  finally:
    _watching.pop()


def _open_secret():
  with open(_SECRET) as file:
    return file.read()


WAYS_OUT = {
  "connect": lambda: socket.create_connection(("127.0.0.1", 9)),
  "look up": lambda: socket.getaddrinfo("localhost", 80),  # others: conftest.py
  "fetch": lambda: urllib.request.urlopen("http://127.0.0.1:9/"),
  "run": lambda: subprocess.run(["true"]),
  "shell": lambda: os.system("true"),
  "pipe": lambda: os.popen("true"),
  "fork": os.fork,
  "open": _open_secret,
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_the_seal_sees_each_way_out(way):
  with _sealed() as attempts, pytest.raises(OSError, match="sealed"):
    WAYS_OUT[way]()
  assert len(attempts) == 1
  assert socket.getaddrinfo("127.0.0.1", 80)  # open again


HOSTILE = (
  "http://127.0.0.1:9/a.png", "https://example.org/a.png", "file:///etc/passwd", _SECRET,
  "../../../../../../../../etc/passwd", "~/.ssh/id_rsa", "s3://bucket/key", "gs://bucket/key",
  "pipe:touch owned", "touch owned |", "$(touch owned)", "`touch owned`", "; touch owned",
  "__import__('os').system('touch owned')", "data:image/png;base64,aaaa", "\\\\host\\share\\a.png",
)  # fmt: skip


def _hostile_records():
  """Each string in each field; as an image too."""
  good = records.Record("key", trees.png(0), ("a caption",), "a label")
  fields = good.__dict__
  for text in HOSTILE:
    yield records.Record(**{**fields, "key": text})
    yield records.Record(**{**fields, "captions": (text,)})
    yield records.Record(**{**fields, "label": text})
    yield records.Record(**{**fields, "image": text.encode()})


def _array_record(folder, found):
  folder.mkdir()
  path = folder / "train.array_record"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in found:
    writer.write(records.pack(record))
  writer.close()
  data = path.read_bytes()
  shard = {"file": path.name, "records": len(found), "bytes": len(data)}
  shard["sha256"] = hashlib.sha256(data).hexdigest()
  _manifest(folder, shard)
  return folder


def _manifest(folder, shard):
  page = {"format": 1, "splits": {"train": {"shards": [shard]}}, "classes": list(HOSTILE)}
  (folder / "manifest.json").write_text(json.dumps(page))


def _tars(folder, captions):
  files = {f"{i}.{kind}": data for i, text in enumerate(captions)
           for kind, data in (("png", trees.png(i)), ("txt", text))}  # fmt: skip
  trees.tar(folder / "0.tar", files)
  return folder


def _examples(source, count):
  """What training makes of all records of a source, in one thread."""
  config = c.Config(
    model=c.Model(image=c.Vision(resolution=8), text=c.Text(context_length=16)),
    data=c.Data(sources=(c.Source(),), batch_pairs=8, threads=1),
  )
  batches = pipeline.host_batches(config, [source], tokenizer_lib.original())
  return list(itertools.islice(batches, -(-count // 8)))


def test_nothing_in_a_record_is_fetched_run_or_followed(tmp_path, monkeypatch, drill):
  monkeypatch.chdir(tmp_path)
  hostile = list(_hostile_records())
  shards = _array_record(tmp_path / "shards", hostile)
  tars, pictures = _tars(tmp_path / "tars", HOSTILE), tmp_path / "pictures"
  for i, name in enumerate(("pipe:touch owned", "$(touch owned)", "`touch owned`", "a |")):
    trees.write(pictures / name / f"{name}.png", trees.png(i))
  before = sorted(path.name for path in tmp_path.iterdir())
  with _sealed() as attempts:
    source = records.ArrayRecordSource(shards, "train")
    assert [source[i] for i in range(len(source))] == hostile
    batches = _examples(source, len(hostile))
    bad = np.concatenate([batch["bad"] for batch in batches])[: len(hostile)]
    classes = folder_source.class_folders([pictures])
    names = dict(zip(classes, HOSTILE, strict=False))
    in_folders = folder_source.from_class_folders(pictures, [pictures], names)
    for held in (tar_source.TarSource(tars), in_folders):
      assert len(held) >= 4
      for i in range(len(held)):
        held.locate(i)
        assert held[i].image.startswith(b"\x89PNG")
  drill(14, fields=len(hostile) + len(HOSTILE) + 4, attempts=len(attempts))
  assert attempts == []
  assert (bad != 0).sum() == len(HOSTILE)  # those whose image is a string, and no others
  assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", [_SECRET, "../secret", "a/../../secret"])
def test_a_manifest_names_only_files_beside_it(tmp_path, name, drill):
  _manifest(tmp_path, {"file": name, "records": 1, "bytes": 1, "sha256": "0"})
  with _sealed() as attempts, pytest.raises(records.RecordError, match="is no file in its folder"):
    records.ArrayRecordSource(tmp_path, "train")
  drill(14, fields=1, attempts=len(attempts))
  assert attempts == []
