"""ViT-B/16 on Conceptual Captions 3M by SLIP's settings for CLIP.

Settings: facebookresearch/SLIP, README, main.py and issue 9: batch 4,096, learning rate 5e-4,
weight decay 0.5, 40 epochs, one of them warm-up, Adam's epsilon 1e-8.
Data: data/cc3m (see experiments/README.md, "Public pairs"), 2,905,954 pairs. With fewer, lower the
steps and the warm-up in proportion.
Cost, estimated: 14.3 EFLOP, 51 v5e chip-hours at 40 % of the peak.
Target: ImageNet zero-shot 17.1 % (SLIP's README, verified), of the best epoch: the model overfits,
and in issue 9 a user's ended at 14.1. Measured: not run.
Differs: SLIP's image encoder is timm's (exact GELU, no norm before the blocks), it crops by
RandomResizedCrop, 50 to 100 % of the area (a short side of 256 pixels leaves 77 % of a square
image), normalises by ImageNet's mean and deviation and ends at a learning rate of 1e-5, not 0.

clip-jax train --config experiments/cc3m_vit_b16.py --workdir runs/cc3m_vit_b16
"""

import dataclasses

from ml_collections import ConfigDict

from clip_jax import config as c
from clip_jax.models import presets


def get_config() -> ConfigDict:
  return c.to_config_dict(
    c.Config(
      name="cc3m_vit_b16",
      steps=28_378,  # 40 epochs of 2,905,954 pairs
      log_every_steps=100,
      model=dataclasses.replace(presets.VIT_B_16, scan_layers=True, remat="tuned"),
      preprocess=c.Preprocess(train_short_side=256),
      data=c.Data(
        sources=(c.Source(path="data/cc3m"),), batch_pairs=4096, workers=32, prefetch_batches=2
      ),
      optimizer=c.Optimizer(
        learning_rate=5e-4, warmup_steps=709, weight_decay=0.5, beta2=0.98, epsilon=1e-8
      ),
    )
  )
