"""Training steps compiled for TPU slices, every attempt kept: the search for the smallest slice.

A file docs/preflight/<experiment>.json holds all attempts of one experiment, the failed ones too.
"""

import dataclasses
import functools
import importlib.metadata
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax

from clip_jax import chips as chips_lib
from clip_jax import cli, metrics, preflight
from clip_jax import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "preflight"
LOSSES = ROOT / "docs" / "preflight_losses.json"  # of tools/bench/loss.py
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
  ("clip_rn50", "v5e:4x4", "model.remat=none data.batch_pairs=1024", "no recomputation"),
  ("clip_vit_b32", "v5e:4x4", "model.remat=none data.batch_pairs=2048", "no recomputation"),
  ("clip_vit_l14", "v5e:4x4", "model.remat=none data.batch_pairs=256", "no recomputation"),
  ("clip_vit_l14", "v5e:16x16", "model.remat=none", "the paper's batch without recomputation"),
  ("clip_vit_l14", "v5e:16x16", "model.remat=dots", "the paper's batch, all products kept"),
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

# topology, options, fits, and the report or used_bytes. What a report estimates from the program's
# text is null where that was read by an older, wrong reader.
Attempt = dict[str, Any]


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

  def make(self, topology: str, options: str, again: bool = False) -> Attempt:
    """The attempt, from the file or by compiling (again)."""
    known = self.find(topology, options)
    if known and not again:
      return known
    config = config_of(self.experiment, options)
    try:
      result = {"fits": True, **dataclasses.asdict(preflight.report(config, devices(topology)))}
    except preflight.DoesNotFit as error:
      result = {"fits": False, "used_bytes": error.used_bytes}
    jax.clear_caches()  # a program of 256 chips takes gigabytes
    attempt = {"topology": topology, "options": options, **result}
    print(f"{self.experiment} {topology} {options}: {gib(attempt):.2f} GiB", flush=True)
    if known:
      self.all[self.all.index(known)] = attempt
    else:
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


def on_256_chips(attempts: Attempts) -> list[Attempt]:
  """What the 256 chips of v5e do with the model as it stands: what fits, with the least remat.

  Where nothing fits, what was tried, and the first other generation whose 256 chips hold it.
  """
  found = []
  for generation in GENERATIONS:
    topology = f"{generation}:{LARGEST[generation]}"
    words = [one_pass(attempts.experiment, topology, remat) for remat in _RECOMPUTES]
    tried = [a for a in (attempts.find(topology, options) for options in words) if a]
    fitting = [a for a in tried if a["fits"]]
    found += fitting[:1] or (tried if generation == GENERATIONS[0] else [])
    if fitting:
      return found
  return found


_RECOMPUTES = ("tuned", "full")


def remat_of(attempt: Attempt) -> str:
  return dict(option.split("=") for option in attempt["options"].split())["model.remat"]


def smallest(attempts: Attempts, generation: str, parts: bool) -> Attempt | None:
  """The fitting attempt with the fewest chips, of these the one that recomputes less."""
  found = [
    a for a in attempts.all
    if a["fits"] and a["topology"].startswith(f"{generation}:") and a["batch_pairs"] == BATCH
    and ("microbatches" in a["options"]) == parts
  ]  # fmt: skip
  return min(found, key=lambda a: (a["chips"], _RECOMPUTES.index(remat_of(a))), default=None)
