"""What lies at a path and which prompts belong to it; what does not do is told in one line."""

import dataclasses
import json

import dataset_trees
import numpy as np
import pytest
import trees
from known_model import KnownModel, labelled
from test_inference import workdir  # noqa: F401, a fixture

import clip_jax
from clip_jax import inference, sharding
from clip_jax.data import labels, records
from clip_jax.evaluation import chosen, datasets, encoding, prompts
from clip_jax.evaluation.chosen import Asked, ChoiceError


def choose(**asked):
  return chosen.choose(Asked(**{k: str(v) if k == "data" else v for k, v in asked.items()}), 16)


def pets(root, split=""):
  for i, name in enumerate(("tabby_cat/0.png", "dog/1.png", "dog/2.png")):
    trees.write(root / split / name, trees.png(i))
  return root


def found(what):
  return [what.source[i].label for i in range(len(what.source))]


def test_a_folder_of_images_names_its_classes(tmp_path):
  what = choose(data=pets(tmp_path / "pets"))
  assert what.prompt_set == prompts.PromptSet(("dog", "tabby cat"), ("a photo of a {}.",))
  assert found(what) == ["dog", "dog", "tabby cat"]
  assert what.name == "pets test"
  assert what.shown == {"dog": "dog", "tabby cat": "tabby cat"}


def test_a_split_is_a_folder_where_there_is_one(tmp_path):
  pets(tmp_path, "train")
  assert found(choose(data=tmp_path, split="train")) == ["dog", "dog", "tabby cat"]
  with pytest.raises(ChoiceError, match="no split 'test'; it has train"):
    choose(data=tmp_path)


def test_a_class_that_is_called_train_is_no_split(tmp_path):
  for name in ("train", "bus"):
    trees.write(tmp_path / name / "0.png", trees.png(0))
  assert found(choose(data=tmp_path)) == ["bus", "train"]


def test_ones_own_classes_and_templates(tmp_path):
  pets(tmp_path / "pets")
  trees.write(tmp_path / "classes.txt", "cow\nTabby Cat\ndog\n")
  classes = str(tmp_path / "classes.txt")
  what = choose(data=tmp_path / "pets", classes=classes, templates=("a {}", "the {}"))
  assert what.prompt_set == prompts.PromptSet(
    ("cow", "Tabby Cat", "dog"), ("a {}", "the {}"), synonyms=(("cow",), ("Tabby Cat",), ("dog",))
  )
  assert found(what) == ["dog", "dog", "Tabby Cat"]
  assert choose(data=tmp_path / "pets", classes=classes).prompt_set.templates == chosen.TEMPLATES


def test_folders_may_have_any_name_of_a_class_or_its_number(tmp_path):
  pets(tmp_path / "pets")
  page = {"classes": [["hound", "dog"], ["cat", "tabby cat"]], "templates": ["{}!"]}
  trees.write(tmp_path / "p.json", json.dumps(page))
  what = choose(data=tmp_path / "pets", classes=str(tmp_path / "p.json"))
  assert found(what) == ["hound", "hound", "cat"]
  assert what.prompt_set.templates == ("{}!",)
  for i in range(2):
    trees.write(tmp_path / "numbers" / str(i) / "0.png", trees.png(i))
  assert found(choose(data=tmp_path / "numbers", classes=str(tmp_path / "p.json"))) == [
    "hound",
    "cat",
  ]


def test_prepared_folders(tmp_path):
  made = [records.Record(f"k{i}", trees.png(i), (), name) for i, name in enumerate("ba")]
  trees.array_record(tmp_path / "own", made, ("a", "b", "c"))
  what = choose(data=tmp_path / "own", templates=("the letter {}",))
  assert what.prompt_set == prompts.PromptSet(("a", "b", "c"), ("the letter {}",))
  assert sorted(found(what)) == ["a", "b"]
  trees.write(tmp_path / "ab.txt", "a\nb\n")
  with pytest.raises(ChoiceError, match=r"class 'c' has no prompts, as 1 of 3: .*ab\.txt"):
    choose(data=tmp_path / "own", classes=str(tmp_path / "ab.txt"))
  trees.array_record(tmp_path / "bare", made)
  with pytest.raises(ChoiceError, match="it names no classes; give --classes FILE"):
    choose(data=tmp_path / "bare")
  assert choose(data=tmp_path / "bare", classes=str(tmp_path / "ab.txt")).prompt_set.classes == (
    "a",
    "b",
  )


@pytest.mark.parametrize(("word", "classes", "n"), [("digits", 10, 355), ("scenes", 64, 1000)])
def test_embedded_data_have_their_own_prompts(word, classes, n, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  what = choose(data=word)
  assert (len(what.prompt_set.classes), len(what.source)) == (classes, n)
  assert what.prompt_set == prompts.named(word)
  assert choose(data=word, templates=("{}",)).prompt_set.templates == ("{}",)
  pets(tmp_path / word)  # a folder of that name is what is meant
  assert choose(data=word).prompt_set.classes == ("dog", "tabby cat")


def test_a_dataset_of_the_paper_by_its_key(tmp_path):
  dataset = datasets.named("FER2013")
  own = prompts.named("fer2013")
  for k, names in enumerate(own.names):
    trees.write(tmp_path / "fer2013" / "test" / names[0] / "0.png", trees.png(k))
  what = choose(data=tmp_path, dataset="fer2013")
  assert what.prompt_set.names == own.names
  assert what.prompt_set.templates == own.templates
  assert set(found(what)) == {names[0] for names in own.names}
  assert what.name == "FER2013 test"
  assert any(dataset.note[1:20] in note for note in what.notes)
  assert choose(data=tmp_path, dataset="FER2013", templates=("{}",)).prompt_set.templates == ("{}",)


def test_a_shift_has_the_names_of_its_200_classes(tmp_path):
  dataset, own = datasets.named("ImageNet-R"), prompts.named("imagenet")
  dataset_trees.folder(tmp_path, dataset, "test")
  what = choose(data=tmp_path, dataset="ImageNet-R")
  wanted = [own.names[k] for k in dataset.imagenet_indices]
  assert list(what.prompt_set.names) == wanted
  assert len(what.prompt_set.classes) == 200
  first = [names[0] for names in wanted]
  assert sorted(found(what)) == sorted(first[k] for k in dataset_trees.images(dataset))


def test_another_metric_is_said(tmp_path):
  dataset = datasets.named("Oxford Pets")
  for k, name in enumerate(prompts.named("oxford_pets").classes):
    trees.write(tmp_path / dataset.folder / "test" / name / "0.png", trees.png(k))
  what = choose(data=tmp_path, dataset="oxford pets")
  assert what.metric == "mean per class"
  (note,) = set(what.by_top1().notes) - set(what.notes)
  assert note == "The paper's metric here is mean per class; this is top-1 accuracy."


def test_images_of_several_classes_have_no_top1(tmp_path):
  dataset_trees.wds(tmp_path, datasets.named("VOC2007"), "test")
  what = choose(data=tmp_path, dataset="VOC2007")
  assert (what.metric, what.several) == ("11-point mAP", True)
  with pytest.raises(ChoiceError, match=r"VOC2007 test: its images show several .* 11-point mAP"):
    what.by_top1()


@pytest.mark.parametrize(
  ("asked", "words"),
  [
    ({"data": "none"}, "no such folder; give one, or the word for digits, scenes"),
    ({"data": "."}, "has no folders of classes"),
    ({"data": "digits", "prompts": "x", "classes": "y"}, "give one of them"),
    ({"data": "digits", "prompts": "x"}, "no such set"),
    ({"data": "digits", "templates": ("a digit",)}, "template 'a digit': wants {} once"),
    ({"data": "digits", "split": "val"}, "no split 'val'"),
    ({"data": ".", "dataset": "CIFAR1"}, "no such dataset"),
    ({"data": ".", "dataset": "MNIST"}, "not available in"),
    ({"data": ".", "dataset": "Flickr30k"}, "it has captions and no classes"),
    ({"data": ".", "dataset": "ObjectNet"}, "no prompts are published for it; give --classes"),
  ],
)
def test_what_does_not_do_is_told(asked, words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=words.replace("{", r"\{").replace("}", r"\}")):
    choose(**asked)


def test_an_empty_split_and_strange_folders_are_told(tmp_path):
  (tmp_path / "pets" / "dog").mkdir(parents=True)
  with pytest.raises(ChoiceError, match="split 'test' has no images"):
    choose(data=tmp_path / "pets")
  trees.write(tmp_path / "c.txt", "cat\ncow\n")
  with pytest.raises(labels.LabelError, match="class 'dog' is none of the 2"):
    choose(data=tmp_path / "pets", classes=str(tmp_path / "c.txt"))


def test_a_corrupt_image_is_named(tmp_path):
  pets(tmp_path)
  trees.write(tmp_path / "dog" / "1.png", b"no image")
  what = choose(data=tmp_path)
  texts = {"a photo of a dog.": [1, 0], "a photo of a tabby cat.": [0, 1]}
  model = KnownModel([[1, 0]], texts, 2)
  with pytest.raises(encoding.EvaluationError, match=r"dog/1\.png: image cannot be decoded"):
    chosen.evaluator(model, what, 2)(what.source)


def test_bad_images_are_left_out_where_that_was_asked():
  what = chosen.Chosen("x", labelled("abcdefgh"), prompts.PromptSet(tuple("abcdefgh"), ("{}",)))
  model = KnownModel([], {}, 2)
  assert what.readable(model) == what
  for i in (0, 2, 3, 4, 5, 7):
    what.source.records[i] = records.Record(f"key{i}", b"no image", (), "a")
  some = what.readable(model)
  assert [some.source[i].key for i in range(len(some.source))] == ["key1", "key6"]
  (note,) = some.notes
  assert note.startswith("6 of 8 images of x cannot be decoded and were left out")
  assert note.endswith(
    "shard-7, record 0, shard-7, record 2, shard-7, record 3, "
    "shard-7, record 4, shard-7, record 5 and 1 more."
  )
  what.source.records[1] = what.source.records[6] = OSError("gone")
  with pytest.raises(ChoiceError, match="none of 8 images can be decoded, as shard-7, record 0"):
    what.readable(model)


def test_a_sample_is_drawn_with_the_seed():
  what = chosen.Chosen("x", labelled("abcdefgh"), prompts.PromptSet(tuple("abcdefgh"), ("{}",)))
  some = what.sample(3, 7)
  drawn = sorted(np.random.default_rng(7).permutation(8)[:3])
  assert found(some) == ["abcdefgh"[i] for i in drawn]
  assert some.notes == ("3 of the 8 images of x were taken, drawn with seed 7.",)
  assert some.source.fingerprint != what.sample(3, 8).source.fingerprint
  assert what.sample(0, 7) == what.sample(8, 7) == what.sample(9, 7) == what
  with pytest.raises(ChoiceError, match="--limit -1"):
    what.sample(-1, 0)


def test_the_evaluator_uses_all_names_of_a_class():
  texts = {"a": [1, 0], "b": [0, 1], "c": [1, 0]}
  prompt_set = prompts.PromptSet(("a", "b"), ("{}",), synonyms=(("a",), ("b", "c")))
  what = chosen.Chosen("x", labelled(["b"]), prompt_set)
  assert what.shown == {"a": "a", "b": "b"}
  model = KnownModel([[0.6, 0.8]], texts, 3)
  evaluate = chosen.evaluator(model, what, 3)
  # b lies at 45 degrees: its cosine is 1.4 / sqrt 2 = 0.99, that of a is 0.6
  assert evaluate(what.source).top1 == 1.0
  np.testing.assert_allclose(evaluate(what.source).class_CE[1], [0.5**0.5] * 2, rtol=1e-6)


def test_training_images_need_no_labels(tmp_path):
  made = [records.Record(f"k{i}", trees.png(i), ("c",)) for i in range(2)]
  trees.array_record(tmp_path / "own", made)
  assert len(chosen.images_at(str(tmp_path / "own"), "test", 16)) == 2
  trees.write(tmp_path / "flat" / "a" / "deep" / "1.png", trees.png(1))
  trees.write(tmp_path / "flat" / "0.JPG", trees.png(0, kind="JPEG"))
  trees.write(tmp_path / "flat" / "notes.txt", "beside")
  flat = chosen.images_at(str(tmp_path / "flat"), "train", 16)
  assert [flat[i].key for i in range(len(flat))] == ["0.JPG", "a/deep/1.png"]
  trees.write(tmp_path / "flat" / "train" / "2.png", trees.png(2))
  assert [e.key for e in chosen.images_at(str(tmp_path / "flat"), "train", 16).entries] == [
    "train/2.png"
  ]
  mnist = datasets.named("MNIST")
  place = dataset_trees.wds(tmp_path, mnist, "train")
  assert len(chosen.images_at(str(place), "train", 16)) == 4
  assert len(chosen.images_at("digits", "train", 16)) == 1442
  for path, words in ((tmp_path / "no", "no such folder"), (tmp_path / "own2", "no images below")):
    (tmp_path / "own2").mkdir(exist_ok=True)
    with pytest.raises(ChoiceError, match=words):
      chosen.images_at(str(path), "train", 16)


def test_the_hash_tells_weights_architecture_and_vocabulary(workdir):  # noqa: F811
  model = clip_jax.load(workdir)
  digest = chosen.weights_hash(model)
  assert len(digest) == 64
  assert chosen.weights_hash(inference.spread(model, sharding.make_mesh())) == digest
  params = {**model.params, "log_scale": model.params["log_scale"] + 1e-6}
  squash = dataclasses.replace(model.config.preprocess, resize="squash")
  config = dataclasses.replace(model.config, preprocess=squash)
  for other in (
    inference.Clip(model.config, params, model.tokenizer),
    inference.Clip(model.config, model.params, None),
    inference.Clip(config, model.params, model.tokenizer),
  ):
    assert chosen.weights_hash(other) != digest


def test_facts_say_how_many_prompts():
  prompt_set = prompts.PromptSet(("a", "b"), ("{}", "a {}"), synonyms=(("a",), ("b", "c", "d")))
  facts = chosen.facts(chosen.Chosen("x", labelled(["a"]), prompt_set), "w", "ff")
  assert facts["weights"] == "w, sha256 ff"
  assert facts["prompts"] == (f"2 classes, 2 or 6 prompts each, sha256 {prompt_set.fingerprint}")
