"""What the loss alone needs of each chip, by gathering and in the ring, compiled for a TPU slice.

  python tools/bench/loss.py [--topology v5e:16x16] [--width 512] [--batches 32768 1048576]

Value and gradient of the loss of unit-norm embeddings [B, width]: the heap's highest point without
the embeddings and their gradients, bytes sent, FLOPs. The compiler's figures; nothing runs. Prints
a line of JSON each and, with --output, keeps all of them.
"""

import argparse
import importlib.metadata
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from clip_jax import config as config_lib
from clip_jax import losses, metrics, preflight, program, sharding


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
  parser.add_argument("--topology", default="v5e:16x16")
  parser.add_argument("--width", type=int, default=512)
  parser.add_argument("--batches", type=int, nargs="+", default=[32_768, 1_048_576])
  parser.add_argument("--output", metavar="FILE")
  options = parser.parse_args()
  devices, found = preflight.devices_of(options.topology), []
  for batch in options.batches:
    for exchange in ("gather", "ring"):
      for sigmoid in (False, True):
        loss = config_lib.Loss(exchange)
        name = {"loss": "sigmoid" if sigmoid else "softmax", "exchange": exchange}
        figures = measure(loss, sigmoid, batch, options.width, devices)
        found.append({**name, "batch_pairs": batch, **figures})
        print(json.dumps(found[-1]), flush=True)
  if options.output:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    page = {"topology": options.topology, "width": options.width, **versions, "losses": found}
    metrics.write_atomically(pathlib.Path(options.output), json.dumps(page, indent=1) + "\n")


def measure(
  loss: config_lib.Loss, sigmoid: bool, batch: int, width: int, devices: Sequence[Any]
) -> dict[str, Any]:
  """Of one device; `fits` is False where the program needs more memory than the chip has."""
  mesh = sharding.make_mesh(devices=devices)
  rows = sharding.batch_sharding(mesh)
  side = jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=rows)
  tokens = jax.ShapeDtypeStruct((batch, 77), jnp.int32, sharding=rows)
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))

  def loss_of(image_BE: Any, text_BE: Any, scale: Any, bias: Any, tokens_BL: Any) -> jax.Array:
    given = bias if sigmoid else None
    return losses.sharded(loss, mesh, image_BE, text_BE, scale, given, tokens_BL)[0]

  lowered = jax.jit(jax.value_and_grad(loss_of, (0, 1, 2, 3))).lower(
    side, side, scalar, scalar, tokens
  )
  try:
    compiled = preflight.compiled(lowered)
  except preflight.DoesNotFit as error:
    return {"fits": False, "used_bytes": error.used_bytes}
  memory, done = compiled.memory_analysis(), program.work(compiled.as_text())
  lasting = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return {
    "fits": True,
    "temporary_bytes": memory.peak_memory_in_bytes - lasting,
    "sent_bytes": sum(c.bytes for c in done.collectives),
    "flops": (compiled.cost_analysis() or {}).get("flops", 0.0) * done.loops,
  }


if __name__ == "__main__":
  main()
