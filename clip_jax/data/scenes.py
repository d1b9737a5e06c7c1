"""The embedded dataset, with no download: drawn scenes with captions, and handwritten digits.

A scene shows one to three objects of one colour and one shape on a neutral background. An eighth
of the colour-shape compositions never occurs in training: naming them takes the two words apart.
Every scene is a pure function of (seed, split, index), the same on every machine.
"""

import dataclasses
import functools
import hashlib
import math
import operator
import struct
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

from clip_jax.data.records import Record, RecordSource

COLOURS = {
  "red": (214, 38, 38),
  "orange": (245, 135, 25),
  "yellow": (242, 218, 50),
  "green": (48, 160, 70),
  "cyan": (55, 200, 215),
  "blue": (45, 85, 215),
  "purple": (130, 55, 170),
  "pink": (240, 105, 180),
}
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring", "heart", "moon")
COMPOSITIONS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
# One shape of each colour and one colour of each shape: a wrapped diagonal of the 8 x 8 table.
HELD_OUT = tuple(
  f"{colour} {SHAPES[(3 * row + 1) % len(SHAPES)]}" for row, colour in enumerate(COLOURS)
)
TRAINING = tuple(name for name in COMPOSITIONS if name not in HELD_OUT)
SPLITS = {"train": TRAINING, "test": TRAINING, "held_out": HELD_OUT}

PLACES = {
  "left": ("on the left", "on the left side"),
  "right": ("on the right", "on the right side"),
  "top": ("at the top", "in the upper part"),
  "bottom": ("at the bottom", "in the lower part"),
  "centre": ("in the centre", "in the middle"),
}
# One wording of each row is drawn; a record's captions go from the fullest to the barest.
WORDINGS = (
  ("{bare}", "{plain}", "{counted}"),
  ("a photo of {plain}", "a picture of {plain}", "a drawing of {plain}", "a photo of {counted}"),
  ("{sized}", "a photo of {sized}", "a picture of {sized}", "a drawing of {sized}"),
  ("{plain} {where}", "there {be} {counted} {where}", "a photo of {plain} {where}"),
  ("{sized} {where}", "there {be} {sized} {where}", "a picture of {sized} {where}"),
  ("{sized} {where} on a {tone} background", "a drawing of {sized} {where}, {tone} background"),
)
# All within the grammar, and right before a vowel too: never "a {}".
SCENE_TEMPLATES: tuple[str, ...] = ("{}", "one {}", "a photo of one {}", "a small {}", "a large {}")
SCENE_TEMPLATES += ("a photo of a small {}", "a photo of a large {}")
SCENE_TEMPLATES += ("a drawing of a small {}", "a drawing of a large {}")

DIGIT_CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_TEMPLATES = (
  "a handwritten {}",
  "the digit {} written by hand",
  "the handwritten number {}",
  "a photo of the digit {}",
  "a picture of a handwritten {}",
)

_VERSION = 1  # part of every fingerprint: raise it whenever any pixel or caption changes
_OVERSAMPLING = 8  # scenes are drawn this many times larger, then averaged down
# In units of the image's side:
_RADII = {"small": (0.135, 0.155), "large": (0.22, 0.25)}
_MARGIN = 0.02  # between an object and the edge
_GAP = 0.045  # between two objects
_HALF_TURN = 0.0875  # tangent of half the largest rotation, 10 degrees
_COLOUR_JITTER = 14  # of 255, each channel

_T = TypeVar("_T")


class Scenes(RecordSource):
  """Drawn scenes with captions; the compositions take turns, so any stretch is balanced.

  split: "train" (the training compositions), "test" (the same compositions, other scenes) or
    "held_out" (only compositions that "train" never shows).
  length: records. size: pixels, square, at least 32.

  Records: image uint8 [size, size, 3]; six captions, each naming colour and shape, from the
  fullest to the barest; label "red circle".
  Raises: ValueError on an unknown split, a length under 1, a size under 32.
  """

  def __init__(self, split: str, length: int, seed: int = 0, size: int = 32):
    if split not in SPLITS:
      raise ValueError(f"scenes: no split {split!r}; choose one of {', '.join(SPLITS)}")
    if length < 1:
      raise ValueError(f"scenes/{split}: length must be at least 1, is {length}")
    if size < 32:
      raise ValueError(f"scenes/{split}: size must be at least 32 pixels, is {size}")
    self.split, self.length, self.seed, self.size = split, length, seed, size

  def __repr__(self) -> str:
    return f"Scenes({self.split!r}, length={self.length}, seed={self.seed}, size={self.size})"

  @property
  def fingerprint(self) -> str:
    return hashlib.sha256(f"scenes version {_VERSION}: {self!r}".encode()).hexdigest()

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> Record:
    index = _checked(index, self)
    names = SPLITS[self.split]
    label = names[index % len(names)]
    stream = f"scenes/{_VERSION}/{self.seed}/{self.split}/{index}"
    dice = _Dice(stream)
    scene = _Scene.roll(label, dice)
    captions = scene.captions(dice)
    noise_SS = np.frombuffer(
      hashlib.shake_256(f"{stream}/noise".encode()).digest(self.size**2), np.uint8
    ).reshape(self.size, self.size)
    return Record(self.locate(index), _paint(scene, dice, noise_SS), captions, label)

  def locate(self, index: int) -> str:
    return f"scenes/{self.split}/{index}"


class Digits(RecordSource):
  """Real handwriting: the 1,797 digits of 8 x 8 pixels that scikit-learn ships, enlarged.

  split: of each class, in scikit-learn's order, every fifth record is "test" (355 in all), the
    others are "train". Both splits have the same 13 writers.
  size: pixels, square, at least 8 (the original pixels, scaled from 0..16 to 0..255).

  Records: image uint8 [size, size, 3], bright ink on black; six captions; label "seven".
  Raises: ValueError on an unknown split, a size under 8.
  Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI), CC BY 4.0.
  """

  def __init__(self, split: str, size: int = 32):
    if split not in ("train", "test"):
      raise ValueError(f"digits: no split {split!r}; choose one of train, test")
    if size < 8:
      raise ValueError(f"digits/{split}: size must be at least 8 pixels, is {size}")
    self.split, self.size = split, size
    images_NRR, labels_N = _load_digits()
    by_class = [np.flatnonzero(labels_N == digit) for digit in range(len(DIGIT_CLASSES))]
    is_test = np.zeros(len(labels_N), bool)
    is_test[np.concatenate([rows[4::5] for rows in by_class])] = True
    self._rows = np.flatnonzero(is_test == (split == "test"))
    self._images_NRR, self._labels_N = images_NRR[self._rows], labels_N[self._rows]

  def __repr__(self) -> str:
    return f"Digits({self.split!r}, size={self.size})"

  @property
  def fingerprint(self) -> str:
    content = self._images_NRR.tobytes() + self._labels_N.tobytes()
    return hashlib.sha256(f"digits version {_VERSION}: {self!r}".encode() + content).hexdigest()

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Record:
    index = _checked(index, self)
    digit = int(self._labels_N[index])
    name = DIGIT_CLASSES[digit]
    grey = Image.fromarray(self._images_NRR[index])
    grey = grey.resize((self.size, self.size), Image.Resampling.BICUBIC)
    captions = tuple(template.format(name) for template in DIGIT_TEMPLATES)
    image, key = np.asarray(grey.convert("RGB")), f"digits/{self.split}/{index}"
    return Record(key, image, (*captions, f"a handwritten {digit}"), name)

  def locate(self, index: int) -> str:
    """The row is the one in scikit-learn's `load_digits`."""
    return f"digits/{self.split}/{index} (row {self._rows[index]})"


@functools.cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
  """uint8 [1797, 8, 8] of 0..255, uint8 [1797] of 0..9."""
  from sklearn.datasets import load_digits  # here: a second's import that scenes do not need

  digits = load_digits()
  return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.uint8)


def _checked(index: int, source: Scenes | Digits) -> int:
  index = operator.index(index)
  if not 0 <= index < len(source):
    raise IndexError(f"{source!r} has records 0 to {len(source) - 1}, asked for {index}")
  return index


class _Dice:
  """A stream of random numbers named by a string: SHAKE-256, so no library can change it."""

  def __init__(self, stream: str):
    self._values = iter(struct.unpack("<64I", hashlib.shake_256(stream.encode()).digest(256)))

  def between(self, low: float, high: float) -> float:
    return low + (high - low) * (next(self._values) / 2**32)

  def pick(self, choices: Sequence[_T]) -> _T:
    return choices[next(self._values) * len(choices) >> 32]


@dataclasses.dataclass(frozen=True)
class _Scene:
  """What can be said about a scene. Three objects are always small: large ones would not fit."""

  colour: str
  shape: str
  count: int
  extent: str  # small or large
  place: str
  tone: str  # light or dark

  @classmethod
  def roll(cls, composition: str, dice: _Dice) -> "_Scene":
    colour, shape = composition.split()
    count = dice.pick((1, 1, 2, 3))
    extent = dice.pick(("small", "large", "large")) if count < 3 else "small"
    return cls(colour, shape, count, extent, dice.pick(tuple(PLACES)), dice.pick(("light", "dark")))

  def captions(self, dice: _Dice) -> tuple[str, ...]:
    """One wording of each row of WORDINGS, the fullest first."""
    many = self.count > 1
    ending = ("es" if self.shape.endswith("s") else "s") if many else ""
    bare = f"{self.colour} {self.shape}{ending}"
    number = ("one", "two", "three")[self.count - 1]
    article = "an" if bare[0] in "aeiou" else "a"
    fields = {
      "bare": bare,
      "plain": f"{number if many else article} {bare}",
      "counted": f"{number} {bare}",
      "sized": f"{number if many else 'a'} {self.extent} {bare}",
      "where": dice.pick(PLACES[self.place]),
      "be": "are" if many else "is",
      "tone": self.tone,
    }
    return tuple(dice.pick(row).format_map(fields) for row in WORDINGS)[::-1]


def _paint(scene: _Scene, dice: _Dice, noise_SS: np.ndarray) -> np.ndarray:
  """uint8 [S, S, 3]: a neutral background with a gradient, the objects, a little noise."""
  size = len(noise_SS)
  cover_SS1 = (_cover(scene, dice, size) * np.float32(1 / 255))[:, :, None]
  level = dice.between(190, 235) if scene.tone == "light" else dice.between(20, 65)
  tint = [level + dice.between(-6, 6) for _ in "rgb"]
  ramp_S = np.linspace(-1, 1, size, dtype=np.float32)
  ramp_SS = ramp_S * dice.between(-10, 10) + ramp_S[:, None] * dice.between(-10, 10)
  ground_SS3 = ramp_SS.astype(np.float32)[:, :, None] + np.asarray(tint, np.float32)
  paint = [c + dice.between(-_COLOUR_JITTER, _COLOUR_JITTER) for c in COLOURS[scene.colour]]
  image_SS3 = ground_SS3 + cover_SS1 * (np.asarray(paint, np.float32) - ground_SS3)
  image_SS3 += ((noise_SS.astype(np.float32) - 127.5) * np.float32(7 / 127.5))[:, :, None]
  return np.clip(image_SS3, 0, 255).astype(np.uint8)


def _cover(scene: _Scene, dice: _Dice, size: int) -> np.ndarray:
  """uint8 [S, S]: how much of each pixel the objects cover, 255 for all of it."""
  large = size * _OVERSAMPLING
  canvas = Image.new("L", (large, large))
  draw = ImageDraw.Draw(canvas)
  radius, centres = _layout(scene, dice)
  for centre in centres:
    half, middle = dice.between(-_HALF_TURN, _HALF_TURN), np.multiply(centre, large) - 0.5
    for filled, outline_N2 in enumerate(_outlines()[scene.shape]):
      points_N2 = _turned(outline_N2, half) * (radius * large) + middle
      draw.polygon(points_N2.ravel().tolist(), fill=0 if filled else 255)
  return np.asarray(canvas.reduce(_OVERSAMPLING))


def _layout(scene: _Scene, dice: _Dice) -> tuple[float, list[tuple[float, float]]]:
  """Radius and centres (x, y) of the objects, in units of the image's side.

  The objects stand in a line, along the side that `place` names, far enough apart that none
  touches another: each fits a square of the radius.
  """
  count, room, centred = scene.count, 1 - 2 * _MARGIN, scene.place == "centre"
  radius = min(dice.between(*_RADII[scene.extent]), (room - (count - 1) * _GAP) / (2 * count))
  slack = room - count * 2 * radius - (count - 1) * _GAP
  stretch = dice.between(0, slack * (0.2 if centred else 0.6) / max(count - 1, 1))
  reach = min(0.04 if centred else 0.12, (slack - stretch * (count - 1)) / 2)
  offset = dice.between(-reach, reach)
  centres = []
  for i in range(count):
    along = 0.5 + offset + (i - (count - 1) / 2) * (2 * radius + _GAP + stretch)
    edge = radius + _MARGIN
    across = dice.between(0.46, 0.54) if centred else dice.between(edge, max(edge, 0.34))
    centres.append((along, 1 - across if scene.place in ("right", "bottom") else across))
  vertical = scene.place in ("left", "right") or (centred and dice.pick((True, False)))
  return radius, [(b, a) if vertical else (a, b) for a, b in centres]


def _turned(points_N2: np.ndarray, half: float) -> np.ndarray:
  """Rotated about the origin, given the tangent of half the angle: the same on every machine."""
  cos, sin = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
  x, y = points_N2.T
  return np.stack([cos * x - sin * y, sin * x + cos * y], 1)


@functools.cache
def _outlines() -> dict[str, tuple[np.ndarray, ...]]:
  """Polygons [N, 2] of each shape (x right, y down): the first is filled, a second is a hole.

  Within the square of radius 1 at every rotation that occurs.
  """
  t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
  circle = np.stack([np.cos(t), np.sin(t)], 1)
  spikes = np.where(np.arange(10) % 2, 0.42, 1)[:, None]
  tenths = np.linspace(0, 2 * np.pi, 10, endpoint=False)
  arm = 0.33
  cross = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm), (arm, 1)]
  cross += [(-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)]
  lobes = 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t) - 13 * np.cos(t)
  outlines = {
    "circle": (circle,),
    "square": (np.array([(-1.0, -1.0), (1, -1), (1, 1), (-1, 1)]),),
    "triangle": (np.array([(0, -1.9), (1, 0), (-1, 0)]),),
    "cross": (np.array(cross),),
    "star": (np.stack([np.sin(tenths), -np.cos(tenths)], 1) * spikes,),
    "ring": (circle, circle * 0.55),
    "heart": (np.stack([16 * np.sin(t) ** 3, lobes], 1),),
    "moon": (_crescent(offset=0.5, radius=0.82),),
  }
  return {shape: _fitted(polygons) for shape, polygons in outlines.items()}


def _crescent(offset: float, radius: float) -> np.ndarray:
  """[N, 2]: the unit circle without the circle of `radius` around (offset, 0)."""
  x = (1 - radius**2 + offset**2) / (2 * offset)  # where the two circles meet
  y = math.sqrt(1 - x * x)
  outer, inner = math.atan2(y, x), math.atan2(y, x - offset)
  t, u = np.linspace(outer, 2 * np.pi - outer, 30), np.linspace(2 * np.pi - inner, inner, 20)
  cut = np.stack([offset + radius * np.cos(u), radius * np.sin(u)], 1)
  return np.concatenate([np.stack([np.cos(t), np.sin(t)], 1), cut])


def _fitted(polygons: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
  """Moved and scaled so that the first fills the square of radius 1, turned or not."""
  middle = (polygons[0].max(0) + polygons[0].min(0)) / 2
  turns = np.linspace(-_HALF_TURN, _HALF_TURN, 9)
  reach = max(np.abs(_turned(polygons[0] - middle, half)).max() for half in turns)
  return tuple(np.round((p - middle) / reach, 5) for p in polygons)
