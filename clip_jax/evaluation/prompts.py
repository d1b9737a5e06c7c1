"""Class names and prompt templates by dataset or from a file, and the class embeddings of them."""

import collections
import dataclasses
import functools
import hashlib
import importlib.resources
import json
import os
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from clip_jax.data import scenes

_FOLDER = importlib.resources.files("clip_jax") / "assets" / "prompts"


class PromptError(ValueError):
  """Classes or templates that no prompts can be made of: which, and why."""


def _refuse_repeated(what: str, values: Sequence[str]) -> None:
  repeated = [value for value, times in collections.Counter(values).items() if times > 1]
  if repeated:
    raise PromptError(f"{what} that stand more than once: {', '.join(map(repr, repeated[:5]))}")


def _check_template(template: str) -> None:
  if template.count("{}") != 1:
    raise PromptError(f"template {template!r}: wants {{}} once, where the class name goes")


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """The classes of a dataset in plain words, and the sentences they are put into at `{}`.

  Attributes:
    classes: what each class is called in results, none twice. Empty: those of the data source.
    held_out: classes that training never shows as such.
    synonyms: of each class, the names it has in the prompts. Empty: what it is called in results.
  Raises: PromptError naming the class or template that no prompt can be made of.
  """

  classes: tuple[str, ...]
  templates: tuple[str, ...]
  held_out: tuple[str, ...] = ()
  synonyms: tuple[tuple[str, ...], ...] = ()

  def __post_init__(self) -> None:
    _refuse_repeated("classes", self.classes)
    if not self.templates:
      raise PromptError("no templates: want one or more")
    for template in self.templates:
      _check_template(template)
    if self.synonyms and len(self.synonyms) != len(self.classes):
      raise PromptError(f"{len(self.synonyms)} lists of names for {len(self.classes)} classes")
    for shown, own in zip(self.classes, self.names, strict=True):
      if not own:
        raise PromptError(f"class {shown!r} has no names, so it would have no prompts")

  @property
  def names(self) -> tuple[tuple[str, ...], ...]:
    """Of each class, the names that are put into the templates."""
    return self.synonyms or tuple((name,) for name in self.classes)

  @property
  def fingerprint(self) -> str:
    """sha256 over names and templates in their order: the same where all prompts are the same."""
    content = json.dumps(["prompts/1", self.names, self.templates])
    return hashlib.sha256(content.encode("utf-8")).hexdigest()


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

_FASHION_MNIST_TEMPLATES = (
  "{}",
  "a photo of {}",
  "a small photo of {}",
  "a grey photo of {}",
  "a black and white picture of {}",
  "{} on a black background",
  "{} in a shop's catalogue",
  "a picture of {} for sale",
)

# All sentences are this project's own. A class is called what the captions call it, because a small
# model has not read other words (trousers are a "pair of" them there: with the bare word 70 % of
# them are found, with these 98 %), and stands without an article: "a ankle boot" is in no caption.
SETS: Mapping[str, PromptSet] = types.MappingProxyType(
  {
    "scenes": PromptSet(scenes.COMPOSITIONS, scenes.SCENE_TEMPLATES, scenes.HELD_OUT),
    "digits": PromptSet(scenes.DIGIT_CLASSES, scenes.DIGIT_TEMPLATES),
    "fashion_mnist": PromptSet(_FASHION_MNIST, _FASHION_MNIST_TEMPLATES),
    # with the captions' articles, for models that read a sentence from its start
    "fashion_mnist_captions": PromptSet(
      _FASHION_MNIST,
      _FASHION_MNIST_TEMPLATES,
      synonyms=tuple((f"{'an' if name[0] in 'aeiou' else 'a'} {name}",) for name in _FASHION_MNIST),
    ),
    "stamps": PromptSet(
      (),
      ("{}", "clip art of {}", "a picture of {}", "a {}"),
    ),
  }
)


@functools.cache
def published() -> tuple[str, ...]:
  """The paper's datasets, for `named`. Their data and its sources: assets/prompts/README.md."""
  files = (file.name for file in _FOLDER.iterdir())
  return tuple(sorted(name.removesuffix(".json") for name in files if name.endswith(".json")))


def named(name: str) -> PromptSet:
  """The prompt set of that name, in `SETS` or `published()`.

  Published sets are as published, also where that is odd: two classes of ImageNet may have the same
  name. In `classes` such a name gets its label's number, as "missile (657)".
  Raises: PromptError listing the names there are.
  """
  if name in SETS:
    return SETS[name]
  if name in published():
    return _published(name)
  raise PromptError(
    f"prompts {name!r}: no such set; choose one of {', '.join(sorted(SETS))}, or of the paper's: "
    f"{', '.join(published())}"
  )


@functools.cache
def _published(name: str) -> PromptSet:
  return _parsed(json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8")), strict=False)


def read(path: str | os.PathLike[str], templates: Sequence[str] = ()) -> PromptSet:
  """One's own classes and templates.

  A file NAME.json holds {"classes": [...], "templates": [...]}, where a class is a name or a list
  of names; any other file holds one class a line. `templates` are for a file that has none.
  Two classes of one name are refused, because no model can tell them apart; so are names that
  differ by case and spaces alone, which the tokenizer reads alike.
  Raises: PromptError naming the file and what is wrong in it; OSError.
  """
  path = pathlib.Path(path)
  if isinstance(templates, str):
    raise PromptError("templates are a list of strings, not one string")
  try:
    text = path.read_bytes().decode("utf-8-sig")
    page = json.loads(text) if path.suffix == ".json" else {"classes": text.splitlines()}
    if not isinstance(page, dict):
      raise PromptError('want {"classes": [...], "templates": [...]}')
    if templates and "templates" in page:
      raise PromptError("it has templates of its own; give none beside it")
    return _parsed({**({"templates": list(templates)} if templates else {}), **page}, strict=True)
  except UnicodeDecodeError as error:
    raise PromptError(f"{path}: no text in UTF-8 (byte {error.start:,}); save it as such") from None
  except json.JSONDecodeError as error:
    raise PromptError(f"{path}: line {error.lineno} is no JSON ({error.msg})") from None
  except PromptError as error:
    raise PromptError(f"{path}: {error}") from None


_KEYS = ("classes", "templates", "name", "source", "order")  # the last three are for people


def _parsed(page: Mapping[str, Any], strict: bool) -> PromptSet:
  """A page of JSON -> its set. strict: a repeated name or template is a mistake."""
  unknown = [key for key in page if key not in _KEYS]
  if unknown:
    raise PromptError(f"{unknown[0]!r} is none of {', '.join(_KEYS)}")
  for key in ("classes", "templates"):
    if not isinstance(page.get(key), list) or not page[key]:
      raise PromptError(f"no {key}: want one or more, as a list")
  synonyms = tuple(_names(number, entry) for number, entry in enumerate(page["classes"], start=1))
  templates = tuple(_text("template", n, t) for n, t in enumerate(page["templates"], start=1))
  if strict:
    _refuse_repeated("class names", [" ".join(n.lower().split()) for c in synonyms for n in c])
    _refuse_repeated("templates", templates)
  times = collections.Counter(names[0] for names in synonyms)
  classes = tuple(
    f"{names[0]} ({label})" if times[names[0]] > 1 else names[0]
    for label, names in enumerate(synonyms)
  )
  return PromptSet(classes, templates, synonyms=synonyms)


def _names(number: int, entry: Any) -> tuple[str, ...]:
  if isinstance(entry, list) and not entry:
    raise PromptError(f"class {number} is an empty list, so it would have no prompts")
  return tuple(
    _text("class", number, name) for name in (entry if isinstance(entry, list) else [entry])
  )


def _text(kind: str, number: int, value: Any) -> str:
  """A name or template as it is. Raises: PromptError where a prompt would not be what it seems."""
  if not isinstance(value, str):
    raise PromptError(f"{kind} {number} is {value!r}, not text; put it in quotes")
  if not value.strip():
    raise PromptError(f"{kind} {number} is empty; remove it (an empty line?)")
  if value != value.strip() or "\t" in value or len(value.splitlines()) > 1:
    raise PromptError(f"{kind} {number} is {value!r}: remove the spaces around it, tabs and breaks")
  return value


def ensemble(
  encode_text: Callable[[list[str]], Any],
  names: Sequence[Sequence[str]],
  templates: Sequence[str],
) -> np.ndarray:
  """One unit-norm embedding per class, float32 [C, E], from all names of the class.

  Every name of a class is put into every template; the class embedding is the mean of the
  L2-normalised embeddings of all these texts, normalised again: it costs no more to use than a
  single prompt. So each of three synonyms counts a third.
  Raises: PromptError for a class whose embedding is not finite.
  Source: section 3.1.4; OpenAI's notebook Prompt_Engineering_for_ImageNet for classes of one name.
    How OpenAI joined FER2013's synonyms is not published: this is what facebookresearch/SLIP does
    in eval_zeroshot.py. CLIP_benchmark knows one name a class, so its FER2013 has other prompts.
  """
  texts = [t.replace("{}", name) for own in names for name in own for t in templates]
  text_NE = _normalised(np.asarray(encode_text(texts), np.float32), lambda i: f"text {texts[i]!r}")
  ends = np.cumsum([len(own) * len(templates) for own in names])
  mean_CE = np.stack([rows_TE.mean(axis=0) for rows_TE in np.split(text_NE, ends[:-1])])
  return _normalised(mean_CE, lambda c: f"class {names[c][0]!r}")


def class_embeddings(
  encode_text: Callable[[list[str]], Any], classes: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
  """`ensemble` for classes of one name each, float32 [C, E].

  Raises: PromptError for empty or repeated classes, a template without `{}`, or a class whose
    embedding is not finite.
  """
  if isinstance(classes, str) or isinstance(templates, str):
    raise PromptError("classes and templates are lists of strings, not one string")
  if not classes or not templates:
    raise PromptError(
      f"{len(classes)} classes and {len(templates)} templates: want one or more of each"
    )
  return ensemble(encode_text, PromptSet(tuple(classes), tuple(templates)).names, templates)


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
