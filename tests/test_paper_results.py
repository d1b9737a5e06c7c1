import dataclasses
import errno
import json
import os

import pytest
from paper_cells import measured

from clip_jax.evaluation.paper import results as paper_results

CELLS = tuple(
  measured(dataset=name, value=v, n=9)
  for name, v in (("Food101", 81.125), ("MNIST", 66.6), ("KITTI", 42))
)


def test_results_come_back_as_they_were_kept(tmp_path):
  path = tmp_path / "results.jsonl"
  words = measured("9", "", "Food101", "metric", "accuracy", n=0, weights="")
  fits = tuple(paper_results.Fitted(x, k, k < 2) for k, x in enumerate((1e6, 1, 0.5)))
  probed = measured("10", left_out=("a.tar sample 1", "\ud800"), fits=fits)
  for cell in (*CELLS, words, probed):
    paper_results.append(path, cell)
  assert paper_results.read(path) == paper_results.Results((*CELLS, words, probed), "")
  first, *_, last = (json.loads(line) for line in path.read_text().splitlines())
  older = ("table", "model", "dataset", "metric", "value", "n")
  older += ("weights", "data", "prompts", "code", "seconds")
  assert list(first) == [*older, "left_out", "fits"]
  assert (first["left_out"], first["fits"]) == ([], [])
  assert last["left_out"] == ["a.tar sample 1", "\ud800"]
  assert last["fits"][2] == {"lambda": 0.5, "iterations": 2, "converged": False}
  path.write_text(json.dumps({name: first[name] for name in older}) + "\n")
  assert paper_results.read(path) == paper_results.Results(CELLS[:1], "")
  assert paper_results.read(tmp_path / "none.jsonl") == paper_results.Results((), "")


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_line_cut_by_a_kill_is_left_out_and_said(tmp_path, kept):
  path = tmp_path / "results.jsonl"
  for cell in CELLS:
    paper_results.append(path, cell)
  lines = path.read_bytes().splitlines()
  path.write_bytes(b"\n".join([*lines[:2], lines[2][:kept]]))
  found = paper_results.read(path)
  assert found.measured == CELLS[:2]
  assert found.cut == f"{path}:3: the last line was cut off while it was written and is ignored"
  paper_results.append(path, CELLS[2])  # the run goes on
  assert paper_results.read(path) == paper_results.Results(CELLS, "")


def test_a_last_line_that_lacks_only_its_end_counts(tmp_path):
  path = tmp_path / "results.jsonl"
  paper_results.append(path, CELLS[0])
  path.write_bytes(path.read_bytes().rstrip(b"\n"))
  assert paper_results.read(path) == paper_results.Results(CELLS[:1], "")
  paper_results.append(path, CELLS[1])
  assert paper_results.read(path) == paper_results.Results(CELLS[:2], "")


FIT = {"lambda": 1.0, "iterations": 3, "converged": True}
LINE = dataclasses.asdict(CELLS[0])


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ('{"table": "11", "mod', "not JSON"),
    ("\udcff", "not JSON"),
    ("[1, 2]", "not an object"),
    (json.dumps({k: v for k, v in LINE.items() if k != "data"}), "wrong or missing: data"),
    (json.dumps({**LINE, "extra": 1}), "wrong or missing: extra"),
    (json.dumps({**LINE, "value": float("nan")}), "value is nan: not a finite number"),
    (json.dumps({**LINE, "value": "good"}), "value is 'good': want a number in table 11"),
    (json.dumps({**LINE, "value": None}), "value is None: want a whole number or a number"),
    (json.dumps({**LINE, "value": True}), "value is True"),
    (json.dumps({**LINE, "n": 1.5}), "n is 1.5: want a whole number"),
    (json.dumps({**LINE, "n": -1}), "n is -1 and seconds"),
    (json.dumps({**LINE, "table": "17"}), "table is '17': choose of 1, 9"),
    (json.dumps({**LINE, "model": "a\nb"}), "cannot be shown"),
    (json.dumps({**LINE, "model": "\ud800"}), "cannot be shown"),
    *((json.dumps({**LINE, "left_out": v}), "want a list of text") for v in (None, "a", [1])),
    *(
      (json.dumps({**LINE, "fits": v}), "want a list of lambda, iterations, converged")
      for v in (
        None,
        {},
        [1],
        [{"lambda": 1.0}],
        [{**FIT, "converged": 1}],
        [{**FIT, "x": 1}],
        [{**FIT, "lambda": float("nan")}],
        [{**FIT, "iterations": 1.5}],
      )
    ),
  ],
)
def test_other_bad_lines_are_named(tmp_path, line, words):
  path = tmp_path / "results.jsonl"
  good = json.dumps(LINE)
  path.write_bytes("\n".join([good, line, good, ""]).encode(errors="surrogateescape"))
  with pytest.raises(paper_results.ResultsError) as caught:
    paper_results.read(path)
  assert str(caught.value).startswith(f"{path}:2: ")
  assert words in str(caught.value)
  assert "\n" not in str(caught.value)
  path.write_bytes("\n".join([good, line, ""]).encode(errors="surrogateescape"))
  with pytest.raises(paper_results.ResultsError):  # the last line has its end: it was not cut
    paper_results.read(path)


def test_two_weights_under_one_name_are_refused_with_both_hashes(tmp_path):
  path = tmp_path / "results.jsonl"
  other = dataclasses.replace(CELLS[1], weights="f" * 64)
  for cell in (CELLS[0], other):
    paper_results.append(path, cell)
  with pytest.raises(paper_results.ResultsError) as caught:
    paper_results.read(path)
  for words in (f"{path}:2: RN50", "a" * 64, "f" * 64, "in line 1", "another folder"):
    assert words in str(caught.value)


def test_results_of_other_weights_than_those_given_are_refused(tmp_path):
  path = tmp_path / "results.jsonl"
  for cell in (CELLS[0], dataclasses.replace(CELLS[0], model="own", weights="e" * 64)):
    paper_results.append(path, cell)
  assert len(paper_results.read(path, {"RN50": "a" * 64, "absent": "9" * 64}).measured) == 2
  with pytest.raises(paper_results.ResultsError) as caught:
    paper_results.read(path, {"RN50": "a" * 64, "own": "f" * 64})
  for words in (f"{path}:2: own", "e" * 64, "f" * 64, "now it is"):
    assert words in str(caught.value)


def test_a_full_disk_is_named_and_loses_no_line(tmp_path, monkeypatch):
  path = tmp_path / "results.jsonl"
  paper_results.append(path, CELLS[0])

  def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*results\.jsonl"):
      paper_results.append(path, CELLS[1])
  assert paper_results.read(path).measured[0] == CELLS[0]


def test_a_value_that_is_no_number_is_never_kept():
  with pytest.raises(paper_results.ResultsError, match="not a finite number"):
    measured(value=float("inf"))
