import json
import math

import numpy as np
import pytest
from known_model import SIDE, KnownModel, labelled, unit

from clip_jax.evaluation import zero_shot
from clip_jax.evaluation.stress import corruptions
from clip_jax.evaluation.stress import curves as stress

NAMES = ("fog", "contrast")


def by_cell(table, seen=None):
  """An `evaluate` that looks its answer up, and notes what it was asked."""

  def evaluate(source):
    cell = (getattr(source, "name", "clean"), getattr(source, "severity", 0))
    if seen is not None:
      seen.append(cell)
    return table[cell]

  return evaluate


TABLE = {
  ("clean", 0): 0.8,
  **{("fog", s): v for s, v in zip(corruptions.SEVERITIES, (0.7, 0.6, 0.5, 0.4, 0.3), strict=True)},
  **{("contrast", s): 0.2 for s in corruptions.SEVERITIES},
}


def run(names=NAMES, severities=corruptions.SEVERITIES, table=TABLE, seen=None, **more):
  return stress.stress(
    by_cell(table, seen), labelled(["a"]), lambda image: image, names, severities, **more
  )


def test_the_means_by_hand():
  seen = []
  result = run(seen=seen, name="digits")
  assert seen == [("clean", 0), *((n, s) for n in NAMES for s in (1, 2, 3, 4, 5))]
  assert result.accuracy == {"fog": (0.7, 0.6, 0.5, 0.4, 0.3), "contrast": (0.2,) * 5}
  assert result.means == pytest.approx({"fog": 0.5, "contrast": 0.2})
  assert result.by_severity == pytest.approx((0.45, 0.4, 0.35, 0.3, 0.25))
  assert result.mean == pytest.approx(0.35)
  assert result.relative(result.mean) == pytest.approx(0.35 / 0.8)
  metrics = result.metrics()
  assert metrics["fog/3"] == 0.5
  assert metrics["contrast/mean"] == pytest.approx(0.2)
  assert "published_mean" not in metrics
  assert json.loads(json.dumps(metrics)) == metrics


def test_the_published_mean_is_over_fifteen_and_five():
  table = {("clean", 0): 1.0}
  table |= {(n, s): 0.5 for n in corruptions.NAMES for s in corruptions.SEVERITIES}
  table |= {("saturate", s): 0.0 for s in corruptions.SEVERITIES}  # not among the fifteen
  table["fog", 5] = 0.2
  result = run(corruptions.NAMES, table=table)
  assert result.published_mean == pytest.approx((15 * 5 * 0.5 - 0.3) / 75)
  assert run(corruptions.NAMES, (1, 2, 3, 4), table=table).published_mean is None


def test_what_was_measured_is_not_measured_again():
  noted = {}
  run(note=lambda n, s, accuracy: noted.__setitem__((n, s), accuracy))
  assert noted == TABLE
  seen, half = [], dict(list(noted.items())[:7])
  result = run(seen=seen, done=half)
  assert seen == list(TABLE)[7:]
  assert result == run()


def test_severities_come_in_order_whatever_order_was_asked():
  result = run(severities=(5, 1))
  assert (result.severities, result.accuracy["fog"]) == ((1, 5), (0.7, 0.3))


def test_clean_accuracy_zero_has_no_relative():
  result = run(table={**TABLE, ("clean", 0): 0.0})
  assert math.isnan(result.metrics()["relative"])


@pytest.mark.parametrize(
  ("names", "severities", "words"),
  [
    *(((), (1,), "corruptions"), (("fog",), (), "severities"), (("fog", "fog"), (1,), "once")),
    *((("fog",), (1, 1), "once"), (("rain",), (1,), "no such one"), (("fog",), (0, 1), "1 to 5")),
  ],
)
def test_bad_lists_are_refused_before_anything_is_measured(names, severities, words):
  seen = []
  with pytest.raises(corruptions.CorruptionError, match=words):
    run(names, severities, seen=seen)
  assert seen == []


@pytest.mark.parametrize("accuracy", [math.nan, 1.2, -0.1])
def test_an_accuracy_that_is_none_is_refused_by_its_cell(accuracy):
  with pytest.raises(corruptions.CorruptionError, match="fog, severity 4: accuracy"):
    run(table={**TABLE, ("fog", 4): accuracy})
  with pytest.raises(corruptions.CorruptionError, match="fog, severity 4: accuracy"):
    run(done={**TABLE, ("fog", 4): accuracy})


def test_the_curves_start_at_the_clean_accuracy():
  panels = stress.panels(run(), chance=0.1)
  assert [p.title for p in panels] == ["mean of 2 corruptions", "fog", "contrast"]
  fog = panels[1]
  assert (fog.along, fog.evaluation) == ("severity", True)
  (series,) = fog.series
  assert [p.title for p in series.points] == [
    f"accuracy, severity {s}: {100 * v:.3g}%" for s, v in enumerate((0.8, 0.7, 0.6, 0.5, 0.4, 0.3))
  ]
  assert [label for _, label in fog.x_ticks] == ["0", "1", "2", "3", "4", "5"]
  assert fog.chance is not None
  assert fog.chance[1] == "chance 10%"


class Brightness(KnownModel):
  """Tells bright images from dark ones by their mean, whatever else is in them."""

  def encode_image(self, images):
    means = images.reshape(len(images), -1).mean(1) / 255
    return unit(np.stack([means, 0.5 + 0 * means], axis=1))


def test_a_model_of_known_behaviour_fails_where_it_must():
  """It calls bright what is over 128: brightness turns its dark images, contrast none of them."""
  texts = {"bright": unit([2.0, 1.0]), "dark": unit([1.0, 2.0])}
  model = Brightness([], texts, 2)
  levels = [230, 100, 200, 60]
  source = labelled(["bright", "dark", "bright", "dark"])
  source.records = [
    type(r)(r.key, np.full((SIDE, SIDE, 3), level, np.uint8), (), r.label)
    for r, level in zip(source.records, levels, strict=True)
  ]

  def evaluate(cell):
    return zero_shot.evaluate(model, cell, list(texts), ["{}"], 2).top1

  result = stress.stress(evaluate, source, model.fit, ("brightness", "contrast"), (1, 2, 3))
  # 100 / 255 + 0.2 and 60 / 255 + 0.3 are over a half, 100 / 255 + 0.1 is not
  assert result.clean == 1.0
  assert result.accuracy == {"brightness": (1.0, 0.75, 0.5), "contrast": (1.0, 1.0, 1.0)}
