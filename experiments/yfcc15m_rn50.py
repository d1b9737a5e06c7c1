"""RN50 on YFCC15M: the paper's own ablation, on data that can be had.

Paper: https://arxiv.org/abs/2103.00020, Table 12; openai/CLIP issue 101: batch 2,048, weight decay
0.1, all else mostly as in Table 18, so learning rate 5e-4 and 2,000 steps of warm-up.
Data: data/yfcc15m (see experiments/README.md, "Public pairs"), 14,829,396 pairs. With fewer, lower
the steps in proportion.
Cost, estimated: 25.0 EFLOP, 88 v5e chip-hours at 40 % of the peak; ResNets may reach less.
Target: ImageNet zero-shot 31.3 % (Table 12, verified). Others on the same data: open_clip 32.7
(batch 1,024), SLIP 34.6 (its improved settings). Measured: not run.

clip-jax train --config experiments/yfcc15m_rn50.py --workdir runs/yfcc15m_rn50
"""

import dataclasses

from ml_collections import ConfigDict

from clip_jax import config as c
from clip_jax.models import presets


def get_config() -> ConfigDict:
  return c.to_config_dict(
    c.Config(
      name="yfcc15m_rn50",
      steps=231_709,  # 32 epochs of 14,829,396 pairs
      log_every_steps=100,
      model=dataclasses.replace(presets.RN50, scan_layers=True, remat="tuned"),
      data=c.Data(
        sources=(c.Source(path="data/yfcc15m"),), batch_pairs=2048, workers=32, prefetch_batches=2
      ),
      optimizer=c.Optimizer(
        learning_rate=5e-4, warmup_steps=2000, weight_decay=0.1, beta2=0.999, epsilon=1e-8
      ),
    )
  )
