"""SigLIP's towers against Hugging Face's, weights carried over by names written out by hand."""

import dataclasses

import pytest
import test_siglip

from tools import golden_siglip


@pytest.mark.filterwarnings("default")  # theirs to keep
@pytest.mark.parametrize("exact_patches", [False, True])
def test_equals_hugging_face(exact_patches):
  image = (
    dataclasses.replace(golden_siglip.TINY.image, resolution=32)
    if exact_patches
    else golden_siglip.TINY.image
  )
  model = dataclasses.replace(golden_siglip.TINY, image=image)
  params = golden_siglip.random_params(model, seed=2)
  inputs = golden_siglip.random_inputs(model, seed=3, batch=5)
  expected = golden_siglip.hugging_face_outputs(model, params, *inputs)
  test_siglip._assert_equal_to(expected, model, params, *inputs)
