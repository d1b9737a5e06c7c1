"""ViT-L/14@336px as published: the ViT-L/14 trained for one more epoch on images of 336 pixels.

Paper: https://arxiv.org/abs/2103.00020, section 2.5, Tables 18 (common) and 20 (this model). What
it leaves open is chosen, with reasons, in experiments/README.md, "The nine published models".
Data: that of experiments/clip_vit_l14.py, kept at 336 pixels or more on the short side.
Weights: those of runs/clip_vit_l14, or whatever --config.init names, OpenAI's ViT-L-14.pt for one;
the image encoder's positions are resized. The moments start anew, as nothing is said of them.
Cost, estimated: 474 EFLOP, 1,672 v5e chip-hours at 40 % of the peak, beside those of ViT-L/14.
Memory (docs/preflight.md): fits v6e:16x16, v4:4x8x8, v5p:4x4x4; v5e:16x16 wants
--config.model.remat=full.
Expected, from the paper's data: ImageNet zero-shot 76.2 % (Table 11). Measured: not run.

clip-jax train --config experiments/clip_vit_l14_336.py --workdir runs/clip_vit_l14_336
"""

import dataclasses

from ml_collections import ConfigDict

from clip_jax import config as c
from clip_jax.models import presets


def get_config() -> ConfigDict:
  return c.to_config_dict(
    c.Config(
      name="clip_vit_l14_336",
      init="runs/clip_vit_l14",
      steps=12_207,  # one epoch of 400 million pairs
      log_every_steps=100,
      model=dataclasses.replace(presets.VIT_L_14_336, scan_layers=True, remat="tuned"),
      data=c.Data(
        sources=(c.Source(path="data/pairs"),), batch_pairs=32_768, workers=32, prefetch_batches=2
      ),
      mesh=c.Mesh(fsdp=16),  # the weights and moments, over a row of a 16x16 slice
      optimizer=c.Optimizer(
        learning_rate=2e-5, warmup_steps=2000, weight_decay=0.2, beta2=0.98, epsilon=1e-6
      ),
    )
  )
