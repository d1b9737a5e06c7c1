"""Every data set opened from a tiny copy in each layout; what is not there says how to get it."""

import dataclasses
import json
import pickle
import shutil

import dataset_trees
import numpy as np
import pytest
import trees

from clip_jax.data import labels, records
from clip_jax.evaluation import datasets, opening, scores

ALL = datasets.all_datasets()
SPLITS = [(d, s) for d in ALL for s in ("test", "train") if s == "test" or d.train_folders]


def _id(value):
  return value if isinstance(value, str) else value.key


def _records(copy):
  return [copy[i] for i in range(len(copy))]


def _by_number(found):
  """The records in the order of the images' numbers, which their files are called by."""
  return sorted(found, key=lambda r: int("".join(c for c in r.key.split("/")[-1] if c.isdigit())))


@pytest.mark.parametrize("split", ["test", "train"])
@pytest.mark.parametrize("dataset", [d for d in ALL if d.wds], ids=_id)
def test_a_webdataset_copy(tmp_path, dataset, split):
  place = dataset_trees.wds(tmp_path, dataset, split)
  classes = dataset_trees.classes(dataset)
  copy = opening.open_dataset(dataset, split, [tmp_path / "nothing", tmp_path], classes)
  assert (copy.kind, copy.place, copy.classes) == ("wds", place, classes)
  found = _records(copy)
  assert [r.key for r in found] == [f"{i // 2}/s{i:07d}" for i in range(4)]
  assert [r.image for r in found] == [trees.png(i, kind="WEBP") for i in range(4)]
  if dataset.rule == "captions":
    assert [r.captions for r in found] == [dataset_trees.captions(i) for i in range(4)]
  else:
    assert [r.label for r in found] == [classes[k] for k in dataset_trees.images(dataset)]
  size = dataset.size(split)
  noted = f"the paper's {split} split has {size or 0:,} records, this copy has 4"
  assert (noted in copy.notes) == (size is not None)
  assert copy.locate(3) == f"{place / split / '1.tar'} sample s0000003"


@pytest.mark.parametrize(("dataset", "split"), SPLITS, ids=_id)
def test_a_folder_of_images(tmp_path, dataset, split):
  place = dataset_trees.folder(tmp_path, dataset, split)
  classes = dataset_trees.classes(dataset)
  copy = opening.open_dataset(dataset, split, [tmp_path], classes)
  assert (copy.kind, copy.place) == ("folder", place)
  found = _by_number(_records(copy))
  assert [r.image for r in found] == [trees.png(i) for i in range(4)]
  captioned = dataset.rule == "captions"
  own = dataset_trees.images(dataset)
  expected = [None if captioned else copy.classes[k] for k in own]
  assert [r.label for r in found] == expected
  assert copy.classes == (classes or (() if captioned else ("car", "dog", "zebra")))
  texts = [dataset_trees.captions(i) if captioned else () for i in range(4)]
  assert [r.captions for r in found] == texts
  again = opening.open_dataset(dataset, split, [tmp_path], classes)
  assert again.fingerprint == copy.fingerprint
  first = copy.source.entries[0].path
  first.write_bytes(trees.png(9))
  assert opening.open_dataset(dataset, split, [tmp_path], classes).fingerprint != copy.fingerprint


@pytest.mark.parametrize(("dataset", "split"), SPLITS, ids=_id)
def test_what_is_not_there_says_how_to_get_it(tmp_path, dataset, split):
  with pytest.raises(datasets.NotAvailable) as error:
    opening.open_dataset(dataset, split, [tmp_path / "a", tmp_path])
  text, looked = str(error.value), f"{tmp_path / 'a'}, {tmp_path}"
  assert text.startswith(f"{dataset.key} {split}: not available in {looked}. To get it: ")
  assert text.endswith(datasets.how_to_get(dataset, split))


@pytest.mark.parametrize("dataset", [d for d in ALL if d.group == "shift"], ids=_id)
def test_a_shift_as_it_is_published_has_no_folder_of_a_split(tmp_path, dataset):
  place = dataset_trees.folder(tmp_path, dataset, "test")
  if dataset.key == "ObjectNet":
    (place / "test").rename(place / "images")
    (place / "images" / "unlike_any_of_imagenet").mkdir()
  else:
    for path in (place / "test").iterdir():
      path.rename(place / path.name)
    (place / "test").rmdir()
  classes = dataset_trees.classes(dataset)
  copy = opening.open_dataset(dataset, "test", [tmp_path], classes)
  assert len(copy) == 4
  left_out = "1 folders of other classes are left out"
  assert (left_out in copy.notes) == (dataset.key == "ObjectNet")


def test_objectnets_classes_must_be_named(tmp_path):
  dataset = datasets.named("ObjectNet")
  dataset_trees.folder(tmp_path, dataset, "test")
  with pytest.raises(datasets.DatasetError, match="name the 113 classes to evaluate"):
    opening.open_dataset(dataset, "test", [tmp_path])


def test_imagenetv2s_folders_are_numbers(tmp_path):
  dataset = datasets.named("ImageNetV2")
  for k in range(1000):
    (tmp_path / "ImageNetV2" / str(k)).mkdir(parents=True)
  trees.write(tmp_path / "ImageNetV2" / "17" / "x.png", trees.png(0))
  copy = opening.open_dataset(dataset, "test", [tmp_path], dataset_trees.classes(dataset))
  assert [r.label for r in _records(copy)] == ["Class 17"]


def test_classes_of_equal_names_stay_apart(tmp_path):
  dataset = datasets.named("ImageNet")
  classes = [f"Class {k}" for k in range(1000)]
  classes[657] = classes[744] = "missile"
  for k in (657, 744):
    trees.write(tmp_path / "ImageNet" / "val" / dataset_trees.synsets()[k] / "1.png", trees.png(k))
  copy = opening.open_dataset(dataset, "test", [tmp_path], classes)
  assert [r.label for r in _records(copy)] == ["missile", "missile (744)"]
  assert (copy.classes[657], copy.classes[744]) == ("missile", "missile (744)")


PUBLISHED = {
  "EuroSAT": (
    ("AnnualCrop", "HerbaceousVegetation", "SeaLake", "River"),
    (
      "forest", "permanent crop land", "residential buildings or homes or apartments", "river",
      "pasture land", "lake or sea", "brushland or shrubland", "annual crop land",
      "industrial buildings or commercial buildings", "highway or road",
    ),
    ("annual crop land", "brushland or shrubland", "lake or sea", "river"),
  ),
  "CLEVR": (
    ("three", "ten", "nine"), ("10", "3", "4", "5", "6", "7", "8", "9"), ("3", "10", "9"),
  ),
  "FER2013": (
    ("anger", "neutral", "sad", "surprise"),
    ("angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral"),
    ("angry", "neutral", "sad", "surprised"),
  ),
}  # fmt: skip


@pytest.mark.parametrize("key", PUBLISHED)
def test_classes_that_copies_call_otherwise(tmp_path, key):
  names, classes, expected = PUBLISHED[key]
  for i, name in enumerate(names):
    trees.write(tmp_path / key / "test" / name / f"{i}.png", trees.png(i))
  copy = opening.open_dataset(datasets.named(key), "test", [tmp_path], classes)
  assert [r.label for r in _by_number(_records(copy))] == list(expected)
  assert copy.classes == classes


def test_without_names_the_classes_are_the_copys_own(tmp_path):
  dataset = datasets.named("Oxford Pets")
  dataset_trees.wds(tmp_path, dataset, "test")
  copy = opening.open_dataset(dataset, "test", [tmp_path])
  assert copy.classes == dataset_trees.spelled(dataset)
  assert [r.label for r in _records(copy)] == [f"class_{k}" for k in dataset_trees.images(dataset)]


def test_an_older_name_and_a_folder_of_the_sets_own_name_do_too(tmp_path):
  dataset = datasets.named("CIFAR10")
  place = dataset_trees.wds(tmp_path, dataset, "test", name="cifar10")
  assert opening.open_dataset(dataset, "test", [tmp_path]).place == place
  shutil.move(place, tmp_path / "CIFAR-10")
  assert opening.open_dataset(dataset, "test", [tmp_path]).place == tmp_path / "CIFAR-10"


def test_webdataset_comes_before_a_folder_and_a_folder_before_array_record(tmp_path):
  dataset = datasets.named("MNIST")
  made = records.Record("a", trees.png(0), (), "class_1")
  trees.array_record(tmp_path / "MNIST", [made], ("class_1", "class_0"))
  kinds = [opening.open_dataset(dataset, "test", [tmp_path]).kind]
  dataset_trees.folder(tmp_path / "b", dataset, "test")
  kinds.append(opening.open_dataset(dataset, "test", [tmp_path, tmp_path / "b"]).kind)
  dataset_trees.wds(tmp_path / "c", dataset, "test")
  roots = [tmp_path, tmp_path / "b", tmp_path / "c"]
  kinds.append(opening.open_dataset(dataset, "test", roots).kind)
  assert kinds == ["arrayrecord", "folder", "wds"]


def test_array_record_shards(tmp_path):
  dataset = datasets.named("MNIST")
  made = [records.Record(f"{k}", trees.png(k), (), f"class_{k}") for k in (1, 0, 5)]
  trees.array_record(tmp_path / "mnist", made, ("class_1", "class_0"))
  copy = opening.open_dataset(dataset, "test", [tmp_path], dataset_trees.classes(dataset))
  assert [copy[i].label for i in (0, 1)] == ["Class 1", "Class 0"]
  with pytest.raises(datasets.DatasetError, match=r"record 2: label 'class_5' is none of the 10"):
    copy[2]
  with pytest.raises(datasets.NotAvailable, match=r"manifest\.json has no split 'train'"):
    opening.open_dataset(dataset, "train", [tmp_path])


def test_our_own_random_split(tmp_path):
  dataset = datasets.named("EuroSAT")
  names = dataset_trees.class_folders(dataset)
  for i in range(30):
    trees.write(tmp_path / "EuroSAT" / names[i % 10] / f"{i}.png", trees.png(i))
  classes = dataset_trees.classes(dataset)
  test, train = (opening.open_dataset(dataset, s, [tmp_path], classes) for s in ("test", "train"))
  keys = [{r.key for r in _records(copy)} for copy in (test, train)]
  assert list(map(len, keys)) == [10, 20]
  assert len(keys[0] | keys[1]) == 30
  for copy in (test, train):
    assert "the paper's random split was not released: this is our own, with seed 0" in copy.notes
    assert "this copy has" in copy.notes[0]
  assert test.fingerprint != train.fingerprint
  everything = test.source
  assert test[3] == everything[labels.draw(30, 10_000, 5_000)[1][3]]


@pytest.mark.parametrize(
  ("key", "folder"), [("DTD", "val"), ("Flowers102", "valid"), ("Rendered SST2", "valid")]
)
def test_a_validation_split_of_its_own_is_the_last_part_of_train(tmp_path, key, folder):
  dataset = datasets.named(key)
  names = dataset_trees.class_folders(dataset)
  place = tmp_path / dataset.folder
  for i, part in enumerate((folder, "train", folder, "train", "test")):
    trees.write(place / part / names[i % 2] / f"{i}.png", trees.png(i))
  train, test = (opening.open_dataset(dataset, s, [tmp_path]) for s in ("train", "test"))
  assert [r.image for r in _records(train)] == [trees.png(i) for i in (1, 3, 0, 2)]
  assert (train.validation, test.validation) == ((2, 3), ())
  assert train.fingerprint != dataclasses.replace(train, validation=()).fingerprint
  shutil.rmtree(place / folder)
  assert opening.open_dataset(dataset, "train", [tmp_path]).validation == ()


def test_the_validation_split_of_pascal_voc(tmp_path):
  dataset = datasets.named("VOC2007")
  lists = dataset_trees.folder(tmp_path, dataset, "train") / "VOCdevkit/VOC2007/ImageSets/Main"
  assert opening.open_dataset(dataset, "train", [tmp_path]).validation == ()
  trees.write(lists / "val.txt", "0\n2\n")
  trees.write(lists / "train.txt", "1\n3\n")
  train = opening.open_dataset(dataset, "train", [tmp_path])
  assert [r.key for r in _records(train)] == ["1.jpg", "3.jpg", "0.jpg", "2.jpg"]
  assert train.validation == (2, 3)


def test_the_folds_of_stl10(tmp_path):
  dataset = datasets.named("STL10")
  place = dataset_trees.folder(tmp_path, dataset, "train")
  dataset_trees.folder(tmp_path, dataset, "test")
  lines = ["0 1", "3 2", *["0"] * 7, "7"]
  trees.write(place / "fold_indices.txt", "\n".join(lines))
  classes = dataset_trees.classes(dataset)

  def opened(split, fold=0):
    return opening.open_dataset(dataset, split, [tmp_path], classes, fold)

  assert [r.label for r in _by_number(_records(opened("train", 2)))] == ["Class 1", "Class 1"]
  assert {r.image for r in _records(opened("train", 1))} == {trees.png(0), trees.png(1)}
  assert len(opened("train")) == len(opened("test", 10)) == 4
  for fold, match in ((10, "fold 10 has image 7, which is not"), (11, "no fold 11; it has 10")):
    with pytest.raises(datasets.DatasetError, match=match):
      opened("train", fold)
  (place / "fold_indices.txt").unlink()
  with pytest.raises(datasets.DatasetError, match=r"fold_indices\.txt: fold 1 cannot be told"):
    opened("train", 1)
  dataset_trees.wds(tmp_path / "wds", dataset, "train")
  with pytest.raises(datasets.NotAvailable, match="does not tell the folds"):
    opening.open_dataset(dataset, "train", [tmp_path / "wds"], classes, 1)


def test_the_three_splits_of_ucf101(tmp_path):
  dataset = datasets.named("UCF101")
  place = dataset_trees.folder(tmp_path, dataset, "test")
  (place / "test").rename(place / "test_1")
  shutil.copytree(place / "test_1", place / "test_3")
  (place / "test_3" / "class_0" / "1.png").unlink()
  sizes = [len(opening.open_dataset(dataset, "test", [tmp_path], fold=k)) for k in (0, 1, 3)]
  assert sizes == [4, 4, 3]
  with pytest.raises(datasets.NotAvailable, match="test_2 has no folders of classes"):
    opening.open_dataset(dataset, "test", [tmp_path], fold=2)


def test_an_empty_split_is_an_error(tmp_path):
  dataset = datasets.named("Rendered SST2")
  (tmp_path / "Rendered_SST2" / "test").mkdir(parents=True)
  with pytest.raises(datasets.NotAvailable, match=r"Rendered_SST2/test has no folders of classes"):
    opening.open_dataset(dataset, "test", [tmp_path])
  for name in ("negative", "positive"):
    (tmp_path / "Rendered_SST2" / "test" / name).mkdir()
  with pytest.raises(datasets.DatasetError, match=r"Rendered_SST2 has no records"):
    opening.open_dataset(dataset, "test", [tmp_path])
  place = tmp_path / "wds_renderedsst2"
  trees.tar(place / "test" / "0.tar", {})
  trees.write(place / "classnames.txt", "negative\npositive\n")
  with pytest.raises(datasets.DatasetError, match=r"wds_renderedsst2 has no records"):
    opening.open_dataset(dataset, "test", [tmp_path])


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"split": "validation"}, "no split 'validation'; choose train or test"),
    ({"classes": ("a", "b")}, "2 classes given, it has 101"),
    ({"fold": 1}, "no fold 1; it has 1"),
  ],
)
def test_mistakes_of_the_caller(tmp_path, changes, match):
  arguments = {"split": "test", "roots": [tmp_path]} | changes
  with pytest.raises(datasets.DatasetError, match=match):
    opening.open_dataset(datasets.named("Food101"), **arguments)


def test_a_copy_that_is_damaged_is_not_passed_over(tmp_path):
  dataset = datasets.named("Food101")
  classes = dataset_trees.classes(dataset)
  dataset_trees.folder(tmp_path, dataset, "test")  # a good copy that would come later
  place = dataset_trees.wds(tmp_path, dataset, "test")

  def fails(match):
    with pytest.raises(datasets.DatasetError, match=match) as error:
      opening.open_dataset(dataset, "test", [tmp_path], classes)
    assert not isinstance(error.value, datasets.NotAvailable)

  names = (place / "classnames.txt").read_text()
  trees.write(place / "classnames.txt", names.replace("class_7\n", "kale\n"))
  fails(r"Food101 test: class 'kale' is none of the 101 \('Class 0', .*\), as 1 of 101")
  (place / "classnames.txt").unlink()
  fails(r"classnames\.txt: cannot be read")
  trees.write(place / "classnames.txt", names)
  whole = (place / "test" / "1.tar").read_bytes()
  (place / "test" / "1.tar").write_bytes(whole[:-1024])
  fails(r"1\.tar: cut short.*fetch it again")
  (place / "test" / "1.tar").unlink()
  fails(r"1\.tar: not there")


def test_a_label_out_of_range_names_its_record(tmp_path):
  dataset = datasets.named("Food101")
  place = dataset_trees.wds(tmp_path, dataset, "test")
  files = {"s9.webp": trees.png(0, kind="WEBP"), "s9.cls": "101"}
  trees.tar(place / "test" / "0.tar", files)
  copy = opening.open_dataset(dataset, "test", [tmp_path], dataset_trees.classes(dataset))
  with pytest.raises(records.RecordError, match=r"0\.tar sample s9: label 101 is out of range"):
    copy[0]


def test_a_copy_is_a_source_like_any_other(tmp_path):
  dataset = datasets.named("Caltech101")
  dataset_trees.wds(tmp_path, dataset, "test")
  copy = opening.open_dataset(dataset, "test", [tmp_path])
  again = pickle.loads(pickle.dumps(copy))
  assert (again[2], again.fingerprint) == (copy[2], copy.fingerprint)
  for index in (-1, 4):
    with pytest.raises(IndexError, match=f"Caltech101 test: no record {index}, it has 4"):
      copy[index]


def test_several_classes_an_image_score_as_they_should(tmp_path):
  dataset = datasets.named("VOC2007")
  classes = dataset_trees.classes(dataset)
  place = dataset_trees.folder(tmp_path, dataset, "test")
  things = "".join(
    f"<object><name>{name}</name><difficult>{difficult}</difficult></object>"
    for name, difficult in (("diningtable", 0), ("bird", 1))
  )
  path = place / "VOCdevkit" / "VOC2007" / "Annotations" / "0.xml"
  trees.write(path, f"<annotation>{things}</annotation>")
  copy = opening.open_dataset(dataset, "test", [tmp_path], classes)
  rows_NC = np.stack([labels.row(r.label, classes) for r in _records(copy)])
  place = {name: k for k, name in enumerate(classes)}
  assert rows_NC[0, place["dining table"]] == 1
  assert rows_NC[0, place["bird"]] == -1
  assert rows_NC[1:].sum() == 3
  assert scores.score(dataset.metric, rows_NC.astype(float), rows_NC) == 1


def test_a_list_of_hateful_memes_is_not_there_without_its_split(tmp_path):
  dataset = datasets.named("HatefulMemes")
  place = dataset_trees.folder(tmp_path, dataset, "test")
  with pytest.raises(datasets.NotAvailable, match=r"HatefulMemes has no train\.jsonl"):
    opening.open_dataset(dataset, "train", [tmp_path])
  (place / "dev.jsonl").rename(place / "dev_seen.jsonl")
  assert len(opening.open_dataset(dataset, "test", [tmp_path])) == 4
  trees.write(place / "dev_seen.jsonl", json.dumps({"img": "img/0.png", "label": 2}))
  with pytest.raises(datasets.DatasetError, match=r"dev_seen\.jsonl:1: label 2 is out of range"):
    opening.open_dataset(dataset, "test", [tmp_path])


@pytest.mark.parametrize(
  ("key", "match"),
  [
    ("VOC2007", r"VOC2007 has no VOCdevkit/VOC2007/ImageSets/Main"),
    ("Flickr30k", r"Flickr30k has no dataset_\*\.json, Karpathy's list"),
    ("MNIST", r"MNIST/test has no folders of classes"),
  ],
)
def test_a_folder_without_what_is_wanted_is_told(tmp_path, key, match):
  (tmp_path / key).mkdir()
  with pytest.raises(datasets.NotAvailable, match=match):
    opening.open_dataset(datasets.named(key), "test", [tmp_path])
