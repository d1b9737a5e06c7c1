"""Records and texts -> embeddings in bounded chunks: what the evaluations have in common."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

import jax
import numpy as np

from clip_jax import hosts, stopping
from clip_jax.data import records

_T = TypeVar("_T")
_ROWS = 4096  # whose similarities are computed at a time


class EvaluationError(ValueError):
  """An evaluation that would give a wrong figure: which record or text, and why."""


class Model(Protocol):
  """What an evaluation asks of a model; `inference.Clip` is one."""

  def fit(self, image: Any) -> np.ndarray:
    """An image of any kind that `images.as_image` takes -> uint8 [R, R, 3], as the weights ask."""

  @property
  def logit_scale(self) -> float: ...

  def encode_image(self, images: np.ndarray) -> np.ndarray:
    """uint8 [N, R, R, 3] -> unit-norm float32 [N, E]."""

  def tokens(self, texts: list[str], truncate: bool = False) -> Any:
    """N strings as `encode_text` takes them too, made by this process alone.

    Raises: ValueError on one too long, or cuts it.
    """

  def encode_text(self, texts: Any, truncate: bool = False) -> np.ndarray:
    """N strings, or what `tokens` made of them, -> unit-norm float32 [N, E]. Raises: as it."""


@dataclasses.dataclass(frozen=True)
class Stoppable:
  """A model that asks before every batch whether to go on (rule R10: SIGTERM in an evaluation).

  `stopped` may be a collective: all processes ask equally often. Raises: stopping.Stopped.
  """

  model: Model
  stopped: Callable[[], bool]

  @property
  def logit_scale(self) -> float:
    return self.model.logit_scale

  def fit(self, image: Any) -> np.ndarray:
    return self.model.fit(image)

  def tokens(self, texts: list[str], truncate: bool = False) -> Any:
    return self.model.tokens(texts, truncate)

  def encode_image(self, images: np.ndarray) -> np.ndarray:
    self._look()
    return self.model.encode_image(images)

  def encode_text(self, texts: Any, truncate: bool = False) -> np.ndarray:
    self._look()
    return self.model.encode_text(texts, truncate)

  def _look(self) -> None:
    if self.stopped():
      raise stopping.Stopped("asked to stop in an evaluation")


class FeatureModel(Model, Protocol):
  """What a linear probe asks of a model besides."""

  def image_features(self, images: np.ndarray) -> np.ndarray:
    """uint8 [N, R, R, 3] -> float32 [N, D] before the projection, not of unit norm."""


def count(source: records.RecordSource, batch: int, limit: int) -> int:
  """How many records of `source` to evaluate: the first `limit`, or all where it is 0.

  Raises: EvaluationError when that is none, or when `batch` or `limit` make no sense.
  """
  if batch < 1 or limit < 0:
    raise EvaluationError(f"batch {batch} and limit {limit}: want at least 1 and at least 0")
  n = min(limit, len(source)) if limit else len(source)
  if n == 0:
    raise EvaluationError("the source has no records to evaluate; check its path and split")
  return n


def agreed(step: Callable[[], _T]) -> _T:
  """What `step` gives: work of each process by itself, before all go on into a collective.

  Every process must call it. Where it raises a ValueError in one of several, so do all, in the
  words of the first of them: none is left waiting for one that went away. Those that met no such
  error themselves raise an EvaluationError.
  """
  if jax.process_count() == 1:
    return step()
  out: _T | None = None
  own: ValueError | None = None
  try:
    out = step()
  except ValueError as error:
    own = error
  mine = "" if own is None else str(own) or type(own).__name__
  said = hosts.first_said(mine)
  if own is not None and mine == said:
    raise own
  if said:
    raise EvaluationError(said) from own
  return cast(_T, out)


def read(source: records.RecordSource, index: int) -> records.Record:
  """Record `index`. Raises: EvaluationError naming it when it cannot be read."""
  try:
    return source[index]
  except Exception as error:  # of whatever kind: an evaluation must not leave a record out
    where, why = source.locate(index), str(error)
    named = why.startswith(where)  # by the source itself
    raise EvaluationError(why if named else f"{where}: cannot be read ({why})") from error


def image_of(model: Model, source: records.RecordSource, index: int) -> np.ndarray:
  """The image of record `index` as the encoder sees it, uint8 [R, R, 3].

  Raises: EvaluationError naming the record when its image cannot be decoded.
  """
  return _decoded(model, source, index, read(source, index))


def _decoded(
  model: Model, source: records.RecordSource, index: int, record: records.Record
) -> np.ndarray:
  try:
    return model.fit(record.image)
  except Exception as error:
    where = source.locate(index)
    raise EvaluationError(
      f"{where}: image cannot be decoded ({error}); repair or remove the record, because an "
      "evaluation that leaves records out cannot be compared with any other"
    ) from error


def encode_images(
  model: Model,
  source: records.RecordSource,
  n: int,
  batch: int,
  visit: Callable[[int, records.Record], None],
) -> np.ndarray:
  """Embeddings [n, E] of the first n records, `batch` images in memory at a time.

  The last chunk is padded to `batch`, so that a jitted encoder compiles once. `visit` gets each
  index with its record before the image is decoded.
  Raises: EvaluationError naming the record that is bad or whose embedding is not finite.
  """
  return _checked(_images(model, model.encode_image, source, n, batch, visit), source.locate)


def encode_features(
  model: FeatureModel,
  source: records.RecordSource,
  n: int,
  batch: int,
  visit: Callable[[int, records.Record], None],
) -> np.ndarray:
  """The same of the features before the projection: float32 [n, D], of any norm."""
  rows_ND = _images(model, model.image_features, source, n, batch, visit)
  finite = np.isfinite(rows_ND).all(axis=1)
  if not finite.all():
    raise EvaluationError(
      f"{source.locate(int(np.argmin(finite)))}: its features are not finite (as those of "
      f"{(~finite).sum()} of {n}): the weights are broken; evaluate an earlier checkpoint"
    )
  return rows_ND


def _images(
  model: Model,
  encoder: Callable[[np.ndarray], np.ndarray],
  source: records.RecordSource,
  n: int,
  batch: int,
  visit: Callable[[int, records.Record], None],
) -> np.ndarray:
  def prepare(rows: range, own: range) -> np.ndarray:
    chunk = []
    for i in rows:
      record = read(source, i)
      visit(i, record)
      if i in own:
        chunk.append(_decoded(model, source, i, record))
    chunk.extend(chunk[-1:] * (share(batch) - len(own)))
    return np.stack(chunk)

  return _shared(n, batch, prepare, encoder)


def encode_texts(
  model: Model, texts: Sequence[str], batch: int, truncate: bool = False
) -> np.ndarray:
  """Embeddings [N, E] of `texts`, `batch` at a time, the last chunk padded to `batch`.

  Raises: EvaluationError naming the text whose embedding is not finite; as `Model.tokens`.
  """

  def prepare(_: range, own: range) -> Any:
    chunk = [texts[i] for i in own]
    return model.tokens([*chunk, *chunk[-1:] * (share(batch) - len(own))], truncate)

  def encoder(tokens: Any) -> np.ndarray:
    return model.encode_text(tokens, truncate)

  return _checked(_shared(len(texts), batch, prepare, encoder), lambda i: f"text {texts[i]!r}")


def share(batch: int) -> int:
  """How many rows of every chunk of `batch` each host encodes, the last of them as padding."""
  return -(-batch // jax.process_count())


def _shared(
  n: int,
  batch: int,
  prepare: Callable[[range, range], Any],
  encoder: Callable[[Any], Any],
) -> np.ndarray:
  """[n, E]: each process encodes its part of every chunk; all of them know the result.

  `prepare` makes what the encoder takes of this process's rows of a chunk, padded; what it raises
  in one process, all raise. All encode equally often, because a model that lies over several hosts
  asks for it: one without rows in the last chunk encodes its first again.
  """
  out_NE, host, mine = np.zeros((0, 0), np.float32), jax.process_index(), share(batch)
  for start in range(0, n, batch):
    rows = range(start, min(start + batch, n))
    own = rows[host * mine : (host + 1) * mine]
    ready = agreed(functools.partial(prepare, rows, own or rows[:1]))
    rows_bE = _rows(encoder(ready), mine)[: len(own or rows[:1])]
    if not start:
      out_NE = np.zeros((n, rows_bE.shape[1]), np.float32)
    if own:
      out_NE[own.start : own.stop] = rows_bE
  return hosts.sum_over_hosts(out_NE)


def _rows(embeddings: Any, batch: int) -> np.ndarray:
  """What an encoder gave for `batch` inputs, float32 [batch, E]. Raises: EvaluationError."""
  rows_bE = np.asarray(embeddings, np.float32)
  if rows_bE.ndim != 2 or len(rows_bE) != batch:
    raise EvaluationError(f"the encoder gave {rows_bE.shape} for {batch} inputs, not [{batch}, E]")
  return rows_bE


def _checked(rows_NE: np.ndarray, name: Callable[[int], str]) -> np.ndarray:
  """The rows; one that is not finite or not of unit norm is an error."""
  norm_N = np.linalg.norm(rows_NE, axis=1)
  bad = ~(np.abs(norm_N - 1) < 0.01)  # a NaN fails the comparison too
  if bad.any():
    i = int(np.argmax(bad))
    raise EvaluationError(
      f"{name(i)}: its embedding has norm {norm_N[i]}, not 1 (as {bad.sum()} of {len(bad)}); nan "
      "says that the weights are broken: evaluate an earlier checkpoint"
    )
  return rows_NE


def similarities(query_QE: np.ndarray, item_NE: np.ndarray) -> np.ndarray:
  """Cosines [Q, N], float32.

  Summed in float64 and then rounded, so that equal embeddings give equal scores wherever they
  stand in the arrays: float32 sums differ in the last bit between the rows of one product. Some
  queries at a time, so that what is in float64 stays small.
  """
  item_EN = item_NE.astype(np.float64).T
  out_QN = np.empty((len(query_QE), len(item_NE)), np.float32)
  for start in range(0, len(query_QE), _ROWS):
    rows = slice(start, start + _ROWS)
    out_QN[rows] = query_QE[rows].astype(np.float64) @ item_EN
  return out_QN
