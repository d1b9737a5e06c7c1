import io
import json
import re

import numpy as np
import pytest
import rich.console
from known_model import KnownModel, captioned, labelled, unit
from parsed_page import EVIL, Page

from clip_jax.evaluation import embedding_map, report, retrieval, zero_shot

RUN = report.RunSummary(
  "a run", {"steps": "1,500 of 256 pairs"}, {"wall time": "9 min"}, ("Held out means held out.",)
)


def zero_shot_result(classes=10, n=40, name="shapes", held_out=(), word="class"):
  rng = np.random.default_rng(0)
  names = [f"{word} {c}" for c in range(classes)]
  text_CE = unit(rng.normal(size=(classes, 8)))
  labels = rng.integers(classes, size=n)
  image_NE = unit(text_CE[labels] + 1.2 * unit(rng.normal(size=(n, 8))))
  model = KnownModel(image_NE, {f"a {c}": e for c, e in zip(names, text_CE, strict=True)}, 8)
  source = labelled([names[c] for c in labels])
  return zero_shot.evaluate(model, source, names, ["a {}"], 8, name=name, held_out=held_out)


def retrieval_result(captions=tuple("abcdefghijkl"), name="search"):
  rows = np.eye(len(captions))
  model = KnownModel(rows, dict(zip(captions, rows, strict=True)), 8)
  return retrieval.evaluate(model, captioned([[c] for c in captions]), 8, name=name, examples=12)


def curve(steps=5):
  return [
    {"step": 20 * s, "train/loss": 5 / s, "train/accuracy": None, "eval/shapes/top1": s / 9}
    for s in range(1, steps + 1)
  ]


def page(tmp_path, run=RUN, curves=(), results=(), points=None):
  path = tmp_path / "report.html"
  report.write(path, run, curves, results, points)
  assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
  return Page(path.read_text(encoding="utf-8"))


def test_the_page_tells_all_that_was_found(tmp_path):
  shapes = zero_shot_result(held_out=("class 3",))
  results = [shapes, retrieval_result()]
  found = page(tmp_path, RUN, curve(), results, embedding_map.project(shapes, "pca"))
  assert found.ids == ["results", "run", "curves", "zero-shot", "retrieval", "map"]
  links = {value.removeprefix("#") for _, name, value in found.attributes if name == "href"}
  assert links == set(found.ids)
  for words in (
    *("a run", "1,500 of 256 pairs", "9 min", "Held out means held out."),
    *(report.percent(shapes.top1), "out of 10 classes", "ranked 1 out of 10", "held out"),
    *("✓ right", "✗ wrong", "✓ true", "Commonest mistakes", "✓ match", "✗ other"),
    *("centred on its own mean", "12 images", "Loss"),
  ):
    assert words in found.text, words
  assert found.tags.count("img") == 12 + 12 * 5


def test_nothing_is_fetched_and_nothing_runs(tmp_path):
  found = page(tmp_path, RUN, curve(), [zero_shot_result(), retrieval_result()])
  assert "script" not in found.tags
  for tag, name, value in found.attributes:
    assert not name.startswith("on")
    if name == "src":
      assert value.startswith("data:image/"), tag
    if name == "href":
      assert value.startswith("#")
  text = (tmp_path / "report.html").read_text(encoding="utf-8")
  assert not re.search(r"https?:|url\(|@import", text)
  assert "default-src 'none'" in text


def test_hostile_strings_stay_strings(tmp_path):
  captions = [EVIL, *"abcdefghijk"]
  shapes = zero_shot_result(name=EVIL, word=EVIL, held_out=(f"{EVIL} 1",))
  run = report.RunSummary(EVIL, {EVIL: EVIL}, {EVIL: EVIL}, (EVIL,))
  lines = [{"step": 1, f"eval/{EVIL}/top1": 0.5, "train/loss": 1.0}]
  results = [shapes, retrieval_result(captions, name=EVIL)]
  found = page(tmp_path, run, lines, results, embedding_map.project(shapes, "pca"))
  assert "script" not in found.tags
  assert found.words.count("alert('x')") == 0  # never an element of its own
  assert "<script>alert('x')</script> &" in found.text
  assert "{{ 7 * 7 }}" in found.text


@pytest.mark.parametrize(
  ("curves", "results"),
  [([], []), ([{"step": 1}], []), ([], [retrieval_result()]), (curve(1), [zero_shot_result(2, 3)])],
)
def test_whatever_is_missing_is_left_out(tmp_path, curves, results):
  found = page(tmp_path, report.RunSummary("bare", {}), curves, results)
  assert ("results" in found.ids) == bool(results)
  assert "map" not in found.ids


def test_many_classes_and_long_runs_make_a_page_of_bounded_size(tmp_path):
  found = page(tmp_path, RUN, curve(20_000), [zero_shot_result(100, 250)])
  assert "out of 100 classes" in found.text
  assert (tmp_path / "report.html").stat().st_size < 1_500_000


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path):
  page(tmp_path)
  before = (tmp_path / "report.html").read_bytes()
  with pytest.raises(AttributeError):
    report.write(tmp_path / "report.html", RUN, [], [object()])
  assert (tmp_path / "report.html").read_bytes() == before
  with pytest.raises(OSError, match="nowhere"):
    report.write(tmp_path / "nowhere" / "report.html", RUN, [], [])


def test_the_table_has_every_figure():
  out = io.StringIO()
  results = [zero_shot_result(name="[red]shapes"), zero_shot_result(3, 8), retrieval_result()]
  rich.console.Console(file=out, width=120).print(report.table(results))
  text = out.getvalue()
  assert "[red]shapes" in text
  assert text.count("top-5") == 1  # of three classes the first five are all
  for words in ("top-1", "mean per class", "text to image R@10", "image to text R@1", "33.3%"):
    assert words in text
  assert report.percent(results[0].top1) in text


@pytest.mark.parametrize(
  ("share", "words"),
  [
    *((0.0, "0.0%"), (1.0, "100.0%"), (0.9996, ">99.9%"), (0.5, "50.0%"), (0.0123, "1.2%")),
    *((0.00123, "0.12%"), (0.00001, "<0.01%")),
  ],
)
def test_percent_never_rounds_to_what_is_not_so(share, words):
  assert report.percent(share) == words


@pytest.mark.parametrize(
  ("share", "n", "low", "high"),
  [
    (0.5, 100, 0.4038, 0.5962),
    (0.0, 10, 0.0, 0.2775),
    (1.0, 10, 0.7225, 1.0),
    (0.2, 30, 0.0951, 0.3731),
  ],
)
def test_wilson_interval(share, n, low, high):
  assert report.wilson(share, n) == pytest.approx((low, high), abs=1e-4)


def test_metrics_of_results_are_json(tmp_path):
  for result in (zero_shot_result(), retrieval_result()):
    assert json.loads(json.dumps(result.metrics())) == result.metrics()
