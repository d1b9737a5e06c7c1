"""The contact sheet and the figures of a manifest: what was drawn, what was counted."""

import hashlib

import numpy as np
import parsed_page
import rich.progress
import trees

from clip_jax.data import images, records
from tools.prepare import jobs, shard_file, shards, sheet

HOSTILE = parsed_page.EVIL.replace("\ud800", "").replace("\0", "") + " מימין לשמאל"


def _job(count: int) -> jobs.Job:
  def load(i: int) -> records.Record:
    size = (10 + 3 * (i % 40), 20 + 5 * (i % 20))
    return records.Record(f"key {i:04d}", trees.png(i, size), (f"{HOSTILE} {'x' * i}",))

  items = [
    jobs.Item(f"key {i:04d}", ("test" if i % 50 == 7 else "train",), lambda i=i: load(i))
    for i in range(count)
  ]
  return jobs.Job("drill", HOSTILE, "", {}, {}, lambda progress: jobs.Plan(items))


def test_a_page_of_a_hundred_pairs_of_each_split_whatever_the_shards(tmp_path):
  texts, manifests = [], []
  for size in (40, 7):
    with rich.progress.Progress(disable=True) as progress:
      manifests.append(shards.write(_job(160), tmp_path / str(size), size, progress))
    texts.append((tmp_path / str(size) / sheet.NAME).read_text())
  assert texts[0] == texts[1]
  page = parsed_page.Page(texts[0])
  train = [f"key {i:04d}" for i in range(160) if i % 50 != 7]
  first = sorted(train, key=lambda key: hashlib.sha256(key.encode()).digest())[: shard_file.SHOWN]
  shown = [word for word in train if word in page.text]
  assert shown == sorted(first)
  assert page.text.index(first[0]) < page.text.index(first[-1])  # not in the data's order
  assert page.tags.count("img") == 100 + 4
  assert "script" not in page.tags
  assert "<script>alert('x')</script>" in page.text  # as text
  assert all(value.startswith("data:") for _, name, value in page.attributes if name == "src")
  assert (
    manifests[0]["splits"]["train"]["histograms"] == (manifests[1]["splits"]["train"]["histograms"])
  )


def test_histograms_are_those_of_numpy(tmp_path):
  with rich.progress.Progress(disable=True) as progress:
    manifest = shards.write(_job(60), tmp_path, 25, progress)
  made = trees.read_all(tmp_path, "train")
  sizes = [images.decode(record.image).size for record in made]
  values = {
    "caption_characters": [len(c) for record in made for c in record.captions],
    "shorter_side": [min(size) for size in sizes],
    "longer_side": [max(size) for size in sizes],
  }
  for name, found in manifest["splits"]["train"]["histograms"].items():
    wanted, _ = np.histogram(values[name], [*found["edges"], np.inf])
    assert found["counts"] == wanted.tolist()
    assert sum(found["counts"]) == len(values[name]) == 58
    assert np.count_nonzero(found["counts"]) > 1
