"""Which slices run the nine published models at their batch of 32,768, and how fast they can be.

Run: python tools/preflight_table.py [--models NAME ...] [--generations v5e ...]
     python tools/preflight_table.py --again [256-chips]
     python tools/preflight_table.py --only-page

Compiles the training step of each experiments/clip_*.py for TPU slices (wants libtpu, `make
install-tpu`), from the size that the memory on 256 chips lets expect. An attempt that is kept in
docs/preflight/ is not made again, but for those that the page shows, with --again or where their
estimate is missing. Writes docs/preflight.md. All of it takes over two hours on 2 cores;
`--again 256-chips`, nine programs on a machine that does nothing else, for their compile times.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator

if __package__ in (None, ""):
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from clip_jax import metrics
from tools import preflight_attempts, preflight_goals
from tools.preflight_attempts import (
  BATCH,
  CLAIMS,
  GENERATIONS,
  MODELS,
  ROOT,
  SLICES,
  STEPS,
  Attempt,
  Attempts,
  gib,
  on_256_chips,
  remat_of,
  search_in_parts,
  search_one_pass,
  smallest,
)

PAGE = ROOT / "docs" / "preflight.md"


def bound(attempt: Attempt) -> str:
  names = {"compute": "compute", "memory": "hbm", "network": "network"}
  return max(names, key=lambda name: attempt[f"{names[name]}_seconds"])


def seconds(attempt: Attempt) -> str:
  """At the least, and as estimated."""
  if attempt["step_seconds"] is None:
    return f"{figure(attempt['compute_seconds'])} | not read yet"
  return f"{attempt['compute_seconds']:.2f} | {attempt['step_seconds']:.2f} ({bound(attempt)})"


def figure(value: float | None, form: str = ".2f") -> str:
  return "not read yet" if value is None else format(value, form)


def row(name: str, generation: str, attempt: Attempt) -> str:
  """A line of the batch in one pass."""
  hours = None if attempt["step_seconds"] is None else attempt["step_seconds"] * STEPS / 3600
  chip_hours = None if hours is None else hours * attempt["chips"]
  return (
    f"{_memory(name, generation, attempt)} {seconds(attempt)} | {figure(hours, ',.0f')} | "
    f"{figure(chip_hours, ',.0f')} |"
  )


def _memory(name: str, generation: str, attempt: Attempt) -> str:
  """A line in microbatches, and the start of one in one pass."""
  options = dict(option.split("=") for option in attempt["options"].split())
  parts, count = options.get("microbatches", "1"), attempt["chips"]
  return (
    f"| {name} | {generation} | {attempt['topology'].partition(':')[2]} ({count}) | "
    f"{BATCH // count // int(parts):,} x {parts} | {options['model.remat']} | "
    f"{options['mesh.fsdp']} | {gib(attempt):.1f} of "
    f"{attempt['capacity_bytes'] / 2**30:.4g} |"
  )


def table(everything: dict[str, Attempts], parts: bool) -> Iterator[str]:
  """Of each model and generation the smallest slice; in microbatches (`parts`) its memory alone."""
  times = "" if parts else " step, s, least | estimate (by) | hours | chip-hours |"
  yield (
    "| model | chip | smallest slice (chips) | pairs a chip x passes | remat | fsdp | peak, GiB a "
    f"chip |{times}"
  )
  yield "| --- | --- | --- | ---: | --- | ---: | ---: |" + " ---: |" * times.count("|")
  for experiment, name in MODELS.items():
    if not (parts and experiment.startswith("clip_rn")):
      for generation in GENERATIONS:
        found = smallest(everything[experiment], generation, parts)
        topology = f"{generation}:{SLICES[generation][-1]}"
        tried = [a for a in everything[experiment].all if a["topology"] == topology]
        why = "none to 1,024 chips" if tried and not parts else "not measured yet"
        missing = f"| {name} | {generation} | {why} | | | | |" + " |" * times.count("|")
        line = _memory if parts else row
        yield line(name, generation, found) if found else missing


def whole_slices(everything: dict[str, Attempts]) -> Iterator[str]:
  """The nine as they stand, on 256 chips."""
  yield (
    "| model, remat | slice | compiled in, s | FLOPs, compiled / analytic | peak, GiB | step, s, "
    "least | estimate (by) | MFU, estimate | evaluation, GiB |"
  )
  yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
  for experiment, name in MODELS.items():
    for found in on_256_chips(everything[experiment]):
      start = f"| {name}, {remat_of(found)} | {found['topology']} |"
      if found["fits"]:
        yield (
          f"{start} {found['compile_seconds']:.0f} | {figure(found['flops_ratio'])} | "
          f"{gib(found):.1f} | {seconds(found)} | {figure(found['mfu'], '.0%')} | "
          f"{figure(found['evaluation_bytes'] and found['evaluation_bytes'] / 2**30)} |"
        )
      else:
        yield f"{start} | | {gib(found):.1f}: does not fit | | | | |"


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
        yield f"{start} | {figure(found['flops_ratio'], '.3f')} | {found['compile_seconds']:.0f} |"
      else:
        yield f"{start}: does not fit | | |"


def shown(experiment: str) -> list[tuple[str, str]]:
  """(slice, options) of all attempts of whose times the page has figures."""
  attempts = Attempts(experiment)
  rows = [smallest(attempts, generation, parts=False) for generation in GENERATIONS]
  rows += on_256_chips(attempts)
  found = [(row["topology"], row["options"]) for row in rows if row and row["fits"]]
  found += [(topology, words) for name, topology, words, _ in CLAIMS if name == experiment]
  return list(dict.fromkeys(found))


def losses() -> Iterator[str]:
  """The loss alone, as tools/bench/loss.py kept it."""
  kept = json.loads(preflight_attempts.LOSSES.read_text())
  yield f"On {kept['topology']}, embeddings of {kept['width']} numbers: `tools/bench/loss.py`."
  yield ""
  yield "| pairs | loss | exchange | temporaries, GiB a chip | sent, GiB a chip | FLOPs a chip |"
  yield "| ---: | --- | --- | ---: | ---: | ---: |"
  for row in kept["losses"]:
    start = f"| {row['batch_pairs']:,} | {row['loss']} | {row['exchange']} |"
    if row["fits"]:
      memory, sent = row["temporary_bytes"] / 2**30, row["sent_bytes"] / 2**30
      yield f"{start} {memory:.2f} | {sent:.2f} | {row['flops']:.1e} |"
    else:
      yield f"{start} {row['used_bytes'] / 2**30:.1f}: does not fit | | |"


def page() -> str:
  everything = {experiment: Attempts(experiment) for experiment in MODELS}
  folder = preflight_attempts.FOLDER
  files = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
  versions = sorted({f"jax {file['jax']}, libtpu {file['libtpu']}" for file in files})
  lines = [
    "# What the compiler says of the nine models on TPU slices",
    "",
    "Written by `python tools/preflight_table.py` from the reports in `docs/preflight/`, each of",
    "them what `clip-jax preflight` prints for one configuration: the very training step, compiled",
    f"by {' and '.join(versions)} for chips that were not there. Memory is the compiler's own",
    "account. No step is faster than its FLOPs at the chip's peak (least). The estimate is the",
    "largest of that and of two times that are estimated from the program's text: its bytes from",
    "memory and its bytes over links, each at the chip's peak. Nothing in this page was run. Hours",
    "are those of 390,625 estimated steps of 32,768 pairs, 32 epochs of 400 million. Where memory",
    "is nearly full, the compiler recomputes more of its own accord, beyond what `remat` says.",
    "",
    "## What was to be reached",
    "",
    *preflight_goals.rows(everything),
    "",
    "## The batch in one pass",
    "",
    "The smallest of up to 1,024 chips that holds it; `tuned` where it fits, else `full`.",
    "`16x16*2` are two slices.",
    "",
    *table(everything, parts=False),
    "",
    "## In microbatches",
    "",
    "The same loss and gradient (`config.microbatches`), for a third more FLOPs beside those of",
    "remat, so that memory hardly bounds the slice: what it holds, not how fast. Not for ResNets:",
    "batch normalisation is over the whole batch.",
    "",
    *table(everything, parts=True),
    "",
    "## As they stand, on 256 chips",
    "",
    *whole_slices(everything),
    "",
    "## More",
    "",
    *claims(everything),
    "",
    "## The loss alone",
    "",
    *losses(),
    "",
  ]  # fmt: skip
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
  parser.add_argument("--generations", nargs="+", choices=GENERATIONS, default=GENERATIONS)
  parser.add_argument(
    "--again", nargs="?", const="shown", choices=("shown", "256-chips"), help="compile anew those"
  )
  parser.add_argument("--only-page", action="store_true", help="compile nothing")
  options = parser.parse_args()
  if options.again == "256-chips":
    for experiment in options.models:
      for known in on_256_chips(Attempts(experiment)):
        if known["fits"]:
          Attempts(experiment).make(known["topology"], known["options"], again=True)
  models = [] if options.only_page or options.again == "256-chips" else options.models
  for generation in options.generations:
    for experiment in models:
      attempts = Attempts(experiment)
      search_one_pass(attempts, generation)
      if experiment.startswith("clip_vit"):
        search_in_parts(attempts, generation)
  for experiment, topology, words, _ in CLAIMS:
    if experiment in models:
      Attempts(experiment).make(topology, words)
  for experiment in models:
    for topology, words in shown(experiment):
      attempt = Attempts(experiment).find(topology, words)
      if options.again == "shown" or (attempt and attempt.get("step_seconds", 0) is None):
        Attempts(experiment).make(topology, words, again=True)
        metrics.write_atomically(PAGE, page())
  metrics.write_atomically(PAGE, page())


if __name__ == "__main__":
  main()
