"""The table of slices: the search against a compiler whose memory is known, and the kept page."""

import dataclasses
import json
import types

import pytest

from clip_jax import preflight
from tools import preflight_attempts as search
from tools import preflight_goals as goals
from tools import preflight_table as tool

GIB = 2**30


@pytest.fixture
def compiler(monkeypatch, tmp_path):
  """Memory: 1 GiB of state, and `per_pair` for each pair that a chip has at a time."""
  asked, memory = [], types.SimpleNamespace(per_pair=0.0)

  def devices(topology):
    kinds = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v4": "TPU v4", "v6e": "TPU v6 lite"}
    device = types.SimpleNamespace(device_kind=kinds[topology.split(":")[0]])
    return [device] * search.chips(topology)

  def report(config, devices):
    asked.append((len(devices), config.model.remat, config.microbatches))
    save = {"tuned": 1, "full": 0.6}[config.model.remat]
    pairs = config.data.batch_pairs / len(devices) / config.microbatches
    used = GIB + memory.per_pair * save * pairs
    capacity = search.chips_lib.find(devices[0].device_kind).hbm_bytes
    if used > capacity:
      raise preflight.DoesNotFit(used, capacity)
    zeros = {f.name: 0 for f in dataclasses.fields(preflight.Report)} | {"collectives": ()}
    found = {"peak_bytes": int(used), "argument_bytes": GIB, "capacity_bytes": capacity}
    counts = {"chips": len(devices), "batch_pairs": config.data.batch_pairs}
    seconds = {"compute_seconds": 64 / len(devices), "step_seconds": 64 / len(devices)}
    return preflight.Report(**zeros | found | counts | seconds)

  monkeypatch.setattr(search, "FOLDER", tmp_path)
  monkeypatch.setattr(search, "devices", devices)
  monkeypatch.setattr(preflight, "report", report)
  memory.asked = asked
  return memory


@pytest.mark.parametrize("generation", search.GENERATIONS)
@pytest.mark.parametrize("share", [0.02, 0.2, 0.9])
def test_the_smallest_slice_is_found(compiler, generation, share):
  """`share` of the memory of 256 v5e chips."""
  compiler.per_pair = share * 14.75 * GIB / 128
  attempts = search.Attempts("clip_vit_b16")
  search.search_one_pass(attempts, generation)
  found = search.smallest(search.Attempts("clip_vit_b16"), generation, parts=False)
  capacity = found["capacity_bytes"]
  needed = compiler.per_pair * 0.6 * search.BATCH / (capacity - GIB)
  shapes = [search.chips(f"{generation}:{shape}") for shape in search.SLICES[generation]]
  assert found["chips"] == min(chips for chips in shapes if chips >= needed)
  assert len(compiler.asked) <= 7


def test_nothing_is_compiled_twice_and_nothing_lost(compiler):
  compiler.per_pair = GIB / 20
  for _ in range(2):
    attempts = search.Attempts("clip_vit_b16")
    search.search_one_pass(attempts, "v5e")
    search.search_in_parts(attempts, "v5e")
  assert len(compiler.asked) == len(set(compiler.asked)) == len(attempts.all)
  assert any(not attempt["fits"] for attempt in attempts.all)
  found = search.smallest(attempts, "v5e", parts=True)
  assert (found["chips"], found["options"].split()[-1]) == (1, "microbatches=256")


def test_an_attempt_made_again_takes_the_place_of_the_first(compiler):
  attempts = search.Attempts("clip_vit_b16")
  compiler.per_pair = GIB / 20
  for topology in ("v5e:8x16", "v5e:16x16"):
    attempts.make(topology, "model.remat=tuned mesh.fsdp=1")
  compiler.per_pair = GIB / 40
  words = "model.remat=tuned mesh.fsdp=1"
  new = search.Attempts("clip_vit_b16").make("v5e:8x16", words, again=True)
  kept = search.Attempts("clip_vit_b16").all
  assert [a["topology"] for a in kept] == ["v5e:8x16", "v5e:16x16"]
  assert kept[0]["peak_bytes"] == new["peak_bytes"] < attempts.all[0]["peak_bytes"]
  assert ("v5e:8x16", "model.remat=tuned mesh.fsdp=1") in tool.shown("clip_vit_b16")


def test_what_fits_nowhere_is_said(compiler):
  compiler.per_pair = 100 * GIB
  attempts = search.Attempts("clip_rn50x64")
  search.search_one_pass(attempts, "v5e")
  assert search.smallest(attempts, "v5e", parts=False) is None
  tables = list(tool.table(dict.fromkeys(search.MODELS, attempts), parts=False))
  assert "| RN50 | v5e | none to 1,024 chips | | | | | | | | |" in tables
  assert "| RN50 | v6e | not measured yet | | | | | | | | |" in tables


@pytest.mark.parametrize(("pairs_gib", "wanted"), [(0.05, ["v5e"]), (0.7, ["v5e"] * 2 + ["v5p"])])
def test_a_model_on_256_chips(compiler, pairs_gib, wanted):
  """128 pairs a chip: 7 GiB, or 91 (55 with full), which of these chips v5p alone has."""
  compiler.per_pair = pairs_gib * GIB
  attempts = search.Attempts("clip_vit_b16")
  for generation in search.GENERATIONS:
    search.search_one_pass(attempts, generation)
  found = search.on_256_chips(attempts)
  assert [a["topology"].split(":")[0] for a in found] == wanted
  assert [a["fits"] for a in found] == [False] * (len(wanted) - 1) + [True]
  assert all(search.chips(a["topology"]) == 256 for a in found)


def test_a_row_by_hand(compiler):
  compiler.per_pair = GIB / 20
  attempt = search.Attempts("clip_vit_b16").make("v5e:8x16", "model.remat=tuned mesh.fsdp=1")
  # half a second a step: 390,625 / 2 / 3600 hours, on 128 chips
  assert tool.row("B", "v5e", attempt) == (
    "| B | v5e | 8x16 (128) | 256 x 1 | tuned | 1 | 13.8 of 15.75 | 0.50 | 0.50 (compute) | 54 | "
    "6,944 |"
  )


def test_the_page_is_what_the_reports_say():
  assert tool.PAGE.read_text() == tool.page()


def test_the_reports_are_of_the_experiments():
  for path in search.FOLDER.glob("*.json"):
    kept = json.loads(path.read_text())
    assert kept["experiment"] == path.stem
    assert kept["experiment"] in search.MODELS
    for attempt in kept["attempts"]:
      assert search.config_of(path.stem, attempt["options"]).name == path.stem
      assert not attempt["fits"] or attempt["chips"] == search.chips(attempt["topology"])


def test_what_was_to_be_reached():
  """Over the kept reports. RN50x16's compile time misses its goal, and the page says so."""
  kept = {experiment: search.Attempts(experiment) for experiment in search.MODELS}
  large = goals.find(kept, "clip_vit_l14", "v5e:16x16", "model.remat=tuned mesh.fsdp=16")
  assert large["peak_bytes"] < 14e9
  assert large["argument_bytes"] < large["evaluation_bytes"] < 14e9
  assert not goals.find(kept, "clip_vit_l14", "v5e:16x16", "model.remat=dots")["fits"]
  million = goals.million(kept)
  assert (million["batch_pairs"], million["chips"]) == (2**20, 256)
  assert goals.ring_bytes() < 1e9
  plain, tuned = goals.without_remat(kept), goals.tuned(kept)
  assert len(plain) == 4
  assert max(plain.values()) <= 1.05
  assert len(tuned) >= 7
  assert max(tuned.values()) <= 1.35
  late = {e for e, s in goals.compile_seconds(kept).items() if s > goals.COMPILE_SECONDS}
  assert late <= {"clip_rn50x16"}
