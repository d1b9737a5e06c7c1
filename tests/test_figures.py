import base64
import dataclasses
import io

import numpy as np
import pytest
from known_model import KnownModel, labelled
from PIL import Image

from clip_jax.evaluation import embedding_map, figures, zero_shot


def result_of(labels, predicted, classes, held_out=()):
  """A result in which images of class `labels[i]` are taken for class `predicted[i]`."""
  names = [f"name {c}" for c in range(classes)]
  model = KnownModel(np.eye(classes)[predicted], dict(zip(names, np.eye(classes), strict=True)), 8)
  source = labelled([names[c] for c in labels])
  return zero_shot.evaluate(model, source, names, ["{}"], 8, held_out=held_out, examples=0)


def test_a_confusion_grid_has_a_cell_for_every_count():
  result = result_of([0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 1, 1], 3, ("name 1",))
  grid = figures.confusion(result)
  assert {c.title: (c.correct, c.count) for c in grid.cells} == {
    "name 0 taken for name 0: 2 of 3 (67%)": (True, "2"),
    "name 0 taken for name 1: 1 of 3 (33%)": (False, "1"),
    "name 1 taken for name 1: 1 of 1 (100%)": (True, "1"),
    "name 2 taken for name 1: 2 of 2 (100%)": (False, "2"),
  }
  at = {(c.x, c.y): c.title for c in grid.cells}
  assert at[(grid.margin + grid.cell, grid.margin)] == "name 0 taken for name 1: 1 of 3 (33%)"
  assert [row.held_out for row in grid.rows] == [False, True, False]
  assert grid.commonest == ("name 2 taken for name 1: 2 of 2", "name 0 taken for name 1: 1 of 3")
  assert grid.left_out == 0


def test_classes_without_images_are_left_out_unless_predicted():
  grid = figures.confusion(result_of([5, 5, 70], [5, 9, 70], 80))
  assert [row.text for row in grid.rows] == ["name 5", "name 70"]
  assert [column.text for column in grid.columns] == ["name 5", "name 9", "name 70"]
  assert grid.left_out == 77


@pytest.mark.parametrize("classes", [2, 10, 16, 30, 80, 200])
def test_labels_do_not_run_into_each_other(classes):
  grid = figures.confusion(result_of(range(classes), range(classes), classes))
  assert grid.font <= grid.cell
  assert grid.width >= grid.margin + classes * grid.cell
  assert grid.commonest == ()


def test_no_count_stands_on_a_middling_shade():
  shades = [figures._strength(share) for share in np.linspace(0.001, 1, 1000)]
  assert shades == sorted(shades)
  assert not [s for s in shades if 0.49 < s < 0.87]
  assert 0.1 < min(shades) < max(shades) <= 1


def corners(mark):
  width = len(mark.label) * 12.0 * 0.58
  left = mark.label_x - {"start": 0, "middle": width / 2, "end": width}[mark.anchor]
  return left, mark.label_y - 10, left + width, mark.label_y + 3


def test_map_labels_keep_clear_of_each_other_and_of_the_edge():
  rng = np.random.default_rng(0)
  text_C2 = np.concatenate([rng.uniform(0.3, 0.5, (6, 2)), [[0, 0], [1, 1], [0, 1], [1, 0]]])
  names = tuple(f"a long class name {c}" for c in range(10))
  points = embedding_map.EmbeddingMap("", "", names, text_C2, np.arange(10), text_C2)
  images, texts = figures.map_marks(points)
  assert [m.title for m in images] == [f"image: {name}" for name in names]
  assert {(m.hue, m.ring) for m in texts} == {(h, r) for h in range(5) for r in (False, True)}
  boxes = [corners(m) for m in texts]
  for i, one in enumerate(boxes):
    assert one[0] >= 0
    assert one[1] >= 0
    assert one[2] <= figures.MAP_WIDTH
    assert one[3] <= figures.MAP_HEIGHT
    assert not any(figures._overlap(one, other) for other in boxes[:i])


def test_thumbnails_are_exact_where_small_and_bounded_where_large():
  rng = np.random.default_rng(0)
  small = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
  large = np.kron(
    rng.integers(256, size=(20, 20, 3), dtype=np.uint8), np.ones((20, 20, 1), np.uint8)
  )
  for image, kind, side in ((small, "png", 32), (large, "jpeg", 128)):
    head, _, data = figures.data_uri(image).partition(",")
    assert head == f"data:image/{kind};base64"
    decoded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert decoded.size == (side, side)
    if kind == "png":
      np.testing.assert_array_equal(np.asarray(decoded), image)


def test_an_absurdly_long_class_name_is_shortened():
  result = dataclasses.replace(result_of([0], [0], 1), classes=("x" * 500,))
  assert figures.confusion(result).rows[0].text == "x" * 21 + "…"
