"""The study of Figure 2: planted curves give their ratios, runs are kept, the page says what is."""

import json
import math
import pathlib
import xml.etree.ElementTree as ET

import numpy as np
import planted
import pytest

from clip_jax import cli
from clip_jax import config as c
from clip_jax.evaluation.paper import efficiency
from tools import predictive_study as tool
from tools.predictive import page, training

ROOT = pathlib.Path(__file__).parents[1]
PAIRS = [100 * 2**i for i in range(11)]  # 100 to 102,400
# How many times the pairs of the contrastive objective each takes, by seed.
PLANTED = {"captions": (9.0, 12.0), "bag_of_words": (3.0, 4.0), "contrastive": (1.0, 1.0)}


def _accuracy(pairs, times):
  """A line over the logarithm of pairs, so that what lies between two points is exact."""
  return 0.1 + 0.08 * math.log2(pairs / (50 * times) + 1e-9) if pairs > 50 * times else 0.1


def _run(objective, seed, times):
  rules = {"captions": 0.02, "bag_of_words": 0.02}
  lines = []
  for pairs in PAIRS:
    best = _accuracy(pairs, times)
    if objective == "contrastive":
      accuracy = {"cosine": best}
    else:
      accuracy = {"sum": best - rules[objective], "mean": best - 0.05, "lift": best}
    lines.append({"step": pairs // 100, "pairs": pairs, "loss": 1.0, "accuracy": accuracy})
  return {"objective": objective, "seed": seed, "seconds": 60.0, "evaluations": lines}


def _runs(planted=PLANTED):
  return [
    _run(objective, seed, times)
    for objective, by_seed in planted.items()
    for seed, times in enumerate(by_seed)
  ]


def _study(runs):
  return {
    "config": "experiments/mine.py",
    "notes": "One line.\n\nAnother.",
    "steps": 1024,
    "batch_pairs": 100,
    "task": "things",
    "images": 2000,
    "classes": 10,
    "prompts": 80,
    "machine": {"processor": "a processor, 2 cores", "device": "1 x cpu", "jax": "0"},
    "cost": {
      "captions": {"head": 7, "flops": 4_000_000},
      "bag_of_words": {"head": 8, "flops": 2_000_000},
      "contrastive": {"head": 9, "flops": 3_000_000},
    },
    "runs": runs,
  }


# Figures.


def test_pairs_for_an_accuracy_by_hand():
  pairs, accuracy = np.array([100.0, 400.0, 1600.0]), np.array([0.2, 0.6, 0.5])
  assert efficiency.pairs_for(pairs, accuracy, 0.6) == pytest.approx(400)
  assert efficiency.pairs_for(pairs, accuracy, 0.4) == pytest.approx(200)  # half-way in logarithms
  assert efficiency.pairs_for(pairs, accuracy, 0.1) == 100  # an upper bound
  assert efficiency.pairs_for(pairs, accuracy, 0.61) is None


def test_planted_ratios_are_found():
  found = efficiency.curves(_runs())
  assert [one.rule for one in found.values()] == ["lift", "lift", "cosine"]
  first = efficiency.ratio(found, "captions", "bag_of_words", 0.5)
  assert first.of_seeds == pytest.approx((3, 3))
  second = efficiency.ratio(found, "bag_of_words", "contrastive", 0.5)
  assert second.of_seeds == pytest.approx((3, 4))
  assert second.spread == pytest.approx((3, 4))
  # the mean of two lines over the logarithm is the line at their geometric mean
  assert second.of_means == pytest.approx(12**0.5)
  assert efficiency.verdict(second) == "the paper's order"


def test_a_studys_file_gives_the_ratios_of_figure_2(tmp_path):
  path = tmp_path / "OUTPUT.json"
  path.write_text(json.dumps(_study(_runs())))
  found = efficiency.read(path)
  assert found.about == "69% of 2,000 images of things, in 2 seeds"
  assert {row: one.of_seeds for row, one in found.ratios.items()} == {
    "bag-of-words prediction": (pytest.approx(3), pytest.approx(3)),
    "contrastive": (pytest.approx(3), pytest.approx(4)),
  }
  path.write_text('{"runs": []}')
  with pytest.raises(efficiency.EfficiencyError, match=r"OUTPUT\.json: not what tools/predictive"):
    efficiency.read(path)


def test_an_accuracy_that_a_seed_never_reaches():
  found = efficiency.curves(_runs())
  top = float(found["captions"].accuracy.max())  # of its first seed alone
  one = efficiency.ratio(found, "captions", "contrastive", top)
  assert one.of_seeds[1] is None
  assert one.spread is None
  assert one.of_means is None
  assert "not every seed" in efficiency.verdict(one)


@pytest.mark.parametrize(
  ("words", "verdict"),
  [((0.5, 0.4), "opposite"), ((0.8, 2.0), "no difference"), ((2.0, 3.0), "the paper's order")],
)
def test_verdicts(words, verdict):
  found = efficiency.curves(_runs({**PLANTED, "bag_of_words": words}))
  assert verdict in efficiency.verdict(efficiency.ratio(found, "bag_of_words", "contrastive", 0.5))


def test_the_common_level_is_one_that_all_reach():
  found = efficiency.curves(_runs())
  # of the slowest run 0.1 + 0.08 log2(102,400 / 50 / 12) = 0.693
  assert efficiency.common_level(found) == 0.69
  levels = efficiency.levels(found, 0.1)
  assert levels == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.69, 0.7, 0.8, 0.9])
  assert 0.2 in levels  # the contrastive curve begins at 0.18


# The page.


def test_the_page_says_what_is_there():
  text = page.page(_study(_runs()), "mine.svg")
  assert "captions, token by token: 3 times the pairs of bag of words, 3 to 3 by seed" in text
  assert "the paper: 3. In FLOPs 6 times. That is the paper's order." in text
  assert "bag of words: 3.5 times the pairs of contrastive, 3 to 4 by seed" in text
  assert "the paper: 4. In FLOPs 2.3 times." in text
  assert "At 69%, the highest accuracy that all runs reach" in text
  assert "with seeds 0, 1;" in text
  assert "> One line.\n>\n> Another." in text
  assert "![Zero-shot accuracy over pairs seen](mine.svg)" in text
  row = next(line for line in text.splitlines() if line.startswith("| 70% |"))
  numbers = [cell.strip() for cell in row.split("|")[5:7]]
  assert numbers == ["3.00", "3.46 (3.00 to 4.00)"]
  for line in text.splitlines():  # every row has as many cells as its head
    assert line.count("|") in (0, 5, 7, 8, 9) or line.startswith(">"), line


def test_the_drawing_is_svg_with_every_point():
  root = ET.fromstring(page.drawing(_study(_runs())))
  space = "{http://www.w3.org/2000/svg}"
  assert len(root.findall(f"{space}circle")) == 3 * len(PAIRS)
  assert len(root.findall(f"{space}polyline")) == len(root.findall(f"{space}polygon")) == 3
  words = [text.text for text in root.findall(f"{space}text")]
  assert "contrastive (scored by cosine)" in words
  assert {"100", "1,000", "100k"} <= set(words)
  first = root.find(f"{space}polyline").get("points").split()
  xs, ys = zip(*(map(float, point.split(",")) for point in first), strict=True)
  steps = np.diff(xs)
  assert steps.max() - steps.min() < 0.11  # even in the logarithm of pairs, up to rounding
  assert list(ys) == sorted(ys, reverse=True)  # more is higher up


# The study itself.

EXPERIMENT = '''"""A tiny study."""

from clip_jax import config as c


def get_config():
  return c.to_config_dict(
    c.Config(
      name="tiny",
      steps=4,
      model=c.Model(
        image=c.Vision(resolution=16, patch=8, width=16, layers=1, heads=2),
        text=c.Text(context_length=16, vocab_size=600, width=16, layers=1, heads=2),
        embed_dim=8,
      ),
      data=c.Data(sources=(c.Source(kind="digits", split="train"),), batch_pairs=16,
                  tokenizer="train"),
      optimizer=c.Optimizer(learning_rate=1e-3, warmup_steps=1),
      evaluation=c.Evaluation(
        tasks=(c.Task("digits", "zero_shot", c.Source(kind="digits", split="test"), "digits", 24),),
        batch=32,
      ),
    )
  )
'''


@pytest.fixture(scope="module")
def study(tmp_path_factory):
  folder = tmp_path_factory.mktemp("study")
  (folder / "tiny.py").write_text(EXPERIMENT)
  assert tool.main(_words(folder)) == 0
  return folder


def _words(folder, *more):
  return [
    f"--config={folder / 'tiny.py'}",
    f"--output={folder / 'docs' / 'found'}",
    f"--workdir={folder / 'runs'}",
    "--seeds=1",
    "--evaluations=3",
    *more,
  ]


def test_a_study_from_end_to_end(study):
  found = json.loads((study / "docs" / "found.json").read_text())
  assert [run["objective"] for run in found["runs"]] == list(efficiency.OBJECTIVES)
  for run in found["runs"]:
    assert [line["pairs"] for line in run["evaluations"]] == [16, 32, 64]
    for line in run["evaluations"]:
      assert 1 < line["loss"] < 8
      assert all(0 <= share <= 1 for share in line["accuracy"].values())
  rules = [set(run["evaluations"][0]["accuracy"]) for run in found["runs"]]
  assert rules == [{"sum", "mean", "lift"}, {"sum", "mean", "lift"}, {"cosine"}]
  assert (found["images"], found["classes"], found["prompts"]) == (24, 10, 50)
  # the two others have no logit scale and no second encoder
  assert found["cost"]["bag_of_words"]["head"] == 16 * 600 + 600
  assert (study / "docs" / "found.svg").read_text() == page.drawing(found)
  assert (study / "docs" / "found.md").read_text() == page.page(found, "found.svg")


def test_finished_runs_are_not_made_again(study, monkeypatch):
  def never(*_):
    raise AssertionError("trained again")

  monkeypatch.setattr(tool, "run", never)
  before = (study / "docs" / "found.json").read_text()
  assert tool.main(_words(study)) == 0
  assert (study / "docs" / "found.json").read_text() == before


def test_runs_of_other_settings_are_refused(study, capfd):
  words = _words(study, "--config.optimizer.learning_rate=1e-2")
  assert tool.main(words) == 2
  assert "captions_0.json: made with another config;" in capfd.readouterr().err


def test_a_damaged_run_is_named(study, capfd, tmp_path):
  (study / "runs" / "captions_7.json").write_text("{")
  assert tool.main(_words(study, "--config.seed=7")) == 2
  assert "captions_7.json: not a run as JSON; remove it" in capfd.readouterr().err


def test_settings_that_do_not_suit_are_told_before_the_first_step(study, capfd):
  assert tool.main(_words(study, "--config.microbatches=2", "--config.batch=3")) == 2
  assert "batch" in capfd.readouterr().err
  assert tool.main(_words(study, "--config.microbatches=2")) == 2
  assert "config.microbatches: 2; the study takes 1 only" in capfd.readouterr().err


def test_images_of_several_classes_have_no_top1(tmp_path):
  planted.World(tmp_path).test("VOC2007")
  task = c.Task(dataset="VOC2007", source=c.Source(path=str(tmp_path)))
  with pytest.raises(training.StudyError, match="images of VOC2007 show several classes"):
    tool.opened(c.Config(evaluation=c.Evaluation((task,))), tmp_path / "runs", 3)


def test_a_loss_that_is_not_finite_ends_the_study(study, monkeypatch):
  config = cli.load_config(str(study / "tiny.py"), [])
  opened = tool.opened(config, study / "runs", 3)
  nan = {"loss": np.float32("nan")}
  monkeypatch.setattr(tool, "_trainer", lambda *_: (None, lambda s, b: (s, nan), lambda s: {}))
  with pytest.raises(training.StudyError, match="captions, seed 0: the loss up to step 1 is nan"):
    tool.run(opened, config, "captions", None)


def test_a_bad_record_ends_the_study(study):
  config = cli.load_config(str(study / "tiny.py"), [])
  opened = tool.opened(config, study / "runs", 3)
  batch = {"bad": np.array([0, 4]), "source": np.array([0, 0]), "record": np.array([1, 2])}
  with pytest.raises(training.StudyError, match=r"bad \(unreadable\); repair it"):
    tool._place(opened, batch)


def test_points_are_even_in_ratios():
  assert tool.log_spaced(1000, 3) == (10, 100, 1000)
  assert tool.log_spaced(4, 3) == (1, 2, 4)
  assert tool.log_spaced(2, 10) == (1, 2)
  points = tool.log_spaced(500, 10)
  assert (points[0], points[-1], len(points)) == (5, 500, 10)


def test_the_experiment_has_the_model_and_data_that_it_says():
  config = cli.load_config(str(ROOT / "experiments" / "predictive.py"), [])
  other = cli.load_config(str(ROOT / "experiments" / "fashion_mnist.py"), [])
  assert training.checked_task(config).prompts == "fashion_mnist_captions"
  assert (config.model, config.data) == (other.model, other.data)
