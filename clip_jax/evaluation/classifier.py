"""Zero-shot classifier weights: a prompt set's class embeddings, kept on disk by their content."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from clip_jax import hosts
from clip_jax.evaluation import encoding, prompts

_FORMAT = "classifier/1"  # part of every key: raise it when the same key would mean other values
_BATCHES = 16  # of each process, between two calls of `progress`


def classifier(
  model: encoding.Model,
  prompt_set: prompts.PromptSet,
  cache_dir: str | os.PathLike[str] | None,
  weights_hash: str,
  batch: int,
  progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
  """The embedding of each class of `prompt_set`, unit-norm float32 [C, E]; from the cache if there.

  Encodes some batches of prompts at a time and keeps only the classes' means: the 80,000 of
  ImageNet are never in memory together. Classes of the same names share one embedding, bit for bit.
  Every process must call it with the same arguments; what process 0 finds in its cache decides for
  all of them, and it alone writes. `cache_dir` None: no cache.
  Args: weights_hash, of the weights and all else that `model` computes by; progress, is told how
    many prompts are done and how many there are, after every few batches (not on a cache hit).
  Raises: PromptError for a set without classes, a cache without a weights_hash, or a class whose
    prompts cancel out; EvaluationError naming the text whose embedding is not finite.
  Source: section 3.1.4; that they are kept, section 3.1.2.
  """
  if not prompt_set.names:
    raise prompts.PromptError("no classes: this set takes those of a data source; fill them in")
  if cache_dir is not None and not weights_hash:
    raise prompts.PromptError(
      "weights_hash is empty: the cache could not tell these weights from others'"
    )
  key = cache_key(model, prompt_set, weights_hash)
  folder = None if cache_dir is None else pathlib.Path(cache_dir)
  found_CE = None
  if folder is not None and jax.process_index() == 0:
    found_CE = _load(folder, key, len(prompt_set.names))
  found_CE = _from_first_process(found_CE, len(prompt_set.names))
  if found_CE is not None:
    return found_CE
  class_CE = _encode(model, prompt_set, batch, progress)
  if folder is not None and jax.process_index() == 0:
    _save(folder, key, class_CE)
  return class_CE


def cache_key(model: encoding.Model, prompt_set: prompts.PromptSet, weights_hash: str) -> str:
  """sha256 over all that the class embeddings depend on.

  The platform is part of it, because what is bfloat16 on a TPU is float32 on a CPU. A model may be
  without a tokenizer of its own; then `weights_hash` must tell.
  """
  tokenizer = getattr(getattr(model, "tokenizer", None), "fingerprint", "")
  parts = [_FORMAT, weights_hash, prompt_set.fingerprint, tokenizer, jax.default_backend()]
  return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()


def _from_first_process(found_CE: np.ndarray | None, classes: int) -> np.ndarray | None:
  """What process 0 has, on every process. All of them make the same calls, whatever they have."""
  width = 0 if found_CE is None else found_CE.shape[1]
  width = int(hosts.sum_over_hosts(np.array([width], np.int32))[0])  # 0 on all but the first
  if width == 0:
    return None
  mine_CE = np.zeros((classes, width), np.float32) if found_CE is None else found_CE
  return hosts.sum_over_hosts(mine_CE)


def _encode(
  model: encoding.Model,
  prompt_set: prompts.PromptSet,
  batch: int,
  progress: Callable[[int, int], None] | None,
) -> np.ndarray:
  """[C, E], encoded some classes at a time."""
  index_of = {own: i for i, own in enumerate(dict.fromkeys(prompt_set.names))}
  templates = prompt_set.templates
  total, done, parts = sum(map(len, index_of)) * len(templates), 0, []
  for group in _groups(tuple(index_of), len(templates), _BATCHES * batch * jax.process_count()):
    parts.append(
      prompts.ensemble(lambda texts: encoding.encode_texts(model, texts, batch), group, templates)
    )
    done += sum(map(len, group)) * len(templates)
    if progress is not None:
      progress(done, total)
  return np.concatenate(parts)[[index_of[own] for own in prompt_set.names]]


def _groups(
  names: Sequence[tuple[str, ...]], templates: int, most: int
) -> Iterator[list[tuple[str, ...]]]:
  """Whole classes of at most `most` prompts together; at least one class."""
  group: list[tuple[str, ...]] = []
  size = 0
  for own in names:
    if group and size + len(own) * templates > most:
      yield group
      group, size = [], 0
    group.append(own)
    size += len(own) * templates
  yield group


def _load(folder: pathlib.Path, key: str, classes: int) -> np.ndarray | None:
  """The embeddings kept under `key`, or None; a file that is not as it was written is removed.

  A file's name ends in the start of the sha256 of its bytes, so one rename makes it valid.
  """
  for path in sorted(folder.glob(f"{key}.*.npy")):
    try:
      content = path.read_bytes()
      if path.name == _name(key, content):
        class_CE = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        if class_CE.dtype == np.float32 and class_CE.ndim == 2 and len(class_CE) == classes:
          return class_CE
      path.unlink()
    except (OSError, ValueError):
      continue
  return None


def _save(folder: pathlib.Path, key: str, class_CE: np.ndarray) -> None:
  """Writes all of it or nothing. A full disk loses no result: it is a warning."""
  buffer = io.BytesIO()
  np.lib.format.write_array(buffer, class_CE, allow_pickle=False)
  content = buffer.getvalue()
  temporary = folder / f"{key}.{os.getpid()}.tmp"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(content)
    os.replace(temporary, folder / _name(key, content))
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink()
    warnings.warn(
      f"{folder}: classifier weights not kept ({error.strerror}); they will be computed again",
      RuntimeWarning,
      stacklevel=3,
    )


def _name(key: str, content: bytes) -> str:
  return f"{key}.{hashlib.sha256(content).hexdigest()[:16]}.npy"
