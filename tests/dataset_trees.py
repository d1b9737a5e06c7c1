"""A tiny copy of each data set, in the layouts that its users have."""

import csv
import io
import json
import pathlib

import numpy as np
import trees

from clip_jax.evaluation import datasets

ASSETS = pathlib.Path(datasets.__file__).parents[1] / "assets"
VOC = ("aeroplane", "bicycle", "bird")  # the first of Pascal VOC's 20


def images(dataset):
  """Which class each image is of: more than one image of a class, and not in order."""
  return tuple(k % (dataset.classes or 3) for k in (2, 0, 1, 1))


def synsets():
  rows = csv.DictReader((ASSETS / "imagenet_synsets.csv").read_text().splitlines())
  return [row["synset"] for row in rows]


def classes(dataset):
  """Names for its classes, in the order of a prompt set that is unlike that of any copy."""
  if dataset.rule == "several":
    return (
      *VOC, "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dog", "horse", "motorbike",
      "person", "sheep", "sofa", "dining table", "potted plant", "train", "tv monitor",
    )  # fmt: skip
  if dataset.rule == "clevr":
    return ("10", "3", "4", "5", "6", "7", "8", "9")
  return tuple(f"Class {k}" for k in range(dataset.classes))


def spelled(dataset):
  """The same as a copy spells and orders them."""
  return tuple(name.lower().replace(" ", "_") for name in reversed(classes(dataset)))


def wds(root, dataset, split, name=None):
  """CLIP_benchmark's layout: two tar files a split; labels number the copy's own order."""
  place = root / datasets.wds_folder(name or dataset.wds[0])
  copy = spelled(dataset)
  for shard in range(2):
    files = {}
    for i, k in list(enumerate(images(dataset)))[shard * 2 : shard * 2 + 2]:
      files[f"s{i:07d}.webp"] = trees.png(i, kind="WEBP")
      number = len(copy) - 1 - k
      if dataset.rule == "captions":
        files[f"s{i:07d}.txt"] = "\n".join(captions(i))
      elif dataset.rule == "several":
        out = io.BytesIO()
        np.save(out, np.arange(20) == number)
        files[f"s{i:07d}.npy"] = out.getvalue()
      else:
        files[f"s{i:07d}.cls"] = str(number)
    trees.tar(place / split / f"{shard}.tar", files)
  trees.write(place / split / "nshards.txt", "2")
  if dataset.rule != "captions":
    trees.write(place / "classnames.txt", "\n".join(copy) + "\n")
  return place


def captions(i):
  return tuple(f"caption {k} of {i}" for k in range(5))


def folder(root, dataset, split):
  """Its published layout where that is read, otherwise a folder a class, in alphabetical order."""
  place = root / dataset.folder
  choices = dataset.train_folders if split == "train" else dataset.test_folders
  if dataset.rule == "jsonl":
    lines = [json.dumps({"img": f"img/{i}.png", "label": k}) for i, k in enumerate(images(dataset))]
    trees.write(place / f"{choices[0]}.jsonl", "\n".join(lines))
    names = [f"img/{i}.png" for i in range(4)]
  elif dataset.rule == "several":
    base = place / "VOCdevkit" / "VOC2007"
    for i, k in enumerate(images(dataset)):
      thing = f"<object><name>{VOC[k]}</name><difficult>0</difficult></object>"
      trees.write(base / "Annotations" / f"{i}.xml", f"<annotation>{thing}</annotation>")
    listed = "trainval" if split == "train" else "test"
    trees.write(base / "ImageSets" / "Main" / f"{listed}.txt", "0\n1\n2\n3\n")
    names = [f"VOCdevkit/VOC2007/JPEGImages/{i}.jpg" for i in range(4)]
  elif dataset.rule == "captions":
    listed = [
      {"filename": f"{i}.png", "split": split, "sentences": [{"raw": c} for c in captions(i)]}
      for i in range(4)
    ]
    trees.write(place / "dataset_set.json", json.dumps({"images": listed}))
    names = [f"images/{i}.png" for i in range(4)]
  else:
    first = choices[0].split("+")  # an image in each of the folders that are joined, in turn
    folders = class_folders(dataset)
    for part in first:
      for name in folders:
        (place / part / name).mkdir(parents=True)
    names = [f"{first[i % len(first)]}/{folders[k]}/{i}.png" for i, k in enumerate(images(dataset))]
  for i, name in enumerate(names):
    trees.write(place / name, trees.png(i))
  return place


def class_folders(dataset):
  """The folder of each class, by its place among the prompts' classes."""
  if dataset.rule.startswith("synset"):
    return [synsets()[k] for k in dataset.imagenet_indices]
  if dataset.numbered == "yes":
    return [f"{k:05d}" for k in range(dataset.classes)]
  if dataset.numbered == "sorted":
    return [chr(65 + k // 26) + chr(65 + k % 26) for k in range(dataset.classes)]
  return [name.lower().replace(" ", "_") for name in classes(dataset) or ("car", "dog", "zebra")]
