import re

import numpy as np
import pytest
from known_model import KnownModel, labelled, unit
from parsed_page import EVIL, Page

from clip_jax.evaluation import predictions, report, zero_shot


def result_of(classes, n=60, examples=20, halves=False, name="pets test", templates=("a {}",)):
  rng = np.random.default_rng(0)
  text_CE = unit(rng.normal(size=(len(classes), 16)))
  labels = rng.integers(len(classes), size=n)
  image_NE = unit(text_CE[labels] + 2.4 * unit(rng.normal(size=(n, 16))))
  texts = {t.replace("{}", c): e for c, e in zip(classes, text_CE, strict=True) for t in templates}
  return zero_shot.evaluate(
    KnownModel(image_NE, texts, 8),
    labelled([classes[c] for c in labels]),
    classes,
    templates,
    8,
    name=name,
    examples=examples,
    seed=5,
    halves=halves,
  )


CLASSES = [f"kind {c}" for c in range(7)]


def articles(text):
  """The cards of a page, each as its own piece of HTML."""
  return re.findall(r"<article.*?</article>", text, re.DOTALL)


def test_every_example_is_told_with_its_five_prompts_and_bars():
  result = result_of(CLASSES)
  text = predictions.page(result, 5, False)
  cards = articles(text)
  assert len(cards) == len(result.examples) == 20
  for card, example in zip(cards, result.examples, strict=True):
    page = Page(card)
    sure, ranked = report.percent(example.probability), f"ranked {example.rank} out of 7"
    assert f"{sure} for the true label, {ranked}" in page.text
    assert ("✓ right" in page.text) == example.correct
    assert ("✗ wrong" in page.text) == (not example.correct)
    assert "pets test" in page.text
    prompts = re.findall(r"a kind \d", page.text)
    assert prompts == [f"a {name}" for name, _ in example.likeliest]
    assert page.text.count("✓ true") == (example.label in dict(example.likeliest))
    widths = re.findall(r"width:([\d.]+)%", card)
    shares = [p for _, p in example.likeliest]
    np.testing.assert_allclose([float(w) / 100 for w in widths], shares, atol=6e-5)
    for _, p in example.likeliest:
      assert report.percent(p) in page.text


def test_the_head_says_how_good_the_model_is_and_how_images_were_drawn():
  result = result_of(CLASSES)
  right = sum(e.correct for e in result.examples)
  assert 0 < right < 20
  page = Page(predictions.page(result, 5, False, facts={"weights": "w"}, notes=("One note.",)))
  low, high = report.wilson(result.top1, 60)
  for words in (
    report.percent(result.top1),
    f"95% interval {report.percent(low)} to {report.percent(high)}, chance 14.3%",
    "20 of 60 images drawn at random with seed 5, none chosen by hand: "
    f"{right} of them are right, {20 - right} are wrong.",
    "One note.",
    "weights w",
    "seed 5",
  ):
    assert words in page.text, words
  page = Page(predictions.page(result_of(CLASSES, examples=10, halves=True), 5, True))
  assert "10 of 60 images drawn at random with seed 5, as far as there are so many" in page.text
  assert "(5 and 5): they do not stand for the accuracy." in page.text
  page = Page(predictions.page(result_of(CLASSES, examples=99), 5, False))
  assert "All 60 images, in an order drawn at random with seed 5" in page.text


def test_prompts_have_the_names_that_were_put_into_them():
  result = result_of(["missile (657)", "cat"], templates=("{}", "a photo of a {}."))
  page = Page(predictions.page(result, 5, False, {"missile (657)": "missile", "cat": "cat"}))
  assert "a photo of a missile ." in page.text  # the name stands in an element of its own
  assert "A class has 2 sentences, whose mean counts; one is written out." in page.text
  assert "top-5" not in page.text  # of two classes


def test_nothing_is_fetched_and_hostile_names_stay_names():
  names = [EVIL.replace("\x00", "") + str(c) for c in range(6)]
  text = predictions.page(result_of(names, name=EVIL), 5, False, facts={EVIL: EVIL}, notes=(EVIL,))
  page = Page(text)
  assert "script" not in page.tags
  assert "<script>alert('x')</script>" in page.text
  assert "{{ 7 * 7 }}" in page.text
  for _, name, value in page.attributes:
    assert not name.startswith("on")
    if name in ("src", "href"):
      assert value.startswith("data:image/")
  assert not re.search(r"https?:|url\(|@import", text)
  assert page.tags.count("img") == 20


@pytest.mark.parametrize("n", [1, 2])
def test_small_sets_make_a_page_too(n):
  assert len(articles(predictions.page(result_of(CLASSES, n=n), 0, False))) == n
