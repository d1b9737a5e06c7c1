"""The predictive baselines: heads, loss, step and zero-shot scores against hand computation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick
from known_model import Source, picture
from scipy.special import log_softmax

from clip_jax import config as c
from clip_jax import sharding, train_step
from clip_jax.data import records
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.evaluation import encoding, prompts
from clip_jax.models import clip
from tools.predictive import heads, scoring, training
from tools.prepare import fashion_mnist

# Different widths everywhere, so that no two can be taken for each other.
CONFIG = c.Config(
  steps=400,
  model=c.Model(
    image=c.Vision(resolution=16, patch=8, width=24, layers=1, heads=2),
    text=c.Text(context_length=6, vocab_size=40, width=16, layers=2, heads=4),
    embed_dim=12,
  ),
  data=c.Data(sources=(c.Source(),), batch_pairs=16),
  optimizer=c.Optimizer(learning_rate=1e-2, warmup_steps=10, weight_decay=0.0),
  evaluation=c.Evaluation(tasks=(c.Task("t", "zero_shot"),), batch=8),
)
RESNET = dataclasses.replace(
  CONFIG,
  model=dataclasses.replace(
    CONFIG.model,
    image=c.Vision(resolution=32, width=4, layers=0, heads=2, blocks=(1, 1, 1, 1)),
  ),
)
BOTH = ("captions", "bag_of_words")
START, END = 38, 39


def _rows(*captions, length=6):
  """Token rows: start, the caption's ids, end, zeros."""
  rows = [[START, *ids, END] for ids in captions]
  return np.array([row + [0] * (length - len(row)) for row in rows], np.int32)


def _batch(seed=0, pairs=16):
  rng = np.random.default_rng(seed)
  captions = [rng.integers(0, 38, rng.integers(1, 5)).tolist() for _ in range(pairs)]
  return {
    "image": rng.integers(0, 256, (pairs, 16, 16, 3)).astype(np.uint8),
    "tokens": _rows(*captions),
  }


@functools.cache
def _variables(prediction, seed=0):
  """Random ones, biases and gains too: what starts at zero or one hides mistakes."""
  initial = functools.partial(heads.initial, CONFIG.model, prediction)
  variables = quick.compiled(initial, jax.random.key(seed))(jax.random.key(seed))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype("f4"), variables)


@functools.cache
def _start(config, prediction, devices, fsdp=1):
  """The mesh, the start on the host and how it lies on the devices, and the compiled step."""
  mesh = sharding.make_mesh(c.Mesh(fsdp=fsdp), jax.devices()[:devices])
  state = training.init_state(config, prediction, mesh)
  batch = _batch()
  side = config.model.image.resolution
  batch["image"] = np.zeros((16, side, side, 3), np.uint8)
  step = training.make_step(config, prediction, mesh)
  step = quick.compiled(step, state, sharding.global_batch(batch, mesh))
  return mesh, jax.device_get(state), jax.tree.map(lambda x: x.sharding, state), step


def _losses(prediction, batches, devices=1, fsdp=1, config=CONFIG):
  mesh, start, where, step = _start(config, prediction, devices, fsdp)
  state, found = jax.device_put(start, where), []
  for batch in batches:
    state, metrics = step(state, sharding.global_batch(batch, mesh))
    found.append(float(metrics["loss"]))
  return found, jax.device_get(state)


def _score(prediction, x_BD, rows):
  """(log p, what counts) of token rows, by a head with random weights."""
  score = functools.partial(heads.Predictive(CONFIG.model, prediction).apply, method="score")
  args = (_variables(prediction), x_BD, rows)
  return quick.compiled(score, *args)(*args)


# What is predicted of a caption.


def test_what_is_predicted_of_a_caption():
  rows = _rows([5, 7, 5, 9], [0, 0], [])
  assert heads.counted("captions", jnp.asarray(rows)).tolist() == [
    [False, True, True, True, True, True],
    [False, True, True, True, False, False],
    [False, True, False, False, False, False],
  ]
  # the second 5 is the same word again; id 0 is a word where it is no padding
  assert heads.counted("bag_of_words", jnp.asarray(rows)).tolist() == [
    [False, True, True, False, True, False],
    [False, True, False, False, False, False],
    [False] * 6,
  ]


# The heads.


def test_bag_of_words_against_numpy():
  head = jax.tree.map(np.asarray, _variables("bag_of_words")["params"]["head"]["project"])
  x_BD = np.random.default_rng(1).standard_normal((3, 24)).astype(np.float32)
  rows = _rows([5, 7, 5, 9], [11], [0, 3])
  logp, counted = _score("bag_of_words", x_BD, rows)
  found = np.where(counted, logp, 0).sum(axis=1)
  table = log_softmax(x_BD.astype(float) @ head["kernel"] + head["bias"], axis=1)
  wanted = [sum(table[i, w] for w in words) for i, words in enumerate(({5, 7, 9}, {11}, {0, 3}))]
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


def _norm(x, p):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  return x * p["scale"] + p["bias"]


def _decoder_in_numpy(head, image_D, ids):
  """log p(ids[i] | image, ids[:i]) of one caption, by loops over places and heads."""
  x = [np.asarray(image_D, float) @ head["project"]["kernel"] + head["project"]["bias"]]
  x += [head["token_embedding"]["embedding"][i] for i in ids[:-1]]
  x = np.array(x) + head["positional_embedding"][: len(ids)]
  blocks = head["transformer"]["blocks"]
  for layer in range(2):
    p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
    y = _norm(x, p["ln_1"])
    q, k, v = (
      np.einsum("sd,dhk->shk", y, p["attention"]["qkv"]["kernel"][:, i])
      + p["attention"]["qkv"]["bias"][i]
      for i in range(3)
    )
    out = np.zeros_like(x)
    for place in range(len(x)):
      for head_ in range(4):
        logits = k[: place + 1, head_] @ q[place, head_] / 2  # the square root of 16 / 4
        weights = np.exp(log_softmax(logits))
        out[place] += weights @ v[: place + 1, head_] @ p["attention"]["out"]["kernel"][head_]
    x = x + out + p["attention"]["out"]["bias"]
    hidden = _norm(x, p["ln_2"]) @ p["mlp"]["fc"]["kernel"] + p["mlp"]["fc"]["bias"]
    hidden = hidden / (1 + np.exp(-1.702 * hidden))
    x = x + hidden @ p["mlp"]["proj"]["kernel"] + p["mlp"]["proj"]["bias"]
  logits = _norm(x, head["ln_final"]) @ head["token_embedding"]["embedding"].T
  return [log_softmax(logits[i])[token] for i, token in enumerate(ids)]


def test_caption_decoder_against_numpy():
  head = jax.tree.map(lambda x: np.asarray(x, float), _variables("captions")["params"]["head"])
  x_BD = np.random.default_rng(1).standard_normal((3, 24)).astype(np.float32)
  captions = ([5, 7, 5, 9], [11], [0, 3])
  logp, counted = _score("captions", x_BD, _rows(*captions))
  for i, ids in enumerate(captions):
    wanted = _decoder_in_numpy(head, x_BD[i], [*ids, END])
    np.testing.assert_allclose(logp[i][counted[i]], wanted, rtol=1e-4, atol=1e-4)


def test_parameters_by_hand():
  image = 192 * 24 + 24 + 5 * 24 + 4 * 24  # stem, class, positions, two norms
  image += 24 * 72 + 72 + 24 * 24 + 24 + 24 * 96 + 96 + 96 * 24 + 24 + 4 * 24  # one block
  block = 16 * 48 + 48 + 16 * 16 + 16 + 16 * 64 + 64 + 64 * 16 + 16 + 4 * 16
  captions = 24 * 16 + 16 + 40 * 16 + 5 * 16 + 2 * block + 2 * 16
  wanted = {"image": image, "head": captions}
  assert heads.parameter_counts(CONFIG.model, "captions") == wanted
  wanted = {"image": image, "head": 24 * 40 + 40}
  assert heads.parameter_counts(CONFIG.model, "bag_of_words") == wanted


def test_flops_by_hand():
  features = 2 * 4 * 192 * 24 + 8 * 5 * 24**2 + 4 * 25 * 24 + 16 * 5 * 24**2
  assert heads.flops_per_pair(CONFIG.model, "bag_of_words") == features + 2 * 24 * 40
  block = 8 * 5 * 16**2 + 4 * 25 * 16 + 16 * 5 * 16**2
  decoder = 2 * 24 * 16 + 2 * block + 2 * 5 * 16 * 40
  assert heads.flops_per_pair(CONFIG.model, "captions") == features + decoder
  # a ResNet has no projection of its own to leave out, and gives embed_dim features
  found = heads.flops_per_pair(RESNET.model, "bag_of_words")
  assert found == clip.flops_per_image(RESNET.model) + 2 * 12 * 40


@pytest.mark.parametrize("prediction", BOTH)
def test_the_image_encoder_starts_as_the_contrastive_one(prediction):
  mesh = sharding.one_device()
  ours = training.init_state(CONFIG, prediction, mesh).params["image"]
  theirs = train_step.init_state(CONFIG, mesh).params["image"]
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_resnet_learns_and_keeps_running_statistics():
  batch = _batch()
  batch["image"] = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)
  found, state = _losses("bag_of_words", [batch] * 30, config=RESNET)
  assert found[-1] < found[0] - 0.5
  assert np.abs(state.batch_stats["image"]["bn_1"]["mean"]).max() > 0


# Loss and gradient.


def test_loss_by_hand():
  logp = jnp.array([[9.0, -1.0, -3.0, 5.0], [9.0, -4.0, 5.0, 5.0], [9.0, 5.0, 5.0, 5.0]])
  counted = jnp.array([[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
  assert float(training.loss(logp, counted)) == pytest.approx((2 + 4 + 0) / 3)


def test_gradient_of_a_bag_of_words_is_the_softmax_less_the_target():
  x_BD = np.random.default_rng(1).standard_normal((2, 24)).astype(np.float32)
  rows, variables = jnp.asarray(_rows([5, 7, 5], [9])), _variables("bag_of_words")
  model = heads.Predictive(CONFIG.model, "bag_of_words")

  def loss_of(params):
    return training.loss(*model.apply({"params": params}, x_BD, rows, method="score"))

  gradient = quick.compiled(jax.grad(loss_of), variables["params"])(variables["params"])
  found = gradient["head"]["project"]
  head = jax.tree.map(np.asarray, variables["params"]["head"]["project"])
  logits = x_BD.astype(float) @ head["kernel"] + head["bias"]
  error = np.exp(log_softmax(logits, axis=1))
  error[0, [5, 7]] -= 1 / 2
  error[1, 9] -= 1
  np.testing.assert_allclose(found["bias"], error.mean(axis=0), atol=1e-6)
  np.testing.assert_allclose(found["kernel"], x_BD.T @ error / 2, atol=1e-5)


def test_gradient_of_captions_against_finite_differences():
  batch, variables = _batch(pairs=4), _variables("captions")
  image, rows = batch["image"] / np.float32(255) - 0.5, jnp.asarray(batch["tokens"])
  model = heads.Predictive(CONFIG.model, "captions")

  def loss_of(params):
    return training.loss(*model.apply({"params": params}, image, rows))

  both = quick.compiled(jax.value_and_grad(loss_of), variables["params"])
  _, gradient = both(variables["params"])
  rng = np.random.default_rng(2)
  for name in ("image", "head"):  # through the features as well as in the decoder
    along = jax.tree.map(jnp.zeros_like, variables["params"])
    along[name] = jax.tree.map(
      lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), along[name]
    )
    ends = (
      jax.tree.map(lambda x, v, s=sign: x + s * 2e-3 * v, variables["params"], along)
      for sign in (1, -1)
    )
    above, below = (float(both(params)[0]) for params in ends)
    slope = sum(float((g * v).sum()) for g, v in zip(*map(jax.tree.leaves, (gradient, along))))  # noqa: B905
    assert (above - below) / 4e-3 == pytest.approx(slope, rel=0.02, abs=2e-3)


@pytest.mark.parametrize(
  ("prediction", "fsdp"), [("captions", 1), ("captions", 2), ("bag_of_words", 2)]
)
def test_8_devices_agree_with_one(prediction, fsdp):
  batches = [_batch(seed) for seed in range(3)]
  one, _ = _losses(prediction, batches)
  many, _ = _losses(prediction, batches, devices=8, fsdp=fsdp)
  np.testing.assert_allclose(many, one, rtol=2e-5)
  assert len(set(one)) == 3


@pytest.mark.parametrize(("prediction", "floor"), [("captions", 1 / 3), ("bag_of_words", 3 / 2)])
def test_learning_reaches_the_floor_and_not_below(prediction, floor):
  """Two kinds of image; of each caption's two words the image tells one, a coin the other.

  Captions: of three tokens (the end is one) the coin costs log 2. Words: a half for the one, a
  quarter for each side of the coin: (log 2 + log 4) / 2. So the floors are 1/3 and 3/2 of log 2.
  """
  kinds = np.repeat(np.arange(2), 8)
  image = np.where(kinds[:, None, None, None] == 0, 30, 220) * np.ones((16, 16, 16, 3))
  tokens = _rows(*([10 + kind, 20 + i % 2] for i, kind in enumerate(kinds)))
  batch = {"image": image.astype(np.uint8), "tokens": tokens}
  found, _ = _losses(prediction, [batch] * 150)
  assert found[0] > 2.5  # of 40 tokens; a guess costs log 40 = 3.7
  assert floor * np.log(2) - 1e-4 < found[-1] < floor * np.log(2) + 0.05


# Refusals.


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"init": "weights"}, "config.init: 'weights'"),
    ({"microbatches": 2}, "config.microbatches: 2"),
    ({"loss": c.Loss(exchange="ring")}, "config.loss.exchange: 'ring'"),
    ({"model": dataclasses.replace(CONFIG.model, loss="sigmoid")}, "config.model.loss: 'sigmoid'"),
    (
      {"model": dataclasses.replace(CONFIG.model, image=c.Vision(patch_dropout=0.5))},
      "config.model.image.patch_dropout: 0.5",
    ),
    (
      {"model": dataclasses.replace(CONFIG.model, text=c.Text(pooling="last"))},
      "config.model.text.pooling: 'last'",
    ),
    ({"optimizer": c.Optimizer(lock_image=True)}, "config.optimizer.lock_image: True"),
    ({"optimizer": c.Optimizer(moments_dtype="bfloat16")}, "config.optimizer.moments_dtype"),
    ({"optimizer": c.Optimizer(text_weights_dtype="bfloat16")}, "optimizer.text_weights_dtype"),
    ({"optimizer": c.Optimizer(skip_spike_sigma=6)}, "config.optimizer.skip_spike_sigma: 6"),
    ({"evaluation": c.Evaluation()}, "config.evaluation.tasks: 0 are zero-shot"),
    (
      {"evaluation": c.Evaluation(tasks=(c.Task("a"), c.Task("b")))},
      "config.evaluation.tasks: 2 are zero-shot",
    ),
  ],
)
def test_what_the_objectives_do_not_share_is_refused(changes, named):
  with pytest.raises(training.StudyError, match=named):
    training.checked_task(dataclasses.replace(CONFIG, **changes))


def test_every_refusal_is_told_at_once_and_retrieval_is_passed_over():
  with pytest.raises(training.StudyError, match=r"config\.init.*; config\.microbatches"):
    training.checked_task(dataclasses.replace(CONFIG, init="weights", microbatches=2))
  tasks = (c.Task("r", "retrieval"), c.Task("z", "zero_shot"))
  config = dataclasses.replace(CONFIG, evaluation=c.Evaluation(tasks=tasks))
  assert training.checked_task(config) == tasks[1]


# Zero-shot scores.


def test_scores_of_planted_likelihoods():
  """The case that separates the rules: the words of one class are among those of another.

  Class 0 has the prompts "shirt" and "a shirt", class 1 "t shirt" and "a t shirt": words cost 2
  each where they fit, 8 where they do not. Both kinds of image are as frequent in the reference.
  """
  shirt, t_shirt = [-2, -4, -10, -12], [-2, -4, -4, -6]
  found = scoring.class_scores(
    np.array([shirt, t_shirt]),
    np.array([shirt, t_shirt, shirt, t_shirt]),
    np.array([1, 2, 2, 3]),
    np.array([0, 0, 1, 1]),
  )
  np.testing.assert_allclose(found["sum"], [[-3, -11], [-3, -5]])
  np.testing.assert_allclose(found["mean"], [[-2, -4.5], [-2, -2]])
  half = np.log((1 + np.exp(-6)) / 2)  # p(t shirt) over the better of its two values
  np.testing.assert_allclose(found["lift"], [[0, -6 - half], [0, -half]], atol=1e-12)
  assert found["lift"].argmax(axis=1).tolist() == [0, 1]
  assert found["sum"].argmax(axis=1).tolist() == [0, 0]


def test_classes_of_more_names_count_the_same():
  found = scoring.class_scores(
    np.array([[-1, -2, -3]]), np.array([[0, 0, 0]]), np.array([1, 1, 1]), np.array([0, 1, 1])
  )
  np.testing.assert_allclose(found["sum"], [[-1, -2.5]])


TOKENIZER = tokenizer_lib.train(["a red thing", "a blue thing"] * 3, 600)
SCORED = dataclasses.replace(
  CONFIG,
  model=dataclasses.replace(
    CONFIG.model,
    image=dataclasses.replace(CONFIG.model.image, resolution=8, patch=4),
    text=dataclasses.replace(CONFIG.model.text, vocab_size=TOKENIZER.vocab_size),
  ),
)
PROMPTS = prompts.PromptSet(("red", "blue"), ("a {} thing", "{}"))


def _source(labels):
  return Source([records.Record(f"k{i}", picture(i), (), label) for i, label in enumerate(labels)])


def test_prompts_of_every_name_of_a_class():
  named = dataclasses.replace(PROMPTS, synonyms=(("red",), ("blue", "a blue")))
  tokens_PL, class_P = scoring.prompt_tokens(named, TOKENIZER, 6)
  assert class_P.tolist() == [0, 0, 1, 1, 1, 1]
  assert [TOKENIZER.decode(row) for row in tokens_PL] == [
    "a red thing", "red", "a blue thing", "blue", "a a blue thing", "a blue",
  ]  # fmt: skip


@pytest.mark.parametrize("prediction", BOTH)
def test_likelihoods_do_not_depend_on_devices_or_chunks(prediction):
  source = _source(["red"] * 11)
  tokens_PL, _ = scoring.prompt_tokens(PROMPTS, TOKENIZER, 6)
  found = []
  for devices, batch in ((1, 4), (8, 3)):
    evaluation = dataclasses.replace(SCORED.evaluation, batch=batch)
    config = dataclasses.replace(SCORED, evaluation=evaluation)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    state = training.init_state(config, prediction, mesh)
    found.append(scoring.log_likelihoods(config, prediction, mesh, state, tokens_PL, source, 11))
  assert found[0].shape == (11, 4)
  np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
  # and they are those of the model itself
  model, state = heads.Predictive(SCORED.model, prediction), jax.device_get(state)
  image = np.stack([picture(i) for i in range(11)]) / np.float32(255)
  mean, std = (np.array(x, np.float32) for x in (SCORED.preprocess.mean, SCORED.preprocess.std))
  rows = jnp.asarray(np.repeat(tokens_PL[2:3], 11, axis=0))
  args = ({"params": state.params}, (image - mean) / std, rows)
  logp, counted = quick.compiled(model.apply, *args)(*args)
  np.testing.assert_allclose(found[0][:, 2], np.where(counted, logp, 0).sum(1), rtol=1e-4)


def test_accuracy_of_planted_words():
  """A head that says "red" whatever it sees is right on the red ones."""
  mesh = sharding.one_device()
  state = training.init_state(SCORED, "bag_of_words", mesh)
  (red,) = TOKENIZER.encode("red")
  head = jax.tree.map(jnp.zeros_like, state.params["head"])
  head["project"]["bias"] = head["project"]["bias"].at[red].set(3.0)
  state = dataclasses.replace(state, params={**state.params, "head": head})
  tokens_PL, class_P = scoring.prompt_tokens(PROMPTS, TOKENIZER, 6)
  evaluate = functools.partial(
    scoring.accuracies, SCORED, "bag_of_words", mesh, state, tokens_PL, class_P, PROMPTS.classes
  )
  labels = ["red", "blue", "red", "red", "blue"]
  found = evaluate(_source(labels), 0, _source(["red"] * 3))
  assert found["sum"] == found["mean"] == pytest.approx(3 / 5)
  assert set(found) == set(scoring.RULES)
  assert evaluate(_source(labels), 2, _source(["red"] * 3))["sum"] == pytest.approx(1 / 2)
  with pytest.raises(encoding.EvaluationError, match=r"shard-7, record 1: label 'green'"):
    evaluate(_source(["red", "green"]), 0, _source(["red"]))
  unreadable = Source([records.Record("k", b"no image", (), "red")])
  with pytest.raises(encoding.EvaluationError, match="shard-7, record 0: image cannot be decoded"):
    evaluate(unreadable, 0, _source(["red"]))


def test_prompts_say_what_the_captions_say():
  names = prompts.named("fashion_mnist_captions").names
  assert names == tuple((usual,) for usual, _ in fashion_mnist._NOUNS)
  plain = prompts.named("fashion_mnist")
  assert prompts.named("fashion_mnist_captions").classes == plain.classes
  assert prompts.named("fashion_mnist_captions").templates == plain.templates
