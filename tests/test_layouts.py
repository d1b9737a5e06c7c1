"""Figures do not depend on how the work is laid out: batch, devices, mesh (drill 34)."""

import jax
import numpy as np
import pytest

from clip_jax import config as c
from clip_jax import inference, sharding, train_step
from clip_jax.data import scenes
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.evaluation import retrieval, zero_shot

CONFIG = c.Config(
  steps=10,
  model=c.Model(
    image=c.Vision(resolution=32, patch=16, width=16, layers=1, heads=2),
    text=c.Text(context_length=16, vocab_size=600, width=16, layers=1, heads=2),
    embed_dim=12,
  ),
  data=c.Data(sources=(c.Source("scenes"),)),
  optimizer=c.Optimizer(warmup_steps=1),
)
SIZES = (1, 7, 8, 9, 100)
LAYOUTS = (  # devices, mesh, images or texts at a time
  (1, c.Mesh(), 8),
  (1, c.Mesh(), 3),
  (2, c.Mesh(), 16),
  (4, c.Mesh(fsdp=2), 8),
  (8, c.Mesh(fsdp=2, tensor=2), 8),
  (8, c.Mesh(), 100),
)


@pytest.fixture(scope="module")
def model():
  """Random weights, far enough from the usual start that no two cosines are nearly the same."""
  state = train_step.init_state(CONFIG, sharding.make_mesh(devices=jax.devices()[:1]))
  rng = np.random.default_rng(0)
  noise = lambda x: np.asarray(0.3 * rng.normal(size=x.shape), x.dtype)  # noqa: E731
  params = jax.tree.map(lambda x: x + noise(x), state.params)
  drawn = scenes.Scenes("test", 100, 0, 32)
  tokenizer = tokenizer_lib.train([text for i in range(100) for text in drawn[i].captions], 600)
  return inference.Clip(CONFIG, params, tokenizer)


def _figures(model, source, batch, n):
  """All figures of both evaluations over the first `n` records, and how many samples they saw."""
  classified = zero_shot.evaluate(model, source, scenes.COMPOSITIONS, ["a {}"], batch, n)
  found = retrieval.evaluate(model, source, batch, n)
  counted = classified.confusion.sum() + found.images + found.texts
  return {**classified.metrics(), **found.metrics()}, int(counted)


def test_every_layout_gives_the_same_figures(model, drill):
  source = scenes.Scenes("test", 100, 0, 32)
  wanted: dict[int, dict[str, float]] = {}
  for devices, mesh, batch in LAYOUTS:
    spread = inference.spread(model, sharding.make_mesh(mesh, jax.devices()[:devices]))
    for n in SIZES:
      figures, counted = _figures(spread, source, batch, n)
      assert counted == 3 * n
      drill(34, counted=counted, expected=3 * n)
      first = wanted.setdefault(n, figures)
      differences = {name: abs(figures[name] - first[name]) for name in first}
      drill(34, most_spread=max(differences.values()))
      assert figures == first, f"{devices} devices, {mesh}, batch {batch}, {n} records"
  assert 0 < wanted[100]["top5"] < 1  # something that could differ
  assert 0 < wanted[100]["image_to_text_R@10"] < 1
