"""Stress tests as files: the cells that a killed run goes on from, page, Markdown, CSV."""

import csv
import dataclasses
import json
import re

import numpy as np
import pytest
from parsed_page import EVIL, Page

from clip_jax.evaluation.stress import cells as stress_cells
from clip_jax.evaluation.stress import corruptions
from clip_jax.evaluation.stress import curves as stress
from clip_jax.evaluation.stress import writers as stress_writers
from clip_jax.evaluation.stress.cells import Cell, CellsError, Measure

MEASURE = Measure("a" * 64, "b" * 64, "c" * 64)
CELLS = [
  Cell("clean", 0, 0.8, 50, 1.5, "v1"),
  Cell("fog", 1, 0.7, 50, 2.0, "v2"),
  Cell("fog", 3, 0.5, 50, 2.0, "v2"),
]
RESULT = stress.StressResult(
  "digits | test", 0.8, (1, 3), {"contrast": (0.75, 0.25), "fog": (0.7, 0.5)}
)
IMAGE = np.full((16, 16, 3), 200, np.uint8)


def kept(path, cells=CELLS, measure=MEASURE):
  for cell in cells:
    stress_cells.append(path, cell, measure)


def test_what_is_measured_is_known_again(tmp_path):
  path = tmp_path / "results.jsonl"
  assert stress_cells.read(path, MEASURE) == ({}, {}, "")
  kept(path)
  done, codes, cut = stress_cells.read(path, MEASURE)
  assert codes == {("clean", 0): "v1", ("fog", 1): "v2", ("fog", 3): "v2"}
  assert done == {("clean", 0): 0.8, ("fog", 1): 0.7, ("fog", 3): 0.5}
  assert cut == ""
  assert json.loads(path.read_text().splitlines()[1]) == {
    **dataclasses.asdict(CELLS[1]),
    **dataclasses.asdict(MEASURE),
  }
  assert stress_cells.missing(done, ("fog", "snow"), (1, 3)) == 2
  assert stress_cells.missing({}, ("fog",), (1, 3)) == 3
  older = [json.loads(line) for line in path.read_text().splitlines()]
  path.write_text("".join(json.dumps({**line, "code": "v"}) + "\n" for line in older[:1]))
  for line in older[1:]:
    del line["code"]
    path.write_text(path.read_text() + json.dumps(line) + "\n")
  assert stress_cells.read(path, MEASURE)[:2] == (
    done, {("clean", 0): "v", ("fog", 1): "", ("fog", 3): ""}
  )  # fmt: skip


def test_a_line_cut_by_a_kill_is_measured_again(tmp_path):
  path = tmp_path / "results.jsonl"
  kept(path)
  path.write_bytes(path.read_bytes()[:-9])
  done, _, cut = stress_cells.read(path, MEASURE)
  assert list(done) == [("clean", 0), ("fog", 1)]
  assert cut == f"{path}:3: the last line was cut off while it was written and is ignored"
  kept(path, CELLS[2:])
  assert stress_cells.read(path, MEASURE)[0][("fog", 3)] == 0.5


@pytest.mark.parametrize("name", ["weights", "data", "prompts"])
def test_a_file_of_anything_else_is_refused(tmp_path, name):
  path = tmp_path / "results.jsonl"
  kept(path, CELLS[:1])
  kept(path, CELLS[1:], dataclasses.replace(MEASURE, **{name: "d" * 64}))
  words = f"results.jsonl:2: measured with {name} {'d' * 64}, now they are "
  with pytest.raises(CellsError, match=re.escape(words)):
    stress_cells.read(path, MEASURE)


@pytest.mark.parametrize(
  ("change", "words"),
  [
    *(({"accuracy": value}, "remove this line") for value in (1.5, None, True, "x", -0.1)),
    *(({name: value}, "remove this line") for name, value in (("severity", "1"), ("code", 1))),
    ({"extra": 1}, "wrong or missing: extra"),
  ],
)
def test_a_line_that_is_no_cell_is_named(tmp_path, change, words):
  path = tmp_path / "results.jsonl"
  kept(path)
  line = {**dataclasses.asdict(CELLS[0]), **dataclasses.asdict(MEASURE), **change}
  path.write_text(path.read_text() + json.dumps(line) + "\n")
  with pytest.raises(CellsError, match=rf"results\.jsonl:4: .*{words}"):
    stress_cells.read(path, MEASURE)
  path.write_text("no JSON\n" + path.read_text())
  with pytest.raises(CellsError, match=r"results\.jsonl:1: not JSON"):
    stress_cells.read(path, MEASURE)


def page(result=RESULT, **more):
  pictures = {"clean": IMAGE, "fog": IMAGE}
  arguments = {"facts": {"weights": "w"}, "notes": ("One note.",), **more}
  return stress_writers.page(result, 50, 0.1, pictures, **arguments)


def test_the_page_has_every_figure_curve_and_picture():
  text = page()
  found = Page(text)
  for words in (
    *("digits | test", "clean top-1 of 50 images 80.0%", "mean of 2 corruptions at 2 severities"),
    *("of the clean accuracy is kept 68.8%", "One note.", "weights w", "at severity 3"),  # .55 / .8
  ):
    assert words in found.text, words
  rows = [Page(row).text for row in re.findall(r"<tr><th scope=\"row\">.*?</tr>", text)]
  assert rows[:3] == [
    "fog 70.0% 50.0% 60.0%",
    "contrast 75.0% 25.0% 50.0%",
    "mean 72.5% 37.5% 55.0%",
  ]
  titles = re.findall(r"<title>(accuracy, severity [^<]*)</title>", text)
  assert titles[:3] == [f"accuracy, severity {s}" for s in ("0: 80%", "1: 72.5%", "3: 37.5%")]
  assert len(titles) == 9
  assert found.text.count("chance 10%") == 3
  assert found.tags.count("img") == 2
  assert [t for t in ("weather", "digital") if t in found.words] == ["weather", "digital"]
  assert "noise" not in found.words


def test_one_corruption_has_no_mean_of_several():
  result = stress.StressResult("x", 0.0, (2,), {"fog": (0.0,)})
  text = page(result)
  assert "mean of 1 corruption at 1 severity" in Page(text).text
  assert "is kept" not in text
  assert [name for name, *_ in stress_writers._rows(result)] == ["fog"]


def test_nothing_is_fetched_and_hostile_names_stay_names(tmp_path):
  result = dataclasses.replace(RESULT, name=EVIL)
  text = page(result, facts={EVIL: EVIL}, notes=(EVIL,))
  found = Page(text)
  assert "script" not in found.tags
  assert "<script>alert('x')</script>" in found.text
  assert not re.search(r"https?:|url\(|@import", text)
  written = stress_writers.markdown(result, 50, {"weights": EVIL}, (EVIL,))
  assert "<script>" not in written
  assert "\\ud800" in written
  written.encode()


def test_markdown_and_csv_have_the_same_figures(tmp_path):
  paths = stress_writers.write(tmp_path, RESULT, 50, 0.1, {}, {"weights": "w"}, ("A note.",))
  assert [p.name for p in paths] == ["stress.html", "stress.md", "stress.csv"]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["stress.csv", "stress.html", "stress.md"]
  assert "pictures" not in Page(paths[0].read_text()).ids
  assert paths[1].read_text().splitlines() == [
    "# digits \\| test: accuracy under corruption",
    "",
    "- clean: 80.00 % of 50 images",
    "- mean over 2 corruptions and 2 severities: 55.00 %",
    "",
    "| corruption | severity 1 | severity 3 | mean |",
    "| --- | ---: | ---: | ---: |",
    "| fog | 70.00 | 50.00 | 60.00 |",
    "| contrast | 75.00 | 25.00 | 50.00 |",
    "| mean | 72.50 | 37.50 | 55.00 |",
    "",
    "- A note.",
    "- weights: w",
  ]
  assert list(csv.reader(paths[2].read_text().splitlines())) == [
    ["corruption", "group", "severity", "accuracy", "images"],
    ["clean", "", "0", "0.8", "50"],
    ["fog", "weather", "1", "0.7", "50"],
    ["fog", "weather", "3", "0.5", "50"],
    ["contrast", "digital", "1", "0.75", "50"],
    ["contrast", "digital", "3", "0.25", "50"],
  ]


def test_the_published_mean_stands_where_all_of_it_was_measured():
  accuracy = dict.fromkeys(corruptions.NAMES, (0.5,) * 5)
  result = stress.StressResult("x", 1.0, (1, 2, 3, 4, 5), {**accuracy, "saturate": (0.0,) * 5})
  assert "- mean over the 15 published corruptions: 50.00 %" in stress_writers.markdown(
    result, 9, {}
  )
  assert "mean of the 15 published corruptions" in page(result)
  assert "published" not in stress_writers.markdown(RESULT, 9, {})
