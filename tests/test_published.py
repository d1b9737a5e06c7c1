import collections
import configparser
import csv
import decimal
import pathlib
import re

import pytest

from clip_jax.evaluation.paper import published, published_notes
from clip_jax.evaluation.paper import verdicts as paper_verdicts

ROOT = pathlib.Path(__file__).parents[1]
COUNTS = {
  "1": 6,
  "9": 27 * 4,
  "10": 13 * 27,
  "11": 9 * 27,
  "12": 9 * 6,
  "13": 2 * 2 * 3,
  "14": 8,
  "15": 6,
  "16": 4 * 10,
  "18": 11,
  "19": 5 * 8,
  "20": 4 * 9,
  "figure2": 2,
  "figure5": 27,
  "figure9": 5,
  "figure13": 2 * 6,
}


def value(table, model="", dataset="", metric=""):
  found = [
    c.value
    for c in published.cells(table)
    if (c.model, c.dataset) == (model, dataset) and metric in ("", c.metric)
  ]
  assert len(found) == 1, found
  return found[0]


def raw(name):
  """A file of assets/paper read by hand: heads, and rows of text."""
  heads, *rows = csv.reader((published.FOLDER / name).read_text(encoding="utf-8").splitlines())
  return heads, rows


def test_every_table_has_its_cells():
  assert {key: len(published.cells(key)) for key in published.TABLES} == COUNTS
  for key, table in published.TABLES.items():
    places = [table.place(c.model, c.dataset, c.metric) for c in published.cells(key)]
    assert len(set(places)) == len(places), "two cells in one place"
    assert all(row and column for row, column in places)


@pytest.mark.parametrize(
  ("printed", "names"),
  [
    ("58.5", ("1", "CLIP", "SUN")),
    ("102", ("9", "", "Food101", "classes")),
    ("31669", ("9", "", "Kinetics700", "test size")),
    ("25.3", ("10", "RN50", "Country211")),
    ("80.2", ("10", "ViT-B/16", "ImageNet")),
    ("76.2", ("11", "ViT-L/14@336px", "ImageNet")),
    ("17.0", ("11", "RN50x4", "CLEVR")),
    ("0.1", ("12", "difference", "Country211", "zero-shot")),
    ("88.0", ("13", "ViT-L/14@336px", "Flickr30k", "text retrieval R@1")),
    ("72.2", ("13", "ViT-L/14@336px", "MSCOCO", "image retrieval R@10")),
    ("90.0", ("14", "CLIP zero-shot", "IIIT5K 1k")),
    ("69.6", ("15", "CLIP zero-shot", "Kinetics700")),
    ("77.2", ("16", "Zero-Shot CLIP (ViT-L/14@336px)", "ImageNet-A")),
    ("63.1", ("16", "Linear Probe CLIP (ViT-L/14@336px)", "Youtube-BB", "PM10")),
    ("0.98", ("18", "ViT", "", "adam beta2")),
    ("1e-6", ("18", "ViT", "", "adam epsilon")),
    ("3.6e-4", ("19", "RN50x64", "", "learning rate")),
    ("3-15-36-10", ("19", "RN50x64", "", "ResNet blocks")),
    ("336", ("20", "ViT-L/14@336px", "", "input resolution")),
    ("4", ("figure2", "contrastive")),
    ("-37.1", ("figure5", "zero-shot minus linear probe", "EuroSAT")),
    ("265.9", ("figure9", "RN50x64")),
    ("2.7", ("figure13", "ImageNet ResNet-101", "ImageNet-A")),
  ],
)
def test_cells_are_as_printed(printed, names):
  assert value(*names) == printed


@pytest.mark.parametrize(("table", "name"), [("10", "linear_probe.csv"), ("11", "zero_shot.csv")])
def test_the_large_tables_keep_order_and_digits(table, name):
  heads, rows = raw(name)
  assert heads[28:] == ["mean27", "status"]
  assert [(c.model, c.dataset, c.value) for c in published.cells(table)] == [
    (row[0], head, text) for row in rows for head, text in zip(heads[1:28], row[1:28], strict=True)
  ]


def test_columns_are_in_the_printed_order_though_a_row_lacks_some():
  names = [c.dataset for c in published.places("14")]
  assert names == ["MNIST", "SVHN", "IIIT5K 1k", "Hateful Memes", "SST-2"] * 2
  assert [c.value for c in published.places("14")][:5] == ["99.2", "", "", "77.3", "80.5"]


@pytest.mark.parametrize("table", ["10", "11"])
def test_means_are_those_of_the_cells(table):
  rows = collections.defaultdict(list)
  for cell in published.cells(table):
    rows[cell.model].append(decimal.Decimal(cell.value))
  assert {len(row) for row in rows.values()} == {27}
  half = decimal.Decimal("0.005")
  off = {
    model: (sum(row) / 27, published.means(table)[model])
    for model, row in rows.items()
    if abs(sum(row) / 27 - decimal.Decimal(published.means(table)[model])) > half
  }
  assert not off


def test_figure_5_is_table_11_minus_table_10():
  """But for the two cells that misprints.csv names, and the last digit's rounding."""
  _, rows = raw("misprints.csv")
  misprints = {row[0]: row[1:3] for row in rows}
  for cell in published.cells("figure5"):
    exact = decimal.Decimal(value("11", "ViT-L/14@336px", cell.dataset))
    exact -= decimal.Decimal(value("10", "ResNet-50", cell.dataset))
    printed = decimal.Decimal(cell.value)
    if where := misprints.get(f"Figure 5, {cell.dataset}"):
      assert list(map(decimal.Decimal, where)) == [printed, exact]
    else:
      assert abs(exact - printed) <= decimal.Decimal("0.1"), cell


def test_table_12s_differences_are_those_of_its_columns():
  odd = []
  for dataset in dict.fromkeys(c.dataset for c in published.cells("12")):
    for metric in ("linear probe", "zero-shot"):
      yfcc, wit, printed = (
        decimal.Decimal(value("12", model, dataset, metric))
        for model in ("RN50, YFCC15M", "RN50, WIT subset", "difference")
      )
      if yfcc - wit != printed:
        odd.append((dataset, metric, str(yfcc - wit)))
  assert odd == [("Country211", "zero-shot", "-0.1")]


def test_the_same_figure_stands_in_several_tables():
  large = "ViT-L/14@336px"
  for dataset, linear in (("MNIST", "99.2"), ("HatefulMemes", "77.3"), ("Rendered SST2", "80.5")):
    name = {"HatefulMemes": "Hateful Memes", "Rendered SST2": "SST-2"}.get(dataset, dataset)
    assert value("10", large, dataset) == value("14", "CLIP linear", name) == linear
  assert value("16", f"Zero-Shot CLIP ({large})", "ImageNet") == value("11", large, "ImageNet")
  assert value("16", f"Linear Probe CLIP ({large})", "ImageNet") == value("10", large, "ImageNet")


def test_figure_9_counts_multiply_adds():
  flops = {
    r["model"]: float(r["openclip_gflops_image"]) for r in published.rows("architectures.csv")
  }
  for cell in published.cells("figure9"):  # open_clip counts two FLOPs a multiply-add
    assert float(cell.value) == pytest.approx(flops[cell.model] / 2, rel=0.02)


def test_metrics_are_those_of_table_9():
  others = {name: metric for name, metric in published.metrics().items() if metric != "accuracy"}
  assert others == {
    **dict.fromkeys(("FGVC Aircraft", "Oxford Pets", "Caltech101", "Flowers102"), "mean per class"),
    "VOC2007": "11-point mAP",
    "Kinetics700": "mean(top1, top5)",
    "HatefulMemes": "ROC AUC",
  }
  assert list(published.metrics()) == raw("zero_shot.csv")[0][1:28]


def test_known_differences_name_cells_that_there_are():
  _, rows = raw("known_differences.csv")
  for table, *names, _, _, _, why, _ in rows:
    pattern = [
      c
      for c in published.cells(table)
      if all(n in ("", own) for n, own in zip(names, (c.model, c.dataset, c.metric), strict=True))
    ]
    assert pattern, (table, names)
    assert why
    assert all(published_notes.known_difference(c).why for c in pattern)
  assert published_notes.known_difference(published.cells("11")[0]) is None  # Food101


def test_known_differences_reach_as_far_as_others_and_their_own_bounds_say_so():
  heads, rows = raw("openclip_reference.csv")
  apart = collections.defaultdict(list)
  for row in rows:
    record = dict(zip(heads, row, strict=True))
    if record["diff_vs_paper"]:
      difference = decimal.Decimal(record["value"]) - decimal.Decimal(record["paper_value"])
      assert float(difference) == pytest.approx(float(record["diff_vs_paper"]), abs=0.006)
      apart[record["model"], record["dataset"]].append(difference)
  asked = 0
  for cell in published.cells("11"):
    known = published_notes.known_difference(cell)
    if known and not known.up_to:
      own = apart[cell.model, cell.dataset]
      assert own, cell
      assert (known.least, known.most) == (min(0, *own), max(0, *own)), cell
      asked += 1
  assert asked == 9 * 10
  for row in published.rows("known_differences.csv"):
    if row["table"] in ("10", "11", "15") and row["up_to"]:
      assert "bound are ours" in row["why"], row
      assert decimal.Decimal(row["up_to"]) <= 7


def test_what_others_measured_stands_beside_a_cell():
  def beside(table, model, dataset, metric=""):
    names = (table, model, dataset)
    (cell,) = (
      c
      for c in published.cells(table)
      if (c.table, c.model, c.dataset) == names and metric in ("", c.metric)
    )
    return {(r.source.split()[0], r.value) for r in published_notes.references(cell)}

  assert beside("11", "RN50", "MNIST") == {("open_clip", "57.55")}
  assert beside("13", "ViT-L/14@336px", "Flickr30k", "text retrieval R@1") == {
    ("open_clip", "87.7")
  }
  assert beside("10", "ViT-B/16", "ImageNet") == {("CLIP_benchmark", "79.82")}
  probe = "Linear Probe CLIP (ViT-L/14@336px)"
  assert beside("16", probe, "ImageNetV2") == set()
  assert {s for s, _ in beside("16", probe.replace("Linear Probe", "Zero-Shot"), "ImageNetV2")} == {
    "open_clip",
    "CLIP_benchmark",
  }


def test_how_to_get_a_dataset_names_its_builder():
  assert "sun397/standard-part1-120k with TFDS" in published_notes.how_to_get("RN50", "SUN397")
  assert "TFDS" not in published_notes.how_to_get("RN50", "Birdsnap")
  assert "coco_captions" in published_notes.how_to_get("RN50", "MSCOCO")
  assert "own figure" in published_notes.how_to_get("NS EfficientNet-L2", "ImageNet")
  assert published_notes.test_images("KITTI") == 711
  assert published_notes.test_images("ImageNet-Sketch") == 50889
  assert published_notes.test_images("Youtube-BB") is None
  assert published_notes.test_images("SVHN") is None


def test_labels_of_table_16_say_what_they_are_made_of():
  assert published.model_of("Zero-Shot CLIP (RN50)") == ("RN50", False)
  assert published.model_of("Linear Probe CLIP (ViT-L/14)") == ("ViT-L/14", True)
  assert published.model_of("LM RN50") == ("LM RN50", False)


def test_a_table_that_is_not_there_is_named():
  with pytest.raises(published.PublishedError, match="table '17': not published; choose of 1, 9"):
    published.cells("17")


def test_printed_values_survive_a_float():
  """The digits of every number come back from its float, in the style in which it is printed."""
  for key in published.TABLES:
    for cell in published.cells(key):
      if re.fullmatch(r"-?[\d.]+(e-\d+)?", cell.value):
        assert paper_verdicts.as_printed(float(cell.value), cell.value) == cell.value


def test_every_file_has_its_line_in_the_readme_and_goes_into_the_package():
  readme = (published.FOLDER / "README.md").read_text(encoding="utf-8")
  named = set(re.findall(r"^\| `([\w.]+)` \|", readme, flags=re.MULTILINE))
  files = {path.name for path in published.FOLDER.iterdir()}
  assert files == named | {"README.md"}
  assert all(b"\r" not in path.read_bytes() for path in published.FOLDER.iterdir())


def test_the_package_takes_the_files_along():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  patterns = setup["options.package_data"]["clip_jax"].replace(" ", "").split(",")
  packed = {path for pattern in patterns for path in (ROOT / "clip_jax").glob(pattern)}
  assert set(published.FOLDER.iterdir()) <= packed
  assert ROOT / "clip_jax" / "evaluation" / "paper.html.j2" in packed
