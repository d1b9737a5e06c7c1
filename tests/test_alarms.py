"""Alarms begin when all of a window's steps have them, and say when they are over."""

import dataclasses
import math
import re

import numpy as np
import pytest

from clip_jax import alarms
from clip_jax import config as c

CONFIG = c.Config(
  model=c.Model(embed_dim=64),
  data=c.Data(batch_pairs=256),
  optimizer=c.Optimizer(warmup_steps=10),
)
WELL = {
  "loss": 2.0,
  "logit_scale": 30.0,
  "image_rank": 20.0,
  "text_rank": 15.0,
  "gradient_norm": 1.0,
  "gradient_norm_sigma": 0.5,
}


def _told(changes, steps, config=CONFIG, watch=None):
  """The alarms of some steps whose metrics differ from a healthy run's by `changes`."""
  watch = watch or alarms.Alarms(config)
  return [alarm for step in steps for alarm in watch.step(step, {**WELL, **changes})]


def test_a_healthy_run_is_silent():
  assert _told({}, range(1, 1000)) == []


@pytest.mark.parametrize(
  ("changes", "name", "words"),
  [
    ({"loss": math.log(256) * 0.995}, "blind_loss", "5.517, no better .* than the 5.545 of"),
    ({"loss": math.log(256) * 1.5}, "blind_loss", "the loss is 8.318, no better"),
    ({"logit_scale": 100.0}, "logit_scale_at_cap", "at its cap of 100"),
    ({"image_rank": 1.9}, "image_collapse", "the image embeddings fill few of their 64"),
    ({"text_rank": 0.0}, "text_collapse", r"effective rank 0\.0"),
  ],
)
def test_what_lasts_for_a_window_is_told_once_and_once_when_it_is_over(changes, name, words):
  watch = alarms.Alarms(CONFIG)
  assert _told(changes, range(1, 110), watch=watch) == []  # ten of them are warm-up
  (begun,) = _told(changes, range(110, 500), watch=watch)
  assert (begun.name, begun.on) == (name, True)
  assert begun.text.startswith("step 110: for 100 steps ")
  assert re.search(words, begun.text)
  (over,) = _told({}, range(500, 900), watch=watch)
  assert over == alarms.Alarm(name, False, f"step 500: {name.replace('_', ' ')}: over")
  assert _told(changes, range(900, 999), watch=watch) == []  # a window of its own
  assert len(_told(changes, range(999, 1000), watch=watch)) == 1


def test_a_loss_that_is_clearly_better_is_silent():
  assert _told({"loss": math.log(256) * 0.985}, range(1, 300)) == []


def test_a_wide_embedding_collapses_to_a_hundredth_of_its_directions():
  wide = dataclasses.replace(CONFIG, model=c.Model(embed_dim=512))
  assert len(_told({"image_rank": 5.0}, range(1, 300), wide)) == 1
  assert _told({"image_rank": 5.3}, range(1, 300), wide) == []


def test_spikes_are_told_at_once_but_not_each():
  steps = [step for step in range(1, 400) if _told({"gradient_norm_sigma": 7.0}, [step])]
  assert steps == list(range(11, 400))  # each by itself, past warm-up
  told = _told({"gradient_norm_sigma": 7.0, "gradient_norm": 12.3}, range(1, 400))
  assert [alarm.text.split(":")[0] for alarm in told] == [f"step {s}" for s in (11, 111, 211, 311)]
  assert "12.3 is 7.0 standard deviations" in told[0].text


def test_the_loss_of_a_model_that_tells_no_pairs_apart():
  sigmoid = dataclasses.replace(CONFIG, model=c.Model(loss="sigmoid"))
  p = np.linspace(1e-4, 0.1, 200_001)  # one probability for all pairs, the best by search
  least = (-np.log(p) - 255 * np.log1p(-p)).min()
  assert alarms.blind_loss(sigmoid) == pytest.approx(least, rel=1e-8)
  assert alarms.blind_loss(CONFIG) == math.log(256)
