import dataset_trees
import numpy as np
import planted
import pytest
import trees
from known_model import KnownModel, captioned, labelled

from clip_jax import config as config_lib
from clip_jax.data import labels, pipeline
from clip_jax.evaluation import curves, datasets, encoding, prompts, report, tasks, zero_shot

STAMPS = prompts.named("stamps")


@pytest.fixture
def run(monkeypatch):
  def run(model, task, source):
    """The result of one task, whose config's source is `source`."""
    config = config_lib.Config(evaluation=config_lib.Evaluation((task,), batch=2))
    monkeypatch.setattr(pipeline, "open_source", lambda *_: source)
    (result,) = tasks.run(model, config, tasks.ready(config))
    return result

  return run


def stamps_model():
  texts = {
    t.replace("{}", c): row
    for c, row in zip(("tower", "bird"), np.eye(2), strict=True)
    for t in STAMPS.templates
  }
  return KnownModel([[1, 0], [0, 1], [0, 1]], texts, 2)


def test_classes_may_come_from_the_source(run):
  source = labelled(["tower", "bird", "tower"])
  source.classes = ("tower", "bird")
  task = config_lib.Task("old stamps", "zero_shot", prompts="stamps", limit=2)
  result = run(stamps_model(), task, source)
  assert (result.name, result.n, result.top1, result.classes) == (
    "old stamps",
    2,
    1.0,
    source.classes,
  )


def test_a_source_without_classes_cannot_lend_them(run):
  task = config_lib.Task("old stamps", "zero_shot", prompts="stamps")
  with pytest.raises(prompts.PromptError, match=r"'old stamps'.*names none"):
    run(stamps_model(), task, labelled(["tower"]))


def test_retrieval_needs_no_prompts(run):
  model = KnownModel(np.eye(3), {f"t{i}": row for i, row in enumerate(np.eye(3))}, 2)
  task = config_lib.Task("", "retrieval")
  result = run(model, task, captioned([["t0"], ["t1"], ["t2"]]))
  assert (result.name, result.images, result.text_to_image.recall[1]) == ("retrieval", 3, 1.0)


def test_held_out_classes_are_passed_on(run):
  found = prompts.named("scenes")
  texts = {t.replace("{}", c): [1.0] for c in found.classes for t in found.templates}
  task = config_lib.Task("scenes", "zero_shot", prompts="scenes")
  model = KnownModel([[1.0]], texts, 2)
  result = run(model, task, labelled([found.held_out[0]]))
  assert result.held_out == found.held_out


def test_unknown_prompts_are_an_error(run):
  task = config_lib.Task("x", "zero_shot", prompts="imagenot")
  with pytest.raises(prompts.PromptError, match="imagenot"):
    run(stamps_model(), task, labelled(["tower"]))


def test_a_published_dataset_comes_with_its_prompts(tmp_path):
  dataset = datasets.named("CIFAR10")
  published = prompts.named("cifar10")
  place = dataset_trees.wds(tmp_path, dataset, "test")
  trees.write(place / "classnames.txt", "\n".join(published.classes) + "\n")
  task = config_lib.Task("", dataset="CIFAR10", source=config_lib.Source(path=str(tmp_path)))
  config = config_lib.Config(evaluation=config_lib.Evaluation((task,), batch=4))
  (ready,) = tasks.ready(config)
  assert (ready.name, len(ready.source)) == ("CIFAR10", 4)
  assert (ready.prompt_set.templates, ready.prompt_set.names) == (
    published.templates,
    published.names,
  )
  # the copy numbers the classes from the other end
  found = [ready.source[i].label for i in range(4)]
  assert found == [published.classes[9 - k] for k in dataset_trees.images(dataset)]


def test_a_published_retrieval_takes_all_captions(tmp_path):
  dataset = datasets.named("Flickr30k")
  dataset_trees.wds(tmp_path, dataset, "test")
  source = config_lib.Source(path=str(tmp_path))
  task = config_lib.Task("flickr", "retrieval", dataset="Flickr30k", source=source)
  config = config_lib.Config(evaluation=config_lib.Evaluation((task,), batch=2))
  (ready,) = tasks.ready(config)
  captions = sum(len(ready.source[i].captions) for i in range(len(ready.source)))
  assert captions > len(ready.source)


def test_a_dataset_that_is_not_there_says_how_to_get_it(tmp_path):
  source = config_lib.Source(path=str(tmp_path))
  task = config_lib.Task("x", dataset="Food101", source=source)
  config = config_lib.Config(evaluation=config_lib.Evaluation((task,)))
  with pytest.raises(datasets.NotAvailable, match=r"Food101 test: not available in .*To get it"):
    tasks.ready(config)


# An accuracy, VOC's several classes, HatefulMemes' two, and one in which classes count alike.
@pytest.mark.parametrize(
  ("key", "logged"),
  [
    ("CIFAR10", "top1"),
    ("VOC2007", "11_point_map"),
    ("HatefulMemes", "roc_auc"),
    ("OxfordPets", "mean_per_class"),
    ("Kinetics700", "mean_top1_top5"),
  ],
)
def test_a_published_dataset_is_scored_by_its_own_metric(tmp_path, key, logged):
  world = planted.World(tmp_path)
  dataset = world.test(key)
  task = config_lib.Task("", dataset=key, source=config_lib.Source(path=str(tmp_path)))
  config = config_lib.Config(evaluation=config_lib.Evaluation((task,), batch=64))
  (result,) = tasks.run(world.model, config, tasks.ready(config))
  expected = pytest.approx(planted.EXPECTED[dataset.metric] / 100)
  assert next(iter(result.metrics())) == logged
  assert tasks.figures([result])[f"eval/{key}/{logged}"] == expected
  assert tasks.figures([result])[f"eval/{key}/n"] == 4
  first, *others = report.rows(result)
  name = "top-1" if logged == "top1" else dataset.metric
  assert (first.measure, first.value) == (name, expected)
  assert name not in [row.measure for row in others]
  assert curves.panels([{"step": 1, **tasks.figures([result])}])


def test_images_of_several_classes_count_for_each(tmp_path):
  """Two of three images show two classes, one of them as difficult: by hand."""
  rows = [[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]
  model = KnownModel(rows, {"cat": [1, 0], "dog": [0, 1]}, 2)
  joined = [labels.join(["cat", "dog"]), labels.join(["dog"], ["cat"]), labels.join(["cat"])]
  found = zero_shot.evaluate_several(
    model, labelled(joined), ("cat", "dog"), np.eye(2), "11-point mAP", 2, name="pets"
  )
  # cat: images 0 and 2 are the first two of the two that count. dog: of 1, 2, 0 the first and last
  # are right, 6 points of precision 1 up to recall 0.5, and 5 of 2/3.
  assert found.metrics() == {"11_point_map": pytest.approx((1 + (6 + 5 * 2 / 3) / 11) / 2), "n": 3}
  wrong = labelled(["cat", labels.join(["cat", "cow"])])
  with pytest.raises(
    encoding.EvaluationError, match=r"shard-7, record 1: .*'cow' is none of the 2"
  ):
    zero_shot.evaluate_several(model, wrong, ("cat", "dog"), np.eye(2), "11-point mAP", 2)
