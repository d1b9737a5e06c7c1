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
  found = {row.model: shifts.effective(row, line) for row in rows[:3]}
  assert found["clip"].effective == pytest.approx(0.4 - 0.26894142)
  assert found["clip"].predicted == pytest.approx(0.26894142)
  assert (found["clip"].shift, found["clip"].low, found["clip"].high) == ("s", None, None)
  assert found["a"].effective == pytest.approx(0, abs=1e-12)
  with pytest.raises(shifts.ShiftError, match="other, s: its accuracy on 's' is not measured"):
    shifts.effective(rows[3], line)


def test_models_of_other_kinds_do_not_move_the_line():
  odd = Row("clip", "zero-shot", {"ImageNet": 0.76, "ImageNetV2": 0.99})
  assert shifts.fit([*STANDARD, odd], "ImageNetV2") == shifts.fit(STANDARD, "ImageNetV2")


def test_the_published_models_alone_are_too_few_standard_ones():
  with pytest.raises(shifts.ShiftError, match=r"ImageNet-A: 1 model of kind standard .*more"):
    shifts.fit(shifts.published(), "ImageNet-A")


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
  rows = [shifts.by_shift(row) for row in shifts.published()]
  found = shifts.with_average(rows, dict.fromkeys(shifts.SHIFTS, "ImageNet"))
  assert len(found) == 4  # those of Figure 13 have no videos
  assert 100 * found[3].accuracy["average of 7 shifts"] == pytest.approx(want)
  assert found[3].accuracy["ImageNet for average of 7 shifts"] == pytest.approx(0.762)
  assert 100 * shifts.by_shift(clip).accuracy["Youtube-BB"] == pytest.approx((95.2 + 88.5) / 2)
  two = {"ImageNetV2": "ImageNet", "ImageNet-A": "ImageNet-R"}
  name = "average of 2 of 7 shifts "
  name += "(without ImageNet-R, ObjectNet, ImageNet-Sketch, ImageNet-Vid, Youtube-BB)"
  assert shifts.average_name(list(two)) == name
  found = shifts.with_average([clip], two)[0].accuracy
  assert 100 * found[name] == pytest.approx((70.1 + 77.2) / 2)
  assert 100 * found[f"ImageNet for {name}"] == pytest.approx((76.2 + 88.9) / 2)


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
    low, high = shifts.interval(line, 0.7, draws=300)
    assert low < line.predict(0.7) < high
    assert shifts.interval(line, 0.7, draws=300) == (low, high)
    widths.append(high - low)
  assert widths[1] < widths[0] / 1.5
  with pytest.raises(shifts.ShiftError, match="2 models"):
    shifts.interval(shifts.fit(rows[:2], "s"), 0.7)


def test_the_interval_is_that_of_a_bootstrap_written_out():
  """Each draw fitted by scipy; draws of one model alone make no line."""
  rows, rng, predicted = STANDARD[:3], np.random.default_rng(0), []
  x, y = (scipy.special.logit(c) for c in columns(rows, "ImageNet", "ImageNetV2"))
  for own in rng.integers(3, size=(1000, 3)):
    if len(set(own)) > 1:
      line = scipy.stats.linregress(x[own], y[own])
      predicted.append(scipy.special.expit(line.intercept + line.slope * scipy.special.logit(0.6)))
  want = np.quantile(predicted, [0.025, 0.975])
  assert 700 < len(predicted) < 1000
  assert shifts.interval(shifts.fit(rows, "ImageNetV2"), 0.6) == pytest.approx(tuple(want))


A, R = "ImageNet on ImageNet-A classes", "ImageNet on ImageNet-R classes"
SHARES = {  # three standard models, a probe and a zero-shot model
  "ImageNet": (0.56, 0.70, 0.79, 0.75, 0.60),
  "ImageNetV2": (0.43, 0.57, 0.66, 0.65, 0.55),
  A: (0.80, 0.88, 0.95, 0.93, 0.85),
  "ImageNet-A": (0.01, 0.02, 0.06, 0.30, 0.40),
  R: (0.75, 0.86, 0.91, 0.90, 0.88),
  "ImageNet-R": (0.25, 0.36, 0.41, 0.60, 0.80),
}
MODELS = (("a", "standard"), ("b", "standard"), ("c", "standard"), ("probe", ""), ("zero", ""))


def world(*without):
  """The measured rows and the standard ones, but for (model, column)."""
  rows = [
    Row(model, kind, {c: v[i] for c, v in SHARES.items() if (model, c) not in without})
    for i, (model, kind) in enumerate(MODELS)
  ]
  return rows[3:], rows[:3]


def above(base, shift, i):
  """In shares, by scipy, model i of SHARES; columns are of the five models."""
  x, y = scipy.special.logit(base), scipy.special.logit(shift)
  line = scipy.stats.linregress(x[:3], y[:3])
  return shift[i] - scipy.special.expit(line.intercept + line.slope * x[i])


def test_each_shift_stands_on_imagenet_with_its_own_classes():
  found = shifts.over_lines(*world())
  got = {(e.model, e.shift): e for e in found.effective}
  v2, a, r, whole, on_a, on_r = (
    np.array(SHARES[c]) for c in ("ImageNetV2", "ImageNet-A", "ImageNet-R", "ImageNet", A, R)
  )
  name = shifts.average_name(["ImageNetV2", "ImageNet-A", "ImageNet-R"])
  for i, model in ((3, "probe"), (4, "zero")):
    for shift, base, under in (
      ("ImageNetV2", whole, v2),
      ("ImageNet-A", on_a, a),
      ("ImageNet-R", on_r, r),
      (name, (whole + on_a + on_r) / 3, (v2 + a + r) / 3),
    ):
      one = got.pop((model, shift))
      assert one.effective == pytest.approx(above(base, under, i), abs=1e-12), (model, shift)
      assert (one.accuracy, one.base_accuracy) == pytest.approx((under[i], base[i]))
      assert one.low <= one.effective <= one.high
  assert got == {}
  assert len(found.notes) == 4
  off = [100 * above(on_a, a, i) for i in range(3)]
  assert found.notes[1] == (
    "ImageNet-A: above the line of 3 standard models over their accuracy on "
    f"'{A}' ({min(off):+.1f} to {max(off):+.1f} points off it themselves)"
  )


def test_an_average_is_of_the_shifts_that_a_model_has_and_of_others_with_these():
  found = shifts.over_lines(*world(("probe", "ImageNet-R")))
  averages = {(e.model, e.shift) for e in found.effective if "average" in e.shift}
  two = shifts.average_name(["ImageNetV2", "ImageNet-A"])
  three = shifts.average_name(["ImageNetV2", "ImageNet-A", "ImageNet-R"])
  assert averages == {("probe", two), ("zero", two), ("zero", three)}


@pytest.mark.parametrize(
  ("without", "why"),
  [
    ([("a", A), ("b", A)], f"as fewer than two standard models have a column '{A}'"),
    ([("probe", A), ("zero", A)], f"as '{A}' is not measured"),
  ],
)
def test_all_of_imagenet_is_the_base_where_its_part_is_not_known(without, why):
  found = shifts.over_lines(*world(*without))
  got = {(e.model, e.shift): e.effective for e in found.effective}
  a, whole = np.array(SHARES["ImageNet-A"]), np.array(SHARES["ImageNet"])
  assert got["zero", "ImageNet-A"] == pytest.approx(above(whole, a, 4))
  words = f", of all its classes and not of the shift's alone, {why}"
  assert [note.partition(":")[0] for note in found.notes if note.endswith(words)] == ["ImageNet-A"]


def test_what_has_no_base_or_no_logit_is_told_and_the_others_are_there():
  measured, models = world(("probe", A))
  measured.append(Row("sure", "", {**measured[1].accuracy, "ImageNet": 1.0}))
  models[0] = Row("a", "standard", {**models[0].accuracy, "ImageNet-R": 0.0})
  found = shifts.over_lines(measured, models)
  got = {(e.model, e.shift) for e in found.effective if "average" not in e.shift}
  assert got == {(m, "ImageNetV2") for m in ("probe", "zero")} | {
    (m, "ImageNet-A") for m in ("zero", "sure")
  }
  assert f"probe, ImageNet-A: its accuracy on '{A}' is not measured" in found.notes
  assert "a, ImageNet-R: accuracy 0.0 has no logit; want one between 0 and 1" in found.notes
  assert "sure, ImageNetV2, ImageNet: accuracy 1.0 has no logit; want one" in "".join(found.notes)


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
