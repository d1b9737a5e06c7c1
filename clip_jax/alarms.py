"""What goes wrong in contrastive training without an error, told when it begins.

Each alarm looks at the metrics of the last steps, one reading a step, once warm-up is over. It is
told when all of WINDOW readings in a row have it, and again when one has it no more.
"""

import dataclasses
import math
from collections.abc import Mapping

from clip_jax import config as config_lib

WINDOW = 100  # steps
_NEAR = 0.01  # how far below that of a model that tells no pairs apart a loss still counts as it
_SPIKE_SIGMA = 6.0
_FEW_DIRECTIONS = 0.01  # of the embedding's, or two: fewer are a collapse


@dataclasses.dataclass(frozen=True)
class Alarm:
  name: str  # as `metrics.jsonl` has it
  on: bool
  text: str


class Alarms:
  """Watches a run. `step` is given every step's metrics, in order."""

  def __init__(self, config: config_lib.Config):
    self._config = config
    self._in_row: dict[str, int] = {}
    self._on: set[str] = set()
    self._spike = -WINDOW  # the step of the last that was told

  def step(self, step: int, values: Mapping[str, float]) -> list[Alarm]:
    """The alarms that begin or end with this step."""
    if step <= self._config.optimizer.warmup_steps:
      return []
    out = []
    for name, text in self._found(values).items():
      self._in_row[name] = self._in_row.get(name, 0) + 1 if text else 0
      if self._in_row[name] == WINDOW:
        self._on.add(name)
        out.append(Alarm(name, True, f"step {step}: for {WINDOW} steps {text}"))
      elif not text and name in self._on:
        self._on.remove(name)
        out.append(Alarm(name, False, f"step {step}: {name.replace('_', ' ')}: over"))
    return out + self._of_spikes(step, values)

  def _found(self, values: Mapping[str, float]) -> dict[str, str]:
    """What each alarm has to say of a step; "" where nothing is wrong."""
    width, cap = self._config.model.embed_dim, self._config.optimizer.max_logit_scale
    blind, scale = blind_loss(self._config), values["logit_scale"]
    few = max(2.0, _FEW_DIRECTIONS * width)
    out = {
      "blind_loss": f"the loss is {values['loss']:.3f}, no better (by over {_NEAR:.0%}) than the "
      f"{blind:.3f} of a model that tells no pair from another: look at the learning rate, and "
      "whether captions belong to their images"
      if values["loss"] >= (1 - _NEAR) * blind
      else "",
      "logit_scale_at_cap": f"the logit scale is at its cap of {cap:g}: usual late in a run; early "
      "in one, look for repeated pairs"
      if scale >= 0.999 * cap
      else "",
    }
    for side in ("image", "text"):
      rank = values[f"{side}_rank"]
      out[f"{side}_collapse"] = (
        f"the {side} embeddings fill few of their {width} directions (effective rank {rank:.1f}): "
        "they collapse; lower the learning rate, or go on from an earlier checkpoint"
        if rank < few
        else ""
      )
    return out

  def _of_spikes(self, step: int, values: Mapping[str, float]) -> list[Alarm]:
    """A spike is told at once, and then no other for WINDOW steps."""
    sigma = values["gradient_norm_sigma"]
    if sigma <= _SPIKE_SIGMA or step - self._spike < WINDOW:
      return []
    self._spike = step
    text = (
      f"step {step}: the gradient norm {values['gradient_norm']:.3g} is {sigma:.1f} standard "
      "deviations over its usual one (optimizer.skip_spike_sigma leaves such steps out)"
    )
    return [Alarm("gradient_spike", True, text)]


def blind_loss(config: config_lib.Config) -> float:
  """The least loss of a model for which all pairs of a batch are alike, in nats.

  Softmax: ln B. Sigmoid: each of B^2 pairs is called matched with probability 1 / B.
  """
  pairs = config.data.batch_pairs
  if config.model.loss == "softmax":
    return math.log(pairs)
  return math.log(pairs) + (pairs - 1) * math.log(pairs / (pairs - 1))
