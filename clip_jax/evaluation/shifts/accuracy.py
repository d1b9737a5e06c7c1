"""Accuracies under shifts that have fewer classes than ImageNet, and those of video frames."""

from collections.abc import Sequence

import numpy as np

from clip_jax.evaluation import scores
from clip_jax.evaluation.shifts.robustness import ShiftError


def restrict(logits_NC: np.ndarray, members: Sequence[Sequence[int]]) -> np.ndarray:
  """Logits [N, C] over ImageNet's classes -> [N, K] over a shift's: the best of each one's members.

  Args: members, for each of the K classes the ImageNet classes that count as it (one for
    ImageNet-A and -R; some classes of ObjectNet and of the videos have several).
  Raises: ShiftError for a class without members, out of range, or in two classes.
  """
  flat = [index for own in members for index in own]
  empty = [k for k, own in enumerate(members) if not len(own)]
  if empty or not members:
    raise ShiftError(f"class {empty[0] if empty else 0} of the shift stands for no class")
  classes = logits_NC.shape[1]
  if len(set(flat)) < len(flat) or not all(0 <= index < classes for index in flat):
    raise ShiftError(f"members must be classes 0 to {classes - 1}, each in one class at most")
  return np.stack([logits_NC[:, list(own)].max(axis=1) for own in members], axis=1)


def correct(logits_NK: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """bool [N]: the label comes first, by the order of `scores.ranks`. Raises: EvaluationError."""
  return scores.ranks(logits_NK, labels) == 1


def restricted_accuracy(
  logits_NC: np.ndarray, labels: np.ndarray, members: Sequence[Sequence[int]]
) -> tuple[float, int]:
  """ImageNet's accuracy on a shift's classes alone, and on how many images: what compares with it.

  Images of other classes are left out, and the logits restricted. `labels` are ImageNet's.
  Raises: ShiftError when no image is left. Source: section 3.3 ("class subsampled").
  """
  class_of = {index: k for k, own in enumerate(members) for index in own}
  kept = [n for n, label in enumerate(labels) if int(label) in class_of]
  if not kept:
    raise ShiftError("no image is of any of the shift's classes; are the labels ImageNet's 0-999?")
  own = np.array([class_of[int(labels[n])] for n in kept])
  return float(correct(restrict(logits_NC[kept], members), own).mean()), len(kept)


def pm_accuracy(
  correct_N: np.ndarray, groups: Sequence[object], offsets: Sequence[int], k: int
) -> float:
  """PM-k of video frames: the share of anchors all of whose frames, k or less away, are right.

  Args: of each frame, whether it is right, its group (an anchor frame with the similar ones around
    it) and its distance from the anchor in frames, of either sign, 0 for the anchor. PM-0 is the
    accuracy on anchors.
  Raises: ShiftError unless every group has exactly one anchor.
  Source: Shankar et al. 2019 (arXiv 1906.02168); table 16's PM0 and PM10.
  """
  right: dict[object, bool] = {}
  anchors: dict[object, int] = {}
  for ok, group, offset in zip(correct_N, groups, offsets, strict=True):
    anchors[group] = anchors.get(group, 0) + (offset == 0)
    if abs(offset) <= k:
      right[group] = right.get(group, True) and bool(ok)
  wrong = [group for group, count in anchors.items() if count != 1]
  if wrong or not anchors or k < 0:
    what = f"k {k} and {len(anchors)} groups"
    if wrong:
      what = f"group {wrong[0]!r} has {anchors[wrong[0]]} anchors"
    raise ShiftError(f"{what}: want frames in groups with one anchor (offset 0) each, and k >= 0")
  return sum(right.values()) / len(anchors)
