"""Retrieval: the right texts for every image, and the right images for every text."""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from clip_jax.data import records
from clip_jax.evaluation import encoding

KS = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Recall:
  """One direction of retrieval. Shares are between 0 and 1."""

  n: int  # queries
  recall: Mapping[int, float]  # R@k: share of queries with a correct item among their first k
  chance: Mapping[int, float]  # what a random order would reach
  median_rank: float  # of a query's first correct item, from 1


@dataclasses.dataclass(frozen=True)
class Hit:
  """One of the images found for a text."""

  image: np.ndarray  # uint8 [R, R, 3]
  key: str
  correct: bool
  cosine: float


@dataclasses.dataclass(frozen=True)
class Example:
  """A text with its nearest images, and the rank of the first correct one."""

  text: str
  rank: int
  hits: tuple[Hit, ...]


@dataclasses.dataclass(frozen=True)
class RetrievalResult:
  """What a retrieval found. `examples` are texts drawn at random, found or not."""

  name: str
  images: int
  texts: int
  image_to_text: Recall
  text_to_image: Recall
  examples: tuple[Example, ...]

  def metrics(self) -> dict[str, float]:
    """Flat, for a line of JSON."""
    out = {"images": float(self.images), "texts": float(self.texts)}
    for direction in ("image_to_text", "text_to_image"):
      found: Recall = getattr(self, direction)
      for k in KS:
        out[f"{direction}_R@{k}"] = found.recall[k]
        out[f"{direction}_chance_R@{k}"] = found.chance[k]
      out[f"{direction}_median_rank"] = found.median_rank
    return out


def evaluate(
  model: encoding.Model,
  source: records.RecordSource,
  batch: int,
  limit: int = 0,
  *,
  all_captions: bool = False,
  name: str = "",
  examples: int = 6,
  seed: int = 0,
) -> RetrievalResult:
  """Ranks texts for images and images for texts over the first `limit` records (0: all).

  The texts are the first caption of every record, or all captions with `all_captions` (what the
  published tables of Flickr30k and COCO do). A text is correct for an image when one of the
  image's own texts is the very same string: two records with the caption "a red circle" are each
  correct for both, because no model could tell which was meant. Each record's text stays a query
  and an item of its own, so a repeated caption takes as many places of a ranking as it has records.
  The rank of a query is that of its first correct item, and a tie counts against the model: an
  incorrect item that scores exactly as much comes first. A text over the context length is cut, as
  in training.
  Raises: EvaluationError naming the record that is bad or has no caption, or the text or image
    whose embedding is not finite.
  Source: section 3.1 and table 13.
  """
  n = encoding.count(source, batch, limit)
  texts: list[str] = []
  owners: list[int] = []  # of each text, the image it came with
  keys: list[str] = []

  def visit(i: int, record: records.Record) -> None:
    if not record.captions:
      raise encoding.EvaluationError(f"{source.locate(i)}: has no caption to retrieve")
    own = record.captions if all_captions else record.captions[:1]
    texts.extend(own)
    owners.extend([i] * len(own))
    keys.append(record.key)

  image_NE = encoding.encode_images(model, source, n, batch, visit)
  distinct = {text: g for g, text in enumerate(dict.fromkeys(texts))}
  group_of_text = [distinct[text] for text in texts]
  text_NE = encoding.encode_texts(model, list(distinct), batch, truncate=True)[group_of_text]
  images_of_text, texts_of_image = _correct(group_of_text, owners)
  text_ranks = _ranks(text_NE, image_NE, images_of_text, batch)
  image_ranks = _ranks(image_NE, text_NE, texts_of_image, batch)
  image_of = functools.cache(lambda i: encoding.image_of(model, source, i))

  def example(t: int) -> Example:
    found = _nearest(text_NE[t], image_NE, images_of_text[t])
    hits = (Hit(image_of(i), keys[i], i in images_of_text[t], cosine) for i, cosine in found)
    return Example(texts[t], int(text_ranks[t]), tuple(hits))

  drawn = np.random.default_rng(seed).permutation(len(texts))[:examples]
  return RetrievalResult(
    name=name,
    images=n,
    texts=len(texts),
    image_to_text=_recall(image_ranks, texts_of_image, len(texts)),
    text_to_image=_recall(text_ranks, images_of_text, n),
    examples=tuple(example(int(t)) for t in drawn),
  )


def _correct(
  group_of_text: Sequence[int], owners: Sequence[int]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Which images are correct for each text, and which texts for each image, as sorted indices.

  Args: of each text, the number of its string and the image it came with.
  """
  images, texts = collections.defaultdict(set), collections.defaultdict(list)
  groups = collections.defaultdict(set)
  for t, (group, image) in enumerate(zip(group_of_text, owners, strict=True)):
    images[group].add(image)
    texts[group].append(t)
    groups[image].add(group)
  images_of_group = {group: np.array(sorted(own)) for group, own in images.items()}
  texts_of_image = [
    np.sort(np.concatenate([np.array(texts[group]) for group in groups[image]]))
    for image in sorted(groups)
  ]
  return [images_of_group[group] for group in group_of_text], texts_of_image


def _ranks(
  query_QE: np.ndarray, item_NE: np.ndarray, correct: Sequence[np.ndarray], block: int
) -> np.ndarray:
  """The rank of each query's first correct item, from 1; at most [block, N] scores at once."""
  ranks = np.zeros(len(query_QE), np.int64)
  for start in range(0, len(query_QE), block):
    cosines_bN = encoding.similarities(query_QE[start : start + block], item_NE)
    for q, row in enumerate(cosines_bN, start=start):
      own = row[correct[q]]
      best = own.max()
      ranks[q] = 1 + np.sum(row >= best) - np.sum(own >= best)
  return ranks


def _nearest(
  query_E: np.ndarray, item_NE: np.ndarray, correct: np.ndarray, size: int = 5
) -> list[tuple[int, float]]:
  """The `size` nearest items with their cosines, in the order in which `_ranks` counts."""
  cosines = encoding.similarities(query_E[None], item_NE)[0]
  is_correct = np.isin(np.arange(len(item_NE)), correct)
  return [(int(i), float(cosines[i])) for i in np.lexsort((is_correct, -cosines))[:size]]


def _recall(ranks: np.ndarray, correct: Sequence[np.ndarray], items: int) -> Recall:
  """The figures of one direction, with those of a random order of the items."""
  sizes = np.array([len(own) for own in correct])
  chance = {}
  for k in KS:
    taken = np.arange(min(k, items))[None]
    miss = np.clip(items - sizes[:, None] - taken, 0, None) / (items - taken)
    chance[k] = float(np.mean(1 - np.prod(miss, axis=1)))
  return Recall(
    n=len(ranks),
    recall={k: float(np.mean(ranks <= k)) for k in KS},
    chance=chance,
    median_rank=float(np.median(ranks)),
  )
