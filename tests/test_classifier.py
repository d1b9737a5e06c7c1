import pathlib

import numpy as np
import pytest
import two_processes
from known_model import KnownModel, unit

from clip_jax.evaluation import classifier, encoding, prompts

PETS = prompts.PromptSet(
  ("cat", "dog", "cow"), ("{}", "a {}"), synonyms=(("cat",), ("dog", "hound"), ("cow",))
)
TEXTS = {
  "cat": [1, 0, 0], "a cat": [1, 0, 0],
  "dog": [0, 1, 0], "a dog": [0, 1, 0], "hound": [0, 0, 1], "a hound": [0, 1, 0],
  "cow": [0, 0, 1], "a cow": [0.6, 0, 0.8],
}  # fmt: skip
# By hand: the mean of each class's unit rows, of unit norm.
EXPECTED = unit([[1, 0, 0], [0, 3, 1], [0.3, 0, 0.9]])


def known(batch=3, texts=TEXTS):
  return KnownModel([], texts, batch)


@pytest.mark.parametrize("batch", [1, 3, 8, 100])
def test_planted_embeddings_give_the_classifier_by_hand(batch):
  got = classifier.classifier(known(batch), PETS, None, "", batch)
  np.testing.assert_allclose(got, EXPECTED, rtol=1e-6, atol=1e-7)
  assert got.dtype == np.float32


@pytest.mark.parametrize("most", [1, 2, 3, 5, 100])
def test_a_class_is_never_cut_and_groups_stay_small(monkeypatch, most):
  """With the groups of a large set, down to groups smaller than a class."""
  groups = list(classifier._groups(PETS.names, len(PETS.templates), most))
  assert [own for group in groups for own in group] == list(PETS.names)
  sizes = [sum(map(len, group)) * 2 for group in groups]
  assert all(size <= most or len(g) == 1 for size, g in zip(sizes, groups, strict=True))
  monkeypatch.setattr(classifier, "_BATCHES", most)
  got = classifier.classifier(known(1), PETS, None, "", 1)
  np.testing.assert_allclose(got, EXPECTED, rtol=1e-6, atol=1e-7)


def test_progress_is_told_up_to_the_end(monkeypatch):
  monkeypatch.setattr(classifier, "_BATCHES", 1)
  told = []
  classifier.classifier(known(), PETS, None, "", 3, lambda *counts: told.append(counts))
  assert told == [(2, 8), (6, 8), (8, 8)]


def test_classes_of_the_same_names_are_encoded_once_and_equal():
  twice = prompts.PromptSet(
    ("cat (0)", "dog", "cat (2)"), ("a {}",), synonyms=(("cat",), ("dog",), ("cat",))
  )
  model = known(2)
  got = classifier.classifier(model, twice, None, "", 2)
  assert model.seen_texts == ["a cat", "a dog"]
  np.testing.assert_array_equal(got, unit([[1, 0, 0], [0, 1, 0], [1, 0, 0]]))


def test_a_hit_asks_the_encoder_nothing(tmp_path):
  first = classifier.classifier(known(), PETS, tmp_path / "cache", "w1", 3)
  model = known()
  again = classifier.classifier(model, PETS, tmp_path / "cache", "w1", 3)
  assert model.seen_texts == []
  np.testing.assert_array_equal(again, first)
  assert len(list((tmp_path / "cache").iterdir())) == 1


def test_other_weights_prompts_and_tokenizers_miss(tmp_path):
  classifier.classifier(known(), PETS, tmp_path, "w1", 3)

  class Tokenizer:
    fingerprint = "another"

  cases = [
    (known(), PETS, "w2"),
    (known(), prompts.PromptSet(PETS.classes, PETS.templates), "w1"),
    (known(), PETS, "w1"),
  ]
  cases[2][0].tokenizer = Tokenizer
  for model, prompt_set, weights in cases:
    classifier.classifier(model, prompt_set, tmp_path, weights, 3)
    assert model.seen_texts
  assert len(list(tmp_path.iterdir())) == 4


def damage_bit(content):
  return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
  "damage", [damage_bit, lambda c: c[:-4], lambda c: b"", lambda c: c + b"\0", lambda c: b"x" * 99]
)
def test_a_damaged_file_is_made_again(tmp_path, damage):
  first = classifier.classifier(known(), PETS, tmp_path, "w1", 3)
  (path,) = tmp_path.iterdir()
  whole = path.read_bytes()
  path.write_bytes(damage(whole))
  model = known()
  np.testing.assert_array_equal(classifier.classifier(model, PETS, tmp_path, "w1", 3), first)
  assert model.seen_texts
  assert [p.read_bytes() for p in tmp_path.iterdir()] == [whole]


def test_a_whole_file_with_other_content_is_not_taken(tmp_path):
  """As of a program that stored the same key in another shape."""
  key = classifier.cache_key(known(), PETS, "w1")
  classifier._save(tmp_path, key, EXPECTED[:2])
  classifier._save(tmp_path, key, EXPECTED.astype(np.float64))
  got = classifier.classifier(known(), PETS, tmp_path, "w1", 3)
  np.testing.assert_allclose(got, EXPECTED, rtol=1e-6, atol=1e-7)
  assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_cannot_be_written_loses_no_result(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.warns(RuntimeWarning, match="file: classifier weights not kept"):
    got = classifier.classifier(known(), PETS, tmp_path / "file", "w1", 3)
  np.testing.assert_allclose(got, EXPECTED, rtol=1e-6, atol=1e-7)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
  def full(path, content):
    with path.open("wb") as file:
      file.write(content[:10])
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(pathlib.Path, "write_bytes", full)
  with pytest.warns(RuntimeWarning, match="not kept .No space left"):
    classifier.classifier(known(), PETS, tmp_path, "w1", 3)
  assert list(tmp_path.iterdir()) == []


def test_bad_calls_are_refused(tmp_path):
  with pytest.raises(prompts.PromptError, match="weights_hash is empty"):
    classifier.classifier(known(), PETS, tmp_path, "", 3)
  with pytest.raises(prompts.PromptError, match="no classes"):
    classifier.classifier(known(), prompts.named("stamps"), None, "", 3)
  opposite = {**TEXTS, "hound": [0, -1, 0], "a hound": [0, -1, 0]}
  with pytest.raises(prompts.PromptError, match="class 'dog'"):
    classifier.classifier(known(3, opposite), PETS, None, "", 3)
  with pytest.raises(encoding.EvaluationError, match="text 'a cow'"):
    classifier.classifier(known(3, {**TEXTS, "a cow": [np.nan, 0, 0]}), PETS, None, "", 3)
  assert list(tmp_path.iterdir()) == []


TWO = """
  import pathlib, sys
  import numpy as np
  from clip_jax import hosts
  host, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
  hosts.start(f"127.0.0.1:{port}", 2, host, timeout_seconds=60)
  with hosts.watched(20):
    import jax
    from test_classifier import EXPECTED, PETS, known
    from clip_jax.evaluation import classifier, encoding
    assert jax.process_count() == 2
    own = folder / str(host)  # each has a folder of its own: only the first one's is ever filled
    for batch in (1, 3, 5):
      for round in range(2):
        model = known(encoding.share(batch))
        got = classifier.classifier(model, PETS, own, f"weights {batch}", batch)
        np.testing.assert_allclose(got, EXPECTED, rtol=1e-6, atol=1e-7)
        assert bool(model.seen_texts) == (round == 0), (batch, round)
    if host == 0:
      for path in own.iterdir():
        path.write_bytes(b"damaged")
    model = known(encoding.share(3))
    got = classifier.classifier(model, PETS, own, "weights 3", 3)
    np.testing.assert_allclose(got, EXPECTED, rtol=1e-6, atol=1e-7)
    assert model.seen_texts
  print("done", own.exists())
"""


def test_two_processes_decide_alike(tmp_path):
  """The second process has no cache: it gets what the first has, and nobody waits for ever."""
  ends = two_processes.run(TWO, tmp_path)
  assert [code for code, _ in ends] == [0, 0], ends
  assert [said.splitlines()[-1] for _, said in ends] == ["done True", "done False"]
