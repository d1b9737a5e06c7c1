import csv
import html
import json
import re
import xml.etree.ElementTree

import pytest
from paper_cells import as_if_measured, measured
from parsed_page import EVIL, Page

from clip_jax.evaluation.paper import page as paper_page
from clip_jax.evaluation.paper import published
from clip_jax.evaluation.paper import tables as paper_tables
from clip_jax.evaluation.paper import verdicts as paper_verdicts
from clip_jax.evaluation.paper import writers as paper_writers

ALL = tuple(published.TABLES)
MEASURED = as_if_measured(ALL)
SHOWN = EVIL.replace("\x00", "").replace("\ud800", "").replace("\u202e", "")  # what a line can hold
MARKDOWN_CELL = re.compile(r"(.+) [✓=◆] \((.+)\)")
LATEX_CELL = re.compile(r"(.+) \$(?:\\surd|=|\\diamond)\$ \((.+)\)")


@pytest.fixture(scope="module")
def grids():
  return paper_tables.compare(MEASURED, ALL)


def printed(table):
  """(row, column) -> the published text, by the places of the table."""
  place = published.TABLES[table].place
  return {place(c.model, c.dataset, c.metric): c.value for c in published.cells(table)}


def files(tmp_path, grids, cells=MEASURED, notes=()):
  paths = paper_writers.write(tmp_path / "out", grids, cells, notes)
  found = {
    str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
  }
  assert {str(path.relative_to(tmp_path / "out")) for path in paths} == found
  assert not any(name.endswith(".tmp") for name in found)
  return {path.name: path.read_text(encoding="utf-8") for path in paths}


def split_markdown(line):
  return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def plain(text):
  """Markdown's escapes undone."""
  return html.unescape(re.sub(r"\\([\\`*_\[\]|~#])", r"\1", text))


def unturned(table, heads, rows):
  """Parsed rows -> {(row, column): cell}, whichever way the table was written."""
  grid_rows = {row for row, _ in printed(table)}
  cells = {
    (row[0], head): cell for row in rows for head, cell in zip(heads[1:], row[1:], strict=True)
  }
  on_side = heads[1] in grid_rows and heads[1] not in {c for _, c in printed(table)}
  return {(b, a) if on_side else (a, b): cell for (a, b), cell in cells.items()}


@pytest.mark.parametrize("table", ALL)
def test_markdown_gives_every_published_digit_back(grids, table):
  sections = dict(part.split(": ", 1) for part in paper_writers.markdown(grids).split("\n## ")[1:])
  lines = [line for line in sections[published.TABLES[table].title].splitlines() if line[:1] == "|"]
  heads, _, *rows = ([plain(cell) for cell in split_markdown(line)] for line in lines)
  cells = unturned(table, heads, rows)
  matches = {place: MARKDOWN_CELL.fullmatch(cell) for place, cell in cells.items()}
  expected = printed(table)
  assert {place: m[1] for place, m in matches.items() if m} == expected
  assert {place: m[2] for place, m in matches.items() if m} == expected
  assert {cells[place] for place, m in matches.items() if not m} <= {"not published"}


@pytest.mark.parametrize("table", ALL)
def test_latex_gives_every_published_digit_back(grids, table):
  bodies = paper_writers.latex(grids).split(r"\begin{table}")[1:]
  body = bodies[ALL.index(table)]
  heads = body.split("\\toprule\n")[1].split(" \\\\")[0].split(" & ")
  rows = body.split("\\midrule\n")[1].split("\\bottomrule")[0].strip().split("\\\\\n")
  undo = re.compile(r"\\([&%$#_{}])")
  rows = [
    [undo.sub(r"\1", cell) for cell in row.removesuffix("\\\\").strip().split(" & ")]
    for row in rows
  ]
  cells = unturned(table, [undo.sub(r"\1", head.strip()) for head in heads], rows)
  matches = {place: LATEX_CELL.fullmatch(cell.replace("\\$", "$")) for place, cell in cells.items()}
  assert {place: m[1] for place, m in matches.items() if m} == printed(table)
  assert {place: m[2] for place, m in matches.items() if m} == printed(table)


def test_csv_and_json_lines_give_every_published_digit_back(tmp_path, grids):
  found = files(tmp_path, grids)
  expected = {
    (c.table, c.model, c.dataset, c.metric): c.value for key in ALL for c in published.cells(key)
  }
  rows = list(csv.DictReader(found["paper.csv"].splitlines()))
  lines = [json.loads(line) for line in found["paper.jsonl"].splitlines()]
  assert len(expected) == 961
  for records in (rows, lines):
    for column in ("measured", "published"):
      values = {
        tuple(r[name] for name in ("table", "model", "dataset", "metric")): r[column]
        for r in records
      }
      assert {key: value for key, value in values.items() if value} == expected
  assert {r["weights"] for r in rows if r["published"]} == {"a" * 64}
  assert [line["value"] for line in lines if line["published"]] == [m.value for m in MEASURED]


@pytest.mark.parametrize(
  ("table", "name", "count"), [("11", "zero_shot.csv", 243), ("10", "linear_probe.csv", 351)]
)
def test_the_files_themselves_are_the_oracle_of_the_large_tables(grids, table, name, count):
  """The page's table against the file, read by nothing of this project."""
  with (published.FOLDER / name).open() as file:
    wanted = [list(row.values())[:28] for row in csv.DictReader(file)]
  section = paper_page.page(grids).split(f'id="t{table}"')[1].split("</table>")[0]
  body = section[section.index("<table>") :] + "</table>"
  tree = xml.etree.ElementTree.fromstring(body)
  rows = tree.findall("tbody/tr")
  assert [["".join(row.find("th").itertext())] for row in rows] == [row[:1] for row in wanted]
  for kind, mark in (("measured", " ✓"), ("theirs", " ±0")):
    found = [
      ["".join(span.itertext()) for span in row.iterfind(f"td/span[@class='{kind}']")]
      for row in rows
    ]
    assert found == [[value + mark for value in row[1:]] for row in wanted]
    assert sum(map(len, found)) == count


@pytest.mark.parametrize("table", ALL)
def test_the_page_gives_every_published_digit_back(grids, table):
  section = paper_page.page(grids).split(f'id="t{table}"')[1]
  body = section[section.index("<table>") : section.index("</table>")] + "</table>"
  tree = xml.etree.ElementTree.fromstring(body)
  heads = ["".join(th.itertext()) for th in tree.iterfind("thead/tr/th")][1:]
  found = {}
  for row in tree.iterfind("tbody/tr"):
    name = "".join(row.find("th").itertext())
    for head, cell in zip(heads, row.iterfind("td"), strict=True):
      spans = {span.get("class"): "".join(span.itertext()) for span in cell.iterfind("span")}
      if "theirs" in spans:
        assert spans["measured"][:-2] == spans["theirs"].removesuffix(" ±0")
        assert spans["measured"][-2:] in (" ✓", " =", " ◆")
        found[name, head] = spans["theirs"].removesuffix(" ±0")
  assert found == printed(table)


def test_the_files_themselves_are_the_oracle_of_the_small_tables(grids):
  """paper.csv against what lies in the files, read by nothing of this project."""
  lines = csv.DictReader(paper_writers.table_csv(grids).splitlines())
  names = ("table", "model", "dataset", "metric")
  found = {tuple(line[n] for n in names): line["published"] for line in lines if line["published"]}

  def rows(name):
    return list(csv.DictReader((published.FOLDER / name).read_text().splitlines()))

  small = {tuple(r[n] for n in names): r["value"] for r in rows("extra_tables.csv") if r["value"]}
  assert small.items() <= found.items()
  assert {key for key, *_ in small} == {"1", "12", "14", "15", "figure2", "figure5", "figure9"}
  for row in rows("datasets.csv"):
    for column in ("classes", "train_size", "test_size", "metric"):
      assert found["9", "", row["key"], column.replace("_", " ")] == row[column]
  columns = {"19": ("resnet_blocks", "ResNet blocks"), "20": ("vit_width", "vision width")}
  for row in rows("architectures.csv"):
    table = "19" if row["model"].startswith("RN") else "20"
    for column, metric in (columns[table], ("learning_rate", "learning rate")):
      assert found[table, row["model"], "", metric] == row[column]
  text = (published.FOLDER / "hyperparameters.json").read_text()
  for (table, model, _, metric), value in found.items():
    if table == "18":
      name = model or metric.replace(" ", "_")
      assert re.search(rf'"{name}": {re.escape(value)}\b', text), (name, value)


def test_the_page_is_well_formed_and_fetches_nothing(grids):
  text = paper_page.page(grids, ["a note"])
  page = Page(text)
  assert page.ids == [f"t{key}" for key in ALL]
  assert {v for _, name, v in page.attributes if name == "href"} == {f"#t{key}" for key in ALL}
  assert "script" not in page.tags
  assert not {"src", "srcset", "action"} & {name for _, name, _ in page.attributes}
  assert not any(name.startswith("on") for _, name, _ in page.attributes)
  assert not re.search(r"https?:|url\(|@import", text)
  assert "default-src 'none'" in text
  assert "prefers-color-scheme: dark" in text
  assert page.tags.count("td") == sum(len(grid.cells) for grid in grids)
  assert "a note" in page.text


def test_every_cell_of_the_page_says_its_verdict_and_where_it_comes_from():
  cells = [
    measured(value=81.2),
    measured(dataset="CIFAR10", value=90.0),
    measured(dataset="MNIST", value=57.55),
    measured(model="own", value=12.34),
  ]
  grids = paper_tables.compare(cells, ["11"])
  text = paper_page.page(grids)
  page = Page(text)
  titles = [v for tag, name, v in page.attributes if (tag, name) == ("td", "title")]
  assert len(titles) == 270
  assert titles[0].splitlines() == [
    "RN50, Food101, accuracy",
    "reproduced: within 0.5",
    "measured 81.2 on 25,250 images",
    "published 81.1, difference +0.1",
    "open_clip docs/openclip_results.csv: acc1 80.8",
    *(
      f"{name} {letter * 64}"
      for name, letter in zip(("weights", "data", "prompts"), "abc", strict=True)
    ),
    "code v1",
    "1.5 seconds",
  ]
  assert titles[1].splitlines()[1].startswith("off by +14.4: only 70.71 to 76.46 is explained")
  assert titles[2].splitlines()[1].startswith("not available: prepare cifar100 with TFDS")
  for kind in paper_verdicts.KINDS:
    assert f"{paper_verdicts.MARKS[kind]} {kind}" in page.text
    words = [w for w in page.words if w.strip() == kind]
    assert len(words) >= [c.kind for c in grids[0].cells.values()].count(kind), kind
  assert len(set(paper_verdicts.MARKS.values())) == 6


@pytest.mark.parametrize("form", [paper_writers.markdown, paper_writers.latex, paper_page.page])
def test_missing_cells_say_so_and_how_to_get_them(form):
  grids = paper_tables.compare([], ["11"], missing={"Birdsnap": "ask the authors"})
  text = form(grids)
  assert text.count("not available") >= 243
  assert "ask the authors" in text
  assert "prepare sun397/standard-part1-120k with TFDS" in text


def test_latex_escapes_what_it_would_read():
  name = r"50% & #1_a {b} $x$ ~y^z \input{/etc/passwd}"
  text = paper_writers.latex(
    paper_tables.compare([measured(model=name, value=1.0)], ["11"], models=[name])
  )
  assert (
    r"50\% \& \#1\_a \{b\} \$x\$ \textasciitilde{}y\textasciicircum{}z "
    r"\textbackslash{}input\{/etc/passwd\}"
  ) in text
  for part in (r"\begin{tabular}", r"\end{tabular}}", r"\toprule", r"\midrule", r"\bottomrule"):
    assert text.count(part) == 1
  heads = next(line for line in text.splitlines() if line.startswith(" & "))
  rows = text.split("\\midrule\n")[1].split("\\bottomrule")[0].strip().splitlines()
  columns = re.search(r"\\begin\{tabular\}\{(l r*|lr*)\}", text)[1]
  for line in (heads, *rows):
    assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1


def test_hostile_names_stay_names(tmp_path):
  assert SHOWN.isprintable()
  cells = [measured(model=SHOWN, dataset=f"{SHOWN} | [x](y) `z`", value=50.0, n=10)]
  grids = paper_tables.compare(cells, ["11"], missing={SHOWN: SHOWN})
  found = files(tmp_path, grids, cells, [SHOWN])
  page = Page(found["paper.html"])
  assert "script" not in page.tags
  assert "{{ 7 * 7 }}" in page.text
  lines = [line for line in found["paper.md"].splitlines() if line.startswith("|")]
  assert len({len(split_markdown(line)) for line in lines}) == 1
  assert "<script>" not in found["paper.md"]
  rows = list(csv.DictReader(found["paper.csv"].splitlines()))
  assert {row["model"] for row in rows if row["measured"]} == {SHOWN}


def test_what_clip_benchmarks_users_read_is_written(tmp_path, grids):
  found = files(tmp_path, grids)
  results = {name: json.loads(text) for name, text in found.items() if name.endswith(".json")}
  assert results["food101_sha256-aaaaaaaaaaaa_RN50_en_zeroshot_classification.json"] == {
    "dataset": "food101",
    "model": "RN50",
    "pretrained": "sha256-aaaaaaaaaaaa",
    "task": "zeroshot_classification",
    "metrics": {"acc1": 0.811},
    "language": "en",
  }
  assert len(list(csv.DictReader(found["clip_benchmark.csv"].splitlines()))) == len(results)


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path, grids):
  files(tmp_path, grids)
  before = (tmp_path / "out" / "paper.md").read_text()
  (tmp_path / "out" / "paper.md.tmp").mkdir()
  with pytest.raises(OSError, match=r"paper\.md"):
    paper_writers.write(tmp_path / "out", paper_tables.compare([], ALL), [])
  assert (tmp_path / "out" / "paper.md").read_text() == before
