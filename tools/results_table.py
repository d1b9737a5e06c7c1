"""The tables of experiments/README.md: runs to repeat, others' runs, and measured runs.

python tools/results_table.py runs/demo runs/fashion_mnist ...   # add or replace these runs
python tools/results_table.py                                    # write the tables anew

Measured runs come from their results.json, kept in experiments/results.jsonl; what to expect of the
others from their configs and experiments/targets.csv. Runs that no experiment here repeats are in
experiments/published_runs.csv.
"""

import argparse
import csv
import datetime
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from clip_jax import chips, cli, metrics
from clip_jax import config as config_lib
from clip_jax.models import clip, presets

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "experiments"
TARGETS, OTHERS, RESULTS = "targets.csv", "published_runs.csv", "results.jsonl"
PAGE = "README.md"

# What an estimate of cost rests on: the backward pass takes twice the forward pass's FLOPs, and
# this share of what a v5e chip can do is reached.
_PASSES, _REACHED, _CHIP = 3, 0.4, "TPU v5 lite"


def main() -> int:
  parser = argparse.ArgumentParser(description="Writes the tables of experiments/README.md.")
  parser.add_argument("workdirs", nargs="*", type=pathlib.Path)
  options = parser.parse_args()
  runs = read_runs()
  for workdir in options.workdirs:
    path = workdir / "results.json"
    if not path.is_file():
      print(f"error: {path}: not found; finish the run first", file=sys.stderr)
      return 2
    run = json.loads(path.read_text(encoding="utf-8"))
    runs[run["name"]] = {"date": datetime.date.today().isoformat(), **run}
  page = FOLDER / PAGE
  try:
    text = filled(page.read_text(encoding="utf-8"), read_targets(), read_others(), runs)
  except ValueError as error:
    print(f"error: {page}: {error}", file=sys.stderr)
    return 2
  metrics.write_atomically(
    FOLDER / RESULTS, "".join(json.dumps(run) + "\n" for run in runs.values())
  )
  metrics.write_atomically(page, text)
  return 0


def filled(
  text: str,
  targets: Sequence[Mapping[str, str]],
  others: Sequence[Mapping[str, str]],
  runs: Mapping[str, Mapping[str, Any]],
) -> str:
  """The page with its tables anew. Raises: ValueError where the lines around one are missing."""
  tables = {
    "targets": targets_table(targets, runs),
    "others": others_table(others),
    "results": table(runs),
  }
  for name, rows in tables.items():
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    if begin not in text or end not in text:
      raise ValueError(f"the lines {begin.strip()} and {end.strip()} are not in it")
    head, rest = text.split(begin)
    text = head + begin + rows + end + rest.split(end)[1]
  return text


def cost(config: config_lib.Config) -> tuple[float, float]:
  """(FLOPs, v5e chip-hours) of a whole run: an estimate, from matrix products alone."""
  chip = chips.find(_CHIP)
  assert chip is not None
  pairs = config.steps * config.data.batch_pairs
  flops = float(_PASSES * clip.flops_per_pair(config.model, train=True) * pairs)
  return flops, flops / (_REACHED * chip.flops) / 3600


def exaflops(flops: float) -> str:
  """In units of 1e18, to three figures."""
  value = flops / 1e18
  return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def targets_table(
  targets: Sequence[Mapping[str, str]], runs: Mapping[str, Mapping[str, Any]]
) -> str:
  """Markdown: a row a run that has a published result."""
  rows = [
    "| experiment | model | data | pairs | epochs | batch | steps | EFLOP | v5e chip-hours | "
    "ImageNet top-1, published | source (status) | measured |",
    "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
  ]
  for target in targets:
    name = target["experiment"]
    config = cli.load_config(str(FOLDER / f"{name}.py"), [])
    flops, chip_hours = cost(config)
    cells = (
      f"`{name}`",
      _model_name(config.model),
      target["data"],
      f"{int(target['pairs']):,}",
      target["epochs"],
      f"{config.data.batch_pairs:,}",
      f"{config.steps:,}",
      exaflops(flops),
      f"{chip_hours:,.0f}",
      f"{target['imagenet_zero_shot_top1']}%",
      f"{target['source']} ({target['status']})",
      _measured(runs.get(name)),
    )
    rows.append("| " + " | ".join(cells) + " |")
  return "\n".join(rows) + "\n"


def others_table(others: Sequence[Mapping[str, str]]) -> str:
  """Markdown: a row a published run that no experiment file repeats."""
  rows = [
    "| model | data | pairs seen, millions | epochs | batch | learning rate, weight decay | "
    "ImageNet top-1, published | about | source (status) |",
    "| --- | --- | ---: | ---: | ---: | --- | ---: | --- | --- |",
  ]
  for run in others:
    cells = (
      run["model"],
      run["data"],
      f"{float(run['pairs_seen_millions']):,g}" if run["pairs_seen_millions"] else "",
      run["epochs"],
      f"{int(run['batch_pairs']):,}" if run["batch_pairs"] else "",
      ", ".join(filter(None, (run["learning_rate"], run["weight_decay"]))),
      f"{run['imagenet_zero_shot_top1']}%",
      run["about"],
      f"{run['source']} ({run['status']})",
    )
    rows.append("| " + " | ".join(cells) + " |")
  return "\n".join(rows) + "\n"


def _model_name(model: config_lib.Model) -> str:
  shape = (model.image, model.text, model.embed_dim)
  return next(
    name for name, m in presets.PUBLISHED.items() if (m.image, m.text, m.embed_dim) == shape
  )


def _measured(run: Mapping[str, Any] | None) -> str:
  if run is None:
    return "not run"
  top1 = run["figures"].get("eval/ImageNet/top1")
  return "run, see below" if top1 is None else f"{top1:.1%}"


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
  """Markdown: a row a measured figure, the run's cost on its first row."""
  rows = [
    "| experiment | figure | measured | chance | pairs | time | machine, date |",
    "| --- | --- | ---: | ---: | ---: | ---: | --- |",
  ]
  for run in runs.values():
    machine, first = run["machine"], True
    for name, value, chance in _figures(run["figures"]):
      cells = ("",) * 4
      if first:
        minutes = f"{run['train_seconds'] / 60:.1f} min"
        where = f"{machine['processor']}, {machine['device']}, jax {machine['jax']}, {run['date']}"
        cells = (f"`{run['name']}`", f"{run['pairs']:,}", minutes, where)
      row = (cells[0], name, f"{value:.1%}", f"{chance:.2%}", *cells[1:])
      rows.append("| " + " | ".join(row) + " |")
      first = False
  return "\n".join(rows) + "\n"


def _figures(figures: Mapping[str, float]) -> list[tuple[str, float, float]]:
  """(words, share, chance) of what a reader asks for first."""
  out = []
  for name, value in figures.items():
    task, measure = name.removeprefix("eval/").rsplit("/", 1)
    if measure == "top1":
      out.append((f"{task}: zero-shot top-1", value, figures[f"eval/{task}/chance"]))
    if "_R@" in measure and "chance" not in measure:
      way, k = measure.split("_R@")
      chance = figures[f"eval/{task}/{way}_chance_R@{k}"]
      out.append((f"{task}: {way.replace('_', ' ')} R@{k}", value, chance))
  return out


def read_targets() -> list[dict[str, str]]:
  """The rows of experiments/targets.csv, of runs that an experiment file repeats."""
  return _read(TARGETS)


def read_others() -> list[dict[str, str]]:
  """The rows of experiments/published_runs.csv, of runs that none does."""
  return _read(OTHERS)


def _read(name: str) -> list[dict[str, str]]:
  with (FOLDER / name).open(encoding="utf-8", newline="") as file:
    return list(csv.DictReader(file, strict=True))


def read_runs() -> dict[str, dict[str, Any]]:
  """The measured runs by name, in the order in which they were added."""
  path = FOLDER / RESULTS
  lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
  runs = [json.loads(line) for line in lines]
  return {run["name"]: run for run in runs}


if __name__ == "__main__":
  sys.exit(main())
