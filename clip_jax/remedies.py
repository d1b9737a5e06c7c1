"""What would make a training step fit that does not: options that save memory, a smaller batch."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from clip_jax import config as config_lib
from clip_jax import sharding
from clip_jax.preflight import DoesNotFit, Report

# The command-line options, the config, and its report; or why the options are not offered.
Tried = tuple[str, config_lib.Config, Report | DoesNotFit | str]

_REMATS = ("none", "dots", "tuned", "full")  # from the most memory to the least
_RING_PAIRS = 2**17  # from here on the loss's share of the memory is worth a ring


def search(
  config: config_lib.Config,
  parts: int,
  too_large: DoesNotFit,
  measure: Callable[[config_lib.Config], Report],
) -> Iterator[Tried]:
  """What would make a program fit, in turn, each as it is found.

  First less memory for the same batch, each way until one fits: recomputation, weights over the
  devices, microbatches; each keeps what the ones before it changed. A way that the mesh or the
  weights do not divide for is passed over. Then the largest batch of this config that fits.
  Args: parts, devices that split the batch; measure, compiles a config, raises DoesNotFit and
    ShardingError.
  """
  kept, options = config, {}
  for key, value in _changes(config, parts):
    if key == "mesh.fsdp" and key in options:  # a larger one was possible
      continue
    changed = _with(kept, key, value)
    try:
      found: Report | DoesNotFit = measure(changed)
    except DoesNotFit as error:
      found = error
    except sharding.ShardingError:
      continue
    kept, options[key] = changed, value
    yield " ".join(f"--config.{key}={value}" for key, value in options.items()), kept, found
    if isinstance(found, Report):
      break
  else:
    if not _takes_microbatches(config):
      yield "microbatches", config, "batch normalisation is over the whole batch"
  yield from _largest_batch(config, parts, too_large, measure)


def _changes(config: config_lib.Config, parts: int) -> Iterator[tuple[str, Any]]:
  """(key, value), cheapest first."""
  more = _REMATS[_REMATS.index(config.model.remat) + 1 :]
  yield from (("model.remat", remat) for remat in more if remat != "dots")
  if config.loss.exchange == "gather" and config.data.batch_pairs >= _RING_PAIRS:
    yield "loss.exchange", "ring"
  sizes = [size for size in (16, 8, 4, 2) if size > config.mesh.fsdp and parts % size == 0]
  yield from (("mesh.fsdp", size) for size in sizes)
  microbatches = config.microbatches * 2
  while (
    _takes_microbatches(config)
    and config.data.batch_pairs % (microbatches * parts) == 0
    and microbatches <= 256
  ):
    yield "microbatches", microbatches
    microbatches *= 2


def _takes_microbatches(config: config_lib.Config) -> bool:
  """A ResNet normalises over the batch, unless it is locked."""
  return not config.model.image.blocks or config.optimizer.lock_image


def _with(config: Any, key: str, value: Any) -> Any:
  name, _, rest = key.partition(".")
  return dataclasses.replace(
    config, **{name: _with(getattr(config, name), rest, value) if rest else value}
  )


def _largest_batch(
  config: config_lib.Config,
  parts: int,
  too_large: DoesNotFit,
  measure: Callable[[config_lib.Config], Report],
) -> Iterator[Tried]:
  """Memory is nearly affine in the batch: a line through two batches, then down until one fits."""
  unit = parts * config.microbatches

  def of(pairs: int) -> config_lib.Config:
    changed: config_lib.Config = _with(config, "data.batch_pairs", pairs)
    return changed

  pairs, used = config.data.batch_pairs, too_large.used_bytes
  following = pairs // 2 // unit * unit
  while following >= unit:
    try:
      found: Report | DoesNotFit = measure(of(following))
    except DoesNotFit as error:
      found = error
    now = found.peak_bytes if isinstance(found, Report) else found.used_bytes
    slope = max((used - now) / (pairs - following), 1.0)
    best = int(following + 0.98 * (found.capacity_bytes - now) / slope) // unit * unit
    if isinstance(found, Report) and best <= following * 1.03:
      yield f"--config.data.batch_pairs={following}", of(following), found
      return
    if isinstance(found, Report):
      kept, kept_pairs = found, following
      try:
        found, following = measure(of(best)), best
      except DoesNotFit:
        found, following = kept, kept_pairs
      yield f"--config.data.batch_pairs={following}", of(following), found
      return
    pairs, used, following = following, now, min(best, following // 2) // unit * unit
