import itertools

import numpy as np
import pytest
from known_model import KnownModel, captioned, picture, unit

from clip_jax.data.records import Record
from clip_jax.evaluation import encoding, retrieval

BATCH = 8


def noisy(n, captions=1, distinct=None, seed=0, batch=BATCH):
  """Records whose captions are drawn from `distinct` strings (all different where it is None)."""
  rng = np.random.default_rng(seed)
  texts, own = {}, []
  images_NE = unit(rng.normal(size=(n, 6)))
  for i in range(n):
    mine = []
    for c in range(captions):
      text = f"caption {i}.{c}" if distinct is None else f"caption {rng.integers(distinct)}"
      texts.setdefault(text, unit(images_NE[i] + 1.1 * unit(rng.normal(size=6))))
      mine.append(text)
    own.append(mine)
  return KnownModel(images_NE, texts, batch), captioned(own), own


def brute_force(model, used):
  """Ranks of both directions, by sorting whole rows in plain Python."""
  items = [(i, text) for i, own in enumerate(used) for text in own]
  text_NE = np.array([model.texts[text] for _, text in items])
  cosines = (model.images[: len(used)].astype(np.float64) @ text_NE.T.astype(np.float64)).round(6)

  def rank(scores, correct):
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], correct[j]))
    return 1 + next(place for place, j in enumerate(order) if correct[j])

  to_text = [rank(cosines[i], [t in own for _, t in items]) for i, own in enumerate(used)]
  to_image = [rank(cosines[:, j], [t in own for own in used]) for j, (_, t) in enumerate(items)]
  return np.array(to_text), np.array(to_image)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 100])
@pytest.mark.parametrize(("captions", "distinct"), [(1, None), (5, None), (1, 4), (3, 12)])
def test_recalls_are_those_of_brute_force(n, captions, distinct):
  model, source, own = noisy(n, captions, distinct)
  for every in (False, True):
    used = [c if every else c[:1] for c in own]
    result = retrieval.evaluate(model, source, BATCH, all_captions=every)
    assert (result.images, result.texts) == (n, sum(map(len, used)))
    for found, ranks in zip(
      (result.image_to_text, result.text_to_image), brute_force(model, used), strict=True
    ):
      assert found.n == len(ranks)
      assert found.median_rank == np.median(ranks)
      for k in retrieval.KS:
        assert found.recall[k] == pytest.approx(np.mean(ranks <= k))


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_the_batch_size_changes_nothing(batch):
  wanted = retrieval.evaluate(*noisy(30, 2, 9)[:2], BATCH, all_captions=True)
  got = retrieval.evaluate(*noisy(30, 2, 9, batch=batch)[:2], batch, all_captions=True)
  assert got.metrics() == wanted.metrics()


def test_a_perfect_model_finds_everything():
  texts = {f"t{i}": row for i, row in enumerate(np.eye(20))}
  model = KnownModel(np.eye(20), texts, BATCH)
  metrics = retrieval.evaluate(model, captioned([[t] for t in texts]), BATCH).metrics()
  assert metrics["image_to_text_R@1"] == metrics["text_to_image_R@1"] == 1.0
  assert metrics["text_to_image_median_rank"] == 1.0


def test_a_collapsed_model_finds_nothing():
  same = unit(np.arange(1.0, 8.0))
  model = KnownModel([same] * 20, {f"t{i}": same for i in range(20)}, BATCH)
  result = retrieval.evaluate(model, captioned([[f"t{i}"] for i in range(20)]), BATCH)
  assert result.text_to_image.recall == dict.fromkeys(retrieval.KS, 0.0)
  assert result.image_to_text.median_rank == 20


def test_identical_captions_are_correct_for_each_other():
  texts = {"same": [1, 0, 0], "other": [0, 1, 0]}
  images = [[0, 0, 1.0], [1, 0, 0], [0, 1, 0]]  # the first is far from its own caption
  source = captioned([["same"], ["same"], ["other"]])
  result = retrieval.evaluate(KnownModel(images, texts, 2), source, 2)
  assert result.text_to_image.recall[1] == 1.0  # both "same" find record 1, which is as right
  assert result.image_to_text.recall[1] == pytest.approx(2 / 3)
  assert result.texts == 3
  almost = captioned([["same"], ["same "], ["other"]])
  texts["same "] = texts["same"]
  result = retrieval.evaluate(KnownModel(images, texts, 2), almost, 2)
  assert result.text_to_image.recall[1] == pytest.approx(2 / 3)  # not for "same", whose own is far


def test_each_distinct_caption_is_encoded_once():
  model, source, _ = noisy(20, 1, 3)
  retrieval.evaluate(model, source, BATCH)
  assert len(model.seen_texts) == BATCH


@pytest.mark.parametrize("groups", [[1] * 5, [2, 3], [5], [1, 4]])
def test_chance_is_the_mean_over_all_orders(groups):
  captions = [[f"g{g}"] for g, size in enumerate(groups) for _ in range(size)]
  texts = {f"g{g}": row for g, row in enumerate(np.eye(5)[: len(groups)])}
  model = KnownModel(np.eye(5), texts, 4)
  result = retrieval.evaluate(model, captioned(captions), 4)
  for k in retrieval.KS:
    hits = [
      any(captions[i] == captions[query] for i in order[:k])
      for order in itertools.permutations(range(5))
      for query in range(5)
    ]
    assert result.text_to_image.chance[k] == pytest.approx(np.mean(hits))
    assert result.image_to_text.chance[k] == pytest.approx(np.mean(hits))


def test_examples_show_the_nearest_images_in_order():
  model, source, own = noisy(30, 1, 6)
  result = retrieval.evaluate(model, source, BATCH, examples=4, seed=1)
  assert len(result.examples) == 4
  for example in result.examples:
    cosines = model.images @ model.texts[example.text]
    order = np.argsort(-cosines)[:5]
    assert [hit.key for hit in example.hits] == [f"key{i}" for i in order]
    assert [hit.correct for hit in example.hits] == [own[i] == [example.text] for i in order]
    np.testing.assert_allclose([hit.cosine for hit in example.hits], cosines[order], rtol=1e-5)
    np.testing.assert_array_equal(example.hits[0].image, picture(order[0]))
    hits = [place for place, hit in enumerate(example.hits, start=1) if hit.correct]
    assert example.rank == hits[0] if hits else example.rank > 5
  again = retrieval.evaluate(model, source, BATCH, examples=4, seed=1)
  assert [e.text for e in again.examples] == [e.text for e in result.examples]


def test_metrics_are_flat_numbers():
  metrics = retrieval.evaluate(*noisy(9)[:2], BATCH).metrics()
  assert all(isinstance(value, float) for value in metrics.values())
  assert {"images", "texts", "image_to_text_R@1", "text_to_image_chance_R@10"} <= set(metrics)


def test_limit_takes_the_first_records():
  model, source, own = noisy(30)
  result = retrieval.evaluate(model, source, BATCH, limit=11)
  to_text, _ = brute_force(model, own[:11])
  assert (result.images, result.texts) == (11, 11)
  assert result.image_to_text.recall[1] == pytest.approx(np.mean(to_text <= 1))


def test_a_record_without_a_caption_is_named():
  model, source, _ = noisy(12)
  source.records[9] = Record("key9", picture(9), ())
  with pytest.raises(encoding.EvaluationError, match="shard-7, record 9: has no caption"):
    retrieval.evaluate(model, source, BATCH)


def test_a_bad_image_is_named():
  model, source, _ = noisy(12)
  source.records[10] = Record("key10", b"", ("caption 10.0",))
  with pytest.raises(encoding.EvaluationError, match="shard-7, record 10: image cannot be decoded"):
    retrieval.evaluate(model, source, BATCH)


def test_embeddings_that_are_not_finite_are_named():
  model, source, _ = noisy(12)
  model.texts["caption 5.0"] = np.full(6, np.nan)
  with pytest.raises(encoding.EvaluationError, match=r"text 'caption 5.0'"):
    retrieval.evaluate(model, source, BATCH)
  model.images[8] = np.nan
  with pytest.raises(encoding.EvaluationError, match="record 8: its embedding has norm nan"):
    retrieval.evaluate(model, source, BATCH)


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize("items", [1, 5, 50, 1000])
@pytest.mark.parametrize("same", [False, True])
def test_blocks_of_any_size_give_the_same_ranks(block, items, same):
  rng = np.random.default_rng(3)
  query_QE, item_NE = unit(rng.normal(size=(50, 6))), unit(rng.normal(size=(173, 6)))
  item_NE[100:] = item_NE[rng.integers(0, 100, 73)]  # equal ones tie across blocks
  if same:
    query_QE, item_NE = np.repeat(query_QE[:1], 50, 0), np.repeat(item_NE[:1], 173, 0)
  correct = [np.sort(rng.permutation(173)[: rng.integers(1, 9)]) for _ in range(50)]
  cosines = (query_QE.astype(np.float64) @ item_NE.T.astype(np.float64)).round(6)
  wanted = []
  for row, own in zip(cosines, correct, strict=True):
    wrong = np.setdiff1d(np.arange(173), own)
    wanted.append(1 + sum(row[wrong] >= row[own].max()))
  got = retrieval._ranks(query_QE, item_NE, correct, block, items)
  np.testing.assert_array_equal(got, wanted)


def test_a_prefix_is_read_and_not_part_of_what_makes_captions_equal():
  texts = {"a photo of one": [1, 0], "a photo of two": [0, 1]}
  model = KnownModel([[1.0, 0], [0, 1], [1, 0]], texts, 2)
  image_NE = unit([[1.0, 0], [0, 1], [1, 0]])
  found = retrieval.rank(model, image_NE, [["one"], ["two"], ["one"]], 2, "a photo of ")
  assert found.texts == ("one", "two", "one")
  assert found.text_to_image.recall[1] == found.image_to_text.recall[1] == 1
  assert set(model.seen_texts) == set(texts)
