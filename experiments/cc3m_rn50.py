"""RN50 on Conceptual Captions 3M by open_clip's settings: the cheapest run with a known curve.

Settings: open_clip's README, "Loss Curves", and its issue 448: eight GPUs of 128 pairs, learning
rate 1e-3, weight decay 0.1, 30 epochs, its default warm-up of 10,000 steps.
Data: data/cc3m (see experiments/README.md, "Public pairs"); 2,905,954 pairs are those that the copy
pixparse/cc3m-wds still has. With fewer, lower the steps in proportion.
Cost, estimated: 4.59 EFLOP, 16 v5e chip-hours at 40 % of the peak; ResNets may reach less.
Target: ImageNet zero-shot 19.5 %, read from a plot, so +-0.5; in the same issue a user got 18.5
with 2.81 million pairs. Measured: not run.
Differs: open_clip crops by RandomResizedCrop, 90 to 100 % of the area; a short side of 230 pixels
leaves 95 % of a square image.

clip-jax train --config experiments/cc3m_rn50.py --workdir runs/cc3m_rn50
"""

import dataclasses

from ml_collections import ConfigDict

from clip_jax import config as c
from clip_jax.models import presets


def get_config() -> ConfigDict:
  return c.to_config_dict(
    c.Config(
      name="cc3m_rn50",
      steps=85_135,  # 30 epochs of 2,905,954 pairs
      log_every_steps=100,
      model=dataclasses.replace(presets.RN50, scan_layers=True, remat="tuned"),
      preprocess=c.Preprocess(train_short_side=230),
      data=c.Data(
        sources=(c.Source(path="data/cc3m"),), batch_pairs=1024, workers=32, prefetch_batches=2
      ),
      optimizer=c.Optimizer(
        learning_rate=1e-3, warmup_steps=10_000, weight_decay=0.1, beta2=0.999, epsilon=1e-8
      ),
    )
  )
