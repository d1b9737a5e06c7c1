"""Units of the paper's tables by themselves: probes, their folds, and what is kept of them."""

import dataclasses

import numpy as np
import planted
import pytest

from clip_jax.data.records import Record
from clip_jax.evaluation import datasets, encoding
from clip_jax.evaluation.paper import cells as paper_cells
from clip_jax.evaluation.paper import results as paper_results
from clip_jax.evaluation.paper import units as paper_units
from clip_jax.evaluation.probe import linear_probe, logistic, probe_file


def settings(root, **options):
  made = {"roots": (root / "data",), "cache": root / "cache", "batch": 7} | options
  return paper_units.Settings(**made)


@pytest.fixture
def world(tmp_path):
  return planted.World(tmp_path / "data")


def measure(world, tmp_path, table, key, probed, **options):
  chosen = settings(tmp_path, **options)
  unit = paper_units.Unit(table, datasets.named(key), probed)
  task = paper_units.task(unit, chosen, paper_units.opener(chosen))
  return task, paper_cells.measure(task, world.weights(), chosen, lambda *_: None)


@pytest.mark.parametrize("key", ["MNIST", "Oxford Pets", "VOC2007", "HatefulMemes"])
def test_a_probe_by_each_metric(world, tmp_path, key):
  dataset = world.probe(key)
  task, found = measure(world, tmp_path, "10", key, True)
  expected = planted.EXPECTED[dataset.metric]
  assert found.values == (paper_cells.Value(dataset.metric, pytest.approx(expected), 4),)
  assert found.left_out == ()
  assert task.unit.metrics == (dataset.metric,)


def test_the_projected_features_are_another_cell(world, tmp_path):
  dataset = world.probe("MNIST")
  world.model.rows = {n: np.pad(planted.unit(x), (0, 3)) for n, x in world.model.features.items()}
  task, found = measure(world, tmp_path, "10", "MNIST", True, features="projected")
  assert found.values[0].percent == 75.0
  paper = settings(tmp_path)
  own = dataclasses.replace(paper, features="projected")
  unit = paper_units.Unit("10", dataset, True)
  assert unit.row("RN50", paper) == "RN50"
  assert unit.row("RN50", own) == "RN50 [projected features]"
  assert paper_units.task(unit, paper, paper_units.opener(paper)).prompts != task.prompts
  zero_shot = paper_units.Unit("11", dataset, False)
  assert zero_shot.row("RN50", own) == "RN50"
  limited = dataclasses.replace(own, limit=1000)
  assert unit.row("RN50", limited) == "RN50 [first 1,000 records, projected features]"
  shift = paper_units.Unit("16", dataset, True)
  assert shift.row("RN50", paper) == "Linear Probe CLIP (RN50)"


def counted(monkeypatch, fits):
  """`linear_probe.learn` in place of which the classifier is known; counts what it is asked."""

  def learn(train, classes, metric, validation=None):
    del metric
    fits.append(len(train.labels) if validation is None else train.labels.tolist())
    fits.extend([] if validation is None else [validation.labels.tolist()])
    width = train.features_ND.shape[1]
    weights_DC = np.eye(width, classes, dtype=np.float32)
    fit = logistic.Fit(weights_DC, np.zeros(classes, np.float32), 0.0, 1, True)
    return linear_probe.Learned(fit, 1.0, (), len(train.labels))

  monkeypatch.setattr(linear_probe, "learn", learn)


def test_ten_folds_of_training_and_their_mean(world, tmp_path, monkeypatch):
  fits = []
  counted(monkeypatch, fits)
  dataset = datasets.named("STL10")
  numbers = world.write(dataset, "train", list(range(10)) * 2, "train")
  place = tmp_path / "data" / "STL10"
  for path in place.rglob("*.png"):  # named by the image's number in the original
    path.rename(path.with_name(f"{int(path.stem) - numbers[0]}.png"))
  lines = [f"{fold} {fold + 10}" for fold in range(10)]
  (place / "fold_indices.txt").write_text("\n".join(lines))
  world.model.features = {number: np.eye(10)[number % 10] for number in numbers}
  for number in world.write(dataset, "test", [2, 0, 1, 1], "test"):
    world.model.features[number] = np.eye(10)[1]
  task, found = measure(world, tmp_path, "10", "STL10", True)
  assert len(task.folds) == 10
  assert fits == [2] * 10
  assert found.values == (paper_cells.Value("accuracy", 50.0, 4),)
  assert not any("folds can be told apart" in note for note in task.notes)


def test_ucf101s_splits_are_averaged_zero_shot_too(world, tmp_path):
  dataset = datasets.named("UCF101")
  class_CE = world.classes(dataset)
  for fold, right in ((1, 3), (2, 0), (3, 1)):
    labels = [4, 5, 6]
    for place, number in enumerate(world.write(dataset, "test", labels, f"test_{fold}")):
      label = labels[place]
      world.model.rows[number] = class_CE[label if place < right else label + 1]
  task, found = measure(world, tmp_path, "11", "UCF101", False)
  assert len(task.folds) == 3
  assert found.values[0].percent == pytest.approx(100 * (1 + 0 + 1 / 3) / 3)
  assert found.values[0].n == 9
  (tmp_path / "data" / "UCF101" / "test_3").rename(tmp_path / "data" / "UCF101" / "x")
  with pytest.raises(datasets.NotAvailable, match="test_3 has no folders of classes"):
    measure(world, tmp_path, "11", "UCF101", False)


def test_folds_that_cannot_be_told_apart_are_noted(world, tmp_path, monkeypatch):
  counted(monkeypatch, [])
  world.probe("STL10")
  task, _ = measure(world, tmp_path, "10", "STL10", True)
  assert "STL10: 1 of its 10 folds can be told apart here" in task.notes
  unit = paper_units.Unit("11", datasets.named("STL10"), False)
  chosen = settings(tmp_path)
  assert not any(
    "folds can be" in note
    for note in paper_units.task(unit, chosen, paper_units.opener(chosen)).notes
  )


def test_one_probe_on_imagenet_serves_all_its_shifts(world, tmp_path, monkeypatch):
  fits = []
  counted(monkeypatch, fits)
  dataset = datasets.named("ImageNet")
  one_hot = np.eye(1000)
  train = list(range(1000))
  for number, label in zip(world.write(dataset, "train", train), train, strict=True):
    world.model.features[number] = one_hot[label]
  own = datasets.named("ImageNet-A").imagenet_indices
  other = next(k for k in range(1000) if k not in own)
  for key in ("ImageNet", "ImageNet-A"):
    classes = own if key == "ImageNet-A" else train
    for number, label in zip(
      world.write(datasets.named(key), "test", planted.LABELS), planted.LABELS, strict=True
    ):
      world.model.features[number] = one_hot[classes[label]]
    # The last one is taken for a class that ImageNet-A does not have, and then for its own.
    world.model.features[number] = world.model.features[number] + 2 * one_hot[other]
  assert measure(world, tmp_path, "10", "ImageNet", True)[1].values[0].percent == 75.0
  assert measure(world, tmp_path, "16", "ImageNet", True)[1].values[0].percent == 75.0
  assert measure(world, tmp_path, "16", "ImageNet-A", True)[1].values[0].percent == 100.0
  assert fits == [1000]
  for key in ("ImageNet-A", "ImageNet-R"):
    within = datasets.named(key)
    asked = paper_units.Unit("figure13", dataset, True, within)
    task = paper_units.task(asked, settings(tmp_path), paper_units.opener(settings(tmp_path)))
    if key == "ImageNet-A":  # of whose classes the images of ImageNet are not
      with pytest.raises(
        datasets.NotAvailable, match="of the 4 images measured none is of a class"
      ):
        paper_cells.measure(task, world.weights(), settings(tmp_path), lambda *_: None)
    else:  # two, and the one taken for another class; none of class 0
      (value,) = paper_cells.measure(
        task, world.weights(), settings(tmp_path), lambda *_: None
      ).values
      assert (value.percent, value.n) == (100.0, 3)
  assert fits == [1000]
  with pytest.raises(datasets.NotAvailable, match="ObjectNet: which of ImageNet's classes"):
    measure(world, tmp_path, "16", "ObjectNet", True)


def test_lambda_is_chosen_on_the_data_sets_own_validation_split(world, tmp_path, monkeypatch):
  fits = []
  counted(monkeypatch, fits)
  dataset = datasets.named("DTD")
  made = [world.write(dataset, s, own, s) for s, own in
          (("train", [0, 1, 2]), ("val", [3, 0]), ("test", [2, 0, 1, 1]))]  # fmt: skip
  world.model.features = {k: np.eye(47)[i] for own in made for i, k in enumerate(own)}
  measure(world, tmp_path, "10", "DTD", True)
  assert fits == [[0, 1, 2], [0, 3]]
  measure(world, tmp_path, "10", "DTD", True, limit=3)  # none of it among the first: as without
  assert fits[2:] == [3]


def test_images_left_out_of_training_are_told(world, tmp_path, monkeypatch):
  fits = []
  counted(monkeypatch, fits)
  world.probe("HatefulMemes")  # the first of class 0, in training
  (tmp_path / "data" / "HatefulMemes" / "img" / "0.png").write_bytes(b"no image")
  with pytest.raises(encoding.EvaluationError, match=r"img/0\.png: image cannot be decoded"):
    measure(world, tmp_path, "10", "HatefulMemes", True)
  for _ in range(2):  # the second time of the kept probe
    _, found = measure(world, tmp_path, "10", "HatefulMemes", True, skip_unreadable=True)
    assert [where.rpartition("/")[2] for where in found.left_out] == ["0.png"]
    assert found.fits == (paper_results.Fitted(1.0, 1, True),)
  assert fits == [11]


def probe_of(classes=3, value=1.5):
  weights_DC, bias_C = np.full((4, classes), value, np.float32), np.ones(classes, np.float32)
  return probe_file.Probe(logistic.Fit(weights_DC, bias_C, 0.25, 7, False), 0.1, ("é", "\ud800"))


def test_of_two_classes_of_one_name_the_first_is_found(world, tmp_path):
  """ImageNet's missiles and sunglasses; the last image is answered wrongly, as another class."""
  world.test("ImageNet", (657, 836, 837, 744, 1))
  _, found = measure(world, tmp_path, "11", "ImageNet", False)
  assert found.values == (paper_cells.Value("accuracy", 40.0, 5),)


def test_a_probe_is_kept_by_what_it_was_trained_on(tmp_path):
  asked = []

  def learn(value):
    asked.append(value)
    return probe_of(value=value)

  for value in (1, 2):
    got = probe_file.kept(tmp_path, "these", 3, lambda value=value: learn(value))
    assert (got.fit.weights_DC == 1).all()
    assert (got.fit.objective, got.fit.iterations, got.fit.converged) == (0.25, 7, False)
    assert (got.lambda_, got.left_out) == (0.1, ("é", "\ud800"))
  assert (probe_file.kept(tmp_path, "those", 3, lambda: learn(3)).fit.weights_DC == 3).all()
  assert (probe_file.kept(None, "these", 3, lambda: learn(4)).fit.weights_DC == 4).all()
  assert asked == [1, 3, 4]
  for value, place in ((5, 0.0), (6, 0.3), (7, 0.99)):
    for path in tmp_path.iterdir():
      content = bytearray(path.read_bytes())
      content[int(place * len(content))] ^= 255
      path.write_bytes(content)
    for other in (0, 100):
      got = probe_file.kept(tmp_path, "these", 3, lambda: learn(value + other))  # noqa: B023
      assert (got.fit.weights_DC == value).all()
  assert all(path.suffix == ".probe" for path in tmp_path.iterdir())


def test_a_probe_that_cannot_be_kept_is_a_warning(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.warns(RuntimeWarning, match="a trained probe is not kept"):
    assert probe_file.kept(tmp_path / "file", "these", 3, probe_of).fit.iterations == 7


def test_a_record_without_captions_is_named(world, tmp_path, monkeypatch):
  world.captions("Flickr30k")
  read = datasets.Copy.__getitem__

  def without(copy, index):
    record = read(copy, index)
    return Record(record.key, record.image, ()) if index == 2 else record

  monkeypatch.setattr(datasets.Copy, "__getitem__", without)
  with pytest.raises(encoding.EvaluationError, match="sample s0000002: has no caption"):
    measure(world, tmp_path, "13", "Flickr30k", False)


def test_a_label_that_is_no_class_is_named(world, tmp_path, monkeypatch):
  world.test("MNIST")
  read = datasets.Copy.__getitem__
  monkeypatch.setattr(
    datasets.Copy,
    "__getitem__",
    lambda copy, index: dataclasses.replace(read(copy, index), label="ten"),
  )
  with pytest.raises(encoding.EvaluationError, match="0: label 'ten' is none of the 10 classes"):
    measure(world, tmp_path, "11", "MNIST", False)


def test_units_of_the_tables():
  counts = {table: len(paper_units.units(table)) for table in paper_units.TABLES}
  assert counts == {"10": 27, "11": 27, "13": 2, "16": 16}
  assert {unit.column for unit in paper_units.units("13")} == {"MSCOCO", "Flickr30k"}
  bases = [(unit.probed, unit.column) for unit in paper_units.bases()]
  columns = ("ImageNet on ImageNet-A classes", "ImageNet on ImageNet-R classes")
  assert bases == [(probed, column) for probed in (False, True) for column in columns]


def test_a_data_set_by_its_key_or_as_a_table_calls_it():
  for word, key in (("mscoco", "MSCOCO captions"), ("flickr30k", "Flickr30k"), ("dtd", "DTD")):
    assert paper_units.dataset_of(word).key == key
  with pytest.raises(datasets.DatasetError, match="no such dataset; choose one of Food101"):
    paper_units.dataset_of("coco")
