"""Loss and gradient: the same on every mesh, and in microbatches as in one pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax import config as c
from clip_jax import gradients, losses, program, sharding, train_step
from clip_jax.data import images
from clip_jax.models import clip, vit

VIT = c.Model(
  image=c.Vision(resolution=16, patch=4, width=16, layers=2, heads=4),
  text=c.Text(context_length=8, vocab_size=40, width=16, layers=2, heads=4),
  embed_dim=8,
)
RESNET = dataclasses.replace(
  VIT, image=c.Vision(32, 32, width=8, layers=0, heads=4, blocks=(1, 1, 1, 1))
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


def _config(model=VIT, **changes):
  return c.Config(
    steps=100,
    model=model,
    data=c.Data(batch_pairs=32),
    optimizer=c.Optimizer(learning_rate=1e-3, warmup_steps=0),
    **changes,
  )


def _batch(config, seed=0):
  rng, side = np.random.default_rng(seed), config.model.image.resolution
  tokens = rng.integers(1, 38, (32, 8)).astype(np.int32)
  tokens[:, 0], tokens[:, 6], tokens[:, 7] = 38, 39, 0
  return {
    "image": rng.integers(0, 256, (32, side, side, 3)).astype(np.uint8),
    "tokens": tokens,
    "bad": np.zeros(32, np.int32),
    "stop": np.zeros(32, np.int32),
  }


def _warm(params):
  """Without zeros: a bottleneck's last scale starts at zero, which stops its gradients."""
  return jax.tree.map(lambda x: x + 0.02 * np.sin(np.arange(x.size)).reshape(x.shape), params)


@functools.cache
def _variables(model):
  """On the host; the options of a run change no initial value."""
  state = train_step.init_state(_config(model), sharding.one_device())
  return jax.device_get((_warm(jax.device_get(state.params)), state.batch_stats))


@functools.cache
def _loss_and_gradients(config, devices=8):
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
  plain = dataclasses.replace(
    config.model,
    image=dataclasses.replace(config.model.image, patch_dropout=0.0),
    scan_layers=False,
    remat="none",
  )
  variables = _variables(plain)
  where = jax.tree.map(lambda x: x.sharding, sharding.place(variables, mesh))
  batch = sharding.global_batch(_batch(config), mesh)
  both = jax.jit(lambda *args: gradients.loss_and_gradients(config, mesh, *args))
  return jax.device_get(both(*jax.device_put(variables, where), batch, jax.random.key(7)))


def _assert_near(got, expected, tolerance):
  """Relative to the largest entry of each leaf."""
  leaves = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True)
  for (path, a), b in leaves:
    name = jax.tree_util.keystr(path)
    if "attention" in name and "bias" in name:
      continue  # softmax ignores the bias of the keys: rounding noise
    error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)
    assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize(
  ("model", "mesh"),
  [
    *(("vit", mesh) for mesh in MESHES if mesh != "data x fsdp"),
    *(("resnet", "data x fsdp"), ("resnet", "all three"), ("siglip", "all three")),
  ],
)
def test_every_mesh_agrees_with_one_device(model, mesh):
  config = _config(MODELS[model])
  one, one_gradients = _loss_and_gradients(config, devices=1)
  many, many_gradients = _loss_and_gradients(dataclasses.replace(config, mesh=MESHES[mesh]))
  np.testing.assert_allclose(many.loss, one.loss, rtol=1e-6)
  tolerance = 1e-3 if model == "resnet" else 1e-5  # a ReLU's corner
  _assert_near(many_gradients, one_gradients, tolerance)
  _assert_near(many.batch_stats, one.batch_stats, 1e-5)


@pytest.mark.parametrize("model", ["vit", "resnet"])
@pytest.mark.parametrize("mesh", ["all three"])
def test_ten_steps_agree_with_one_device(model, mesh):
  """Loss and parameters, the optimizer's state sharded beside them."""

  def ten_steps(config, devices):
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
    state, step = train_step.init_state(config, mesh), train_step.make_train_step(config, mesh)
    losses = []
    for seed in range(10):
      state, metrics = step(state, sharding.global_batch(_batch(config, seed), mesh))
      losses.append(float(metrics["loss"]))
    return losses, state

  config = _config(MODELS[model])
  one_losses, one = ten_steps(config, 1)
  many_losses, many = ten_steps(dataclasses.replace(config, mesh=MESHES[mesh]), 8)
  np.testing.assert_allclose(many_losses, one_losses, rtol=2e-3 if model == "resnet" else 2e-5)
  qkv = many.params["text"]["transformer"]["blocks"]["attention"]["qkv"]["kernel"]
  assert not qkv.sharding.is_fully_replicated
  moments = [x for x in jax.tree.leaves(many.opt_state) if x.shape == qkv.shape]
  assert len(moments) >= 2
  assert all(x.sharding == qkv.sharding for x in moments)
  for name in ("image_projection", "text_projection", "log_scale"):
    if name in one.params:
      np.testing.assert_allclose(many.params[name], one.params[name], atol=2e-4)


@pytest.mark.parametrize(
  ("model", "mesh", "microbatches"),
  [("vit", "data", 2), ("vit", "all three", 4), ("siglip", "data x fsdp", 2)],
)
def test_microbatches_have_the_gradient_of_the_whole_batch(model, mesh, microbatches):
  config = _config(MODELS[model], mesh=MESHES[mesh])
  whole, whole_gradients = _loss_and_gradients(config)
  parts, parts_gradients = _loss_and_gradients(
    dataclasses.replace(config, microbatches=microbatches)
  )
  np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-6)
  np.testing.assert_allclose(parts.accuracy, whole.accuracy)
  _assert_near(parts_gradients, whole_gradients, 1e-5)


@pytest.mark.parametrize("remat", ["tuned", "full"])
def test_microbatches_go_with_remat_scan_and_patch_dropout(remat):
  image = dataclasses.replace(VIT.image, patch_dropout=0.5)
  config = _config(dataclasses.replace(VIT, image=image, scan_layers=True))
  whole = _loss_and_gradients(config)
  model = dataclasses.replace(config.model, remat=remat)
  parts = _loss_and_gradients(dataclasses.replace(config, model=model, microbatches=4))
  np.testing.assert_allclose(parts[0].loss, whole[0].loss, rtol=1e-6)
  _assert_near(parts[1], whole[1], 1e-5)


def test_a_plain_computation_has_the_same_value_and_gradient():
  """Without mesh, shard_map or microbatches: Figure 3 over the encoders."""
  config = _config()
  (params, _), batch = _variables(VIT), _batch(config)
  preprocess = config.preprocess
  pixels = images.normalise(jnp.asarray(batch["image"]), preprocess.mean, preprocess.std)

  def plain(params):
    return losses.contrastive(*clip.CLIP(VIT).apply({"params": params}, pixels, batch["tokens"]))[0]

  loss, expected = jax.jit(jax.value_and_grad(plain))(params)
  got, got_gradients = _loss_and_gradients(dataclasses.replace(config, microbatches=2))
  np.testing.assert_allclose(got.loss, loss, rtol=1e-6)
  _assert_near(got_gradients, expected, 1e-5)


def test_patch_dropout_looks_at_the_kept_patches_alone():
  """Half of them, others for every image; a change in the rest changes nothing."""
  image = dataclasses.replace(VIT.image, patch_dropout=0.5)
  model = dataclasses.replace(VIT, image=image)
  assert vit.kept_patches(image) == (8, 16)
  kept_BK = np.asarray(gradients._choose(jax.random.key(0), 32, 8, 16))
  assert all(len(set(row)) == 8 for row in kept_BK.tolist())
  assert len({tuple(sorted(row)) for row in kept_BK.tolist()}) > 20
  pixels = np.random.default_rng(0).normal(size=(32, 16, 16, 3)).astype(np.float32)
  params = clip.CLIP(model).init(jax.random.key(1), pixels, _batch(_config())["tokens"])["params"]

  @jax.jit
  def encode(pixels, kept_BK=None):
    apply = clip.CLIP(model).apply
    return apply({"params": params}, pixels, True, kept_BK, method="encode_image")

  kept = np.stack([np.isin(np.arange(16), row) for row in kept_BK])
  mask = kept.reshape(32, 4, 1, 4, 1, 1).repeat(4, 2).repeat(4, 4).reshape(32, 16, 16, 1)
  plain = encode(pixels, kept_BK)
  np.testing.assert_array_equal(plain, encode(np.where(mask, pixels, 9.0), kept_BK))
  assert np.abs(plain - encode(np.where(mask, 9.0, pixels), kept_BK)).max() > 0.01
  all_16 = np.tile(np.arange(16), (32, 1))
  np.testing.assert_allclose(encode(pixels, all_16), encode(pixels), atol=1e-6)


def _locked(config, **changes):
  optimizer = dataclasses.replace(config.optimizer, lock_image=True)
  return dataclasses.replace(config, init="weights", optimizer=optimizer, **changes)


@pytest.mark.parametrize("model", MODELS)
def test_a_locked_image_encoder_has_no_gradient_and_the_rest_the_plain_one(model):
  """Without mesh or shard_map, by all parameters, a ResNet in inference mode; in microbatches."""
  config, batch = _config(MODELS[model]), _batch(_config(MODELS[model]))
  params, batch_stats = _variables(MODELS[model])
  pixels = images.normalise(
    jnp.asarray(batch["image"]), config.preprocess.mean, config.preprocess.std
  )

  def plain(params):
    variables = {"params": params, "batch_stats": batch_stats}
    outputs = clip.CLIP(MODELS[model]).apply(variables, pixels, batch["tokens"])
    if model == "siglip":
      return losses.sigmoid(*outputs, params["logit_bias"])[0]
    return losses.contrastive(*outputs)[0]

  loss, expected = jax.jit(jax.value_and_grad(plain))(params)
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
  both = jax.jit(lambda *args: gradients.loss_and_gradients(config, mesh, *args))
  rng = jax.eval_shape(lambda: jax.random.key(0))
  compiled = both.lower(params, {}, _batch(config), rng).compile()
  found = program.work(compiled.as_text())
  flops = compiled.cost_analysis()["flops"] * found.loops
  expected = 32 * clip.training_flops_per_pair(model, lock_image=True)
  expected += (
    (microbatches > 1) * 32 * (clip.flops_per_pair(model) - clip.flops_per_image(model))
  )  # the texts once more
  assert expected * 0.95 < flops < expected * 1.25
  assert 32 * clip.training_flops_per_pair(model) > 2 * expected
