"""TFDS's `mock_data` of its own builders through our reader. It makes examples with TensorFlow."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
import test_tfds_builders
import tfds_trees
import trees

from clip_jax.data import images, records
from clip_jax.evaluation import opening, prompts

pytestmark = pytest.mark.filterwarnings("default")  # theirs to keep
# mock_data's own features refuse what it draws for them: boxes that end before they begin, and of
# the things in one image another number by each of their properties.
REFUSED = ("Stanford Cars", "VOC2007", "Oxford Pets", "KITTI", "CLEVR", "MSCOCO captions")
MOCKED = [d for d in test_tfds_builders.ALL if d.key not in REFUSED]


@pytest.mark.parametrize("dataset", MOCKED, ids=lambda d: d.key)
def test_mocked_examples_are_read(tmp_path, dataset, monkeypatch):
  """The folder tells splits and features; what its records hold is up to TFDS."""
  builder = test_tfds_builders.builder_of(dataset, tmp_path / "none", monkeypatch)
  features, split = builder.info.features, dataset.tfds_test.split("+")[0]
  some = [test_tfds_builders.made_up(features, number) for number in range(3)]
  place = tfds_trees.write(tmp_path, dataset.tfds, features, {split: some})
  own = prompts.named(dataset.prompts).classes if dataset.prompts else ()
  own = tuple(own[k] for k in dataset.imagenet_indices) or own
  with tfds.testing.mock_data(num_examples=3, data_dir=str(place)):
    copy = opening.open_dataset(dataset, "test", [tmp_path], own)
    for i in range(3):
      try:
        record = copy.source[i]
      except records.RecordError as error:  # one of ImageNet's classes that the data set lacks
        if dataset.rule in ("synset_a", "synset_r") and "is none of the classes" in str(error):
          continue
        raise
      assert record.image not in [trees.png(number) for number in range(3)]
      assert np.asarray(images.as_image(record.image)).shape[2] == 3
      assert record.label in copy.classes
