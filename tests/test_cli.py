"""The command line as a person or a program uses it."""

import json
import signal

import numpy as np
import pytest
from PIL import Image
from test_inference import workdir  # noqa: F401, a fixture

import clip_jax
from clip_jax import cli


@pytest.fixture
def picture(tmp_path):
  path = tmp_path / "cat.png"
  pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3)).astype(np.uint8)
  Image.fromarray(pixels).save(path)
  return str(path)


def _run(capsys, *words):
  code = cli.main([str(word) for word in words])
  return code, *capsys.readouterr()


def test_classify_for_programs_and_people(capsys, workdir, picture):  # noqa: F811
  words = ("classify", picture, picture, "--labels", "circle, square", "--weights", workdir)
  code, out, _ = _run(capsys, *words, "--json")
  assert code == 0
  first, second = json.loads(out)
  assert first == second
  assert first["image"] == picture
  model = clip_jax.load(workdir)
  expected = model.classify([picture], ["circle", "square"], templates=("{}",))[0]
  np.testing.assert_allclose(list(first["probabilities"].values()), expected, atol=1e-6)
  code, out, _ = _run(capsys, *words)
  assert code == 0
  assert "circle" in out
  assert f"{expected[0]:.1%}" in out


def test_embed_writes_an_array(capsys, workdir, picture, tmp_path):  # noqa: F811
  target = tmp_path / "out.npy"
  code, out, _ = _run(
    capsys,
    "embed",
    picture,
    "--texts",
    "circle",
    "--weights",
    workdir,
    "--output",
    target,
    "--json",
  )
  assert code == 0
  array = np.load(target)
  assert array.shape == (2, 12)
  np.testing.assert_allclose([row["embedding"] for row in json.loads(out)], array, atol=1e-6)
  assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (("classify", "/no/cat.png", "--labels", "a"), "/no/cat.png: No such file"),
    (("classify", "x.png", "--labels", "a, ,b"), "--labels: an empty text among 'a', '', 'b'"),
    (("classify", "x.png", "--labels", "a\udcff"), "is not valid UTF-8"),
    (("embed", "--texts", ""), "--texts: an empty text"),
    (("embed", "--texts", "a", "--output", "/no/where.npy"), "there is no such folder"),
    (("evaluate", "--report", "/no/page.html"), "there is no folder /no"),
    (("classify", "x.png", "--labels", "a", "--label", "b"), "unknown option"),
    (("embed",), "nothing to embed"),
    (("embed", "--config.steps=3", "--texts", "a"), "unknown option: --config.steps=3"),
  ],
)
def test_mistakes_are_one_line(capsys, workdir, words, message):  # noqa: F811
  code, out, err = _run(capsys, *words, "--weights", workdir)
  assert code == 2
  assert message in err
  assert err.startswith("error: ")
  assert err.count("\n") == 1
  assert "Traceback" not in out + err


def test_missing_weights_are_one_line(capsys, tmp_path):
  code, _, err = _run(capsys, "evaluate", "--weights", tmp_path / "none")
  assert code == 2
  assert "no checkpoints there" in err


def test_a_broken_config_file_is_one_line(capsys, tmp_path):
  for text, message in (
    ("x = 1", "no function get_config"),
    ("1 +", "SyntaxError"),
    ("get_config = lambda: {}.nothing", "c.py: 'dict' object has no attribute 'nothing'\n"),
  ):
    (tmp_path / "c.py").write_text(text)
    code, _, err = _run(capsys, "train", "--config", tmp_path / "c.py", "--workdir", tmp_path / "w")
    assert code == 2
    assert message in err


def test_sigterm_in_the_start_says_that_it_can_start_again(capsys, tmp_path):
  """Where the config file is executed: before sources are opened, and with nothing to save."""
  text = "import os, signal\ndef get_config():\n  os.kill(os.getpid(), signal.SIG{})\n"
  before = signal.getsignal(signal.SIGTERM)
  for name, expected, words in (("TERM", 75, "SIGTERM: stopped before"), ("INT", 130, "interrup")):
    (tmp_path / "c.py").write_text(text.format(name))
    code, _, err = _run(capsys, "train", "--config", tmp_path / "c.py", "--workdir", tmp_path / "w")
    assert (code, err.count("\n")) == (expected, 1)
    assert err.startswith(words)
  assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("verb", ["train", "evaluate", "paper", "classify", "embed"])
def test_help_is_for_people(capsys, verb):
  with pytest.raises(SystemExit) as stopped:
    cli.main([verb, "--help"])
  assert stopped.value.code == 0
  out = capsys.readouterr().out
  assert "--json" in out
  assert "%(" not in out


def test_the_first_help_names_the_verbs(capsys):
  with pytest.raises(SystemExit):
    cli.main(["--help"])
  out = capsys.readouterr().out
  for verb in ("train", "evaluate", "paper", "classify", "embed"):
    assert verb in out
