"""RN50x16 as published: 32 epochs of 400 million pairs, images of 384 pixels.

Paper: https://arxiv.org/abs/2103.00020, Tables 18 (common) and 19 (this model). What the paper
leaves open is chosen, with reasons, in experiments/README.md, "The nine published models".
Data: your own pairs as shards in data/pairs, or wherever --config.data.sources[0].path says; the
400 million of the paper (WIT) were never published.
Cost, estimated: 6,107 EFLOP, 21,528 v5e chip-hours at 40 % of the peak. ResNets may reach less.
Memory (docs/preflight.md): fits v6e:16x16, v4:4x8x8, v5p:4x4x8; not v5e:16x16.
Expected, from the paper's data: ImageNet zero-shot 70.5 % (Table 11). Measured: not run.

clip-jax train --config experiments/clip_rn50x16.py --workdir runs/clip_rn50x16
"""

import dataclasses

from ml_collections import ConfigDict

from clip_jax import config as c
from clip_jax.models import presets


def get_config() -> ConfigDict:
  return c.to_config_dict(
    c.Config(
      name="clip_rn50x16",
      steps=390_625,  # 32 epochs of 400 million pairs
      log_every_steps=100,
      model=dataclasses.replace(presets.RN50X16, scan_layers=True, remat="tuned"),
      data=c.Data(
        sources=(c.Source(path="data/pairs"),), batch_pairs=32_768, workers=32, prefetch_batches=2
      ),
      optimizer=c.Optimizer(
        learning_rate=4e-4, warmup_steps=2000, weight_decay=0.2, beta2=0.999, epsilon=1e-8
      ),
    )
  )
