"""What pytest says of the drills -> outcomes and figures of each row."""

import dataclasses
import pathlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tools.drills.rows import PARTS, Part, Row


@dataclasses.dataclass(frozen=True)
class Case:
  """One test with one set of parameters. `figures`: by row, then by name."""

  test: str  # node id without parameters
  outcome: str  # "passed", "failed" or "skipped"
  seconds: float
  figures: Mapping[int, Mapping[str, float]]


def read(path: pathlib.Path) -> list[Case]:
  """The cases of pytest's JUnit XML (family xunit1); none where pytest did not get that far."""
  if not path.exists():
    return []
  cases = []
  for node in ElementTree.parse(path).iter("testcase"):
    kinds = {child.tag for child in node}
    bad, skipped = kinds & {"failure", "error"}, "skipped" in kinds
    figures: dict[int, dict[str, float]] = {}
    for item in node.iter("property"):
      if match := re.fullmatch(r"drill (\d+) (\w+)", item.get("name", "")):
        row, given = int(match[1]), {match[2]: float(item.get("value", "nan"))}
        figures[row] = together([figures.get(row, {}), given])
    outcome = "failed" if bad else "skipped" if skipped else "passed"
    test = f"{node.get('file')}::{node.get('name', '').partition('[')[0]}"
    cases.append(Case(test, outcome, float(node.get("time", 0.0)), figures))
  return cases


def together(figures: Iterable[Mapping[str, float]]) -> dict[str, float]:
  """Counts added up; of `most_...` the largest."""
  out: dict[str, float] = {}
  for one in figures:
    for name, value in one.items():
      most = name.startswith("most_")
      out[name] = value if name not in out else max(out[name], value) if most else out[name] + value
  return out


def judge(row: Row, part: Part, cases: Sequence[Case]) -> dict[str, Any]:
  """A row's part as JSON: outcome ("passed", "failed", "not run"), what failed, figures, seconds.

  A test that is not among the cases has failed; a part of which all was skipped has not run.
  """
  tests = functions(row, part)
  mine = [case for case in cases if case.test in tests]
  failed = {case.test for case in mine if case.outcome == "failed"}
  failed |= tests - {case.test for case in mine}
  skipped = {case.test for case in mine if case.outcome == "skipped"}
  passed = sum(case.outcome == "passed" for case in mine)
  figures = together(case.figures.get(row.number, {}) for case in mine)
  return {
    "outcome": "failed" if failed else "passed" if passed else "not run",
    "failed": sorted(failed),
    "skipped": sorted(skipped),
    "figures": {**figures, "cases": passed},
    "seconds": round(sum(case.seconds for case in mine), 1),
  }


def functions(row: Row, part: Part) -> set[str]:
  """The node ids of a part without parameters, as those of cases are."""
  return {test.partition("[")[0] for test in row.tests(part)}


def parts(row: Row) -> list[Part]:
  """Of what a row consists."""
  return [part for part in PARTS if row.tests(part)]


def sentences(row: Row, found: Mapping[str, Any]) -> list[str]:
  """The row's figures in words, as far as the parts that have run give them."""
  figures = together(part["figures"] for part in found.values())
  whole = {name: int(x) if x == int(x) else x for name, x in figures.items()}
  out = []
  for template in row.figures:
    names = set(re.findall(r"{(\w+)", template))
    if names <= whole.keys() and any(figures[name] for name in names):
      out.append(template.format(**whole))
  return out


def outcome(row: Row, found: Mapping[str, Any]) -> str:
  """In a word or two, of all parts of a row.

  "failed" also where all parts have passed and a figure is missing: then no test has measured it.
  """
  said = {part: found[part]["outcome"] if part in found else "not run" for part in parts(row)}
  if "failed" in said.values():
    return "failed: " + ", ".join(part for part, word in said.items() if word == "failed")
  missing = [part for part, word in said.items() if word == "not run"]
  if len(missing) == len(said):
    return "not run"
  if missing:
    return f"passed; {', '.join(missing)} not run"
  return "passed" if len(sentences(row, found)) == len(row.figures) else "failed: no figure"
