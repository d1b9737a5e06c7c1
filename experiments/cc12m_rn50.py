"""RN50 on Conceptual 12M.

Settings: open_clip publishes the weights and their accuracy, not how they were trained. Chosen
here: those of its YFCC15M runs (docs/PRETRAINED.md, issue 570), the next larger set of the same
people: eight GPUs of 128 pairs, learning rate 5e-4, weight decay 0.1, 32 epochs, 10,000 steps of
warm-up.
Data: data/cc12m (see experiments/README.md, "Public pairs"); 10,968,539 pairs are those of the copy
pixparse/cc12m-wds. With fewer, lower the steps in proportion.
Cost, estimated: 18.5 EFLOP, 65 v5e chip-hours at 40 % of the peak; ResNets may reach less.
Target: ImageNet zero-shot 36.45 % (open_clip, docs/PRETRAINED.md, verified), for settings that may
be others; in issue 448 a user got about 30 with 10.06 million pairs. Measured: not run.
Differs: open_clip crops by RandomResizedCrop, 90 to 100 % of the area; a short side of 230 pixels
leaves 95 % of a square image.

clip-jax train --config experiments/cc12m_rn50.py --workdir runs/cc12m_rn50
"""

import dataclasses

from ml_collections import ConfigDict

from clip_jax import config as c
from clip_jax.models import presets


def get_config() -> ConfigDict:
  return c.to_config_dict(
    c.Config(
      name="cc12m_rn50",
      steps=342_767,  # 32 epochs of 10,968,539 pairs
      log_every_steps=100,
      model=dataclasses.replace(presets.RN50, scan_layers=True, remat="tuned"),
      preprocess=c.Preprocess(train_short_side=230),
      data=c.Data(
        sources=(c.Source(path="data/cc12m"),), batch_pairs=1024, workers=32, prefetch_batches=2
      ),
      optimizer=c.Optimizer(
        learning_rate=5e-4, warmup_steps=10_000, weight_decay=0.1, beta2=0.999, epsilon=1e-8
      ),
    )
  )
