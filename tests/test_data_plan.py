"""The plan for billions of pairs: its arithmetic by hand, and what it takes for granted."""

import pathlib

import grain
import numpy as np
import pytest

from tools import data_costs, data_plan

DOCS = pathlib.Path(__file__).parents[1] / "docs"
DOCUMENT = {
  "sources": {
    "index of 9,000 members, seconds": 9.0,
    "  of one core": 0.9,
    "  bytes a pair": 50.0,
    "  opened again, milliseconds": 1.0,
    "  a row read from it, microseconds": 20.0,
    "start of an epoch over 1,000,000 records, seconds": 0.5,
    "  of which opening": 0.4,
    "  memory at its peak, MB": 301.0,
    "  of which before": 300.0,
    "tar: memory after 10 epochs, MB": 200.0,
    "  tar, grown since the second, MB": 1.0,
    "processor": "a slow one, 2 cores",
  },
  "prepare": {
    "pairs_a_second": {"look, near duplicates": 250.0, "write in one pass": 100.0},
    "near_duplicates": {"hashes": 1000, "left_out": 3, "seconds": 0.5, "bytes_an_image": 80.0},
  },
  "images": {"bytes an image": 100_000, "images a second, loader": 400, "ratio": "2.70"},
}
WANTED = data_costs.Wanted(
  pairs=36_000_000, hosts=10, cores=4, workers=3, rates=(8000.0,), shard_pairs=(10_000, 7_000)
)


def test_a_pair_in_a_tar_file_is_whole_blocks():
  # 196 blocks of image, 1 of text, 1 of JSON, 3 headers
  assert data_costs.pair_bytes(100_000) == 201 * 512
  assert data_costs.pair_bytes(512) == 6 * 512
  assert data_costs.pair_bytes(513) == 7 * 512


def test_what_one_record_takes():
  own = data_costs.measured(DOCUMENT)
  assert own.member_seconds == pytest.approx(1e-4)  # 0.9 s for 9,000
  assert own.shard_seconds == pytest.approx(0.005)  # 0.5 s for 100 shards
  assert own.shard_bytes == pytest.approx(10_000)  # 1 MB for 100 shards
  with pytest.raises(KeyError, match="members"):
    data_costs.measured({**DOCUMENT, "sources": {}})


def test_shards_and_a_start():
  own = data_costs.measured(DOCUMENT)
  assert data_costs.layout(own, WANTED, 10_000) == pytest.approx({
    "shards": 3600, "shard_bytes": 1_029_120_000, "start_seconds": 18.0,
    "process_bytes": 36e6, "host_bytes": 144e6,
  })  # fmt: skip
  assert data_costs.layout(own, WANTED, 7_000)["shards"] == 5143  # 5142.9


def test_what_is_paid_once():
  assert data_costs.once(data_costs.measured(DOCUMENT), WANTED) == pytest.approx({
    "disk_bytes": 36e6 * 102_912, "index_bytes": 1.8e9,
    "index_core_hours": 3.0, "index_hours": 0.3,  # 108 million members, 10 hosts
    "search_bytes": 2.88e9,
    "look, near duplicates: core-hours": 40.0, "look, near duplicates: hours": 1.0,
    "write in one pass: core-hours": 100.0, "write in one pass: hours": 2.5,
  })  # fmt: skip


def test_what_training_takes_all_the_time():
  assert data_costs.flow(data_costs.measured(DOCUMENT), WANTED, 8000.0) == pytest.approx({
    "rate": 8000.0, "epoch_hours": 1.25,
    "bytes_a_second": 8000 * 102_912, "host_bytes_a_second": 800 * 102_912,
    "host_requests_a_second": 800.0,
    "host_cores": 2.016,  # 20 for the crops and 0.16 for the index, of 10 hosts
    "host_share": 0.504,
  })  # fmt: skip


def test_the_page_says_what_was_not_measured():
  text = data_plan.page(DOCUMENT, WANTED)
  assert "a slow one, 2 cores" in text
  assert "3,600" in text
  assert "## Not measured" in text
  assert "object store" in text.partition("## Not measured")[2]


def test_the_kept_page_is_what_the_kept_figures_make(tmp_path):
  (tmp_path / "data_at_scale.json").write_text((DOCS / "data_at_scale.json").read_text())
  data_plan.main(["--folder", str(tmp_path)])
  kept = (DOCS / "data_at_scale.md").read_text()
  assert (tmp_path / "data_at_scale.md").read_text() == kept


def test_five_billion_records_are_shuffled_without_a_repetition():
  """More than 32 bits count. Of a draw with repetitions 9 were expected among so many."""
  count, rng = 5_000_000_000, np.random.default_rng(0)
  asked = np.unique(rng.integers(0, count, 300_000)).tolist()
  shuffled = grain.MapDataset.range(count).seed(1).shuffle()
  found = {int(shuffled[i]) for i in asked}
  assert len(found) == len(asked)
  assert min(found) >= 0
  assert 2**32 < max(found) < count
