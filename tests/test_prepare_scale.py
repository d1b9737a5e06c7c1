"""All of it together: many processes, real kills, duplicates, evaluation sets, a validation split.

The same bytes must come out however the work was shared and whoever was killed.
"""

import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import trees
from PIL import Image

from clip_jax.data import images
from clip_jax.evaluation.overlap import search
from tools import prepare_data

KILLING = pathlib.Path(__file__).with_name("killing_main.py")
FRACTION = 0.3


def _photo(seed: int, size: tuple[int, int] = (120, 90), kind: str = "PNG") -> bytes:
  """Something smooth, as photographs are, unlike that of any other seed."""
  small = np.random.default_rng(seed).integers(0, 256, (7, 7, 3)).astype(np.uint8)
  out = io.BytesIO()
  Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(out, kind)
  return out.getvalue()


def _tars(folder: pathlib.Path) -> dict[str, str]:
  """Five tar files of twelve pairs. Returns what must be left out, and why."""
  left_out = {}
  special = {
    (1, 3): (_photo(2, kind="BMP"), "png", "the same pixels in another file", "duplicate"),
    (2, 5): (_photo(14, (240, 180), "JPEG"), "jpg", "larger, and lossy", "near_duplicate"),
    (2, 6): (_photo(900, (60, 45), "JPEG"), "jpg", "an evaluated image", "in_evaluation_set"),
    (3, 0): (_photo(901), "png", "another evaluated image", "in_evaluation_set"),
    (3, 7): (_photo(800, (300, 60)), "png", "a long one", "aspect"),
    (4, 1): (_photo(801, (50, 40)), "png", "a small one", "too_small"),
    (4, 2): (_photo(802), "png", "ab", "caption_length"),
    (4, 3): (_photo(803)[:-50], "png", "cut short", "truncated"),
  }
  for tar in range(5):
    files: dict[str, bytes | str] = {}
    for i in range(12):
      data, kind, text, reason = special.get(
        (tar, i), (_photo(12 * tar + i), "png", f"picture {i} of {tar}", "")
      )
      files[f"{i:03d}.{kind}"], files[f"{i:03d}.txt"] = data, text
      if reason:
        left_out[f"{tar}.tar sample {i:03d}"] = reason
    trees.tar(folder / f"{tar}.tar", files)
  return left_out


def _evaluation_sets(folder: pathlib.Path) -> None:
  """A folder of images and a prepared folder."""
  trees.write(folder / "images" / "below" / "a.png", _photo(900))
  trees.write(folder / "images" / "notes.txt", "no image")
  table = "image,caption\nb.png,x\n"
  trees.write(folder / "raw" / "b.png", _photo(901, (100, 75)))
  trees.write(folder / "raw.csv", table)
  arguments = [str(folder / "raw"), str(folder / "set"), "--captions", str(folder / "raw.csv")]
  assert prepare_data.main(["folder", *arguments]) == 0


def _command(root: pathlib.Path, dest: str, workers: int) -> list[str]:
  return [
    "pairs", str(root / "tars"), str(root / dest), "--workers", str(workers),
    "--deduplicate", "near", "--validation-fraction", str(FRACTION), "--max-side", "100",
    "--min-side", "41", "--max-aspect", "4", "--min-caption", "3", "--shard-records", "11",
    "--against", str(root / "images"), "--against", f"{root / 'set'}:train",
  ]  # fmt: skip


def _killed(
  root: pathlib.Path, workers: int, when: str, key: str, who: str, name: str
) -> subprocess.CompletedProcess:
  """One run into `root`/killed, in which that happens. No process may outlive it."""
  log = root / f"{when} {name}.log"
  environment = {
    **os.environ, "WHEN": when, "KEY": key, "WHO": who, "SIGNAL": name,
    "ONCE": str(log) + ".once", "LOG": str(log),
  }  # fmt: skip
  command = [sys.executable, str(KILLING), *_command(root, "killed", workers)]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  pids = {line.split()[0] for line in log.read_text().splitlines()}
  assert len(pids) > 1
  deadline = time.monotonic() + 20
  while any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids):
    assert time.monotonic() < deadline, "a worker outlives its parent"
  return done


def _files(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _keys(left_out: dict[str, str]) -> set[str]:
  return {where.replace(".tar sample ", "/") for where in left_out}


def _work(log: pathlib.Path, when: str) -> set[int]:
  """The parts, of eleven pairs each, whose records were worked on."""
  words = (line.split() for line in log.read_text().splitlines())
  places = [key.split("/") for _, what, key in words if what == when]
  return {(12 * int(tar) + int(pair)) // 11 for tar, pair in places}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  root = tmp_path_factory.mktemp("scale")
  left_out = _tars(root / "tars")
  _evaluation_sets(root)
  assert prepare_data.main(_command(root, "whole", 1)) == 0
  return root, left_out


def test_every_pair_is_kept_or_named_with_its_cause(prepared):
  root, left_out = prepared
  manifest = trees.read_manifest(root / "whole")
  assert trees.read_rejected(root / "whole") == left_out
  assert (manifest["inputs"], manifest["kept"]) == (60, 52)
  lines = map(json.loads, (root / "whole" / "rejected.jsonl").read_text().splitlines())
  said = {line["key"]: line["detail"] for line in lines}
  assert said["1.tar sample 003"] == "the same pixels as 0.tar sample 002"
  assert said["2.tar sample 005"] == "much like 1.tar sample 002"
  assert said["2.tar sample 006"] == f"much like {root / 'images' / 'below' / 'a.png'}"
  assert "set/train-00000-of-00001.array_record record 0" in said["3.tar sample 000"]
  made = [r for split in ("train", "validation") for r in trees.read_all(root / "whole", split)]
  keys = {f"{tar}/{i:03d}" for tar in range(5) for i in range(12)}
  assert {r.key for r in made} == keys - _keys(left_out)
  assert {images.decode(r.image).size for r in made} == {(100, 75)}
  for split, entry in manifest["splits"].items():
    *full, last = [shard["records"] for shard in entry["shards"]]
    assert full == [11] * len(full)
    assert sum(full) + last == len(trees.read_all(root / "whole", split)) == entry["records"]


def test_the_side_of_an_image_is_its_own(prepared):
  """Oracle: the first 64 bits of the sha256 of size and pixels, as a share of all."""
  root, left_out = prepared
  held_out = set()
  for number in range(60):
    image = images.decode(_photo(number))
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode() + image.tobytes()).digest()
    if int.from_bytes(digest[:8]) / 2**64 < FRACTION:
      held_out.add(f"{number // 12}/{number % 12:03d}")
  found = [r.key for r in trees.read_all(root / "whole", "validation")]
  assert found == sorted(held_out - _keys(left_out))
  assert 5 < len(found) < 30


def test_the_near_duplicates_of_this_file_are_near_and_the_others_far():
  """What the other tests stand on."""
  hashes = [search.perceptual_hash(_photo(n)) for n in [*range(60), 900, 901]]
  alike = search.perceptual_hash(_photo(14, (240, 180), "JPEG"))
  assert (alike ^ hashes[14]).bit_count() <= 6
  far = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
  assert min(far) > 6


def test_the_same_bytes_whoever_is_killed(prepared):
  """SIGKILL of all while looking, SIGTERM while writing, SIGKILL of a worker; 2 and 3 workers."""
  root, _ = prepared
  first = _killed(root, 2, "look", "3/004", "parent", "SIGKILL")
  assert first.returncode == -9
  assert not (root / "killed" / "manifest.json").exists()
  second = _killed(root, 3, "write", "2/001", "parent", "SIGTERM")
  assert second.returncode == 143
  assert second.stderr.splitlines()[-1] == "error: terminated; the same command goes on from here"
  log = root / "write SIGTERM.log"
  assert 3 in _work(log, "look")
  # of the parts before 3, one worker had done two at least when it came to 3 and was killed
  assert len({0, 1, 2} & _work(log, "look")) <= 1
  assert not (root / "killed" / "manifest.json").exists()
  for path in (root / "killed").rglob("*.array_record"):  # or one could be all that is left to do
    path.unlink()
  third = _killed(root, 2, "write", "2/001", "self", "SIGKILL")
  assert third.returncode == 0, third.stderr
  assert "was killed by SIGKILL at " in third.stderr
  assert not _work(root / "write SIGKILL.log", "look")
  assert _files(root / "killed") == _files(root / "whole")
