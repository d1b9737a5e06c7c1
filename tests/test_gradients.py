"""Loss, gradient and steps: the same on every mesh, and in microbatches as in one pass."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick

from clip_jax import config as c
from clip_jax import gradients, losses, program, sharding, train_step
from clip_jax.data import images
from clip_jax.models import clip, vit

VIT = c.Model(
  image=c.Vision(resolution=16, patch=4, width=16, layers=2, heads=4),
  text=c.Text(context_length=8, vocab_size=40, width=16, layers=2, heads=4),
  embed_dim=8,
)
# In float64 (the text encoder's norms and the softmaxes excepted): rounding noise of float32 puts
# some of a million values on the other side of a ReLU's corner, which turns their gradients on.
RESNET = dataclasses.replace(
  VIT,
  image=c.Vision(32, 32, width=8, layers=0, heads=4, blocks=(1, 1, 1, 1)),
  text=dataclasses.replace(VIT.text, layers=1),
  compute_dtype="float64",
)
SIGLIP = dataclasses.replace(
  VIT,
  image=dataclasses.replace(VIT.image, pooling="map"),
  text=dataclasses.replace(VIT.text, pooling="last"),
  embed_dim=16,
  loss="sigmoid",
)
MODELS = {"vit": VIT, "resnet": RESNET, "siglip": SIGLIP}
MESHES = {
  "data": c.Mesh(),
  "fsdp": c.Mesh(fsdp=8),
  "data x fsdp": c.Mesh(fsdp=4),
  "tensor": c.Mesh(tensor=4),
  "all three": c.Mesh(fsdp=2, tensor=2),
}
STEP_KEY = jax.random.key(7)


def _config(model=VIT, pairs=0, **changes):
  """Adam's epsilon is far above the gradients' rounding noise, of which a small one makes steps."""
  return c.Config(
    steps=100,
    model=model,
    data=c.Data(batch_pairs=pairs or (16 if model.image.blocks else 32)),
    optimizer=c.Optimizer(learning_rate=1e-3, warmup_steps=0, epsilon=1e-3),
    **changes,
  )


def _batch(config, seed=0):
  rng, side = np.random.default_rng(seed), config.model.image.resolution
  pairs, length = config.data.batch_pairs, config.model.text.context_length
  tokens = rng.integers(1, 38, (pairs, length)).astype(np.int32)
  tokens[:, 0], tokens[:, -2], tokens[:, -1] = 38, 39, 0
  return {
    "image": rng.integers(0, 256, (pairs, side, side, 3)).astype(np.uint8),
    "tokens": tokens,
    "bad": np.zeros(pairs, np.int32),
    "stop": np.zeros(pairs, np.int32),
  }


def _precision(model):
  return jax.enable_x64(model.compute_dtype == "float64")


@functools.cache
def _start(model):
  """A state on the host with random weights everywhere: a zero would hide the gradients behind it.

  In float64 where the model computes in it.
  """
  rng = np.random.default_rng(1)
  centres = {"scale": 1, "log_scale": 2, "logit_bias": -2}

  def draw(path, x):
    centre, spread = centres.get(path[-1].key, 0), 0.2 if x.ndim < 2 else 0.3
    return (centre + spread * rng.normal(size=x.shape)).astype(wide(x).dtype)

  def wide(x):
    double = model.compute_dtype == "float64" and x.dtype == np.float32
    return np.zeros(x.shape, np.float64 if double else x.dtype)

  def running(path, x):
    return wide(x) + (path[-1].key == "variance")

  with _precision(model):
    state = train_step.abstract_state(_config(model), sharding.one_device())
  params = jax.tree_util.tree_map_with_path(draw, state.params)
  batch_stats = jax.tree_util.tree_map_with_path(running, state.batch_stats)
  return dataclasses.replace(jax.tree.map(wide, state), params=params, batch_stats=batch_stats)


def _on_mesh(config, devices):
  """(mesh, the start on it)."""
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
  start = _start(config.model)
  where = jax.tree.map(lambda x: x.sharding, sharding.place(start, mesh))
  return mesh, jax.device_put(start, where)


@functools.cache
def _loss_and_gradients(config, compiled=quick.compiled):
  with _precision(config.model):
    mesh, start = _on_mesh(config, devices=8)
    batch = sharding.global_batch(_batch(config), mesh)
    args = (start.params, start.batch_stats, batch, STEP_KEY)
    both = compiled(lambda *args: gradients.loss_and_gradients(config, mesh, *args), *args)
    return jax.device_get(both(*args))


@functools.cache
def _plain(model):
  """(loss, gradient) without mesh, shard_map or microbatches: Figure 3 over the encoders.

  A ResNet in inference mode.
  """
  config, start = _config(model), _start(model)
  batch = _batch(config)
  pixels = images.normalise(
    jnp.asarray(batch["image"]), config.preprocess.mean, config.preprocess.std
  )
  kept_BK = None
  if model.image.patch_dropout:
    kept_BK = gradients._choose(STEP_KEY, 32, *vit.kept_patches(model.image))

  def loss(params):
    variables = {"params": params, "batch_stats": start.batch_stats}
    outputs = clip.CLIP(model).apply(variables, pixels, batch["tokens"], kept_BK=kept_BK)
    if model.loss == "sigmoid":
      return losses.sigmoid(*outputs, params["logit_bias"])[0]
    return losses.contrastive(*outputs)[0]

  with _precision(model):
    return jax.device_get(quick.compiled(jax.value_and_grad(loss), start.params)(start.params))


def _assert_near(got, expected, tolerance, scale=None):
  """Relative to the largest entry of each leaf, of `expected` or of `scale`.

  Softmax ignores the bias of the keys, whose gradient is rounding noise. In all leaves but one it
  lies beside that of the queries or the values, which makes it small.
  """
  paths = jax.tree_util.tree_leaves_with_path(got)
  others = (jax.tree.leaves(tree) for tree in (expected, scale or expected))
  for (path, a), b, of in zip(paths, *others, strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith("attention_pool/k/bias"):
      continue
    error = np.abs(a - b).max() / np.abs(of).max()
    assert error < tolerance, f"{name}: {error}"


class Run(NamedTuple):
  losses: list[float]
  states: list[train_step.TrainState]  # before the first step and after each
  placed: train_step.TrainState  # the last, as it lies on the mesh


@functools.cache
def _ten_steps(config, devices=8):
  with _precision(config.model):
    mesh, state = _on_mesh(config, devices)
    batches = [sharding.global_batch(_batch(config, seed), mesh) for seed in range(10)]
    step = quick.compiled(train_step.make_train_step(config, mesh), state, batches[0])
    run = Run([], [_start(config.model)], state)
    for batch in batches:
      state, metrics = step(state, batch)
      run.losses.append(float(metrics["loss"]))
      run.states.append(jax.tree.map(np.array, state))
    return run._replace(placed=state)


def _run(model, mesh=None):
  """Ten steps; mesh None: on one device."""
  config = _config(MODELS[model])
  if mesh is None:
    return _ten_steps(config, devices=1)
  return _ten_steps(dataclasses.replace(config, mesh=MESHES[mesh]))


def _adam(state):
  return state.opt_state[1][0]


@pytest.mark.parametrize(
  ("model", "mesh"),
  [
    *((model, mesh) for model in ("vit", "resnet") for mesh in MESHES if mesh != "data x fsdp"),
    ("siglip", "all three"),
  ],
)
def test_ten_steps_agree_with_one_device(model, mesh):
  """Every loss, gradient, moment, running statistic and parameter.

  The first moment after one step is a tenth of the gradient. Parameters agree to 1e-4 of how far
  their leaf moved, which was some 1e-2: the last bits of numbers near 1.
  """
  one, many = _run(model), _run(model, mesh)
  _assert_near(_adam(many.states[1]).mu, _adam(one.states[1]).mu, 2e-5)
  np.testing.assert_allclose(many.losses, one.losses, rtol=1e-6)
  last, expected = many.states[10], one.states[10]
  _assert_near(_adam(last).mu, _adam(expected).mu, 2e-5)
  _assert_near(_adam(last).nu, _adam(expected).nu, 2e-5)
  _assert_near(last.batch_stats, expected.batch_stats, 1e-6)
  moved = jax.tree.map(np.subtract, expected.params, one.states[0].params)
  _assert_near(last.params, expected.params, 1e-4, moved)


@pytest.mark.parametrize("model", ["vit", "resnet"])
def test_the_moments_lie_where_their_weights_do(model):
  placed = _run(model, "all three").placed
  where = lambda tree: jax.tree.map(lambda x: x.sharding, tree)  # noqa: E731
  assert where(_adam(placed).mu) == where(_adam(placed).nu) == where(placed.params)
  qkv = placed.params["text"]["transformer"]["blocks"]["attention"]["qkv"]["kernel"]
  assert math.prod(qkv.sharding.shard_shape(qkv.shape)) == qkv.size / 4


@pytest.mark.parametrize("model", ["vit", "siglip"])
def test_one_device_has_the_gradient_of_a_plain_computation(model):
  loss, expected = _plain(MODELS[model])
  one = _run(model)
  np.testing.assert_allclose(one.losses[0], loss, rtol=1e-6)
  _assert_near(jax.tree.map(lambda x: 10 * x, _adam(one.states[1]).mu), expected, 1e-5)


@pytest.mark.parametrize(
  ("model", "mesh", "microbatches", "remat", "patch_dropout"),
  [
    ("vit", "data", 2, "none", 0.0),
    ("vit", "fsdp", 2, "none", 0.0),
    ("vit", "tensor", 4, "none", 0.0),
    ("vit", "all three", 4, "none", 0.0),
    ("siglip", "data x fsdp", 2, "none", 0.0),
    ("vit", "data", 2, "full", 0.0),
    ("vit", "tensor", 2, "tuned", 0.0),
    ("vit", "all three", 2, "dots", 0.0),
    ("vit", "fsdp", 2, "none", 0.5),
    ("vit", "data", 4, "tuned", 0.5),
  ],
)
def test_microbatches_have_the_gradient_of_the_whole_batch(
  model, mesh, microbatches, remat, patch_dropout
):
  """On every mesh, with every remat (in a scan over the layers), patch dropout, and both."""
  model = MODELS[model]
  model = dataclasses.replace(
    model, image=dataclasses.replace(model.image, patch_dropout=patch_dropout)
  )
  loss, expected = _plain(model)
  model = dataclasses.replace(model, scan_layers=remat != "none", remat=remat)
  got, got_gradients = _loss_and_gradients(
    _config(model, mesh=MESHES[mesh], microbatches=microbatches)
  )
  np.testing.assert_allclose(got.loss, loss, rtol=1e-6)
  _assert_near(got_gradients, expected, 1e-5)


def test_a_batch_of_32768_in_microbatches_has_the_gradient_of_one_pass():
  """Both in the ring, as all logits would take 4 GB and as much again for their gradient."""
  model = dataclasses.replace(
    VIT,
    image=c.Vision(resolution=8, patch=8, width=8, layers=1, heads=1),
    text=c.Text(context_length=5, vocab_size=40, width=8, layers=1, heads=1),
  )
  config = _config(model, pairs=32768, loss=c.Loss("ring", chunk=32))

  def optimised(function, *args):
    """A billion logits are worth it."""
    return jax.jit(function).lower(*args).compile({"xla_backend_optimization_level": 3})

  whole, expected = _loss_and_gradients(config, optimised)
  parts, got = _loss_and_gradients(dataclasses.replace(config, microbatches=8), optimised)
  assert whole.loss > 10
  np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-6)
  np.testing.assert_allclose(parts.figures.accuracy, whole.figures.accuracy)
  _assert_near(got, expected, 1e-5)


def test_patch_dropout_looks_at_the_kept_patches_alone():
  """Half of them, others for every image; a change in the rest changes nothing."""
  image = dataclasses.replace(VIT.image, patch_dropout=0.5)
  model = dataclasses.replace(VIT, image=image)
  assert vit.kept_patches(image) == (8, 16)
  kept_BK = np.asarray(gradients._choose(jax.random.key(0), 32, 8, 16))
  assert all(len(set(row)) == 8 for row in kept_BK.tolist())
  assert len({tuple(sorted(row)) for row in kept_BK.tolist()}) > 20
  pixels = np.random.default_rng(0).normal(size=(32, 16, 16, 3)).astype(np.float32)

  def encode(pixels, kept_BK=None):
    apply, variables = clip.CLIP(model).apply, {"params": _start(model).params}
    return apply(variables, pixels, True, kept_BK, method="encode_image")

  some = quick.compiled(encode, pixels, kept_BK)
  kept = np.stack([np.isin(np.arange(16), row) for row in kept_BK])
  mask = kept.reshape(32, 4, 1, 4, 1, 1).repeat(4, 2).repeat(4, 4).reshape(32, 16, 16, 1)
  few = some(pixels, kept_BK)
  np.testing.assert_array_equal(few, some(np.where(mask, pixels, np.float32(9)), kept_BK))
  assert np.abs(few - some(np.where(mask, np.float32(9), pixels), kept_BK)).max() > 0.01
  all_16 = np.tile(np.arange(16), (32, 1))
  of_all = quick.compiled(encode, pixels, all_16)(pixels, all_16)
  np.testing.assert_allclose(of_all, quick.compiled(encode, pixels)(pixels), atol=1e-6)


def _locked(config, **changes):
  optimizer = dataclasses.replace(config.optimizer, lock_image=True)
  return dataclasses.replace(config, init="weights", optimizer=optimizer, **changes)


@pytest.mark.parametrize("model", MODELS)
def test_a_locked_image_encoder_has_no_gradient_and_the_rest_the_plain_one(model):
  """Without mesh or shard_map, by all parameters, a ResNet in inference mode; in microbatches."""
  config, batch_stats = _config(MODELS[model]), _start(MODELS[model]).batch_stats
  loss, expected = _plain(MODELS[model])
  expected = {k: v for k, v in expected.items() if k not in ("image", "image_projection")}
  for changes in ({}, {"mesh": MESHES["all three"], "microbatches": 2}):
    got, got_gradients = _loss_and_gradients(_locked(config, **changes))
    np.testing.assert_allclose(got.loss, loss, rtol=1e-6)
    assert set(got_gradients) == set(expected)
    _assert_near(got_gradients, expected, 1e-5)
    jax.tree.map(np.testing.assert_array_equal, got.batch_stats, batch_stats)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_locked_image_encoder_costs_no_backward_pass(microbatches):
  """By the compiler's count, which would be over twice as large with it."""
  image = c.Vision(resolution=32, patch=4, width=64, layers=4, heads=4)
  model = dataclasses.replace(VIT, image=image, scan_layers=False)
  config, mesh = _locked(_config(model), microbatches=microbatches), sharding.one_device()
  params = jax.eval_shape(lambda: train_step._init(config, jax.random.key(0))).params
  args = (params, {}, _batch(config), STEP_KEY)
  compiled = quick.compiled(lambda *args: gradients.loss_and_gradients(config, mesh, *args), *args)
  found = program.work(compiled.as_text())
  flops = compiled.cost_analysis()["flops"] * found.loops
  expected = 32 * clip.training_flops_per_pair(model, lock_image=True)
  expected += (
    (microbatches > 1) * 32 * (clip.flops_per_pair(model) - clip.flops_per_image(model))
  )  # the texts once more
  assert expected * 0.95 < flops < expected * 1.25
  assert 32 * clip.training_flops_per_pair(model) > 2 * expected
