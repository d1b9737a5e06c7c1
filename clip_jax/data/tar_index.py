"""Where the pairs of a WebDataset tar file lie: found once, kept in a small file, read row by row.

The index of `000.tar` is `000.tar.index` beside it, or lies in `storage.cache_folder()` where the
folder cannot be written, is in an object store, or CLIP_JAX_CACHE says so. It is a header of fixed
size, a row a pair, and the keys; a row is 46 bytes and holds its own checksum, so that any one is
read alone and no index is ever held in memory. An index belongs to a size and a time of change (or
ETag) of its tar file; of any other it is made anew. It is renamed to its name when it is whole, so
that any number of processes may make it at the same time.
"""

import concurrent.futures
import dataclasses
import errno
import hashlib
import logging
import os
import pathlib
import secrets
import struct
import zlib
from collections.abc import Iterator, Sequence

from clip_jax.data import storage, tables, tar

SUFFIX = ".index"
IMAGES = ("jpg", "jpeg", "png", "webp")  # by preference
# Offset and bytes of image, text and JSON in the tar file (0: not there, as no content lies at byte
# 0), offset and bytes of the key among the keys; then the CRC-32 of these and the key.
_ROW = struct.Struct("<QIQIQIIHI")
_MAGIC = b"cjtarix\x02"  # 1 did not look past the first empty block of a tar file
# magic, size of the tar file, its stamp hashed, rows, samples left out, bytes of the note on them,
# bytes of the keys, sha256 of all headers of the tar file; then the CRC-32 of these
_FIELDS = struct.Struct("<8sQ16sQQQQ32s")
_HEADER_BYTES = _FIELDS.size + 4
_MOST_BYTES = 2**32 - 1
_MOST_KEY_BYTES = 2**16 - 1
_THREADS = 8
_SLICE = 64  # indexes that a thread opens in one go: a single one is done in microseconds
_log = logging.getLogger(__name__)


class IndexFileError(ValueError):
  """An index that cannot be written, or is not what it was: which, why, what to do."""


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a pair lies in its tar file: (offset, bytes) of its parts; (0, 0) for one it lacks."""

  key: str
  image: tuple[int, int]
  text: tuple[int, int]
  json: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Index:
  """The index of one tar file. `digest` (sha256) changes when a header in the tar file does."""

  path: str
  rows: int
  left_out: int  # samples that are no pair
  note: str  # why the first of them is none
  note_bytes: int
  digest: bytes
  seed: int  # of the rows' checksums

  def place(self, row: int) -> Place:
    """Raises: IndexFileError when the file is damaged or another than it was; OSError."""
    with open(self.path, "rb", buffering=0) as file:
      data = os.pread(file.fileno(), _ROW.size, _HEADER_BYTES + row * _ROW.size)
      if len(data) == _ROW.size:
        found = _ROW.unpack(data)
        start = _HEADER_BYTES + self.rows * _ROW.size + self.note_bytes + found[6]
        key = os.pread(file.fileno(), found[7], start)
        if zlib.crc32(data[:-4] + key, self.seed) == found[8]:
          return Place(key.decode(errors="backslashreplace"), found[0:2], found[2:4], found[4:6])
    raise IndexFileError(
      f"{self.path}: row {row} is not what was written; delete the file and start again"
    )


def open_all(files: Sequence[storage.File]) -> list[Index]:
  """The indexes of tar files, in their order; those that are not there are made.

  Each process begins at a place of its own, so that several that start together share the work.
  Raises: TarError for a file that is cut short or no tar file; IndexFileError; OSError.
  """
  if not files:
    return []
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    slices = [files[k : k + _SLICE] for k in range(0, len(files), _SLICE)]
    parts = pool.map(lambda part: [_existing(file) for file in part], slices)
    found = [index for part in parts for index in part]
    missing = [k for k, index in enumerate(found) if index is None]
    if missing:
      _log.warning("indexing %d of %d tar files, once; first %s", len(missing), len(files),
                   files[missing[0]].path)  # fmt: skip
    who = hashlib.sha256(f"{os.uname().nodename} {os.getpid()}".encode()).digest()
    first = int.from_bytes(who[:8]) % max(1, len(missing))
    turns = missing[first:] + missing[:first]
    made = pool.map(open_one, [files[k] for k in turns])
    for done, (k, index) in enumerate(zip(turns, made, strict=True)):
      found[k] = index
      if done and done % max(100, len(turns) // 20) == 0:
        _log.warning("indexed %d of %d tar files", done, len(turns))
  return [index for index in found if index is not None]


def open_one(file: storage.File) -> Index:
  """The index of one tar file, made if it is not there. Raises: as `open_all`."""
  return _existing(file) or _write(file, _build(file))


def _places(file: storage.File) -> Iterator[pathlib.Path]:
  """Where the index may lie, the preferred place first."""
  remote = storage.is_remote(file.path)
  beside = pathlib.Path(file.path + SUFFIX)
  first = remote or os.environ.get("CLIP_JAX_CACHE")
  if not first:
    yield beside
  where = file.path if remote else os.path.realpath(file.path)
  name = hashlib.sha256(where.encode(errors="surrogateescape")).hexdigest()[:32] + SUFFIX
  yield storage.cache_folder() / "tar" / name
  if first and not remote:
    yield beside


def _stamp(file: storage.File) -> bytes:
  return hashlib.sha256(file.stamp.encode()).digest()[:16]


def _existing(file: storage.File) -> Index | None:
  """The index that is there and belongs to the tar file as it is now, if there is one."""
  for path in _places(file):
    try:
      with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        index = _parse(file, path, stream.read(_HEADER_BYTES), size)
        if index is not None and index.note_bytes:
          stream.seek(_HEADER_BYTES + index.rows * _ROW.size)
          note = stream.read(index.note_bytes).decode(errors="replace")
          index = dataclasses.replace(index, note=note)
    except OSError:
      continue
    if index is not None:
      return index
  return None


def _parse(file: storage.File, path: pathlib.Path, header: bytes, size: int) -> Index | None:
  """The index of this header, without its note; None where it is not the file's or not whole."""
  if len(header) < _HEADER_BYTES:
    return None
  magic, tar_bytes, stamp, rows, left_out, note, keys, digest = _FIELDS.unpack(header[:-4])
  seed = zlib.crc32(header[:-4])
  whole = size == _HEADER_BYTES + rows * _ROW.size + note + keys
  if magic != _MAGIC or seed != int.from_bytes(header[-4:], "little") or not whole:
    return None
  if (tar_bytes, stamp) != (file.size, _stamp(file)):
    return None
  return Index(str(path), rows, left_out, "", note, digest, seed)


def _build(file: storage.File) -> bytes:
  """The content of a tar file's index. Raises: TarError, OSError."""
  digest = hashlib.sha256()
  with storage.open_file(file) as stream:
    members = tar.scan(stream, file.path, digest.update)
  good, notes = [], []
  for key, parts, why in _samples(members):
    if why:
      notes.append(f"{key}: {why}")
    else:
      good.append((key.encode(errors="surrogateescape"), parts))
  return content(file, good, notes, digest.digest())


def left_out(file: storage.File) -> list[tables.Rejection]:
  """The samples of a tar file that are no pairs, by their keys; its headers are read once more.

  Raises: TarError, OSError.
  """
  with storage.open_file(file) as stream:
    members = tar.scan(stream, file.path, len)
  return [tables.Rejection(key, why.reason, why.detail) for key, _, why in _samples(members) if why]


def _samples(
  members: Sequence[tar.Member],
) -> Iterator[tuple[str, tuple[int, ...], tables.Rejected | None]]:
  """Key and parts of each sample, and why it is no pair, where it is none."""
  samples: dict[str, dict[str, list[tar.Member]]] = {}
  for member in members:
    key, extension = tar.sample_of(member.name)
    samples.setdefault(key, {}).setdefault(extension, []).append(member)
  for key, sample in samples.items():
    try:
      if len(key.encode(errors="surrogateescape")) > _MOST_KEY_BYTES:
        raise tables.Rejected("too_long", "too long a name")
      yield key, _parts(sample), None
    except tables.Rejected as error:
      yield key, (), error


def content(
  file: storage.File,
  pairs: Sequence[tuple[bytes, tuple[int, ...]]],
  notes: Sequence[str],
  digest: bytes,
) -> bytes:
  """The bytes of an index.

  Args: pairs, the key of each with offset and bytes of its image, text and JSON; notes, why each
    sample that is left out is no pair; digest, the sha256 of the headers.
  """
  note = notes[0].encode(errors="backslashreplace") if notes else b""
  names = [name for name, _ in pairs]
  sizes = (len(pairs), len(notes), len(note), sum(map(len, names)))
  header = _FIELDS.pack(_MAGIC, file.size, _stamp(file), *sizes, digest)
  seed, at, rows = zlib.crc32(header), 0, []
  for name, parts in pairs:
    row = _ROW.pack(*parts, at, len(name), 0)[:-4]
    rows.append(row + zlib.crc32(row + name, seed).to_bytes(4, "little"))
    at += len(name)
  return b"".join((header, seed.to_bytes(4, "little"), *rows, note, *names))


def _parts(sample: dict[str, list[tar.Member]]) -> tuple[int, ...]:
  """(offset, bytes) of image, text and JSON of a sample. Raises: Rejected when it is no pair."""
  image = next((kind for kind in IMAGES if kind in sample), None)
  if image is None:
    raise tables.Rejected("no_image", f"no image (.{', .'.join(IMAGES)})")
  if "txt" not in sample and "json" not in sample:
    raise tables.Rejected("no_caption", "no caption (.txt, .json)")
  parts: list[int] = []
  for kind in (image, "txt", "json"):
    found = sample.get(kind, [])
    if len(found) > 1:
      raise tables.Rejected("repeated", f"{len(found)} members of the name {found[0].name}")
    if found and not found[0].plain:
      raise tables.Rejected("not_a_file", f"{found[0].name} is a link or the like")
    if found and found[0].size > _MOST_BYTES:
      raise tables.Rejected("too_large", f"{found[0].name} has {found[0].size:,} bytes")
    parts += (found[0].offset, found[0].size) if found else (0, 0)
  return tuple(parts)


def _write(file: storage.File, content: bytes) -> Index:
  """Puts an index where it can be. Raises: IndexFileError when that is nowhere; OSError."""
  failed = []
  for path in _places(file):
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      _replace(path, content)
    except OSError as error:
      if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
        raise
      failed.append(f"{path} ({error.strerror})")
      continue
    index = _parse(file, path, content[:_HEADER_BYTES], len(content))
    assert index is not None, "what was just made is whole"
    start = _HEADER_BYTES + index.rows * _ROW.size
    note = content[start : start + index.note_bytes].decode(errors="replace")
    return dataclasses.replace(index, note=note)
  raise IndexFileError(
    f"{file.path}: its index cannot be written to {' nor to '.join(failed)}; set CLIP_JAX_CACHE to "
    "a folder with room that can be written"
  )


def _replace(path: pathlib.Path, content: bytes) -> None:
  """Writes a file whole or not at all."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
  try:
    with temporary.open("wb") as stream:
      stream.write(content)
      stream.flush()
      os.fsync(stream.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
