"""Overlap as files: the pairs to look at, on both sides of the threshold, and the effect."""

import csv
import json
import math
import re

import numpy as np
import pytest
from known_model import Source, picture
from parsed_page import EVIL, Page

from clip_jax.data.records import Record
from clip_jax.evaluation import encoding
from clip_jax.evaluation.overlap import effect as overlap_effect
from clip_jax.evaluation.overlap import search as overlap
from clip_jax.evaluation.overlap import writers as overlap_writers

EFFECT = overlap_effect.effect("pets test", 8, 10, 45, 90)


def matches(distances, key="e", threshold=14.0, n=100):
  """One pair a distance: record i with training record 2 i."""
  pairs = [overlap.Match(i, f"{key}{i}", 2 * i, f"t{2 * i}", d) for i, d in enumerate(distances)]
  return overlap.Matches(tuple(pairs), threshold, n, 300, 4)


def source(n, first=0):
  return Source([Record(f"r{i}", picture(first + i), ()) for i in range(n)])


def sheet(distances, threshold, size):
  return overlap_writers.sheet(matches(distances), threshold, source(9), source(18, 300), size)


@pytest.mark.parametrize(
  ("by", "threshold", "limit"),
  [("hash", 8.0, 14), ("hash", 0.0, 6), ("hash", 31.0, 31), ("embedding", 0.05, 0.15)],
)
def test_the_search_goes_past_the_threshold(by, threshold, limit):
  assert overlap_writers.widened(by, threshold) == pytest.approx(limit)
  assert 0.99 <= overlap_writers.widened("embedding", 0.99) < 1


@pytest.mark.parametrize(
  ("by", "threshold"), [("hash", 8.5), ("hash", 32.0), ("hash", -1.0), ("embedding", 1.0),
                        ("embedding", math.nan), ("embedding", -0.1)],
)  # fmt: skip
def test_thresholds_that_make_no_sense_are_refused(by, threshold):
  with pytest.raises(encoding.EvaluationError, match="threshold"):
    overlap_writers.widened(by, threshold)


def test_pairs_on_both_sides_of_the_threshold_come_nearest_first():
  groups = sheet([5.0, 9.0, 0.0, 8.0, 12.0, 3.0, 8.0, 11.0], 8.0, 2)
  shown = [(g.title, [p.match.distance for p in g.pairs], g.of) for g in groups]
  assert shown == [
    ("Nearest", [0.0, 3.0], 5),
    ("Just under the threshold", [8.0, 8.0], 5),
    ("Just past the threshold", [9.0, 11.0], 3),
  ]
  for group in groups:
    for pair in group.pairs:
      assert pair.counted == (pair.match.distance <= 8.0)
      np.testing.assert_array_equal(pair.image, picture(pair.match.index))
      np.testing.assert_array_equal(pair.train_image, picture(300 + pair.match.train_index))


def test_no_pair_is_shown_twice():
  groups = sheet([0.0, 1.0, 2.0], 8.0, 2)
  assert [[p.match.index for p in g.pairs] for g in groups] == [[0, 1], [2], []]
  groups = sheet([0.0, 1.0], 8.0, 2)
  assert [g.title for g in groups] == ["Nearest", "Just past the threshold"]


def write(tmp_path, effect=EFFECT, key="e", by="hash", distances=(5.0, 9.0, 0.0), **more):
  found, threshold = matches(distances, key), 8.0 if by == "hash" else 0.05
  groups = overlap_writers.sheet(found, threshold, source(9), source(18, 300))
  arguments = {"facts": {"weights": "w"}, "notes": ("One note.",), **more}
  overlap_writers.write(tmp_path, effect, found, groups, by, threshold, **arguments)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["overlap.html", "overlap.json", "pairs.csv"]
  return (tmp_path / "overlap.html").read_text(encoding="utf-8")


def test_the_page_shows_the_pairs_and_the_effect(tmp_path):
  text = write(tmp_path)
  page = Page(text)
  for words in (
    *("have a near duplicate among 300 training images 10.0%", "One note.", "weights w"),
    *("at most 8 bits away", "4 training images could not be read", "does not differ"),
  ):
    assert words in page.text, words
  rows = [Page(row).text for row in re.findall(r"<tr><th scope=\"row\">.*?</tr>", text)]
  assert rows[:8] == [
    "accuracy on All 53.0% 100",
    "accuracy on Clean 50.0% 90",
    "accuracy on Overlap 80.0% 10",
    f"its 99.5% interval {EFFECT.interval[0]:.1%} to {EFFECT.interval[1]:.1%}",
    "share of Overlap 10.0% 10",
    "All - Clean +3.00 points",
    "Overlap - Clean +30.00 points",
    "p-value (Overlap better than Clean) 0.0547",
  ]
  cards = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
  told = [Page(card).text for card in cards]
  assert told == [
    "evaluated: e2 training: t4 ✓ overlap, 0 bits",
    "evaluated: e0 training: t0 ✓ overlap, 5 bits",
    "evaluated: e1 training: t2 ✗ not counted, 9 bits",
  ]
  assert page.tags.count("img") == 6


def test_the_files_for_programs(tmp_path):
  write(tmp_path)
  rows = list(csv.reader((tmp_path / "pairs.csv").read_text().splitlines()))
  assert rows == [
    ["index", "key", "train_index", "train_key", "distance", "counted"],
    ["2", "e2", "4", "t4", "0.0", "yes"],
    ["0", "e0", "0", "t0", "5.0", "yes"],
    ["1", "e1", "2", "t2", "9.0", "no"],
  ]
  found = json.loads((tmp_path / "overlap.json").read_text())
  assert found["p_value"] == pytest.approx(56 / 1024)
  assert (found["right_overlap"], found["overlapping"], found["right_clean"]) == (8, 10, 45)
  assert (found["by"], found["threshold"], found["training_unreadable"]) == ("hash", 8.0, 4)
  assert found["made_by"] == {"weights": "w"}


def test_no_overlap_at_all_is_no_number_and_no_error(tmp_path):
  effect = overlap_effect.effect("x", 0, 0, 3, 9)
  text = write(tmp_path, effect, by="embedding", distances=())
  page = Page(text)
  assert "accuracy on Overlap none 0" in page.text
  assert page.text.count("No pairs at all.") == 2
  assert "p-value (Overlap better than Clean) none" in page.text
  assert "differ" not in page.text.replace("difference", "")
  found = json.loads((tmp_path / "overlap.json").read_text())
  assert (found["overlap"], found["p_value"], found["all"]) == (None, None, pytest.approx(1 / 3))
  assert page.tags.count("img") == 0


def test_distances_of_embeddings_are_no_bits(tmp_path):
  text = write(tmp_path, by="embedding", distances=(0.0312, 0.07))
  assert "✓ overlap, 0.0312" in Page(text).text
  assert "✗ not counted, 0.0700" in Page(text).text


def test_nothing_is_fetched_and_hostile_keys_stay_keys(tmp_path):
  effect = overlap_effect.effect(EVIL, 1, 2, 1, 2)
  text = write(tmp_path, effect, key=EVIL, facts={EVIL: EVIL}, notes=(EVIL,))
  page = Page(text)
  assert "script" not in page.tags
  assert "evaluated: <script>alert('x')</script>" in page.text
  assert not re.search(r"https?:|url\(|@import", text)
  for _, name, value in page.attributes:
    if name == "src":
      assert value.startswith("data:image/")
  assert "\\ud800" in (tmp_path / "pairs.csv").read_text()
