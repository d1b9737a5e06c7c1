"""Image and text embeddings together in the plane."""

import dataclasses

import numpy as np

from clip_jax.evaluation import zero_shot

MAX_CLASSES = 10  # more colours than this cannot be told apart

HOW = {
  "pca": "Principal components, after each modality was centred on its own mean: images and texts "
  "lie in different regions of the space, and else the first axis would show only that. "
  "Images and texts weigh the same in the choice of the axes, whatever their numbers.",
  "tsne": "t-SNE, after each modality was centred on its own mean and scaled back to unit norm. "
  "Neighbours are to be trusted, distances between far groups are not.",
}


@dataclasses.dataclass(frozen=True)
class EmbeddingMap:
  """Points in the unit square, y upwards, with the class of each as an index into `classes`."""

  title: str
  how: str  # in words, for the reader
  classes: tuple[str, ...]
  image_N2: np.ndarray
  image_classes: np.ndarray  # int [N]
  text_C2: np.ndarray  # one of each class


def project(result: zero_shot.ZeroShotResult, method: str = "tsne", seed: int = 0) -> EmbeddingMap:
  """A map of the result's image sample and its class prompts, at most `MAX_CLASSES` of them.

  Of more classes that have images in the sample, evenly spaced ones are shown.
  Args: method, "pca" or "tsne".
  Raises: ValueError on another method.
  """
  if method not in HOW:
    raise ValueError(f"method {method!r}: choose 'pca' or 'tsne'")
  present = np.unique(result.sample_labels)
  if len(present) > MAX_CLASSES:
    present = present[np.linspace(0, len(present) - 1, MAX_CLASSES).round().astype(int)]
  chosen = np.isin(result.sample_labels, present)
  image_NE, text_CE = result.sample_NE[chosen], result.class_CE[present]
  image_NE, text_CE = _centred(image_NE), _centred(text_CE)
  points_M2 = _pca(image_NE, text_CE) if method == "pca" else _tsne(image_NE, text_CE, seed)
  low, high = points_M2.min(axis=0), points_M2.max(axis=0)
  points_M2 = (points_M2 - low) / np.where(high > low, high - low, 1)
  shown = (
    f"{len(present)} of {len(result.classes)} classes; "
    if len(present) < len(result.classes)
    else ""
  )
  return EmbeddingMap(
    title=result.name,
    how=f"{shown}{len(image_NE):,} images. {HOW[method]}",
    classes=tuple(result.classes[i] for i in present),
    image_N2=points_M2[: len(image_NE)],
    image_classes=np.searchsorted(present, result.sample_labels[chosen]),
    text_C2=points_M2[len(image_NE) :],
  )


def _centred(rows_NE: np.ndarray) -> np.ndarray:
  return rows_NE.astype(np.float64) - rows_NE.mean(axis=0, keepdims=True, dtype=np.float64)


def _unit(rows_NE: np.ndarray) -> np.ndarray:
  return rows_NE / np.maximum(np.linalg.norm(rows_NE, axis=1, keepdims=True), 1e-12)


def _pca(image_NE: np.ndarray, text_CE: np.ndarray) -> np.ndarray:
  """The first two principal axes of both modalities at equal weight; [N + C, 2]."""
  weighted = [rows / max(np.sqrt((rows**2).sum()), 1e-12) for rows in (image_NE, text_CE)]
  axes_EE = np.linalg.svd(np.concatenate(weighted), full_matrices=False)[2]
  points_M2 = np.zeros((len(image_NE) + len(text_CE), 2))
  found = np.concatenate([image_NE, text_CE]) @ axes_EE[:2].T
  points_M2[:, : found.shape[1]] = found
  return points_M2


def _tsne(image_NE: np.ndarray, text_CE: np.ndarray, seed: int) -> np.ndarray:
  import threadpoolctl  # comes with scikit-learn, which takes a second to import
  from sklearn import manifold

  image_NE, text_CE = _unit(image_NE), _unit(text_CE)
  start_M2 = _pca(image_NE, text_CE)
  spread = start_M2[:, 0].std()
  if len(start_M2) <= 3 or spread < 1e-6:  # too few points, or all in one place
    return start_M2
  points_ME = np.concatenate([image_NE, text_CE]).astype(np.float32)
  tsne = manifold.TSNE(
    perplexity=min(30.0, (len(start_M2) - 1) / 3),
    init=(start_M2 / spread * 1e-4).astype(np.float32),
    random_state=seed,
  )
  with threadpoolctl.threadpool_limits(
    1, "openmp"
  ):  # its threads spin: slow where cores are shared
    return np.asarray(tsne.fit_transform(points_ME), np.float64)
