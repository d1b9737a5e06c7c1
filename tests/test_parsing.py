"""The config: a round trip, and every kind of mistake told by key."""

import dataclasses
import json

import pytest

from clip_jax import agreement, cli, parsing
from clip_jax import config as c

FULL = c.Config(
  name="x",
  data=c.Data(sources=(c.Source(kind="digits"), c.Source(path="p", weight=2.0))),
  evaluation=c.Evaluation(tasks=(c.Task("a", "retrieval", c.Source(split="test")),)),
)


def test_round_trips():
  assert parsing.parse(c.to_dict(FULL)) == FULL
  assert parsing.parse(c.to_config_dict(FULL)) == FULL
  assert parsing.parse(json.loads(json.dumps(c.to_dict(FULL)))) == FULL


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    (("stepz",), 1, "config.stepz: no such key; did you mean 'steps'"),
    (("model", "image", "patch"), "a", "config.model.image.patch: expected int, got 'a'"),
    (("model", "image", "patch"), 33, "33 does not divide resolution 224"),
    (("model", "text", "heads"), 7, "7 does not divide width 512"),
    (("model", "activation"), "relu", "'relu' is none of 'quick_gelu', 'gelu'"),
    (("model", "scan_layers"), 1, "scan_layers: expected bool"),
    (("steps",), True, "config.steps: expected int"),
    (("preprocess", "mean"), [0.5, 0.5], "expected 3 values, got 2"),
    (("preprocess", "train_short_side"), 100, "100 is under the resolution 224"),
    (("data", "sources"), 3, "config.data.sources: expected a list"),
    (("data", "sources"), [{"kind": "digits"}], r"sources\[0\].path: missing"),
    (("data", "batch_pairs"), 0, "batch_pairs: must be at least 1"),
    (("model", "image"), 3, "expected the keys of Vision"),
    (("model", "loss"), "hinge", "'hinge' is none of 'softmax', 'sigmoid'"),
    (("model", "image", "pooling"), "map", "512 is not the image encoder's width 768"),
    (("model", "text", "mlp_width"), -1, "config.model.text.mlp_width: must be at least 0"),
    (("model", "image", "patch"), 0, "image.patch: must be at least 1, is 0"),
    (("model", "text", "heads"), 0, "text.heads: must be at least 1, is 0"),
    (("model", "image", "layers"), -1, "image.layers: must be at least 1, is -1"),
  ],
)
def test_mistakes_are_told_by_key(path, value, message):
  tree = c.to_dict(FULL)
  inner = tree
  for key in path[:-1]:
    inner = inner[key]
  inner[path[-1]] = value
  with pytest.raises(parsing.ConfigError, match=message):
    parsing.parse(tree)


def test_pixels_may_be_left_over_where_siglip_leaves_them():
  """27 patches of 14 pixels in 384; a patch over the whole image is a mistake still."""
  tree = c.to_dict(FULL)
  tree["model"]["embed_dim"] = 768
  tree["model"]["image"] |= {"pooling": "map", "resolution": 384, "patch": 14}
  assert parsing.parse(tree).model.image.resolution == 384
  for change in ({"patch": 400}, {"stem": "convolution"}, {"pooling": "class"}):
    wrong = {**tree, "model": {**tree["model"], "image": {**tree["model"]["image"], **change}}}
    with pytest.raises(parsing.ConfigError, match="does not divide resolution 384"):
      parsing.parse(wrong)


RESNET = c.Vision(224, 32, width=64, layers=0, heads=32, blocks=(3, 4, 6, 3))


def _with_image(**changes):
  image = dataclasses.replace(RESNET, **changes)
  return dataclasses.replace(FULL, model=dataclasses.replace(FULL.model, image=image))


def test_a_resnet_round_trips():
  assert parsing.parse(c.to_config_dict(_with_image())) == _with_image()
  assert parsing.parse(json.loads(json.dumps(c.to_dict(_with_image())))) == _with_image()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"blocks": (3, 4, 6)}, r"image.blocks: \[3, 4, 6\] is not four stages"),
    ({"blocks": (3, 4, 0, 3)}, r"image.blocks: \[3, 4, 0, 3\] is not four stages"),
    ({"blocks": (3, 4, 6, 3.5)}, r"image.blocks\[3\]: expected int, got 3.5"),
    ({"layers": 12}, "image.layers: 12; a ResNet .* takes 0 only"),
    ({"patch": 16}, "image.patch: 16; a ResNet .* takes 32 only"),
    ({"stem": "convolution"}, "image.stem: 'convolution'; a ResNet .* takes 'patch' only"),
    ({"resolution": 240}, "image.patch: 32 does not divide resolution 240"),
    ({"width": 15, "heads": 8}, "image.width: 15 is odd"),
    ({"heads": 3}, "image.heads: 3 does not divide width 2048"),
  ],
)
def test_what_a_resnet_cannot_be(changes, message):
  with pytest.raises(parsing.ConfigError, match=message):
    parsing.parse(c.to_dict(_with_image(**changes)))


def test_a_saved_config_gets_the_fields_that_came_later():
  saved = c.to_dict(FULL)
  del saved["model"]["image"]["blocks"]
  with pytest.raises(parsing.ConfigError, match=r"config\.model\.image\.blocks: missing"):
    parsing.parse(saved)
  assert parsing.parse(parsing.upgrade(saved)) == FULL
  assert "blocks" not in saved["model"]["image"]
  assert parsing.parse(parsing.upgrade(c.to_dict(_with_image()))) == _with_image()


def test_a_run_of_before_goes_on_with_whole_decodes():
  saved = c.to_dict(FULL)
  assert saved["data"].pop("scaled_decode") is True
  assert saved["data"].pop("worker_memory_gib") == 16.0
  data = parsing.parse(parsing.upgrade(saved)).data
  assert (data.scaled_decode, data.worker_memory_gib) == (False, 0.0)
  pages = [{"config": {"data": {**saved["data"], "worker_memory_gib": g}}, "data": {}}
           for g in (0.0, 16.0)]  # fmt: skip
  assert agreement.differences(*pages) == []


def test_all_mistakes_are_told_together():
  tree = c.to_dict(FULL)
  del tree["seed"]
  tree["extra"] = 1
  with pytest.raises(parsing.ConfigError, match=r"config.extra: no such key.*config.seed: missing"):
    parsing.parse(tree)


def test_an_int_is_a_float_where_one_is_asked_for():
  tree = c.to_dict(FULL)
  tree["optimizer"]["learning_rate"] = 1
  assert parsing.parse(tree).optimizer.learning_rate == 1.0


@pytest.fixture
def experiment(tmp_path):
  path = tmp_path / "experiment.py"
  path.write_text(
    "from clip_jax import config as c\n"
    "def get_config():\n"
    "  return c.to_config_dict(c.Config(steps=5, data=c.Data(sources=(c.Source(),))))\n"
  )
  return str(path)


def test_the_command_line_overrides(experiment):
  words = ["--config.optimizer.learning_rate=1e-3", "--config.data.sources[0].weight=3"]
  config = cli.load_config(experiment, words)
  assert (config.steps, config.optimizer.learning_rate, config.data.sources[0].weight) == (
    5,
    1e-3,
    3,
  )


@pytest.mark.parametrize(
  ("word", "message"),
  [
    ("--config.optimizer.learning_rat=1", 'Did you mean "learning_rate"'),
    ("--config.steps=abc", "config.steps=abc"),
    ("--config.data.sources[9].weight=1", r"sources\[9\]"),
    ("--config.model.activation=relu", "'relu' is none of"),
  ],
)
def test_a_wrong_override_is_told(experiment, word, message):
  with pytest.raises(ValueError, match=message):
    cli.load_config(experiment, [word])


def test_a_missing_config_file_is_named(tmp_path):
  with pytest.raises(cli.UsageError, match=r"nothing.py: no such config file"):
    cli.load_config(str(tmp_path / "nothing.py"), [])


def test_a_batch_normalisation_goes_with_no_microbatches():
  tree = c.to_dict(_with_image())
  tree["microbatches"] = 2
  message = r"config\.microbatches: 2; a ResNet's batch normalisation takes .* whole batch.*1 only"
  with pytest.raises(parsing.ConfigError, match=message):
    parsing.parse(tree)
  tree["microbatches"] = 3
  with pytest.raises(parsing.ConfigError, match=r"microbatches: 3 does not divide 256 pairs"):
    parsing.parse(tree)


def _locked(init="weights", microbatches=1, **image):
  tree = c.to_dict(c.Config())
  tree |= {"init": init, "microbatches": microbatches}
  tree["optimizer"]["lock_image"] = True
  tree["model"]["image"] |= image
  return tree


def test_what_a_locked_image_encoder_goes_with():
  resnet = {"width": 64, "layers": 0, "heads": 32, "blocks": [3, 4, 6, 3]}
  assert parsing.parse(_locked(microbatches=4, **resnet)).optimizer.lock_image
  with pytest.raises(parsing.ConfigError, match=r"lock_image: locks random weights.*config\.init"):
    parsing.parse(_locked(init=""))
  with pytest.raises(parsing.ConfigError, match=r"patch_dropout: leaves out .*lock_image"):
    parsing.parse(_locked(patch_dropout=0.5))
