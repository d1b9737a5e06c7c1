"""TFDS's data sets without TensorFlow: every one of ours in its features, whole and damaged."""

import pickle
import subprocess
import sys

import dataset_trees
import pytest
import tfds_trees
import trees

from clip_jax.data import labels, records, tfds_source
from clip_jax.evaluation import datasets, opening

ALL = [d for d in datasets.all_datasets() if d.tfds_test]


def _write(root, dataset, split, count=6):
  """`count` images, of which the i-th is of class (2 i) modulo their number."""
  name = dataset.tfds_test if split == "test" else dataset.tfds_train
  parts = name.split("+")
  made = []
  for i in range(count):
    example = {"image": tfds_trees.file(trees.png(i))}
    k = 2 * i % (dataset.classes or 1)
    match dataset.rule:
      case "kitti":
        depth = (5.0, 15.0, 50.0, 1.0)[k]
        things = [{"type": "Tram" if k == 3 else "Van", "location": [0.0, 0.0, depth]}]
        features = tfds_trees.kitti()
        example |= {"image/file_name": f"{i}.png", "objects": things}
      case "clevr":
        features = tfds_trees.clevr()
        things = [{"color": "red"}] * int(dataset_trees.classes(dataset)[k])
        example |= {"file_name": f"{i}.png", "objects": things}
      case "several":
        features = tfds_trees.voc(dataset_trees.spelled(dataset))
        number = dataset.classes - 1 - k
        example |= {"labels": sorted({0, number}), "labels_no_difficult": [number]}
      case "captions":
        features = tfds_trees.captions()
        texts = [{"id": c, "text": t} for c, t in enumerate(dataset_trees.captions(i))]
        example |= {"image/filename": f"{i}.png", "captions": texts}
      case _:
        synsets = dataset.rule.startswith("synset")
        names = dataset_trees.synsets() if synsets else dataset_trees.spelled(dataset)
        place = dataset.imagenet_indices[k] if synsets else dataset.classes - 1 - k
        features = tfds_trees.classes(names)
        example |= {"label": names[place], "segmentation_mask": tfds_trees.file(b"no image")}
    made.append(example)
  shares = {part: made[n :: len(parts)] for n, part in enumerate(parts)}
  return tfds_trees.write(root, dataset.tfds, features, shares)


def _number(record):
  """Which of the images a record has: TFDS keeps them in an order of its own."""
  return [trees.png(i) for i in range(6)].index(record.image)


@pytest.mark.parametrize("split", ["test", "train"])
@pytest.mark.parametrize("dataset", ALL, ids=lambda d: d.key)
def test_a_copy_of_tfds(tmp_path, dataset, split):
  if split == "train" and not dataset.tfds_train:
    with pytest.raises(datasets.NotAvailable):
      opening.open_dataset(dataset, split, [tmp_path])
    return
  place = _write(tmp_path, dataset, split)
  dataset_trees.folder(tmp_path, dataset, split)  # TFDS comes first
  classes = dataset_trees.classes(dataset)
  copy = opening.open_dataset(dataset, split, [tmp_path], classes)
  assert (copy.kind, copy.place, copy.classes) == ("tfds", place, classes)
  drawn = dataset.rule in ("draw", "clevr")
  chosen = labels.draw(6, dataset.train_size, dataset.test_size)[split == "test"] if drawn else []
  found = {_number(record): record for record in (copy[i] for i in range(len(copy)))}
  assert len(found) == len(copy) == (len(chosen) if drawn else 6)
  for i, record in found.items():
    if dataset.rule == "captions":
      assert (record.label, record.captions) == (None, dataset_trees.captions(i))
      continue
    k = 2 * i % dataset.classes
    expected = classes[k]
    if dataset.rule == "several" and k != dataset.classes - 1:
      expected += f"; {classes[-1]} (difficult)"
    assert (record.label, record.captions) == (expected, ())
  joined = split == "train" and "+" in dataset.tfds_train and dataset.rule != "captions"
  assert {_number(copy[k]) for k in copy.validation} == ({1, 3, 5} if joined else set())
  others = [note for note in copy.notes if "is not the paper's split" in note]
  assert bool(others) == (dataset.tfds_is_the_papers != "yes")


def test_a_class_that_imagenet_a_lacks_is_an_error_of_its_record(tmp_path):
  dataset = datasets.named("ImageNet-A")
  names = dataset_trees.synsets()
  example = {"image": tfds_trees.file(trees.png(0)), "label": "n01440764"}  # the tench
  example |= {"segmentation_mask": tfds_trees.file(b"")}
  tfds_trees.write(tmp_path, "imagenet_a", tfds_trees.classes(names), {"test": [example]})
  copy = opening.open_dataset(dataset, "test", [tmp_path], dataset_trees.classes(dataset))
  with pytest.raises(records.RecordError, match="test record 0: label 0 is none of the classes"):
    copy[0]


def test_an_impossible_count_is_an_error_of_its_record(tmp_path):
  dataset = datasets.named("CLEVR")
  made = [{"image": tfds_trees.file(trees.png(0)), "file_name": "a", "objects": []}] * 2
  tfds_trees.write(tmp_path, "clevr", tfds_trees.clevr(), {"train": made})
  copy = opening.open_dataset(dataset, "train", [tmp_path])
  with pytest.raises(records.RecordError, match=r"clevr/1\.0\.0 train record .: 0 objects"):
    copy[0]


def test_features_of_another_data_set_are_told(tmp_path):
  example = {"image": tfds_trees.file(trees.png(0)), "image/filename": "a", "captions": []}
  tfds_trees.write(tmp_path, "mnist", tfds_trees.captions(), {"test": [example]})
  with pytest.raises(datasets.DatasetError, match="its feature 'label' has no class names"):
    opening.open_dataset(datasets.named("MNIST"), "test", [tmp_path])


def test_the_newest_version_is_taken(tmp_path):
  for version in ("2.0.0", "10.1.0", "9.9.9", "incomplete.1"):
    trees.write(tmp_path / "dtd" / version / "dataset_info.json", "{}")
  assert tfds_source.newest_version(tmp_path, "dtd").name == "10.1.0"
  assert tfds_source.newest_version(tmp_path, "mnist") is None


def test_a_source_is_pickled_and_knows_its_content(tmp_path):
  dataset = datasets.named("MNIST")
  place = _write(tmp_path / "a", dataset, "test")
  first = opening.open_dataset(dataset, "test", [tmp_path / "a"])
  assert first[0].key == "0"
  again = pickle.loads(pickle.dumps(first))
  assert again[3] == first[3]
  assert again.locate(3) == f"{place} test record 3"
  _write(tmp_path / "b", dataset, "test")
  same = opening.open_dataset(dataset, "test", [tmp_path / "b"])
  assert same.fingerprint == first.fingerprint
  _write(tmp_path / "c", dataset, "test", count=5)
  other = opening.open_dataset(dataset, "test", [tmp_path / "c"])
  assert other.fingerprint != first.fingerprint
  with pytest.raises(IndexError):
    first.source[6]


def test_damaged_copies_are_errors(tmp_path):
  dataset = datasets.named("MNIST")
  place = _write(tmp_path, dataset, "train")

  def fails(match):
    with pytest.raises(datasets.DatasetError, match=match) as error:
      opening.open_dataset(dataset, "train", [tmp_path])
    assert not isinstance(error.value, datasets.NotAvailable)

  with pytest.raises(datasets.NotAvailable, match=r"mnist/1\.0\.0: no split 'test'; it has train"):
    opening.open_dataset(dataset, "test", [tmp_path])
  copy = opening.open_dataset(dataset, "train", [tmp_path])
  shard = place / "mnist-train.array_record-00000-of-00001"
  whole = shard.read_bytes()
  shard.write_bytes(b"x" * len(whole))
  with pytest.raises(records.RecordError, match="train record 0: "):
    copy[0]
  shard.unlink()
  fails(r"array_record-00000-of-00001: not there, as dataset_info\.json says")
  (place / "features.json").write_text("{")
  fails("TFDS cannot read it")
  (place / "dataset_info.json").write_text("{")
  fails(r"dataset_info\.json: cannot be read")


def test_the_older_format_is_told_and_another_copy_is_taken(tmp_path):
  dataset = datasets.named("MNIST")
  info = tmp_path / "mnist" / "3.0.1" / "dataset_info.json"
  trees.write(info, '{"name": "mnist", "fileFormat": "tfrecord"}')
  with pytest.raises(datasets.NotAvailable, match=r"3\.0\.1 is there, but its format is tfrecord"):
    opening.open_dataset(dataset, "test", [tmp_path])
  dataset_trees.wds(tmp_path, dataset, "test")
  assert opening.open_dataset(dataset, "test", [tmp_path]).kind == "wds"


def test_stl10s_folds_cannot_be_told_from_tfds(tmp_path):
  info = tmp_path / "stl10" / "1.0.0" / "dataset_info.json"
  trees.write(info, '{"name": "stl10", "fileFormat": "array_record"}')
  with pytest.raises(datasets.NotAvailable, match="its ten folds of 1,000 cannot be told"):
    opening.open_dataset(datasets.named("STL10"), "train", [tmp_path], fold=3)


def test_tensorflow_is_not_imported(tmp_path):
  _write(tmp_path, datasets.named("MNIST"), "test")
  code = (
    "import sys\n"
    "from clip_jax.evaluation import datasets, opening\n"
    f"copy = opening.open_dataset(datasets.named('MNIST'), 'test', [{str(tmp_path)!r}])\n"
    "assert copy.kind == 'tfds' and copy[0].image\n"
    "print('tensorflow' in sys.modules, 'pyarrow' in sys.modules)\n"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.split() == ["False", "False"]
