"""Tar files of pairs become records; nothing in them is followed, nothing bad goes unnamed."""

import functools
import io
import pathlib
import tarfile

import pytest
import rich.progress
import trees

from clip_jax.data import images, records
from tools import prepare_data
from tools.prepare import jobs, shards


def _prepare(folder: pathlib.Path, *options: str) -> int:
  places = [str(folder / "tars"), str(folder / "out")]
  return prepare_data.main(["webdataset", *places, "--workers", "1", *options])


def test_pairs_become_records_one_shard_a_tar_file(tmp_path, capsys):
  trees.tar(tmp_path / "tars" / "00001.tar", trees.pair(10) | {"__key__.txt": "no image"})
  middle = {"sub/1.PNG": trees.png(1), "sub/1.txt": "  a\tpicture \n"}
  files = trees.pair(0) | middle | trees.pair(2)
  trees.tar(tmp_path / "tars" / "00000.tar", files)
  trees.write(tmp_path / "tars" / "00000.parquet", "not a tar file")
  assert _prepare(tmp_path) == 0
  made = trees.read_all(tmp_path / "out", "train")
  assert [(r.key, r.captions, r.label) for r in made] == [
    ("00000/000000000", ("picture 0",), None),
    ("00000/sub/1", ("a picture",), None),
    ("00000/000000002", ("picture 2",), None),
    ("00001/000000010", ("picture 10",), None),
  ]
  assert made[1].image == trees.png(1)
  manifest = trees.read_manifest(tmp_path / "out")
  assert [s["records"] for s in manifest["splits"]["train"]["shards"]] == [3, 1]
  assert trees.read_rejected(tmp_path / "out") == {"00001/__key__": "no_image"}
  assert "5 inputs = 4 kept + 1 left out" in capsys.readouterr().out
  assert _prepare(tmp_path) == 0
  assert "already there" in capsys.readouterr().out
  trees.tar(tmp_path / "tars" / "00001.tar", trees.pair(11) | trees.pair(12))
  assert _prepare(tmp_path) == 0
  assert [r.key for r in trees.read_all(tmp_path / "out", "train")][-1] == "00001/000000012"


def test_a_tar_file_without_a_good_pair_makes_an_empty_shard(tmp_path):
  for i, files in enumerate((trees.pair(0), {"a.txt": "no image"}, {}, trees.pair(3))):
    trees.tar(tmp_path / "tars" / f"{i}.tar", files)
  assert _prepare(tmp_path) == 0
  assert [r.captions for r in trees.read_all(tmp_path / "out", "train")] == [
    ("picture 0",),
    ("picture 3",),
  ]
  manifest = trees.read_manifest(tmp_path / "out")
  assert [s["records"] for s in manifest["splits"]["train"]["shards"]] == [1, 0, 0, 1]


def test_every_bad_pair_is_named_and_nothing_is_followed(tmp_path, monkeypatch):
  monkeypatch.setattr(images, "MAX_BYTES", 5_000)
  secret = tmp_path / "secret.png"
  trees.write(secret, trees.png(9))
  picture, caption = trees.png(1), "a picture"
  files = {
    "symbolic.png": trees.special("symbolic.png", tarfile.SYMTYPE, str(secret)),
    "symbolic.txt": caption,
    "hard.png": trees.special("hard.png", tarfile.LNKTYPE, "good.png"),
    "hard.txt": caption,
    "device.png": trees.special("device.png", tarfile.CHRTYPE),
    "device.txt": caption,
    "pipe.png": picture,
    "pipe.txt": trees.special("pipe.txt", tarfile.FIFOTYPE),
    "text_only.txt": caption,
    "other.tiff": picture,
    "silent.png": picture,
    "empty.png": picture,
    "empty.txt": " \n",
    "latin.png": picture,
    "latin.txt": "größe".encode("latin-1"),
    "page.png": b"<html>404</html>",
    "page.txt": caption,
    "cut.png": picture[:-40],
    "cut.txt": caption,
    "large.png": bytes(5_001),
    "large.txt": caption,
    "long.png": picture,
    "long.txt": "a" * 1_000_001,
    "../../up.png": picture,
    "/etc/good.png": picture,
    "/etc/good.txt": "a name is no path here",
  }
  path = trees.tar(tmp_path / "tars" / "0.tar", files)
  with tarfile.open(path, "a") as archive:  # two pictures of one name
    for _ in range(2):
      info = tarfile.TarInfo("twice.png")
      info.size = len(picture)
      archive.addfile(info, io.BytesIO(picture))
    archive.addfile(trees.special("twice.txt", tarfile.REGTYPE))
  assert _prepare(tmp_path) == 0
  assert trees.read_rejected(tmp_path / "out") == {
    "0/symbolic": "not_a_file",
    "0/hard": "not_a_file",
    "0/device": "not_a_file",
    "0/pipe": "not_a_file",
    "0/text_only": "no_image",
    "0/other": "no_image",
    "0/silent": "no_caption",
    "0/empty": "empty_caption",
    "0/latin": "encoding",
    "0/page": "unreadable",
    "0/cut": "truncated",
    "0/large": "too_large",
    "0/long": "too_large",
    "0/../../up": "no_caption",
    "0/twice": "repeated",
  }
  (record,) = trees.read_all(tmp_path / "out", "train")
  assert record.captions == ("a name is no path here",)
  assert {p.name for p in tmp_path.iterdir()} == {"secret.png", "tars", "out"}


def test_mistakes_end_in_a_line_that_helps(tmp_path, capsys):
  assert _prepare(tmp_path) == 2
  assert "no such folder of tar files" in capsys.readouterr().err
  (tmp_path / "tars").mkdir()
  assert _prepare(tmp_path) == 2
  assert "no file in it whose name ends in .tar" in capsys.readouterr().err
  trees.tar(tmp_path / "tars" / "0.tar", trees.pair(0))
  packed = tmp_path / "tars" / "1.tar"
  with tarfile.open(packed, "w:gz") as archive:
    archive.addfile(trees.special("a.jpg", tarfile.REGTYPE))
  assert _prepare(tmp_path) == 2
  assert "1.tar: cut short" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
  packed.write_bytes(packed.read_bytes().ljust(4096, b"\0"))
  assert _prepare(tmp_path) == 2
  assert "no tar header at byte 0 (is it compressed?)" in capsys.readouterr().err
  packed.unlink()
  assert _prepare(tmp_path) == 0


class _Killed(BaseException):
  """Stands for a kill: no handler of the program sees it."""


def test_a_killed_run_reads_no_finished_part_again(tmp_path):
  read: list[int] = []

  def part(i: int, stop: bool) -> list[jobs.Item]:
    read.append(i)
    if stop and i == 2:
      raise _Killed
    record = records.Record(f"{i}", trees.png(i), ("a picture",))
    return [jobs.Item(f"{i}", ("train",), lambda: record)]

  def job(stop: bool) -> jobs.Job:
    plan = jobs.Plan(parts=[functools.partial(part, i, stop) for i in range(4)])
    return jobs.Job("drill", "", "", {}, {}, lambda progress: plan)

  with rich.progress.Progress(disable=True) as progress:
    with pytest.raises(_Killed):
      shards.write(job(stop=True), tmp_path, 0, progress)
    assert not (tmp_path / "manifest.json").exists()
    shards.write(job(stop=False), tmp_path, 0, progress)
  assert read == [0, 1, 2, 2, 3]
  assert [r.key for r in trees.read_all(tmp_path, "train")] == ["0", "1", "2", "3"]
