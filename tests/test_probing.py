"""`clip-jax probe` from its command line to its files, with models whose answers are planted."""

import csv
import json
import pickle

import numpy as np
import planted
import pytest
import threadpoolctl
import trees
import two_processes
from parsed_page import Page
from sklearn import linear_model

from clip_jax import cli
from clip_jax.evaluation.paper import cells as paper_cells
from clip_jax.evaluation.paper import models as paper_models
from clip_jax.evaluation.probe import linear_probe

CLASSES = ("ant", "bee", "cow")
QUICK = ("--shots", "1", "--seeds", "0")


class Command:
  """The command on a world of pictures; `main` gives its exit code and what it said."""

  def __init__(self, tmp_path, capsys, monkeypatch):
    self.data, self.output, self._capsys = tmp_path / "data", tmp_path / "out", capsys
    self.world, self.hash = planted.World(self.data), planted.HASH
    self.world.model.resolution = 8
    monkeypatch.setattr(paper_models, "load", self._load)

  def _load(self, named):
    return paper_cells.Weights(named.name, self.world.model, self.hash)

  def main(self, *words):
    fixed = ["probe", "--weights", "planted", "--data", str(self.data), "--batch", "7"]
    fixed += ["--output", str(self.output), "--processes", "1"]
    code = cli.main([*fixed, *map(str, words)])
    return code, *self._capsys.readouterr()

  def found(self, *words):
    code, out, err = self.main(*words, "--json")
    assert (code, err) == (0, ""), err
    return json.loads(out)

  def lines(self):
    return [json.loads(line) for line in (self.output / "results.jsonl").read_text().splitlines()]

  def dataset(self, key, **more):
    """Both splits of a data set, with zero-shot answers that are its probe's."""
    dataset = self.world.probe(key, **more)
    labels = planted.OF_TWO if dataset.classes == 2 else planted.LABELS
    class_CE, first = self.world.classes(dataset), self.world.number - len(labels)
    for k, label in enumerate(labels):
      self.world.model.rows[first + k] = class_CE[label]
    last = planted.unit(class_CE[0] - 0.3 * class_CE[labels[-1]])
    self.world.model.rows[self.world.number - 1] = last
    return dataset

  def folder(self, split, labels, noise=1.5, seed=0, wrong=0.3):
    """Pictures of CLASSES with noisy features; zero-shot answers some of them wrongly."""
    rng, model = np.random.default_rng(seed), self.world.model
    class_CE = planted.unit(np.eye(3))
    model.texts |= {f"a photo of a {name}.": class_CE[k] for k, name in enumerate(CLASSES)}
    for label in labels:
      number, self.world.number = self.world.number, self.world.number + 1
      trees.write(self.data / split / CLASSES[label] / f"{number:04d}.png", planted.file_of(number))
      model.features[number] = 3 * np.eye(6)[label] + noise * rng.normal(size=6)
      model.rows[number] = class_CE[(label + (rng.random() < wrong)) % 3]

  def folders(self):
    self.folder("train", [k % 3 for k in range(30)], seed=1)
    self.folder("test", [k % 3 for k in range(24)], seed=2)


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
  return Command(tmp_path, capsys, monkeypatch)


@pytest.mark.parametrize("key", ["MNIST", "Oxford Pets", "VOC2007", "HatefulMemes"])
def test_each_metric(command, key):
  dataset = command.dataset(key)
  several, shots = key == "VOC2007", "1" if key == "MNIST" else "none"
  found = command.found("--dataset", key, *(() if several else ("--shots", shots)))
  expected = pytest.approx(planted.EXPECTED[dataset.metric] / 100)
  assert found["metric"] == dataset.metric
  assert found["zero_shot"] == found["linear_probe"]["score"] == expected
  assert found["linear_probe"]["examples"] == 6 * dataset.classes
  assert found["linear_probe"]["converged"]
  assert found["n"] == 4
  assert [few["shots"] for few in found["few_shot"]] == ([1] if shots == "1" else [])
  assert several == any("No few shots: of several classes" in note for note in found["notes"])
  assert "a fifth drawn with seed 0" in found["notes"][0]
  page = Page((command.output / "probe.html").read_text())
  assert f"{dataset.metric} of 4 images" in page.text
  assert all(line["metric"] == dataset.metric for line in command.lines())


def test_a_validation_split_in_the_training_set_chooses_lambda(command):
  dataset = command.dataset("Rendered SST2", train_folder="train", test_folder="test")
  place = command.data / dataset.folder
  for path in sorted((place / "train").rglob("*.png"))[::2]:
    trees.write(place / "valid" / path.parent.name / path.name, path.read_bytes())
    path.unlink()
  found = command.found("--dataset", dataset.key, "--shots", "1")
  assert "on the 6 images of" in found["notes"][0]
  assert "the data set's own validation split" in found["notes"][0]
  assert found["linear_probe"]["examples"] == 12
  assert {line["validation"] for line in command.lines()} == {"the validation split in train"}


def test_few_shots_as_with_scikit_learn(command):
  """Each figure of a noisy set, from the lambda that its line names."""
  command.folders()
  found = command.found("--shots", "4,1,2", "--seeds", "0,5")
  features = command.world.model.features
  test_ND, test = np.array([features[n] for n in range(30, 54)]), np.arange(24) % 3
  # in the order of their paths: class by class
  train = linear_probe.Split(
    np.array([features[n] for c in range(3) for n in range(c, 30, 3)]), np.repeat([0, 1, 2], 10)
  )
  kept, _ = linear_probe.hold_back(train, 0)
  lines = command.lines()
  ways = [(line["way"], line["shots"], line["seed"]) for line in lines]
  few = [("few-shot", k, seed) for k in (1, 2, 4) for seed in (0, 5)]
  assert ways == [("zero-shot", 0, None), ("linear probe", None, None), *few]
  for line in lines[1:]:
    split = train
    if line["way"] == "few-shot":
      split = kept.take(linear_probe.draw(kept.labels, line["shots"], 3, line["seed"]))
    assert line["examples"] == len(split.labels)
    # by Newton's method: L-BFGS leaves the intercepts of so large a lambda where they start
    oracle = linear_model.LogisticRegression(C=1 / line["lambda"], solver="newton-cholesky")
    with threadpoolctl.threadpool_limits(1):  # its threads spin: slow where cores are shared
      oracle.set_params(tol=1e-10).fit(split.features_ND, split.labels)
    assert line["score"] == pytest.approx(oracle.score(test_ND, test), abs=1e-6 + 1 / 24)
    assert line["n"] == 24
  assert len({line["score"] for line in lines}) > 3
  by_key = {key: line["score"] for key, line in zip(ways, lines, strict=True)}
  for k, shots in enumerate((1, 2, 4)):
    pair = [by_key["few-shot", shots, seed] for seed in (0, 5)]
    assert found["few_shot"][k] == {
      "shots": shots,
      "mean": pytest.approx(np.mean(pair)),
      "scores": dict(zip("05", pair, strict=True)),
    }
  rows = list(csv.DictReader((command.output / "probe.csv").read_text().splitlines()))
  assert sorted(float(r["score"]) for r in rows) == sorted(line["score"] for line in lines)
  rows = command.world.model.rows
  right = [np.argmax(rows[n]) == n % 3 for n in range(30, 54)]
  assert found["zero_shot"] == pytest.approx(np.mean(right))
  assert 0.4 < found["zero_shot"] < 0.9


def test_a_killed_run_goes_on_and_repeats_nothing(command, monkeypatch):
  command.folders()
  words = ("--shots", "1,2", "--seeds", "0,1")
  whole = command.found(*words)
  text, seen = (command.output / "probe.md").read_text(), command.world.model.images_seen
  assert len(command.lines()) == 6
  # killed while the fourth line was written
  content = (command.output / "results.jsonl").read_bytes().split(b"\n")
  (command.output / "results.jsonl").write_bytes(b"\n".join(content[:4])[:-30])
  (command.output / "probe.md").unlink()
  measured = []
  for name in ("probe", "few_shot"):
    run = getattr(linear_probe, name)
    monkeypatch.setattr(
      linear_probe, name, lambda *a, run=run, **b: (measured.append(a[5:]), run(*a, **b))[1]
    )
  again = command.found(*words)
  assert measured == [(1, 1), (2, 0), (2, 1)]
  assert command.world.model.images_seen == seen
  assert "results.jsonl:4: the last line was cut off" in again["notes"][0]
  assert {**again, "notes": again["notes"][1:]} == whole
  kept = (command.output / "probe.md").read_text().splitlines()
  assert [line for line in kept if "cut off" not in line] == text.splitlines()
  more = command.found("--shots", "1,4", "--seeds", "1,2")  # of what is there, what is asked for
  assert measured[3:] == [(1, 2), (4, 1), (4, 2)]
  assert more["few_shot"][0]["scores"]["1"] == whole["few_shot"][0]["scores"]["1"]
  assert len(command.lines()) == 9


def test_results_of_anything_else_are_refused(command):
  command.folders()
  command.found(*QUICK)
  before = (command.output / "results.jsonl").read_bytes()
  seen = command.world.model.images_seen

  def refused(what, *words):
    code, out, err = command.main(*QUICK, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"results.jsonl:1: measured with {what} " in err
    assert "give another --output" in err

  refused("prompts", "--template", "{}")
  refused("features", "--features", "projected")
  refused("validation", "--seed", 1)
  command.hash = "b" * 64
  refused("weights")
  command.hash = planted.HASH
  trees.write(command.data / "train" / "ant" / "9.png", planted.file_of(999))
  refused("train")
  assert (command.output / "results.jsonl").read_bytes() == before
  assert command.world.model.images_seen == seen


def test_a_validation_split_of_its_own_is_used(command):
  command.folders()
  command.folder("val", [0, 1, 2] * 3, seed=3)
  found = command.found(*QUICK)
  note = "Lambda was chosen on the 9 images of data val, and the linear probe then trained on these"
  assert found["notes"][0].startswith(note)
  assert found["linear_probe"]["examples"] == 39
  (command.data / "val").rename(command.data / "mine")
  named = command.found(*QUICK, "--validation-split", "mine", "--output", command.output / "2")
  assert {**named, "notes": 0, "written": 0} == {**found, "notes": 0, "written": 0}
  held = command.found(*QUICK, "--output", command.output / "3")
  assert held["linear_probe"]["examples"] == 30


def test_what_cannot_be_drawn_is_left_out_and_said(command):
  command.folder("train", [0] * 9 + [1] * 4 + [2] * 12)
  command.folder("test", [0, 1, 2] * 3)
  found = command.found("--seeds", "0", "--limit", 100)
  assert [few["shots"] for few in found["few_shot"]] == [1, 2, 4]
  note = "Left out: 8, 16 shots, because class 'bee' has 4 training examples."
  assert found["notes"][1] == note
  assert note in Page((command.output / "probe.html").read_text()).text
  code, _, err = command.main("--shots", "5,8")
  assert code == 2
  assert "--shots 5,8: class 'bee' has 4 training examples; ask for fewer" in err
  command.folder("train", [1])
  code, _, err = command.main("--shots", "5", "--output", command.output / "2")
  assert "class 'bee' has 5 training examples, of which 4 are not held back; ask for fewer" in err
  none = command.found("--shots", "none", "--output", command.output / "2")
  assert (none["few_shot"], none["zero_shot_equals_shots"]) == ([], None)


def test_weights_without_a_vocabulary_have_no_zero_shot(command):
  command.folders()
  command.world.model.tokenizer = None
  found = command.found(*QUICK)
  assert found["zero_shot"] is None
  assert any(note.startswith("No zero-shot: the vocabulary of") for note in found["notes"])
  assert "zero-shot" not in (command.output / "probe.csv").read_text()


def test_prompts_are_tried_before_images_are_encoded(command):
  command.folders()

  def too_long(texts, truncate=False):
    raise ValueError(f"text 0 ({texts[0]!r}) has 99 tokens")

  command.world.model.encode_text = too_long
  code, out, err = command.main(*QUICK)
  assert (code, out) == (2, "")
  assert err == "error: text 0 ('a photo of a ant.') has 99 tokens\n"
  assert command.world.model.images_seen == 0


def test_images_that_cannot_be_decoded(command):
  command.folders()
  trees.write(command.data / "test" / "bee" / "bad.png", b"no image")
  code, out, err = command.main(*QUICK)
  assert (code, out, err.count("\n")) == (2, "", 1)
  assert "test/bee/bad.png: image cannot be decoded" in err
  found = command.found(*QUICK, "--corrupt-images", "skip")
  assert found["n"] == 24
  (note,) = [note for note in found["notes"] if "decoded" in note]
  assert note.startswith("1 of 25 images of data test cannot be decoded and were left out")


def test_features_that_are_not_finite_name_the_record(command):
  command.folders()
  command.world.model.features[4][2] = np.nan
  code, out, err = command.main(*QUICK)
  assert (code, out, err.count("\n")) == (2, "", 1)
  assert "train/bee/0004.png: its features are not finite" in err


def test_classes_of_one_split_alone(command, tmp_path):
  command.folders()
  trees.write(command.data / "train" / "dog" / "0.png", planted.file_of(0))

  def told(*words):
    code, out, err = command.main(*QUICK, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err

  assert "class 'dog' is in split 'train' and not in 'test' (as 1 of 4)" in told()
  every = tmp_path / "every.txt"
  every.write_text("\n".join((*CLASSES, "dog")))
  command.world.model.texts["a photo of a dog."] = command.world.model.texts["a photo of a ant."]
  found = command.found(*QUICK, "--classes", every)
  assert "1 of 4 classes have no images in data test, as 'dog'." in found["notes"]
  (command.data / "train" / "dog").rename(command.data / "test" / "dog")
  assert "class 'dog' is in split 'test' and not in 'train' (as 1 of 4)" in told()
  words = told("--classes", every, "--output", command.output / "2")
  assert "data train: class 'dog' has no images (as 1 of 4): a probe cannot learn it" in words
  (command.data / "test" / "dog").rename(command.data / "test" / ".dog")
  command.folder("val", [0, 1, 2])
  trees.write(command.data / "val" / "elk" / "0.png", planted.file_of(0))
  assert "class 'elk' is in split 'val' and not in 'train'" in told()


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (("--shots", "0"), "--shots 0: want whole numbers from 1, each once"),
    (("--shots", "1,1"), "--shots 1,1: want whole numbers from 1, each once"),
    (("--shots", "few"), "--shots 'few': want whole numbers, as 1,2,4"),
    (("--shots", "-1"), "--shots '-1': want whole numbers"),
    (("--shots", "1,,2"), "--shots '1,,2': want whole numbers"),
    (("--seeds", "x"), "--seeds 'x': want whole numbers"),
    (("--seeds", "none"), "--seeds: none; want one or more"),
    (("--batch", "0"), "--batch 0: want at least 1"),
    (("--limit", "-1"), "--limit -1: want a number of images"),
    (("--split", "dev"), "no split 'dev'; it has test, train"),
    (("--train-split", "dev"), "no split 'dev'; it has test, train"),
    (("--validation-split", "dev"), "no split 'dev'; it has test, train"),
    (("--train-split", "test"), "splits 'test' and 'test' are the same 24 images"),
    (("--validation-split", "test"), "splits 'test' and 'test' are the same 24 images"),
    (("--train-split", "empty"), "split 'empty' has no images"),
    (("--data", "none"), "--data none: no such folder"),
    (("--data", "digits", "--validation-split", "val"), "digits: no split 'val'"),
    (("--output", "file"), "--output file: is a file; give a folder"),
  ],
)
def test_mistakes_are_one_line(command, tmp_path, monkeypatch, words, message):
  monkeypatch.chdir(tmp_path)
  command.folders()
  (tmp_path / "file").write_text("x")
  if "empty" in words:
    for name in CLASSES:
      (command.data / "empty" / name).mkdir(parents=True)
  code, out, err = command.main(*words)
  assert (code, out, err.count("\n")) == (2, "", 1)
  assert err.startswith("error: ")
  assert message in err
  assert not command.output.exists()


def test_several_classes_an_image_have_no_shots(command):
  command.dataset("VOC2007")
  code, _, err = command.main("--dataset", "VOC2007", "--shots", "1")
  assert code == 2
  assert "VOC2007 test has several classes an image; give --shots none" in err


def test_a_folder_without_splits_is_no_data_for_a_probe(command):
  command.folders()
  code, _, err = command.main("--data", command.data / "train")
  assert code == 2
  assert "splits 'train' and 'test' are the same 30 images" in err


TWO = """
  import pathlib, pickle, sys
  host, port, folder = sys.argv[1], sys.argv[2], pathlib.Path(sys.argv[3])
  import planted
  from clip_jax import cli
  from clip_jax.evaluation.paper import models
  world = planted.World(folder / "data", pickle.loads((folder / "model").read_bytes()))
  models.load = world.loaded
  code = cli.main([
    "probe", "--weights", "x", "--data", str(world.root), "--output", str(folder / "two"),
    "--batch", "5", "--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", host,
    "--heartbeat", "20", "--shots", "none", "--json",
  ])
  print(code, world.model.images_seen)
"""


def test_two_processes_give_what_one_gives(command, tmp_path):
  command.folders()
  found = command.found("--shots", "none")
  (tmp_path / "model").write_bytes(pickle.dumps(command.world.model))
  ends = two_processes.run(TWO, tmp_path)
  assert [said.splitlines()[-1].split()[0] for _, said in ends] == ["0", "0"], ends
  first, second = (said.splitlines() for _, said in ends)
  assert {**json.loads(first[-2]), "written": 0} == {**found, "written": 0}
  assert not any(line.startswith("{") for line in second)  # the first one speaks for both
  keys = ("way", "shots", "seed", "score", "n", "examples")
  two = [json.loads(x) for x in (tmp_path / "two" / "results.jsonl").read_text().splitlines()]
  assert [[x[k] for k in keys] for x in two] == [[x[k] for k in keys] for x in command.lines()]
