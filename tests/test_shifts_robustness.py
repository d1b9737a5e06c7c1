import numpy as np
import pytest
import scipy.special
import scipy.stats

from clip_jax.evaluation.shifts import robustness as shifts
from clip_jax.evaluation.shifts.robustness import Row

STANDARD = [
  Row(f"m{i}", "standard", {"ImageNet": x, "ImageNetV2": y})
  for i, (x, y) in enumerate([(0.56, 0.43), (0.70, 0.57), (0.76, 0.64), (0.79, 0.66), (0.83, 0.73)])
]


def columns(rows, *names):
  return [np.array([r.accuracy[n] for r in rows]) for n in names]


def test_the_line_is_that_of_scipy_through_the_logits():
  line = shifts.fit(STANDARD, "ImageNetV2")
  x, y = (scipy.special.logit(c) for c in columns(STANDARD, "ImageNet", "ImageNetV2"))
  want = scipy.stats.linregress(x, y)
  assert line.slope == pytest.approx(want.slope, rel=1e-12)
  assert line.intercept == pytest.approx(want.intercept, rel=1e-12)
  assert np.polyfit(x, y, 1) == pytest.approx([line.slope, line.intercept])
  assert line.points == 5
  assert line.predict(0.762) == pytest.approx(
    scipy.special.expit(want.intercept + want.slope * scipy.special.logit(0.762))
  )


def test_effective_robustness_by_hand():
  """logit y = -1 + logit x: of x = 0.5 that is 1 / (1 + e); a model of 0.4 is 0.1311 above it."""
  rows = [
    Row("a", "standard", {"ImageNet": 0.5, "s": 1 / (1 + np.e)}),
    Row("b", "standard", {"ImageNet": scipy.special.expit(2), "s": scipy.special.expit(1)}),
    Row("clip", "zero-shot", {"ImageNet": 0.5, "s": 0.4}),
    Row("other", "zero-shot", {"ImageNet": 0.5}),
  ]
  line = shifts.fit(rows, "s")
  assert (line.slope, line.intercept) == (pytest.approx(1), pytest.approx(-1))
  found = {e.model: e for e in shifts.effective(rows, line)}
  assert set(found) == {"a", "b", "clip"}
  assert found["clip"].effective == pytest.approx(0.4 - 0.26894142)
  assert found["clip"].predicted == pytest.approx(0.26894142)
  assert (found["clip"].points, found["clip"].shift) == (2, "s")
  assert found["a"].effective == pytest.approx(0, abs=1e-12)


def test_models_of_other_kinds_do_not_move_the_line():
  odd = Row("clip", "zero-shot", {"ImageNet": 0.76, "ImageNetV2": 0.99})
  assert shifts.fit([*STANDARD, odd], "ImageNetV2") == shifts.fit(STANDARD, "ImageNetV2")
  both = shifts.fit([*STANDARD, odd], "ImageNetV2", ("standard", "zero-shot"))
  assert both.points == 6
  assert both.predict(0.76) > shifts.fit(STANDARD, "ImageNetV2").predict(0.76)


def test_the_published_models_alone_are_too_few_standard_ones():
  with pytest.raises(shifts.ShiftError, match=r"ImageNet-A: 1 model of kind standard .*more"):
    shifts.fit(shifts.published(), "ImageNet-A")
  line = shifts.fit(shifts.published(), "ImageNet-A", ("standard", "more data"))
  assert line.points == 3
  found = shifts.effective(shifts.published(), line)
  clip = [e for e in found if e.kind == "zero-shot"]
  assert [round(100 * e.accuracy, 1) for e in clip] == [77.2, 77.1]  # Table 16 and Figure 13
  assert all(e.effective > 0.7 for e in clip)


def test_what_is_published_is_that():
  rows = {(r.model, "ImageNet-Vid PM0" in r.accuracy): r for r in shifts.published()}
  assert len(rows) == 6
  clip = rows["Zero-Shot CLIP (ViT-L/14@336px)", True].accuracy
  assert clip["ObjectNet"] == pytest.approx(0.723)
  assert clip["Youtube-BB PM10"] == pytest.approx(0.885)
  assert "ImageNet-Vid PM0" not in rows["ImageNet ResNet-101", False].accuracy


def test_the_average_counts_every_shift_once():
  clip = next(r for r in shifts.published() if r.kind == "zero-shot")
  want = (70.1 + 77.2 + 88.9 + 72.3 + 60.2 + (95.3 + 89.2) / 2 + (95.2 + 88.5) / 2) / 7
  assert 100 * shifts.average(clip.accuracy) == pytest.approx(want)
  rows = shifts.with_average(shifts.published())
  assert len(rows) == 4  # those of Figure 13 have no videos
  assert 100 * rows[3].accuracy[shifts.AVERAGE] == pytest.approx(want)
  with pytest.raises(shifts.ShiftError, match="Youtube-BB PM10 not measured"):
    shifts.average({k: v for k, v in clip.accuracy.items() if k != "Youtube-BB PM10"})


def test_the_interval_holds_the_line_and_narrows_with_more_models():
  rng = np.random.default_rng(0)

  def models(n):
    x = rng.uniform(-0.5, 2, n)
    y = x - 0.7 + rng.normal(0, 0.2, n)
    shares = zip(scipy.special.expit(x), scipy.special.expit(y), strict=True)
    return [Row(f"m{i}", "standard", {"ImageNet": a, "s": b}) for i, (a, b) in enumerate(shares)]

  widths = []
  for n in (6, 60):
    rows = models(n)
    line = shifts.fit(rows, "s")
    low, high = shifts.interval(rows, line, 0.7, draws=300)
    assert low < line.predict(0.7) < high
    assert shifts.interval(rows, line, 0.7, draws=300) == (low, high)
    widths.append(high - low)
  assert widths[1] < widths[0] / 1.5
  with pytest.raises(shifts.ShiftError, match="2 models"):
    shifts.interval(rows[:2], shifts.fit(rows[:2], "s"), 0.7)


@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_accuracies_without_a_logit_are_named(bad):
  with pytest.raises(shifts.ShiftError, match=f"m9, ImageNetV2: accuracy {bad} has no logit"):
    shifts.fit([*STANDARD, Row("m9", "standard", {"ImageNet": 0.5, "ImageNetV2": bad})],
               "ImageNetV2")  # fmt: skip


def test_equal_accuracies_make_no_line():
  rows = [Row(n, "standard", {"ImageNet": 0.5, "s": y}) for n, y in (("a", 0.4), ("b", 0.6))]
  with pytest.raises(shifts.ShiftError, match="two that differ on ImageNet"):
    shifts.fit(rows, "s")


def test_a_csv_of_ones_own(tmp_path):
  path = tmp_path / "mine.csv"
  path.write_bytes(
    b"\xef\xbb\xbfmodel,kind,ImageNet,ImageNet-A,status\r\n"
    b"r50,standard,76.1,0.5,ok\r\nclip,zero-shot,76.2,,\r\n"
  )
  r50, clip = shifts.read(path)
  assert (r50.model, r50.kind, clip.model, clip.kind) == ("r50", "standard", "clip", "zero-shot")
  assert dict(r50.accuracy) == pytest.approx({"ImageNet": 0.761, "ImageNet-A": 0.005})
  assert dict(clip.accuracy) == pytest.approx({"ImageNet": 0.762})


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("model,ImageNet\na,1\n", "no column 'kind'"),
    ("", "no column 'model' .*none"),
    ("model,kind,ImageNet\na,standard,many\n", "line 2, ImageNet: 'many' is no accuracy"),
    ("model,kind,ImageNet\n\na,standard,101\n", "line 3, ImageNet: '101'"),
    ("model,kind,ImageNet\na,standard,nan\n", "line 2, ImageNet: 'nan'"),
    ("model,kind,ImageNet\na,standard\n", "line 2: want 3 values"),
    ("model,kind,ImageNet\na,standard,1,2\n", "line 2: want 3 values"),
    ("model,kind,ImageNet\na,,1\n", "line 2: want a model and its kind"),
  ],
)
def test_a_bad_csv_is_named_by_line_and_column(tmp_path, text, words):
  path = tmp_path / "bad.csv"
  path.write_text(text)
  with pytest.raises(shifts.ShiftError, match=words):
    shifts.read(path)
