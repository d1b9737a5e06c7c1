"""Tar files of pairs: every member found where Python finds it, nothing followed, no cut unseen."""

import functools
import io
import pathlib
import random
import tarfile

import pytest
import rich.progress
import trees

from clip_jax.data import images, records
from tools import prepare_data
from tools.prepare import shards, tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def _tar(
  path: pathlib.Path,
  files: dict[str, bytes | str | tarfile.TarInfo],
  form: int = tarfile.PAX_FORMAT,
) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w", format=form) as archive:
    for name, data in files.items():
      if isinstance(data, tarfile.TarInfo):
        archive.addfile(data)
        continue
      content = data.encode() if isinstance(data, str) else data
      info = tarfile.TarInfo(name)
      info.size, info.mtime = len(content), 1234.5  # pax writes a header for the half second
      archive.addfile(info, io.BytesIO(content))
  return path


def _pair(i: int) -> dict[str, bytes | str]:
  key = f"{i:09d}"
  return {
    f"{key}.jpg": trees.png(i, kind="JPEG"),
    f"{key}.txt": f"picture {i}",
    f"{key}.json": "{}",
  }


def _prepare(folder: pathlib.Path, *options: str) -> int:
  return prepare_data.main(["webdataset", str(folder / "tars"), str(folder / "out"), *options])


def _special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
  info = tarfile.TarInfo(name)
  info.type, info.linkname = kind, target
  return info


@pytest.mark.parametrize("form", FORMATS)
def test_members_are_those_that_python_finds(tmp_path, form):
  deep = "d" * 60 + "/" + "e" * 60 + "/000.jpg"
  files = {"a.jpg": b"1", "b/c.d.txt": b"", "000.JPG": bytes(513), deep: bytes(512)}
  if form != "ustar":
    files |= {"x" * 300 + ".txt": b"long", "größe.txt": b"pax"}
  files |= {"folder": _special("folder", tarfile.DIRTYPE)}
  files |= {
    "link.jpg": _special("link.jpg", tarfile.SYMTYPE, "t" * 300 if form != "ustar" else "t")
  }
  path = _tar(tmp_path / "a.tar", files, FORMATS[form])
  with tarfile.open(path) as archive:
    theirs = [
      tar.Member(m.name, m.offset_data, m.size, m.isreg()) for m in archive if not m.isdir()
    ]
  assert tar.members(path) == theirs
  assert [m.plain for m in theirs].count(False) == 1
  tar.check_end(path)


def test_pairs_become_records_one_shard_a_tar_file(tmp_path, capsys):
  _tar(tmp_path / "tars" / "00001.tar", _pair(10) | {"__key__.txt": "no image"})
  files = _pair(0) | {"sub/1.PNG": trees.png(1), "sub/1.txt": "  a\tpicture \n"} | _pair(2)
  _tar(tmp_path / "tars" / "00000.tar", files)
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
  _tar(tmp_path / "tars" / "00001.tar", _pair(11) | _pair(12))
  assert _prepare(tmp_path) == 0
  assert [r.key for r in trees.read_all(tmp_path / "out", "train")][-1] == "00001/000000012"


def test_a_tar_file_without_a_good_pair_makes_an_empty_shard(tmp_path):
  for i, files in enumerate((_pair(0), {"a.txt": "no image"}, {}, _pair(3))):
    _tar(tmp_path / "tars" / f"{i}.tar", files)
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
    "symbolic.png": _special("symbolic.png", tarfile.SYMTYPE, str(secret)),
    "symbolic.txt": caption,
    "hard.png": _special("hard.png", tarfile.LNKTYPE, "good.png"),
    "hard.txt": caption,
    "device.png": _special("device.png", tarfile.CHRTYPE),
    "device.txt": caption,
    "pipe.png": picture,
    "pipe.txt": _special("pipe.txt", tarfile.FIFOTYPE),
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
  path = _tar(tmp_path / "tars" / "0.tar", files)
  with tarfile.open(path, "a") as archive:  # two pictures of one name
    for _ in range(2):
      info = tarfile.TarInfo("twice.png")
      info.size = len(picture)
      archive.addfile(info, io.BytesIO(picture))
    archive.addfile(_special("twice.txt", tarfile.REGTYPE))
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


def test_a_cut_anywhere_is_an_error_or_does_not_matter(tmp_path):
  """Python's tarfile reads four of ten members of such a file without a word."""
  whole = _tar(tmp_path / "whole.tar", _pair(0) | _pair(1)).read_bytes()
  expected = tar.members(tmp_path / "whole.tar")
  path = tmp_path / "cut.tar"
  end = expected[-1].offset + tar.BLOCK  # of the last member's data
  for size in (*range(0, len(whole), tar.BLOCK), *range(100, len(whole), 1000)):
    path.write_bytes(whole[:size])
    if size >= end + tar.BLOCK:  # an empty block is left, which ends an archive
      assert tar.members(path) == expected
    else:
      with pytest.raises(shards.PrepareError, match="cut short"):
        tar.members(path)
    if size < end + 2 * tar.BLOCK or size % tar.BLOCK:
      with pytest.raises(shards.PrepareError, match=r"cut\.tar: cut short.*fetch it again"):
        tar.check_end(path)


def _header(kind: bytes, size: bytes, name: bytes = b"a.jpg") -> bytes:
  head = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size + b"00000000000\0"
  tail = kind + bytes(100) + b"ustar\x0000" + bytes(247)
  total = sum(head) + sum(tail) + 8 * ord(" ")
  return head + f"{total:06o}\0 ".encode() + tail


HUGE = {
  "octal": _header(b"0", b"77777777777\0"),
  "base 256": _header(b"0", b"\x80" + (2**40).to_bytes(11)),
  "past any file": _header(b"0", b"\x80" + b"\xff" * 11),
  "negative": _header(b"0", b"\xff" * 12),
  "long name": _header(b"L", b"77777777777\0"),
  "long name that is there": _header(b"L", b"00020000000\0") + bytes(2**22),
  "pax": _header(b"x", b"77777777777\0"),
  "pax size": _header(b"x", b"00000000030\0") + b"24 size=9999999999999999\n".ljust(512, b"\0"),
  "pax size of all": _header(b"g", b"77777777777\0"),
  "pax line of no length": _header(b"x", b"00000000012\0") + b"0 path=abc".ljust(512, b"\0"),
  "pax line too long": _header(b"x", b"00000000012\0") + b"9999 a=bcd".ljust(512, b"\0"),
  "digits that are none": _header(b"0", b"0000000000x\0"),
}


@pytest.mark.parametrize("name", HUGE)
def test_sizes_that_lie_are_refused_before_anything_is_read(tmp_path, name):
  path = tmp_path / "a.tar"
  path.write_bytes(HUGE[name] + _header(b"0", b"00000000000\0") + bytes(1024))
  with pytest.raises(shards.PrepareError, match=r"a\.tar: "):
    tar.members(path)
  path.write_bytes(_header(b"0", b"00000000000\0") + bytes(1024))
  assert tar.members(path) == [tar.Member("a.jpg", 512, 0, True)]


def test_damaged_files_raise_one_kind_of_error(tmp_path):
  files = _pair(0) | {"x" * 150 + ".txt": "a long name", "größe.txt": "pax"}
  whole = _tar(tmp_path / "a.tar", files).read_bytes()
  rng, path, refused = random.Random(0), tmp_path / "b.tar", 0
  for _ in range(1000):
    data = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
      data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)
    try:
      assert all(m.offset + m.size <= len(data) for m in tar.members(path))
    except shards.PrepareError:
      refused += 1
  assert 100 < refused < 1000


def test_mistakes_end_in_a_line_that_helps(tmp_path, capsys):
  assert _prepare(tmp_path) == 2
  assert "no such folder of tar files" in capsys.readouterr().err
  (tmp_path / "tars").mkdir()
  assert _prepare(tmp_path) == 2
  assert "no file in it whose name ends in .tar" in capsys.readouterr().err
  _tar(tmp_path / "tars" / "0.tar", _pair(0))
  packed = tmp_path / "tars" / "1.tar"
  with tarfile.open(packed, "w:gz") as archive:
    archive.addfile(_special("a.jpg", tarfile.REGTYPE))
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

  def part(i: int, stop: bool) -> list[shards.Item]:
    read.append(i)
    if stop and i == 2:
      raise _Killed
    record = records.Record(f"{i}", trees.png(i), ("a picture",))
    return [shards.Item(f"{i}", ("train",), lambda: record)]

  def job(stop: bool) -> shards.Job:
    plan = shards.Plan(parts=[functools.partial(part, i, stop) for i in range(4)])
    return shards.Job("drill", "", "", {}, {}, lambda progress: plan)

  with rich.progress.Progress(disable=True) as progress:
    with pytest.raises(_Killed):
      shards.write(job(stop=True), tmp_path, 0, progress)
    assert not (tmp_path / "manifest.json").exists()
    shards.write(job(stop=False), tmp_path, 0, progress)
  assert read == [0, 1, 2, 2, 3]
  assert [r.key for r in trees.read_all(tmp_path, "train")] == ["0", "1", "2", "3"]
