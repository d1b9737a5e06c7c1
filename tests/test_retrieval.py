import itertools

import numpy as np
import pytest
import two_processes
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
  """Ranks of both directions, by a stable sort of whole rows in float64."""
  items = [(i, text) for i, own in enumerate(used) for text in own]
  owner = np.array([i for i, _ in items])
  text_NE = np.array([model.texts[text] for _, text in items])
  cosines = (model.images[: len(used)].astype(np.float64) @ text_NE.T.astype(np.float64)).round(9)

  def rank(scores, correct):
    return 1 + int(np.argmax(correct[np.argsort(-scores, kind="stable")]))

  to_text = [rank(cosines[i], owner == i) for i in range(len(used))]
  to_image = [rank(cosines[:, j], np.arange(len(used)) == i) for j, i in enumerate(owner)]
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


def test_a_collapsed_model_finds_what_chance_does():
  same = unit(np.arange(1.0, 8.0))
  model = KnownModel([same] * 20, {f"t{i}": same for i in range(20)}, BATCH)
  result = retrieval.evaluate(model, captioned([[f"t{i}"] for i in range(20)]), BATCH)
  for found in (result.text_to_image, result.image_to_text):
    assert found.recall == {1: 1 / 20, 5: 5 / 20, 10: 10 / 20}
    assert found.chance == pytest.approx(found.recall)
    assert found.median_rank == 10.5


def test_an_identical_caption_of_another_image_is_wrong():
  """By hand. The first image is far from its own caption, which the second has too."""
  texts = {"same": [1, 0, 0], "other": [0, 1, 0]}
  images = [[0, 0, 1.0], [1, 0, 0], [0, 1, 0]]
  source = captioned([["same"], ["same"], ["other"]])
  result = retrieval.evaluate(KnownModel(images, texts, 2), source, 2)
  # The first "same" finds image 1, then at 0 image 0 (its own) and image 2; the others their own.
  assert result.text_to_image.recall[1] == pytest.approx(2 / 3)
  # Image 0 has all texts at 0, its own in front; image 1 both "same" at 1, its own second.
  assert result.image_to_text.recall[1] == pytest.approx(2 / 3)
  ranked = retrieval.rank(
    KnownModel(images, texts, 2), unit(images), [["same"]] * 2 + [["other"]], 2
  )
  assert (list(ranked.text_ranks), list(ranked.image_ranks)) == ([2, 1, 1], [1, 2, 1])


def test_the_best_of_an_images_own_captions_counts():
  texts = {"far": [0, 1.0], "near": [1, 0], "next": [0.8, 0.6]}
  model = KnownModel([[1.0, 0], [0.6, 0.8]], texts, 1)
  found = retrieval.rank(model, unit([[1.0, 0], [0.6, 0.8]]), [["far", "near"], ["next"]], 1)
  assert list(found.image_ranks) == [1, 1]
  assert list(found.text_ranks) == [2, 1, 1]  # "far" is at 0 and 0.8, "next" at 0.8 and 0.96


def test_each_distinct_caption_is_encoded_once():
  model, source, _ = noisy(20, 1, 3)
  retrieval.evaluate(model, source, BATCH)
  assert len(model.seen_texts) == BATCH


@pytest.mark.parametrize("sizes", [[1] * 5, [2, 3], [5], [1, 4]])
def test_chance_is_the_mean_over_all_orders(sizes):
  captions = [[f"{i}.{c}" for c in range(size)] for i, size in enumerate(sizes)]
  owner = [i for i, size in enumerate(sizes) for _ in range(size)]
  texts = dict(zip(itertools.chain(*captions), np.eye(5), strict=True))
  model = KnownModel(np.eye(5)[: len(sizes)], texts, 4)
  result = retrieval.evaluate(model, captioned(captions), 4, all_captions=True)
  for k in retrieval.KS:
    hits = [
      query in [owner[t] for t in order[:k]]
      for order in itertools.permutations(range(5))
      for query in range(len(sizes))
    ]
    assert result.image_to_text.chance[k] == pytest.approx(np.mean(hits))
    assert result.text_to_image.chance[k] == pytest.approx(min(1, k / len(sizes)))


def test_examples_show_the_nearest_images_in_order():
  model, source, own = noisy(30)
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


def oracle(query_QE, item_NE, own_Q2):
  """Ranks by a stable sort in float64."""
  cosines = (query_QE.astype(np.float64) @ item_NE.T.astype(np.float64)).round(9)
  order = np.argsort(-cosines, axis=1, kind="stable")
  right = (order >= own_Q2[:, :1]) & (order < own_Q2[:, 1:])
  return 1 + right.argmax(axis=1)


def drawn(queries, n, width, seed=3):
  """Embeddings, a third of the items twice, and each query's own items."""
  rng = np.random.default_rng(seed)
  query_QE, item_NE = (unit(rng.normal(size=(rows, width))) for rows in (queries, n))
  item_NE[2 * n // 3 :] = item_NE[rng.integers(0, 2 * n // 3, n - 2 * n // 3)]
  start = rng.integers(0, n, queries)
  return query_QE, item_NE, np.stack([start, np.minimum(n, start + rng.integers(1, 9))], axis=1)


@pytest.mark.parametrize(("queries", "items"), [(1, 50), (3, 1), (3, 7), (64, 1000)])
@pytest.mark.parametrize("same", [False, True])
def test_blocks_of_any_size_give_the_same_ranks(queries, items, same):
  query_QE, item_NE, own_Q2 = drawn(50, 173, 6)
  if same:
    query_QE, item_NE = np.repeat(query_QE[:1], 50, 0), np.repeat(item_NE[:1], 173, 0)
  got = retrieval.ranks(query_QE, item_NE, own_Q2, queries, items)
  np.testing.assert_array_equal(got, oracle(query_QE, item_NE, own_Q2))


def test_ranks_are_those_of_float64_at_a_models_width():
  """Where float32 sums differ in their last bits between equal embeddings, as of repeated items."""
  query_QE, item_NE, own_Q2 = drawn(300, 5000, 512)
  query_QE[::2] = unit(query_QE[::2] + item_NE[own_Q2[::2, 0]] / 5)  # half of them have a good rank
  got, wanted = retrieval.ranks(query_QE, item_NE, own_Q2), oracle(query_QE, item_NE, own_Q2)
  assert 50 < np.sum(wanted <= 10) < 150
  np.testing.assert_array_equal(got[wanted <= 10], wanted[wanted <= 10])
  assert np.abs(got - wanted).max() <= 2  # in the crowd an item, here twice, is nearer than a tie
  assert np.mean(got == wanted) > 0.9


def test_cosines_nearer_than_a_tie_are_equal():
  item_NE = unit([[1, 0], [1, 1e-4], [1, 3e-3], [1, 0]])  # cosines under 1 by 0, 5e-9, 4.5e-6, 0
  query_QE = np.repeat(unit([[1, 0]]), 4, 0)
  own_Q2 = np.stack([np.arange(4), np.arange(1, 5)], axis=1)
  assert list(retrieval.ranks(query_QE, item_NE, own_Q2)) == [1, 2, 4, 3]


RANKED = """
import sys
import numpy as np
import jax
from clip_jax import hosts
hosts.start(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[1]))
import test_retrieval
from clip_jax.evaluation import retrieval
for rows in (1, 29):
  query_QE, item_NE, own_Q2 = test_retrieval.drawn(rows, 173, 6)
  for queries, items in ((2, 50), (64, 1000)):
    got = retrieval.ranks(query_QE, item_NE, own_Q2, queries, items)
    np.testing.assert_array_equal(got, test_retrieval.oracle(query_QE, item_NE, own_Q2))
print(jax.process_count(), jax.device_count(), "same")
"""


def test_two_processes_share_the_queries():
  for code, said in two_processes.run(RANKED, devices=2):
    assert (code, said.splitlines()[-1]) == (0, "2 4 same"), said


def test_a_prefix_is_read_before_every_caption():
  texts = {"a photo of one": [1, 0], "a photo of two": [0, 1]}
  model = KnownModel([[1.0, 0], [0, 1], [1, 0]], texts, 2)
  image_NE = unit([[1.0, 0], [0, 1], [1, 0]])
  found = retrieval.rank(model, image_NE, [["one"], ["two"], ["one"]], 2, "a photo of ")
  assert found.texts == ("one", "two", "one")
  assert list(found.text_ranks) == list(found.image_ranks) == [1, 1, 2]
  assert set(model.seen_texts) == set(texts)
