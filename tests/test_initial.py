"""Training that starts from weights: what is taken over, what is refused by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

import clip_jax
from clip_jax import config as c
from clip_jax import hosts, inference, initial, sharding, train, train_step
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.interop import exports, sources

MODEL = c.Model(
  image=c.Vision(resolution=32, patch=8, width=16, layers=1, heads=2),
  text=c.Text(context_length=20, vocab_size=600, width=16, layers=1, heads=2),
  embed_dim=8,
)
CONFIG = c.Config(
  name="tuned",
  seed=3,
  steps=2,
  model=MODEL,
  data=c.Data(sources=(c.Source("scenes", records=60),), batch_pairs=16, tokenizer="train"),
  optimizer=c.Optimizer(warmup_steps=1),
)
TOKENIZER = tokenizer_lib.train(["a red circle", "a blue square", "two green rings"], 540)


def _weights(model=MODEL, tokenizer=TOKENIZER, log_scale=3.0):
  """Weights that no seed gives."""
  config = dataclasses.replace(CONFIG, model=model)
  fresh = train_step.init_state(config, sharding.make_mesh(devices=jax.devices()[:1]))
  params = jax.tree.map(lambda x: x * 1.5 + 0.1, fresh.params) | {"log_scale": jnp.array(log_scale)}
  stats = jax.tree.map(lambda x: x + 0.25, fresh.batch_stats)
  return inference.Clip(config, params, tokenizer, batch_stats=stats)


def _from(path, **changes):
  return dataclasses.replace(CONFIG, init=str(path), **changes)


def test_weights_and_vocabulary_are_taken_over(tmp_path):
  model = _weights()
  exports.export(model, tmp_path / "out", "open_clip")
  config, mesh = _from(tmp_path / "out"), sharding.make_mesh()
  state = initial.state(config, mesh)
  jax.tree.map(np.testing.assert_array_equal, state.params, model.params)
  fresh = train_step.init_state(CONFIG, mesh)
  jax.tree.map(np.testing.assert_array_equal, state.opt_state, fresh.opt_state)
  assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, fresh)
  assert initial.vocabulary(config) == TOKENIZER


def test_hosts_look_at_the_weights_together(tmp_path, monkeypatch):
  """The reading of a checkpoint is agreed on: the first host cannot do it for the others."""
  asked: list[c.Config] = []
  monkeypatch.setattr(initial, "vocabulary", asked.append)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  (tmp_path / "tokenizer.json").write_text(TOKENIZER.to_json())  # by the first, meanwhile
  monkeypatch.setattr(hosts, "from_first", lambda data: b"it is not there")
  assert train.workdir_tokenizer(CONFIG, [], tmp_path) == TOKENIZER
  assert asked == [CONFIG]
  monkeypatch.setattr(hosts, "from_first", lambda data: b"")  # later starts
  assert train.workdir_tokenizer(CONFIG, [], tmp_path) == TOKENIZER
  assert len(asked) == 1


def test_running_statistics_are_taken_over(tmp_path):
  image = c.Vision(64, 32, width=4, layers=0, heads=2, blocks=(1, 1, 1, 1))
  model = _weights(dataclasses.replace(MODEL, image=image))
  sources.save(model, tmp_path / "out")
  state = initial.state(
    _from(tmp_path / "out", model=model.config.model), sharding.make_mesh(devices=jax.devices()[:1])
  )
  jax.tree.map(np.testing.assert_array_equal, state.batch_stats, model.batch_stats)


def test_a_run_goes_on_from_them(tmp_path):
  """The first step's loss is that of the weights; after a restart the weights need not be there."""
  model = _weights()
  sources.save(model, tmp_path / "weights")
  config, workdir = _from(tmp_path / "weights"), tmp_path / "run"
  assert train.train(config, workdir, rich.console.Console(quiet=True))
  tuned = clip_jax.load(workdir)
  assert tuned.tokenizer == TOKENIZER
  moved = np.abs(tuned.params["text_projection"] - model.params["text_projection"]).max()
  assert 0 < moved < 2 * CONFIG.optimizer.learning_rate + 1e-4
  longer = dataclasses.replace(config, init="")
  assert train.train(longer, workdir, rich.console.Console(quiet=True))


def test_another_resolution_is_resized(tmp_path):
  sources.save(_weights(), tmp_path / "out")
  image = dataclasses.replace(MODEL.image, resolution=48)
  config = _from(tmp_path / "out", model=dataclasses.replace(MODEL, image=image))
  state = initial.state(config, sharding.make_mesh(devices=jax.devices()[:1]))
  assert state.params["image"]["positional_embedding"].shape == (37, 16)


def test_what_does_not_suit_is_told_together(tmp_path):
  sources.save(_weights(log_scale=4.8), tmp_path / "out")
  other = dataclasses.replace(
    MODEL, activation="gelu", text=dataclasses.replace(MODEL.text, heads=4), compute_dtype="float32"
  )
  config = _from(
    tmp_path / "out",
    model=other,
    data=dataclasses.replace(CONFIG.data, tokenizer="original"),
    preprocess=c.Preprocess(mean=(0.5, 0.5, 0.5)),
  )
  with pytest.raises(ValueError, match=r"^config\.init: .* does not suit this config") as caught:
    initial.state(config, sharding.make_mesh(devices=jax.devices()[:1]))
  for message in (
    "config.model.activation is gelu, theirs is quick_gelu",
    "config.model.text.heads is 4, theirs is 2",
    "config.preprocess.mean is (0.5, 0.5, 0.5), theirs is (0.48",
    "theirs is of their own ('train' takes it)",
    "config.optimizer.max_logit_scale is 100, their logit scale is 121.5",
  ):
    assert message in str(caught.value)
  assert "compute_dtype" not in str(caught.value)


def test_weights_without_a_vocabulary_cannot_train(tmp_path):
  sources.save(_weights(tokenizer=None), tmp_path / "out")
  with pytest.raises(ValueError, match="captions cannot be turned into tokens"):
    initial.state(_from(tmp_path / "out"), sharding.make_mesh(devices=jax.devices()[:1]))


def test_a_locked_image_encoder_stays_bit_for_bit(tmp_path):
  """With decay, half-precision text weights and microbatches. Its gradient: test_gradients.py."""
  model = _weights()
  sources.save(model, tmp_path / "weights")
  options = c.Optimizer(
    warmup_steps=1, lock_image=True, text_weights_dtype="bfloat16", moments_dtype="bfloat16"
  )
  config = _from(tmp_path / "weights", optimizer=options, steps=3, microbatches=2)
  assert train.train(config, tmp_path / "run", rich.console.Console(quiet=True))
  tuned = clip_jax.load(tmp_path / "run")
  locked = lambda params: {k: v for k, v in params.items() if k.startswith("image")}  # noqa: E731
  jax.tree.map(np.testing.assert_array_equal, locked(tuned.params), locked(model.params))
  assert float(tuned.params["log_scale"]) != float(model.params["log_scale"])
  assert np.abs(tuned.params["text_projection"] - model.params["text_projection"]).max() > 1e-4
  unlocked = dataclasses.replace(config, optimizer=dataclasses.replace(options, lock_image=False))
  with pytest.raises(train.TrainingError, match=r"lock_image was True, is False.*accept-changes"):
    train.train(unlocked, tmp_path / "run", rich.console.Console(quiet=True))
  with pytest.raises(ValueError, match=r"lock_image was True, is False: .* as config\.init"):
    train.train(unlocked, tmp_path / "run", rich.console.Console(quiet=True), accept_changes=True)
