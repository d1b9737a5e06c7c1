"""A small CLIP on the embedded dataset: what `make demo` runs.

Paper: https://arxiv.org/abs/2103.00020, the method at a size that two CPU cores train in minutes.
Data: 56 of 64 colour-shape compositions, drawn, and handwritten digits (clip_jax/data/scenes.py).
Model: a stem of three convolutions (it learns shapes from few images sooner than patches do),
one layer of width 128; two layers of width 64 for texts.
Expected and measured figures, with cost: experiments/README.md.
"""

from ml_collections import ConfigDict

from clip_jax import config as c


def get_config() -> ConfigDict:
  held_out = c.Source(kind="scenes", split="held_out", records=1000)
  digits = c.Source(kind="digits", split="test")
  pairs = c.Source(kind="scenes", split="test", records=500)
  return c.to_config_dict(
    c.Config(
      name="demo",
      steps=2600,
      model=c.Model(
        image=c.Vision(resolution=32, patch=8, stem="convolution", width=128, layers=1, heads=4),
        text=c.Text(context_length=16, vocab_size=1024, width=64, layers=2, heads=2),
        embed_dim=128,
      ),
      data=c.Data(
        sources=(
          c.Source(kind="scenes", split="train", records=50_000, weight=0.85),
          c.Source(kind="digits", split="train", weight=0.15),
        ),
        batch_pairs=128,
        tokenizer="train",
      ),
      optimizer=c.Optimizer(learning_rate=2e-3, warmup_steps=100, weight_decay=0.1),
      evaluation=c.Evaluation(
        tasks=(
          c.Task("held-out compositions", "zero_shot", held_out, "scenes"),
          c.Task("handwritten digits", "zero_shot", digits, "digits"),
          c.Task("scenes", "retrieval", pairs),
        ),
        every_steps=520,
      ),
      checkpoint=c.Checkpoint(every_steps=520),
    )
  )
