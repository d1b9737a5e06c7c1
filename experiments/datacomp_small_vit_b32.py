"""ViT-B/32 at DataComp's small scale: the fixed settings by which sets of pairs are compared.

Settings: mlfoundations/datacomp, scale_configs.py and train.py: batch 4,096, learning rate 5e-4,
500 steps of warm-up, 12.8 million pairs seen, however many the set has; open_clip's weight decay
(0.2), beta2, epsilon and exact GELU.
Data: data/datacomp_small (see experiments/README.md, "Public pairs"), the pool or what a filter
leaves of it.
Cost, estimated: 0.567 EFLOP, 2 v5e chip-hours at 40 % of the peak.
Targets, ImageNet zero-shot (open_clip, docs/datacomp_models.md, verified): the whole pool 2.5 %,
filtered by text 4.6 %, by CLIP score 5.1 %, by image and CLIP score 3.9 %. Its other document,
openclip_results.csv, has 2.7 % for the pool. Measured: not run.
Differs: open_clip crops by RandomResizedCrop, 90 to 100 % of the area (a short side of 230 pixels
leaves 95 % of a square image), and draws pairs with replacement; here each is seen once an epoch.

clip-jax train --config experiments/datacomp_small_vit_b32.py --workdir runs/datacomp_small_vit_b32
"""

import dataclasses

from ml_collections import ConfigDict

from clip_jax import config as c
from clip_jax.models import presets


def get_config() -> ConfigDict:
  return c.to_config_dict(
    c.Config(
      name="datacomp_small_vit_b32",
      steps=3_125,  # one epoch of 12,800,000 pairs
      log_every_steps=100,
      model=dataclasses.replace(
        presets.VIT_B_32, activation="gelu", scan_layers=True, remat="tuned"
      ),
      preprocess=c.Preprocess(train_short_side=230),
      data=c.Data(
        sources=(c.Source(path="data/datacomp_small"),),
        batch_pairs=4096,
        workers=32,
        prefetch_batches=2,
      ),
      optimizer=c.Optimizer(
        learning_rate=5e-4, warmup_steps=500, weight_decay=0.2, beta2=0.98, epsilon=1e-6
      ),
    )
  )
