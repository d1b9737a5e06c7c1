"""Retrieval: the right texts for every image, and the right images for every text."""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from clip_jax.data import records
from clip_jax.evaluation import encoding

KS = (1, 5, 10)
_ITEMS = 16_384  # that a block of queries is compared with at a time


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
  captions: list[Sequence[str]] = []
  keys: list[str] = []

  def visit(i: int, record: records.Record) -> None:
    captions.append(record.captions if all_captions else record.captions[:1])
    keys.append(record.key)
    if not record.captions:
      raise encoding.EvaluationError(f"{source.locate(i)}: has no caption to retrieve")

  image_NE = encoding.encode_images(model, source, n, batch, visit)
  found = rank(model, image_NE, captions, batch)
  image_of = functools.cache(lambda i: encoding.image_of(model, source, i))

  def example(t: int) -> Example:
    nearest = _nearest(found.text_NE[t], image_NE, found.images_of_text[t])
    hits = (Hit(image_of(i), keys[i], i in found.images_of_text[t], cos) for i, cos in nearest)
    return Example(found.texts[t], int(found.text_ranks[t]), tuple(hits))

  drawn = np.random.default_rng(seed).permutation(len(found.texts))[:examples]
  return RetrievalResult(
    name=name,
    images=n,
    texts=len(found.texts),
    image_to_text=found.image_to_text,
    text_to_image=found.text_to_image,
    examples=tuple(example(int(t)) for t in drawn),
  )


@dataclasses.dataclass(frozen=True)
class Ranked:
  """Every text and every image as a query, with the rank of its first correct item, from 1."""

  texts: tuple[str, ...]  # in the order of their images
  text_NE: np.ndarray
  images_of_text: Sequence[np.ndarray]  # which images are correct, as sorted indices
  texts_of_image: Sequence[np.ndarray]
  text_ranks: np.ndarray
  image_ranks: np.ndarray

  @property
  def image_to_text(self) -> Recall:
    return _recall(self.image_ranks, self.texts_of_image, len(self.texts))

  @property
  def text_to_image(self) -> Recall:
    return _recall(self.text_ranks, self.images_of_text, len(self.image_ranks))


def rank(
  model: encoding.Model,
  image_NE: np.ndarray,
  captions: Sequence[Sequence[str]],
  batch: int,
  prefix: str = "",
) -> Ranked:
  """Ranks the images' captions for the images, and the images for the captions; see `evaluate`.

  Args: image_NE, embeddings of unit norm; captions, of each image one or more; prefix, is put
    before every caption where it is encoded ("a photo of " in the paper's table).
  Raises: EvaluationError naming the text whose embedding is not finite.
  """
  texts = tuple(text for own in captions for text in own)
  owners = [i for i, own in enumerate(captions) for _ in own]
  distinct = {text: g for g, text in enumerate(dict.fromkeys(texts))}
  group_of_text = [distinct[text] for text in texts]
  prompts = [prefix + text for text in distinct]
  text_NE = encoding.encode_texts(model, prompts, batch, truncate=True)[group_of_text]
  images_of_text, texts_of_image = _correct(group_of_text, owners)
  return Ranked(
    texts=texts,
    text_NE=text_NE,
    images_of_text=images_of_text,
    texts_of_image=texts_of_image,
    text_ranks=_ranks(text_NE, image_NE, images_of_text, batch),
    image_ranks=_ranks(image_NE, text_NE, texts_of_image, batch),
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
  query_QE: np.ndarray,
  item_NE: np.ndarray,
  correct: Sequence[np.ndarray],
  block: int,
  items: int = _ITEMS,
) -> np.ndarray:
  """The rank of each query's first correct item, from 1; at most [block, items] scores at once."""
  ranks = np.ones(len(query_QE), np.int64)
  for start in range(0, len(query_QE), block):
    query_bE = query_QE[start : start + block]
    own = correct[start : start + block]
    best_b1 = np.array([[_best(q, item_NE, c)] for q, c in zip(query_bE, own, strict=True)])
    # Correct items are no rivals: they are taken out of each block of items, by their numbers.
    number = np.concatenate(own)
    order = np.argsort(number, kind="stable")
    row, number = np.repeat(np.arange(len(own)), [len(c) for c in own])[order], number[order]
    for first in range(0, len(item_NE), items):
      cosines_bi = encoding.similarities(query_bE, item_NE[first : first + items])
      inside = slice(*np.searchsorted(number, (first, first + items)))
      cosines_bi[row[inside], number[inside] - first] = -np.inf
      ranks[start : start + block] += np.sum(cosines_bi >= best_b1, axis=1)
  return ranks


def _best(query_E: np.ndarray, item_NE: np.ndarray, correct: np.ndarray) -> np.float32:
  """The highest cosine of a correct item."""
  return encoding.similarities(query_E[None], item_NE[correct]).max()


def _nearest(
  query_E: np.ndarray, item_NE: np.ndarray, correct: np.ndarray, size: int = 5
) -> list[tuple[int, float]]:
  """The `size` nearest items with their cosines, in the order in which `_ranks` counts."""
  blocks = (item_NE[first : first + _ITEMS] for first in range(0, len(item_NE), _ITEMS))
  cosines = np.concatenate([encoding.similarities(query_E[None], block)[0] for block in blocks])
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
