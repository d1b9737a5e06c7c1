"""What made a step not finite: which gradient, which records."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from clip_jax import config as config_lib
from clip_jax import optimizer
from clip_jax.data import pipeline, records
from clip_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Suspects:
  """All that can be to blame in a run: its trained tensors, in the order of their gradients, and
  the records of any step."""

  config: config_lib.Config
  tensors: tuple[str, ...]
  sources: Sequence[records.RecordSource]
  tokenizer: Tokenizer

  def sentence(self, step: int, values: Mapping[str, float]) -> str:
    """Of step 1, 2, ... and its metrics, as `train_step.make_train_step` has them."""
    pairs, batch = int(values["not_finite_pairs"]), self.config.data.batch_pairs
    tensor = int(values["first_not_finite_tensor"])
    gradient = f"the gradient of {self.tensors[tensor]} is the first" if tensor >= 0 else "none is"
    if not pairs:
      return f"all embeddings are finite; of the gradients {gradient} that is not"
    if pairs == batch:
      return f"all {batch} pairs have embeddings that are not finite: the weights have gone wrong"
    where = self.record(step, int(values["first_not_finite_pair"]))
    return f"{pairs} of {batch} pairs have embeddings that are not finite, the first is {where}"

  def record(self, step: int, row: int) -> str:
    """Where the record of a row of a step's global batch stands."""
    examples = pipeline.example_dataset(self.config, self.sources, self.tokenizer)
    example: Any = examples[(step - 1) * self.config.data.batch_pairs + row]
    return self.sources[int(example["source"])].locate(int(example["record"]))


def suspects(
  config: config_lib.Config, params: Any, sources: Sequence[records.RecordSource], words: Tokenizer
) -> Suspects:
  """Those of a run; of `params` only the names count."""
  trained = jax.tree_util.tree_leaves_with_path(optimizer.trained(config.optimizer, params))
  names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in trained)
  return Suspects(config, tuple(names), sources, words)
