"""The step: the same on any number of devices; a gradient that is not finite changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import config as c
from clip_jax import sharding, train_step

CONFIG = c.Config(
  steps=100,
  model=c.Model(
    image=c.Vision(resolution=16, patch=8, width=16, layers=1, heads=2),
    text=c.Text(context_length=8, vocab_size=40, width=16, layers=1, heads=2),
    embed_dim=8,
  ),
  data=c.Data(sources=(c.Source(),), batch_pairs=16),
  optimizer=c.Optimizer(learning_rate=1e-3, warmup_steps=5),
)


def _batch(seed: int, pairs: int = 16):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, 38, (pairs, 8)).astype(np.int32)
  tokens[:, 0], tokens[:, 6], tokens[:, 7] = 38, 39, 0
  return {
    "image": rng.integers(0, 256, (pairs, 16, 16, 3)).astype(np.uint8),
    "tokens": tokens,
    "bad": np.zeros(pairs, np.int32),
    "stop": np.zeros(pairs, np.int32),
  }


def _poisoned(batch):
  """A batch whose gradient is not finite: float pixels are normalised like uint8 ones."""
  image = batch["image"].astype(np.float32)
  image[3, 0, 0, 0] = np.nan
  return {**batch, "image": image}


SIGLIP = dataclasses.replace(
  CONFIG,
  model=c.Model(
    image=dataclasses.replace(CONFIG.model.image, pooling="map"),
    text=dataclasses.replace(CONFIG.model.text, pooling="last"),
    embed_dim=16,
    activation="gelu_tanh",
    norm_epsilon=1e-6,
    loss="sigmoid",
  ),
  optimizer=c.Optimizer(learning_rate=3e-3, warmup_steps=5, max_logit_scale=10.2),
)


HALF = dataclasses.replace(
  CONFIG,
  optimizer=c.Optimizer(
    learning_rate=1e-3, warmup_steps=5, moments_dtype="bfloat16", text_weights_dtype="bfloat16"
  ),
)


@functools.cache
def _mesh_and_step(config, devices):
  """Compiled once for all tests."""
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
  return mesh, train_step.make_train_step(config, mesh)


class Trainer:
  """A fresh state and its step on a mesh of some devices."""

  def __init__(self, config=CONFIG, devices=1):
    self.mesh, self.step_fn = _mesh_and_step(config, devices)
    self.state = train_step.init_state(config, self.mesh)

  def step(self, batch):
    self.state, metrics = self.step_fn(self.state, sharding.global_batch(batch, self.mesh))
    return {name: np.asarray(value) for name, value in metrics.items()}

  def arrays(self):
    return jax.device_get((self.state.params, self.state.opt_state))


def _assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_loss_falls_and_the_metrics_say_so():
  trainer = Trainer()
  history = [trainer.step(_batch(seed=0)) for _ in range(60)]
  assert history[-1]["loss"] < 0.5 * history[0]["loss"]
  assert history[-1]["accuracy"] > history[0]["accuracy"]
  assert history[0]["learning_rate"] == 0
  assert history[5]["learning_rate"] == pytest.approx(1e-3)
  assert history[0]["logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)
  assert int(trainer.state.step) == 60


def test_siglip_trains_on_8_devices():
  """The sigmoid loss falls, its bias moves, and the clip of the scale holds."""
  trainer = Trainer(SIGLIP, devices=8)
  history = [trainer.step(_batch(seed=0)) for _ in range(60)]
  # at the start: 15 pairs a row cost nearly nothing, the matched one about 10
  assert 5 < history[0]["loss"] < 15
  assert history[-1]["loss"] < 0.3 * history[0]["loss"]
  assert history[-1]["accuracy"] > history[0]["accuracy"]
  assert history[0]["logit_scale"] == pytest.approx(10, rel=1e-5)
  assert history[-1]["logit_scale"] == pytest.approx(10.2, rel=1e-5)
  assert float(trainer.state.params["logit_bias"]) > -9.99


@pytest.mark.parametrize("devices", [2, 8])
def test_devices_agree_after_10_steps(devices):
  one, many = Trainer(), Trainer(devices=devices)
  for seed in range(10):
    a, b = one.step(_batch(seed)), many.step(_batch(seed))
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    np.testing.assert_allclose(a["gradient_norm"], b["gradient_norm"], rtol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5),
    _without_key_bias(one.arrays()[0]),
    _without_key_bias(many.arrays()[0]),
  )


def _without_key_bias(params):
  """Softmax ignores the bias of the keys: its gradient is rounding noise, which Adam blows up."""
  for encoder in ("image", "text"):
    bias = params[encoder]["transformer"]["blocks"]["attention"]["qkv"]["bias"]
    params[encoder]["transformer"]["blocks"]["attention"]["qkv"]["bias"] = bias[:, [0, 2]]
  return params


def test_the_same_start_on_any_number_of_devices():
  _assert_equal(Trainer().arrays(), Trainer(devices=8).arrays())


@pytest.mark.parametrize("config", [CONFIG, HALF], ids=["float32", "bfloat16"])
def test_a_step_that_is_not_finite_changes_nothing(config, drill):
  """Drill 15: bit for bit what a run without that batch has."""
  with_bad, without = Trainer(config), Trainer(config)
  for seed in range(8):
    if seed == 4:
      metrics = with_bad.step(_poisoned(_batch(99)))
      assert not np.isfinite(metrics["loss"])
      assert (metrics["skipped"], metrics["skipped_in_row"]) == (1, 1)
      assert (metrics["not_finite_pairs"], metrics["first_not_finite_pair"]) == (1, 3)
    with_bad.step(_batch(seed))
    without.step(_batch(seed))
  ours, theirs = (jax.tree.leaves(trainer.arrays()) for trainer in (with_bad, without))
  differing = sum(not np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
  drill(15, leaves=len(theirs), differing=differing)
  _assert_equal(with_bad.arrays(), without.arrays())
  assert int(with_bad.state.step) == int(without.state.step) + 1
  assert int(with_bad.state.guard.skipped_in_row) == 0


def test_bad_forever_keeps_the_parameters_finite_and_counts():
  """Drill 16, the part of the step: the loop ends the run by `skipped_in_row`."""
  trainer = Trainer()
  trainer.step(_batch(0))
  before = trainer.arrays()
  counts = [trainer.step(_poisoned(_batch(1)))["skipped_in_row"] for _ in range(12)]
  assert counts == list(range(1, 13))
  _assert_equal(trainer.arrays(), before)


def test_bad_records_and_requests_to_stop_are_summed_over_devices():
  batch = _batch(0)
  batch["bad"][[1, 9, 15]] = [2, 1, 3]
  batch["stop"][8:] = 1  # as if the second of two hosts was asked
  metrics = Trainer(devices=8).step(batch)
  assert metrics["bad_by_cause"][:5].tolist() == [13, 1, 1, 1, 0]
  assert metrics["stop"] == 8


def _norms(seed: int, count: int) -> np.ndarray:
  return np.exp(np.random.default_rng(seed).normal(0.5, 0.3, count)).astype(np.float32)


def _judge_all(config, norms):
  """The guard over a sequence of gradient norms: which steps it keeps."""

  def body(guard, norm):
    keep, sigma, guard = train_step.judge(config, guard, jnp.float32(1.0), norm)
    return guard, (keep, sigma)

  return jax.lax.scan(body, train_step.fresh_guard(), jnp.asarray(norms))[1]


def test_spikes_are_skipped_and_normal_steps_are_not(drill):
  """Drill 17: 10 spikes among 10,000 steps of log-normal gradient norms; no false skip."""
  config = dataclasses.replace(CONFIG.optimizer, skip_spike_sigma=6.0)
  norms = _norms(0, 10_000)
  spikes = np.arange(500, 10_000, 950)
  norms[spikes] *= 50
  keep, _ = _judge_all(config, norms)
  skipped = np.flatnonzero(~np.asarray(keep))
  np.testing.assert_array_equal(skipped, spikes)
  both = len(np.intersect1d(skipped, spikes))
  drill(17, spikes=len(spikes), true_skips=both)
  drill(17, normal=10_000 - len(spikes), false_skips=len(skipped) - both)


def test_spikes_are_only_logged_by_default():
  norms = _norms(1, 300)
  norms[200] *= 50
  keep, sigma = _judge_all(CONFIG.optimizer, norms)
  assert np.asarray(keep).all()
  assert float(sigma[200]) > 6


def test_no_spike_is_called_before_the_warm_up_is_over():
  config = dataclasses.replace(CONFIG.optimizer, skip_spike_sigma=6.0, warmup_steps=100)
  norms = _norms(2, 200)
  norms[90] *= 50
  keep, _ = _judge_all(config, norms)
  assert np.asarray(keep).all()


def test_halves_learn_and_stay_halves():
  """In bfloat16: both moments, and the text encoder's matrices; the loss falls as without."""
  trainer, plain = Trainer(HALF), Trainer()
  history = [(trainer.step(_batch(0))["loss"], plain.step(_batch(0))["loss"]) for _ in range(60)]
  assert history[-1][0] < 0.5 * history[0][0]
  np.testing.assert_allclose(*zip(*history, strict=True), rtol=0.1)
  params = trainer.state.params
  assert {str(x.dtype) for x in jax.tree.leaves(params["image"])} == {"float32"}
  matrices = (params["text_projection"], params["text"]["positional_embedding"])
  assert [str(x.dtype) for x in matrices] == ["bfloat16"] * 2
  assert params["text"]["ln_final"]["scale"].dtype == params["log_scale"].dtype == "float32"
  moments = [x for x in jax.tree.leaves(trainer.state.opt_state) if x.ndim]
  assert {str(x.dtype) for x in moments} == {"bfloat16"}
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
  saved = size(plain.state) - size(trainer.state)
  halved = [x for x in jax.tree.leaves(params) if x.dtype == "bfloat16"]
  assert saved == 2 * 2 * sum(x.size for x in jax.tree.leaves(params)) + size(halved)


def _spacings(a, b):
  """How many bfloat16 numbers lie from each of `a` to that of `b`."""

  def ordered(x):
    bits = np.asarray(x).view(np.uint16).astype(np.int64)
    return np.where(bits & 0x8000, 0x8000 - bits, bits)

  return np.abs(ordered(a) - ordered(b))


def test_halves_are_rounded_alike_on_any_mesh():
  """Gradients differ in their last bits, which turns few of the roundings, each by one spacing."""
  config = dataclasses.replace(
    HALF, optimizer=dataclasses.replace(HALF.optimizer, warmup_steps=0), mesh=c.Mesh()
  )
  many = dataclasses.replace(config, mesh=c.Mesh(fsdp=2, tensor=2))
  one, eight = Trainer(config), Trainer(many, devices=8)
  kernel = eight.state.params["text"]["transformer"]["blocks"]["mlp"]["fc"]["kernel"]
  assert not kernel.sharding.is_fully_replicated
  for trainer in (one, eight):
    trainer.step(_batch(0))
  adam = eight.state.opt_state[1][0]
  for moments in (adam.mu, adam.nu):
    moment = moments["text"]["transformer"]["blocks"]["mlp"]["fc"]["kernel"]
    assert moment.sharding == kernel.sharding
  pairs = zip(*(jax.tree.leaves(trainer.arrays()) for trainer in (one, eight)), strict=True)
  apart = [_spacings(a, b).ravel() for a, b in pairs if a.dtype == "bfloat16"]
  apart = np.concatenate(apart)
  assert apart.size > 10_000
  assert (apart == 0).mean() > 0.98
  # but for the biases of keys, whose gradient is rounding noise
  assert (apart > 1).mean() < 0.004


def test_the_start_of_halves_is_the_plain_one_rounded_to_nearest():
  plain, half = Trainer().arrays()[0], Trainer(HALF, devices=8).arrays()[0]
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(b.dtype), b), plain, half)
