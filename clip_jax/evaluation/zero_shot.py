"""Zero-shot classification: the likeliest of the class prompts, for every image."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from clip_jax.data import labels as labels_lib
from clip_jax.data import records
from clip_jax.evaluation import encoding, prompts, scores

_LISTED = 5  # likeliest classes kept of every image
_SAMPLE = 600  # image embeddings kept for the map


@dataclasses.dataclass(frozen=True)
class Example:
  """One image with what the model makes of it. `rank` counts from 1."""

  image: np.ndarray  # uint8 [R, R, 3]
  key: str
  label: str
  probability: float  # of the label
  rank: int  # of the label among all classes
  likeliest: tuple[tuple[str, float], ...]  # (class, probability), best first

  @property
  def correct(self) -> bool:
    return self.rank == 1


@dataclasses.dataclass(frozen=True)
class ZeroShotResult:
  """What a zero-shot classification found. Shares are between 0 and 1.

  `examples` are drawn at random: from all images, or half of them among those the model has right
  and half among those it has wrong, as far as there are so many, as `evaluate` was asked. In halves
  they do not stand for the accuracy.
  """

  name: str
  classes: tuple[str, ...]
  templates: tuple[str, ...]
  held_out: tuple[str, ...]  # classes that training never saw
  n: int
  top1: float
  top5: float
  mean_per_class: float  # mean of the recall of each class that has images
  confusion: np.ndarray  # int64 [C, C]: rows are labels, columns are predictions
  examples: tuple[Example, ...]
  class_CE: np.ndarray
  sample_NE: np.ndarray  # embeddings of up to 600 images, drawn at random
  sample_labels: np.ndarray  # int64 [N], indices into `classes`
  metric: str  # one of `scores.METRICS`: by which these images are scored
  score: float

  @property
  def chance(self) -> float:
    """The top-1 share of a guess."""
    return 1 / len(self.classes)

  @property
  def shown_template(self) -> str:
    """One of the templates to show to people: the first that is more than the class name."""
    return next((t for t in self.templates if t.strip() != "{}"), self.templates[0])

  def metrics(self) -> dict[str, float]:
    """Flat, for a line of JSON."""
    own = {} if self.metric == "accuracy" else {scores.log_name(self.metric): self.score}
    return own | {
      "top1": self.top1,
      "top5": self.top5,
      "mean_per_class": self.mean_per_class,
      "chance": self.chance,
      "n": float(self.n),
    }


@dataclasses.dataclass(frozen=True)
class SeveralResult:
  """The score, between 0 and 1, on images of several classes each: no class is the right one."""

  name: str
  n: int  # images
  metric: str  # one of `scores.METRICS`
  score: float

  def metrics(self) -> dict[str, float]:
    """Flat, for a line of JSON."""
    return {scores.log_name(self.metric): self.score, "n": float(self.n)}


@dataclasses.dataclass(frozen=True)
class _Ranking:
  """Of every image: where its label came, and the likeliest classes with their probabilities."""

  label: np.ndarray  # int [N], which class is right
  rank: np.ndarray  # int [N], of the label, from 1
  probability: np.ndarray  # float [N], of the label
  listed: np.ndarray  # int [N, <=5], classes, best first
  listed_probability: np.ndarray  # float [N, <=5]

  def confusion(self, classes: int) -> np.ndarray:
    """int64 [C, C]: how many images of each class (rows) were taken for each (columns)."""
    out_CC = np.zeros((classes, classes), np.int64)
    np.add.at(out_CC, (self.label, self.listed[:, 0]), 1)
    return out_CC

  def example(self, i: int, image: np.ndarray, key: str, classes: Sequence[str]) -> Example:
    """Image `i`, whose pixels and key these are."""
    listed = zip(self.listed[i], self.listed_probability[i], strict=True)
    return Example(
      image=image,
      key=key,
      label=classes[self.label[i]],
      probability=float(self.probability[i]),
      rank=int(self.rank[i]),
      likeliest=tuple((classes[c], float(p)) for c, p in listed),
    )


def evaluate(
  model: encoding.Model,
  source: records.RecordSource,
  classes: Sequence[str],
  templates: Sequence[str],
  batch: int,
  limit: int = 0,
  *,
  name: str = "",
  held_out: Sequence[str] = (),
  examples: int = 12,
  seed: int = 0,
  halves: bool = True,
  class_CE: np.ndarray | None = None,
  metric: str = "accuracy",
) -> ZeroShotResult:
  """Classifies the first `limit` records of `source` (0: all) by their nearest class embedding.

  Of classes that score exactly the same the first comes first, as everywhere: see `scores.ranks`.
  Args: halves, whether to draw half of the examples among the images that are right and half among
    the others, or all of them from all; class_CE, the classes' embeddings where they are not those
    of `classes` in `templates`, or are known already: see `classifier`; metric, one of
    `scores.METRICS`, by which the images are scored besides.
  Raises: EvaluationError naming the record whose image is bad or whose label is no class, or the
    text or image whose embedding is not finite, or where `scores.score` cannot have the metric;
    PromptError for unusable classes or templates.
  Source: section 3.1; Table 9 (metrics).
  """
  n = encoding.count(source, batch, limit)
  if class_CE is None:
    encode_text = functools.partial(encoding.encode_texts, model, batch=batch)
    class_CE = prompts.class_embeddings(encode_text, classes, templates)
  elif len(class_CE) != len(classes):
    raise prompts.PromptError(f"{len(class_CE)} embeddings for {len(classes)} classes")
  image_NE, labels, keys = _embed(model, source, classes, n, batch)
  ranking = _rank(image_NE, class_CE, labels, model.logit_scale, batch)
  top1 = float(np.mean(ranking.rank == 1))
  by_top1 = metric == "accuracy"  # without all scores at once
  confusion = ranking.confusion(len(classes))
  rng = np.random.default_rng(seed)
  sample = np.sort(rng.permutation(n)[:_SAMPLE])
  drawn = _draw(ranking.rank == 1, examples, rng, halves)
  return ZeroShotResult(
    name=name,
    classes=tuple(classes),
    templates=tuple(templates),
    held_out=tuple(held_out),
    n=n,
    top1=top1,
    top5=float(np.mean(ranking.rank <= 5)),
    mean_per_class=_mean_recall(confusion),
    confusion=confusion,
    examples=tuple(
      ranking.example(i, encoding.image_of(model, source, i), keys[i], classes) for i in drawn
    ),
    class_CE=class_CE,
    sample_NE=image_NE[sample],
    sample_labels=labels[sample],
    metric=metric,
    score=top1 if by_top1 else _score(metric, image_NE, class_CE, labels),
  )


def evaluate_several(
  model: encoding.Model,
  source: records.RecordSource,
  classes: Sequence[str],
  class_CE: np.ndarray,
  metric: str,
  batch: int,
  limit: int = 0,
  *,
  name: str = "",
) -> SeveralResult:
  """Scores the classes of the first `limit` records (0: all), whose labels are of `labels.join`.

  Raises: EvaluationError as `evaluate`.
  Source: section 3.1; Table 9 (Pascal VOC 2007: 11-point mAP).
  """
  n = encoding.count(source, batch, limit)
  labels_NC = np.zeros((n, len(classes)), np.int8)

  def visit(i: int, record: records.Record) -> None:
    try:
      labels_NC[i] = labels_lib.row(record.label or "", classes)
    except labels_lib.LabelError as error:
      raise encoding.EvaluationError(f"{source.locate(i)}: {error}") from error

  image_NE = encoding.encode_images(model, source, n, batch, visit)
  return SeveralResult(name, n, metric, _score(metric, image_NE, class_CE, labels_NC))


def _score(metric: str, image_NE: np.ndarray, class_CE: np.ndarray, labels: np.ndarray) -> float:
  return scores.score(metric, encoding.similarities(image_NE, class_CE), labels)


def _embed(
  model: encoding.Model,
  source: records.RecordSource,
  classes: Sequence[str],
  n: int,
  batch: int,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
  """Of the first `n` records: embeddings [N, E], labels int64 [N] as places in `classes`, keys."""
  index_of = {c: i for i, c in enumerate(classes)}
  labels, keys = np.zeros(n, np.int64), [""] * n

  def visit(i: int, record: records.Record) -> None:
    if record.label not in index_of:
      raise encoding.EvaluationError(
        f"{source.locate(i)}: label {record.label!r} is none of the {len(classes)} classes "
        f"({', '.join(classes[:5])}, ...); give the task the prompts of this data"
      )
    labels[i], keys[i] = index_of[record.label], record.key

  return encoding.encode_images(model, source, n, batch, visit), labels, keys


def _rank(
  image_NE: np.ndarray,
  class_CE: np.ndarray,
  labels: np.ndarray,
  logit_scale: float,
  batch: int,
) -> _Ranking:
  """Orders the classes of every image, `batch` images at a time."""
  parts = []
  for start in range(0, len(labels), batch):
    label_b = labels[start : start + batch]
    cosines_bC = encoding.similarities(image_NE[start : start + batch], class_CE)
    logits_bC = logit_scale * cosines_bC.astype(np.float64)
    exp_bC = np.exp(logits_bC - logits_bC.max(axis=1, keepdims=True))
    probability_bC = exp_bC / exp_bC.sum(axis=1, keepdims=True)
    listed = np.argsort(-cosines_bC, axis=1, kind="stable")[:, :_LISTED]
    parts.append(
      (
        label_b,
        scores.ranks(cosines_bC, label_b),
        np.take_along_axis(probability_bC, label_b[:, None], axis=1)[:, 0],
        listed,
        np.take_along_axis(probability_bC, listed, axis=1),
      )
    )
  return _Ranking(*map(np.concatenate, zip(*parts, strict=True)))


def _mean_recall(confusion_CC: np.ndarray) -> float:
  """The mean over the classes that have images of the share of them that is right."""
  images_per_class = confusion_CC.sum(axis=1)
  seen = images_per_class > 0
  return float(np.mean(np.diag(confusion_CC)[seen] / images_per_class[seen]))


def _draw(correct: np.ndarray, size: int, rng: np.random.Generator, halves: bool) -> list[int]:
  """`size` indices; in `halves` of correct and of wrong ones, as far as there are, mixed."""
  if not halves:
    return [int(i) for i in rng.permutation(len(correct))[:size]]
  right, wrong = (rng.permutation(np.flatnonzero(which)) for which in (correct, ~correct))
  rights = min(len(right), max(size - size // 2, size - len(wrong)))
  drawn = np.concatenate([right[:rights], wrong[: size - rights]])
  return [int(i) for i in rng.permutation(drawn)]
