"""Members of tar files: each found where Python finds it, no cut unseen, no size believed."""

import io
import random
import tarfile

import pytest
import trees

from clip_jax.data import tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("form", FORMATS)
def test_members_are_those_that_python_finds(tmp_path, form):
  deep = "d" * 60 + "/" + "e" * 60 + "/000.jpg"
  files = {"a.jpg": b"1", "b/c.d.txt": b"", "000.JPG": bytes(513), deep: bytes(512)}
  if form != "ustar":
    files |= {"x" * 300 + ".txt": b"long", "größe.txt": b"pax"}
  files |= {"folder": trees.special("folder", tarfile.DIRTYPE)}
  files |= {
    "link.jpg": trees.special("link.jpg", tarfile.SYMTYPE, "t" * 300 if form != "ustar" else "t")
  }
  path = trees.tar(tmp_path / "a.tar", files, FORMATS[form])
  with tarfile.open(path) as archive:
    theirs = [
      tar.Member(m.name, m.offset_data, m.size, m.isreg()) for m in archive if not m.isdir()
    ]
  assert tar.members(path) == theirs
  assert [m.plain for m in theirs].count(False) == 1
  tar.check_end(path)


def test_a_cut_anywhere_is_an_error_or_does_not_matter(tmp_path, drill):
  """Python's tarfile reads four of ten members of such a file without a word."""
  whole = trees.tar(tmp_path / "whole.tar", trees.pair(0) | trees.pair(1)).read_bytes()
  expected = tar.members(tmp_path / "whole.tar")
  path = tmp_path / "cut.tar"
  end = expected[-1].offset + tar.BLOCK  # of the last member's data
  for size in (*range(0, len(whole), tar.BLOCK), *range(100, len(whole), 1000)):
    path.write_bytes(whole[:size])
    drill(7, injected=1)
    if size >= end + tar.BLOCK:  # an empty block is left, which ends an archive
      assert tar.members(path) == expected
    else:
      with pytest.raises(tar.TarError, match="cut short"):
        tar.members(path)
    if size < end + 2 * tar.BLOCK or size % tar.BLOCK:
      with pytest.raises(tar.TarError, match=r"cut\.tar: cut short.*fetch it again"):
        tar.check_end(path)
      drill(7, detected=1)
    else:
      tar.check_end(path)
      drill(7, harmless=1)


@pytest.mark.parametrize("form", FORMATS)
def test_a_hole_over_any_header_is_found(tmp_path, form, drill):
  """Of one block and of a page, which may hide several members and then contents."""
  files = {name: data for i in range(5) for name, data in trees.pair(i).items()}
  whole = trees.tar(tmp_path / "whole.tar", files, FORMATS[form]).read_bytes()
  starts = [member.offset - tar.BLOCK for member in tar.members(tmp_path / "whole.tar")]
  assert len(starts) == 15
  path = tmp_path / "hole.tar"
  for start in starts:
    for size in (tar.BLOCK, 4096):
      data = whole[:start] + bytes(size) + whole[start + size :]
      if not data[start:].strip(b"\0") and form != "pax":
        continue  # the last ones, whole: an archive of fewer members, if no pax header tells
      path.write_bytes(data[: len(whole)])
      with pytest.raises(tar.TarError, match=rf"hole\.tar: .* byte {start:,}.*fetch it again"):
        tar.members(path)
      drill(7, injected=1, detected=1)


def test_what_follows_the_end_is_an_error(tmp_path, drill):
  """Another archive, junk, and more empty blocks than any archive is filled up with."""
  first = trees.tar(tmp_path / "a.tar", trees.pair(0)).read_bytes()
  end = max(m.offset + m.size for m in tar.members(tmp_path / "a.tar"))
  end += -end % tar.BLOCK
  path = tmp_path / "b.tar"
  for more in (first, first[:end] + bytes(tar.BLOCK), bytes(700_000) + b"junk"):
    path.write_bytes(first + more)
    where = len(first) + len(more) - len(more.lstrip(b"\0"))
    said = rf"b\.tar: an empty block at byte {end:,}, but more follows at byte {where:,}: a hole"
    with pytest.raises(tar.TarError, match=said):
      tar.members(path)
  path.write_bytes(first[:end] + bytes(2**20))
  assert tar.members(path) == tar.members(tmp_path / "a.tar")
  path.write_bytes(first[:end] + bytes(2**20 + tar.BLOCK))
  with pytest.raises(tar.TarError, match=r"49,088 bytes before its end: a copy that was not fin"):
    tar.members(path)
  drill(7, injected=4, detected=4)


def test_of_a_long_end_little_is_read(tmp_path):
  path = trees.tar(tmp_path / "a.tar", trees.pair(0))
  with path.open("r+b") as file:
    file.truncate(2**40)  # a hole: it takes no room
  read = []

  class Counting(io.FileIO):
    def read(self, size=-1):
      read.append(size)
      return super().read(size)

  with Counting(path) as file, pytest.raises(tar.TarError, match="a copy that was not finished"):
    tar.scan(file, "a.tar", len)
  assert sum(read) < 2 * 2**20


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
  with pytest.raises(tar.TarError, match=r"a\.tar: "):
    tar.members(path)
  path.write_bytes(_header(b"0", b"00000000000\0") + bytes(1024))
  assert tar.members(path) == [tar.Member("a.jpg", 512, 0, True)]


def test_damaged_files_raise_one_kind_of_error(tmp_path):
  files = trees.pair(0) | {"x" * 150 + ".txt": "a long name", "größe.txt": "pax"}
  whole = trees.tar(tmp_path / "a.tar", files).read_bytes()
  rng, path, refused = random.Random(0), tmp_path / "b.tar", 0
  for _ in range(1000):
    data = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
      data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)
    try:
      assert all(m.offset + m.size <= len(data) for m in tar.members(path))
    except tar.TarError:
      refused += 1
  assert 100 < refused < 1000
