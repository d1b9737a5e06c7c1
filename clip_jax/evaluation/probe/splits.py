"""What an encoder gave for records, with their labels as numbers: what a probe learns from."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from clip_jax.data import labels as labels_lib
from clip_jax.data import records
from clip_jax.evaluation import datasets, encoding
from clip_jax.evaluation.probe import features, linear_probe


def labelled(
  found: features.Features,
  source: records.RecordSource,
  classes: Sequence[str],
  several: bool = False,
) -> linear_probe.Split:
  """The features of records of `source`, with labels int64 [N] in the order of `classes`.

  Where an image is of `several` classes, its label is of `labels.join`: int8 [N, C] of 1, 0 and -1.
  Raises: EvaluationError naming the record whose label is no class.
  """
  place = {name: k for k, name in enumerate(classes)}
  out: list[Any] = []
  for index, label in zip(found.indices, found.labels, strict=True):
    try:
      out.append(labels_lib.row(label or "", classes) if several else place[label or ""])
    except (KeyError, labels_lib.LabelError):
      raise encoding.EvaluationError(
        f"{source.locate(int(index))}: label {label!r} is none of the {len(place)} classes "
        f"({', '.join(classes[:3])}, ...)"
      ) from None
  return linear_probe.Split(found.rows_ND, np.array(out, np.int8 if several else np.int64))


def own_validation(
  found: features.Features, source: records.RecordSource, train: linear_probe.Split
) -> tuple[linear_probe.Split, linear_probe.Split | None]:
  """(training, validation), where the training set of a data set holds a validation split.

  `train` is what `labelled` made of both. Without one, or where none of it was encoded: all, None.
  """
  own = source.validation if isinstance(source, datasets.Copy) else ()
  validates = np.isin(found.indices, own)
  if not validates.any():
    return train, None
  return train.take(np.flatnonzero(~validates)), train.take(np.flatnonzero(validates))
