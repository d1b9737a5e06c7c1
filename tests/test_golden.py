"""Our encoders against kept outputs of open_clip's, without torch. SigLIP's: test_siglip.py."""

import json

import jax
import numpy as np
import pytest

from clip_jax.interop import architecture
from clip_jax.models.clip import CLIP
from tools import golden_open_clip


def _check(name, config):
  expected = json.loads(golden_open_clip.PATH.read_text())[name]
  model = architecture.from_open_clip_config(config)
  variables = golden_open_clip.random_variables(model, seed=0)
  image_BE, text_BE, scale = jax.jit(CLIP(model).apply)(variables, *golden_open_clip.inputs(model))
  np.testing.assert_allclose(image_BE, expected["image"], atol=2e-6)
  np.testing.assert_allclose(text_BE, expected["text"], atol=2e-6)
  np.testing.assert_allclose(scale * image_BE @ text_BE.T, expected["logits"], atol=1e-4)


@pytest.mark.parametrize("name", golden_open_clip.CONFIGS)
def test_equals_the_golden_outputs(name):
  _check(name, golden_open_clip.CONFIGS[name])


@pytest.mark.parametrize("name", ["vit_gelu", "resnet"])
def test_the_golden_outputs_tell_the_activations_apart(name):
  config = golden_open_clip.CONFIGS[name]
  with pytest.raises(AssertionError):
    _check(name, {**config, "quick_gelu": not config.get("quick_gelu", False)})
