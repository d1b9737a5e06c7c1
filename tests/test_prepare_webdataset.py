"""Tar files of pairs become records; nothing in them is followed, nothing bad goes unnamed."""

import functools
import io
import json
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
  return prepare_data.main(["pairs", *places, "--workers", "1", *options])


def test_pairs_become_records(tmp_path, capsys):
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
  assert trees.read_manifest(tmp_path / "out")["inputs"] == 5
  assert trees.read_rejected(tmp_path / "out") == {"00001.tar sample __key__": "no_image"}
  assert "5 inputs = 4 kept + 1 left out" in capsys.readouterr().out
  assert _prepare(tmp_path) == 0
  assert "already there" in capsys.readouterr().out
  trees.tar(tmp_path / "tars" / "00001.tar", trees.pair(11) | trees.pair(12))
  assert _prepare(tmp_path, "--force") == 0
  assert [r.key for r in trees.read_all(tmp_path / "out", "train")][-1] == "00001/000000012"


def test_captions_of_json_where_there_is_no_txt(tmp_path):
  said = [{"caption": "one"}, {"caption": ["two", "three"], "alt": "two"}, {"alt": "four"}]
  files = {}
  for i, fields in enumerate(said):
    files |= {f"{i}.png": trees.png(i), f"{i}.json": json.dumps(fields)}
  trees.tar(tmp_path / "tars" / "0.tar", files | {"3.png": trees.png(3), "3.txt": "five"})
  assert _prepare(tmp_path) == 0
  captions = [r.captions for r in trees.read_all(tmp_path / "out", "train")]
  assert captions == [("one",), ("two", "three"), ("five",)]
  assert trees.read_rejected(tmp_path / "out") == {"0.tar sample 2": "columns"}
  assert _prepare(tmp_path, "--caption-column", "alt", "--force") == 0
  assert [r.captions for r in trees.read_all(tmp_path / "out", "train")] == [("two",), ("four",)]
  assert trees.read_rejected(tmp_path / "out") == {
    "0.tar sample 0": "columns",
    "0.tar sample 3": "no_caption",
  }


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
    "0.tar sample symbolic": "not_a_file",
    "0.tar sample hard": "not_a_file",
    "0.tar sample device": "not_a_file",
    "0.tar sample pipe": "not_a_file",
    "0.tar sample text_only": "no_image",
    "0.tar sample other": "no_image",
    "0.tar sample silent": "no_caption",
    "0.tar sample empty": "empty_caption",
    "0.tar sample latin": "encoding",
    "0.tar sample page": "unreadable",
    "0.tar sample cut": "truncated",
    "0.tar sample large": "too_large",
    "0.tar sample long": "too_large",
    "0.tar sample ../../up": "no_caption",
    "0.tar sample twice": "repeated",
  }
  (record,) = trees.read_all(tmp_path / "out", "train")
  assert record.captions == ("a name is no path here",)
  assert {p.name for p in tmp_path.iterdir()} == {"secret.png", "tars", "out"}


def test_mistakes_end_in_a_line_that_helps(tmp_path, capsys):
  assert _prepare(tmp_path) == 2
  assert "tars: nothing is there" in capsys.readouterr().err
  (tmp_path / "tars").mkdir()
  assert _prepare(tmp_path) == 2
  assert "tars: no pairs there; it has nothing. Wanted: " in capsys.readouterr().err
  trees.tar(tmp_path / "tars" / "0.tar", trees.pair(0))
  packed = tmp_path / "tars" / "1.tar"
  with tarfile.open(packed, "w:gz") as archive:
    archive.addfile(trees.special("a.jpg", tarfile.REGTYPE))
  assert _prepare(tmp_path) == 2
  assert "1.tar: is compressed, so that no member can be read by itself; unpack it\n" in (
    capsys.readouterr().err
  )
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
