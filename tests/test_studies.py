"""The four verbs end to end: a tiny model of random weights on scikit-learn's digits."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
import trees
from parsed_page import Page
from test_inference import CONFIG

import clip_jax
from clip_jax import checkpoint, cli, code_version, probing, sharding, studies, train_step
from clip_jax import config as c
from clip_jax.data import images, records, scenes
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.evaluation import chosen, prompts, scores, zero_shot
from clip_jax.evaluation.probe import linear_probe
from clip_jax.evaluation.stress import corruptions
from clip_jax.models.clip import CLIP

# As that of test_inference, with room for whole sentences.
_TEXT = dataclasses.replace(CONFIG.model.text, context_length=32)
_CONFIG = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, text=_TEXT))
_NORMALISE = (_CONFIG.preprocess.mean, _CONFIG.preprocess.std)


def save(folder, params):
  vocabulary = tokenizer_lib.train(["a handwritten three", "a photo of the digit nine"], 600)
  checkpoints = checkpoint.Checkpoints(folder)
  meta = {"config": c.to_dict(_CONFIG), "tokenizer": vocabulary.to_json()}
  checkpoints.save(10, params, {"step": np.int32(10)}, meta)
  checkpoints.close()
  return folder


def fitted(folder):
  """Random encoders; the image projection is the least squares fit of digits to their prompts.

  (To the prompts' embeddings less their mean: what all classes share moves no answer.)
  """
  state = train_step.init_state(_CONFIG, sharding.make_mesh(devices=jax.devices()[:1]))
  model, own = clip_jax.load(save(folder / "random", state.params)), prompts.named("digits")
  class_CE = prompts.class_embeddings(model.encode_text, own.classes, own.templates)
  source = scenes.Digits("train", 32)
  some = [source[i] for i in range(0, len(source), 3)]
  image_NRR3 = images.normalise(np.stack([model.fit(r.image) for r in some]), *_NORMALISE)
  features_ND = CLIP(_CONFIG.model).apply(
    model.variables, image_NRR3, method=lambda clip, image_NRR3: clip.image(image_NRR3, None)
  )
  wanted_NE = (class_CE - class_CE.mean(0))[[own.classes.index(r.label) for r in some]]
  # A layer norm's features add up to 0: without a cut that direction would magnify roundings.
  projection_DE = np.linalg.lstsq(np.asarray(features_ND), wanted_NE, rcond=1e-3)[0]
  return save(folder / "fitted", {**model.params, "image_projection": projection_DE})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return fitted(tmp_path_factory.mktemp("weights"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
  """No folder is called digits there."""
  monkeypatch.chdir(tmp_path)


def run(capsys, *words):
  code = cli.main([*map(str, words), "--processes", "1"])  # JAX is in use here already
  return code, *capsys.readouterr()


def digits(workdir, *more):
  return ("--weights", workdir, "--data", "digits", "--limit", 40, "--batch", 16, *more)


def test_predictions_of_digits(capsys, workdir, tmp_path):
  words = ("predictions", *digits(workdir), "--output", tmp_path / "page.html", "--examples", 9)
  code, out, err = run(capsys, *words, "--json")
  assert (code, err) == (0, "")
  found = json.loads(out)
  model, source = clip_jax.load(workdir), scenes.Digits("test", 32)
  drawn = sorted(np.random.default_rng(0).permutation(355)[:40])
  kept = records.MemorySource([source[int(i)] for i in drawn], "drawn")
  own = prompts.named("digits")
  wanted = zero_shot.evaluate(model, kept, own.classes, own.templates, 16, examples=9, halves=False)
  assert found["top1"] == pytest.approx(wanted.top1)
  assert 0.15 < wanted.top1 < 1
  assert [e["key"] for e in found["examples"]] == [e.key for e in wanted.examples]
  assert [e["rank"] for e in found["examples"]] == [e.rank for e in wanted.examples]
  text = (tmp_path / "page.html").read_text()
  page = Page(text)
  assert page.tags.count("img") == 9
  assert "digits test" in page.text
  assert "9 of 40 images drawn at random with seed 0" in page.text
  assert "40 of the 355 images of digits test were taken, drawn with seed 0." in page.text
  assert chosen.weights_hash(model) in page.text
  code, out, _ = run(capsys, *words, "--seed", 1, "--halves")
  assert code == 0
  assert "right of those on the page" in out
  assert (tmp_path / "page.html").read_text() != text


STRESS = ("--corruptions", "fog,contrast", "--severities", "5,1")


def test_stress_goes_on_where_it_was_killed(capsys, workdir, tmp_path, monkeypatch):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  code, out, err = run(capsys, "stress", *digits(workdir), *STRESS, "--output", whole, "--json")
  assert (code, err) == (0, "")
  lines = [json.loads(line) for line in (whole / "results.jsonl").read_text().splitlines()]
  cells = [("clean", 0), ("fog", 1), ("fog", 5), ("contrast", 1), ("contrast", 5)]
  assert [(x["corruption"], x["severity"]) for x in lines] == cells
  assert {x["n"] for x in lines} == {40}
  assert {x["weights"] for x in lines} == {chosen.weights_hash(clip_jax.load(workdir))}
  figures = json.loads(out)
  assert [figures["clean"], *(figures[f"{name}/{s}"] for name, s in cells[1:])] == [
    x["accuracy"] for x in lines
  ]
  assert figures["clean"] > figures["mean"] > 0.1
  assert len({x["accuracy"] for x in lines}) > 2
  # killed while the third line was written
  killed.mkdir()
  (killed / "results.jsonl").write_bytes(
    b"\n".join((whole / "results.jsonl").read_bytes().split(b"\n")[:3])[:-20]
  )
  measured = []
  evaluate = zero_shot.evaluate
  monkeypatch.setattr(
    zero_shot,
    "evaluate",
    lambda model, source, **more: (
      measured.append((getattr(source, "name", "clean"), getattr(source, "severity", 0))),
      evaluate(model, source, **more),
    )[1],
  )
  code, out, err = run(capsys, "stress", *digits(workdir), *STRESS, "--output", killed, "--json")
  assert (code, err) == (0, "")
  assert measured == cells[2:]
  assert {k: v for k, v in json.loads(out).items() if k not in ("written", "notes")} == {
    k: v for k, v in figures.items() if k not in ("written", "notes")
  }
  assert "results.jsonl:3: the last line was cut off" in json.loads(out)["notes"][0]
  for name in ("stress.csv",):
    assert (killed / name).read_text() == (whole / name).read_text()
  page = Page((killed / "stress.html").read_text())
  assert page.tags.count("img") == 3  # clean and two corruptions
  rows = list(csv.DictReader((whole / "stress.csv").read_text().splitlines()))
  assert [float(row["accuracy"]) for row in rows] == [x["accuracy"] for x in lines]


def test_results_of_other_weights_images_or_prompts_are_refused(capsys, workdir, tmp_path):
  words = ("--corruptions", "brightness", "--severities", "1", "--output", tmp_path / "out")
  assert run(capsys, "stress", *digits(workdir), *words)[0] == 0
  before = (tmp_path / "out" / "results.jsonl").read_bytes()
  model = clip_jax.load(workdir)
  save(tmp_path / "other", jax.tree.map(lambda x: x * 1.001, model.params))
  for what, command in (
    ("weights", digits(tmp_path / "other")),
    ("data", digits(workdir, "--seed", 1)),
    ("prompts", digits(workdir, "--template", "{}")),
  ):
    code, out, err = run(capsys, "stress", *command, *words)
    assert (code, out) == (2, "")
    assert f"results.jsonl:1: measured with {what} " in err
    assert err.count("\n") == 1
  assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("by", ["hash", "embedding"])
def test_overlap_finds_what_training_has_seen(capsys, workdir, tmp_path, by):
  """Three of six images lie in the training folder, too; the labels play no part."""
  for i in range(6):
    trees.write(tmp_path / "eval" / ("cat", "dog")[i % 2] / f"{i}.png", trees.png(i, (64, 64)))
  for i in (0, 3, 4):
    trees.write(tmp_path / "seen" / f"copy{i}.png", trees.png(i, (64, 64)))
  for i in range(100, 104):
    trees.write(tmp_path / "seen" / f"own{i}.png", trees.png(i, (64, 64)))
  words = ("--data", tmp_path / "eval", "--training", tmp_path / "seen", "--output", tmp_path / "o")
  code, out, err = run(
    *(capsys, "overlap", "--weights", workdir, *words, "--by", by, "--batch", 4, "--json"),
    *("--threshold", 0 if by == "hash" else 1e-5),
  )
  assert (code, err) == (0, "")
  found = json.loads(out)
  assert (found["n"], found["overlapping"], found["training_images"]) == (6, 3, 7)
  rows = list(csv.DictReader((tmp_path / "o" / "pairs.csv").read_text().splitlines()))
  counted = [(row["key"], row["train_key"]) for row in rows if row["counted"] == "yes"]
  assert sorted(counted) == [
    (f"{('cat', 'dog')[i % 2]}/{i}.png", f"copy{i}.png") for i in (0, 4, 3)
  ]
  assert len(list((tmp_path / "o" / "cache").glob("*.rows"))) == 2  # of both sides
  page = Page((tmp_path / "o" / "overlap.html").read_text())
  assert page.text.count("✓ overlap") == 3
  assert json.loads((tmp_path / "o" / "overlap.json").read_text())["overlap"] == found["overlap"]
  # accuracy on Overlap, by an evaluation of those three alone
  what = chosen.choose(chosen.Asked(str(tmp_path / "eval")), 16)
  three = [what.source[k] for k in range(6) if what.source[k].key in dict(counted)]
  result = chosen.evaluator(clip_jax.load(workdir), what, 4)(records.MemorySource(three, "three"))
  assert found["overlap"] == pytest.approx(result.top1)


def test_a_corrupt_image_is_named_and_left_out_only_where_that_was_asked(capsys, workdir, tmp_path):
  for i in range(4):
    trees.write(tmp_path / "eval" / ("cat", "dog")[i % 2] / f"{i}.png", trees.png(i))
  trees.write(tmp_path / "eval" / "dog" / "3.png", trees.png(3)[:-60])
  words = ("predictions", "--weights", workdir, "--data", "eval", "--output", "page.html")
  code, out, err = run(capsys, *words, "--batch", 4)
  assert (code, out) == (2, "")
  assert "dog/3.png: image cannot be decoded" in err
  code, out, _ = run(capsys, *words, "--batch", 4, "--corrupt-images", "skip", "--json")
  assert code == 0
  found = json.loads(out)
  assert found["n"] == 3
  assert "eval/dog/3.png" in found["notes"][0]
  assert (
    "1 of 4 images of eval test cannot be decoded"
    in Page((tmp_path / "page.html").read_text()).text
  )


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (("predictions", "--output", "none/page.html"), "--output none/page.html: want a file in a"),
    (("predictions", "--output", "."), "--output .: want a file"),
    (("predictions", "--output", "p.html", "--examples", "0"), "--examples 0: want at least 1"),
    (("predictions", "--output", "p.html", "--batch", "0"), "--batch 0: want at least 1"),
    (("predictions", "--output", "p.html", "--template", "x"), "wants {} once"),
    (("predictions", "--output", "p.html", "--weights", "none"), "none: no such file or folder"),
    (("predictions", "--output", "p.html", "--split", "dev"), "no split 'dev'"),
    (("stress", "--output", "o", "--corruptions", "rain"), "'rain': no such one; choose of"),
    (("stress", "--output", "o", "--severities", "6"), "1 to 5"),
    (("stress", "--output", "file"), "--output file: is a file; give a folder"),
    (("overlap", "--output", "o", "--training", "none"), "none: no such folder"),
    (("overlap", "--output", "o", "--training", "digits", "--threshold", "40"), "0 to 31"),
  ],
)
def test_mistakes_are_one_line(capsys, workdir, tmp_path, words, message):
  (tmp_path / "file").write_text("x")
  weights = () if "--weights" in words else ("--weights", workdir)
  code, out, err = run(capsys, *words, *weights, "--data", "digits")
  assert (code, out) == (2, "")
  assert message in err
  assert err.startswith("error: ")
  assert err.count("\n") == 1
  assert not (tmp_path / "o").exists()


def test_a_probe_of_digits_on_all_devices(workdir, tmp_path):
  setup = studies.Setup(str(workdir), chosen.Asked("digits"), limit=60, batch=16, seed=3)
  found, notes = probing.probe(setup, tmp_path / "out", probing.Asked(shots=(1,), seeds=(0,)))
  assert "60 of the 355 images of digits test were taken, drawn with seed 3." in notes
  assert "60 of the 1,442 images of digits train were taken, drawn with seed 3." in notes
  model, own = clip_jax.load(workdir), prompts.named("digits")

  def drawn(split, n):
    source = scenes.Digits(split, 32)
    return [source[int(i)] for i in sorted(np.random.default_rng(3).permutation(n)[:60])]

  def split(some):
    labels = np.array([own.classes.index(record.label) for record in some])
    return linear_probe.Split(model.image_features([record.image for record in some]), labels)

  test = drawn("test", 355)
  wanted = linear_probe.probe(split(drawn("train", 1442)), split(test), 10, scores.accuracy, seed=3)
  assert found.full.score == pytest.approx(wanted.score, abs=1 / 60)
  assert wanted.score > 0.3
  kept = records.MemorySource(test, "drawn")
  alone = zero_shot.evaluate(model, kept, own.classes, own.templates, 16)
  assert found.zero_shot.score == pytest.approx(alone.top1)


def test_a_terminal_reads_nothing_into_names(capsys, workdir, tmp_path):
  name = "[red]\x1b[31m\udcff"
  for i in range(2):
    trees.write(tmp_path / name / ("cat", "dog")[i] / f"{i}.png", trees.png(i))
  words = ("--weights", workdir, "--data", name, "--batch", 2, "--output", "page.html")
  code, out, err = run(capsys, "predictions", *words)
  assert (code, err) == (0, "")
  assert "[red]?[31m? test" in out
  assert "\x1b" not in out


@pytest.mark.parametrize("numbers", ["x", "", "1.5"])
def test_severities_are_whole_numbers(capsys, numbers):
  words = ["stress", "--weights", "w", "--data", "d", "--output", "o", "--severities", numbers]
  with pytest.raises(SystemExit):
    cli.main(words)
  assert "want whole numbers" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["predictions", "stress", "overlap", "probe"])
def test_help_is_for_people(capsys, verb):
  with pytest.raises(SystemExit) as stopped:
    cli.main([verb, "--help"])
  assert stopped.value.code == 0
  out = capsys.readouterr().out
  assert "--json" in out
  assert "%(" not in out


def test_from_python_without_a_command_line(workdir, tmp_path):
  setup = studies.Setup(str(workdir), chosen.Asked("digits"), limit=8, batch=8)
  result, notes = studies.stress(setup, tmp_path / "o", ("fog",), (2,))
  assert result.severities == (2,)
  assert set(result.accuracy) <= set(corruptions.NAMES)
  taken = "8 of the 355 images of digits test were taken, drawn with seed 0."
  assert notes == (taken,)
  lines = tmp_path / "o" / "results.jsonl"
  clean, fog = map(json.loads, lines.read_text().splitlines())
  assert clean["code"] == fog["code"] == code_version.current()
  del clean["code"]
  lines.write_text("".join(json.dumps(x) + "\n" for x in (clean, {**fog, "code": "v1"})))
  _, notes = studies.stress(setup, tmp_path / "o", ("fog",), (2,))
  other = f"than this one, {fog['code']}: not known (1), v1 (1); give another --output, or remove "
  assert notes[0].startswith("2 of 2 figures were measured by other versions of the code ")
  assert f"{other}{lines}, to measure all anew." in notes[0]
  assert notes[1:] == (taken,)
  assert lines.read_text().count("\n") == 2  # told, and not measured again
