import json
import math

import numpy as np
import pytest
import scipy.stats
from known_model import KnownModel, labelled, unit

from clip_jax.evaluation import encoding, zero_shot
from clip_jax.evaluation.overlap import effect as overlap_effect
from clip_jax.evaluation.overlap.effect import Selection, effect


def test_the_figures_by_hand():
  """8 of 10 right in Overlap, 45 of 90 in Clean: All is 53 %, 3 points over Clean."""
  found = effect("birds", 8, 10, 45, 90)
  assert (found.n, found.share, found.accuracy) == (100, 0.1, 0.53)
  assert (found.overlap_accuracy, found.clean_accuracy) == (0.8, 0.5)
  assert found.inflation == pytest.approx(0.03)
  assert found.difference == pytest.approx(0.3)
  # of 10 tosses of a coin: 45 + 10 + 1 of 1,024 outcomes have 8 heads or more
  assert found.p_value == pytest.approx(56 / 1024)
  low, high = found.interval
  # Clopper and Pearson: the tails at either end are a quarter of a per cent
  assert scipy.stats.binom.sf(7, 10, low) == pytest.approx(0.0025)
  assert scipy.stats.binom.cdf(8, 10, high) == pytest.approx(0.0025)
  assert not found.differs
  metrics = found.metrics()
  assert (metrics["overlap_low"], metrics["overlap_high"]) == (low, high)
  assert json.loads(json.dumps(metrics)) == metrics


@pytest.mark.parametrize("counts", [(3, 12, 400, 988), (12, 12, 100, 300), (0, 5, 1, 9)])
def test_the_tests_are_those_of_the_beta_distribution(counts):
  found = effect("x", *counts)
  right, n, clean = counts[0], counts[1], counts[2] / counts[3]
  assert found.p_value == pytest.approx(scipy.stats.binom.sf(right - 1, n, clean))
  want = (
    scipy.stats.beta.ppf(0.0025, right, n - right + 1) if right else 0.0,
    scipy.stats.beta.ppf(0.9975, right + 1, n - right) if right < n else 1.0,
  )
  assert found.interval == pytest.approx(want)
  assert found.differs == (not want[0] <= clean <= want[1])


def test_many_images_tell_a_difference_both_ways():
  better, worse = effect("b", 700, 1000, 5000, 10000), effect("w", 300, 1000, 5000, 10000)
  assert better.differs
  assert worse.differs
  assert better.p_value < 1e-30
  assert worse.p_value == pytest.approx(1)  # one-tailed: doing worse is no sign of memory
  assert worse.inflation < 0 < better.inflation


def test_without_overlap_or_without_clean_there_is_nothing_to_compare():
  none = effect("none", 0, 0, 45, 90)
  assert (none.share, none.accuracy, none.inflation) == (0, 0.5, 0)
  assert math.isnan(none.overlap_accuracy)
  assert math.isnan(none.p_value)
  assert all(map(math.isnan, none.interval))
  assert not none.differs
  every = effect("all", 8, 10, 0, 0)
  assert (every.share, every.accuracy) == (1, 0.8)
  assert math.isnan(every.inflation)
  assert math.isnan(every.p_value)
  assert not every.differs


@pytest.mark.parametrize("counts", [(1, 0, 0, 1), (0, 1, 2, 1), (-1, 1, 0, 1), (0, 0, 0, 0)])
def test_impossible_counts_are_refused(counts):
  with pytest.raises(encoding.EvaluationError, match="x: "):
    effect("x", *counts)


def world():
  """Twelve images of three classes; the model has those right whose number is in `right`."""
  names = ["cat", "dog", "owl"]
  labels = [names[i % 3] for i in range(12)]
  right = {0, 1, 2, 4, 5, 7, 11}
  rows = [np.eye(3)[i % 3 if i in right else (i + 1) % 3] for i in range(12)]
  model = KnownModel(unit(rows), dict(zip(names, np.eye(3), strict=True)), 4)

  def evaluate(source):
    return zero_shot.evaluate(model, source, names, ["{}"], 4).top1

  return evaluate, labelled(labels), right


def test_measuring_overlap_and_clean_apart():
  evaluate, source, right = world()
  seen = {0, 1, 3, 11}
  overlapping = np.array([i in seen for i in range(12)])
  found = overlap_effect.measure(evaluate, source, overlapping, "pets")
  assert found == effect("pets", len(seen & right), 4, len(right - seen), 8)
  assert found.accuracy == pytest.approx(evaluate(source))
  nothing = overlap_effect.measure(evaluate, source, np.zeros(12, bool))
  assert nothing == effect("", 0, 0, 7, 12)


def test_a_figure_that_is_no_share_of_images_is_refused():
  _, source, _ = world()
  with pytest.raises(encoding.EvaluationError, match="plain accuracy"):
    overlap_effect.measure(lambda cell: 0.437, source, np.arange(12) < 4, "pets")
  with pytest.raises(encoding.EvaluationError, match="plain accuracy"):
    overlap_effect.measure(lambda cell: math.nan, source, np.arange(12) < 4, "pets")
  for wrong in (np.zeros(11, bool), np.zeros(12)):
    with pytest.raises(encoding.EvaluationError, match="12 records"):
      overlap_effect.measure(lambda cell: 1.0, source, wrong, "pets")


def test_a_selection_is_the_records_asked_for():
  source = labelled("abcd")
  chosen = Selection(source, np.array([3, 1]))
  assert [chosen[i].key for i in range(len(chosen))] == ["key3", "key1"]
  assert chosen.locate(0) == "shard-7, record 3"
  prints = {Selection(source, own).fingerprint for own in ([3, 1], [1, 3], [1], [])}
  assert len(prints) == 4
