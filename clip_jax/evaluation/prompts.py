"""Class names and prompt templates by dataset, and the class embeddings made of them."""

import collections
import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clip_jax.data import scenes


class PromptError(ValueError):
  """Classes or templates that no prompts can be made of: which, and why."""


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """The classes of a dataset in plain words, and the sentences they are put into at `{}`.

  Where `classes` is empty they are those of the data source. `held_out` are classes that training
  never shows as such.
  """

  classes: tuple[str, ...]
  templates: tuple[str, ...]
  held_out: tuple[str, ...] = ()


_FASHION_MNIST = (
  "t-shirt",
  "pair of trousers",
  "pullover",
  "dress",
  "coat",
  "sandal",
  "shirt",
  "sneaker",
  "bag",
  "ankle boot",
)

# All sentences are this project's own. A class is called what the captions call it, because a small
# model has not read other words (trousers are a "pair of" them there: with the bare word 70 % of
# them are found, with these 98 %), and stands without an article: "a ankle boot" is in no caption.
SETS: Mapping[str, PromptSet] = types.MappingProxyType(
  {
    "scenes": PromptSet(scenes.COMPOSITIONS, scenes.SCENE_TEMPLATES, scenes.HELD_OUT),
    "digits": PromptSet(scenes.DIGIT_CLASSES, scenes.DIGIT_TEMPLATES),
    "fashion_mnist": PromptSet(
      _FASHION_MNIST,
      (
        "{}",
        "a photo of {}",
        "a small photo of {}",
        "a grey photo of {}",
        "a black and white picture of {}",
        "{} on a black background",
        "{} in a shop's catalogue",
        "a picture of {} for sale",
      ),
    ),
    "stamps": PromptSet(
      (),
      ("{}", "clip art of {}", "a picture of {}", "a {}"),
    ),
  }
)


def named(name: str) -> PromptSet:
  """The prompt set of that name. Raises: PromptError listing the names there are."""
  if name not in SETS:
    raise PromptError(f"prompts {name!r}: no such set; choose one of {', '.join(sorted(SETS))}")
  return SETS[name]


def class_embeddings(
  encode_text: Callable[[list[str]], Any], classes: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
  """One unit-norm embedding per class, float32 [C, E]: the ensemble over templates.

  Every class is put into every template; the class embedding is the mean of the L2-normalised
  embeddings of these texts, normalised again: it costs no more to use than a single prompt.
  Raises: PromptError for empty or repeated classes, a template without `{}`, or a class whose
    embedding is not finite.
  Source: section 3.1.4.
  """
  _check(classes, templates)
  texts = [template.replace("{}", name) for name in classes for template in templates]
  text_NE = _normalised(np.asarray(encode_text(texts), np.float32), lambda i: f"text {texts[i]!r}")
  class_CE = text_NE.reshape(len(classes), len(templates), -1).mean(axis=1)
  return _normalised(class_CE, lambda c: f"class {classes[c]!r}")


def _normalised(rows_NE: np.ndarray, name: Callable[[int], str]) -> np.ndarray:
  """Rows of unit norm. Raises: PromptError naming the row that has no direction."""
  norm_N1 = np.linalg.norm(rows_NE, axis=1, keepdims=True)
  bad = ~((norm_N1[:, 0] > 1e-6) & np.isfinite(norm_N1[:, 0]))
  if bad.any():
    i = int(np.argmax(bad))
    raise PromptError(
      f"{name(i)}: its embedding has norm {norm_N1[i, 0]}, so it has no direction; the weights are "
      "broken: evaluate an earlier checkpoint"
    )
  return rows_NE / norm_N1


def _check(classes: Sequence[str], templates: Sequence[str]) -> None:
  """Raises: PromptError naming what no prompts can be made of."""
  if isinstance(classes, str) or isinstance(templates, str):
    raise PromptError("classes and templates are lists of strings, not one string")
  if not classes or not templates:
    raise PromptError(
      f"{len(classes)} classes and {len(templates)} templates: want one or more of each"
    )
  repeated = [name for name, times in collections.Counter(classes).items() if times > 1]
  if repeated:
    raise PromptError(f"classes that stand more than once: {', '.join(map(repr, repeated))}")
  for template in templates:
    if template.count("{}") != 1:
      raise PromptError(f"template {template!r}: wants {{}} once, where the class name goes")
