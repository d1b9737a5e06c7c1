"""Images as they come in bad conditions: a source whose images are corrupted, for stress tests.

An image is corrupted as the encoder sees it: fitted first, then corrupted, as ImageNet-C does with
its 224-pixel images. So the result does not depend on the size of the file. What is drawn at random
depends on the corruption, the severity and the record's key alone: the same on every host, in any
order, for every model of the same resolution.
Source: Hendrycks & Dietterich 2019 (arXiv 1903.12261); see `noise_and_blur` for what differs.
"""

import dataclasses
import hashlib
import json
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from clip_jax.data import records
from clip_jax.evaluation.stress import noise_and_blur as camera
from clip_jax.evaluation.stress import weather_and_digital as world
from clip_jax.evaluation.stress.noise_and_blur import SEVERITIES, CorruptionError

__all__ = [
  *("GROUPS", "NAMES", "PUBLISHED", "SEVERITIES", "CorruptedSource", "CorruptionError"),
  *("check", "corrupt"),
]

GROUPS: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
  {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression", "saturate"),
  }
)
NAMES = tuple(name for names in GROUPS.values() for name in names)

# The fifteen that ImageNet-C's mean stands on; the other three are the authors' spare ones.
PUBLISHED = tuple(n for n in NAMES if n not in ("speckle_noise", "gaussian_blur", "saturate"))

_FUNCTIONS: Mapping[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
  "gaussian_noise": camera.gaussian_noise,
  "shot_noise": camera.shot_noise,
  "impulse_noise": camera.impulse_noise,
  "speckle_noise": camera.speckle_noise,
  "defocus_blur": camera.defocus_blur,
  "glass_blur": camera.glass_blur,
  "motion_blur": camera.motion_blur,
  "zoom_blur": camera.zoom_blur,
  "gaussian_blur": camera.gaussian_blur,
  "snow": world.snow,
  "frost": world.frost,
  "fog": world.fog,
  "brightness": world.brightness,
  "contrast": world.contrast,
  "elastic_transform": world.elastic_transform,
  "pixelate": world.pixelate,
  "jpeg_compression": world.jpeg_compression,
  "saturate": world.saturate,
}


def check(name: str, severity: int) -> None:
  """Raises: CorruptionError for a name that is not in NAMES (it lists them) or a severity."""
  if name not in _FUNCTIONS:
    raise CorruptionError(f"corruption {name!r}: no such one; choose of {', '.join(NAMES)}")
  camera.at(SEVERITIES, severity)


def corrupt(image_HW3: np.ndarray, name: str, severity: int, key: str) -> np.ndarray:
  """uint8 [H, W, 3] -> uint8 [H, W, 3], the same for the same arguments on every machine.

  (With the locked versions: NumPy may change its random streams between releases.)
  Raises: CorruptionError for an unknown name, a severity out of 1 to 5 or another kind of array.
  """
  check(name, severity)
  if image_HW3.dtype != np.uint8 or image_HW3.ndim != 3 or image_HW3.shape[2] != 3:
    raise CorruptionError(
      f"{key}: an image to corrupt must be uint8 [H, W, 3], not {image_HW3.dtype} {image_HW3.shape}"
    )
  identity = json.dumps([name, int(severity), key])
  seed = int.from_bytes(hashlib.sha256(identity.encode()).digest())
  return _FUNCTIONS[name](image_HW3, severity, np.random.default_rng(seed))


class CorruptedSource:
  """The records of `source` in order, their images fitted by `fit` and then corrupted.

  Args: fit, what makes uint8 [R, R, 3] of a record's image: the model's own (`encoding.Model.fit`),
    which leaves an image of its resolution as it is when the evaluation fits it again.
  Raises: CorruptionError for an unknown name or severity, when made and not when first read.
  """

  def __init__(
    self, source: records.RecordSource, name: str, severity: int, fit: Callable[[Any], np.ndarray]
  ):
    check(name, severity)
    self._source, self.name, self.severity, self._fit = source, name, severity, fit
    self.classes: tuple[str, ...] = tuple(getattr(source, "classes", ()))

  def __repr__(self) -> str:
    return f"CorruptedSource({self._source!r}, {self.name}, {self.severity})"

  @property
  def fingerprint(self) -> str:
    """Of the source, the corruption, and the first record as it comes out, which tells the fit."""
    digest = hashlib.sha256(f"{self._source.fingerprint} {self.name} {self.severity}".encode())
    if len(self):
      image = self[0].image
      assert isinstance(image, np.ndarray)
      digest.update(repr(image.shape).encode() + image.tobytes())
    return digest.hexdigest()

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> records.Record:
    record = self._source[index]
    image = corrupt(self._fit(record.image), self.name, self.severity, record.key)
    return dataclasses.replace(record, image=image)

  def locate(self, index: int) -> str:
    return f"{self._source.locate(index)} ({self.name}, severity {self.severity})"
