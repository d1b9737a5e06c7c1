"""Runs' results.json -> experiments/results.jsonl -> the table in experiments/README.md.

python tools/results_table.py runs/demo runs/fashion_mnist ...   # add or replace these runs
python tools/results_table.py                                    # write the table anew
"""

import argparse
import datetime
import json
import os
import pathlib
import sys
from typing import Any

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "experiments"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def main() -> int:
  parser = argparse.ArgumentParser(description="Writes the table of measured runs.")
  parser.add_argument("workdirs", nargs="*", type=pathlib.Path)
  options = parser.parse_args()
  lines = FOLDER / "results.jsonl"
  runs = _read(lines)
  for workdir in options.workdirs:
    path = workdir / "results.json"
    if not path.is_file():
      print(f"error: {path}: not found; finish the run first", file=sys.stderr)
      return 2
    run = json.loads(path.read_text(encoding="utf-8"))
    runs[run["name"]] = {"date": datetime.date.today().isoformat(), **run}
  _replace(lines, "".join(json.dumps(run) + "\n" for run in runs.values()))
  page = FOLDER / "README.md"
  text = page.read_text(encoding="utf-8")
  if BEGIN not in text or END not in text:
    print(f"error: {page}: the lines {BEGIN} and {END} are not in it", file=sys.stderr)
    return 2
  head, rest = text.split(BEGIN)
  _replace(page, f"{head}{BEGIN}\n{table(list(runs.values()))}{END}{rest.split(END)[1]}")
  return 0


def table(runs: list[dict[str, Any]]) -> str:
  """Markdown: a row a figure, the run's cost on its first row."""
  rows = [
    "| experiment | figure | measured | chance | pairs | time | machine, date |",
    "| --- | --- | ---: | ---: | ---: | ---: | --- |",
  ]
  for run in runs:
    machine, first = run["machine"], True
    for name, value, chance in _figures(run["figures"]):
      cost = ("",) * 4
      if first:
        minutes = f"{run['train_seconds'] / 60:.1f} min"
        where = f"{machine['processor']}, {machine['device']}, jax {machine['jax']}, {run['date']}"
        cost = (f"`{run['name']}`", f"{run['pairs']:,}", minutes, where)
      rows.append(
        f"| {cost[0]} | {name} | {value:.1%} | {chance:.2%} | {cost[1]} | {cost[2]} | {cost[3]} |"
      )
      first = False
  return "\n".join(rows) + "\n"


def _figures(figures: dict[str, float]) -> list[tuple[str, float, float]]:
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


def _read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
  runs = [json.loads(line) for line in lines]
  return {run["name"]: run for run in runs}


def _replace(path: pathlib.Path, text: str) -> None:
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(text, encoding="utf-8")
  os.replace(temporary, path)


if __name__ == "__main__":
  sys.exit(main())
