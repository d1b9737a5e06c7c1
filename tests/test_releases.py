"""Checkpoints that earlier releases wrote: read exactly, gone on from; later ones refused."""

import json
import math
import pathlib
import shutil
import tarfile

import numpy as np
import pytest
import rich.console

import clip_jax
from clip_jax import checkpoint, metrics, parsing, train
from tools.drills import freeze

KEPT = sorted((pathlib.Path(__file__).parent / "golden").glob("checkpoint_*.tar.gz"))


@pytest.fixture(params=KEPT, ids=lambda path: path.name.removesuffix(".tar.gz"))
def kept(request, tmp_path):
  with tarfile.open(request.param) as archive:
    archive.extractall(tmp_path, filter="data")
  return tmp_path


@pytest.mark.skipif(not KEPT, reason="none is kept yet: python -m tools.drills.freeze")
def test_there_is_one_of_every_format():
  formats = {int(path.name.removesuffix(".tar.gz").rpartition("_")[2]) for path in KEPT}
  assert formats == set(range(1, checkpoint.FORMAT + 1))


def test_a_kept_checkpoint_is_read(kept, drill):
  said = json.loads((kept / "said.json").read_text())
  model = clip_jax.load(kept)  # every leaf's checksum is compared
  assert model.step == said["step"]
  np.testing.assert_allclose(model.encode_text(freeze.TEXTS), said["texts"], atol=2e-6)
  np.testing.assert_allclose(model.encode_image(freeze.pictures()), said["images"], atol=2e-6)
  drill(29, versions=1)


def test_training_goes_on_from_it(kept):
  checkpoints = checkpoint.Checkpoints(kept, read_only=True)
  step, meta = checkpoints.newest_meta()
  checkpoints.close()
  config = parsing.parse(parsing.upgrade(meta["config"]))
  console = rich.console.Console(quiet=True)
  assert train.train(config, kept, console, accept_changes=True)
  losses = [line["train/loss"] for line in metrics.read(kept) if "train/loss" in line]
  assert len(losses) == config.steps - step > 0
  assert all(map(math.isfinite, losses))
  assert clip_jax.load(kept).step == config.steps


def test_a_later_format_is_refused_with_advice(kept):
  """And at once: no older step in its place, nothing moved, as its own release can go on."""
  folder = kept / "checkpoints"
  (step,) = [path.name for path in folder.iterdir() if path.name.isdecimal()]
  later = f"{int(step) + 1}"
  shutil.copytree(folder / step, folder / later)
  page = folder / later / "meta" / "metadata"
  meta = json.loads(page.read_text()) | {"format": checkpoint.FORMAT + 1}
  page.write_text(json.dumps(meta | {"sha256": checkpoint._digest(meta)}))
  message = (
    rf"checkpoints/{later}: of format {checkpoint.FORMAT + 1}, and this release of clip_jax reads "
    rf"format {checkpoint.FORMAT}; go on with the release that wrote it"
  )
  with pytest.raises(checkpoint.CheckpointError, match=message):
    clip_jax.load(kept)
  with pytest.raises(checkpoint.CheckpointError, match=message):
    train.train(freeze.CONFIG, kept, rich.console.Console(quiet=True))
  assert (folder / later).is_dir()
