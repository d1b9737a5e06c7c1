import numpy as np
import pytest
import sklearn.metrics
from known_model import KnownModel, Source, labelled, picture, unit

from clip_jax.data.records import Record
from clip_jax.evaluation import encoding, zero_shot

CLASSES = [f"class {c}" for c in range(7)]
BATCH = 8


def noisy(n, seed=0, noise=0.8, batch=BATCH):
  """A model that is right about half of the time; its source; labels and cosines."""
  rng = np.random.default_rng(seed)
  text_CE = unit(rng.normal(size=(7, 16)))
  labels = rng.integers(7, size=n)
  image_NE = unit(text_CE[labels] + noise * unit(rng.normal(size=(n, 16))) * 1.5)
  model = KnownModel(image_NE, {f"a {c}": e for c, e in zip(CLASSES, text_CE, strict=True)}, batch)
  return model, labelled([CLASSES[c] for c in labels]), labels, image_NE @ text_CE.T


@pytest.mark.parametrize("n", [1, 7, 8, 9, 100])
def test_figures_are_those_of_scikit_learn(n):
  model, source, labels, cosines = noisy(n)
  result = zero_shot.evaluate(model, source, CLASSES, ["a {}"], BATCH)
  predicted, every = cosines.argmax(axis=1), np.arange(7)
  assert result.n == n
  assert result.top1 == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
  top5 = sklearn.metrics.top_k_accuracy_score(labels, cosines, k=5, labels=every)
  assert result.top5 == pytest.approx(top5)
  recalls = sklearn.metrics.recall_score(
    labels, predicted, labels=np.unique(labels), average=None, zero_division=0
  )
  assert result.mean_per_class == pytest.approx(recalls.mean())
  confusion = sklearn.metrics.confusion_matrix(labels, predicted, labels=every)
  np.testing.assert_array_equal(result.confusion, confusion)
  assert result.chance == pytest.approx(1 / 7)
  assert result.metrics() == {
    "top1": result.top1,
    "top5": result.top5,
    "mean_per_class": result.mean_per_class,
    "chance": result.chance,
    "n": n,
  }


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_batch_size_changes_nothing(batch):
  model, source, *_ = noisy(33)
  wanted = zero_shot.evaluate(model, source, CLASSES, ["a {}"], BATCH)
  model, source, *_ = noisy(33, batch=batch)
  got = zero_shot.evaluate(model, source, CLASSES, ["a {}"], batch)
  assert got.metrics() == wanted.metrics()
  assert [e.key for e in got.examples] == [e.key for e in wanted.examples]


def test_a_perfect_model_scores_one_and_a_collapsed_one_what_the_first_class_gives():
  texts = dict(zip(CLASSES, np.eye(7), strict=True))
  labels = [CLASSES[i % 7] for i in range(20)]
  perfect = KnownModel([texts[label] for label in labels], texts, BATCH)
  result = zero_shot.evaluate(perfect, labelled(labels), CLASSES, ["{}"], BATCH)
  assert (result.top1, result.mean_per_class) == (1.0, 1.0)
  assert all(e.correct for e in result.examples)
  same = unit(np.arange(1, 8))
  collapsed = KnownModel([same] * 20, dict.fromkeys(CLASSES, same), BATCH)
  result = zero_shot.evaluate(collapsed, labelled(labels), CLASSES, ["{}"], BATCH)
  assert (result.top1, result.top5, result.mean_per_class) == (3 / 20, 15 / 20, 1 / 7)
  assert {e.label: e.rank for e in result.examples} == {c: k + 1 for k, c in enumerate(CLASSES)}
  assert all([name for name, _ in e.likeliest] == CLASSES[:5] for e in result.examples)
  np.testing.assert_array_equal(result.confusion[:, 0], np.bincount(np.arange(20) % 7))
  assert result.confusion[:, 1:].sum() == 0


def test_of_equal_classes_the_first_is_found():
  """As of ImageNet's "missile (657)" and "missile (744)", which have the same prompts."""
  texts = {"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 1, 0.0], "d": [0, 0, 1]}
  model = KnownModel([[0, 1, 0]] * 4, texts, 2)
  result = zero_shot.evaluate(model, labelled(list("abcd")), list("abcd"), ["{}"], 2)
  np.testing.assert_array_equal(result.confusion, [[0, 1, 0, 0]] * 4)
  ranks = {e.label: e.rank for e in result.examples}
  assert ranks == {"a": 3, "b": 1, "c": 2, "d": 4}  # "a" and "d" tie, behind "b" and "c"
  assert {tuple(name for name, _ in e.likeliest) for e in result.examples} == {tuple("bcad")}
  assert (result.top1, result.mean_per_class) == (1 / 4, 1 / 4)


def test_ranks_with_ties_are_those_of_a_stable_sort():
  """Pictures and classes point along few directions, so that most scores tie."""
  rng = np.random.default_rng(0)
  axes = np.concatenate([np.eye(3), -np.eye(3)])
  text_CE, image_NE = axes[rng.integers(6, size=7)], axes[rng.integers(6, size=90)]
  labels = rng.integers(7, size=90)
  model = KnownModel(image_NE, dict(zip(CLASSES, text_CE, strict=True)), BATCH)
  source = labelled([CLASSES[c] for c in labels])
  result = zero_shot.evaluate(model, source, CLASSES, ["{}"], BATCH, examples=90)
  order = np.argsort(-(image_NE @ text_CE.T), axis=1, kind="stable")
  places = 1 + np.argmax(order == labels[:, None], axis=1)
  for example in result.examples:
    i = int(example.key.removeprefix("key"))
    assert example.rank == places[i]
    assert [name for name, _ in example.likeliest] == [CLASSES[c] for c in order[i, :5]]
  assert len(result.examples) == 90
  assert (result.top1, result.top5) == (np.mean(places == 1), np.mean(places <= 5))
  assert np.trace(result.confusion) == np.sum(places == 1)


def test_examples_are_right_and_wrong_ones_with_their_probabilities():
  model, source, labels, cosines = noisy(100, noise=1.2)
  result = zero_shot.evaluate(model, source, CLASSES, ["a {}"], BATCH, examples=12, seed=3)
  assert sum(e.correct for e in result.examples) == 6
  assert len({e.key for e in result.examples}) == 12
  for e in result.examples:
    i = int(e.key.removeprefix("key"))
    odds = np.exp(10.0 * cosines[i].astype(float))
    wanted = odds / odds.sum()
    order = np.argsort(-wanted)
    assert e.label == CLASSES[labels[i]]
    assert e.rank == 1 + list(order).index(labels[i])
    assert e.probability == pytest.approx(wanted[labels[i]], rel=1e-4)
    assert [name for name, _ in e.likeliest] == [CLASSES[c] for c in order[:5]]
    np.testing.assert_allclose([p for _, p in e.likeliest], wanted[order[:5]], rtol=1e-4)
    np.testing.assert_array_equal(e.image, picture(i))
  again = zero_shot.evaluate(model, source, CLASSES, ["a {}"], BATCH, examples=12, seed=3)
  other = zero_shot.evaluate(model, source, CLASSES, ["a {}"], BATCH, examples=12, seed=4)
  assert [e.key for e in again.examples] == [e.key for e in result.examples]
  assert [e.key for e in other.examples] != [e.key for e in result.examples]


def test_examples_from_all_images_are_as_often_right_as_the_model():
  """9 of 100 images are right: so are 9 % of what is drawn, and half of what is drawn in halves."""
  texts = dict(zip(CLASSES, np.eye(7), strict=True))
  model = KnownModel([texts[CLASSES[int(i >= 9)]] for i in range(100)], texts, BATCH)

  def drawn(halves, seed):
    found = zero_shot.evaluate(
      model, labelled(["class 0"] * 100), CLASSES, ["{}"], BATCH, examples=10, seed=seed,
      halves=halves,
    ).examples  # fmt: skip
    assert len({e.key for e in found}) == 10
    return [e.correct for e in found]

  rights = [sum(drawn(False, seed)) for seed in range(40)]
  assert np.mean(rights) == pytest.approx(0.9, abs=0.3)  # the mean's deviation is 0.14
  assert len(set(rights)) > 2
  assert {sum(drawn(True, seed)) for seed in range(3)} == {5}
  assert drawn(False, 0) == drawn(False, 0)


@pytest.mark.parametrize(("n", "wrong"), [(3, 1), (30, 2), (30, 29)])
def test_examples_fill_up_where_one_kind_is_rare(n, wrong):
  texts = dict(zip(CLASSES, np.eye(7), strict=True))
  images = [texts[CLASSES[int(i < wrong)]] for i in range(n)]
  result = zero_shot.evaluate(
    KnownModel(images, texts, BATCH), labelled(["class 0"] * n), CLASSES, ["{}"], BATCH, examples=8
  )
  assert len(result.examples) == min(n, 8)
  assert sum(not e.correct for e in result.examples) >= min(wrong, 4)
  assert sum(e.correct for e in result.examples) >= min(n - wrong, 4)


def test_large_logit_scales_do_not_overflow():
  model, source, *_ = noisy(9)
  model.logit_scale = 1e6
  result = zero_shot.evaluate(model, source, CLASSES, ["a {}"], BATCH)
  assert all(0 <= p <= 1 for e in result.examples for _, p in e.likeliest)


def test_the_ensemble_of_templates_is_used():
  texts = {"a x": [1, 0], "b x": [0, 1], "a y": [1, 0], "b y": [1, 0]}
  image = unit([0.8, 0.6])
  model = KnownModel([image], texts, 4)
  result = zero_shot.evaluate(model, labelled(["b"]), ["a", "b"], ["{} x", "{} y"], 4)
  assert result.top1 == 1.0  # the mean of b's two texts lies at 45 degrees
  assert result.templates == ("{} x", "{} y")


@pytest.mark.parametrize(("limit", "n"), [(0, 20), (5, 5), (99, 20)])
def test_limit_takes_the_first_records(limit, n):
  model, source, labels, cosines = noisy(20)
  result = zero_shot.evaluate(model, source, CLASSES, ["a {}"], BATCH, limit)
  assert result.n == n
  assert result.top1 == pytest.approx(np.mean(cosines[:n].argmax(axis=1) == labels[:n]))


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_an_embedding_that_is_not_finite_fails_and_names_the_record(value):
  model, source, *_ = noisy(20)
  model.images[13, 2:] = value
  with pytest.raises(encoding.EvaluationError, match="shard-7, record 13: its embedding"):
    zero_shot.evaluate(model, source, CLASSES, ["a {}"], BATCH)


def test_a_text_embedding_that_is_not_finite_fails_and_names_the_text():
  model, source, *_ = noisy(9)
  model.texts["a class 3"] = np.full(16, np.nan)
  with pytest.raises(encoding.EvaluationError, match="text 'a class 3'"):
    zero_shot.evaluate(model, source, CLASSES, ["a {}"], BATCH)


def test_a_bad_image_fails_and_names_the_record():
  model, source, *_ = noisy(20)
  source.records[11] = Record("key11", b"\xff\xd8\xff not a jpeg", (), CLASSES[0])
  with pytest.raises(encoding.EvaluationError, match="shard-7, record 11: image cannot be decoded"):
    zero_shot.evaluate(model, source, CLASSES, ["a {}"], BATCH)


def test_an_unreadable_record_fails_by_name():
  model, source, *_ = noisy(20)
  source.records[4] = OSError("disk on fire")
  with pytest.raises(encoding.EvaluationError, match=r"shard-7, record 4.*disk on fire"):
    zero_shot.evaluate(model, source, CLASSES, ["a {}"], BATCH)


@pytest.mark.parametrize("label", ["Class 1", None])
def test_a_label_that_is_no_class_fails_and_is_named(label):
  model, source, *_ = noisy(20)
  source.records[6] = Record("key6", picture(6), (), label)
  with pytest.raises(encoding.EvaluationError, match=f"shard-7, record 6: label {label!r}"):
    zero_shot.evaluate(model, source, CLASSES, ["a {}"], BATCH)


@pytest.mark.parametrize(("batch", "limit", "n"), [(0, 0, 3), (2, -1, 3), (2, 0, 0)])
def test_nothing_to_evaluate_is_an_error(batch, limit, n):
  model, *_ = noisy(3, batch=batch)
  with pytest.raises(encoding.EvaluationError):
    zero_shot.evaluate(model, Source([None] * n), CLASSES, ["a {}"], batch, limit)
