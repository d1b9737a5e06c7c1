"""What we take for granted of TFDS's data sets, against the builders that TFDS itself has.

No data is fetched: examples are made up by the builder's own features, which then are written and
read as any copy is.
"""

import ast
import inspect
import io
import textwrap
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tfds_trees
import trees

from clip_jax.data import labels
from clip_jax.evaluation import datasets, opening, prompts

ALL = [d for d in datasets.all_datasets() if d.tfds_test]


def builder_of(dataset, root, monkeypatch):
  """TFDS's own. COCO's asks TensorFlow for the name of a type, which NumPy has too."""
  if dataset.rule == "captions":
    from tensorflow_datasets.object_detection import coco

    monkeypatch.setattr(coco, "tf", types.SimpleNamespace(int64=np.int64))
  return tfds.builder(dataset.tfds, data_dir=root)


def split_names(builder):
  """Those that the source of its `_split_generators` gives to the generators that it makes."""
  source = textwrap.dedent(inspect.getsource(type(builder)._split_generators))
  found = set()
  for node in ast.walk(ast.parse(source)):
    keys = node.keys if isinstance(node, ast.Dict) else []
    if isinstance(node, ast.Call):
      keys = [keyword.value for keyword in node.keywords if keyword.arg in ("name", "split")]
      named = isinstance(node.func, ast.Attribute) and node.func.attr == "SplitGenerator"
      keys += node.args[:1] if named else []
    for key in keys:
      if isinstance(key, ast.Attribute) and ast.unparse(key.value) == "tfds.Split":
        found.add(key.attr.lower())
      elif isinstance(key, ast.Constant) and isinstance(key.value, str):
        found.add(key.value)
  return found


def made_up(feature, number):
  """Some value of a feature; of classes the one of that number, if there are so many."""
  kinds = tfds.features
  match feature:
    case kinds.FeaturesDict():
      return {name: made_up(own, number) for name, own in feature.items()}
    case kinds.Sequence():
      return [made_up(feature.feature, number)] * 2
    case kinds.ClassLabel():
      return number % feature.num_classes
    case kinds.Image():
      return io.BytesIO(trees.png(number))
    case kinds.BBoxFeature():
      return kinds.BBox(0.0, 0.0, 1.0, 1.0)
  if isinstance(feature, kinds.Text) or np.dtype(feature.np_dtype).kind in "OUS":
    return f"text {number}"
  return np.zeros(feature.shape, feature.np_dtype)


@pytest.mark.parametrize("dataset", ALL, ids=lambda d: d.key)
def test_splits_are_called_so(tmp_path, dataset, monkeypatch):
  names = split_names(builder_of(dataset, tmp_path, monkeypatch))
  assert "train" in names or dataset.group == "shift", names
  wanted = {*dataset.tfds_train.split("+"), *dataset.tfds_test.split("+")} - {""}
  assert wanted <= names


def examples(dataset, features, own, numbers):
  """By number: an example with something of it, and which of our classes it is, by place."""
  made, place = {}, {number: k for k, number in enumerate(dataset.imagenet_indices)}
  for i, number in enumerate(numbers):
    example = made_up(features, number)
    match dataset.rule:
      case "kitti":  # at most 8 m away, 20 m, and no car
        kind = features["objects"].feature["type"].str2int(("Van", "Car", "Tram")[i])
        where = np.array([0, 0, 4 + 6 * i], np.float32)
        example["objects"] = [{**example["objects"][0], "type": kind, "location": where}]
        k = (0, 1, 3)[i]
      case "clevr":
        example["objects"] = example["objects"][:1] * (3 + i)
        k = own.index(str(3 + i))
      case "several":
        example["labels"], example["labels_no_difficult"] = [0, number], [number]
        k = number
      case _:
        k = place.get(number, number)
    made[number] = (example, k)
  return made


def same(dataset, ours, theirs):
  """Whether a class of ours is what TFDS calls so."""
  aliases = {labels.plain(name): of for name, of in dataset.aliases.items()}
  other = aliases.get(labels.plain(theirs), theirs)
  return isinstance(other, int) or labels.plain(ours) == labels.plain(other)


@pytest.mark.parametrize("dataset", ALL, ids=lambda d: d.key)
def test_examples_by_its_features_are_read(tmp_path, dataset, monkeypatch):
  features = builder_of(dataset, tmp_path / "none", monkeypatch).info.features
  own = prompts.named(dataset.prompts).classes if dataset.prompts else ()
  own = tuple(own[k] for k in dataset.imagenet_indices) or own
  numbers = (0, 1, dataset.classes - 1) if dataset.classes else (0, 1, 2)
  if dataset.imagenet_indices:
    numbers = tuple(dataset.imagenet_indices[k] for k in numbers)
  made = examples(dataset, features, own, numbers)
  split = dataset.tfds_test.split("+")[0]
  written = [example for example, _ in made.values()]
  tfds_trees.write(tmp_path, dataset.tfds, features, {split: written})
  copy = opening.open_dataset(dataset, "test", [tmp_path], own)
  assert (copy.kind, len(copy.source)) == ("tfds", len(made))
  distinct = labels.distinct(own)
  assert copy.classes == distinct
  if dataset.rule in ("", "several", "draw", "fold_indices"):
    kind = features["labels"].feature if dataset.rule == "several" else features["label"]
    assert kind.num_classes == dataset.classes == len(own)
  for record in (copy.source[i] for i in range(len(made))):
    number = next(n for n in numbers if trees.png(n) == record.image)
    if dataset.rule == "captions":
      assert record.captions == (f"text {number}",) * 2
      continue
    shown, *difficult = record.label.split("; ")
    assert difficult == ([f"{own[0]} (difficult)"] if dataset.rule == "several" and number else [])
    if dataset.rule in ("", "several", "draw", "fold_indices"):
      theirs = kind.int2str(number)  # where names come with the data: the number
      assert shown == distinct[number] if theirs == str(number) else same(dataset, shown, theirs)
    else:
      assert shown == distinct[made[number][1]]
