"""Where the hosts of a run stop together, when one of them was asked to.

While steps follow each other the request travels with a batch, whose step tells it to all hosts.
Here is what they do where no step tells them: while they wait for data, and in an evaluation.
"""

import contextlib
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # JAX offers no public way to the coordinator's store

from clip_jax import hosts, stopping
from clip_jax.data import pipeline


class CommonStop:
  """The request to stop of one process, as all processes of the run see it.

  A host that waits for the batch of a step, and knows of a request, signs that it will not begin
  that step by itself. Where all have signed, the run stops there. A host whose batch comes after it
  has signed asks first: the first word on a step, "stop" of one that sees all signatures or "go" of
  one with a batch, is every host's. So none begins a step in which the others leave it alone. Where
  one host has begun the step, the others finish it with their batches, which tell of the request.
  """

  def __init__(self, request: stopping.Request, store: Any = None):
    """`store`: the coordinator's; of several processes their own, where it is None."""
    self._request, self._signed = request, False
    self._store: Any = store or distributed.global_state.client
    self._me, self._count = jax.process_index(), jax.process_count()

  def batch(self, stream: pipeline.Prefetcher, done: int) -> Any | None:
    """The batch after `done` steps; None where the run stops before it, on all hosts alike."""
    if self._count == 1 and self._request.signal_name:
      return None
    batch = stream.take(lambda: self._waits(done))
    return batch if batch is not None and self._goes_on(done) else None

  def _waits(self, done: int) -> bool:
    """Asked some times while this host waits for the batch after `done` steps: whether to stop."""
    if self._count == 1:
      return bool(self._request.signal_name)
    signed = self._store.key_value_dir_get(f"clip_jax/waits/{done}/")
    if not self._signed and (signed or self._request.signal_name):
      self._store.key_value_set(f"clip_jax/waits/{done}/{self._me}", "yes")
      self._signed = True
    return len(signed) == self._count and self._first_word(done, "stop") == "stop"

  def _goes_on(self, done: int) -> bool:
    """Whether this host, whose batch has come, begins the step."""
    signed, self._signed = self._signed, False
    return not signed or self._first_word(done, "go") == "go"

  def _first_word(self, done: int, mine: str) -> str:
    """What the first host that speaks of the step after `done` says of it; any says the same."""
    key = f"clip_jax/after/{done}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was the first
      self._store.key_value_set(key, mine)
    return str(self._store.blocking_key_value_get(key, 60_000))

  def asked(self) -> bool:
    """Whether any host was asked to stop; all must call."""
    mine = np.array([bool(self._request.signal_name)], np.int32)
    return bool(hosts.sum_over_hosts(mine)[0])
