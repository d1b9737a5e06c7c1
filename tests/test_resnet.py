"""The modified ResNet against PyTorch: values, gradients, running statistics; on 1 or 8 devices."""

import functools
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick
import rich.console
import torch

import clip_jax
from clip_jax import checkpoint, checksums, optimizer, sharding, train, train_step
from clip_jax import config as c
from clip_jax.evaluation import tasks
from clip_jax.evaluation.paper import published
from clip_jax.models import clip, presets, resnet

F = torch.nn.functional
PUBLISHED = {row["model"]: row for row in published.rows("architectures.csv")}
RESNETS = [name for name in presets.PUBLISHED if name.startswith("RN")]

# The last grid is 3 x 3, the head width 64; stages have one block, two and three.
VISION = c.Vision(resolution=96, patch=32, width=16, layers=0, heads=8, blocks=(2, 1, 3, 1))
EMBED = 24


def _encoder(dtype="float32", **options):
  return resnet.ModifiedResNet(VISION, EMBED, jnp.dtype(dtype), **options)


def _images(batch: int = 4, side: int = 96) -> np.ndarray:
  return np.random.default_rng(0).normal(size=(batch, side, side, 3)).astype(np.float32)


@functools.cache
def _variables():
  """Random weights and statistics everywhere: no zero scale or unit variance hides a term."""
  rng = np.random.default_rng(1)
  scales = {"scale": (1, 0.1), "bias": (0, 0.1), "mean": (0, 0.1), "positional_embedding": (0, 0.1)}

  def draw(path, shape):
    noise, name = rng.normal(size=shape.shape), path[-1].key
    if name == "variance":
      return np.float32(np.exp(0.3 * noise))
    stacked = "blocks" in jax.tree_util.keystr(path)
    centre, spread = scales.get(name, (0, np.prod(shape.shape[stacked:-1]) ** -0.5))
    return np.float32(centre + spread * noise)

  shapes = jax.eval_shape(_encoder().init, jax.random.key(0), _images(1))
  return jax.tree_util.tree_map_with_path(draw, shapes)


class TorchResNet:
  """openai/CLIP's ModifiedResNet in torch.nn.functional, on our weights in float64.

  `stats` moves on as PyTorch's running statistics do when `train`.
  """

  def __init__(self, variables, heads, train):
    self.p = _to_torch(variables["params"])
    self.stats = _to_torch(variables["batch_stats"])
    self.heads, self.train = heads, train
    for leaf in jax.tree.leaves(self.p):
      leaf.requires_grad_()

  def norm(self, x, *path):
    p, stats = _at(self.p, path), _at(self.stats, path)
    running = (stats["mean"], stats["variance"])
    return F.batch_norm(x, *running, p["scale"], p["bias"], self.train, 0.1, 1e-5)

  def conv(self, x, *path, stride=1):
    kernel = _at(self.p, path)["kernel"].permute(3, 2, 0, 1)
    return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

  def block(self, x, stride, *path):
    def cbr(x, n):
      name = lambda kind: (*path[:2], f"{kind}_{n}", *path[2:])  # noqa: E731
      return self.norm(self.conv(x, *name("conv")), *name("bn"))

    y = F.relu(cbr(F.relu(cbr(x, 1)), 2))
    y = cbr(F.avg_pool2d(y, stride) if stride > 1 else y, 3)
    if path[1] == "first":
      x = self.conv(F.avg_pool2d(x, stride) if stride > 1 else x, *path, "shortcut_conv")
      x = self.norm(x, *path, "shortcut_bn")
    return F.relu(x + y)

  def pool(self, x):
    p = self.p["attention_pool"]
    x = x.flatten(2).permute(2, 0, 1)
    x = torch.cat([x.mean(0, keepdim=True), x]) + p["positional_embedding"][:, None]
    width = x.shape[-1]
    matrix = lambda n: p[n]["kernel"].reshape(width, width).T  # noqa: E731
    return F.multi_head_attention_forward(
      x, x, x, width, self.heads, None,
      torch.cat([p[n]["bias"].flatten() for n in "qkv"]), None, None, False, 0.0,
      p["c"]["kernel"].reshape(width, -1).T, p["c"]["bias"],
      need_weights=False, use_separate_proj_weight=True,
      q_proj_weight=matrix("q"), k_proj_weight=matrix("k"), v_proj_weight=matrix("v"),
    )[0][0]  # fmt: skip

  def __call__(self, image):
    x = image.permute(0, 3, 1, 2)
    for n in (1, 2, 3):
      x = F.relu(self.norm(self.conv(x, f"conv_{n}", stride=2 if n == 1 else 1), f"bn_{n}"))
    x = F.avg_pool2d(x, 2)
    for i, blocks in enumerate(VISION.blocks, 1):
      x = self.block(x, 2 if i > 1 else 1, f"stage_{i}", "first")
      for j in range(blocks - 1):
        x = self.block(x, 1, f"stage_{i}", "blocks", j)
    return self.pool(x)


def _to_torch(tree):
  return jax.tree.map(lambda x: torch.tensor(np.asarray(x, np.float64)), tree)


def _at(tree, path):
  """The subtree at a path; a number in it picks that block's views out of stacked leaves."""
  for key in path:
    picks = isinstance(key, int)
    tree = jax.tree.map(lambda x, i=key: x[i], tree) if picks else tree[key]
  return tree


def _assert_near(got, expected, tolerance):
  """Leaf by leaf: the norm of the difference over the norm of what is expected."""

  def near(path, a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.2g}"

  jax.tree_util.tree_map_with_path(near, got, expected)


@functools.cache
def _outputs(training, dtype="float32"):
  """(embeddings, running statistics) of the images."""
  apply = functools.partial(_encoder(dtype).apply, train=training, mutable=["batch_stats"])
  out_BE, changed = quick.compiled(apply, _variables(), _images())(_variables(), _images())
  return out_BE, changed["batch_stats"]


@pytest.mark.parametrize("training", [False, True])
def test_values_and_statistics_equal_pytorch(training):
  oracle = TorchResNet(_variables(), VISION.heads, training)
  with torch.no_grad():
    expected = oracle(torch.tensor(_images(), dtype=torch.float64))
  out_BE, batch_stats = _outputs(training)
  _assert_near(out_BE, expected, 1e-5)
  _assert_near(batch_stats, oracle.stats, 1e-5)
  assert _differs(batch_stats, _variables()["batch_stats"]) == training


@pytest.mark.parametrize("training", [False, True])
def test_gradients_equal_pytorch(training):
  """In float64 (attention's softmax excepted): in float32 some values fall on the other side of a
  ReLU's corner."""
  weight_BE = np.random.default_rng(2).normal(size=(4, EMBED))

  def loss(params, image_BRR3, batch_stats):
    given = {"params": params, "batch_stats": batch_stats}
    out_BE, _ = _encoder("float64").apply(given, image_BRR3, training, mutable=["batch_stats"])
    return (out_BE * weight_BE).sum()

  oracle = TorchResNet(_variables(), VISION.heads, training)
  image = torch.tensor(_images(), dtype=torch.float64, requires_grad=True)
  (oracle(image) * torch.tensor(weight_BE)).sum().backward()
  with jax.enable_x64(True):
    v, image_BRR3 = jax.tree.map(lambda x: np.asarray(x, np.float64), (_variables(), _images()))
    args = (v["params"], image_BRR3, v["batch_stats"])
    gradients = quick.compiled(jax.grad(loss, (0, 1)), *args)(*args)
  expected = jax.tree.map(lambda x: x.grad, oracle.p)
  for tree in (gradients[0], expected):
    del tree["attention_pool"]["k"]["bias"]  # softmax ignores it: rounding noise
  _assert_near(gradients, (expected, image.grad), 1e-5)


def _differs(a, b) -> bool:
  different = jax.tree.map(lambda x, y: bool((np.asarray(x) != np.asarray(y)).any()), a, b)
  return any(jax.tree.leaves(different))


def test_the_running_variance_is_the_unbiased_one():
  """One norm over 6 values a channel, by PyTorch; flax's own would be off by 6/5."""
  x = np.random.default_rng(3).normal(2, 3, (3, 1, 2, 5)).astype(np.float32)
  norm = resnet.BatchNorm(True, jnp.dtype("float32"))
  variables = norm.init(jax.random.key(0), x)
  module = torch.nn.BatchNorm2d(5)
  module.load_state_dict(module.state_dict())
  for _ in range(3):
    out, changed = norm.apply(variables, x, mutable=["batch_stats"])
    variables = {**variables, **changed}
    expected = module(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
  # init in training mode has seen the batch once already
  module(torch.tensor(x).permute(0, 3, 1, 2))
  np.testing.assert_allclose(out, expected.detach(), atol=1e-6)
  np.testing.assert_allclose(variables["batch_stats"]["mean"], module.running_mean, rtol=1e-6)
  np.testing.assert_allclose(variables["batch_stats"]["variance"], module.running_var, rtol=1e-6)


def test_one_value_a_channel_has_no_variance():
  norm = resnet.BatchNorm(True, jnp.dtype("float32"), name="bn_1")
  with pytest.raises(ValueError, match=r"bn_1: no variance .* larger batch"):
    norm.init(jax.random.key(0), jnp.ones((1, 1, 1, 5)))


def _open_clip_resnet():
  """open_clip's ModifiedResNet; its file alone, because the package needs torchvision."""
  folder = importlib.util.find_spec("open_clip").submodule_search_locations[0]
  package, utils = types.ModuleType("open_clip_alone"), types.ModuleType("open_clip_alone.utils")
  package.__path__ = []
  utils.freeze_batch_norm_2d = utils.feature_take_indices = None  # imported there, not called
  name = "open_clip_alone.modified_resnet"
  spec = importlib.util.spec_from_file_location(name, f"{folder}/modified_resnet.py")
  module = importlib.util.module_from_spec(spec)
  sys.modules |= {"open_clip_alone": package, "open_clip_alone.utils": utils, name: module}
  spec.loader.exec_module(module)
  return module.ModifiedResNet


def _open_clip_state(variables):
  """Our weights under openai/CLIP's names."""
  state = {}

  def put(name, params, stats):
    if "scale" in params:
      state[f"{name}.weight"], state[f"{name}.bias"] = params["scale"], params["bias"]
      state[f"{name}.running_mean"] = stats["mean"]
      state[f"{name}.running_var"] = stats["variance"]
      state[f"{name}.num_batches_tracked"] = torch.tensor(0)
    else:
      state[f"{name}.weight"] = params["kernel"].permute(3, 2, 0, 1)

  params, all_stats = _to_torch(variables["params"]), _to_torch(variables["batch_stats"])
  for name, value in params.items():
    if name.startswith(("conv", "bn")):
      put(name.replace("_", ""), value, all_stats.get(name))
  for i, blocks in enumerate(VISION.blocks, 1):
    for j in range(blocks):
      where = (f"stage_{i}", "first") if j == 0 else (f"stage_{i}", "blocks", j - 1)
      stats = _at(all_stats, where)
      for name, value in _at(params, where).items():
        short = {"shortcut_conv": "downsample.0", "shortcut_bn": "downsample.1"}
        theirs = short.get(name, name.replace("_", ""))
        put(f"layer{i}.{j}.{theirs}", value, stats.get(name))
  pool = params["attention_pool"]
  state["attnpool.positional_embedding"] = pool["positional_embedding"]
  for n in "qkv":
    state[f"attnpool.{n}_proj.weight"] = pool[n]["kernel"].flatten(1).T
    state[f"attnpool.{n}_proj.bias"] = pool[n]["bias"].flatten()
  state["attnpool.c_proj.weight"] = pool["c"]["kernel"].flatten(0, 1).T
  state["attnpool.c_proj.bias"] = pool["c"]["bias"]
  return state


def test_values_equal_open_clip():
  variables, image_BRR3 = _variables(), _images()
  theirs = _open_clip_resnet()(list(VISION.blocks), EMBED, VISION.heads, 96, VISION.width).double()
  theirs.load_state_dict(_open_clip_state(variables), strict=True)
  for training in (False, True):
    theirs.train(training)
    with torch.no_grad():
      expected = theirs(torch.tensor(image_BRR3, dtype=torch.float64).permute(0, 3, 1, 2))
    _assert_near(_outputs(training)[0], expected, 1e-5)


@functools.cache
def _value_statistics_and_gradient(**options):
  def loss(params):
    given = {**_variables(), "params": params}
    out_BE, changed = _encoder(**options).apply(given, _images(), True, mutable=["batch_stats"])
    return (out_BE * jnp.arange(float(EMBED))[None]).sum(), changed

  params = _variables()["params"]
  aux, gradients = quick.compiled(jax.value_and_grad(loss, has_aux=True), params)(params)
  del gradients["attention_pool"]["k"]["bias"]
  return aux, gradients


@pytest.mark.parametrize(
  "option", [{"scan_layers": True}, {"remat": "full"}, {"remat": "dots"}, {"remat": "tuned"}]
)
def test_options_change_nothing(option):
  aux, gradients = _value_statistics_and_gradient(**option)
  plain_aux, plain_gradients = _value_statistics_and_gradient()
  _assert_near(aux, plain_aux, 1e-5)
  _assert_near(gradients, plain_gradients, 1e-2)  # a ReLU's corner; see above
  shapes = jax.eval_shape(_encoder(**option).init, jax.random.key(3), _images(1))
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, _variables())


@pytest.mark.parametrize(
  ("remat", "more"),
  [
    ("dots", 0),
    ("tuned", 5 + 4),  # the last convolution of five blocks, the shortcuts of four
    ("full", 3 * 5 + 4),
  ],
)
def test_convolutions_that_the_backward_pass_repeats(remat, more):
  config = c.Vision(resolution=32, width=8, layers=0, heads=4, blocks=(1, 2, 1, 1))

  def convolutions(remat):
    model = resnet.ModifiedResNet(config, 8, jnp.dtype("float32"), remat=remat)
    images = jnp.ones((4, 32, 32, 3))
    variables = jax.eval_shape(lambda key: model.init(key, images), jax.random.key(0))

    def loss(variables):
      return model.apply(variables, images, train=True, mutable=["batch_stats"])[0].sum()

    return str(jax.make_jaxpr(jax.grad(loss))(variables)).count("= conv_general_dilated[")

  assert convolutions(remat) == convolutions("none") + more


def test_bfloat16_keeps_statistics_and_output_in_float32():
  half, plain = (
    (out_BE, batch_stats["bn_3"])
    for out_BE, batch_stats in (_outputs(True, "bfloat16"), _outputs(True))
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float32")}
  _assert_near(half, plain, 0.05)
  program = str(
    jax.make_jaxpr(functools.partial(_encoder("bfloat16").apply, _variables()))(_images())
  )
  convolutions = [line for line in program.splitlines() if "conv_general_dilated[" in line]
  assert len(convolutions) > 20
  assert all("bf16" in line for line in convolutions)


def test_initial_values_are_the_published_ones():
  config = c.Vision(resolution=32, patch=32, width=32, layers=0, heads=16, blocks=(1, 1, 2, 1))
  model = resnet.ModifiedResNet(config, 256, jnp.dtype("float32"))
  args = (jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  variables = quick.compiled(model.init, *args)(*args)
  p, features = variables["params"], 32 * 32
  for kernel, fan_in in (
    (p["conv_2"]["kernel"], 9 * 16),
    (p["stage_3"]["first"]["conv_2"]["kernel"], 9 * 128),
    (p["stage_3"]["blocks"]["conv_1"]["kernel"], 512),
    (p["stage_4"]["first"]["shortcut_conv"]["kernel"], 512),
  ):
    np.testing.assert_allclose(np.std(kernel), (3 * fan_in) ** -0.5, rtol=0.05)
    assert np.abs(kernel).max() <= fan_in**-0.5
  pool = p["attention_pool"]
  for name in "qkvc":
    np.testing.assert_allclose(np.std(pool[name]["kernel"]), features**-0.5, rtol=0.05)
    np.testing.assert_allclose(np.std(pool[name]["bias"]), (3 * features) ** -0.5, rtol=0.1)
  for path, leaf in jax.tree_util.tree_leaves_with_path(p):
    name = jax.tree_util.keystr(path)
    if name.endswith("['scale']"):
      np.testing.assert_array_equal(leaf, 0 if "bn_3" in name and "stage" in name else 1)
    if name.endswith("['bias']") and "attention_pool" not in name:
      np.testing.assert_array_equal(leaf, 0)


@functools.cache
def _shapes(name):
  config = presets.PUBLISHED[name]
  side, length = config.image.resolution, config.text.context_length
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  return jax.eval_shape(clip.CLIP(config).init, jax.random.key(0), image, tokens)


@pytest.mark.parametrize("name", RESNETS)
def test_batchnorm_buffers_are_the_published_ones(name):
  """PyTorch's are running means and variances, and a count of batches a norm, which we do without:
  we have a mean for each norm instead, its leaf stacked where the blocks are."""
  leaves = jax.tree_util.tree_leaves_with_path(_shapes(name)["batch_stats"])
  norms = sum(x.shape[0] if x.ndim > 1 else 1 for path, x in leaves if path[-1].key == "mean")
  assert sum(x.size for _, x in leaves) + norms == int(PUBLISHED[name]["batchnorm_buffers"])
  assert norms == 3 + 3 * sum(presets.PUBLISHED[name].image.blocks) + 4


@pytest.mark.parametrize("name", presets.PUBLISHED)
def test_flops_are_the_published_ones(name):
  """To the last printed digit: of open_clip's count, in which every position has a query."""
  config = presets.PUBLISHED[name]
  v, width = config.image, 32 * config.image.width
  tokens = (v.resolution // 32) ** 2 + 1
  a_query = 2 * (width**2 + 2 * tokens * width + width * config.embed_dim) if v.blocks else 0
  unneeded = (tokens - 1) * a_query
  image, pair = clip.flops_per_image(config) + unneeded, clip.flops_per_pair(config) + unneeded
  assert image / 1e9 == pytest.approx(float(PUBLISHED[name]["openclip_gflops_image"]), abs=0.006)
  assert pair / 1e9 == pytest.approx(float(PUBLISHED[name]["openclip_gflops_total"]), abs=0.011)


def test_flops_are_the_compilers():
  """Within a tenth of XLA's own count, which has the norms and leaves padding out."""
  vision = c.Vision(resolution=128, patch=32, width=32, layers=0, heads=8, blocks=(1, 2, 1, 1))
  text = c.Text(context_length=8, vocab_size=50, width=16, layers=1, heads=2)
  config = c.Model(vision, text, embed_dim=64)
  image = jax.ShapeDtypeStruct((2, 128, 128, 3), jnp.float32)
  tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
  variables = jax.eval_shape(clip.CLIP(config).init, jax.random.key(0), image, tokens)
  compiled = jax.jit(clip.CLIP(config).apply).lower(variables, image, tokens).compile()
  expected = pytest.approx(2 * clip.flops_per_pair(config), rel=0.1)
  assert compiled.cost_analysis()["flops"] == expected


def test_there_is_no_projection_and_decay_is_on_matrices_only():
  params = _shapes("RN50x4")["params"]
  assert set(params) == {"image", "text", "text_projection", "log_scale"}
  mask = optimizer.decay_mask(params["image"])
  for path, decays in jax.tree_util.tree_leaves_with_path(mask):
    assert decays == (path[-1].key in ("kernel", "positional_embedding"))


def test_another_resolution_is_named():
  with pytest.raises(ValueError, match=r"images are \(1, 64, 64, 3\).*\[B, 96, 96, 3\]"):
    jax.eval_shape(_encoder().init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


TINY = c.Config(
  name="tiny",
  steps=8,
  log_every_steps=1,
  model=c.Model(
    image=c.Vision(32, 32, width=8, layers=0, heads=4, blocks=(1, 1, 2, 1)),
    text=c.Text(context_length=20, vocab_size=600, width=16, layers=1, heads=2),
    embed_dim=8,
  ),
  data=c.Data(
    sources=(c.Source("scenes", records=100), c.Source("digits")),
    batch_pairs=16,
    tokenizer="train",
  ),
  optimizer=c.Optimizer(learning_rate=1e-3, warmup_steps=2),
  evaluation=c.Evaluation(
    (c.Task("d", "zero_shot", c.Source("digits", split="test"), "digits", limit=16),), 4, 16
  ),
  checkpoint=c.Checkpoint(every_steps=2, keep=20),
)


def _batch(seed: int, dtype=np.uint8):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, 598, (16, 20)).astype(np.int32)
  tokens[:, -1] = 599
  zeros = np.zeros(16, np.int32)
  image = rng.integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)
  return {"image": image.astype(dtype), "tokens": tokens, "bad": zeros, "stop": zeros}


@functools.cache
def _initial():
  """With gradients everywhere: a last scale of zero would stop those of its block."""
  state = jax.device_get(train_step.init_state(TINY, sharding.make_mesh(devices=jax.devices()[:1])))
  half = lambda path, x: x + 0.5 if path[-2].key == "bn_3" and path[-1].key == "scale" else x  # noqa: E731
  image = jax.tree_util.tree_map_with_path(half, state.params["image"])
  return state.replace(params={**state.params, "image": image})


def _placed(_, mesh):
  return jax.device_put(_initial(), sharding.replicated(mesh))


@functools.cache
def _compiled(devices, dtype):
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  args = (_placed(TINY, mesh), sharding.global_batch(_batch(0, dtype), mesh))
  return mesh, quick.compiled(train_step.make_train_step(TINY, mesh), *args)


def _steps(devices, batches):
  (mesh, step), metrics = _compiled(devices, batches[0]["image"].dtype.type), {}
  state = _placed(TINY, mesh)
  for batch in batches:
    state, metrics = step(state, sharding.global_batch(batch, mesh))
  return jax.device_get(state), jax.device_get(metrics)


def test_eight_devices_have_the_statistics_of_the_global_batch():
  """Two rows a device: their own statistics would be far off. Value, gradient, statistics.

  On one device the images are float32, so that another test can have a NaN there.
  """
  one, one_metrics = _steps(1, [_batch(0, np.float32)])
  many, many_metrics = _steps(8, [_batch(0)])
  for name in ("loss", "gradient_norm"):
    np.testing.assert_allclose(many_metrics[name], one_metrics[name], rtol=1e-4)
  _assert_near(many.batch_stats, one.batch_stats, 1e-5)
  gradients = [optax.tree.get(state.opt_state, "mu")["image"] for state in (many, one)]
  for tree in gradients:  # a tenth of them: the first moment after one step
    del tree["attention_pool"]["k"]["bias"]
  _assert_near(*gradients, 1e-3)
  assert _differs(one.batch_stats, _initial().batch_stats)


def test_a_skipped_step_leaves_the_running_statistics():
  batch, poisoned = _batch(0, np.float32), _batch(9, np.float32)
  poisoned["image"][3, 0, 0, 0] = np.nan
  before, _ = _steps(1, [batch])
  after, metrics = _steps(1, [batch, poisoned])
  assert metrics["skipped"] == 1
  jax.tree.map(np.testing.assert_array_equal, after.batch_stats, before.batch_stats)
  jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


def _leaves(workdir):
  checkpoints = checkpoint.Checkpoints(workdir, read_only=True)
  last = checkpoints.steps()[-1]
  leaves = checkpoints.meta(last)["leaves"]
  checkpoints.close()
  return last, leaves


def test_a_broken_run_goes_on_with_its_statistics(tmp_path, monkeypatch):
  """Bit for bit the unbroken run; evaluation on the way and `load` after it use the statistics."""
  seen, run_tasks, place = [], tasks.run, train._place

  def watched(model, *rest):
    seen.append((model, jax.device_get(model.batch_stats)))
    return run_tasks(model, *rest)

  def failing(*arguments):
    failing.calls += 1
    if failing.calls == 6:
      raise OSError("the machine is gone")
    return place(*arguments)

  failing.calls = 0
  console = rich.console.Console(quiet=True)
  monkeypatch.setattr(tasks, "run", watched)
  _, step = _compiled(8, np.uint8)  # once for all runs
  monkeypatch.setattr(train_step, "init_state", _placed)
  monkeypatch.setattr(train_step, "make_train_step", lambda *_: step)
  assert train.train(TINY, tmp_path / "unbroken", console)
  monkeypatch.setattr(train, "_place", failing)
  with pytest.raises(OSError, match="gone"):
    train.train(TINY, tmp_path / "broken", console)
  monkeypatch.setattr(train, "_place", place)
  assert 2 <= _leaves(tmp_path / "broken")[0] < 8
  assert train.train(TINY, tmp_path / "broken", console)
  assert _leaves(tmp_path / "broken") == _leaves(tmp_path / "unbroken")

  _, on_the_way = seen[0]
  fresh = _initial().batch_stats
  assert _differs(on_the_way, fresh)
  model = clip_jax.load(tmp_path / "broken")
  image_NRR3 = _images(3, 32)
  given = {"params": model.params, "batch_stats": model.batch_stats}
  assert checksums.of_leaves(given).items() <= _leaves(tmp_path / "broken")[1].items()
  encode = functools.partial(clip.CLIP(TINY.model).apply, method="encode_image")
  encode = quick.compiled(encode, given, image_NRR3)
  np.testing.assert_allclose(model.encode_image(image_NRR3), encode(given, image_NRR3), atol=1e-5)
  features_NE = model.image_features(image_NRR3)  # the pool's output, which nothing projects
  lengths = np.linalg.norm(features_NE, axis=1, keepdims=True)
  np.testing.assert_allclose(features_NE / lengths, model.encode_image(image_NRR3), atol=1e-5)
  assert np.abs(lengths - 1).min() > 0.01
  without = {**given, "batch_stats": fresh}
  assert np.abs(model.encode_image(image_NRR3) - encode(without, image_NRR3)).max() > 0.01


def test_statistics_that_a_checkpoint_lacks_are_told(tmp_path):
  state = _placed(TINY, sharding.make_mesh(devices=jax.devices()[:1]))
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(1, state.params, {"step": state.step}, {"config": c.to_dict(TINY)})
  checkpoints.close()
  with pytest.raises(checkpoint.Mismatch, match=r"batch_stats/image/bn_1/mean is not in it"):
    clip_jax.load(tmp_path)
