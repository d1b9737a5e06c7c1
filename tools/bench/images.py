"""Training crops a second on one core: ours beside PyTorch's DataLoader with WebDataset.

  python -m tools.bench.images [--photos FOLDER] [--quality 90] [--images 128] [--runs 5] [--json]

Both sides read one tar file of JPEG pairs of 512 x 512 pixels into batches of crops of 224 and
tokens: ours to uint8 (the device normalises), theirs to normalised float32, as each trains. Both
run in this process with one thread and no workers, take turns at going first, and are compared run
by run in CPU seconds, which other programs on the machine do not lengthen. Medians.

Theirs is torchvision's training transform as CLIP is trained with it (RandomResizedCrop of 90 to
100 % of the area, bicubic; to float; normalise), and Resize to 256 with RandomCrop. torchvision has
no build on PyPI for a torch without CUDA, so its operations stand here, of Pillow and torch as its
own are: from one seed they give the tensors of torchvision 0.28 bit for bit, in 1 to 10 % less time
(its Python files run without its compiled part). Without a folder of photos the images are squares
of scikit-learn's two.
"""

import argparse
import functools
import io
import json
import math
import pathlib
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from sklearn import datasets
from torch.utils import data as torch_data

from clip_jax import config as config_lib
from clip_jax import summary
from clip_jax.data import crops, images, pipeline, records, tar_source
from clip_jax.data import tokenizer as tokenizer_lib
from tools.bench import tokenizer as bench_tokenizer

_SIDE, _RESOLUTION, _SHORT_SIDE, _BATCH = 512, 224, 256, 32
_BICUBIC = Image.Resampling.BICUBIC
_PREPROCESS = config_lib.Preprocess()
Transform = Callable[[Image.Image], torch.Tensor]
Loader = Callable[[], Iterable[Any]]


def squares(folder: str, count: int) -> Iterator[Image.Image]:
  """`count` squares of 512 pixels: of a folder's photos, shrunk, or of scikit-learn's as they are.

  The latter are 427 pixels high, and mirrored at the lower edge; each square begins elsewhere.
  """
  paths = sorted(pathlib.Path(folder).iterdir()) if folder else []
  photos = [] if folder else datasets.load_sample_images().images
  for i in range(count):
    rng = np.random.default_rng(i)
    if folder:
      image = images.as_image(paths[i % len(paths)])
      yield Image.fromarray(images.fit(image, _SIDE, _SIDE * 9 // 8, rng))
    else:
      tall_HW3 = np.pad(photos[i % 2], ((0, 113), (0, 0), (0, 0)), mode="reflect")
      yield Image.fromarray(images.fit(Image.fromarray(tall_HW3), _SIDE, 540, rng))


def write_pairs(path: pathlib.Path, files: list[bytes]) -> None:
  """A tar file in WebDataset's layout, with a drawn caption for each image."""
  texts = bench_tokenizer.english(np.random.default_rng(0), len(files))
  with tarfile.open(path, "w") as tar:
    for i, (file, text) in enumerate(zip(files, texts, strict=True)):
      for suffix, content in (("jpg", file), ("txt", text.encode())):
        member = tarfile.TarInfo(f"{i:05d}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def random_resized_crop(image: Image.Image) -> Image.Image:
  """90 to 100 % of the area at 3:4 to 4:3, anywhere in the image, resized to the square."""
  width, height = image.size
  for _ in range(10):
    area = width * height * torch.empty(1).uniform_(0.9, 1.0).item()
    aspect = torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3)).exp().item()
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      top = int(torch.randint(0, height - h + 1, (1,)).item())
      left = int(torch.randint(0, width - w + 1, (1,)).item())
      image = image.crop((left, top, left + w, top + h))
      break  # and else the whole of a square image
  return image.resize((_RESOLUTION, _RESOLUTION), _BICUBIC)


def resize_and_random_crop(image: Image.Image) -> Image.Image:
  """The short side to 256 pixels, then a random square."""
  short = min(image.size)
  width, height = (_SHORT_SIDE * side // short for side in image.size)
  image = image.resize((width, height), _BICUBIC)
  top = int(torch.randint(0, height - _RESOLUTION + 1, (1,)).item())
  left = int(torch.randint(0, width - _RESOLUTION + 1, (1,)).item())
  return image.crop((left, top, left + _RESOLUTION, top + _RESOLUTION))


def to_tensor(image: Image.Image) -> torch.Tensor:
  """ToTensor and Normalize: float32 [3, R, R]."""
  image_RR3 = torch.from_numpy(np.array(image))
  image_3RR = image_RR3.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
  mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (_PREPROCESS.mean, _PREPROCESS.std))
  return image_3RR.clone().sub_(mean).div_(std)


TRANSFORMS: dict[str, Transform] = {
  "RandomResizedCrop(0.9, 1)": lambda image: to_tensor(random_resized_crop(image)),
  "Resize(256), RandomCrop": lambda image: to_tensor(resize_and_random_crop(image)),
}


def whole(data: bytes) -> Image.Image:
  """As WebDataset decodes for PyTorch."""
  image = Image.open(io.BytesIO(data))
  image.load()
  return image.convert("RGB")


def theirs(path: pathlib.Path, transform: Transform) -> Loader:
  """An epoch of PyTorch's batches of (image float32 [B, 3, R, R], tokens)."""
  open_clip = bench_tokenizer.open_clip_tokenize()

  def tokenize(text: str) -> Any:
    tokens: Any = open_clip([text]) if open_clip else [0]
    return tokens[0]

  def load() -> Iterable[Any]:
    pairs = webdataset.WebDataset(str(path), shardshuffle=False).shuffle(_BATCH)
    pairs = pairs.decode("pilrgb").to_tuple("jpg", "txt").map_tuple(transform, tokenize)
    return torch_data.DataLoader(pairs.batched(_BATCH), batch_size=None)

  return load


class Many:
  """The pairs over and over, as many as a shuffle of a real data set has: grain looks for the next
  index in a range of at least 65,536 numbers, which takes 0.6 ms where 64 of them are records.
  """

  fingerprint = ""

  def __init__(self, pairs: records.RecordSource):
    self._pairs = pairs

  def __len__(self) -> int:
    return 1_000_000

  def __getitem__(self, index: int) -> records.Record:
    return self._pairs[index % len(self._pairs)]

  def locate(self, index: int) -> str:
    return self._pairs.locate(index % len(self._pairs))


def ours(folder: pathlib.Path, short_side: int, scaled: bool) -> Loader:
  """An epoch of our batches, without the threads that training reads them with."""
  config = config_lib.Config(
    preprocess=config_lib.Preprocess(train_short_side=short_side),
    data=config_lib.Data(sources=(config_lib.Source(),), scaled_decode=scaled),
  )
  pairs = tar_source.TarSource(folder)
  tokenizer = tokenizer_lib.original()
  batches = pipeline.example_dataset(config, [Many(pairs)], tokenizer).batch(_BATCH)
  return lambda: (batches[i] for i in range(len(pairs) // _BATCH))


def stages(files: list[bytes]) -> dict[str, Callable[[], Any]]:
  """Each works through all the files once."""
  rng, side = np.random.default_rng(0), _RESOLUTION
  resized_crop, crop = TRANSFORMS.values()
  steps: dict[str, Callable[[bytes], Any]] = {
    "decode, whole": images.decode,
    "decode, scaled": lambda data: crops.decode(data, side),
    "decode and crop, whole": lambda data: images.fit(images.decode(data), side, 0, rng),
    "decode and crop, scaled": lambda data: crops.crop(crops.decode(data, side), side, 0, rng),
    "PyTorch: decode, whole": whole,
    "PyTorch: decode, RandomResizedCrop(0.9, 1)": lambda data: resized_crop(whole(data)),
    "PyTorch: decode, Resize(256), RandomCrop": lambda data: crop(whole(data)),
  }
  return {name: functools.partial(_through, step, files) for name, step in steps.items()}


def _through(step: Callable[[bytes], Any], files: list[bytes]) -> list[Any]:
  return [step(data) for data in files]


def loaders(folder: pathlib.Path) -> dict[str, Loader]:
  path = folder / "0.tar"
  found = {
    "loader": ours(folder, 0, True),
    "loader, scaled_decode off": ours(folder, 0, False),
    "loader, short side 256": ours(folder, _SHORT_SIDE, True),
  }
  return found | {f"PyTorch: {name}": theirs(path, step) for name, step in TRANSFORMS.items()}


PAIRED = {  # ratio: (ours, theirs)
  "ratio": ("loader", "PyTorch: RandomResizedCrop(0.9, 1)"),
  "ratio, the same operations": ("loader, short side 256", "PyTorch: Resize(256), RandomCrop"),
  "ratio, scaled_decode off": ("loader, scaled_decode off", "PyTorch: RandomResizedCrop(0.9, 1)"),
}


def cpu_seconds(run: Callable[[], Any]) -> float:
  start = time.process_time()
  for _ in run():
    pass
  return time.process_time() - start


def measure(files: list[bytes], runs: int) -> dict[str, Any]:
  """Images a second of each stage and loader, medians; the paired ratios, medians and least."""
  torch.set_num_threads(1)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_pairs(folder / "0.tar", files)
    sides = stages(files) | loaders(folder)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for run in range(-1, runs):  # the first is a warm-up
      for side in list(sides)[:: 1 if run % 2 else -1]:
        spent = cpu_seconds(sides[side])
        if run >= 0:
          seconds[side].append(spent)
  figures: dict[str, Any] = {
    "bytes an image": round(statistics.mean(map(len, files))),
  }
  for side, values in seconds.items():
    figures[f"images a second, {side}"] = round(len(files) / statistics.median(values))
  for name, (mine, other) in PAIRED.items():
    ratios = [b / a for a, b in zip(seconds[mine], seconds[other], strict=True)]
    figures[name] = f"{statistics.median(ratios):.2f} (least {min(ratios):.2f})"
  return figures


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--photos", default="", help="a folder of images of at least 576 pixels")
  parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
  parser.add_argument("--images", type=int, default=128, help=f"a multiple of {_BATCH}")
  parser.add_argument("--runs", type=int, default=5, help="paired runs")
  parser.add_argument("--json", action="store_true")
  options = parser.parse_args()
  files = []
  for image in squares(options.photos, options.images):
    out = io.BytesIO()
    image.save(out, "JPEG", quality=options.quality)
    files.append(out.getvalue())
  figures = measure(files, options.runs) | summary.machine()
  if options.json:
    print(json.dumps(figures))
  else:
    for name, value in figures.items():
      print(f"{name:>60}  {value:,}" if isinstance(value, int) else f"{name:>60}  {value}")


if __name__ == "__main__":
  main()
