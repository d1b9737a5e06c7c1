"""Which slices run the nine published models at their batch of 32,768, and how fast they can be.

Run: python tools/preflight_table.py [--models NAME ...] [--generations v5e ...] [--only-page]

Compiles the training step of each experiments/clip_*.py for TPU slices (wants libtpu, `make
install-tpu`), from the size that the memory on 256 chips lets expect, and keeps every attempt, the
failed ones too, in docs/preflight/<experiment>.json; an attempt that is in there is not made again
(delete the file to measure anew). Then writes docs/preflight.md from these files. All of it takes
two hours on 2 cores.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from clip_jax import chips as chips_lib
from clip_jax import cli, metrics, preflight
from clip_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
FOLDER, PAGE = ROOT / "docs" / "preflight", ROOT / "docs" / "preflight.md"
GENERATIONS = ("v5e", "v6e", "v4", "v5p")
# In turn, up to 1,024 chips; "16x16*2" are two slices, joined by the data-centre network.
SLICES = {
  "v4": preflight.TOPOLOGIES["v4"],
  "v5e": (*preflight.TOPOLOGIES["v5e"], "16x16*2", "16x16*4"),
  "v5p": preflight.TOPOLOGIES["v5p"],
  "v6e": (*preflight.TOPOLOGIES["v6e"], "16x16*2", "16x16*4"),
}
LARGEST = {"v4": "4x8x8", "v5e": "16x16", "v5p": "4x8x8", "v6e": "16x16"}  # 256 chips
MODELS = {
  "clip_rn50": "RN50",
  "clip_rn101": "RN101",
  "clip_rn50x4": "RN50x4",
  "clip_rn50x16": "RN50x16",
  "clip_rn50x64": "RN50x64",
  "clip_vit_b32": "ViT-B/32",
  "clip_vit_b16": "ViT-B/16",
  "clip_vit_l14": "ViT-L/14",
  "clip_vit_l14_336": "ViT-L/14@336px",
}
BATCH, STEPS = 32_768, 390_625  # 32 epochs of 400 million pairs
# What else the project claims: (experiment, slice, options, what it shows).
CLAIMS = (
  (
    "clip_vit_b16",
    "v5e:4x4",
    "model.scan_layers=false model.remat=none data.batch_pairs=2048",
    "no recomputation",
  ),
  (
    "clip_vit_b16",
    "v5e:4x4",
    "model.remat=full data.batch_pairs=16384",
    "1,024 pairs a chip in one pass",
  ),
  (
    "clip_vit_b16",
    "v5e:4x4",
    "model.remat=full data.batch_pairs=16384 model.residual_dtype=bfloat16",
    "the same, the residual stream in bfloat16",
  ),
  (
    "clip_vit_b16",
    "v5e:4x4",
    "data.batch_pairs=24576 microbatches=24 model.remat=none",
    "1,536 pairs a chip, without remat",
  ),
  (
    "clip_vit_b16",
    "v5e:4x4",
    "data.batch_pairs=24576 microbatches=12",
    "1,536 pairs a chip",
  ),
  (
    "clip_vit_b16",
    "v5e:16x16",
    "data.batch_pairs=1048576 loss.exchange=ring microbatches=32",
    "a batch of 1,048,576",
  ),
)

Attempt = dict[str, Any]  # topology, options, fits, and the report or used_bytes


def chips(topology: str) -> int:
  return math.prod(map(int, re.findall(r"\d+", topology.partition(":")[2])))


class Attempts:
  """What was compiled of one experiment, on disk after each compilation."""

  def __init__(self, experiment: str):
    self.experiment = experiment
    self._path = FOLDER / f"{experiment}.json"
    self.all: list[Attempt] = []
    if self._path.exists():
      self.all = json.loads(self._path.read_text())["attempts"]

  def find(self, topology: str, options: str) -> Attempt | None:
    wanted = (topology, options)
    return next((a for a in self.all if (a["topology"], a["options"]) == wanted), None)

  def make(self, topology: str, options: str) -> Attempt:
    """The attempt, from the file or by compiling."""
    known = self.find(topology, options)
    if known:
      return known
    config = config_of(self.experiment, options)
    try:
      result = {"fits": True, **dataclasses.asdict(preflight.report(config, devices(topology)))}
    except preflight.DoesNotFit as error:
      result = {"fits": False, "used_bytes": error.used_bytes}
    jax.clear_caches()  # a program of 256 chips takes gigabytes
    attempt = {"topology": topology, "options": options, **result}
    print(f"{self.experiment} {topology} {options}: {gib(attempt):.2f} GiB", flush=True)
    self.all.append(attempt)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    FOLDER.mkdir(parents=True, exist_ok=True)
    page = {"experiment": self.experiment, **versions, "attempts": self.all}
    metrics.write_atomically(self._path, json.dumps(page, indent=1) + "\n")
    return attempt


def gib(attempt: Attempt) -> float:
  """Memory a chip: the peak of what fits, what the compiler asked for of what does not."""
  return attempt["peak_bytes" if attempt["fits"] else "used_bytes"] / 2**30


def config_of(experiment: str, options: str = "") -> config_lib.Config:
  overrides = [f"--config.{option}" for option in options.split()]
  return cli.load_config(str(ROOT / "experiments" / f"{experiment}.py"), overrides)


@functools.cache
def devices(topology: str) -> Sequence[Any]:
  slice_, _, count = topology.partition("*")
  return preflight.devices_of(slice_, int(count or 1))


def one_pass(experiment: str, topology: str, remat: str) -> str:
  """Options of the whole batch at once: the experiment's own mesh where the slice has the chips."""
  fsdp = min(config_of(experiment).mesh.fsdp, chips(topology))
  return f"model.remat={remat} mesh.fsdp={fsdp}"


def in_parts(experiment: str, topology: str, pairs: int) -> str:
  """Options of `pairs` a chip at a time."""
  parts = BATCH // chips(topology) // pairs
  return f"{one_pass(experiment, topology, 'tuned')} loss.exchange=ring microbatches={parts}"


def search_one_pass(attempts: Attempts, generation: str) -> None:
  """Leaves in `attempts` the smallest slice on which the batch fits, and that the next does not."""
  shapes = [f"{generation}:{shape}" for shape in SLICES[generation]]
  whole = f"v5e:{LARGEST['v5e']}"
  for remat in ("tuned", "full"):
    known = attempts.make(whole, one_pass(attempts.experiment, whole, remat))
    if known["fits"]:
      break
  state = known.get("argument_bytes", 0) / 2**30
  rest = gib(known) - state
  chip = chips_lib.find(devices(f"{generation}:{LARGEST[generation]}")[0].device_kind)
  capacity = chip.hbm_bytes / 2**30 if chip else 0

  def fits(topology: str, *remats: str) -> bool:
    tried = (
      attempts.make(topology, one_pass(attempts.experiment, topology, remat)) for remat in remats
    )
    return any(attempt["fits"] for attempt in tried)

  enough = (state + rest * 256 / chips(shape) < capacity for shape in shapes)
  at = next((i for i, guess in enumerate(enough) if guess), len(shapes) - 1)
  while at < len(shapes) and not fits(shapes[at], "tuned", "full"):
    at += 1
  while 0 < at < len(shapes) and fits(shapes[at - 1], "full"):
    at -= 1
    fits(shapes[at], "tuned")


def search_in_parts(attempts: Attempts, generation: str) -> None:
  """The same in microbatches, which batch normalisation does not take."""
  for shape in preflight.TOPOLOGIES[generation]:
    topology = f"{generation}:{shape}"
    for pairs in (128, 32):
      if attempts.make(topology, in_parts(attempts.experiment, topology, pairs))["fits"]:
        return


def smallest(attempts: Attempts, generation: str, parts: bool) -> Attempt | None:
  """The fitting attempt with the fewest chips, of these the fastest."""
  found = [
    a for a in attempts.all
    if a["fits"] and a["topology"].startswith(f"{generation}:") and a["batch_pairs"] == BATCH
    and ("microbatches" in a["options"]) == parts
  ]  # fmt: skip
  return min(found, key=lambda a: (a["chips"], a["step_seconds"]), default=None)


def bound(attempt: Attempt) -> str:
  names = {"compute": "compute", "memory": "hbm", "network": "network"}
  return max(names, key=lambda name: attempt[f"{names[name]}_seconds"])


def row(name: str, generation: str, attempt: Attempt) -> str:
  options = dict(option.split("=") for option in attempt["options"].split())
  hours = attempt["step_seconds"] * STEPS / 3600
  parts = options.get("microbatches", "1")
  return (
    f"| {name} | {generation} | {attempt['topology'].partition(':')[2]} ({attempt['chips']}) | "
    f"{BATCH // attempt['chips'] // int(parts):,} x {parts} | {options['model.remat']} | "
    f"{options['mesh.fsdp']} | {gib(attempt):.1f} of "
    f"{attempt['capacity_bytes'] / 2**30:.4g} | {attempt['step_seconds']:.2f} ({bound(attempt)}) | "
    f"{hours:,.0f} | {hours * attempt['chips']:,.0f} |"
  )


def table(everything: dict[str, Attempts], parts: bool) -> Iterator[str]:
  yield (
    "| model | chip | smallest slice (chips) | pairs a chip x passes | remat | fsdp | peak, GiB a "
    "chip | step, s (bound by) | hours | chip-hours |"
  )
  yield "| --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |"
  for experiment, name in MODELS.items():
    if not (parts and experiment.startswith("clip_rn")):
      for generation in GENERATIONS:
        found = smallest(everything[experiment], generation, parts)
        topology = f"{generation}:{SLICES[generation][-1]}"
        tried = [a for a in everything[experiment].all if a["topology"] == topology]
        why = "none to 1,024 chips" if tried and not parts else "not measured yet"
        missing = f"| {name} | {generation} | {why} | | | | | | | |"
        yield row(name, generation, found) if found else missing


def whole_slices(everything: dict[str, Attempts]) -> Iterator[str]:
  """The nine as they stand, on 256 chips."""
  yield (
    "| model, remat | compiled in, s | FLOPs, compiled / analytic | peak, GiB | step, s (bound by) "
    "| MFU at most |"
  )
  yield "| --- | ---: | ---: | ---: | ---: | ---: |"
  topology = f"v5e:{LARGEST['v5e']}"
  for experiment, name in MODELS.items():
    for remat in ("tuned", "full"):
      found = everything[experiment].find(topology, one_pass(experiment, topology, remat))
      if found and not found["fits"]:
        yield f"| {name}, {remat} | | | {gib(found):.1f}: does not fit | | |"
      elif found:
        yield (
          f"| {name}, {remat} | {found['compile_seconds']:.0f} | {found['flops_ratio']:.2f} | "
          f"{gib(found):.1f} | {found['step_seconds']:.2f} ({bound(found)}) | {found['mfu']:.0%} |"
        )


def claims(everything: dict[str, Attempts]) -> Iterator[str]:
  yield (
    "| what | slice | options | peak, GiB a chip | FLOPs, compiled / analytic | compiled in, s |"
  )
  yield "| --- | --- | --- | ---: | ---: | ---: |"
  for experiment, topology, options, what in CLAIMS:
    found = everything[experiment].find(topology, options)
    if found:
      start = f"| {MODELS[experiment]}: {what} | {topology} | `{options}` | {gib(found):.1f}"
      if found["fits"]:
        yield f"{start} | {found['flops_ratio']:.3f} | {found['compile_seconds']:.0f} |"
      else:
        yield f"{start}: does not fit | | |"


def page() -> str:
  everything = {experiment: Attempts(experiment) for experiment in MODELS}
  files = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
  versions = sorted({f"jax {file['jax']}, libtpu {file['libtpu']}" for file in files})
  lines = [
    "# What the compiler says of the nine models on TPU slices",
    "",
    "Written by `python tools/preflight_table.py` from the reports in `docs/preflight/`, each of",
    "them what `clip-jax preflight` prints for one configuration: the very training step, compiled",
    f"by {' and '.join(versions)} for chips that were not there. Memory is the compiler's own",
    "account. A step's time is the largest of three bounds (FLOPs, bytes from memory, bytes over",
    "links, each at the chip's peak; bytes are estimated from the program's text). The programs",
    "take at least as long, and on real machines longer. Nothing in this page was run. Hours are",
    "for 390,625 steps of 32,768 pairs, 32 epochs of 400 million.",
    "",
    "## The batch in one pass",
    "",
    "The smallest of up to 1,024 chips that holds it; `tuned` where it fits, else `full`.",
    "`16x16*2` are two slices; the network between slices is not in the bounds.",
    "",
    *table(everything, parts=False),
    "",
    "## In microbatches",
    "",
    "The same loss and gradient (`config.microbatches`), for a third more FLOPs beside those of",
    "remat, so that memory hardly bounds the slice. Not for ResNets: batch normalisation is over",
    "the whole batch.",
    "",
    *table(everything, parts=True),
    "",
    "## As they stand, on v5e:16x16",
    "",
    *whole_slices(everything),
    "",
    "## More",
    "",
    *claims(everything),
    "",
  ]  # fmt: skip
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
  parser.add_argument("--generations", nargs="+", choices=GENERATIONS, default=GENERATIONS)
  parser.add_argument("--only-page", action="store_true", help="compile nothing")
  options = parser.parse_args()
  models = [] if options.only_page else options.models
  for generation in options.generations:
    for experiment in models:
      attempts = Attempts(experiment)
      search_one_pass(attempts, generation)
      if experiment.startswith("clip_vit"):
        search_in_parts(attempts, generation)
  for experiment, topology, words, _ in CLAIMS:
    if experiment in models:
      Attempts(experiment).make(topology, words)
  metrics.write_atomically(PAGE, page())


if __name__ == "__main__":
  main()
