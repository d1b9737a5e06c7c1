"""Models of published sizes, weights and BatchNorm statistics at random, against open_clip's."""

import jax
import numpy as np
import pytest
import test_weights
import torch

from clip_jax import config as c
from clip_jax import inference
from clip_jax.interop import architecture, naming, weights
from clip_jax.models import presets

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12}
VIT = {"embed_dim": 512, "text_cfg": TEXT, "quick_gelu": True}
CONFIGS = {
  "ViT-B/16": {**VIT, "vision_cfg": {"image_size": 224, "patch_size": 16, "width": 768}},
  "RN50": {
    "embed_dim": 1024,
    "text_cfg": TEXT,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64},
  },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_open_clip(name):
  theirs = test_weights.randomised(CONFIGS[name])
  model = architecture.from_open_clip_config(CONFIGS[name])
  assert model == presets.PUBLISHED[name]
  variables = weights.to_ours(test_weights._arrays(theirs), naming.openai(model), model)
  variables = jax.tree.map(jax.numpy.asarray, variables)
  ours = inference.Clip(
    c.Config(model=model), variables["params"], None, batch_stats=variables.get("batch_stats")
  )
  image_BRR3, tokens_BL = test_weights._inputs(model, 3)
  with torch.no_grad():
    image = torch.tensor(image_BRR3).permute(0, 3, 1, 2)
    expected = [x.numpy() for x in theirs(image, torch.tensor(tokens_BL).long())]
  image_BE, text_BE = ours.encode_image(image_BRR3), ours.encode_text(tokens_BL)
  logits_BB = ours.logit_scale * image_BE @ text_BE.T
  theirs_BB = expected[2] * expected[0] @ expected[1].T
  pairs = {"image": (image_BE, expected[0]), "text": (text_BE, expected[1])}
  for part, (a, b) in {**pairs, "logits": (logits_BB, theirs_BB)}.items():
    difference = np.abs(a - b).max()
    print(name, part, f"{difference:.1e}")
    assert difference < (1e-4 if part == "logits" else 1e-5), part
