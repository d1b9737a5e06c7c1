"""A model and a source whose right answers are known, for the tests of the evaluations."""

import numpy as np

from clip_jax.data import images as images_lib
from clip_jax.data.records import Record

SIDE = 8  # pixels


def unit(rows):
  rows = np.asarray(rows, np.float64)
  return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def picture(number):
  """An image that says which one it is: `number` in its red and green."""
  image = np.full((SIDE, SIDE, 3), 128, np.uint8)
  image[..., 0], image[..., 1] = number % 256, number // 256
  return image


class KnownModel:
  """Embeds picture(i) as row i of `images` and a text as its entry in `texts`.

  Insists on chunks of exactly `batch`, as a jitted encoder that compiles once would like.
  """

  def __init__(self, images, texts, batch, logit_scale=10.0):
    self.images, self.texts, self.batch = np.asarray(images, np.float32), texts, batch
    self.logit_scale = logit_scale
    self.seen_texts = []

  def fit(self, image):
    return images_lib.fit(images_lib.as_image(image), SIDE)

  def encode_image(self, images):
    assert images.shape == (self.batch, SIDE, SIDE, 3)
    assert images.dtype == np.uint8
    return self.images[[int(i[0, 0, 0]) + 256 * int(i[0, 0, 1]) for i in images]]

  def tokens(self, texts, truncate=False):
    del truncate
    return texts

  def encode_text(self, texts, truncate=False):
    del truncate
    assert len(texts) == self.batch
    self.seen_texts.extend(texts)
    return np.array([self.texts[text] for text in texts], np.float32)


class Source:
  """Records in a list; an exception in it is raised when its record is read."""

  fingerprint = "0" * 64

  def __init__(self, records):
    self.records = records

  def __len__(self):
    return len(self.records)

  def __getitem__(self, index):
    if isinstance(self.records[index], Exception):
      raise self.records[index]
    return self.records[index]

  def locate(self, index):
    return f"shard-7, record {index}"


def labelled(labels):
  return Source([Record(f"key{i}", picture(i), (), label) for i, label in enumerate(labels)])


def captioned(captions):
  return Source([Record(f"key{i}", picture(i), tuple(own)) for i, own in enumerate(captions)])
