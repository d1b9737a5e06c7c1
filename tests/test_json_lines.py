import errno
import json
import os

import pytest

from clip_jax import json_lines


def test_what_was_appended_is_read(tmp_path):
  path = tmp_path / "x.jsonl"
  assert json_lines.read(path) == json_lines.Lines((), "")
  json_lines.append(path, {"a": 1})
  json_lines.append(path, {"b": "ü\n"})
  assert path.read_text() == '{"a": 1}\n{"b": "\\u00fc\\n"}\n'
  assert json_lines.read(path) == json_lines.Lines(((1, {"a": 1}), (2, {"b": "ü\n"})), "")


@pytest.mark.parametrize("kept", range(1, 8))
def test_a_cut_last_line_is_left_out_said_and_taken_away(tmp_path, kept):
  path, line = tmp_path / "x.jsonl", '{"b": 2}'
  path.write_text('{"a": 1}\n' + line[:kept])
  found = json_lines.read(path)
  assert found.numbered == ((1, {"a": 1}),)
  assert found.cut == f"{path}:2: the last line was cut off while it was written and is ignored"
  json_lines.append(path, {"c": 3})
  assert path.read_text() == '{"a": 1}\n{"c": 3}\n'


def test_a_whole_object_without_its_end_counts(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text('{"a": 1}\n\n{"b": 2}')
  assert json_lines.read(path) == json_lines.Lines(((1, {"a": 1}), (3, {"b": 2})), "")
  json_lines.append(path, {"c": 3})
  assert path.read_text() == '{"a": 1}\n\n{"b": 2}\n{"c": 3}\n'


@pytest.mark.parametrize("line", ['{"a"', "[1]", "\udcff"])
def test_a_bad_line_before_the_last_is_named(tmp_path, line):
  path = tmp_path / "x.jsonl"
  path.write_bytes(f'{{"a": 1}}\n{line}\n'.encode(errors="surrogateescape"))
  with pytest.raises(json_lines.LinesError, match=r"x\.jsonl:2: not .*; remove this line"):
    json_lines.read(path)


def test_what_is_not_finite_is_not_written(tmp_path):
  path = tmp_path / "x.jsonl"
  with pytest.raises(ValueError, match="JSON"):
    json_lines.append(path, {"a": float("nan")})
  assert not path.exists()


def test_a_file_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "x.jsonl").mkdir()
  with pytest.raises(OSError, match=r"x\.jsonl"):
    json_lines.append(tmp_path / "x.jsonl", json.loads("{}"))


def test_a_disk_that_fills_loses_nothing_that_was_there(tmp_path, monkeypatch):
  path = tmp_path / "x.jsonl"
  json_lines.append(path, {"a": 1})

  def full(_):
    path.write_bytes(path.read_bytes()[:-3])  # what had room
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(json_lines.os, "fsync", full)
  with pytest.raises(OSError, match=r"No space left on device: .*x\.jsonl"):
    json_lines.append(path, {"b": 2})
  monkeypatch.undo()
  assert json_lines.read(path).numbered == ((1, {"a": 1}),)
  json_lines.append(path, {"b": 2})
  assert json_lines.read(path).numbered == ((1, {"a": 1}), (2, {"b": 2}))
