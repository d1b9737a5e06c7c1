"""`clip_jax.load`: what it takes, what it gives, and how it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import clip_jax
from clip_jax import checkpoint, inference, sharding, train_step
from clip_jax import config as c
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.interop import architecture
from clip_jax.models.clip import CLIP

CONFIG = c.Config(
  steps=10,
  model=c.Model(
    image=c.Vision(resolution=16, patch=8, width=16, layers=1, heads=2),
    text=c.Text(context_length=8, vocab_size=600, width=16, layers=1, heads=2),
    embed_dim=12,
  ),
  data=c.Data(sources=(c.Source("digits"),)),
  optimizer=c.Optimizer(warmup_steps=1),
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("weights")
  state = train_step.init_state(CONFIG, sharding.make_mesh(devices=jax.devices()[:1]))
  tokenizer = tokenizer_lib.train(["a red circle", "a blue square", "two green rings"], 600)
  checkpoints = checkpoint.Checkpoints(folder)
  meta = {"config": c.to_dict(CONFIG), "tokenizer": tokenizer.to_json()}
  checkpoints.save(10, state.params, {"step": state.step}, meta)
  checkpoints.close()
  return folder


@pytest.fixture(scope="module")
def model(workdir):
  return clip_jax.load(workdir)


def _pixels(n=3, height=16, width=16):
  return np.random.default_rng(0).integers(0, 256, (n, height, width, 3)).astype(np.uint8)


def test_what_a_model_says_of_itself(model):
  assert model.config == CONFIG
  assert model.resolution == 16
  assert model.step == 10
  assert model.preprocess == CONFIG.preprocess
  assert model.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)
  assert model.params["image_projection"].shape == (16, 12)


def test_a_checkpoint_of_an_earlier_version_is_read(model, workdir, tmp_path):
  """It knows no ResNets: its config has no `blocks`, and its folder no running statistics."""
  config = c.to_dict(CONFIG)
  del config["model"]["image"]["blocks"]
  checkpoints = checkpoint.Checkpoints(tmp_path)
  meta = {"config": config, "tokenizer": model.tokenizer.to_json()}
  checkpoints.save(10, model.params, {"step": np.int32(10)}, meta)
  checkpoints.close()
  items = [{p.name for p in (w / "checkpoints" / "10").iterdir()} for w in (tmp_path, workdir)]
  assert items[0] == items[1]
  assert "batch_stats" not in items[0]
  earlier = clip_jax.load(tmp_path)
  assert (earlier.config, earlier.batch_stats) == (CONFIG, {})
  np.testing.assert_array_equal(earlier.encode_image(_pixels()), model.encode_image(_pixels()))


def test_a_model_over_all_devices_gives_the_same(model):
  spread = inference.spread(model, sharding.make_mesh())
  assert len(spread.params["image_projection"].devices()) == 8
  np.testing.assert_allclose(
    spread.encode_image(_pixels()), model.encode_image(_pixels()), atol=1e-6
  )
  texts = ["a red circle"]
  np.testing.assert_allclose(spread.encode_text(texts), model.encode_text(texts), atol=1e-6)
  assert (spread.step, spread.config, spread.tokenizer) == (10, CONFIG, model.tokenizer)
  assert inference.spread(model, sharding.one_device()) is model


def test_embeddings_are_unit_norm_float32(model):
  for out in (model.encode_image(_pixels()), model.encode_text(["a red circle", "", "x" * 5])):
    assert out.shape == (3, 12)
    assert out.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 1, atol=1e-5)


def test_every_kind_of_image_gives_the_same_embedding(model, tmp_path):
  pixels = _pixels()
  paths = []
  for i, image in enumerate(pixels):
    paths.append(tmp_path / f"{i}.png")
    Image.fromarray(image).save(paths[-1])
  p = CONFIG.preprocess
  ready = ((pixels / 255 - np.array(p.mean)) / np.array(p.std)).astype(np.float32)
  expected = model.encode_image(pixels)
  opened = [Image.open(path) for path in paths]
  arrays = (list(pixels), ready, jnp.asarray(pixels), jnp.asarray(ready))
  for images in (paths, [str(path) for path in paths], opened, *arrays):
    np.testing.assert_allclose(model.encode_image(images), expected, atol=1e-5)
  np.testing.assert_allclose(model.encode_image(paths[1]), expected[1:2], atol=1e-5)
  np.testing.assert_allclose(model.encode_image(Image.open(paths[1])), expected[1:2], atol=1e-5)


def test_features_are_what_is_projected(model):
  features_ND = model.image_features(_pixels())
  assert features_ND.dtype == np.float32
  assert features_ND.shape == (3, 16)
  projected_NE = features_ND @ np.asarray(model.params["image_projection"])
  expected = projected_NE / np.linalg.norm(projected_NE, axis=1, keepdims=True)
  np.testing.assert_allclose(model.encode_image(_pixels()), expected, atol=1e-5)
  assert model.image_features(_pixels(0)).shape == (0, 16)
  with pytest.raises(ValueError, match="images are float64"):
    model.image_features(np.zeros((1, 16, 16, 3)))


def test_larger_images_are_resized_and_cropped(model):
  assert model.encode_image(_pixels(2, 40, 25)).shape == (2, 12)


def test_images_resized_on_the_device_give_the_same(model):
  pixels = _pixels(3, 40, 25)
  got = model.encode_image(pixels, resize_on_device=True)
  np.testing.assert_allclose(got, model.encode_image(pixels), atol=1e-6)
  with pytest.raises(ValueError, match="takes uint8"):
    model.encode_image([pixels[0]], resize_on_device=True)
  with pytest.raises(ValueError, match="not \\[N, height, width, 3"):
    model.encode_image(np.zeros((1, 9, 9, 4), np.uint8), resize_on_device=True)


def test_tokens_and_strings_agree(model):
  texts = ["a red circle", "two green rings"]
  tokens = model.tokenizer(texts, 8)
  expected = model.encode_text(texts)
  np.testing.assert_array_equal(model.encode_text(tokens), expected)
  np.testing.assert_allclose(model.encode_text(texts[0]), expected[:1], atol=1e-6)


@pytest.mark.parametrize("n", [0, 1, 7, 256, 257])
def test_any_number_of_images(model, n):
  pixels = _pixels(n)
  out = model.encode_image(pixels)
  assert out.shape == (n, 12)
  if n:
    np.testing.assert_allclose(out[-1:], model.encode_image(pixels[-1:]), atol=1e-5)


def test_classify_by_hand(model):
  pixels, labels, templates = _pixels(), ["circle", "square", "ring"], ("a red {}", "two {}")
  classes = []
  for label in labels:
    mean = model.encode_text([t.format(label) for t in templates]).mean(0)
    classes.append(mean / np.linalg.norm(mean))
  logits = model.logit_scale * model.encode_image(pixels) @ np.stack(classes).T
  expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  got = model.classify(pixels, labels, templates=templates)
  np.testing.assert_allclose(got, expected, atol=1e-5)
  np.testing.assert_allclose(got.sum(1), 1, atol=1e-5)


def test_classify_judges_each_label_by_itself_after_the_sigmoid_loss(model):
  config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, loss="sigmoid"))
  params = {**model.params, "logit_bias": np.float32(-3.0)}
  sigmoid = inference.Clip(config, params, model.tokenizer)
  pixels, labels = _pixels(), ["circle", "square"]
  got = sigmoid.classify(pixels, labels, templates=("a {}",))
  class_CE = model.encode_text(["a circle", "a square"])
  logits_NC = model.logit_scale * model.encode_image(pixels) @ class_CE.T - 3
  np.testing.assert_allclose(got, 1 / (1 + np.exp(-logits_NC)), atol=1e-5)


def test_many_devices_agree_with_one(model):
  mesh = sharding.make_mesh(devices=jax.devices()[:8])
  params = jax.device_put(model.params, sharding.replicated(mesh))
  spread = inference.Clip(CONFIG, params, model.tokenizer)
  np.testing.assert_allclose(
    spread.encode_image(_pixels(20)), model.encode_image(_pixels(20)), atol=1e-5
  )


@pytest.mark.parametrize(
  ("images", "message"),
  [
    (np.zeros((16, 16, 3), np.uint8), r"must be \[N, height, width, 3\]"),
    (np.zeros((1, 16, 16, 3), np.float64), "images are float64"),
    (np.zeros((1, 17, 16, 3), np.float32), r"not \[N, 16, 16, 3\]"),
    (["/nowhere/cat.png"], "cat.png: No such file"),
    ([3], "int is no image"),
  ],
)
def test_wrong_images_are_told(model, images, message):
  with pytest.raises(ValueError, match=message):
    model.encode_image(images)


def test_wrong_texts_are_told(model):
  with pytest.raises(ValueError, match="truncate"):
    model.encode_text(["a red circle and a blue square and two green rings, all in a row"])
  with pytest.raises(ValueError, match=r"not int32 \[N, 8\]"):
    model.encode_text(np.zeros((1, 9), np.int32))
  with pytest.raises(ValueError, match="another tokenizer"):
    model.encode_text(np.full((1, 8), 49407, np.int32))
  with pytest.raises(ValueError, match="template"):
    model.classify(_pixels(), ["a"], templates=("no place for it",))


def test_missing_weights_are_told(tmp_path):
  with pytest.raises(architecture.WeightsError, match="nothing: no such file or folder"):
    clip_jax.load(tmp_path / "nothing")
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(checkpoint.CheckpointError, match="no finished checkpoint"):
    clip_jax.load(tmp_path)


def test_the_public_tokenizer():
  tokens = clip_jax.tokenize(["a photo of a cat", "x"], context_length=10)
  assert tokens.shape == (2, 10)
  assert tokens.dtype == np.int32
  assert tokens[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0, 0, 0]


def _deep(image):
  text = c.Text(context_length=8, vocab_size=600, width=16, layers=3, heads=2)
  model = c.Model(image, text, embed_dim=12)
  state = train_step.init_state(
    dataclasses.replace(CONFIG, model=model), sharding.make_mesh(devices=jax.devices()[:1])
  )
  return inference.Clip(c.Config(model=model), state.params, None, batch_stats=state.batch_stats)


@pytest.mark.parametrize(
  "image",
  [
    c.Vision(resolution=16, patch=8, width=16, layers=3, heads=2),
    c.Vision(resolution=64, patch=32, width=4, layers=0, heads=2, blocks=(1, 2, 3, 1)),
  ],
)
def test_layers_apart_are_the_same_model_in_the_same_memory(image):
  model = _deep(image)
  images = np.random.default_rng(0).normal(size=(2, image.resolution, image.resolution, 3))
  images, tokens = images.astype(np.float32), np.arange(16, dtype=np.int32).reshape(2, 8)
  variables = {"params": model.params, "batch_stats": model.batch_stats}
  for method, x in (("encode_image", images), ("encode_text", tokens)):
    plain = jax.jit(lambda v, x, method=method: CLIP(model.config.model).apply(v, x, method=method))
    np.testing.assert_array_equal(getattr(model, method)(x), plain(variables, x))
  stacked = model.params["text"]["transformer"]["blocks"]["mlp"]["fc"]["kernel"]
  apart = model._encoder_variables["params"]["text"]["transformer"]["blocks"]
  for index, layer in enumerate(apart):
    start = stacked.unsafe_buffer_pointer() + index * 4 * 16 * 64
    assert layer["mlp"]["fc"]["kernel"].unsafe_buffer_pointer() == start


def test_no_layer_is_cut_out_of_a_stack_in_a_call():
  """It would be a copy of the weights, once a call."""
  model = _deep(c.Vision(resolution=16, patch=8, width=16, layers=3, heads=2))
  tokens = np.zeros((1, 8), np.int32)
  compiled = inference.text_encoder.lower(
    model.config, None, model._encoder_variables, tokens
  ).compile()
  stack = model.params["text"]["transformer"]["blocks"]["mlp"]["fc"]["kernel"].shape
  shape = ",".join(map(str, stack))
  assert f"f32[{shape}]" not in compiled.as_text()


@pytest.mark.parametrize(
  ("mesh", "n"), [(c.Mesh(), 1), (c.Mesh(fsdp=4), 19), (c.Mesh(fsdp=2, tensor=2), 5)]
)
def test_weights_spread_over_devices_give_the_same_embeddings(mesh, n):
  """Any number of rows, and the weights stay where they are."""
  alone = _deep(c.Vision(resolution=16, patch=8, width=16, layers=3, heads=2))
  spread = sharding.make_mesh(mesh)
  places = jax.tree.map(lambda x: x.sharding, sharding.place(alone.params, spread))
  model = inference.Clip(alone.config, jax.device_put(alone.params, places), None)
  tokens = np.random.default_rng(0).integers(0, 600, (n, 8), np.int32)
  for method, x in (("encode_image", _pixels(n)), ("encode_text", tokens)):
    wanted, found = getattr(alone, method)(x), getattr(model, method)(x)
    np.testing.assert_allclose(found, wanted, atol=3e-6)
  blocks = model._encoder_variables["params"]["text"]["transformer"]["blocks"]
  kernel = blocks["mlp"]["fc"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape)[1] == 16 // mesh.fsdp


def test_a_checkpoint_loads_onto_all_devices(workdir, model):
  everywhere = inference.load(workdir, sharding.make_mesh())
  assert len(everywhere.params["log_scale"].devices()) == 8
  np.testing.assert_allclose(
    everywhere.encode_image(_pixels(11)), model.encode_image(_pixels(11)), atol=1e-6
  )
