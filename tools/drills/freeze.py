"""Keeps a checkpoint of this release for the releases to come: tests/golden/checkpoint_*.tar.gz.

python -m tools.drills.freeze

A tiny model, trained for two steps of four, with what it says of two images and two texts. Run it
once a release, or when the format of checkpoints changes; never replace one that is there.
"""

import importlib.metadata
import io
import json
import pathlib
import shutil
import sys
import tarfile
import tempfile

import numpy as np
import rich.console

import clip_jax
from clip_jax import checkpoint, train
from clip_jax import config as c

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
CONFIG = c.Config(
  name="kept",
  steps=4,
  log_every_steps=1,
  model=c.Model(
    image=c.Vision(resolution=16, patch=8, width=8, layers=2, heads=2),
    text=c.Text(context_length=20, vocab_size=560, width=8, layers=1, heads=2),
    embed_dim=6,
  ),
  data=c.Data(sources=(c.Source("scenes", records=40),), batch_pairs=8, tokenizer="train"),
  optimizer=c.Optimizer(learning_rate=1e-3, warmup_steps=1),
  checkpoint=c.Checkpoint(every_steps=2),
)
TEXTS = ("a red circle", "two blue stars on the left")


def pictures() -> np.ndarray:
  """Two images that no drawing code decides, uint8 [2, 16, 16, 3]."""
  return (
    (np.arange(2 * 16 * 16 * 3, dtype=np.uint32) * 2654435761 >> 24)
    .astype(np.uint8)
    .reshape(2, 16, 16, 3)
  )


def main() -> int:
  version = importlib.metadata.version("clip-jax-tpu")
  target = FOLDER / f"checkpoint_{version}_format_{checkpoint.FORMAT}.tar.gz"
  if target.exists():
    print(f"error: {target}: already there, and must stay as it is", file=sys.stderr)
    return 2
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder) / "run"
    train.train(CONFIG, workdir, rich.console.Console(quiet=True))
    shutil.rmtree(workdir / "checkpoints" / "4")
    model = clip_jax.load(workdir)
    said = {
      "step": model.step,
      "texts": model.encode_text(TEXTS).tolist(),
      "images": model.encode_image(pictures()).tolist(),
    }
    with tarfile.open(target, "w:gz") as archive:
      for name in ("checkpoints", "tokenizer.json"):
        archive.add(workdir / name, name)
      data = json.dumps(said).encode()
      info = tarfile.TarInfo("said.json")
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
  print(f"{target}: {target.stat().st_size:,} bytes")
  return 0


if __name__ == "__main__":
  sys.exit(main())
