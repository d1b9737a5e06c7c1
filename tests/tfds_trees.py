"""Data sets as TFDS writes them, made without their downloads and without TensorFlow."""

import io

import numpy as np
import tensorflow_datasets as tfds


def write(root, name, features, splits, file_format="array_record"):
  """`name`: "voc/2007"; `features`: those of `tfds.features`; `splits`: their examples."""
  own, _, config = name.partition("/")

  class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config, version="1.0.0")] if config else []

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(made) for split, made in splits.items()}

    def _generate_examples(self, made):
      yield from ((f"{i:03d}", example) for i, example in enumerate(made))

  Made.name = own
  builder = Made(data_dir=root, file_format=file_format)
  builder.download_and_prepare(file_format=file_format)
  return root / name / "1.0.0"


def classes(names):
  """The features of most of them: an image and its class; and a mask, as the pets have."""
  features = tfds.features
  label = features.ClassLabel(names=list(names))
  image, mask = features.Image(), features.Image(shape=(None, None, 1))
  return features.FeaturesDict({"image": image, "label": label, "segmentation_mask": mask})


def kitti():
  features = tfds.features
  kinds = ["Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc"]
  place = features.Tensor(shape=(3,), dtype=np.float32)
  things = {"type": features.ClassLabel(names=kinds), "location": place}
  return features.FeaturesDict(
    {
      "image": features.Image(),
      "image/file_name": features.Text(),
      "objects": features.Sequence(things),
    }
  )


def clevr():
  features = tfds.features
  things = features.Sequence({"color": features.ClassLabel(names=["gray", "red"])})
  return features.FeaturesDict(
    {"file_name": features.Text(), "image": features.Image(), "objects": things}
  )


def voc(names):
  features = tfds.features
  label = features.Sequence(features.ClassLabel(names=list(names)))
  both = {"labels": label, "labels_no_difficult": label}
  return features.FeaturesDict({"image": features.Image(), **both})


def captions():
  features = tfds.features
  texts = features.Sequence({"id": np.int64, "text": features.Text()})
  return features.FeaturesDict(
    {"image": features.Image(), "image/filename": features.Text(), "captions": texts}
  )


def file(data):
  """An encoded image, as TFDS takes it without decoding."""
  return io.BytesIO(data)
