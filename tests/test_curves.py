import itertools
import math
import re

import pytest

from clip_jax.evaluation import curves


def lines(values, key="train/loss"):
  return [{"step": 20 * (i + 1), key: value} for i, value in enumerate(values)]


def xy(path):
  return [tuple(map(float, p.split())) for p in re.findall(r"[\d.]+ [\d.]+", path)]


@pytest.mark.parametrize(
  ("low", "high", "count"),
  [
    (0, 1, 4),
    (0, 100, 4),
    (3, 7.2, 4),
    (0, 1e-3, 4),
    (-2, 5, 3),
    (5, 5, 4),
    (0, 0, 4),
    (1e9, 3e9, 5),
  ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, count):
  found = curves.ticks(low, high, count)
  assert found[0] <= low <= high <= found[-1]
  assert 2 <= len(found) <= 2 * count + 2
  steps = {f"{b - a:.6g}" for a, b in itertools.pairwise(found)}
  assert len(steps) == 1
  step = float(steps.pop())
  assert step / 10 ** math.floor(math.log10(step)) == pytest.approx(1, abs=4.01)
  if high > low:
    assert found[0] > low - step
    assert found[-1] < high + step


@pytest.mark.parametrize(
  ("value", "words"),
  [
    *((0, "0"), (2.3149, "2.31"), (94.12, "94.1"), (1234.4, "1,234"), (25300, "25.3k")),
    *((1.2e6, "1.2M"), (5e-4, "5e-4"), (2.5e-5, "2.5e-5"), (0.001, "0.001"), (-3.0, "-3")),
  ],
)
def test_numbers_are_short(value, words):
  assert curves.number(value) == words


def test_a_curve_runs_through_its_values():
  (panel,) = curves.panels(lines([4.0, 2.0, 1.0]))
  (series,) = panel.series
  assert (panel.title, series.last, series.band) == ("Loss", "1", "")
  assert [p.title for p in series.points] == [
    "Loss, step 20: 4",
    "Loss, step 40: 2",
    "Loss, step 60: 1",
  ]
  assert [(p.x, p.y) for p in series.points] == xy(series.line)
  y_of = {label: y for y, label in panel.y_ticks}
  assert series.points[0].y == y_of["4"]
  assert series.points[2].y == y_of["1"]
  xs = [p.x for p in series.points]
  assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
  assert xs[2] == curves.WIDTH - curves.RIGHT


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_value_that_is_not_finite_leaves_a_gap(value):
  (panel,) = curves.panels(lines([4.0, 3.0, value, 2.0, 1.0]))
  assert panel.series[0].line.count("M") == 2
  assert len(panel.series[0].points) == 4
  assert panel.series[0].last == "1"


def test_long_curves_are_averaged_in_a_band_of_their_extremes():
  values = [float(i % 10) for i in range(5000)]
  (panel,) = curves.panels(lines(values))
  (series,) = panel.series
  assert len(series.points) <= 120
  y_of = {label: y for y, label in panel.y_ticks}
  band_y = [y for _, y in xy(series.band)]
  assert min(band_y) < y_of["7.5"]
  assert max(band_y) == y_of["0"]
  assert "steps 20 to 840, mean: 4." in series.points[0].title


def test_missing_keys_give_no_panel_and_unknown_ones_are_passed_over():
  assert curves.panels([]) == []
  assert curves.panels([{"step": 5, "seconds/total": 3.0}, {"train/loss": 1.0}]) == []
  assert curves.panels(lines([None, None])) == []
  found = curves.panels(lines([1.0], "train/accuracy") + lines([1.0], "train/mystery"))
  assert [p.title for p in found] == ["In-batch accuracy"]


def test_one_point_and_constant_values_are_no_problem():
  for values in ([3.0], [0.0], [0.0, 0.0], [-1.0, -1.0]):
    (panel,) = curves.panels(lines(values))
    assert all(0 <= p.y <= curves.HEIGHT for s in panel.series for p in s.points)
  (panel,) = curves.panels([{"step": 0, "train/loss": 1.0}])
  assert curves.LEFT <= panel.series[0].points[0].x <= curves.WIDTH


def test_tasks_have_a_panel_each_with_their_chance_level():
  found = curves.panels(
    [
      {
        "step": s,
        "eval/a/b/top1": 0.5,
        "eval/a/b/top5": 0.9,
        "eval/a/b/chance": 0.1,
        "eval/a/b/n": 9,
      }
      for s in (100, 200)
    ]
    + [{"step": 200, "eval/r/text_to_image_R@1": 0.3, "eval/r/image_to_text_R@1": 0.2}]
  )
  assert [(p.title, p.evaluation) for p in found] == [("a/b", True), ("r", True)]
  assert [s.name for s in found[0].series] == ["top-1", "top-5"]
  assert [s.last for s in found[0].series] == ["50%", "90%"]
  assert found[0].chance[1] == "chance 10%"
  assert found[1].chance is None
  assert [label for _, label in found[0].y_ticks] == ["0%", "25%", "50%", "75%", "100%"]
