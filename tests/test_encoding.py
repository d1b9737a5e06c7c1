import numpy as np
import pytest
from known_model import KnownModel, labelled, unit

from clip_jax.evaluation import encoding


@pytest.mark.parametrize("n", [1, 7, 8, 9, 100])
def test_every_record_and_text_is_embedded_once_in_order(n):
  rows = unit(np.random.default_rng(0).normal(size=(n, 4)))
  model = KnownModel(rows, {f"t{i}": row for i, row in enumerate(rows)}, 8)
  visited = []
  images = encoding.encode_images(
    model, labelled(["x"] * n), n, 8, lambda i, record: visited.append((i, record.key))
  )
  np.testing.assert_array_equal(images, rows)
  assert visited == [(i, f"key{i}") for i in range(n)]
  np.testing.assert_array_equal(encoding.encode_texts(model, [f"t{i}" for i in range(n)], 8), rows)


@pytest.mark.parametrize("shape", [(7, 4), (8,), (8, 4, 1)])
def test_an_encoder_that_returns_another_shape_is_an_error(shape):
  model = KnownModel(np.eye(4), {}, 8)
  model.encode_text = lambda texts, truncate: np.ones(shape, np.float32)
  with pytest.raises(encoding.EvaluationError, match="for 8 inputs"):
    encoding.encode_texts(model, ["a"], 8)


def test_equal_embeddings_score_equally_wherever_they_stand():
  rng = np.random.default_rng(0)
  for size in (3, 17, 64, 513):
    one = unit(rng.normal(size=size))
    items_NE = np.repeat(one[None], 37, axis=0)
    scores = encoding.similarities(unit(rng.normal(size=(13, size))), items_NE)
    assert (scores == scores[:, :1]).all()
    assert scores.dtype == np.float32


def test_similarities_of_many_queries():
  """As of each alone, though only some are computed at a time."""
  rng = np.random.default_rng(1)
  query_QE, item_NE = unit(rng.normal(size=(4099, 5))), unit(rng.normal(size=(3, 5)))
  scores = encoding.similarities(query_QE, item_NE)
  for q in (0, 4095, 4096, 4098):
    np.testing.assert_array_equal(scores[q], encoding.similarities(query_QE[q : q + 1], item_NE)[0])
  np.testing.assert_allclose(scores, query_QE @ item_NE.T, atol=1e-6)
