"""Fashion-MNIST: 70,000 grey photos of clothing, 28 x 28, with captions made of the class names.

Source: Xiao, Rasul, Vollgraf 2017, https://github.com/zalandoresearch/fashion-mnist.
"""

import functools
import gzip
import hashlib
import io
import pathlib
import zlib

import numpy as np
import rich.progress
from PIL import Image

from clip_jax.data import records
from clip_jax.evaluation import prompts
from tools.prepare import packages, shards

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
    image_NRR = _read_idx(root / f"{prefix}-images-idx3-ubyte.gz", rank=3)
    labels = _read_idx(root / f"{prefix}-labels-idx1-ubyte.gz", rank=1)
    if len(image_NRR) != len(labels) or not len(labels) or labels.max() >= len(_CLASSES):
      raise shards.PrepareError(f"{root}: images and labels of {split!r} do not belong together")
    for i, (pixels_RR, label) in enumerate(zip(image_NRR, labels, strict=True)):
      key = f"{split}-{i:05d}"
      load = functools.partial(_record, key, pixels_RR, int(label))
      items.append(shards.Item(key, (split,), load))
  return shards.Plan(items, classes=_CLASSES)


def _record(key: str, pixels_RR: np.ndarray, label: int) -> records.Record:
  out = io.BytesIO()
  Image.fromarray(pixels_RR).save(out, "PNG")
  return records.Record(key, out.getvalue(), _captions(key, label), _CLASSES[label])


def _captions(key: str, label: int) -> tuple[str, ...]:
  """Four sentences, drawn by the key; every third time with the other name of the thing."""
  digest = hashlib.sha256(key.encode()).digest()
  order = sorted(range(len(_WORDINGS)), key=lambda w: digest[w])
  usual, other = _NOUNS[label]
  nouns = (other if digest[8 + n] % 3 == 0 else usual for n in range(len(order)))
  pairs = zip(order[: SETTINGS["captions_an_image"]], nouns, strict=False)
  return tuple(_WORDINGS[w].format(noun) for w, noun in pairs)


def _read_idx(path: pathlib.Path, rank: int) -> np.ndarray:
  """An idx file of bytes -> uint8 of that rank. Raises: PrepareError naming the file."""
  try:
    data = gzip.decompress(path.read_bytes())
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise shards.PrepareError(f"{path}: damaged ({error}); fetch the package anew") from error
  header = 4 + 4 * rank
  shape = tuple(int.from_bytes(data[i : i + 4]) for i in range(4, header, 4))
  if data[:4] != bytes((0, 0, 8, rank)) or len(data) != header + int(np.prod(shape)):
    raise shards.PrepareError(f"{path}: not an idx file of bytes with {rank} axes")
  return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
