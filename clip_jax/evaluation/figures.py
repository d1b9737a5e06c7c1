"""The geometry of the report's other drawings: confusion grids, the map of embeddings, thumbnails.

Nothing here writes markup: the template does, and escapes every string on the way.
"""

import base64
import dataclasses
import io

import numpy as np
from PIL import Image

from clip_jax.evaluation import embedding_map, zero_shot

MAP_WIDTH, MAP_HEIGHT = 480, 400  # of the map, in SVG units
_MAP_FONT = 12.0
_HUES = 5  # colours of the map; the next classes take the same ones as rings


@dataclasses.dataclass(frozen=True)
class Cell:
  x: float
  y: float
  strength: float  # opacity: the larger, the larger its share of the row
  correct: bool
  count: str  # in words, where there is room for it
  title: str


@dataclasses.dataclass(frozen=True)
class Label:
  text: str
  at: float
  held_out: bool


@dataclasses.dataclass(frozen=True)
class Confusion:
  """A heat grid: rows are true classes, columns predictions."""

  width: float
  height: float
  margin: float  # left and above, for the labels
  cell: float
  font: float
  rows: tuple[Label, ...]
  columns: tuple[Label, ...]
  cells: tuple[Cell, ...]
  left_out: int  # classes that have no images and were never predicted
  commonest: tuple[str, ...]  # mistakes, in words


def confusion(result: zero_shot.ZeroShotResult) -> Confusion:
  """Rows only for classes that have images, columns only for those and for predicted ones."""
  counts_CC = result.confusion
  rows = np.flatnonzero(counts_CC.sum(axis=1))
  columns = np.flatnonzero(counts_CC.sum(axis=1) + counts_CC.sum(axis=0))
  cell = next(
    c for limit, c in ((10, 40), (16, 28), (30, 20), (60, 14), (10**9, 11)) if len(columns) <= limit
  )
  font = min(12.0, max(9.2, cell * 0.6))
  longest = max(len(_short(result.classes[c])) for c in columns) + 2 * bool(result.held_out)
  margin = round(longest * font * 0.66 + 10, 1)  # wide enough for a wide font in bold
  cells = []
  for r, label in enumerate(rows):
    total = int(counts_CC[label].sum())
    for c, predicted in enumerate(columns):
      count = int(counts_CC[label, predicted])
      if count:
        cells.append(
          Cell(
            x=round(margin + c * cell, 1),
            y=round(margin + r * cell, 1),
            strength=_strength(count / total),
            correct=bool(label == predicted),
            count=str(count) if cell >= 28 else "",
            title=f"{result.classes[label]} taken for {result.classes[predicted]}: "
            f"{count:,} of {total:,} ({count / total:.0%})",
          )
        )

  def labels(which: np.ndarray) -> tuple[Label, ...]:
    names = [result.classes[i] for i in which]
    return tuple(
      Label(_short(name), round(margin + (i + 0.5) * cell, 1), name in result.held_out)
      for i, name in enumerate(names)
    )

  return Confusion(
    width=margin + len(columns) * cell + 2,
    height=margin + len(rows) * cell + 2,
    margin=margin,
    cell=cell,
    font=font,
    rows=labels(rows),
    columns=labels(columns),
    cells=tuple(cells),
    left_out=len(result.classes) - len(columns),
    commonest=_commonest(result),
  )


def _strength(share: float) -> float:
  """An opacity, with a gap at one half: text on what lies in the gap would be hard to read."""
  return round(0.12 + 0.36 * (2 * share) ** 0.7 if share <= 0.5 else 0.88 + 0.24 * (share - 0.5), 2)


def _commonest(result: zero_shot.ZeroShotResult, size: int = 5) -> tuple[str, ...]:
  wrong_CC = result.confusion - np.diag(np.diag(result.confusion))
  order = np.argsort(-wrong_CC, axis=None, kind="stable")[:size]
  pairs = [divmod(int(i), len(wrong_CC)) for i in order]
  return tuple(
    f"{result.classes[r]} taken for {result.classes[c]}: "
    f"{wrong_CC[r, c]:,} of {result.confusion[r].sum():,}"
    for r, c in pairs
    if wrong_CC[r, c]
  )


def _short(text: str, size: int = 22) -> str:
  return text if len(text) <= size else text[: size - 1] + "…"


@dataclasses.dataclass(frozen=True)
class Mark:
  """An image (a dot, or a ring where `ring`) or a text (with its label) on the map."""

  x: float
  y: float
  hue: int
  ring: bool
  title: str
  label: str = ""
  label_x: float = 0.0
  label_y: float = 0.0
  anchor: str = "start"


def map_marks(points: embedding_map.EmbeddingMap) -> tuple[list[Mark], list[Mark]]:
  """Image marks and text marks of a map, the labels placed so that they do not hide each other."""
  pad = 26.0

  def place(row: np.ndarray) -> tuple[float, float]:
    x = pad + float(row[0]) * (MAP_WIDTH - 2 * pad)
    return round(x, 1), round(MAP_HEIGHT - pad - float(row[1]) * (MAP_HEIGHT - 2 * pad), 1)

  images = []
  for row, c in zip(points.image_N2, points.image_classes, strict=True):
    images.append(Mark(*place(row), int(c) % _HUES, int(c) >= _HUES, f"image: {points.classes[c]}"))
  texts: list[Mark] = []
  taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in map(place, points.text_C2)]
  for c, name in enumerate(points.classes):
    x, y = place(points.text_C2[c])
    label = _short(name)
    box, label_x, label_y, anchor = _label_place(x, y, len(label) * _MAP_FONT * 0.58, taken)
    taken.append(box)
    texts.append(
      Mark(x, y, c % _HUES, c >= _HUES, f"text: {name}", label, label_x, label_y, anchor)
    )
  return images, texts


_Box = tuple[float, float, float, float]


def _label_place(
  x: float, y: float, width: float, taken: list[_Box]
) -> tuple[_Box, float, float, str]:
  """The first place around a mark where its label is inside the map and free, else the first."""
  places = []
  for away in (0, 12, 24, 36):
    for anchor, dx, dy in (
      ("start", 10, 4),
      ("end", -10, 4),
      ("middle", 0, -12 - away),
      ("middle", 0, 20 + away),
      ("start", 9, -9 - away),
      ("start", 9, 17 + away),
      ("end", -9, -9 - away),
      ("end", -9, 17 + away),
    ):
      left = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
      box = (left, y + dy - 10, left + width, y + dy + 3)
      if box[0] >= 2 and box[2] <= MAP_WIDTH - 2 and box[1] >= 2 and box[3] <= MAP_HEIGHT - 2:
        places.append((box, round(x + dx, 1), round(y + dy, 1), anchor))
  free = (p for p in places if not any(_overlap(p[0], other) for other in taken))
  anywhere = ((x, y, x, y), x, y - 10, "middle")
  return next(free, places[0] if places else anywhere)


def _overlap(one: _Box, other: _Box) -> bool:
  apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
  return not apart


def data_uri(image: np.ndarray, side: int = 128) -> str:
  """uint8 [R, R, 3] -> `data:image/...` of at most `side` pixels; lossless where it is small."""
  picture, buffer = Image.fromarray(image), io.BytesIO()
  kind = "png"
  if max(picture.size) > side:
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind = "jpeg"
  picture.save(buffer, kind, quality=88)
  return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
