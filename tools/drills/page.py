"""The drills' results as a page for people."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tools.drills import results
from tools.drills.rows import ROWS, Row

_HEAD = """# What was tried against it

Every way in which a training run is known to break, what is promised then, and what was measured.
Written by `make drills`; a row that has not run says so, and a failed one fails the command.

F: tests of every push. N: longer ones, most of them in real processes. Z: fuzzing (`make fuzz`).
"""


def _sources(row: Row) -> str:
  files: dict[str, list[str]] = {}
  for part in results.parts(row):
    for test in row.tests(part):
      name = test.partition("::")[0].removeprefix("tests/").removesuffix(".py")
      files.setdefault(part, [])
      if name not in files[part]:
        files[part].append(name)
  return "; ".join(f"{part}: {', '.join(names)}" for part, names in files.items())


def _line(row: Row, found: Mapping[str, Any]) -> str:
  seconds = sum(part["seconds"] for part in found.values())
  commits = sorted({part["commit"] for part in found.values()})
  cells = (
    str(row.number),
    row.area,
    row.fault,
    row.promise,
    "; ".join(results.sentences(row, found)) or "-",
    results.outcome(row, found),
    _sources(row),
    f"{seconds:.0f}" if found else "-",
    ", ".join(commits) or "-",
  )
  return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _word(outcome: str) -> str:
  """An outcome without which part it is that failed or has not run."""
  return "passed in part" if ";" in outcome else outcome.partition(":")[0]


def markdown(document: Mapping[str, Any]) -> str:
  """The page. Args: document, as docs/reliability.json holds it."""
  found = {row.number: document["rows"].get(str(row.number), {}) for row in ROWS}
  words = Counter(_word(results.outcome(row, found[row.number])) for row in ROWS)
  told = ", ".join(f"{count} {word}" for word, count in words.most_common())
  machine = "\n".join(f"- {name}: {value}" for name, value in document["machine"].items())
  head = ("#", "area", "fault", "promise", "figure", "outcome", "tests", "seconds", "commit")
  lines = [
    _HEAD,
    f"{len(ROWS)} rows: {told}.\n",
    machine,
    "",
    "| " + " | ".join(head) + " |",
    "| ---: | --- | --- | --- | --- | --- | --- | ---: | --- |",
    *(_line(row, found[row.number]) for row in ROWS),
  ]
  return "\n".join(lines) + "\n"
