"""The evaluations of this project, on the real images that are at hand and the models trained here.

  make prepare && make evaluations        or: python tools/evaluations.py [NAME ...]

Runs the commands of STUDIES one after another, for the runs of experiments/ under runs/. Answers
and tables are kept in docs/evaluations/, pages with pictures in runs/evaluations/;
docs/evaluations.md is written from the answers. A study whose answer is there is not run again,
unless it is named.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

if __package__ in (None, ""):
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from clip_jax import metrics, summary
from clip_jax.evaluation.markdown import escaped, heading, row

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS, RUNS = ROOT / "docs" / "evaluations", ROOT / "runs"
KEPT = (".md", ".csv", ".svg", ".tex")  # of what a verb writes into its folder


@dataclasses.dataclass(frozen=True)
class Study:
  """`words` are those of `clip-jax`, without --output and --json."""

  title: str
  words: str
  page: str = ""  # the name of the page, where --output is a file
  note: str = ""  # what to think of it
  option: str = "--output"  # what the verb calls the place of its page or folder

  def command(self, output: pathlib.Path) -> list[str]:
    return [*self.words.split(), self.option, str(output / self.page), "--json"]


_FASHION = "--weights runs/fashion_mnist --data data/fashion_mnist --prompts fashion_mnist"
_DIGITS, _MNIST = (
  "--weights runs/demo --data digits",
  "--weights runs/demo --data data --dataset MNIST",
)
_STAMPS = "--weights runs/clipart --data data/clipart --split stamps_test --prompts stamps"
_MODELS = "demo=runs/demo clipart=runs/clipart"  # the other reads no more than 16 tokens
_TABLES = "10,11,13,16,1,9,12,14,15,18,19,20,figure2,figure5,figure9,figure13"
_FIGURE_2 = "--predictive docs/predictive.json"

STUDIES = {
  "paper": Study(
    "The paper's tables", f"paper --models {_MODELS} --tables {_TABLES} --data data {_FIGURE_2}"
  ),
  "clipart": Study(
    "Clip art and its captions; stamps",
    "evaluate --weights runs/clipart",
    "report.html",
    option="--report",
  ),
  "demo": Study(
    "Drawn scenes and handwritten digits",
    "evaluate --weights runs/demo",
    "report.html",
    option="--report",
  ),
  "probe_fashion_mnist": Study("Probes on Fashion-MNIST", f"probe {_FASHION}"),
  "probe_mnist": Study("Probes on MNIST", f"probe {_MNIST}"),
  "probe_digits": Study("Probes on scikit-learn's digits", f"probe {_DIGITS}"),
  "stress_fashion_mnist": Study(
    "Corrupted photos of Fashion-MNIST", f"stress {_FASHION} --limit 1000"
  ),
  "stress_digits": Study("Corrupted digits", f"stress {_DIGITS}"),
  "stress_stamps": Study("Corrupted stamps", f"stress {_STAMPS}"),
  "overlap_fashion_mnist": Study(
    "Fashion-MNIST's test photos in its training photos",
    f"overlap {_FASHION} --training data/fashion_mnist",
    note="Of 28 pixels a hash of 64 bits sees little but the outline: two boots are duplicates to "
    "it, as its page shows. Such pictures are too small for it.",
  ),
  "overlap_digits": Study(
    "Digits held out in the digits that were trained on", f"overlap {_DIGITS} --training digits"
  ),
  "overlap_stamps": Study(
    "Stamps held out in the clip art that was trained on",
    f"overlap {_STAMPS} --training data/clipart --by embedding",
    note="Its page shows what so small a model takes for the same: a 9 and a 2, two road signs. "
    "The question itself wants a better embedding.",
  ),
  "predictions_fashion_mnist": Study(
    "Single photos of Fashion-MNIST", f"predictions {_FASHION} --halves", "page.html"
  ),
  "predictions_mnist": Study("Single digits of MNIST", f"predictions {_MNIST}", "page.html"),
  "predictions_digits": Study("Single digits", f"predictions {_DIGITS}", "page.html"),
  "predictions_stamps": Study("Single stamps", f"predictions {_STAMPS}", "page.html"),
}


def main() -> int:
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(STUDIES)}")
  options = parser.parse_args()
  unknown = [name for name in options.names if name not in STUDIES]
  if unknown:
    parser.error(f"{unknown[0]}: choose of {', '.join(STUDIES)}")
  for name, study in STUDIES.items():
    if name in options.names or not (options.names or (DOCS / f"{name}.json").is_file()):
      print(f"{study.title}: clip-jax {study.words}", flush=True)
      if not measure(name, study):
        return 1
    write_page()
  return 0


def measure(name: str, study: Study) -> bool:
  """Runs a study and keeps its answer and tables. Returns whether it went well."""
  output = RUNS / "evaluations" / name
  (output if study.page else output.parent).mkdir(parents=True, exist_ok=True)
  words = [sys.executable, "-m", "clip_jax.cli", *study.command(output)]
  done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  if done.returncode:
    return False
  answer = {"command": study.words, "machine": summary.machine(), **json.loads(done.stdout)}
  DOCS.mkdir(parents=True, exist_ok=True)
  for path in sorted(output.iterdir()):
    if path.suffix in KEPT and path.name != "pairs.csv":  # a line for every image
      _keep(DOCS / f"{name}{path.suffix}", path.read_text(encoding="utf-8"))
  _keep(DOCS / f"{name}.json", json.dumps(answer, indent=1) + "\n")
  return True


def _keep(path: pathlib.Path, text: str) -> None:
  """Without the place where this checkout lies."""
  metrics.write_atomically(path, text.replace(f"{ROOT}/", ""))


def write_page() -> None:
  """docs/evaluations.md, of the answers that are there."""
  found = {
    name: json.loads((DOCS / f"{name}.json").read_text())
    for name in STUDIES
    if (DOCS / f"{name}.json").is_file()
  }
  if found:
    metrics.write_atomically(DOCS.with_suffix(".md"), "\n".join(page(found)) + "\n")


def page(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
  """The lines: of each study its command, its figures, and where its tables are."""
  machines = sorted({answer["machine"]["processor"] for answer in found.values()})
  yield "# Evaluations of the models trained here"
  yield ""
  yield "Written by `python tools/evaluations.py` (" + "; ".join(machines) + ") from the answers in"
  yield "`docs/evaluations/`. The models are small and learned from few pairs"
  yield "(experiments/README.md): the figures show what is measured, not what CLIP can do."
  for name, answer in found.items():
    yield ""
    yield f"## {STUDIES[name].title}"
    yield ""
    yield f"`clip-jax {answer['command']}`"
    yield ""
    yield from heading(["figure", "value"])
    yield from (row([escaped(what.replace("_", " ")), v]) for what, v in figures(answer))
    if STUDIES[name].note:
      yield ""
      yield STUDIES[name].note
    tables = [p.name for p in sorted(DOCS.glob(f"{name}.*")) if p.suffix in KEPT]
    if tables:
      yield ""
      yield "More: " + ", ".join(f"[{table}](evaluations/{table})" for table in tables)


def figures(answer: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
  """The numbers of an answer by name, as a table shows them; not its lists of single images."""
  for key, value in answer.items():
    if prefix or key not in ("command", "machine"):
      if isinstance(value, Mapping) and "bound" in value:
        yield f"{prefix}{key}", f"{value['bound'] or ''} {value['shots']:.4g}".strip()
      elif isinstance(value, Mapping):
        yield from figures(value, f"{prefix}{key}: ")
      elif isinstance(value, (int, float)) and not isinstance(value, bool):
        whole = float(value).is_integer()
        yield f"{prefix}{key}", f"{int(value):,}" if whole else f"{value:.4g}"


if __name__ == "__main__":
  sys.exit(main())
