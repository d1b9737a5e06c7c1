"""Zero-shot classification by a predictive model: which class's prompts are likeliest.

The paper does not say how its predictive models were made to classify. Three rules are measured:

  sum   log p(prompt | image), over all that is predicted of the prompt: the likelihood itself. A
        prompt that others contain never loses to them ("shirt" to "t-shirt" as bags of words).
  mean  the same by the number of tokens predicted.
  lift  log p(prompt | image) - log p(prompt): how much more likely the image makes the prompt, by
        Bayes' rule the log-likelihood of the image, as p(prompt) is the mean over other images.
        Source: Yang et al. 2023, arXiv 2311.17072 ("information gain"). Differs: there a captioner
        without an image gives p(prompt).

A class's score is the mean over its prompts.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clip_jax import config as config_lib
from clip_jax import sharding
from clip_jax.data import images, records
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.evaluation import encoding, prompts, scores
from tools.predictive import heads, training

RULES = ("sum", "mean", "lift")
REFERENCE = 256  # training images over which p(prompt) is the mean


def accuracies(
  config: config_lib.Config,
  prediction: heads.Prediction,
  mesh: Mesh,
  state: training.State,
  tokens_PL: np.ndarray,
  class_P: np.ndarray,
  classes: Sequence[str],
  source: records.RecordSource,
  limit: int,
  reference: records.RecordSource,
) -> dict[str, float]:
  """Zero-shot accuracy by each of RULES, on the first `limit` records of `source` (0: all).

  Args: tokens_PL and class_P, as of `prompt_tokens`; reference, the training images.
  Raises: EvaluationError naming the record that cannot be evaluated.
  """
  n = encoding.count(source, config.evaluation.batch, limit)
  known = encoding.count(reference, config.evaluation.batch, min(REFERENCE, len(reference)))
  index_of = {name: i for i, name in enumerate(classes)}
  labels = [_label(source, i, index_of) for i in range(n)]
  of = functools.partial(log_likelihoods, config, prediction, mesh, state, tokens_PL)
  length_P = np.asarray(heads.counted(prediction, jnp.asarray(tokens_PL))).sum(axis=1)
  found = class_scores(of(source, n), of(reference, known), length_P, class_P)
  return {rule: scores.accuracy(scores_NC, labels) for rule, scores_NC in found.items()}


def prompt_tokens(
  prompt_set: prompts.PromptSet, tokenizer: Tokenizer, context_length: int
) -> tuple[np.ndarray, np.ndarray]:
  """(tokens int32 [P, L], class int [P]) of every name of every class in every template."""
  texts, class_P = [], []
  for c, own in enumerate(prompt_set.names):
    for name in own:
      texts += [template.replace("{}", name) for template in prompt_set.templates]
      class_P += [c] * len(prompt_set.templates)
  return tokenizer(texts, context_length), np.array(class_P)


def log_likelihoods(
  config: config_lib.Config,
  prediction: heads.Prediction,
  mesh: Mesh,
  state: training.State,
  tokens_PL: np.ndarray,
  source: records.RecordSource,
  n: int,
) -> np.ndarray:
  """log p(prompt | image) [n, P], float32, of the first n images of `source`, a chunk at a time."""
  rows = mesh.shape["data"] * mesh.shape["fsdp"]
  size = -(-config.evaluation.batch // rows) * rows
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  out = []
  for start in range(0, n, size):
    chunk = [_image(config, source, i) for i in range(start, min(start + size, n))]
    padded = np.stack(chunk + chunk[-1:] * (size - len(chunk)))
    batch = sharding.global_batch({"image": padded}, mesh)
    found_BP = _of_batch(config, prediction, mesh, variables, batch["image"], tokens_PL)
    out.append(np.asarray(found_BP)[: len(chunk)])
  return np.concatenate(out)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _of_batch(
  config: config_lib.Config,
  prediction: heads.Prediction,
  mesh: Mesh,
  variables: Any,
  image_BRR3: jax.Array,
  tokens_PL: jax.Array,
) -> jax.Array:
  """float32 [B, P]. One prompt at a time: the logits of all would be B x P x L x V numbers."""
  model = heads.Predictive(config.model, prediction)
  image_BRR3 = images.normalise(image_BRR3, config.preprocess.mean, config.preprocess.std)

  def one(tokens_L: jax.Array) -> jax.Array:
    tokens_BL = jnp.broadcast_to(tokens_L[None], (x_BD.shape[0], tokens_L.shape[0]))
    found: Any = model.apply(variables, x_BD, tokens_BL, method="score")
    logp_BL, counted_BL = found
    return jnp.where(counted_BL, logp_BL, 0).sum(-1)

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    x_BD: Any = model.apply(variables, image_BRR3, method="features")
    return jax.lax.map(one, tokens_PL).T


def class_scores(
  image_NP: np.ndarray, reference_RP: np.ndarray, length_P: np.ndarray, class_P: np.ndarray
) -> dict[str, np.ndarray]:
  """Each rule's scores [N, C], float64, from log-likelihoods of prompts.

  Args: image_NP, of the images to classify; reference_RP, of those that p(prompt) is the mean over;
    length_P, how many tokens are predicted of a prompt; class_P, whose prompt it is, in order.
  """
  image_NP, reference_RP = image_NP.astype(np.float64), reference_RP.astype(np.float64)
  prior_P = np.logaddexp.reduce(reference_RP, axis=0) - np.log(len(reference_RP))
  by_rule = {
    "sum": image_NP,
    "mean": image_NP / np.maximum(length_P, 1)[None],
    "lift": image_NP - prior_P[None],
  }
  firsts = np.searchsorted(class_P, np.arange(class_P[-1] + 1))
  sizes_1C = np.bincount(class_P)[None]
  return {rule: np.add.reduceat(x, firsts, axis=1) / sizes_1C for rule, x in by_rule.items()}


def _label(source: records.RecordSource, index: int, index_of: dict[str, int]) -> int:
  label = encoding.read(source, index).label
  if label not in index_of:
    raise encoding.EvaluationError(
      f"{source.locate(index)}: label {label!r} is none of the {len(index_of)} classes; give the "
      "task the prompts of this data"
    )
  return index_of[label]


def _image(config: config_lib.Config, source: records.RecordSource, index: int) -> np.ndarray:
  """uint8 [R, R, 3], as the encoder sees it."""
  record = encoding.read(source, index)
  try:
    return images.fit(images.as_image(record.image), config.model.image.resolution)
  except images.ImageError as error:
    raise encoding.EvaluationError(
      f"{source.locate(index)}: image cannot be decoded ({error}); repair or remove the record"
    ) from error
