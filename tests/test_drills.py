"""The list of drills names tests that exist; the report says what pytest said, and no more."""

import ast
import json
import pathlib
import re

import pytest

from tools.drills import fuzz, page, report, results
from tools.drills.rows import PARTS, ROWS, Row

ROOT = pathlib.Path(__file__).parents[1]


def _functions(file):
  tree = ast.parse((ROOT / file).read_text())
  return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_rows_are_numbered_and_name_tests_that_exist():
  assert [row.number for row in ROWS] == list(range(1, 35))
  for row in ROWS:
    tests = [test for part in PARTS for test in row.tests(part)]
    assert len(tests) == len(set(tests)) > 0
    assert not [test for test in row.F if "/drills/" in test]
    assert not [test for test in (*row.N, *row.Z) if "/drills/" not in test]
    for test in tests:
      file, _, name = test.partition("::")
      assert name in _functions(file), test
    assert {test.partition("[")[0] for test in row.short} <= set(row.N)


def test_every_drill_is_in_a_row():
  listed = {test for row in ROWS for part in PARTS for test in row.tests(part)}
  for file in sorted((ROOT / "tests" / "drills").glob("test_*.py")):
    here = file.relative_to(ROOT).as_posix()
    for name in _functions(here):
      assert not name.startswith("test_") or f"{here}::{name}" in listed, f"{here}::{name}"


ROW = Row(
  7, "data", "a fault", "a promise",
  ("{found} of {made} found in {most_seconds:.1f} s", "{runs:,} runs"),
  F=("tests/test_a.py::test_one", "tests/test_a.py::test_two"),
  N=("tests/drills/test_b.py::test_x",),
)  # fmt: skip
JUNIT = """<testsuites><testsuite>
<testcase file="tests/test_a.py" name="test_one[a]" time="1.5"><properties>
<property name="drill 7 found" value="2.0"/><property name="drill 7 made" value="3.0"/>
<property name="drill 7 found" value="1.0"/><property name="drill 8 found" value="50.0"/>
<property name="drill 7 most_seconds" value="0.25"/><property name="other" value="x"/>
</properties></testcase>
<testcase file="tests/test_a.py" name="test_one[b-[]]" time="1.0"><properties>
<property name="drill 7 found" value="4.0"/><property name="drill 7 made" value="4.0"/>
<property name="drill 7 most_seconds" value="0.75"/></properties></testcase>
<testcase file="tests/test_a.py" name="test_two" time="0.5">{}</testcase>
<testcase file="tests/test_a.py" name="test_other" time="9"><failure/></testcase>
</testsuite></testsuites>"""


def _cases(tmp_path, inside=""):
  path = tmp_path / "junit.xml"
  path.write_text(JUNIT.format(inside))
  return results.read(path)


def test_counts_add_up_and_extremes_do_not(tmp_path):
  found = results.judge(ROW, "F", _cases(tmp_path))
  assert found == {
    "outcome": "passed",
    "failed": [],
    "skipped": [],
    "figures": {"found": 7.0, "made": 7.0, "most_seconds": 0.75, "cases": 3},
    "seconds": 3.0,
  }
  assert results.sentences(ROW, {"F": found}) == ["7 of 7 found in 0.8 s"]
  assert results.outcome(ROW, {"F": found}) == "passed; N not run"


@pytest.mark.parametrize("inside", ["<failure>no</failure>", "<error/>"])
def test_one_failure_fails_the_row(tmp_path, inside):
  found = results.judge(ROW, "F", _cases(tmp_path, inside))
  assert (found["outcome"], found["failed"]) == ("failed", ["tests/test_a.py::test_two"])
  assert results.outcome(ROW, {"F": found}) == "failed: F"


def test_what_was_skipped_or_not_found_has_not_passed(tmp_path):
  found = results.judge(ROW, "F", _cases(tmp_path, "<skipped/>"))
  assert (found["outcome"], found["skipped"]) == ("passed", ["tests/test_a.py::test_two"])
  gone = results.judge(ROW, "N", _cases(tmp_path))
  assert (gone["outcome"], gone["failed"]) == ("failed", ["tests/drills/test_b.py::test_x"])
  assert results.judge(ROW, "N", results.read(tmp_path / "none.xml"))["outcome"] == "failed"


def test_a_row_without_a_result_has_not_run():
  assert results.outcome(ROW, {}) == "not run"
  document = {"machines": {}, "rows": {}}
  text = page.markdown(document)
  assert f"{len(ROWS)} rows: {len(ROWS)} not run." in text
  assert text.count("| not run |") == len(ROWS)
  told = text.partition("## What was not tried")[2]
  for what in ("object stores", "loss of power", "TPUs: bit-exactness", "NFS"):
    assert f"- **{what}" in told
  otherwise = told.partition("## Where this differs from the rules")[2]
  for what in ("`jax.distributed` in a run of one process", "a setting to train on when a check"):
    assert f"- **{what}" in otherwise


def test_a_figure_that_nobody_measured_fails_a_row_that_ran(tmp_path):
  found = {"F": results.judge(ROW, "F", _cases(tmp_path))}
  passed = {"outcome": "passed", "failed": [], "skipped": [], "seconds": 1.0}
  nothing = {**passed, "figures": {"cases": 1}}
  assert results.outcome(ROW, {**found, "N": nothing}) == "failed: no figure"
  whole = {**passed, "figures": {"cases": 1, "runs": 12_000.0, "most_seconds": 2.0}}
  assert results.outcome(ROW, {**found, "N": whole}) == "passed"
  assert results.sentences(ROW, {**found, "N": whole}) == ["7 of 7 found in 2.0 s", "12,000 runs"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
  """The report over a pytest that says what it is told to; returns exit code, document, output."""

  def run(words, outcomes):
    run.asked = []

    def pytest_says(tests, words=()):
      run.asked += tests
      figures = {row.number: dict.fromkeys(_names(row), 1.0) for row in ROWS}
      return [
        results.Case(test.partition("[")[0], outcomes.get(test, "passed"), 1.0, figures)
        for test in tests
      ]

    monkeypatch.setattr(report, "_pytest", pytest_says)
    monkeypatch.setattr("sys.argv", ["report", *words, "--output", str(tmp_path)])
    code = report.main()
    return code, json.loads((tmp_path / "reliability.json").read_text()), capsys.readouterr()

  return run


def _names(row):
  """All names that a row's sentences ask for."""
  return {name for template in row.figures for name in re.findall(r"{(\w+)", template)} - {"cases"}


def test_the_report_keeps_what_was_not_asked_for(run):
  code, document, _ = run(["--parts", "F", "--rows", "15"], {})
  assert (code, list(document["rows"]), list(document["rows"]["15"])) == (0, ["15"], ["F"])
  bad = "tests/drills/test_damage.py::test_killed_at_a_random_moment_of_a_save"
  code, document, told = run(["--parts", "N", "--rows", "23", "25"], {bad: "failed"})
  assert code == 1
  assert bad in told.err
  words = {int(row): {p: x["outcome"] for p, x in parts.items()}
           for row, parts in document["rows"].items()}  # fmt: skip
  assert words == {15: {"F": "passed"}, 23: {"N": "failed"}, 25: {"N": "passed"}}
  code, document, _ = run(["--parts", "N", "--rows", "23"], {})
  assert (code, document["rows"]["23"]["N"]["outcome"]) == (0, "passed")


def test_the_short_form_runs_what_is_quick_alone(run):
  code, document, _ = run(["--parts", "N", "--short"], {})
  assert code == 0
  assert set(document["rows"]) == {str(row.number) for row in ROWS if row.short}
  with_parameters = next(test for row in ROWS for test in row.short if test.endswith("]"))
  assert run.asked == [test for row in ROWS for test in row.short]
  code, document, _ = run(["--parts", "N", "--short"], {with_parameters: "failed"})
  assert code == 1
  failed = [part["N"]["failed"] for part in document["rows"].values() if part["N"]["failed"]]
  assert failed == [[with_parameters.partition("[")[0]]]


def test_each_part_keeps_the_machine_it_ran_on(run, tmp_path, monkeypatch):
  def on(cores, *words):
    monkeypatch.setattr(report, "_machine", lambda: {"processor": f"{cores} cores"})
    return run(words, {})[1]

  on(2, "--parts", "F", "--rows", "1", "3")
  document = on(8, "--parts", "N", "--rows", "1")
  assert document["machines"] == {"A": {"processor": "2 cores"}, "B": {"processor": "8 cores"}}
  machines = {
    (row, part): found["machine"]
    for row, parts in document["rows"].items() for part, found in parts.items()
  }  # fmt: skip
  assert machines == {("1", "F"): "A", ("1", "N"): "B", ("3", "F"): "A"}
  page = (tmp_path / "reliability.md").read_text()
  assert "- A: processor 2 cores\n- B: processor 8 cores\n" in page
  assert re.search(r"\| F: \w+\+? A; N: \w+\+? B \|", page)
  document = on(8, "--parts", "F", "--rows", "1", "3")
  assert document["machines"] == {"B": {"processor": "8 cores"}}


def test_results_from_before_machines_were_kept_say_so(run, tmp_path):
  run(["--parts", "F", "--rows", "1", "3"], {})
  path = tmp_path / "reliability.json"
  document = json.loads(path.read_text())
  document["machine"] = {"jax": "1"}
  del document["machines"], document["rows"]["1"]["F"]["machine"]
  path.write_text(json.dumps(document))
  _, document, _ = run(["--parts", "F", "--rows", "3"], {})
  assert "machine" not in document
  page = (tmp_path / "reliability.md").read_text()
  assert "\n- ?: a machine that was not kept\n" in page
  assert re.search(r"\| F: \w+\+? \? \|", page)


def test_what_pytest_has_written_elsewhere_is_taken(run, tmp_path):
  """Rows whose tests are all in the file, and no others."""
  junit = tmp_path / "junit.xml"
  junit.write_text(
    '<testsuites><testcase file="tests/test_train_step.py" time="2" '
    'name="test_a_step_that_is_not_finite_changes_nothing[x]"><properties>'
    '<property name="drill 15 leaves" value="9.0"/>'
    '<property name="drill 15 differing" value="0.0"/>'
    '</properties></testcase><testcase file="tests/test_train_step.py" time="1" '
    'name="test_spikes_are_only_logged_by_default"/></testsuites>'
  )
  code, document, told = run(["--junit", str(junit)], {})
  assert (code, list(document["rows"])) == (0, ["15"])
  assert "15 one loss or gradient" in told.out
  assert "9 arrays compared, 0 differ" in (tmp_path / "reliability.md").read_text()


def test_all_of_it_makes_a_page_of_all_rows(run, tmp_path):
  code, _, told = run(["--parts", "F", "N", "Z"], {})
  page = (tmp_path / "reliability.md").read_text()
  assert code == 0, told.out
  assert f"{len(ROWS)} rows: {len(ROWS)} passed." in page


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_what_is_fuzzed_takes_good_files_and_empty_ones(name, tmp_path):
  target, good = fuzz.TARGETS[name]
  for data in (b"", *good()):
    target(data, tmp_path / "input")
