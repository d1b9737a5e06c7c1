"""Retrieval: the right texts for every image, and the right images for every text."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax import hosts, sharding
from clip_jax.data import records
from clip_jax.evaluation import encoding

KS = (1, 5, 10)
TIE = 1e-6  # cosines as near as this are equal: float32 sums in another order differ less
_QUERIES = 2048  # of each device, that are compared at a time
_ITEMS = 4096  # with so many items


@dataclasses.dataclass(frozen=True)
class Recall:
  """One direction of retrieval. Shares are between 0 and 1."""

  n: int  # queries
  recall: Mapping[int, float]  # R@k: share of queries with an item of their own among the first k
  chance: Mapping[int, float]  # what a random order would reach
  median_rank: float  # of a query's first item of its own, from 1


@dataclasses.dataclass(frozen=True)
class Hit:
  """One of the images found for a text."""

  image: np.ndarray  # uint8 [R, R, 3]
  key: str
  correct: bool
  cosine: float


@dataclasses.dataclass(frozen=True)
class Example:
  """A text with its nearest images, and the rank of its own."""

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
  published tables of Flickr30k and COCO do). Right for an image are its own texts and no others,
  and for a text its own image: where two records have the caption "a red circle", each of the two
  texts is wrong for the other's image. So captions that repeat bound what any model can reach. The
  rank of a query is that of its first right item. Of items with equal scores the first one wins, as
  in a stable descending sort: see `TIE`. A text over the context length is cut, as in training.
  Raises: EvaluationError naming the record that is bad or has no caption, or the text or image
    whose embedding is not finite.
  Source: section 3.1 and table 13; the measure is that of Karpathy and Fei-Fei (2015, arXiv
    1412.2306, section 4.2).
  Differs: the top-k of other tools leaves open in which order equal scores come.
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
    nearest = _nearest(found.text_NE[t], image_NE, found.owners[t])
    hits = (Hit(image_of(i), keys[i], i == found.owners[t], cosine) for i, cosine in nearest)
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
  """Every text and every image as a query, with the rank of its first right item, from 1."""

  texts: tuple[str, ...]  # in the order of their images
  text_NE: np.ndarray
  owners: np.ndarray  # int [N], of each text its image
  text_ranks: np.ndarray
  image_ranks: np.ndarray

  @property
  def image_to_text(self) -> Recall:
    return _recall(self.image_ranks, np.bincount(self.owners), len(self.texts))

  @property
  def text_to_image(self) -> Recall:
    return _recall(self.text_ranks, np.ones(len(self.texts), int), len(self.image_ranks))


def rank(
  model: encoding.Model,
  image_NE: np.ndarray,
  captions: Sequence[Sequence[str]],
  batch: int,
  prefix: str = "",
) -> Ranked:
  """Ranks the images' captions for the images, and the images for the captions; see `evaluate`.

  Every process must call it alike. Args: image_NE, embeddings of unit norm; captions, of each image
    one or more; prefix, is put before every caption where it is encoded ("a photo of " in the
    paper's table).
  Raises: EvaluationError naming the text whose embedding is not finite.
  """
  texts = tuple(text for own in captions for text in own)
  owners = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
  place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
  prompts = [prefix + text for text in place]
  text_NE = encoding.encode_texts(model, prompts, batch, truncate=True)[[place[t] for t in texts]]
  starts = np.searchsorted(owners, np.arange(len(captions) + 1))
  return Ranked(
    texts=texts,
    text_NE=text_NE,
    owners=owners,
    text_ranks=ranks(text_NE, image_NE, np.stack([owners, owners + 1], axis=1)),
    image_ranks=ranks(image_NE, text_NE, np.stack([starts[:-1], starts[1:]], axis=1)),
  )


def ranks(
  query_QE: np.ndarray,
  item_NE: np.ndarray,
  own_Q2: np.ndarray,
  queries: int = _QUERIES,
  items: int = _ITEMS,
) -> np.ndarray:
  """The rank of each query's first item of its own, from 1: int [Q], the same on every process.

  Embeddings are float32 of unit norm; the items of query q's own are those from number
  `own_Q2[q, 0]` up to before `own_Q2[q, 1]`, one at least. All devices of all processes share the
  queries, [queries, items] scores on each at a time, in float32. Sums in another order differ by
  some 1e-7, so that equal embeddings need not have equal scores: cosines no farther apart than
  `TIE` are taken for equal, and then the items in front of the own ones come first. Two items that
  differ by less are told apart by no model that computes in bfloat16.
  Against float64, ranks deep in a crowd move: of 20,000 random queries among 20,000 random items of
  width 512, 11 % by at most 3 places. Those up to 10 stay, in `tests/test_retrieval.py`.
  """
  mesh = sharding.make_mesh()  # a TPU runs nothing on a part of its chips
  everywhere, parts = sharding.replicated(mesh), sharding.host_parts(mesh)
  share = -(-len(query_QE) // jax.process_count())
  size = min(queries, -(-share // parts)) * parts  # of this process
  mine = range(len(query_QE))[jax.process_index() * share :][:share]
  ahead = jax.jit(_ahead, out_shardings=sharding.batch_sharding(mesh))
  found = np.zeros(len(query_QE), np.int32)
  for start in range(0, share, size):
    block = slice(*np.clip((start, start + size), 0, len(mine)) + mine.start)
    own_b2 = own_Q2[block].astype(np.int32)
    here = {"query": query_QE[block], "own": own_b2, "ahead": np.zeros(len(own_b2), np.int32)}
    here["best"] = _best(here["query"], item_NE, own_b2)
    rows = sharding.global_batch({k: _padded(x, size) for k, x in here.items()}, mesh)
    for first in range(0, len(item_NE), items):
      item_iE = _padded(item_NE[first : first + items], min(items, len(item_NE)))
      item_iE = jax.make_array_from_process_local_data(everywhere, item_iE)
      rows["ahead"] = ahead(**rows, item_iE=item_iE, first=first, count=len(item_NE))
    found[block] = 1 + sharding.host_rows(rows["ahead"])[: len(own_b2)]
  return hosts.sum_over_hosts(found)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
  """Zeros to `size` rows, so that a program is compiled once."""
  return np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1))


def _best(query_bE: np.ndarray, item_NE: np.ndarray, own_b2: np.ndarray) -> np.ndarray:
  """The highest cosine of each query's own items, float32 [b]."""
  first_b, counts_b = own_b2[:, 0], own_b2[:, 1] - own_b2[:, 0]
  best_b = np.full(len(query_bE), -np.inf, np.float32)
  for nth in range(counts_b.max(initial=0)):  # where a query has fewer, its last one again
    item_bE = item_NE[first_b + np.minimum(nth, counts_b - 1)]
    cosine_b = np.einsum("be,be->b", query_bE, item_bE, dtype=np.float64)
    best_b = np.maximum(best_b, cosine_b.astype(np.float32))
  return best_b


def _ahead(
  query: jax.Array,
  own: jax.Array,
  best: jax.Array,
  ahead: jax.Array,
  item_iE: jax.Array,
  first: jax.Array,
  count: jax.Array,
) -> jax.Array:
  """Adds to `ahead` [b] how many of the items from number `first` on come before the `best` own.

  Of all items there are `count`: what is over that is padding. `query` is [b, E], `own` [b, 2].
  """
  cosine_bi = jnp.einsum("be,ie->bi", query, item_iE, precision=jax.lax.Precision.HIGHEST)
  number_1i = first + jnp.arange(item_iE.shape[0])[None]
  before_bi, best_b1 = number_1i < own[:, :1], best[:, None]
  rival_bi = (before_bi | (number_1i >= own[:, 1:])) & (number_1i < count)
  wins_bi = jnp.where(before_bi, cosine_bi >= best_b1 - TIE, cosine_bi > best_b1 + TIE)
  return ahead + jnp.sum(rival_bi & wins_bi, axis=1, dtype=jnp.int32)


def _nearest(
  query_E: np.ndarray, item_NE: np.ndarray, own: int, size: int = 5
) -> list[tuple[int, float]]:
  """The `size` nearest items with their cosines, in the order in which `ranks` counts."""
  blocks = (item_NE[first : first + _ITEMS] for first in range(0, len(item_NE), _ITEMS))
  cosines = np.concatenate([encoding.similarities(query_E[None], block)[0] for block in blocks])
  level = np.where(np.abs(cosines - cosines[own]) <= TIE, cosines[own], cosines)
  return [(int(i), float(cosines[i])) for i in np.argsort(-level, kind="stable")[:size]]


def _recall(ranks_N: np.ndarray, sizes: np.ndarray, items: int) -> Recall:
  """The figures of one direction, with those of a random order of the items.

  Args: sizes, of each query how many of the items are its own.
  """
  chance = {}
  for k in KS:
    taken = np.arange(min(k, items))[None]
    miss = np.clip(items - sizes[:, None] - taken, 0, None) / (items - taken)
    chance[k] = float(np.mean(1 - np.prod(miss, axis=1)))
  return Recall(
    n=len(ranks_N),
    recall={k: float(np.mean(ranks_N <= k)) for k in KS},
    chance=chance,
    median_rank=float(np.median(ranks_N)),
  )
