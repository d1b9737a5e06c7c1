"""How a worker process of the loader starts: its signals, its end, its memory.

It imports little, so that a worker comes to it early.
"""

import ctypes
import multiprocessing
import os
import pathlib
import resource
import signal
import sys

from clip_jax import config as config_lib

NO_MEMORY = (
  "the loader had too little memory for a batch; with worker processes, each may take "
  "config.data.worker_memory_gib: raise it, or make the batch or prefetch_batches smaller"
)
_PR_SET_PDEATHSIG = 1
_AT_WORK = 4  # batches besides those that wait: as rows, joined, copied, on their way


def memory_bytes(config: config_lib.Config, hosts: int) -> int:
  """What a worker may take besides what it has at its start; 0: any amount."""
  if not config.data.worker_memory_gib:
    return 0
  pair_bytes = 3 * config.model.image.resolution**2 + 4 * config.model.text.context_length
  batches = config.data.prefetch_batches + _AT_WORK
  own = batches * (config.data.batch_pairs // hosts) * pair_bytes
  return int(config.data.worker_memory_gib * 2**30) + own


def start(most_bytes: int, worker: int, workers: int) -> None:
  """Workers leave signals to the trainer, die with it, and take so much more memory at most.

  A trainer that died while its worker was starting sends no signal any more: such a worker has
  another parent by now, and ends.
  """
  del worker, workers
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  if sys.platform != "linux":
    return
  ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  trainer = multiprocessing.parent_process()
  if trainer is not None and os.getppid() != trainer.pid:
    os._exit(1)
  if most_bytes:
    _limit_memory(most_bytes)


def _limit_memory(most_bytes: int) -> None:
  """Of address space, beyond what is taken now; a lower limit that there is already stays."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  soft, hard = resource.getrlimit(resource.RLIMIT_AS)
  given = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
  resource.setrlimit(
    resource.RLIMIT_AS, (min([pages * resource.getpagesize() + most_bytes, *given]), hard)
  )
