"""Where the members of a tar file lie. Nothing is extracted, no name is taken for a path.

The formats of POSIX (ustar, pax) and GNU, uncompressed. Every size is checked against the file
before anything of it is read, and a file that was cut short is an error, at whatever byte; so is
one with a hole over a header, and one that another was appended to. (Python's own tarfile takes a
file that ends between two members, or before an empty block, for a whole one.) Unseen stays a hole
from before a member up to the end's own empty blocks, which is an archive of fewer members, and any
change of a member's own bytes, which have no checksum in a tar file.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

BLOCK = 512
_EMPTY = bytes(BLOCK)
_MAX_EXTRA_BYTES = 1_000_000  # of a pax header or a long name
_MAX_EMPTY_BYTES = 2**20  # at the end: archives are filled up to 10 KiB, for tapes up to 1 MiB
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # how such files begin
_FILE_KINDS = (b"0", b"\0", b"7")
_DIRECTORY, _LONG_NAME, _LONG_LINK, _PAX, _PAX_OF_ALL = b"5", b"L", b"K", b"x", b"g"


class TarError(ValueError):
  """An archive that cannot be read to its end: which, why, what to do."""


@dataclasses.dataclass(frozen=True)
class Member:
  """A file in the archive: `size` bytes from `offset`; not `plain`: a link, a device and so on."""

  name: str
  offset: int
  size: int
  plain: bool


class _Damaged(Exception):
  """Why an archive cannot be read to its end."""


class _Compressed(_Damaged):
  """Of gzip, bzip2, xz or Zstandard."""


def check_end(path: pathlib.Path) -> None:
  """Raises: TarError when the two empty blocks that end an archive are not at its end."""
  try:
    with path.open("rb") as file:
      _check_end(file)
  except _Damaged as error:
    raise _error(path, error) from error


def members(path: pathlib.Path) -> list[Member]:
  """All members but directories, in their order.

  Raises: TarError for what is no whole uncompressed tar file; OSError.
  """
  try:
    with path.open("rb") as file:
      return list(_read(file))
  except _Damaged as error:
    raise _error(path, error) from error


def scan(file: BinaryIO, name: str, seen: Callable[[bytes], object]) -> list[Member]:
  """All members of an open archive that must have both empty blocks at its end.

  `seen` gets every byte of the headers: names, sizes and times, the contents of no file.
  Raises: TarError that calls the archive `name`; OSError.
  """
  try:
    _check_end(file)
    return list(_read(file, seen))
  except _Damaged as error:
    raise _error(name, error) from error


def sample_of(name: str) -> tuple[str, str]:
  """A member's name -> the key of its sample and its extension, after the first dot, lower case."""
  directory, slash, base = name.rpartition("/")
  stem, _, extension = base.partition(".")
  return directory + slash + stem, extension.lower()


def _error(path: pathlib.Path | str, error: _Damaged) -> TarError:
  if isinstance(error, _Compressed):
    return TarError(f"{path}: {error}")
  return TarError(f"{path}: {error}; fetch it again, or move it out of the folder")


def _check_end(file: BinaryIO) -> None:
  size = file.seek(0, 2)
  file.seek(max(0, size - 2 * BLOCK))
  if size % BLOCK or file.read(2 * BLOCK) != bytes(2 * BLOCK):
    file.seek(0)
    if file.read(6).startswith(_COMPRESSED):
      raise _Compressed("is compressed, so that no member can be read by itself; unpack it")
    raise _Damaged(f"cut short at byte {size:,}: its last blocks are not empty")


def _check_rest(file: BinaryIO, start: int, end: int) -> None:
  """From the first empty block on an archive is empty, and not for long."""
  file.seek(start)
  rest = file.read(min(end - start, _MAX_EMPTY_BYTES))
  if more := rest.lstrip(b"\0"):
    found = start + len(rest) - len(more)
    raise _Damaged(
      f"an empty block at byte {start:,}, but more follows at byte {found:,}: a hole, or two "
      "archives in one file"
    )
  if start + len(rest) < end:
    raise _Damaged(
      f"an empty block at byte {start:,}, {end - start:,} bytes before its end: a copy that was "
      "not finished, or a hole"
    )


def _read(file: BinaryIO, seen: Callable[[bytes], object] = len) -> Iterator[Member]:
  end, offset = file.seek(0, 2), 0
  extra: dict[str, str] = {}  # what the headers before a member say of it
  while True:
    file.seek(offset)
    header = file.read(BLOCK)
    if len(header) < BLOCK:
      raise _Damaged(f"cut short at byte {end:,}: the empty block at its end is missing")
    if header == _EMPTY:
      if extra:
        raise _Damaged(f"the member is missing whose name or size ends at byte {offset:,}")
      _check_rest(file, offset, end)
      return
    seen(header)
    _check(header, offset)
    kind, body = header[156:157], offset + BLOCK
    size = _number(header[124:136], offset)
    if kind not in (_PAX, _PAX_OF_ALL, _LONG_NAME, _LONG_LINK):
      size = _decimal(extra.get("size", str(size)), offset)
    offset = body + -(-size // BLOCK) * BLOCK
    if offset > end:
      raise _Damaged(f"cut short at byte {end:,}: {size:,} bytes should follow byte {body:,}")
    if kind in (_PAX, _LONG_NAME):
      if size > _MAX_EXTRA_BYTES:
        raise _Damaged(f"{size:,} bytes of header at byte {body:,}")
      data = file.read(size)
      seen(data)
      extra |= {"path": _text(data)} if kind == _LONG_NAME else _pax(data, body)
    elif kind not in (_PAX_OF_ALL, _LONG_LINK):
      if kind != _DIRECTORY:
        plain = kind in _FILE_KINDS and not any(key.startswith("GNU.sparse") for key in extra)
        yield Member(extra.get("path") or _name(header), body, size, plain)
      extra = {}


def _check(header: bytes, offset: int) -> None:
  unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
  if _number(header[148:156], offset) != unsigned:
    raise _Damaged(f"no tar header at byte {offset:,} (is it compressed?)")


def _number(field: bytes, offset: int) -> int:
  """Octal digits; or GNU's way for what is too large for them, a number in base 256."""
  if field[0] == 0x80:
    return int.from_bytes(field[1:])
  digits = field.strip(b" \0")
  if digits.strip(b"01234567"):  # another byte among them
    raise _Damaged(f"no tar header at byte {offset:,} (is it compressed?)")
  return int(digits or b"0", 8)


def _decimal(text: str, offset: int) -> int:
  if not (text.isascii() and text.isdecimal() and len(text) < 20):
    raise _Damaged(f"a size of {text[:20]!r} at byte {offset:,}")
  return int(text)


def _pax(data: bytes, offset: int) -> dict[str, str]:
  """Lines of "length key=value", where the length counts the whole line."""
  out = {}
  while data:
    digits, _, _ = data.partition(b" ")
    length = _decimal(_text(digits), offset)
    line = data[len(digits) + 1 : length]
    key, equals, value = line.partition(b"=")
    if not (len(digits) < length <= len(data) and equals and line.endswith(b"\n")):
      raise _Damaged(f"a pax header that cannot be read at byte {offset:,}")
    out[_text(key)] = _text(value[:-1])
    data = data[length:]
  return out


def _name(header: bytes) -> str:
  name, prefix = _text(header[:100]), header[345:500]
  return f"{_text(prefix)}/{name}" if header[257:263] == b"ustar\0" and prefix[0] else name


def _text(field: bytes) -> str:
  return field.split(b"\0")[0].decode(errors="surrogateescape")
