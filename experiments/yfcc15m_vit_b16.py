"""ViT-B/16 on YFCC15M by SLIP's settings for CLIP.

Settings: facebookresearch/SLIP, README and main.py: batch 4,096, learning rate 5e-4, weight decay
0.5, 25 epochs, one of them warm-up, Adam's epsilon 1e-8.
Data: data/yfcc15m (see experiments/README.md, "Public pairs"), 14,829,396 pairs. With fewer, lower
the steps and the warm-up in proportion.
Cost, estimated: 45.7 EFLOP, 161 v5e chip-hours at 40 % of the peak.
Target: ImageNet zero-shot 37.6 % (SLIP's README, verified). Measured: not run.
Differs: SLIP's image encoder is timm's (exact GELU, no norm before the blocks), it crops by
RandomResizedCrop, 50 to 100 % of the area (a short side of 256 pixels leaves 77 % of a square
image), normalises by ImageNet's mean and deviation and ends at a learning rate of 1e-5, not 0.

clip-jax train --config experiments/yfcc15m_vit_b16.py --workdir runs/yfcc15m_vit_b16
"""

import dataclasses

from ml_collections import ConfigDict

from clip_jax import config as c
from clip_jax.models import presets


def get_config() -> ConfigDict:
  return c.to_config_dict(
    c.Config(
      name="yfcc15m_vit_b16",
      steps=90_511,  # 25 epochs of 14,829,396 pairs
      log_every_steps=100,
      model=dataclasses.replace(presets.VIT_B_16, scan_layers=True, remat="tuned"),
      preprocess=c.Preprocess(train_short_side=256),
      data=c.Data(
        sources=(c.Source(path="data/yfcc15m"),), batch_pairs=4096, workers=32, prefetch_batches=2
      ),
      optimizer=c.Optimizer(
        learning_rate=5e-4, warmup_steps=3620, weight_decay=0.5, beta2=0.98, epsilon=1e-8
      ),
    )
  )
