"""What the project set out to reach on TPU slices, beside what the kept reports say."""

import json
from collections.abc import Iterator, Mapping

from tools import preflight_attempts
from tools.preflight_attempts import CLAIMS, MODELS, Attempt, Attempts, gib, on_256_chips

COMPILE_SECONDS = 180  # on 2 cores, for 256 chips

Everything = Mapping[str, Attempts]  # by experiment


def rows(everything: Everything) -> Iterator[str]:
  """A table in Markdown."""
  yield "| goal | found |"
  yield "| --- | --- |"
  for goal, found in (
    (
      "ViT-L/14, batch 32,768, v5e:16x16: under 14 GB (13.0 GiB) a chip with the least "
      "recomputation that allows it, and room for the evaluation",
      _large(everything),
    ),
    (
      "ViT-B/16, 1,536 pairs a v5e chip (big_vision's two towers of the same size, full remat: "
      "1,024 at 14.9 GB)",
      _pairs(everything),
    ),
    (
      "ViT-B/16, batch 1,048,576, v5e:16x16; the loss's temporaries under 1 GB a chip",
      f"{gib(million(everything)):.1f} GiB; the ring's temporaries {ring_bytes() / 2**30:.2f} GiB",
    ),
    ("FLOPs, compiled over analytic: 1.05 without remat, 1.35 with `tuned`", _flops(everything)),
    (f"any of the nine compiled for 256 chips in {COMPILE_SECONDS} s on 2 cores",
     _compiled(everything)),
  ):  # fmt: skip
    yield f"| {goal} | {found} |"


def find(everything: Everything, experiment: str, topology: str, words: str) -> Attempt:
  """The attempt whose options hold these words."""
  kept = everything[experiment].all
  return next(a for a in kept if a["topology"] == topology and words in a["options"])


def million(everything: Everything) -> Attempt:
  return find(everything, "clip_vit_b16", "v5e:16x16", "data.batch_pairs=1048576")


def ring_bytes() -> int:
  """The temporaries a chip of the softmax loss over 1,048,576 pairs, in a ring."""
  losses = json.loads(preflight_attempts.LOSSES.read_text())["losses"]
  wanted = (2**20, "softmax", "ring")
  return next(
    row["temporary_bytes"]
    for row in losses
    if (row["batch_pairs"], row["loss"], row["exchange"]) == wanted
  )


def without_remat(everything: Everything) -> dict[str, float]:
  """By experiment: compiled over analytic FLOPs, where nothing is recomputed."""
  claimed = [
    (e, everything[e].find(topology, options))
    for e, topology, options, what in CLAIMS
    if what == "no recomputation"
  ]
  return {e: found["flops_ratio"] for e, found in claimed if found and found["fits"]}


def tuned(everything: Everything) -> dict[str, float]:
  """The same of those whose batch fits 256 chips with remat "tuned"."""
  return {
    e: found["flops_ratio"]
    for e in MODELS
    for found in on_256_chips(everything[e])
    if found["fits"] and "remat=tuned" in found["options"]
  }


def compile_seconds(everything: Everything) -> dict[str, float]:
  """By experiment: the program of the slice of 256 chips that it stands on."""
  return {
    e: found["compile_seconds"]
    for e in MODELS
    for found in on_256_chips(everything[e])
    if found["fits"]
  }


def _large(everything: Everything) -> str:
  found = find(everything, "clip_vit_l14", "v5e:16x16", "model.remat=tuned mesh.fsdp=16")
  dots = find(everything, "clip_vit_l14", "v5e:16x16", "model.remat=dots")
  evaluation = found["evaluation_bytes"]
  beside = (
    ""
    if evaluation is None
    else f". An evaluation takes {evaluation / 2**30:.2f} GiB, state included"
  )
  return (
    f"{gib(found):.1f} GiB with `tuned`; `dots`, the next with less recomputation, needs "
    f"{gib(dots):.1f} of {found['capacity_bytes'] / 2**30:.4g}{beside}"
  )


def _pairs(everything: Everything) -> str:
  parts = find(everything, "clip_vit_b16", "v5e:4x4", "batch_pairs=24576 microbatches=12")
  once = find(everything, "clip_vit_b16", "v5e:4x4", "residual_dtype=bfloat16")
  return (
    f"in 12 microbatches: {gib(parts):.1f} GiB, at {parts['flops_ratio']:.2f} times the analytic "
    f"FLOPs. In one pass 1,024 in {gib(once):.1f} GiB, with the residual stream in bfloat16, as "
    "there; 1,536 do not fit in one"
  )


def _flops(everything: Everything) -> str:
  plain, saved = without_remat(everything).values(), tuned(everything).values()
  return (
    f"{min(plain):.3f} to {max(plain):.3f}; {min(saved):.2f} to {max(saved):.2f} (in one pass: "
    "microbatches run the encoders once more)"
  )


def _compiled(everything: Everything) -> str:
  seconds = compile_seconds(everything)
  good = [value for value in seconds.values() if value <= COMPILE_SECONDS]
  late = [f"{MODELS[e]} takes {s:.0f} s" for e, s in seconds.items() if s > COMPILE_SECONDS]
  return "; ".join([f"{len(good)} in {min(good):.0f} to {max(good):.0f} s", *late])
