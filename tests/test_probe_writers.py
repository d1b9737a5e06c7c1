"""Probes as files: the cells that a killed run goes on from, the curve, page, Markdown, CSV."""

import csv
import dataclasses
import json
import math
import re

import pytest
from parsed_page import EVIL, Page

from clip_jax.evaluation import curves
from clip_jax.evaluation.probe import cells, drawing, study, writers

MEASURE = cells.Measure("a" * 64, "b" * 64, "c" * 64, "d" * 64, "e" * 64, "projected", "accuracy")
ZERO = cells.Cell(cells.ZERO_SHOT, 0, None, 0.5, 40, 0, None, None, None, "v1", 1.5)
FULL = cells.Cell(cells.FULL, None, None, 0.9, 40, 640, 0.1, 30, True, "v1", 2.0)
FEW = {
  (k, seed): cells.Cell(cells.FEW, k, seed, score, 40, 10 * k, 1.0, 7, True, "v1", 0.5)
  for k, scores in ((1, (0.2, 0.4)), (4, (0.5, 0.7)), (2, (0.4, 0.4)))
  for seed, score in zip((0, 7), scores, strict=True)
}
CELLS = [ZERO, FULL, *FEW.values()]


def found(without=(), shots=(4, 1, 2)):
  known = {cell.key: cell for cell in CELLS if cell.way not in without}
  return study.of_cells(known, "digits | test", "accuracy", 10, shots, (0, 7))


STUDY = found()


def kept(path, some=CELLS, measure=MEASURE):
  for cell in some:
    cells.append(path, cell, measure)


def test_what_is_measured_is_known_again(tmp_path):
  path = tmp_path / "results.jsonl"
  assert cells.read(path, MEASURE) == ({}, "")
  kept(path)
  assert cells.read(path, MEASURE) == ({cell.key: cell for cell in CELLS}, "")
  line = json.loads(path.read_text().splitlines()[1])
  assert (line["way"], line["shots"], line["lambda"]) == ("linear probe", None, 0.1)
  assert line["weights"] == "a" * 64


def test_a_line_cut_by_a_kill_is_measured_again(tmp_path):
  path = tmp_path / "results.jsonl"
  kept(path)
  path.write_bytes(path.read_bytes()[:-9])
  done, cut = cells.read(path, MEASURE)
  assert list(done.values()) == CELLS[:-1]
  assert cut == f"{path}:8: the last line was cut off while it was written and is ignored"
  kept(path, CELLS[-1:])
  assert list(cells.read(path, MEASURE)[0].values()) == CELLS


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(cells.Measure)])
def test_a_file_of_anything_else_is_refused(tmp_path, name):
  path = tmp_path / "results.jsonl"
  kept(path, CELLS[:1])
  kept(path, CELLS[1:], dataclasses.replace(MEASURE, **{name: "other"}))
  words = f"results.jsonl:2: measured with {name} other, now it is {getattr(MEASURE, name)}: give"
  with pytest.raises(cells.CellsError, match=re.escape(words)):
    cells.read(path, MEASURE)


@pytest.mark.parametrize(
  ("cell", "change", "words"),
  [
    *((FULL, {"score": value}, "score is") for value in (1.5, None, True, "x", -0.1)),
    *((FEW[1, 0], {"shots": value}, "shots is") for value in (None, "1", 1.5, -1)),
    *((FEW[1, 0], {"seed": value}, "seed is") for value in (None, False)),
    (FULL, {"way": "guess"}, "way is 'guess'"),
    (FULL, {"shots": 3}, "shots is 3"),
    (FULL, {"lambda": None}, "lambda is None"),
    (ZERO, {"lambda": 1.0}, "lambda is 1.0"),
    (FULL, {"converged": 1}, "converged is 1"),
    (FULL, {"extra": 1}, "wrong or missing: extra"),
  ],
)
def test_a_line_that_is_no_cell_is_named(tmp_path, cell, change, words):
  path = tmp_path / "results.jsonl"
  kept(path, [cell, cell])
  line = {**json.loads(path.read_text().splitlines()[0]), **change}
  path.write_text(path.read_text() + json.dumps(line) + "\n")
  with pytest.raises(cells.CellsError, match=rf"results\.jsonl:3: .*{words}.*remove this line"):
    cells.read(path, MEASURE)
  path.write_text("no JSON\n" + path.read_text())
  with pytest.raises(cells.CellsError, match=r"results\.jsonl:1: not JSON"):
    cells.read(path, MEASURE)


@pytest.mark.parametrize(
  ("score", "shots", "bound"),
  [
    (0.2, 1, "less than"),
    (0.35, math.sqrt(2), ""),  # half way from 1 to 2, over the logarithm
    (0.4, 2, ""),
    (0.45, 2 * 2**0.25, ""),
    (0.75, 16, ""),  # half way from 4 to 64
    (0.9, 64, ""),
    (0.91, 64, "more than"),
  ],
)
def test_how_many_shots_zero_shot_is_worth(score, shots, bound):
  assert STUDY.curve == ((1, pytest.approx(0.3)), (2, 0.4), (4, 0.6), (64, 0.9))
  zero_shot = dataclasses.replace(ZERO, score=score)
  equal = dataclasses.replace(STUDY, zero_shot=zero_shot).equal
  assert equal.bound == bound
  assert equal.shots == pytest.approx(shots)


def test_the_first_of_several_meetings_counts():
  curve = ((1, 0.2), (2, 0.6), (4, 0.4), (16, 0.8))
  assert study.equal_shots(curve, 0.4).shots == pytest.approx(math.sqrt(2))
  assert study.equal_shots(((1, 0.2), (2, 0.2), (4, 0.4)), 0.2) == study.Equal(1, "")


def test_what_is_worth_what_in_words():
  assert [str(study.Equal(n, "")) for n in (1.0, 1.04, 2.83, 99.96, 184.4, 6000)] == [
    *("1", "1", "2.8", "100", "184", "6,000")
  ]
  assert str(study.Equal(64, "more than")) == "more than 64"
  assert writers.equal_words(STUDY) == (
    "Zero-shot is as good as a probe of 2.8 labelled examples a class."
  )
  for score, words in ((0.1, "A probe of 1 a class is better"), (0.95, "better than the probe of")):
    other = dataclasses.replace(STUDY, zero_shot=dataclasses.replace(ZERO, score=score))
    assert words in writers.equal_words(other)
  for other in (found(without=(cells.ZERO_SHOT,)), found(shots=())):
    assert (other.equal, writers.equal_words(other)) == (None, "")


def test_figures_for_a_program():
  figures = STUDY.metrics()
  assert json.loads(json.dumps(figures)) == figures
  assert figures["zero_shot"] == 0.5
  assert figures["linear_probe"] == {
    "score": 0.9,
    "lambda": 0.1,
    "iterations": 30,
    "converged": True,
    "examples": 640,
  }
  assert figures["few_shot"][2] == {
    "shots": 4,
    "mean": pytest.approx(0.6),
    "scores": {"0": 0.5, "7": 0.7},
  }
  assert figures["zero_shot_equals_shots"]["shots"] == pytest.approx(8**0.5)
  bare = found(without=(cells.ZERO_SHOT,), shots=()).metrics()
  assert (bare["zero_shot"], bare["few_shot"], bare["zero_shot_equals_shots"]) == (None, [], None)


def test_the_drawing_by_hand():
  """The plot is 760 x 360 less its margins: 1 stands at 126, 64 at 736; from 20 % to 100 %."""
  drawn = drawing.draw(STUDY)
  step = (736 - 126) / 6  # for each doubling
  assert [(m.x, m.y) for m in drawn.means] == [
    (round(126 + step * k, 1), pytest.approx(314 - (score - 0.2) / 0.8 * 292, abs=0.06))
    for k, score in ((0, 0.3), (1, 0.4), (2, 0.6))
  ]
  assert (drawn.full.x, drawn.full.y) == (736, pytest.approx(314 - 0.7 / 0.8 * 292, abs=0.06))
  assert drawn.x_ticks == (
    *((78, "0"), (126, "1"), (round(126 + step, 1), "2"), (round(126 + 2 * step, 1), "4")),
    (736, "64, all"),
  )
  assert [label for _, label in drawn.y_ticks] == ["20%", "40%", "60%", "80%", "100%"]
  assert drawn.meeting == drawing.Meeting(round(126 + 1.5 * step, 1), "2.8 a class", "start")
  assert drawn.zero_shot == curves.Point(78, 204.5, "zero-shot: 50.0%")
  first, second, third = (m.x for m in drawn.means)
  assert re.findall(r"[\d.]+ ", drawn.band) == [f"{x} " for x in (first, second, third)] + [
    f"{x} " for x in (third, second, first)
  ]
  assert len(drawn.seeds) == 6
  bare = drawing.draw(found(without=(cells.ZERO_SHOT,)))
  assert (bare.zero_shot, bare.meeting, bare.star, bare.x_ticks[0][1]) == (None, None, "", "1")


def test_labels_that_would_stand_too_near_are_left_out():
  few = [study.Shots(k, (FEW[1, 0],)) for k in (1, 2, 3, 4, 60)]
  drawn = drawing.draw(dataclasses.replace(STUDY, few=tuple(few)))
  assert [label for _, label in drawn.x_ticks] == ["0", "1", "2", "3", "4", "64, all"]
  wide = dataclasses.replace(STUDY, few=tuple(few), full=dataclasses.replace(FULL, examples=10**8))
  labels = [label for _, label in drawing.draw(wide).x_ticks]
  assert labels[:3] == ["0", "1", "3"]  # 2 and 4 are 26 units away
  assert labels[-1] == "10M, all"


def test_the_page_has_every_figure():
  text = writers.page(STUDY, {"weights": "w"}, ("One note.",))
  page = Page(text)
  for words in (
    *("digits | test", "accuracy of 40 images, trained on 640", "One note.", "weights w"),
    *("Zero-shot is as good as a probe of 2.8 labelled examples a class.", "0.1", "640 (64.0 a"),
    *("★ zero-shot: 50.0%", "◆ all 640 examples: 90.0%", "does not begin at 0"),
  ):
    assert words in page.text, words
  rows = [Page(row).text for row in re.findall(r"<tr><th scope=\"row\">.*?</tr>", text)]
  assert rows[:3] == [
    *("1 30.0% 20.0% 40.0%", "2 40.0% 40.0% 40.0%", "4 60.0% 50.0% 70.0%"),
  ]
  assert text.count("a class, seed ") == 6
  bare = Page(writers.page(found(without=(cells.ZERO_SHOT,), shots=()), {}))
  assert "Few shots" not in bare.text
  assert "zero-shot" not in bare.text
  without = Page(writers.page(found(without=(cells.ZERO_SHOT,)), {}))
  assert "★" not in without.text


def test_nothing_is_fetched_and_hostile_names_stay_names():
  other = dataclasses.replace(STUDY, name=EVIL)
  text = writers.page(other, {EVIL: EVIL}, (EVIL,))
  page = Page(text)
  assert "script" not in page.tags
  assert "<script>alert('x')</script>" in page.text
  assert not re.search(r"https?:|url\(|@import", text)
  written = writers.markdown(other, {"weights": EVIL}, (EVIL,))
  assert "<script>" not in written
  written.encode()


def test_markdown_and_csv_have_the_same_figures(tmp_path):
  paths = writers.write(tmp_path, STUDY, {"weights": "w"}, ("A note.",))
  assert [p.name for p in paths] == ["probe.html", "probe.md", "probe.csv"]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["probe.csv", "probe.html", "probe.md"]
  assert paths[1].read_text().splitlines() == [
    "# digits \\| test: linear probe",
    "",
    "- metric: accuracy",
    "- zero-shot: 50.00 % of 40 images",
    "- linear probe: 90.00 % of 40 images",
    "- linear probe, training examples: 640 (64.0 a class)",
    "- linear probe, lambda: 0.1",
    "- linear probe, iterations of the last fit: 30",
    "- linear probe, converged: yes",
    "- Zero-shot is as good as a probe of 2.8 labelled examples a class.",
    "",
    "| examples a class | mean | seed 0 | seed 7 |",
    "| --- | ---: | ---: | ---: |",
    "| 1 | 30.00 | 20.00 | 40.00 |",
    "| 2 | 40.00 | 40.00 | 40.00 |",
    "| 4 | 60.00 | 50.00 | 70.00 |",
    "",
    "- A note.",
    "- weights: w",
  ]
  rows = list(csv.DictReader(paths[2].read_text().splitlines()))
  assert [float(row["score"]) for row in rows] == [0.5, 0.2, 0.4, 0.4, 0.4, 0.5, 0.7, 0.9]
  assert rows[0] == {
    "way": "zero-shot",
    "shots": "0",
    "seed": "",
    "metric": "accuracy",
    "score": "0.5",
    "images": "40",
    "examples": "0",
    "lambda": "",
    "iterations": "",
    "converged": "",
  }
  assert (rows[-1]["shots"], rows[-1]["lambda"], rows[-1]["converged"]) == ("", "0.1", "yes")
