"""The table of data sets: complete, the paper's facts unchanged, and in agreement with itself."""

import csv
import hashlib
import pathlib

import pytest

from clip_jax.evaluation import datasets, scores

ASSETS = pathlib.Path(datasets.__file__).parents[1] / "assets"
SHA256 = {
  "paper/datasets.csv": "fe5ab381d70dd89007e058506c89f5b83f75db11a770696d67ce380bece41d85",
  "paper/datasets_shift.csv": "b1215edccdef4e63a1aa09fa888ff26b10be03451ad533534a2e08cd84b19a5c",
}


def _rows(name):
  return list(csv.DictReader((ASSETS / name).read_text().splitlines()))


def test_the_papers_tables_are_as_they_were_taken_down():
  for name, digest in SHA256.items():
    assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest


def test_all_sets_are_there_in_the_papers_order():
  by_group = {group: [] for group in ("paper", "shift", "retrieval")}
  for dataset in datasets.all_datasets():
    by_group[dataset.group].append(dataset.key)
  assert by_group["paper"] == [row["key"] for row in _rows("paper/datasets.csv")]
  assert len(by_group["paper"]) == 27
  assert by_group["shift"] == [
    "ImageNetV2", "ImageNet-A", "ImageNet-R", "ImageNet-Sketch", "ObjectNet", "ImageNet-Vid",
    "Youtube-BB",
  ]  # fmt: skip
  assert by_group["retrieval"] == ["MSCOCO captions", "Flickr30k"]


def test_facts_agree_with_the_papers_table():
  for row in _rows("paper/datasets.csv"):
    dataset = datasets.named(row["key"])
    misprinted = {"Food101": 101, "FER2013": 7}  # Table 9 says 102 and 8
    assert dataset.classes == misprinted.get(row["key"], int(row["classes"]))
    assert (dataset.size("train"), dataset.size("test")) == (
      int(row["train_size"]), int(row["test_size"])
    )  # fmt: skip
    config = {"ucf101_1..3": ""}.get(row["tfds_config"], row["tfds_config"])
    assert dataset.tfds == "/".join(filter(None, (row["tfds_name"], config)))
    assert dataset.metric in scores.METRICS
    assert dataset.prompts
  for row in _rows("paper/datasets_shift.csv"):
    dataset = datasets.named(row["dataset"])
    assert dataset.tfds.partition("/")[0] == row["tfds_name"]
    assert dataset.test_size == (int(row["test_images"]) if row["test_images"] else None)


@pytest.mark.parametrize("dataset", datasets.all_datasets(), ids=lambda d: d.key)
def test_every_set_says_how_to_get_it(dataset):
  assert bool(dataset.tfds_test) <= bool(dataset.tfds)
  assert bool(dataset.tfds) == bool(dataset.tfds_is_the_papers)
  assert dataset.test_folders[0] in ("test", "dev")
  assert dataset.numbered in ("", "yes", "sorted")
  assert (dataset.metric == "recall") == (dataset.classes == 0 and dataset.group == "retrieval")
  how = datasets.how_to_get(dataset, "test")
  assert "\n" not in how
  assert f"ROOT/{dataset.folder}" in how
  assert (f"tfds build {dataset.tfds} --file_format=array_record" in how) == bool(dataset.tfds_test)
  assert ("clip-benchmark/wds_" in how) == bool(dataset.wds)
  if not dataset.tfds_test and not dataset.wds:
    assert dataset.how


def test_the_shifts_know_which_of_imagenets_classes_they_have():
  synsets = [row["synset"] for row in _rows("imagenet_synsets.csv")]
  assert len(synsets) == 1000
  assert synsets == sorted(set(synsets))
  whole, a, r = (datasets.named(f"ImageNet{name}") for name in ("", "-A", "-R"))
  assert whole.imagenet_indices == datasets.named("imagenetv2").imagenet_indices
  assert whole.imagenet_indices == tuple(range(1000))
  assert len(a.imagenet_indices) == len(r.imagenet_indices) == 200
  # ImageNet-A's first class is the stingray, n01498041; ImageNet-R's the goldfish, n01443537.
  assert (synsets[a.imagenet_indices[0]], synsets[r.imagenet_indices[0]]) == (
    "n01498041", "n01443537"
  )  # fmt: skip
  assert a.aliases["n01498041"] == 0
  assert "n01440764" not in a.aliases
  assert datasets.named("Food101").imagenet_indices == ()


def test_unknown_names_are_told_what_there_is():
  assert datasets.named("stanford_cars").key == "Stanford Cars"
  with pytest.raises(datasets.DatasetError, match="'Foo': no such dataset; choose one of Food101"):
    datasets.named("Foo")
