"""Runs the drills and writes docs/reliability.md and .json.

python -m tools.drills.report [--parts F N Z] [--rows 1 2 ...] [--short] [--output DIR]
python -m tools.drills.report --junit FILE [FILE...]

The second form runs nothing: it takes what a run of pytest wrote with `-o junit_family=xunit1
--junitxml=FILE`, of all rows whose tests are in it. What is not asked for keeps the result that it
has in reliability.json, with the commit and the machine it had. Exit code 1: a drill has failed, or
was not found.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import string
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

from clip_jax import metrics, summary
from tools.drills import page, results
from tools.drills.rows import PARTS, ROWS, Part, Row

ROOT = pathlib.Path(__file__).resolve().parents[2]
_LIBRARIES = ("orbax-checkpoint", "grain", "array_record", "pillow", "numpy")
_LIMIT_SECONDS = 2400  # of one start of pytest


def _pytest(tests: Sequence[str], words: Sequence[str] = ()) -> list[results.Case]:
  """Runs these tests, which print as they go."""
  flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-o", "junit_family=xunit1", f"--junitxml={path}"]
    try:
      subprocess.run(
        [*command, *words, *tests], cwd=ROOT, env={**os.environ, **flags}, timeout=_LIMIT_SECONDS
      )
    except subprocess.TimeoutExpired:
      print(f"not finished in {_LIMIT_SECONDS} s: {' '.join(tests)}", file=sys.stderr)
    return results.read(path)


def _files(tests: Iterable[str]) -> dict[str, list[str]]:
  """Node ids by file, each once."""
  out: dict[str, list[str]] = {}
  for test in dict.fromkeys(tests):
    out.setdefault(test.partition("::")[0], []).append(test)
  return out


def _run(wanted: Sequence[tuple[Row, Part]]) -> Iterable[list[results.Case]]:
  """The cases, as they come: tests of every push two files at a time, the others alone."""
  quick = _files(test for row, part in wanted if part == "F" for test in row.F)
  if quick:
    yield _pytest([test for tests in quick.values() for test in tests], ["-n2", "--dist=loadfile"])
  rest = _files(test for row, part in wanted if part != "F" for test in row.tests(part))
  for tests in rest.values():
    yield _pytest(tests)


def _covered(
  wanted: Sequence[tuple[Row, Part]], cases: Sequence[results.Case]
) -> list[tuple[Row, Part]]:
  """Of `wanted` those whose tests are all among the cases."""
  seen = {case.test for case in cases}
  return [(row, part) for row, part in wanted if seen.issuperset(results.functions(row, part))]


def _commit() -> str:
  git = ["git", "-C", str(ROOT)]
  name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
  changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "clip_jax", "tests"]).returncode
  return name.stdout.strip() + ("+" if changed else "")


def _machine() -> dict[str, str]:
  versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
  return {name: str(value) for name, value in summary.machine().items()} | versions


def _document(path: pathlib.Path) -> dict[str, Any]:
  """What reliability.json holds: rows, of them parts; machines by letter, which each part names."""
  document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
  document.pop("machine", None)  # as it was once: of which parts, nobody kept
  document.setdefault("machines", {})
  return document


def _letter(machines: dict[str, dict[str, str]], here: dict[str, str]) -> str:
  """That of this machine, which is added where it is a new one."""
  for letter, known in machines.items():
    if known == here:
      return letter
  letter = next(letter for letter in string.ascii_uppercase if letter not in machines)
  machines[letter] = here
  return letter


def _options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
  parser.add_argument("--parts", nargs="+", choices=PARTS, default=["F", "N"])
  parser.add_argument("--rows", nargs="+", type=int, help="by number; default: all")
  parser.add_argument("--junit", nargs="+", type=pathlib.Path, default=[], metavar="FILE")
  parser.add_argument("--short", action="store_true", help="of part N what takes seconds")
  parser.add_argument(
    "--output", type=pathlib.Path, metavar="DIR", help="default: docs; build/drills with --short"
  )
  options = parser.parse_args()
  options.output = options.output or ROOT / ("build/drills" if options.short else "docs")
  if unknown := set(options.rows or ()) - {row.number for row in ROWS}:
    parser.error(f"--rows: no row {', '.join(map(str, sorted(unknown)))}; 1 to {len(ROWS)}")
  return options


def _wanted(options: argparse.Namespace) -> list[tuple[Row, Part]]:
  rows: tuple[Row, ...] = ROWS
  if options.short:
    rows = tuple(dataclasses.replace(row, N=row.short) for row in ROWS)
  return [
    (row, part)
    for row in rows
    for part in results.parts(row)
    if part in options.parts and row.number in (options.rows or range(len(ROWS) + 1))
  ]


def _write(output: pathlib.Path, document: dict[str, Any]) -> None:
  used = {part.get("machine") for parts in document["rows"].values() for part in parts.values()}
  document["machines"] = {x: known for x, known in document["machines"].items() if x in used}
  output.mkdir(parents=True, exist_ok=True)
  metrics.write_atomically(output / "reliability.json", json.dumps(document, indent=1) + "\n")
  metrics.write_atomically(output / "reliability.md", page.markdown(document))


def main() -> int:
  options = _options()
  path = options.output / "reliability.json"
  document = _document(path)
  wanted, here = _wanted(options), _machine()
  commit = _commit()
  cases: list[results.Case] = []

  def record(judged: Sequence[tuple[Row, Part]]) -> None:
    for row, part in judged:
      found = {**results.judge(row, part, cases), "commit": commit}
      found["machine"] = _letter(document["machines"], here)
      document["rows"].setdefault(str(row.number), {})[part] = found
    _write(options.output, document)

  for more in map(results.read, options.junit) if options.junit else _run(wanted):
    cases += more
    record(_covered(wanted, cases))
  if options.junit:
    wanted = _covered(wanted, cases)
  record(wanted)  # those of which a test never came, too
  bad = 0
  for row in {row.number: row for row, _ in wanted}.values():
    found = document["rows"][str(row.number)]
    word = results.outcome(row, found)
    bad += word.startswith("failed")
    print(f"{row.number:2} {row.fault}: {word}. {'; '.join(results.sentences(row, found))}")
    for part in found.values():
      for test in part["failed"]:
        print(f"   failed: {test}", file=sys.stderr)
  print(f"{options.output / 'reliability.md'}: {bad} rows failed")
  return 1 if bad else 0


if __name__ == "__main__":
  sys.exit(main())
