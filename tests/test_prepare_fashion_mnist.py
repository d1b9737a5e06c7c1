"""Preparing the package of Fashion-MNIST, from a small one made up."""

import numpy as np
import pytest
import trees

from clip_jax.data import images
from clip_jax.evaluation import prompts
from tools import prepare_data


def test_fashion_mnist(tmp_path, capsys):
  image_NRR = trees.fashion_tree(tmp_path / "debs" / "unpacked")
  verb = ["fashion-mnist", str(tmp_path / "out"), "--packages", str(tmp_path / "debs")]
  assert prepare_data.main([*verb, "--shard-records", "8"]) == 0
  train, test = trees.read_all(tmp_path / "out", "train"), trees.read_all(tmp_path / "out", "test")
  assert (len(train), len(test)) == (30, 10)
  classes = prompts.SETS["fashion_mnist"].classes
  assert tuple(trees.read_manifest(tmp_path / "out")["classes"]) == classes
  for i, record in enumerate(train + test):
    pixels = np.asarray(images.decode(record.image))
    np.testing.assert_array_equal(pixels, np.repeat(image_NRR[i][..., None], 3, axis=2))
    assert record.label == classes[i % 10]
    assert len(set(record.captions)) == 4
  assert any("sneaker" in caption for caption in train[7].captions)
  assert prepare_data.main(["fashion-mnist", str(tmp_path / "out")]) == 0  # nothing to download
  assert "already there" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "text", "other"])
def test_a_damaged_package_is_named(tmp_path, capsys, damage):
  trees.fashion_tree(tmp_path)
  path = tmp_path / "usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz"
  data = path.read_bytes()
  labels = trees.idx_file(np.zeros(30, np.uint8))
  path.write_bytes({"cut": data[:-200], "text": b"hello", "other": labels}[damage])
  verb = ["fashion-mnist", str(tmp_path / "out"), "--packages", str(tmp_path)]
  assert prepare_data.main(verb) == 2
  assert f"error: {path}" in capsys.readouterr().err
