import csv
import json
import pathlib

import numpy as np
import open_clip_alone
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
    prompts.PromptError,
    match=r"'imagenot'.*digits, fashion_mnist, .*scenes, stamps,.* imagenet",
  ):
    prompts.named("imagenot")


COUNTS = pathlib.Path(prompts.__file__).parents[1] / "assets" / "paper" / "prompts.csv"


def page_of(name):
  file = COUNTS.parents[1] / "prompts" / f"{name}.json"
  return json.loads(file.read_text(encoding="utf-8"))


def test_every_dataset_of_the_paper_has_its_published_counts():
  with COUNTS.open(encoding="utf-8", newline="") as file:
    rows = {row["dataset"]: row for row in csv.DictReader(file)}
  assert len(rows) == len(prompts.published()) == 27
  for name in prompts.published():
    row, found = rows.pop(page_of(name)["name"]), prompts.named(name)
    strings = [text for own in found.names for text in own]
    assert {
      "classes": len(found.classes),
      "templates": len(found.templates),
      "class_strings": len(strings),
      "prompts": len(strings) * len(found.templates),
    } == {
      key: int(row[f"openai_{key}"]) for key in ("classes", "templates", "class_strings", "prompts")
    }, name
    assert len(strings) - len(set(strings)) == int(row["duplicate_class_names"]), name
    odd = [text for text in strings if "  " in text or not text.isascii()]
    assert len(odd) == int(row["whitespace_or_nonascii"]), name
  assert not rows


def test_every_published_set_says_where_it_is_from():
  for name in prompts.published():
    page = page_of(name)
    assert all(page["source"][key] for key in ("project", "version", "file", "licence")), name
    assert page["order"] == "as published" or "match the labels of a copy by name" in page["order"]


def test_imagenet_is_what_open_clip_has():
  theirs = open_clip_alone.module("zero_shot_metadata")
  found = prompts.named("imagenet")
  assert [own for (own,) in found.names] == list(theirs.IMAGENET_CLASSNAMES)
  assert list(found.templates) == [make("{}") for make in theirs.OPENAI_IMAGENET_TEMPLATES]


def test_repeated_published_names_are_told_apart_in_results_alone():
  found = prompts.named("imagenet")
  assert len(set(found.classes)) == 1000
  assert {i: found.classes[i] for i in (657, 744, 836, 837, 0)} == {
    657: "missile (657)",
    744: "missile (744)",
    836: "sunglasses (836)",
    837: "sunglasses (837)",
    0: "tench",
  }
  assert found.names[657] == found.names[744] == ("missile",)


def test_synonyms_count_alike_in_the_mean_of_their_class():
  """By hand: two names of the first class at right angles, one of the second; two templates."""
  rows = {
    "happy face": [1, 0, 0],
    "a happy": [1, 0, 0],
    "smiling face": [0, 3, 0],
    "a smiling": [0, 0, 2],
    "sad face": [0, 0, 1],
    "a sad": [0, 0, 1],
  }
  got = prompts.ensemble(
    lambda texts: [rows[text] for text in texts],
    [("happy", "smiling"), ("sad",)],
    ("{} face", "a {}"),
  )
  np.testing.assert_allclose(got, [np.array([2, 1, 1]) / 6**0.5, [0, 0, 1]], rtol=1e-6)


def test_fer2013_has_the_synonyms():
  found = prompts.named("fer2013")
  assert found.classes[5] == "surprised"
  assert found.names[5] == ("surprised", "shocked", "spooked")
  assert sum(map(len, found.names)) == 12


def test_the_fingerprint_is_of_the_prompts():
  one = prompts.PromptSet(("cat", "dog"), ("a {}",))
  assert one.fingerprint == prompts.PromptSet(("cat", "dog"), ("a {}",), ("dog",)).fingerprint
  others = [
    prompts.PromptSet(("dog", "cat"), ("a {}",)),
    prompts.PromptSet(("cat", "dog"), ("the {}",)),
    prompts.PromptSet(("cat", "dog"), ("a {}",), (), (("cat", "tom"), ("dog",))),
    prompts.PromptSet(("catdog",), ("a {}",)),
  ]
  assert len({p.fingerprint for p in (one, *others)}) == 5
  assert len({prompts.named(name).fingerprint for name in prompts.published()}) == 27


def test_ones_own_classes_from_json_and_from_lines(tmp_path):
  page = {"classes": ["cat", ["dog", "hound"]], "templates": ["a {}", "the {}."]}
  (tmp_path / "pets.json").write_text(json.dumps(page))
  found = prompts.read(tmp_path / "pets.json")
  assert found == prompts.PromptSet(
    ("cat", "dog"), ("a {}", "the {}."), synonyms=(("cat",), ("dog", "hound"))
  )
  (tmp_path / "pets.txt").write_bytes("\ufeffcat\r\nPudel mit Hütchen\r\n".encode())
  found = prompts.read(tmp_path / "pets.txt", ["a {}"])
  assert (found.classes, found.templates) == (("cat", "Pudel mit Hütchen"), ("a {}",))


@pytest.mark.parametrize(
  ("page", "message"),
  [
    ({"classes": [], "templates": ["{}"]}, "no classes"),
    ({"classes": ["a"]}, "no templates"),
    ({"classes": ["a"], "templates": "a {}"}, "no templates: want one or more, as a list"),
    ({"classes": ["a", []], "templates": ["{}"]}, "class 2 is an empty list"),
    ({"classes": ["a", ""], "templates": ["{}"]}, "class 2 is empty"),
    ({"classes": ["a", ["b", " "]], "templates": ["{}"]}, "class 2 is empty"),
    ({"classes": ["a", 7], "templates": ["{}"]}, "class 2 is 7, not text"),
    ({"classes": ["a", None], "templates": ["{}"]}, "class 2 is None, not text"),
    ({"classes": [" a"], "templates": ["{}"]}, "class 1 is ' a': remove the spaces"),
    ({"classes": ["a\tb"], "templates": ["{}"]}, "tabs and breaks"),
    ({"classes": ["a", "a"], "templates": ["{}"]}, "class names that stand more than once: 'a'"),
    ({"classes": ["Big cat", "big  cat"], "templates": ["{}"]}, "more than once: 'big cat'"),
    ({"classes": ["a", ["b", "a"]], "templates": ["{}"]}, "more than once: 'a'"),
    ({"classes": ["a"], "templates": ["{}", 3]}, "template 2 is 3, not text"),
    ({"classes": ["a"], "templates": ["a photo"]}, "'a photo': wants {} once"),
    ({"classes": ["a"], "templates": ["{} and {}"]}, "'{} and {}': wants {} once"),
    ({"classes": ["a"], "templates": ["{}", "{}"]}, "templates that stand more than once: '{}'"),
    ({"classes": ["a"], "template": ["{}"]}, "'template' is none of classes, templates"),
    (["a", "b"], 'want {"classes"'),
  ],
)
def test_bad_files_are_named_with_what_is_wrong(tmp_path, page, message):
  path = tmp_path / "mine.json"
  path.write_text(json.dumps(page))
  with pytest.raises(prompts.PromptError) as error:
    prompts.read(path)
  assert str(error.value).startswith(f"{path}: ")
  assert message in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("name", "content", "templates", "message"),
  [
    ("mine.txt", b"cat\n\ndog\n", ["{}"], "class 2 is empty; remove it (an empty line?)"),
    ("mine.txt", b"cat\ncat\n", ["{}"], "more than once: 'cat'"),
    ("mine.txt", b"", ["{}"], "no classes"),
    ("mine.txt", b"cat\n", [], "no templates"),
    ("mine.txt", b"caf\xe9\n", ["{}"], "no text in UTF-8 (byte 3)"),
    ("mine.json", b'{"classes": [', ["{}"], "line 1 is no JSON"),
    ("mine.json", b'{"classes": ["a"], "templates": ["{}"]}', ["a {}"], "templates of its own"),
  ],
)
def test_bad_content_is_named(tmp_path, name, content, templates, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(prompts.PromptError) as error:
    prompts.read(tmp_path / name, templates)
  assert message in str(error.value)
  assert name in str(error.value)


def test_one_string_is_no_list_of_templates(tmp_path):
  with pytest.raises(prompts.PromptError, match="not one string"):
    prompts.read(tmp_path / "mine.txt", "a {}")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((("a", "a"), ("{}",)), "classes that stand more than once: 'a'"),
    ((("a",), ()), "no templates"),
    ((("a",), ("photo",)), "'photo': wants"),
    ((("a", "b"), ("{}",), (), (("a",),)), "1 lists of names for 2 classes"),
    ((("a", "b"), ("{}",), (), (("a",), ())), "class 'b' has no names"),
  ],
)
def test_a_set_that_makes_no_prompts_cannot_be_made(arguments, message):
  with pytest.raises(prompts.PromptError, match=message):
    prompts.PromptSet(*arguments)
