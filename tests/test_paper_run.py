"""`clip-jax paper` from its command line to its files, with models whose answers are planted."""

import csv
import dataclasses
import io
import json
import os
import pickle
import signal
import threading

import numpy as np
import planted
import pytest
import rich.console
import trees
import two_processes
from known_model import picture, unit
from sklearn.metrics import precision_recall_curve, roc_auc_score
from test_inference import workdir  # noqa: F401, a fixture

import clip_jax
from clip_jax import cli
from clip_jax.evaluation import datasets, prompts, scores
from clip_jax.evaluation.paper import models as paper_models
from clip_jax.evaluation.paper import progress as paper_progress
from clip_jax.evaluation.paper import published
from clip_jax.evaluation.paper import results as paper_results
from clip_jax.evaluation.paper import run as paper_run
from clip_jax.evaluation.probe import feature_file, linear_probe

# A data set of every metric but accuracy.
METRICS = ("VOC2007", "HatefulMemes", "FGVC Aircraft", "Kinetics700")
PAPER = [d.key for d in datasets.all_datasets() if d.group == "paper"]


class Command:
  """The command on a world of copies; `main` gives its exit code and what it said."""

  def __init__(self, tmp_path, capsys, monkeypatch):
    self.data, self.output = tmp_path / "data", tmp_path / "out"
    self.data.mkdir()
    self.world, self._capsys = planted.World(self.data), capsys
    monkeypatch.setattr(paper_models, "load", lambda named: self.world.loaded(named))

  def main(self, *words, models=("planted=weights",), batch=3):
    fixed = ["paper", "--models", *models, "--data", str(self.data), "--output", str(self.output)]
    fixed += ["--batch", str(batch), "--processes", "1"]
    code = cli.main([*fixed, *map(str, words)])
    return code, *self._capsys.readouterr()

  def results(self):
    return paper_results.read(self.output / paper_run.RESULTS).measured

  def values(self):
    return {(m.table, m.model, m.dataset, m.metric): m.value for m in self.results()}

  def cells(self):
    """paper.csv by model and dataset."""
    with (self.output / "paper.csv").open(newline="") as file:
      return {(row["model"], row["dataset"]): row for row in csv.DictReader(file)}


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
  return Command(tmp_path, capsys, monkeypatch)


def told_apart(world, key):
  """A data set's planted answers give another figure by any other metric that would take them."""
  dataset, own = datasets.named(key), planted.EXPECTED[published.metrics()[key]]
  row_4E = np.stack([world.model.rows[n] for n in range(world.number - 4, world.number)])
  scores_4C = row_4E @ world.classes(dataset).T
  labels = planted.OF_TWO if dataset.classes == 2 else planted.LABELS
  others = {"accuracy", "mean per class", "mean(top1, top5)"}
  others |= {"ROC AUC"} if dataset.classes == 2 else set()
  for metric in others - {dataset.metric}:
    assert abs(100 * scores.score(metric, scores_4C, labels) - own) > 1, (key, metric)


def test_every_data_set_by_its_own_metric(command):
  for key in PAPER:
    command.world.test(key)
    told_apart(command.world, key)
  code, out, _ = command.main("--tables", "11", "--json", batch=64)
  assert code == 0
  metrics = published.metrics()
  assert set(metrics.values()) == set(planted.EXPECTED)
  measured = {m.dataset: m for m in command.results()}
  assert list(measured) == list(metrics)
  for key, m in measured.items():
    assert (m.table, m.model, m.metric, m.n) == ("11", "planted", metrics[key], 4)
    assert m.value == pytest.approx(planted.EXPECTED[metrics[key]]), key
    assert m.weights == planted.HASH
  facts = json.loads(out)
  assert facts["measured_now"] == 27
  assert facts["failures"] == []
  assert sum(facts["tables"]["11"].values()) == 27  # the model's row alone
  page = (command.output / "paper.md").read_text()
  assert "Food101, test: the paper's test split has 25,250 records, this copy has 4" in page
  for name in ("paper.html", "paper.tex", "paper.csv", "paper.jsonl", "clip_benchmark.csv"):
    assert (command.output / name).is_file()
  seen = command.world.model.images_seen
  code, out, _ = command.main("--tables", "11", "--json", batch=64)
  assert (code, json.loads(out)["measured_now"]) == (0, 0)
  assert command.world.model.images_seen == seen
  assert len(command.results()) == 27


def test_every_data_set_as_tfds_has_it(command):
  command.world.tfds = True
  found = [d for d in datasets.all_datasets() if d.tfds_test and d.rule not in ("draw", "clevr")]
  assert len(found) == 20
  for dataset in found:
    if dataset.rule == "captions":
      command.world.captions(dataset.key)
    else:
      command.world.test(dataset.key)
  code, _, err = command.main("--tables", "11,13,16", batch=64)
  assert code == 0, err
  measured = {(m.table, m.dataset, m.metric): m.value for m in command.results()}
  metrics = published.metrics()
  for dataset in found:
    if dataset.rule == "captions":
      assert measured["13", "MSCOCO", "text retrieval R@1"] == 75.0
    else:
      table = "16" if dataset.group == "shift" else "11"
      metric = metrics.get(dataset.key, "accuracy")
      expected = pytest.approx(planted.EXPECTED[metric])
      assert measured[table, dataset.key, metric] == expected, dataset.key
  assert len(measured) == 15 + 6 + 5
  assert list(command.data.glob("wds_*")) == []


def test_retrieval_with_five_captions_after_a_prefix(command):
  for key in ("Flickr30k", "MSCOCO captions"):
    command.world.captions(key)
  assert command.main("--tables", "13")[0] == 0
  values = command.values()
  for key in ("Flickr30k", "MSCOCO"):
    for k, images in ((1, 75.0), (5, 100.0), (10, 100.0)):
      assert values["13", "planted", key, f"text retrieval R@{k}"] == 75.0
      assert values["13", "planted", key, f"image retrieval R@{k}"] == images
  assert len(values) == 12
  assert {m.n for m in command.results()} == {4}
  command.world.model.texts = {
    text.removeprefix("a photo of "): row for text, row in command.world.model.texts.items()
  }
  assert command.main("--tables", "13", "--caption-prefix", "")[0] == 0
  assert len(command.results()) == 24
  bare = {(t, "planted", *cell): v for (t, m, *cell), v in command.values().items() if "after" in m}
  assert bare == values


def test_shifts_over_their_own_classes(command):
  for key in ("ImageNet", "ImageNetV2", "ImageNet-A", "ImageNet-R", "ImageNet-Sketch"):
    numbers = command.world.number
    command.world.test(key)
    if key in ("ImageNet-A", "ImageNet-R"):  # another of the 1,000 classes is nearer still
      indices = datasets.named(key).imagenet_indices
      other = next(k for k in range(1000) if k not in indices)
      everything = command.world.classes(datasets.named("ImageNet"))
      row = command.world.model.rows[numbers]
      command.world.model.rows[numbers] = unit(row + 1.5 * everything[other])
  code, _, _ = command.main("--tables", "16", batch=64)
  assert code == 0
  values = command.values()
  assert set(values.values()) == {75.0}
  assert {(model, key) for _, model, key, _ in values} == {
    ("Zero-Shot CLIP (planted)", key)
    for key in ("ImageNet", "ImageNetV2", "ImageNet-A", "ImageNet-R", "ImageNet-Sketch")
  }
  cells = command.cells()
  for key, why in (
    ("ObjectNet", "113 classes are not named here; give --prompts 'ObjectNet=FILE.json'"),
    ("Youtube-BB", "which of ImageNet's classes its own consist of is not known here"),
  ):
    assert why in cells["Zero-Shot CLIP (planted)", key]["why"]
  probed = cells["Linear Probe CLIP (ViT-L/14@336px)", "ImageNetV2"]
  assert probed["verdict"] == "not available"
  assert "ImageNet train: not available in" in probed["why"]


def objectnet(command, folder):
  """Three images, two of which are answered rightly. Returns: the file of names and templates."""
  dataset = datasets.named("ObjectNet")
  names = [f"thing {k}" for k in range(113)]
  path, world = folder / "own.json", command.world
  path.write_text(json.dumps({"classes": names, "templates": ["a {}"]}))
  for k, name in enumerate(names[:3]):
    image = command.data / dataset.folder / "images" / name.replace(" ", "_") / "1.png"
    trees.write(image, planted.file_of(world.number))
    world.model.rows[world.number] = planted.direction(names[min(k, 1)])
    world.number += 1
  world.model.texts |= {f"a {name}": planted.direction(name) for name in names}
  return path


def test_objectnet_by_names_of_ones_own(command, tmp_path):
  path = objectnet(command, tmp_path)
  words = ("--tables", "16", "--datasets", "objectnet", "--prompts", f"ObjectNet={path}")
  assert command.main(*words)[0] == 0
  assert command.values() == {
    ("16", "Zero-Shot CLIP (planted)", "ObjectNet", "accuracy"): pytest.approx(200 / 3)
  }


def many(command, key="MNIST", images=40):
  """A test split of several chunks, of which three quarters are answered rightly."""
  world, dataset = command.world, datasets.named(key)
  class_CE = world.classes(dataset)
  labels = [k % 10 for k in range(images)]
  for number, label in zip(world.write(dataset, "test", labels), labels, strict=True):
    wrong = 4 * (number % images) < images
    world.model.rows[number] = class_CE[(label + 1) % 10 if wrong else label]


def stopped_after(model, images, how):
  """The model's encoder, which is interrupted after so many images."""
  encode = model.encode_image

  def encode_image(rows):
    if model.images_seen >= images:
      model.encode_image = encode
      how()
    return encode(rows)

  model.encode_image = encode_image


def interrupt():
  raise KeyboardInterrupt


def terminate():
  os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("how", [interrupt, terminate])
@pytest.mark.parametrize(("images", "kept", "cells"), [(5, 0, 0), (20, 16, 0), (40, 40, 1)])
def test_a_stopped_run_goes_on(command, how, images, kept, cells):
  """In the middle of a data set at its last whole chunk, and between two cells."""
  many(command)
  command.world.test("CIFAR10")
  assert command.main("--tables", "11", "--datasets", "CIFAR10", batch=1)[0] == 0
  model = command.world.model
  model.images_seen = 0
  many(command, "STL10")  # measured after MNIST
  before = signal.getsignal(signal.SIGTERM)
  stopped_after(model, images, how)
  words = ("--tables", "11", "--datasets", "CIFAR10", "MNIST", "STL10")
  code, _, err = command.main(*words, batch=1)
  assert (code, err) == (130, "interrupted\n")
  assert signal.getsignal(signal.SIGTERM) == before
  assert len(command.results()) == 1 + cells
  assert "75.0 " in (command.output / "paper.md").read_text()  # CIFAR10's
  model.images_seen = 0
  code, _, _ = command.main(*words, batch=1)
  assert code == 0
  assert model.images_seen == 80 - kept
  assert [m.value for m in command.results()] == [75.0] * 3


def test_results_of_other_weights_are_refused(command, monkeypatch):
  command.world.test("MNIST")
  assert command.main("--tables", "11", "--datasets", "MNIST")[0] == 0
  before = (command.output / "results.jsonl").read_bytes()
  monkeypatch.setattr(planted, "HASH", "b" * 64)
  code, _, err = command.main("--tables", "11", "--datasets", "MNIST")
  assert code == 2
  assert f"planted was measured with weights {'a' * 64}, now it is {'b' * 64}" in err
  assert "write to another folder, or give one of them another name" in err
  assert (command.output / "results.jsonl").read_bytes() == before
  assert command.main("--tables", "11", "--datasets", "MNIST", models=["new=weights"])[0] == 0
  assert [m.model for m in command.results()] == ["planted", "new"]


def test_other_data_or_settings_are_measured_again(command, tmp_path):
  world = command.world
  dataset = world.test("CIFAR10")
  words = ("--tables", "11", "--datasets", "CIFAR10")
  assert command.main(*words)[0] == 0
  more = world.write(dataset, "test", [0] * 5)
  for number in more:
    world.model.rows[number] = world.classes(dataset)[0]
  assert command.main(*words)[0] == 0
  names = world.names(dataset)
  path = tmp_path / "own.json"
  path.write_text(json.dumps({"classes": names, "templates": ["my {}"]}))
  world.model.texts = {f"my {name}": planted.direction(name) for name in names}
  assert command.main(*words, "--prompts", f"CIFAR10={path}")[0] == 0
  first, second, third = command.results()
  assert (first.value, second.value, third.value) == (75.0, 100.0, 100.0)
  assert first.data != second.data == third.data
  assert first.prompts == second.prompts != third.prompts
  cells = command.cells()
  assert cells["planted", "CIFAR10"]["measured"] == "100.0"
  own = cells["planted [own prompts]", "CIFAR10"]
  assert (own["measured"], own["published"], own["verdict"]) == ("100.0", "", "not published")


def test_two_models_each_under_its_name(command):
  other = planted.World(command.data, planted.Model())
  command.world.test("MNIST")
  other.model.rows = dict.fromkeys(command.world.model.rows, planted.direction("0"))
  other.model.texts = command.world.model.texts
  worlds = {"RN50": command.world, "mine": other}
  hashes = {"RN50": "a" * 64, "mine": "c" * 64}
  command.world.loaded = lambda named: paper_models.Weights(
    named.name, worlds[named.name].model, hashes[named.name]
  )
  models = ["RN50=one.pt", "mine=two"]
  code, out, _ = command.main("--tables", "11", "--datasets", "MNIST", "--json", models=models)
  assert code == 0
  assert json.loads(out)["measured_now"] == 2
  cells = command.cells()
  assert cells["RN50", "MNIST"]["published"]
  assert cells["RN50", "MNIST"]["measured"] == "75.0"
  assert cells["mine", "MNIST"]["measured"] == "25.0"
  assert cells["RN50", "Food101"]["why"] == "not asked for: --datasets names others"
  assert ("ViT-L/14@336px", "MNIST") not in cells


def test_models_of_earlier_runs_stay_in_the_tables(command):
  command.world.test("MNIST")
  words = ("--tables", "11", "--datasets", "MNIST")
  for name in ("RN50", "RN101"):
    assert command.main(*words, models=[f"{name}=weights"])[0] == 0
  cells = command.cells()
  assert cells["RN50", "MNIST"]["measured"] == cells["RN101", "MNIST"]["measured"] == "75.0"
  assert ("RN50x4", "MNIST") not in cells


def test_the_first_records_only_are_never_compared(command):
  command.world.test("MNIST")
  words = ("--tables", "11", "--datasets", "MNIST", "--limit", "3")
  assert command.main(*words, models=["RN50=weights"])[0] == 0
  cell = command.cells()["RN50 [first 3 records]", "MNIST"]
  assert (cell["measured"], cell["n"], cell["verdict"]) == ("100.0", "3", "not published")
  assert not {row["verdict"] for row in command.cells().values()} & {"reproduced", "off"}
  seen = command.world.model.images_seen
  assert command.main("--tables", "11", "--datasets", "MNIST", models=["RN50=weights"])[0] == 0
  assert command.world.model.images_seen == seen + 3  # the fourth alone, in a batch of three
  assert command.cells()["RN50", "MNIST"]["measured"] == "75.0"


def spoil(command, key, name, content):
  """A member of the first tar file of a test split with other content."""
  place = command.data / datasets.wds_folder(datasets.named(key).wds[0]) / "test"
  number = int((place / "nshards.txt").read_text()) - 1
  old = planted.file_of(command.world.number - 1)
  files = {"s1.png": old, "s1.cls": "0", name: content}
  trees.tar(place / f"{number + 1}.tar", files)
  trees.write(place / "nshards.txt", str(number + 2))


def fails(command, *words):
  """An error of one cell in one line; the other cell and the tables are there all the same."""
  code, _, err = command.main("--tables", "11", "--datasets", "MNIST", "CIFAR10", *words)
  assert code == 2
  assert err.startswith("error: 1 of the cells could not be measured; the first: Table 11, planted")
  assert err.count("\n") == 1
  assert command.values()["11", "planted", "CIFAR10", "accuracy"] == 75.0
  assert ("11", "planted", "MNIST", "accuracy") not in command.values()
  cell = command.cells()["planted", "MNIST"]
  assert cell["verdict"] == "not available"
  assert "planted could not be measured: " in cell["why"]
  return err


def test_a_corrupt_image_is_named_or_left_out(command):
  for key in ("CIFAR10", "MNIST"):
    command.world.test(key)
  spoil(command, "MNIST", "s1.png", b"no image")
  err = fails(command)
  assert "2.tar sample s1: image cannot be decoded" in err
  words = ("--tables", "11", "--datasets", "MNIST", "CIFAR10", "--corrupt-images", "skip")
  for measured_now in (2, 0):  # the second time all is there already
    code, out, _ = command.main(*words, "--json", models=["RN50=weights"])
    assert (code, json.loads(out)["measured_now"]) == (0, measured_now)
    for name in ("paper.md", "paper.html"):
      page = (command.output / name).read_text()
      assert page.count("MNIST: left out, its image cannot be decoded: ") == 1
      assert "2.tar sample s1" in page
    cells = command.cells()
    left = cells["RN50 [corrupt images left out]", "MNIST"]
    assert (left["measured"], left["n"], left["verdict"]) == ("75.0", "4", "not published")
    assert cells["RN50", "MNIST"]["measured"] == ""
    assert cells["RN50", "CIFAR10"]["verdict"] == "reproduced"  # 75.6: none is left out
  kept = {m.dataset: m.left_out for m in command.results() if m.model.startswith("RN50")}
  assert kept["CIFAR10"] == ()
  assert [where.rpartition("/")[2] for where in kept["MNIST"]] == ["2.tar sample s1"]
  fails_again, _, _ = command.main("--tables", "11", "--datasets", "MNIST")
  assert fails_again == 2
  place = command.data / "wds_mnist" / "test"
  trees.write(place / "nshards.txt", "2")  # mended: the row without it is of other data
  assert command.main(*words, models=["RN50=weights"])[0] == 0
  assert command.cells()["RN50", "MNIST"]["measured"] == "75.0"
  assert ("RN50 [corrupt images left out]", "MNIST") not in command.cells()
  assert "its image cannot be decoded" not in (command.output / "paper.md").read_text()


def test_figures_of_other_code_are_told_and_measured_again_if_wished(command, monkeypatch):
  for key in ("CIFAR10", "MNIST"):
    command.world.test(key)
  words = ("--tables", "11", "--datasets", "MNIST", "CIFAR10")
  version = ["v1"]
  monkeypatch.setattr(paper_run.code_version, "current", lambda: version[0])
  code, out, _ = command.main(*words[:3], "CIFAR10")
  assert code == 0
  assert "note:" not in out
  version[0] = "v2"
  said = "1 of 2 figures was measured by other versions of the code than this one, v2: v1 (1)"
  for _ in range(2):
    code, out, _ = command.main(*words)
    assert code == 0
    assert f"note: {said}; --remeasure measures what is asked for again\n" in out
    for name in ("paper.md", "paper.html"):
      assert said in (command.output / name).read_text()
  assert [(m.dataset, m.code) for m in command.results()] == [("CIFAR10", "v1"), ("MNIST", "v2")]
  command.world.model.images_seen = 0
  code, out, _ = command.main(*words, "--remeasure", "--json")
  assert (code, json.loads(out)["measured_now"], json.loads(out)["other_code"]) == (0, 2, "")
  assert command.world.model.images_seen > 0  # not what v1 kept of them
  assert [(m.dataset, m.code, m.value) for m in command.results()[2:]] == [
    ("CIFAR10", "v2", 75.0), ("MNIST", "v2", 75.0)
  ]  # fmt: skip
  assert "other versions" not in (command.output / "paper.md").read_text()
  assert json.loads(command.main(*words, "--json")[1])["measured_now"] == 0


def test_what_a_probe_knows_of_itself_is_kept_and_told(command, monkeypatch):
  learn, fits = linear_probe.learn, []

  def odd(train, classes, *more):
    found = learn(train, classes, *more)
    fits.append(found.fit.iterations)
    if classes == 10:
      return found
    fit = dataclasses.replace(found.fit, converged=False)
    return dataclasses.replace(found, fit=fit, lambda_=1e6)

  monkeypatch.setattr(linear_probe, "learn", odd)
  for key in ("MNIST", "HatefulMemes"):
    command.world.probe(key)
  words = ("--tables", "10", "--datasets", "MNIST", "HatefulMemes")
  assert command.main(*words)[0] == 0
  lines = map(json.loads, (command.output / "results.jsonl").read_text().splitlines())
  made = {line["dataset"]: line["fits"] for line in lines}
  assert made["HatefulMemes"] == [{"lambda": 1e6, "iterations": fits[1], "converged": False}]
  assert [(fit["iterations"], fit["converged"]) for fit in made["MNIST"]] == [(fits[0], True)]
  for _ in range(2):
    table = (command.output / "paper.md").read_text().split("## Table 10: ")[1]
    below = table.rpartition("|\n")[2]
    for said in (
      "planted, HatefulMemes: 1 of 1 fits did not come to their minimum.",
      "planted, HatefulMemes: The lambda chosen, 1e+06, is an end of those tried.",
    ):
      assert said in below
      assert said in (command.output / "paper.html").read_text().partition('id="t10"')[2]
      assert said in (command.output / "paper.tex").read_text()
    assert "planted, MNIST: 1 of 1" not in below
    assert command.main(*words)[0] == 0
  assert len(fits) == 2


def test_a_label_out_of_range_names_its_record(command):
  for key in ("CIFAR10", "MNIST"):
    command.world.test(key)
  spoil(command, "MNIST", "s1.cls", "10")
  assert "2.tar sample s1: label 10 is out of range" in fails(command)


def test_an_empty_split_is_an_error(command):
  for key in ("CIFAR10", "MNIST"):
    command.world.test(key)
  place = command.data / "wds_mnist" / "test"
  for shard in range(2):
    trees.tar(place / f"{shard}.tar", {})
  assert "MNIST test:" in (err := fails(command))
  assert "has no records; get the data anew" in err


def test_features_with_nan_name_the_record(command):
  for key in ("CIFAR10", "MNIST"):
    command.world.test(key)
  command.world.model.rows[command.world.number - 2] = np.full(planted.WIDTH, np.nan)
  assert "1.tar sample s0000006: its embedding has norm nan" in fails(command)


def test_a_full_disk_stops_the_run_and_loses_nothing(command, monkeypatch):
  command.world.test("CIFAR10")
  many(command)
  write, room = feature_file._write, [4]  # CIFAR10's rows and their line, and those of 16 of MNIST

  def full(file, data):
    if not room[0]:
      raise OSError(28, "No space left on device")
    room[0] -= 1
    write(file, data)

  monkeypatch.setattr(feature_file, "_write", full)
  words = ("--tables", "11", "--datasets", "CIFAR10", "MNIST")
  code, _, err = command.main(*words, batch=1)
  assert code == 2
  assert ".rows: No space left on device; the features of 16 of 40 records are kept" in err
  assert [m.dataset for m in command.results()] == ["CIFAR10"]
  assert command.cells()["planted", "CIFAR10"]["measured"] == "75.0"
  room[0] = 100
  command.world.model.images_seen = 0
  assert command.main(*words, batch=1)[0] == 0
  assert command.world.model.images_seen == 24
  assert [m.value for m in command.results()] == [75.0, 75.0]


def test_a_results_file_that_is_cut_is_told(command):
  command.world.test("MNIST")
  words = ("--tables", "11", "--datasets", "MNIST")
  assert command.main(*words)[0] == 0
  path = command.output / "results.jsonl"
  path.write_bytes(path.read_bytes()[:-20])
  assert command.main(*words)[0] == 0
  assert len(command.results()) == 1
  assert "results.jsonl:1: the last line was cut off" in (command.output / "paper.md").read_text()


def test_nothing_there_is_told_and_no_error(command):
  code, out, _ = command.main("--tables", "10,13", "--json")
  assert code == 0
  facts = json.loads(out)
  assert facts["tables"]["10"] == {"not available": 27}
  why = command.cells()["planted", "Food101"]["why"]
  assert "Food101 test: not available in" in why
  assert "To get it: tfds build food101 --file_format=array_record" in why
  assert facts["not_available"]["Food101"] == why
  assert len(facts["not_available"]) == 29
  assert command.results() == ()


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--tables", "10,17"], "table '17': choose of 1, 9, 10, 11, 12"),
    (["--tables", ","], "table '': choose of 1, 9"),
    (["--tables", "figure2", "--predictive", __file__], f"{__file__}: not what tools/predictive"),
    (["--tables", "figure13", "--standard-models", "none.csv"], "none.csv: No such file"),
    (["--datasets", "Fod101"], "dataset 'Fod101': no such dataset; choose one of Food101"),
    (["--tables", "13", "--datasets", "MNIST"], "none of MNIST is in table 13"),
    (["--prompts", "x.json"], "'x.json': want KEY=FILE"),
    (["--prompts", "Birds=x.json"], "dataset 'Birds': no such dataset"),
    (["--limit", "-1"], "--batch 3 --limit -1: at least 1, and 0 or more"),
    (["--data", "nowhere"], "--data nowhere: no such folder"),
    (["--models", "weights"], "'weights': want NAME=WEIGHTS"),
  ],
)
def test_what_cannot_be_asked_for(command, words, message):
  code, out, err = command.main(*words)
  assert (code, out) == (2, "")
  assert err.startswith(f"error: {message}")
  assert not command.output.exists()


def test_lines_for_people_name_every_cell(command):
  command.world.test("MNIST")
  code, out, _ = command.main("--tables", "11", "--datasets", "MNIST", "DTD")
  assert code == 0
  assert "Table 11, planted, MNIST: accuracy 75.0\n" in out
  assert f"page: {command.output / 'paper.html'}\n" in out
  assert f"not available: DTD; how to get them: {command.output / 'paper.md'}\n" in out


def test_a_bar_on_a_terminal_and_no_lines():
  text = io.StringIO()
  console = rich.console.Console(file=text, force_terminal=True, width=120)
  with paper_progress.bar(console, 2) as bar:
    bar.part("MNIST: test", 3, 10)
    bar.done("a cell", "accuracy 75.0")
  shown = text.getvalue()
  for words in ("cells", "1/2", "MNIST: test", "3/10"):
    assert words in shown
  assert "accuracy 75.0" not in shown


def test_threads_leave_signals_alone():
  before, inside = signal.getsignal(signal.SIGTERM), []

  def look():
    with paper_progress.stoppable():
      inside.append(signal.getsignal(signal.SIGTERM))

  thread = threading.Thread(target=look)
  thread.start()
  thread.join()
  assert inside == [before]
  look()
  assert inside[1] != before
  assert signal.getsignal(signal.SIGTERM) == before


def own_prompts(path, key, names):
  """KEY=FILE, of a file with these classes and one template."""
  path.write_text(json.dumps({"classes": names, "templates": ["{}"]}))
  return f"{key}={path}"


def test_a_real_model_on_eight_devices(tmp_path, capsys, workdir):  # noqa: F811
  """Against its embeddings on one device, in batches that divide by nothing."""
  world, model = planted.World(tmp_path / "data"), clip_jax.load(workdir)
  dataset = datasets.named("MNIST")
  labels = [k % 10 for k in range(23)]
  world.write(dataset, "test", labels)
  world.captions("Flickr30k")
  seen = [k % 10 for k in range(80)]
  world.write(dataset, "train", seen)
  several, prompted = {}, []
  world.names = lambda dataset: [f"{k}" for k in range(dataset.classes)]  # short ones
  for key in (*METRICS, "ImageNetV2"):
    names = world.names(datasets.named(key))
    rows_9E = model.encode_image(np.stack([picture(world.number + i) for i in range(9)]))
    scores_9C = rows_9E @ model.encode_text(names).T
    # The places of the right answers: some are the first, some among five, some are not.
    places = np.array([0, 3, 0, 1, 7, 5, 0, 4, 9]) % len(names)
    right_9 = np.argsort(-scores_9C, axis=1)[np.arange(9), places]
    world.write(datasets.named(key), "test", right_9.tolist())
    several[key] = scores_9C, right_9
    prompted.append(own_prompts(tmp_path / f"{key}.json", key, names))
  own = tmp_path / "own.json"
  own.write_text(json.dumps({"classes": list("0123456789"), "templates": ["{}", "a {}"]}))
  words = ["paper", "--models", f"tiny={workdir}", "--data", str(world.root), "--batch", "7"]
  words += ["--output", str(tmp_path / "out"), "--processes", "1", "--tables", "10,11,13,16"]
  words += ["--datasets", "MNIST", "Flickr30k", "CIFAR10", *several, "--json"]
  words += ["--prompts", f"MNIST={own}", *prompted, "--caption-prefix", ""]
  assert cli.main(words) == 0, capsys.readouterr().err
  measured = paper_results.read(tmp_path / "out" / "results.jsonl").measured
  rows = {"tiny", "tiny [own prompts]", "tiny [captions after '']"}
  shift = "Zero-Shot CLIP (tiny [own prompts])"
  assert {m.model for m in measured} == rows | {shift}
  value = {(m.dataset, m.metric): m.value for m in measured if m.table != "10"}
  image_NRR3 = np.stack([picture(k) for k in range(world.number)])
  features_ND = model.image_features(image_NRR3[:107])
  train = linear_probe.Split(features_ND[27:], np.array(seen))
  test = linear_probe.Split(features_ND[:23], np.array(labels))
  probed = linear_probe.probe(train, test, 10, scores.accuracy)
  assert measured[0].value == pytest.approx(100 * probed.score, abs=100 / 23)
  image_NE = model.encode_image(image_NRR3)
  digits = [model.encode_text([f"{k}", f"a {k}"]).mean(0) for k in range(10)]
  answers = np.argmax(image_NE[:23] @ unit(digits).T, axis=1)
  assert value["MNIST", "accuracy"] == pytest.approx(100 * np.mean(answers == labels))
  for key, (scores_9C, right_9) in several.items():
    by_hand(value, key, scores_9C, right_9)
  texts = [f"{i} {c} Flickr30k" for i in range(4) for c in range(5)]
  cosines = image_NE[23:27] @ model.encode_text(texts, truncate=True).T
  found = np.argsort(-cosines, axis=1)[:, :10] // 5 == np.arange(4)[:, None]
  image = np.argsort(-cosines.T, axis=1) == np.arange(20)[:, None] // 5
  for k in (1, 5, 10):
    expected = 100 * np.mean(found[:, :k].any(axis=1))
    assert value["Flickr30k", f"text retrieval R@{k}"] == expected
    expected = 100 * np.mean(image[:, :k].any(axis=1))
    assert value["Flickr30k", f"image retrieval R@{k}"] == pytest.approx(expected)


def by_hand(value, key, scores_NC, labels):
  """A data set's figure against what its metric is in a line of NumPy, or of scikit-learn."""
  order_NC = np.argsort(-scores_NC, axis=1)
  right = order_NC[:, 0] == labels
  match key:
    case "VOC2007":
      metric, shown = "11-point mAP", np.arange(scores_NC.shape[1]) == labels[:, None]
      curves = [precision_recall_curve(shown[:, c], scores_NC[:, c]) for c in np.unique(labels)]
      curves = [(p[:-1], r[:-1]) for p, r, _ in curves]  # without the end that is made up
      best = [[p[r >= k / 10 - 1e-9].max() for k in range(11)] for p, r in curves]
      expected = np.mean(best)
    case "HatefulMemes":
      metric, expected = "ROC AUC", roc_auc_score(labels, scores_NC[:, 1] - scores_NC[:, 0])
    case "FGVC Aircraft":
      metric = "mean per class"
      expected = np.mean([right[labels == c].mean() for c in np.unique(labels)])
    case "Kinetics700":
      metric = "mean(top1, top5)"
      top5 = (order_NC[:, :5] == labels[:, None]).any(axis=1)
      expected = (right.mean() + top5.mean()) / 2
    case _:
      metric, expected = "accuracy", right.mean()
  assert value[key, metric] == pytest.approx(100 * expected), key


TWO = """
  import pathlib, pickle, sys
  host, port, folder = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
  import planted
  from clip_jax import cli
  from clip_jax.evaluation.paper import models as paper_models
  world = planted.World(folder / "data", pickle.loads((folder / "model").read_bytes()))
  paper_models.load = world.loaded
  code = cli.main([
    "paper", "--models", "planted=x", "--data", str(world.root), "--output", str(folder / "out"),
    "--batch", "5", "--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", host,
    "--heartbeat", "20", "--json", *sys.argv[4:],
  ])
  print(code, world.model.images_seen)
"""


def test_two_processes_give_what_one_gives(command, tmp_path):
  """The first has some of the features already; each encodes its share of what is missing."""
  for key in METRICS:
    command.world.test(key)
  for key in ("DTD", "STL10", "GTSRB"):
    command.world.test(key)
  spoil(command, "DTD", "s1.png", b"no image")  # in the second's share
  spoil(command, "GTSRB", "s1.cls", "99")
  prompted = prompts.named(datasets.named("STL10").prompts)
  too_long = prompted.templates[0].replace("{}", "monkey")  # in the share of one; none of CIFAR10's
  command.world.model.too_long = {too_long}
  few = command.world.probe("EuroSAT", per_class=1)
  command.world.classes(few)
  own = [f"ObjectNet={objectnet(command, tmp_path)}"]
  names = command.world.names(datasets.named("Kinetics700"))  # of 28 templates it takes one
  own.append(own_prompts(tmp_path / "kinetics.json", "Kinetics700", names))
  command.world.model.texts |= {name: planted.direction(name) for name in names}
  many(command)
  command.world.captions("Flickr30k")
  dataset = command.world.probe("CIFAR10")
  class_CE = command.world.classes(dataset)
  command.world.model.rows |= dict.fromkeys(command.world.model.features, class_CE[0])
  words = ("--tables", "11", "--datasets", "MNIST")
  assert command.main(*words, "--limit", "20", batch=1)[0] == 0
  (tmp_path / "model").write_bytes(pickle.dumps(command.world.model))
  keys = ("MNIST", *METRICS, "ObjectNet", "Flickr30k", "CIFAR10")
  bad = {
    ("11", "DTD"): "2.tar sample s1: image cannot be decoded (",
    ("11", "GTSRB"): "2.tar sample s1: label 99 is out of range",
    ("11", "STL10"): f"text {too_long!r} is too long",
    ("10", "EuroSAT"): "10 examples: every class has too few to hold back 20%",
  }
  asked = (*keys, *(key for _, key in bad))
  outputs = in_two(tmp_path, "--tables", "10,11,13,16", "--datasets", *asked, "--prompts", *own)
  ends = [output.splitlines()[-1].split() for output in outputs]
  assert [code for code, _ in ends] == ["2", "2"], outputs
  for output in outputs:
    assert "error: 4 of the cells could not be measured; the first: Table 10, " in output, outputs
  said = json.loads(next(line for line in outputs[0].splitlines() if line.startswith("{")))
  with (command.output / "paper.csv").open(newline="") as file:
    rows = [row for row in csv.DictReader(file) if row["model"] == "planted"]
  for (table, key), why in bad.items():
    (failure,) = (f for f in said["failures"] if f.startswith(f"Table {table}, planted, {key}: "))
    assert why in failure
    (cell,) = (row for row in rows if (row["table"], row["dataset"]) == (table, key))
    assert why in cell["why"]
  whole = ("planted", "planted [own prompts]")
  value = {(m.dataset, m.table): m.value for m in command.results() if m.model in whole}
  assert value["MNIST", "11"] == value["CIFAR10", "10"] == 75.0
  for key in METRICS:
    metric = datasets.named(key).metric
    assert value[key, "11"] == pytest.approx(planted.EXPECTED[metric]), key
  assert value["Flickr30k", "13"] == 100.0  # the last of its six: R@10
  shift = [m.value for m in command.results() if m.table == "16"]
  assert shift == [pytest.approx(200 / 3)]
  assert len(command.results()) == 1 + 7 + 1 + 6 + 1
  # 20 of MNIST in 4 batches of 5 are 4 times 3 for each, and so on; CIFAR10 has 60 to train on and
  # EuroSAT 10. Of the other bad ones no image comes to the encoder.
  shares = 3 * (4 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 12 + 1 + 2 + 1)
  assert [int(seen) - command.world.model.images_seen for _, seen in ends] == [shares, shares]


def test_processes_with_other_data_stop_both(command, tmp_path):
  command.world.test("MNIST")
  (tmp_path / "model").write_bytes(pickle.dumps(command.world.model))
  (tmp_path / "other").mkdir()
  outputs = in_two(tmp_path, "--tables", "11", "--datasets", "MNIST", last=["--data", "other"])
  assert "process 1 has other data or prompts than process 0" in "".join(outputs)
  assert command.results() == ()


def in_two(folder, *words, last=()):
  """What the command says in each of two processes; `last` are options of the second alone."""
  ends = two_processes.run(TWO, folder, *words, folder=folder, last=last)
  return [said for _, said in ends]
