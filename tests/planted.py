"""Tiny copies of the paper's data sets with a model whose answers on them are planted.

Every image is `known_model.picture` of a number of its own, and the model embeds it as it is told
to; a text as the direction of the class name in it. Of four test images of a data set the first
three are answered rightly and the last one, of class 1, as wrongly as can be, as class 0.
"""

import io
import json
import zlib

import dataset_trees
import numpy as np
import trees
from known_model import SIDE, picture, unit
from PIL import Image

from clip_jax.data import bytepairs
from clip_jax.data import images as images_lib
from clip_jax.evaluation import datasets, prompts
from clip_jax.evaluation.paper import cells as paper_cells

WIDTH = 256
HASH = "a" * 64
LABELS = (2, 0, 1, 1)
OF_TWO = (0, 1, 1, 1)  # labels where there are two classes
# What these answers are by each metric; none is what another metric gives for the same answers.
EXPECTED = {
  "accuracy": 75.0,
  "mean per class": 250 / 3,  # classes 2, 0 and 1: all, all, half
  # The images of class 1 come first and last: 11 points of 1, 1, 1, 1, 1, 1, 2/4, ...; others 1.
  "11-point mAP": 100 * (1 + 1 + 8.5 / 11) / 3,
  "ROC AUC": 200 / 3,  # of the images of class 1 two are above that of class 0, and one below it
  "mean(top1, top5)": (75 + 100) / 2,
}


def file_of(number, kind="PNG"):
  out = io.BytesIO()
  Image.fromarray(picture(number)).save(out, kind)
  return out.getvalue()


def direction(name):
  """Of a class name: nearly at right angles to that of any other."""
  return unit(np.random.default_rng(zlib.crc32(name.encode())).normal(size=WIDTH))


class Model:
  """Embeds picture(n) as `rows[n]`, with `features[n]` before the projection."""

  logit_scale = 100.0

  def __init__(self):
    self.rows, self.features, self.texts, self.images_seen = {}, {}, {}, 0
    self.too_long = set()  # texts

  def fit(self, image):
    return images_lib.fit(images_lib.as_image(image), SIDE)

  def _numbers(self, images):
    self.images_seen += len(images)
    return [int(i[0, 0, 0]) + 256 * int(i[0, 0, 1]) for i in images]

  def encode_image(self, images):
    return np.array([self.rows[n] for n in self._numbers(images)], np.float32)

  def image_features(self, images):
    return np.array([self.features[n] for n in self._numbers(images)], np.float32)

  def tokens(self, texts, truncate=False):
    for text in () if truncate else texts:
      if text in self.too_long:
        raise bytepairs.TokenizerError(f"text {text!r} is too long")
    return texts

  def encode_text(self, texts, truncate=False):
    del truncate
    return np.array([self.texts[text] for text in texts], np.float32)


class World:
  """The copies below `root` and the model that knows them."""

  def __init__(self, root, model=None, tfds=False):
    """Args: tfds, write copies as TFDS has them, where it has the test split itself."""
    self.root, self.model, self.number, self.tfds = root, model or Model(), 0, tfds

  def weights(self, name="planted"):
    return paper_cells.Weights(name, self.model, HASH)

  def loaded(self, named):
    """In place of `paper_models.load`."""
    return self.weights(named.name)

  def classes(self, dataset):
    """The embedding of each class, by the prompts that the model then knows."""
    prompt_set = prompts.named(dataset.prompts)
    for own in prompt_set.names:
      for name in own:
        row = direction(name)
        self.model.texts |= {t.replace("{}", name): row for t in prompt_set.templates}
    class_CE = unit([np.mean([direction(n) for n in own], axis=0) for own in prompt_set.names])
    indices = dataset.imagenet_indices
    return class_CE[list(indices)] if indices else class_CE

  def test(self, key, labels=LABELS):
    """The test split of a data set in its layout, answered as the head of this module says."""
    dataset = datasets.named(key)
    if dataset.classes == 2:
      labels = OF_TWO
    class_CE = self.classes(dataset)
    numbers = self.write(dataset, "test", labels)
    for number, label in zip(numbers, labels, strict=True):
      self.model.rows[number] = class_CE[label]
    far = dataset.rule == "several" or dataset.classes == 2
    own = (-0.3 if far else 0.8) * class_CE[labels[-1]]
    self.model.rows[numbers[-1]] = unit(class_CE[0] + own)
    return dataset

  def write(self, dataset, split, labels, folder=""):
    """Images of these classes as a copy has them. Returns: their numbers."""
    numbers = range(self.number, self.number + len(labels))
    self.number += len(labels)
    if self.tfds and dataset.tfds_test and dataset.rule not in ("draw", "clevr"):
      self._tfds(dataset, labels, numbers)
    elif dataset.rule == "jsonl":
      self._jsonl(dataset, split, labels, numbers)
    elif dataset.wds and not folder:
      self._wds(dataset, split, labels, numbers)
    else:
      place = self.root / dataset.folder / (folder or split)
      names = self.names(dataset)
      for number, label in zip(numbers, labels, strict=True):
        trees.write(place / names[label] / f"{number}.png", file_of(number))
    return numbers

  def names(self, dataset):
    own = [names[0] for names in prompts.named(dataset.prompts).names]
    return [own[k] for k in dataset.imagenet_indices] or own

  def _wds(self, dataset, split, labels, numbers):
    place = self.root / datasets.wds_folder(dataset.wds[0])
    names = self.names(dataset)
    # In another order than the prompts', but for ImageNet's, where two classes have one name.
    order = list(range(len(names)))[:: 1 if len(set(names)) < len(names) else -1]
    half = -(-len(labels) // 2)
    for shard in range(2):
      files = {}
      part = slice(shard * half, (shard + 1) * half)
      for number, label in zip(numbers[part], labels[part], strict=True):
        files[f"s{number:07d}.png"] = file_of(number)
        if dataset.rule == "several":
          out = io.BytesIO()
          np.save(out, np.array(order) == label)
          files[f"s{number:07d}.npy"] = out.getvalue()
        else:
          files[f"s{number:07d}.cls"] = str(order.index(label))
      trees.tar(place / split / f"{shard}.tar", files)
    trees.write(place / split / "nshards.txt", "2")
    trees.write(place / "classnames.txt", "\n".join(names[k] for k in order) + "\n")

  def _tfds(self, dataset, labels, numbers):
    """The test split: where labels have names, in another order than the prompts'."""
    import tfds_trees  # slow, and seldom wanted

    names = [name.lower().replace(" ", "_") for name in self.names(dataset)]
    examples = []
    for number, label in zip(numbers, labels, strict=True):
      example = {"image": io.BytesIO(file_of(number))}
      if dataset.rule == "several":
        example |= {"labels": [names[label]], "labels_no_difficult": [names[label]]}
      elif dataset.rule == "kitti":
        things = [{"type": "Van", "location": [0.0, 0.0, z]} for z in (4.0, 14.0, 50.0)[label:]]
        example |= {"image/file_name": str(number), "objects": things}
      else:
        example |= {"label": names[label], "segmentation_mask": io.BytesIO(b"no image")}
      examples.append(example)
    if dataset.rule.startswith("synset"):  # all 1,000, of the shifts too
      every, indices = dataset_trees.synsets(), dataset.imagenet_indices
      features = tfds_trees.classes(every)
      for example, label in zip(examples, labels, strict=True):
        example["label"] = every[indices[label]]
    elif dataset.rule == "several":
      features = tfds_trees.voc(names[::-1])
    elif dataset.rule == "kitti":
      features = tfds_trees.kitti()
    else:
      features = tfds_trees.classes(names[::-1])
    tfds_trees.write(self.root, dataset.tfds, features, {dataset.tfds_test: examples})

  def _jsonl(self, dataset, split, labels, numbers):
    place = self.root / dataset.folder
    lines = []
    for number, label in zip(numbers, labels, strict=True):
      trees.write(place / "img" / f"{number}.png", file_of(number))
      lines.append(json.dumps({"img": f"img/{number}.png", "label": label}))
    name = {"train": "train", "test": "dev"}[split]
    trees.write(place / f"{name}.jsonl", "\n".join(lines))

  def captions(self, key, prefix="a photo of "):
    """Four images with six captions each, the last of which the paper does not use.

    Those of the last image are near the third. Of 20 texts 15 find their image first, and the last
    image has the 15 other texts before its own.
    """
    dataset = datasets.named(key)
    place, basis = self.root / datasets.wds_folder(dataset.wds[0]), np.eye(WIDTH)
    files, examples = {}, []
    for i in range(4):
      number = self.number + i
      self.model.rows[number] = basis[i].astype(np.float32)
      files[f"s{i:07d}.png"] = file_of(number)
      texts = [f"{i} {c} {key}" for c in range(6)]
      files[f"s{i:07d}.txt"] = "\n".join(texts)
      own = [{"id": c, "text": text} for c, text in enumerate(texts)]
      image = io.BytesIO(file_of(number))
      examples.append({"image": image, "image/filename": f"{i}.png", "captions": own})
      row = basis[i] if i < 3 else unit(basis[2] + 0.1 * basis[9])
      self.model.texts |= {prefix + text: row for text in texts[:5]}
    self.number += 4
    if self.tfds:
      import tfds_trees

      splits = {dataset.tfds_test: examples}
      tfds_trees.write(self.root, dataset.tfds, tfds_trees.captions(), splits)
      return dataset
    trees.tar(place / "test" / "0.tar", files)
    trees.write(place / "test" / "nshards.txt", "1")
    return dataset

  def probe(self, key, labels=LABELS, train_folder="", test_folder="", per_class=6):
    """Both splits with features that a probe tells apart, answered as the test split's are."""
    dataset = datasets.named(key)
    if dataset.classes == 2:
      labels = OF_TWO
    centre_CD = 3 * np.eye(dataset.classes)
    every = [label for label in range(dataset.classes) for _ in range(per_class)]
    rng = np.random.default_rng(0)
    for number, label in zip(self.write(dataset, "train", every, train_folder), every, strict=True):
      noise = 0.1 * rng.normal(size=dataset.classes)
      self.model.features[number] = centre_CD[label] + noise
    numbers = self.write(dataset, "test", labels, test_folder)
    for number, label in zip(numbers, labels, strict=True):
      self.model.features[number] = centre_CD[label]
    self.model.features[numbers[-1]] = 0.9 * centre_CD[0] - 0.3 * centre_CD[labels[-1]]
    return dataset
