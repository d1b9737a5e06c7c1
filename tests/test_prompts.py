import numpy as np
import pytest

from clip_jax.data import scenes
from clip_jax.evaluation import prompts


def encoder(seed=0, size=5):
  """Any text -> a fixed random row, of no particular norm."""

  def encode(texts):
    seeds = [[seed, *text.encode()] for text in texts]
    return np.array([np.random.default_rng(s).normal(size=size) for s in seeds], np.float32)

  return encode


def test_class_embeddings_are_the_mean_of_unit_embeddings_renormalised():
  classes, templates = ["cat", "dog", "ankle boot"], ["{}", "a photo of a {}", "many {}"]
  got = prompts.class_embeddings(encoder(), classes, templates)
  for name, row in zip(classes, got, strict=True):
    each = [encoder()([t.replace("{}", name)])[0] for t in templates]
    mean = np.mean([e / np.linalg.norm(e) for e in each], axis=0)
    np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-5, atol=1e-6)
  assert got.dtype == np.float32
  assert got.shape == (3, 5)


def test_embeddings_are_averaged_only_after_they_were_normalised():
  def encode(texts):
    return np.array([[1.0, 0.0] if "photo" in t else [0.0, 1000.0] for t in texts], np.float32)

  got = prompts.class_embeddings(encode, ["cat"], ["a photo of a {}", "a drawing of a {}"])
  np.testing.assert_allclose(got, [[2**-0.5, 2**-0.5]], rtol=1e-6)


def test_all_prompts_are_encoded_once_and_braces_in_names_are_just_letters():
  seen = []

  def encode(texts):
    seen.extend(texts)
    return np.ones((len(texts), 2), np.float32)

  prompts.class_embeddings(encode, ["{0}", "{x"], ["{}", "a {}."])
  assert seen == ["{0}", "a {0}.", "{x", "a {x."]


@pytest.mark.parametrize(
  ("classes", "templates", "message"),
  [
    ([], ["{}"], "0 classes"),
    (["a"], [], "0 templates"),
    (["a", "b", "a"], ["{}"], "more than once: 'a'"),
    (["a"], ["a photo"], "'a photo': wants {} once"),
    (["a"], ["{} or {}"], "wants {} once"),
    ("cat", ["{}"], "not one string"),
    (["cat"], "a {}", "not one string"),
  ],
)
def test_unusable_classes_and_templates_are_named(classes, templates, message):
  with pytest.raises(prompts.PromptError, match=message.replace("{", r"\{").replace("}", r"\}")):
    prompts.class_embeddings(encoder(), classes, templates)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_text_without_a_direction_is_named(value):
  def encode(texts):
    return np.array([[value, 0.0] if "dog" in t else [1.0, 0.0] for t in texts], np.float32)

  with pytest.raises(prompts.PromptError, match="text 'a dog'"):
    prompts.class_embeddings(encode, ["cat", "dog"], ["a {}"])


def test_a_class_whose_texts_cancel_out_is_named():
  def encode(texts):
    return np.array([[-1.0 if "not" in t else 1.0] for t in texts], np.float32)

  with pytest.raises(prompts.PromptError, match="class 'cat'"):
    prompts.class_embeddings(encode, ["cat"], ["a {}", "not a {}"])


@pytest.mark.parametrize("name", prompts.SETS)
def test_every_set_makes_distinct_prompts(name):
  found = prompts.named(name)
  classes = found.classes or ("one", "another")
  embeddings = prompts.class_embeddings(encoder(), classes, found.templates)
  assert np.isfinite(embeddings).all()
  texts = [t.replace("{}", c) for t in found.templates for c in classes]
  assert len(set(texts)) == len(texts)
  assert set(found.held_out) <= set(classes)


def test_sets_have_the_labels_of_their_sources():
  labels = {record.label for record in map(scenes.Digits("test").__getitem__, range(355))}
  assert labels == set(prompts.named("digits").classes)
  held_out = scenes.Scenes("held_out", 40)
  assert {held_out[i].label for i in range(40)} == set(prompts.named("scenes").held_out)
  assert len(prompts.named("fashion_mnist").classes) == 10


def test_an_unknown_set_is_answered_with_the_known_ones():
  with pytest.raises(
    prompts.PromptError, match=r"'imagenot'.*digits, fashion_mnist, scenes, stamps"
  ):
    prompts.named("imagenot")
