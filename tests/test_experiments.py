"""The experiment files: the paper's numbers, steps that make whole epochs, tables that are true."""

import ast
import dataclasses
import functools
import json
import math
import pathlib

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from clip_jax import cli, sharding, train_step
from clip_jax import config as c
from clip_jax.evaluation.paper import published
from clip_jax.models import clip
from tools import results_table

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "experiments").glob("*.py"))
TARGETS = {row["experiment"]: row for row in results_table.read_targets()}
NINE = {
  "RN50": "clip_rn50",
  "RN101": "clip_rn101",
  "RN50x4": "clip_rn50x4",
  "RN50x16": "clip_rn50x16",
  "RN50x64": "clip_rn50x64",
  "ViT-B/32": "clip_vit_b32",
  "ViT-B/16": "clip_vit_b16",
  "ViT-L/14": "clip_vit_l14",
  "ViT-L/14@336px": "clip_vit_l14_336",
}


@functools.cache
def _config(name: str) -> c.Config:
  return cli.load_config(str(ROOT / "experiments" / f"{name}.py"), [])


def _doc(name: str) -> str:
  text = (ROOT / "experiments" / f"{name}.py").read_text()
  return " ".join((ast.get_docstring(ast.parse(text)) or "").split())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_a_config_of_its_own_name(path):
  config = _config(path.stem)
  assert config.name == path.stem
  assert config.data.sources
  assert 0 < config.optimizer.warmup_steps < config.steps
  assert "http" in _doc(path.stem) or "Settings: " in _doc(path.stem)


def test_the_nine_models_and_the_runs_with_targets_are_there():
  files = {path.stem for path in FILES}
  assert set(NINE.values()) <= set(TARGETS) <= files
  own = {"demo", "clipart", "fashion_mnist", "fashion_mnist_resnet", "predictive"}
  assert files - set(TARGETS) == own


@pytest.mark.parametrize("model", NINE)
def test_the_nine_have_the_hyperparameters_of_the_paper(model):
  golden = json.loads((published.FOLDER / "hyperparameters.json").read_text())
  table, family = golden["table18"], "ResNet" if model.startswith("RN") else "ViT"
  config = _config(NINE[model])
  assert config.optimizer == c.Optimizer(
    learning_rate=golden["learning_rate"][model],
    warmup_steps=table["warmup_iterations"],
    weight_decay=table["weight_decay"],
    beta1=table["adam_beta1"],
    beta2=table["adam_beta2"][family],
    epsilon=table["adam_epsilon"][family],
    max_logit_scale=golden["temperature"]["clip_exp_logit_scale_max"],
  )
  assert config.data.batch_pairs == table["batch_size"]
  assert config.model.text.vocab_size == table["vocabulary_size"]
  assert config.model.activation == "quick_gelu"
  assert config.data.tokenizer == "original"
  assert config.preprocess == c.Preprocess(
    tuple(golden["augmentation"]["mean"]), tuple(golden["augmentation"]["std"])
  )
  tuned = model == "ViT-L/14@336px"  # one more epoch from the weights of ViT-L/14
  assert int(TARGETS[NINE[model]]["epochs"]) == (1 if tuned else table["training_epochs"])
  assert int(TARGETS[NINE[model]]["pairs"]) == golden["derived"]["dataset_pairs"]
  assert config.init == ("runs/clip_vit_l14" if tuned else "")


@pytest.mark.parametrize("model", NINE)
def test_the_nine_have_the_architectures_of_the_paper(model):
  row = next(row for row in published.rows("architectures.csv") if row["model"] == model)
  image, text = _config(NINE[model]).model.image, _config(NINE[model]).model.text
  assert image.resolution == int(row["input_resolution"])
  assert _config(NINE[model]).model.embed_dim == int(row["embed_dim"])
  assert (text.layers, text.width, text.heads, text.context_length, text.vocab_size) == tuple(
    int(row[key])
    for key in ("text_layers", "text_width", "text_heads", "context_length", "vocab_size")
  )
  if image.blocks:
    assert "-".join(map(str, image.blocks)) == row["resnet_blocks"]
    assert 32 * image.width == int(row["resnet_width_table19"])
    assert image.heads == int(row["resnet_attnpool_heads"])
  else:
    assert (image.patch, image.layers, image.width, image.heads) == tuple(
      int(row[f"vit_{key}"]) for key in ("patch", "layers", "width", "heads")
    )
  counts = clip.parameter_counts(_config(NINE[model]).model)
  assert counts["total"] == int(row["params_total"])


@pytest.mark.parametrize("name", TARGETS)
def test_steps_make_the_epochs(name):
  config, target = _config(name), TARGETS[name]
  exact = int(target["epochs"]) * int(target["pairs"]) / config.data.batch_pairs
  assert config.steps == round(exact)
  source = pathlib.Path(ROOT / "experiments" / f"{name}.py").read_text()
  number = int(target["pairs"])
  words = "400 million pairs" if name.startswith("clip_") else f"{number:,} pairs"
  count = "one epoch" if target["epochs"] == "1" else f"{target['epochs']} epochs"
  assert f"steps={config.steps:_},  # {count} of {words}\n" in source


@pytest.mark.parametrize("name", TARGETS)
def test_the_note_tells_cost_target_and_command(name):
  note, config = _doc(name), _config(name)
  flops, chip_hours = results_table.cost(config)
  figures = f"{results_table.exaflops(flops)} EFLOP, {chip_hours:,.0f} v5e chip-hours"
  assert f"Cost, estimated: {figures} at 40 % of the peak" in note
  assert f" {TARGETS[name]['imagenet_zero_shot_top1']} %" in note
  assert f"clip-jax train --config experiments/{name}.py --workdir runs/{name}" in note
  assert ("Measured: not run." in note) == (name not in results_table.read_runs())


def test_cost_is_that_of_a_small_case_by_hand():
  """One Transformer layer a side, width 8, one token more than its 4 patches, 100 pairs."""
  image = c.Vision(resolution=8, patch=4, width=8, layers=1, heads=1)
  text = c.Text(context_length=3, vocab_size=10, width=8, layers=1, heads=1)
  config = c.Config(steps=10, data=c.Data(batch_pairs=10), model=c.Model(image, text, 4))
  block = 24 * 8 * 8  # FLOPs a token of all its matrix products, attention itself aside
  image_flops = 2 * 4 * 48 * 8 + 5 * block + 4 * 5 * 5 * 8 + 2 * 8 * 4
  text_flops = 3 * block + 4 * 3 * 3 * 8 + 2 * 8 * 4
  flops, chip_hours = results_table.cost(config)
  assert flops == 3 * 100 * (image_flops + text_flops)
  assert chip_hours == pytest.approx(flops / (0.4 * 197e12 * 3600))


@pytest.mark.parametrize("name", NINE.values())
def test_the_state_lies_on_8_devices_and_on_256_chips(name):
  config = _config(name)
  eight = dataclasses.replace(config, mesh=c.Mesh(fsdp=8 if config.mesh.fsdp > 1 else 1))
  mesh = sharding.make_mesh(eight.mesh)
  state = train_step.abstract_state(eight, mesh)
  whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  assert whole == clip.parameter_counts(config.model)["total"]
  leaves = jax.tree.leaves(state.params)
  here = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
  assert here == whole if mesh.shape["fsdp"] == 1 else here < 0.2 * whole
  fsdp = config.mesh.fsdp
  pod = AbstractMesh((256 // fsdp, fsdp, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
  sharding.place(state, pod)
  sharding.check_batch(config.data.batch_pairs, pod, config.microbatches)


def test_the_page_is_what_the_tool_writes():
  text = (ROOT / "experiments" / "README.md").read_text()
  runs, targets = results_table.read_runs(), results_table.read_targets()
  others = results_table.read_others()
  assert results_table.filled(text, targets, others, runs) == text
  spoilt = text.replace("| 4.59 | 16 |", "| 4.59 | 12 |")
  assert spoilt != text
  assert results_table.filled(spoilt, targets, others, runs) == text
  with pytest.raises(ValueError, match="targets: end"):
    results_table.filled(text.replace("<!-- targets: end -->", ""), targets, others, runs)


def test_published_runs_name_their_source_and_stand_in_one_table_only():
  others = results_table.read_others()
  lines = results_table.others_table(others).splitlines()
  assert len(lines) == len(others) + 2
  for run, line in zip(others, lines[2:], strict=True):
    assert line.count(" | ") == 8, line
    assert run["source"]
    assert run["status"].startswith(("verified", "approximate"))
    assert 0 < float(run["imagenet_zero_shot_top1"]) < 100
  repeated = {(t["data"], t["imagenet_zero_shot_top1"]) for t in TARGETS.values()}
  assert not repeated & {
    (run["data"].partition(" (")[0].partition(":")[0], run["imagenet_zero_shot_top1"])
    for run in others
  }


def test_a_run_with_imagenet_fills_its_cell():
  target = TARGETS["cc3m_rn50"]
  figures = {"eval/ImageNet/top1": 0.1953, "eval/ImageNet/chance": 0.001}
  for run, cell in (
    ({"figures": figures}, "19.5% |"),
    ({"figures": {}}, "run, see below |"),
  ):
    row = results_table.targets_table([target], {"cc3m_rn50": run}).splitlines()[-1]
    assert row.endswith(cell)
