"""idx files, the format of MNIST and its kin: a header of sizes, then bytes.

Source: http://yann.lecun.com/exdb/mnist/, "FILE FORMATS".
"""

import gzip
import io
import pathlib
import zlib

import numpy as np
from PIL import Image

from tools.prepare.jobs import PrepareError


def content(path: pathlib.Path) -> bytes:
  """A file, unpacked where its name ends with .gz. Raises: PrepareError naming it."""
  data = path.read_bytes()
  if path.suffix != ".gz":
    return data
  try:
    return gzip.decompress(data)
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise PrepareError(f"{path}: damaged ({error}); fetch it anew") from error


def read(path: pathlib.Path, rank: int) -> np.ndarray:
  """A file of bytes, which may be compressed -> uint8 of that rank.

  Raises: PrepareError naming the file.
  """
  data = content(path)
  header = 4 + 4 * rank
  shape = tuple(int.from_bytes(data[i : i + 4]) for i in range(4, header, 4))
  if data[:4] != bytes((0, 0, 8, rank)) or len(data) != header + int(np.prod(shape)):
    raise PrepareError(f"{path}: not an idx file of bytes with {rank} axes")
  return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def pair(images: pathlib.Path, labels: pathlib.Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
  """uint8 images [N, R, R] and their labels [N] < classes.

  Raises: PrepareError when one of them is damaged, or they do not belong together.
  """
  image_NRR, label_N = read(images, rank=3), read(labels, rank=1)
  if len(image_NRR) != len(label_N) or not len(label_N) or label_N.max() >= classes:
    raise PrepareError(f"{images} and {labels.name} do not belong together")
  return image_NRR, label_N


def png(pixels_RR: np.ndarray) -> bytes:
  """A grey image as a PNG file."""
  out = io.BytesIO()
  Image.fromarray(pixels_RR).save(out, "PNG")
  return out.getvalue()
