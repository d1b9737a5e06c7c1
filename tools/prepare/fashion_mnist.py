"""Fashion-MNIST: 70,000 grey photos of clothing, 28 x 28, with captions made of the class names.

Source: Xiao, Rasul, Vollgraf 2017, https://github.com/zalandoresearch/fashion-mnist.
"""

import functools
import hashlib
import pathlib

import numpy as np
import rich.progress

from clip_jax.data import records
from clip_jax.evaluation import prompts
from tools.prepare import idx, packages, shards

PACKAGES = {"dataset-fashion-mnist": packages.Wanted("usr/share/datasets/fashion-mnist", (".gz",))}
NAME = "fashion-mnist"
SETTINGS = {"captions_an_image": 4}
_FILES = {"train": "train", "test": "t10k"}
_CLASSES = prompts.SETS["fashion_mnist"].classes
# Of each class, in the data set's order: with its article, and what else it is called.
_NOUNS = (
  ("a t-shirt", "a tee"),
  ("a pair of trousers", "a pair of pants"),
  ("a pullover", "a sweater"),
  ("a dress", "a gown"),
  ("a coat", "an overcoat"),
  ("a sandal", "an open shoe"),
  ("a shirt", "a long-sleeved top"),
  ("a sneaker", "a sports shoe"),
  ("a bag", "a handbag"),
  ("an ankle boot", "a short boot"),
)
_WORDINGS = prompts.SETS["fashion_mnist"].templates


def job(trees: dict[str, packages.Tree]) -> shards.Job:
  """The data set of an unpacked package. Raises: PrepareError for files that are not as known."""
  tree = trees["dataset-fashion-mnist"]
  return shards.Job(
    name=NAME,
    description="Photos of ten kinds of clothing, 28 x 28 grey; captions made of the class names",
    licence="MIT (Zalando SE)",
    source={"dataset-fashion-mnist": tree.fingerprint},
    settings=SETTINGS,
    plan=functools.partial(_plan, tree.root),
  )


def _plan(root: pathlib.Path, progress: rich.progress.Progress) -> shards.Plan:
  items = []
  for split, prefix in _FILES.items():
    images, labels = (root / f"{prefix}-{of}-ubyte.gz" for of in ("images-idx3", "labels-idx1"))
    pairs = zip(*idx.pair(images, labels, len(_CLASSES)), strict=True)
    for i, (pixels_RR, label) in enumerate(pairs):
      key = f"{split}-{i:05d}"
      load = functools.partial(_record, key, pixels_RR, int(label))
      items.append(shards.Item(key, (split,), load))
  return shards.Plan(items, classes=_CLASSES)


def _record(key: str, pixels_RR: np.ndarray, label: int) -> records.Record:
  return records.Record(key, idx.png(pixels_RR), _captions(key, label), _CLASSES[label])


def _captions(key: str, label: int) -> tuple[str, ...]:
  """Four sentences, drawn by the key; every third time with the other name of the thing."""
  digest = hashlib.sha256(key.encode()).digest()
  order = sorted(range(len(_WORDINGS)), key=lambda w: digest[w])
  usual, other = _NOUNS[label]
  nouns = (other if digest[8 + n] % 3 == 0 else usual for n in range(len(order)))
  pairs = zip(order[: SETTINGS["captions_an_image"]], nouns, strict=False)
  return tuple(_WORDINGS[w].format(noun) for w, noun in pairs)
