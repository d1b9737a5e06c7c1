import dataclasses

import numpy as np
import pytest
from known_model import KnownModel, labelled, unit

from clip_jax.evaluation import embedding_map, zero_shot


def result_with(classes, per_class, seed=0, noise=0.3):
  """Images around their class text, all images moved away from all texts by one same vector."""
  rng = np.random.default_rng(seed)
  names = [f"class {c}" for c in range(classes)]
  text_CE = unit(rng.normal(size=(classes, 16)))
  labels = np.repeat(np.arange(classes), per_class)
  gap = 3 * np.eye(16)[0]
  image_NE = unit(text_CE[labels] + noise * unit(rng.normal(size=(len(labels), 16))) + gap)
  model = KnownModel(image_NE, dict(zip(names, text_CE, strict=True)), 8)
  source = labelled([names[c] for c in labels])
  return zero_shot.evaluate(model, source, names, ["{}"], 8, name="known", examples=0)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_text_lies_among_the_images_of_its_class(method):
  found = embedding_map.project(result_with(3, 20), method)
  assert found.image_N2.shape == (60, 2)
  assert found.text_C2.shape == (3, 2)
  for c in range(3):
    distances = np.linalg.norm(found.image_N2 - found.text_C2[c], axis=1)
    nearest = found.image_classes[np.argsort(distances)[:5]]
    np.testing.assert_array_equal(nearest, c)
  points = np.concatenate([found.image_N2, found.text_C2])
  np.testing.assert_allclose([points.min(axis=0), points.max(axis=0)], [[0, 0], [1, 1]], atol=1e-9)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_map_is_the_same_every_time(method):
  result = result_with(3, 5)
  one, other = (embedding_map.project(result, method) for _ in range(2))
  np.testing.assert_array_equal(one.image_N2, other.image_N2)


def test_the_page_is_told_how_it_was_made_and_of_what():
  found = embedding_map.project(result_with(25, 3), "pca")
  assert len(found.classes) == embedding_map.MAX_CLASSES
  assert set(found.image_classes) == set(range(embedding_map.MAX_CLASSES))
  assert "10 of 25 classes; 30 images" in found.how
  assert "centred on its own mean" in found.how
  assert found.title == "known"


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize(("classes", "per_class"), [(1, 1), (1, 4), (2, 1)])
def test_few_points_are_no_problem(method, classes, per_class):
  found = embedding_map.project(result_with(classes, per_class), method)
  assert np.isfinite(found.image_N2).all()
  assert np.isfinite(found.text_C2).all()


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_equal_embeddings_are_no_problem(method):
  result = result_with(2, 6)
  same = dataclasses.replace(
    result,
    sample_NE=np.repeat(result.sample_NE[:1], len(result.sample_NE), axis=0),
    class_CE=np.repeat(result.class_CE[:1], 2, axis=0),
  )
  assert np.isfinite(embedding_map.project(same, method).image_N2).all()


def test_an_unknown_method_is_named():
  with pytest.raises(ValueError, match="'umap'"):
    embedding_map.project(result_with(1, 1), "umap")
