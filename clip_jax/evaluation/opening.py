"""A data set's split from whatever copy of it is on this machine, or how to get one.

Nothing is fetched, and a data set that is not here is an error: no evaluation passes it over.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from clip_jax.data import labels, records
from clip_jax.evaluation import copies
from clip_jax.evaluation.datasets import Copy, Dataset, DatasetError, NotAvailable, how_to_get


def open_dataset(
  dataset: Dataset,
  split: str,
  roots: Sequence[str | os.PathLike[str]],
  classes: Sequence[str] = (),
  fold: int = 0,
) -> Copy:
  """A split of a data set, "train" or "test", from the first copy of it below the roots.

  TFDS comes first, then WebDataset, a folder of images, ArrayRecord. `classes` are the names to
  give to its classes, in the order of its prompt set; without them they are the copy's own. `fold`
  counts from 1: one of the predefined ones of STL10's train and of UCF101; 0 is all, or the first.
  Raises: NotAvailable when no copy has the split; DatasetError for a copy that is there and cannot
    be used, or has no records.
  """
  if split not in ("train", "test"):
    raise DatasetError(f"{dataset.key}: no split {split!r}; choose train or test")
  if classes and dataset.classes and len(classes) != dataset.classes:
    raise DatasetError(
      f"{dataset.key}: {len(classes)} classes given, it has {dataset.classes}; give each its name"
    )
  if not 0 <= fold <= (dataset.folds if dataset.folds > 1 else 0):
    raise DatasetError(f"{dataset.key}: no fold {fold}; it has {dataset.folds}, counted from 1")
  if dataset.rule == "fold_indices" and split == "test":
    fold = 0  # all folds are tested on the same images
  wanted = copies.Wanted(dataset, split, tuple(classes), fold, [])
  for find in (copies.in_tfds, copies.in_wds, copies.in_folder, copies.in_array_record):
    for root in map(pathlib.Path, roots):
      try:
        copy = find(wanted, root)
      except (records.RecordError, labels.LabelError, OSError) as error:
        raise DatasetError(f"{dataset.key} {split}: {error}") from error
      if copy is not None:
        return _noted(copy)
  places = ", ".join(map(str, roots)) or "no folder"
  reasons = "".join(f"; {reason}" for reason in wanted.missing)
  raise NotAvailable(
    f"{dataset.key} {split}: not available in {places}{reasons}. To get it: "
    f"{how_to_get(dataset, split)}"
  )


def _noted(copy: Copy) -> Copy:
  """With notes on its size. Raises: DatasetError when it is empty."""
  dataset, split, found = copy.dataset, copy.split, len(copy)
  if not found:
    raise DatasetError(f"{dataset.key} {split}: {copy.place} has no records; get the data anew")
  notes, size = [*copy.notes, dataset.note], dataset.size(split)
  if size is not None and size != found:
    notes.insert(0, f"the paper's {split} split has {size:,} records, this copy has {found:,}")
  return dataclasses.replace(copy, notes=tuple(filter(None, notes)))
