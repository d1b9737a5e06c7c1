"""Weights of other frameworks -> ours, and ours -> theirs: arrays by name, through `naming`.

Every array of theirs must be used and every one of ours filled; all that does not fit is collected
and told together. Ours are float32: half precision is widened, which changes no value; float64 is
rounded.
"""

import concurrent.futures
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.config import Model
from clip_jax.interop import archive
from clip_jax.interop.architecture import WeightsError
from clip_jax.interop.naming import Weight
from clip_jax.models.clip import CLIP

# Arrays that hold no weight: sizes, masks and positions written out, counts of training batches.
_NO_WEIGHT = re.compile(
  r"(input_resolution|context_length|vocab_size|attn_mask|.*\.num_batches_tracked"
  r"|.*embeddings\.position_ids)"
)
_MOST_PROBLEMS = 20  # told one by one


def abstract_variables(model: Model) -> dict[str, Any]:
  """{"params": ..., "batch_stats": ...} as shapes; the second only where the model has it."""
  image, text = model.image, model.text
  image_BRR3 = jax.ShapeDtypeStruct((1, image.resolution, image.resolution, 3), jnp.float32)
  tokens_BL = jax.ShapeDtypeStruct((1, text.context_length), jnp.int32)
  return jax.eval_shape(CLIP(model).init, jax.random.key(0), image_BRR3, tokens_BL)


def to_ours(
  arrays: Mapping[str, np.ndarray], table: Sequence[Weight], model: Model
) -> dict[str, Any]:
  """Their arrays -> our variables (nested dicts of float32 arrays).

  Raises: WeightsError naming every array that is missing, surplus, or of another shape or dtype,
    before a number is read or memory taken; then every one that is not finite.
  """
  shapes = {path: leaf.shape for path, leaf in flat(abstract_variables(model)).items()}
  used = {name for weight in table for name in weight.theirs}
  filled = {path for weight in table for path in weight.ours}
  problems = [problem for weight in table for problem in _misfits(shapes, weight, arrays)]
  surplus = [name for name in arrays if name not in used and not _NO_WEIGHT.fullmatch(name)]
  problems += [f"{name} is not part of this model" for name in surplus]
  problems += [f"nothing fills our {path}" for path in shapes.keys() - filled]
  _refuse(problems)
  out = {path: _empty(shape) for path, shape in shapes.items()}

  def place(weight: Weight) -> list[str]:
    theirs = [arrays[name] for name in weight.theirs]
    found = _fill(out, weight, theirs)
    for array in theirs:
      archive.release(array)
    return found

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # NumPy lets threads copy
    _refuse([problem for found in pool.map(place, table) for problem in found])
  return nested(out)


def _refuse(problems: list[str]) -> None:
  if problems:
    rest = len(problems) - _MOST_PROBLEMS
    more = f"; and {rest} more" if rest > 0 else ""
    raise WeightsError("; ".join(problems[:_MOST_PROBLEMS]) + more)


def _empty(shape: tuple[int, ...]) -> np.ndarray:
  """float32 at an address divisible by 64: JAX's CPU device then takes it without a copy."""
  size = 4 * math.prod(shape)
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start : start + size].view(np.float32).reshape(shape)


def _misfits(
  shapes: Mapping[str, tuple[int, ...]], weight: Weight, arrays: Mapping[str, np.ndarray]
) -> list[str]:
  """What is wrong with the arrays of one table entry by their names, dtypes and shapes."""
  problems = [f"{name} is missing" for name in weight.theirs if name not in arrays]
  unknown = [path for path in weight.ours if path not in shapes]
  problems += [f"{weight.theirs[0]} has no place in this model" for _ in unknown]
  if problems:
    return problems
  theirs = [arrays[name] for name in weight.theirs]
  for name, array in zip(weight.theirs, theirs, strict=True):
    if not jnp.issubdtype(array.dtype, jnp.floating):
      problems.append(f"{name} is {array.dtype}, not floating point")
  if problems:
    return problems
  names, given = ", ".join(weight.theirs), ", ".join(str(list(array.shape)) for array in theirs)
  try:  # with one byte in all places
    ours = weight.layout.to_ours([np.broadcast_to(np.int8(0), array.shape) for array in theirs])
  except (ValueError, IndexError):
    return [f"{names} has shape {given}, which cannot be laid out as {weight.ours[0]}"]
  for path, value in zip(weight.ours, ours, strict=True):
    wanted = shapes[path] if weight.layer is None else shapes[path][1:]
    if value.shape != wanted:
      return [f"{names} has shape {given}, which gives {path} {value.shape}, not {wanted}"]
  return []


def _fill(out: dict[str, np.ndarray], weight: Weight, theirs: list[np.ndarray]) -> list[str]:
  """Writes one table entry, which fits, into its place. Returns: which numbers are none."""
  problems = []
  for name, array in zip(weight.theirs, theirs, strict=True):
    if not _is_finite(array):
      problems.append(f"{name} holds NaN or infinity")
    elif name.endswith("running_var") and array.min() < 0:
      problems.append(f"{name} holds a negative variance")
  if problems:
    return problems
  for path, value in zip(weight.ours, weight.layout.to_ours(theirs), strict=True):
    target = out[path] if weight.layer is None else out[path][weight.layer]
    target[...] = value
  return []


def _is_finite(array: np.ndarray) -> bool:
  """Whether no element is NaN or infinite. A sum tells in one pass, if it does not overflow."""
  with np.errstate(over="ignore", invalid="ignore"):
    total = np.sum(array, dtype=np.float32)
    return bool(np.isfinite(total)) or bool(np.isfinite(array.astype(np.float32)).all())


def to_theirs(variables: Mapping[str, Any], table: Sequence[Weight]) -> dict[str, np.ndarray]:
  """Our variables -> their arrays, contiguous float32. Raises: WeightsError on NaN or infinity."""
  leaves = finite(variables)
  out: dict[str, np.ndarray] = {}
  for weight in table:
    ours = [leaves[path] for path in weight.ours]
    if weight.layer is not None:
      ours = [array[weight.layer] for array in ours]
    theirs = weight.layout.to_theirs(ours)
    for name, array in zip(weight.theirs, theirs, strict=True):
      out[name] = np.ascontiguousarray(array).reshape(array.shape)  # a scalar stays a scalar
  return out


def finite(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Our leaves by path, on the host. Raises: WeightsError on NaN or infinity."""
  leaves = {path: np.asarray(leaf) for path, leaf in flat(variables).items()}
  bad = [path for path, leaf in leaves.items() if not _is_finite(leaf)]
  if bad:
    raise WeightsError(f"these weights hold NaN or infinity: {', '.join(bad[:_MOST_PROBLEMS])}")
  return leaves


def flat(tree: Any) -> dict[str, Any]:
  """Nested dicts -> leaves by path, as "params/image/ln_pre/scale"."""
  named: Iterable[tuple[Any, Any]] = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in named}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Inverse of `flat`."""
  out: dict[str, Any] = {}
  for path, value in leaves.items():
    *groups, name = path.split("/")
    group = out
    for part in groups:
      group = group.setdefault(part, {})
    group[name] = value
  return out
