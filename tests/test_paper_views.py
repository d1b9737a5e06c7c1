"""Tables made of measured cells, of copies, of experiment files: every figure by hand."""

import csv
import json
import pathlib
import shutil

import numpy as np
import planted
import pytest
import scipy.special
import scipy.stats
from known_model import unit
from paper_cells import measured
from test_paper_cells import counted
from test_paper_run import command  # noqa: F401, a fixture

from clip_jax import cli
from clip_jax.evaluation import datasets
from clip_jax.evaluation.paper import charts, facts, origins, published, views
from clip_jax.evaluation.paper import tables as paper_tables
from clip_jax.evaluation.shifts import robustness

ROOT = pathlib.Path(__file__).parents[1]
LARGE = "ViT-L/14@336px"
YFCC, WIT = "RN50, YFCC15M", "RN50, WIT subset"


def filled(key, cells, **others):
  """The table's cells that are measured: (row, column) -> comparison."""
  found = views.fill(key, cells, **{"asked": (), "missing": {}, **others})
  (grid,) = paper_tables.compare(found.measured, [key], found.rows, found.missing)
  return grid.cells


def row_of_27(table, model, first=0.0):
  """first, first + 1, ... in the order of the data sets."""
  return [
    measured(table, model, name, metric, first + k)
    for k, (name, metric) in enumerate(published.metrics().items())
  ]


def test_the_paper_prints_the_same_in_both_but_for_what_is_known():
  """Every cell of a view beside the one that it is made of, as printed."""
  large = {
    (c.table, c.model, c.dataset): c.value
    for key in ("10", "11", "16")
    for c in published.cells(key)
  }
  odd, same = {}, 0
  for key in ("1", "14", "15", "figure13"):
    for cell in published.cells(key):
      source = origins.origin(cell)
      printed = large.get((source.table, source.model, source.dataset))
      if printed == cell.value:
        same += 1
      elif printed is not None:
        odd[key, cell.model, cell.dataset] = (cell.value, printed)
  assert odd == {
    ("1", "CLIP", "SUN"): ("58.5", "68.4"),
    ("14", "CLIP zero-shot", "MNIST"): ("88.4", "88.3"),
    ("15", "CLIP zero-shot", "UCF101"): ("80.3", "76.9"),
    ("15", "CLIP zero-shot", "Kinetics700"): ("69.6", "61.3"),
    ("figure13", "Zero-Shot CLIP (ViT-L/14@336px)", "ImageNet-A"): ("77.1", "77.2"),
  }
  assert same == 1 + 5 + 2 + 5


def test_what_a_view_needs_are_units_of_the_large_tables():
  need = {key: [(u.table, u.column) for u in views.units(key)] for key in published.TABLES}
  assert need["1"] == [("11", "SUN397"), ("11", "ImageNet")]
  ocr = ("MNIST", "HatefulMemes", "Rendered SST2")
  assert need["14"] == [(table, name) for table in ("10", "11") for name in ocr]
  assert len(need["12"]) == 2 * 7
  assert need["figure5"] == need["11"]
  shifts = ("ImageNet", "ImageNetV2", "ImageNet-A", "ImageNet-R", "ImageNet-Sketch", "ObjectNet")
  bases = [robustness.restricted(name) for name in ("ImageNet-A", "ImageNet-R")]
  once = [*(("16", name) for name in shifts), *(("figure13", name) for name in bases)]
  assert sorted(need["figure13"]) == sorted(2 * once)  # zero-shot and probed
  for key in ("9", "18", "19", "20", "figure2", "figure9"):
    assert need[key] == []


def test_one_run_measures_once_what_several_tables_show(command, tmp_path):  # noqa: F811
  world = command.world
  for key in ("MNIST", "HatefulMemes", "ImageNet", "ImageNetV2", "ImageNet-Sketch"):
    world.test(key)
  dataset = world.probe("Rendered SST2")
  world.model.rows |= dict.fromkeys(world.model.features, world.classes(dataset)[0])
  lines = tmp_path / "standard.csv"
  lines.write_text("model,kind,ImageNet,ImageNetV2\nImageNet ResNet-101,standard,50,40\n")
  with lines.open("a") as file:
    file.write("b,standard,80,70\n")
  tables = ("--tables", "1,14,figure5,figure13", "--datasets", "MNIST", "HatefulMemes", "ImageNet")
  words = (*tables, "ImageNetV2", "ImageNet-Sketch", "Rendered SST2", "--json")
  words += ("--standard-models", lines)
  code, out, err = command.main(*words, models=[f"{LARGE}=weights"], batch=64)
  assert code == 0, err
  facts_ = json.loads(out)
  # Of Tables 11, 10 and 16; of the classes of ImageNet-R some are there, of ImageNet-A's none.
  assert facts_["measured_now"] == 4 + 1 + 3 + 1
  assert {m.table for m in command.results()} == {"10", "11", "16", "figure13"}
  with (command.output / "paper.csv").open(newline="") as file:
    found = {(r["table"], r["model"], r["dataset"], r["metric"]): r for r in csv.DictReader(file)}

  def shown(*names):
    return tuple(found[names][field] for field in ("measured", "published", "verdict"))

  accuracy, zero, linear = "accuracy", "CLIP zero-shot", "CLIP linear"
  assert shown("1", "CLIP", "ImageNet", accuracy) == ("75.0", "76.2", "off")
  assert shown("14", zero, "MNIST", accuracy) == ("75.0", "88.4", "off")  # others: 78.71
  assert shown("14", zero, "Hateful Memes", "ROC AUC") == ("66.7", "63.3", "reproduced")
  assert shown("14", zero, "SST-2", accuracy) == ("25.0", "67.9", "off")
  assert shown("14", linear, "SST-2", accuracy) == ("75.0", "80.5", "off")
  assert shown("14", zero, "SVHN", accuracy) == ("", "51.0", "not available")
  minus = "zero-shot minus linear probe"
  assert shown("figure5", minus, "ImageNet", "difference") == ("0.7", "1.9", "off")  # 75.0 - 74.3
  assert shown("figure5", minus, "MNIST", "difference")[0] == "-23.3"  # 75.0 - 98.3
  clip = f"Zero-Shot CLIP ({LARGE})"
  assert shown("figure13", clip, "ImageNetV2", accuracy) == ("75.0", "70.1", "off")
  x, y = scipy.special.logit([0.5, 0.8]), scipy.special.logit([0.4, 0.7])
  slope = (y[1] - y[0]) / (x[1] - x[0])
  expected = scipy.special.expit(y[0] + slope * (scipy.special.logit(0.75) - x[0]))
  gain = found["figure13", clip, "ImageNetV2", views.EFFECTIVE]["measured"]
  assert float(gain) == pytest.approx(75 - 100 * expected, abs=0.05)
  for names, why in (
    (("1", "CLIP", "aYahoo", accuracy), "not one of the paper's 27 data sets"),
    (("1", "CLIP", "SUN", accuracy), "not asked for: --datasets names others"),
    (("1", "Visual N-Grams", "ImageNet", accuracy), "not one of the released CLIP models"),
    (("14", linear, "MNIST", accuracy), "MNIST train: not available in"),
    (("figure13", f"Linear Probe CLIP ({LARGE})", "ImageNet", accuracy), "ImageNet train: not"),
  ):
    assert found[names]["why"].startswith(why), names
  page = (command.output / "paper.md").read_text()
  assert "Figure 5: the linear probe of ImageNet's ResNet-50 is the figure of Table 10" in page
  assert "no line for ImageNet-Sketch: 0 models of kind standard" in page
  assert (command.output / "paper.html").read_text().count("<svg") == 1
  seen = world.model.images_seen
  code, out, _ = command.main(*words, models=[f"{LARGE}=weights"], batch=64)
  assert (code, json.loads(out)["measured_now"]) == (0, 0)
  assert world.model.images_seen == seen


def world_of_shifts(world):
  """ImageNet, ImageNetV2 and ImageNet-A, zero-shot and probed.

  On ImageNet both are right on 2 images of 4, one of which is of no class of ImageNet-A; without
  its other classes on 2 of 3: one image is taken for a class that is then left out.
  """
  own = datasets.named("ImageNet-A").imagenet_indices
  other = next(k for k in range(1000) if k not in own)
  imagenet, axes = datasets.named("ImageNet"), np.eye(1000)
  class_CE = world.classes(imagenet)
  rows, axis_of = world.model.rows, world.model.features
  axis_of |= dict(zip(world.write(imagenet, "train", list(range(1000))), axes, strict=True))
  labels = (own[0], own[1], other, own[2])
  first = world.write(imagenet, "test", labels)[0]
  for way, of_class in ((rows, class_CE), (axis_of, axes)):
    for place, seen in enumerate((own[0], own[1], other, own[3])):
      way[first + place] = of_class[seen]
    way[first + 1] = unit(of_class[own[1]] + 1.5 * of_class[other])
  for key, classes, right in (("ImageNetV2", range(1000), 1), ("ImageNet-A", own, 2)):
    world.test(key)
    numbers = range(world.number - 4, world.number)
    for place, (number, label) in enumerate(zip(numbers, planted.LABELS, strict=True)):
      axis_of[number] = axes[classes[label if place < right else label + 1]]


def test_probes_and_zero_shot_models_over_their_shifts_own_classes(
  command,  # noqa: F811
  tmp_path,
  monkeypatch,
):
  """Base accuracies by hand, lines by scipy: the average is of 75 and 75, or of 25 and 50."""
  counted(monkeypatch, [])
  world_of_shifts(command.world)
  on_a = robustness.restricted("ImageNet-A")
  given = {
    "ImageNet": [56.0, 70.0, 79.0],
    "ImageNetV2": [43.0, 57.0, 66.0],
    on_a: [60.0, 75.0, 90.0],
    "ImageNet-A": [1.0, 2.0, 6.0],
  }
  lines = tmp_path / "standard.csv"
  with lines.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["model", "kind", *given])
    # The first is in place of the paper's own standard model, which would be a fourth.
    for model, *own in zip(("ImageNet ResNet-101", "b", "c"), *given.values(), strict=True):
      writer.writerow([model, "standard", *own])
  words = ("--tables", "figure13", "--standard-models", lines, "--json")
  code, out, err = command.main(*words, models=["mine=weights"], batch=256)
  assert code == 0, err
  values = command.values()
  average = robustness.average_name(["ImageNetV2", "ImageNet-A"])
  with (command.output / "paper.csv").open(newline="") as file:
    found = {(r["model"], r["dataset"], r["metric"]): r["measured"] for r in csv.DictReader(file)}
  for row, v2, a in (("Zero-Shot CLIP (mine)", 75, 75), ("Linear Probe CLIP (mine)", 25, 50)):
    assert values["16", row, "ImageNet", "accuracy"] == 50.0
    assert values["figure13", row, on_a, "accuracy"] == pytest.approx(200 / 3)
    for shift, base, x, y in (
      ("ImageNetV2", "ImageNet", 50, v2),
      ("ImageNet-A", on_a, 200 / 3, a),
      (average, "", (50 + 200 / 3) / 2, (v2 + a) / 2),
    ):
      base_x = np.array(given[base] if base else np.mean([given["ImageNet"], given[on_a]], axis=0))
      under = given[shift] if base else np.mean([given["ImageNetV2"], given["ImageNet-A"]], axis=0)
      line = scipy.stats.linregress(
        *map(scipy.special.logit, (base_x / 100, np.array(under) / 100))
      )
      predicted = scipy.special.expit(line.intercept + line.slope * scipy.special.logit(x / 100))
      assert float(found[row, shift, "accuracy"]) == pytest.approx(y, abs=0.05)
      gain = float(found[row, shift, views.EFFECTIVE])
      assert gain == pytest.approx(y - 100 * predicted, abs=0.051), (row, shift)
      assert float(found[row, shift, views.LOW]) <= gain <= float(found[row, shift, views.HIGH])
  page = (command.output / "paper.md").read_text()
  assert f"ImageNet-A: above the line of 3 standard models over their accuracy on '{on_a}'" in page
  assert "(without ImageNet-R, ObjectNet, ImageNet-Sketch, ImageNet-Vid, Youtube-BB)" in page
  assert on_a not in (command.output / "clip_benchmark.csv").read_text()
  seen = command.world.model.images_seen
  code, out, _ = command.main(*words, models=["mine=weights"], batch=256)
  assert (code, json.loads(out)["measured_now"]) == (0, 0)
  assert command.world.model.images_seen == seen


def test_without_columns_of_the_classes_the_line_is_over_all_of_imagenet():
  on_a = robustness.restricted("ImageNet-A")
  clip = "Zero-Shot CLIP (mine)"
  cells = [
    measured("16", clip, "ImageNet", value=60.0),
    measured("16", clip, "ImageNet-A", value=4.0),
  ]
  cells.append(measured("figure13", clip, on_a, value=90.0))
  shares = ((0.5, 0.01), (0.7, 0.02), (0.8, 0.05))
  standard = [
    robustness.Row(f"m{i}", "standard", {"ImageNet": x, "ImageNet-A": y})
    for i, (x, y) in enumerate(shares)
  ]
  found = views.fill("figure13", cells, (), {}, standard)
  x, y = scipy.special.logit(np.array([*shares, robustness_of_101()])).T
  line = scipy.stats.linregress(x, y)
  want = 4 - 100 * scipy.special.expit(line.intercept + line.slope * scipy.special.logit(0.6))
  (gain,) = (m.value for m in found.measured if m.metric == views.EFFECTIVE)
  assert gain == pytest.approx(want)
  (note,) = found.notes
  assert note.startswith(
    "Figure 13, effective robustness, ImageNet-A: above the line of 4 standard"
  )
  assert note.endswith(f"as fewer than two standard models have a column '{on_a}'")


def robustness_of_101():
  """ImageNet ResNet-101 as published, the paper's own standard model."""
  (row,) = (r for r in robustness.published() if r.kind == "standard")
  return row.accuracy["ImageNet"], row.accuracy["ImageNet-A"]


def test_another_model_stands_in_a_row_of_its_own():
  cells = [measured("11", "mine", "MNIST", value=60.0), measured("10", "mine", "MNIST", value=90.0)]
  asked = [("10", "mine"), ("11", "mine"), ("10", "{}"), ("11", "{}")]
  found = filled("14", cells, asked=asked, missing={"11": {"MNIST": "fetch it"}})
  rows = list(dict.fromkeys(row for row, _ in found))
  assert rows[:2] == ["CLIP linear", "CLIP zero-shot"]
  assert set(rows[2:]) == {"mine linear", "mine zero-shot", "{} linear", "{} zero-shot"}
  assert found["mine zero-shot", "MNIST"].measured.value == 60.0
  assert found["mine linear", "MNIST"].measured.value == 90.0
  assert found["mine linear", "MNIST"].kind == "not published"
  why = found["CLIP linear", "MNIST"].why
  assert why == f"wants --models '{LARGE}=WEIGHTS'; fetch it"


def test_table_12_subtracts_and_averages_what_is_measured():
  cells = [
    *row_of_27("10", YFCC, 40.0),
    measured("10", WIT, "GTSRB", value=60.5),
    measured("11", YFCC, "GTSRB", value=6.9),
    measured("11", "mine", "GTSRB", value=8.0),
  ]
  found = filled("12", cells)
  place = list(published.metrics()).index("GTSRB")
  assert found["GTSRB", f"linear probe, {YFCC}"].shown == f"{40 + place}.0"
  assert found["GTSRB", "linear probe, difference"].shown == f"{40 + place - 60.5:.1f}"
  assert found["GTSRB", "zero-shot, mine"].shown == "8.0"
  assert found["GTSRB", "zero-shot, difference"].why == "of both models, where both are measured"
  average = found["Dataset Average", f"linear probe, {YFCC}"]
  assert (average.shown, average.cell.value, average.kind) == ("53.0", "65.5", "off")
  assert found["Dataset Average", f"zero-shot, {YFCC}"].measured is None
  assert "what a win is" in found["Dataset Wins", f"linear probe, {YFCC}"].why
  empty = filled("12", [])
  assert empty["ImageNet", f"zero-shot, {YFCC}"].why.startswith("train experiments/yfcc15m_rn50.py")
  assert "never published" in empty["ImageNet", f"zero-shot, {WIT}"].why


def test_figure_9_counts_multiply_adds_and_means():
  """open_clip counts the same of a Vision Transformer, and of a ResNet a larger attention pool."""
  found = filled("figure9", [*row_of_27("11", "RN50x4", 50.0), *row_of_27("11", "mine")[:26]])
  for row in published.rows("architectures.csv"):
    ours = found[row["model"], "GFLOPs an image"].measured.value
    grid, width = int(row["visual_tokens"]), 32 * int(row["resnet_base_width_code"] or 0)
    queries = (grid - 1) * (width**2 + width * int(row["embed_dim"]))
    more = (queries + 2 * width * grid * (grid - 1)) / 1e9 if width else 0
    assert ours + more == pytest.approx(float(row["openclip_gflops_image"]) / 2, rel=2e-3)
  assert found["RN50x4", charts.MEAN].shown == "63.0"
  assert found["RN50", charts.MEAN].why.startswith("mean of 27 zero-shot scores: wants all 27")
  assert ("mine", charts.MEAN) not in found
  kinds = [found[m, "GFLOPs an image"].kind for m in ("RN50", "RN50x64", "ViT-B/32")]
  assert kinds == ["known to differ", "reproduced", "not published"]


@pytest.mark.parametrize(("key", "kinds"), [("18", {}), ("19", {"known to differ": 5}), ("20", {})])
def test_the_experiment_files_stand_beside_tables_18_to_20(key, kinds):
  found = facts.settings(key, "v1")
  (grid,) = paper_tables.compare(found.measured, [key], missing=found.missing)
  rest = len(published.cells(key)) - sum(kinds.values())
  assert grid.counts == {"as configured": rest, **kinds}


def test_an_experiment_that_departs_is_seen(tmp_path):
  shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
  path = tmp_path / "experiments" / "clip_vit_b16.py"
  text = path.read_text()
  assert text.count("beta2=0.98") == 1
  path.write_text(text.replace("beta2=0.98", "beta2=0.95"))
  (tmp_path / "experiments" / "clip_rn50.py").unlink()
  found = facts.settings("18", "v1", tmp_path / "experiments")
  (grid,) = paper_tables.compare(found.measured, ["18"], missing=found.missing)
  c = grid.cells["adam beta2, ViT", "value"]
  assert (c.kind, c.cell.value) == ("off", "0.98")
  assert c.shown == ("ViT-B/32 0.98; ViT-B/16 0.95; ViT-L/14 0.98; ViT-L/14@336px 0.98")
  assert grid.counts == {"as configured": 10, "off": 1}
  found = facts.settings("19", "v1", tmp_path / "nowhere")
  (grid,) = paper_tables.compare(found.measured, ["19"], missing=found.missing)
  assert grid.counts == {"not available": 40}
  assert "they are in a checkout" in grid.cells["RN50", "text width"].why


def test_table_9_is_what_the_copies_hold(command):  # noqa: F811
  command.world.test("Food101")
  command.world.probe("STL10")
  code, out, _ = command.main("--tables", "9", "--datasets", "Food101", "STL10", "MNIST", "--json")
  assert code == 0
  assert list(json.loads(out)["not_available"]) == ["Food101", "MNIST"]
  with (command.output / "paper.csv").open(newline="") as file:
    found = {(r["dataset"], r["metric"]): r for r in csv.DictReader(file)}

  def shown(*names):
    return tuple(found[names][field] for field in ("measured", "published", "verdict"))

  assert shown("Food101", "classes") == ("101", "102", "known to differ")
  assert shown("Food101", "test size") == ("4", "25250", "off")
  assert found["Food101", "test size"]["difference"] == "-25246"
  assert shown("Food101", "metric") == ("accuracy", "accuracy", "as configured")
  assert shown("Food101", "train size") == ("", "75750", "not available")
  assert shown("STL10", "train size") == ("60", "1000", "off")
  assert "MNIST train: not available in" in found["MNIST", "classes"]["why"]
  assert found["ImageNet", "classes"]["why"] == "not asked for: --datasets names others"
  assert not (command.output / "results.jsonl").exists()
  assert command.world.model.images_seen == 0


def test_what_needs_no_model_asks_for_none(tmp_path, capsys):
  words = ["paper", "--output", str(tmp_path), "--processes", "1", "--json"]
  assert cli.main([*words, "--tables", "18,Figure2"]) == 0
  found = json.loads(capsys.readouterr().out)["tables"]
  assert found == {"18": {"as configured": 11}, "figure2": {"not available": 2}}
  assert "then give --predictive OUTPUT.json" in (tmp_path / "paper.md").read_text()
  assert cli.main([*words, "--tables", "18,14"]) == 2
  assert "table 14: made of what is measured; give --models" in capsys.readouterr().err


def test_bars_are_as_long_as_their_figures():
  found = views.fill("figure5", [measured("11", LARGE, "EuroSAT", value=50.0)], (), {})
  (grid,) = paper_tables.compare(found.measured, ["figure5"])
  drawn = charts.chart(grid)
  marks = {mark.title.partition(", zero")[0]: mark for mark in drawn.marks}
  cars, euro = marks["Stanford Cars: published 28.9"], marks["EuroSAT: published -37.1"]
  assert cars.x == pytest.approx(euro.x + euro.width, abs=0.11)  # both from zero
  assert euro.width / cars.width == pytest.approx(37.1 / 28.9, abs=0.01)
  own = marks["EuroSAT"]
  assert own.measured
  assert own.width / euro.width == pytest.approx((96.7 - 50.0) / 37.1, abs=0.01)
  assert len(drawn.marks) == 28
  tops = np.array([mark.y for mark in drawn.marks])
  assert np.diff(np.sort(tops)).min() >= drawn.bar
  assert max(tops) + drawn.bar < drawn.height


def test_dots_lie_over_multiply_adds():
  found = views.fill("figure9", row_of_27("11", "RN50", 41.0), (), {})
  (grid,) = paper_tables.compare(found.measured, ["figure9"])
  marks = {mark.title: mark for mark in charts.chart(grid).marks}
  assert len(marks) == 9 + 1
  (own,) = (mark for mark in marks.values() if mark.measured)
  published_ = {t.partition(":")[0]: m for t, m in marks.items() if not m.measured}
  assert own.y > published_["RN50"].y  # 54.0 below 54.66
  x = [published_[name].x for name in ("RN50", "RN50x4", "RN50x64")]
  logs = np.log([6.1, 21.5, 265.9])
  assert (x[2] - x[1]) / (x[1] - x[0]) == pytest.approx(
    np.diff(logs)[1] / np.diff(logs)[0], rel=0.01
  )
  assert charts.chart(paper_tables.compare([], ["11"])[0]) is None
