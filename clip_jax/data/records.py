"""Random-access sources of image-text records: ArrayRecord shards with a manifest, or in memory.

On disk a record is a msgpack map {key, image, captions, label}; a folder of shards has a
`manifest.json` that says how many records each shard holds, of how many bytes, with which sha256.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgpack
import numpy as np
from array_record.python import array_record_module

from clip_jax.data import images, storage, tables
from clip_jax.data.bytepairs import TokenizerError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
CAUSES = (
  "good", "storage", "record", "caption", "unreadable", "truncated", "too_large", "mode", "empty",
  "other", "memory",
)  # fmt: skip  # why a record was replaced, by code; those of images.ImageError under their names
_ATTEMPTS = 100
_NAMED = 10  # bad records, in an error
_UNAVAILABLE = 3  # records in a row that a store does not give, after which it is taken for down


class RecordError(ValueError):
  """A record, shard or manifest that cannot be used: which, why, what to do."""

  @property
  def reason(self) -> str:
    """One word, for counts: that of the Rejected from which it was raised, or "record"."""
    if isinstance(self.__cause__, tables.Rejected):
      return self.__cause__.reason
    return "encoding" if isinstance(self.__cause__, UnicodeDecodeError) else "record"


@dataclasses.dataclass(frozen=True)
class Record:
  """One image with its captions.

  `image` is an encoded file (bytes) or already-decoded uint8 [H, W, 3]. `label` is the class
  name where the source has one.
  """

  key: str
  image: bytes | np.ndarray
  captions: tuple[str, ...]
  label: str | None = None


class RecordSource(Protocol):
  """Random access, the same records in the same order on every machine."""

  @property
  def fingerprint(self) -> str:
    """Changes whenever any record's content does (sha256 hex)."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...

  def locate(self, index: int) -> str:
    """Where record `index` stands, for messages: file and record, or key."""


def pack(record: Record) -> bytes:
  """A record with an encoded image -> its bytes on disk. Raises: RecordError for a decoded one."""
  if not isinstance(record.image, bytes):
    raise RecordError(f"{record.key}: only encoded images are written")
  fields = {**dataclasses.asdict(record), "captions": list(record.captions)}
  return msgpack.packb(fields)


def unpack(data: bytes) -> Record:
  """The inverse of `pack`. Raises: RecordError on anything else; nothing in it is ever executed."""
  try:
    fields = msgpack.unpackb(data, strict_map_key=True)
  except Exception as error:  # msgpack lets through what its callbacks and UTF-8 raise
    raise RecordError(f"not a record ({type(error).__name__}: {error})") from error
  if not isinstance(fields, dict) or set(fields) != {"key", "image", "captions", "label"}:
    raise RecordError("not a record: its fields are not key, image, captions, label")
  key, image, captions, label = (fields[k] for k in ("key", "image", "captions", "label"))
  strings = isinstance(captions, list) and all(isinstance(c, str) for c in captions)
  if not (isinstance(key, str) and isinstance(image, bytes) and strings):
    raise RecordError("not a record: a field has the wrong type")
  if label is not None and not isinstance(label, str):
    raise RecordError("not a record: its label is no text")
  return Record(key, image, tuple(captions), label)


class ArrayRecordSource:
  """One split of a folder that tools/prepare_data.py wrote.

  Raises: RecordError when the folder, its manifest, the split or a shard is missing, or when a
    shard's size is not the manifest's.
  """

  def __init__(self, directory: str | os.PathLike[str], split: str):
    self.directory, self.split = pathlib.Path(directory), split
    manifest = read_manifest(self.directory)
    if split not in manifest["splits"]:
      known = ", ".join(sorted(manifest["splits"]))
      raise RecordError(f"{self.directory}: no split {split!r}; it has {known}")
    shards = manifest["splits"][split]["shards"]
    self.classes: tuple[str, ...] = tuple(manifest.get("classes", ()))
    self._files = [_beside(self.directory, shard["file"]) for shard in shards]
    self._ends = np.cumsum([shard["records"] for shard in shards])
    for file, shard in zip(self._files, shards, strict=True):
      _check_size(file, shard["bytes"])
    identity = [[shard["sha256"], shard["records"]] for shard in shards]
    self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    self._source: Any = None  # opened at the first read, in whichever process reads

  def __repr__(self) -> str:
    return f"ArrayRecordSource({self.fingerprint[:16]})"

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_source": None}

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f"{self.directory} {self.split}: no record {index}, it has {len(self)}")
    if self._source is None:
      self._source = [None] * len(self._files)
    shard, offset = self._position(index)
    try:
      if self._source[shard] is None:
        self._source[shard] = array_record_module.ArrayRecordReader(str(self._files[shard]))
        found = self._source[shard].num_records()
        if found != self._records_of(shard):
          self._source[shard] = None
          raise RecordError(f"holds {found} records, not {self._records_of(shard)}")
      return unpack(self._source[shard].read([offset])[0])
    except (RuntimeError, IndexError, ValueError) as error:
      raise RecordError(f"{self.locate(index)}: {error}") from error

  def locate(self, index: int) -> str:
    shard, offset = self._position(index)
    return f"{self._files[shard]} record {offset}"

  def _position(self, index: int) -> tuple[int, int]:
    shard = int(np.searchsorted(self._ends, index, side="right"))
    return shard, int(index - (self._ends[shard - 1] if shard else 0))

  def _records_of(self, shard: int) -> int:
    return int(self._ends[shard] - (self._ends[shard - 1] if shard else 0))


def read_manifest(directory: pathlib.Path) -> dict[str, Any]:
  """A folder's manifest. Raises: RecordError saying what is missing and how to make it."""
  path = directory / MANIFEST
  try:
    manifest = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise RecordError(
      f"{path}: not found; prepare the data with tools/prepare_data.py (see make prepare)"
    ) from None
  except (OSError, ValueError) as error:
    raise RecordError(f"{path}: cannot be read ({error}); prepare the data anew") from error
  known = isinstance(manifest, dict) and manifest.get("format") == MANIFEST_FORMAT
  if not known or not isinstance(manifest.get("splits"), dict):
    raise RecordError(f"{path}: not a manifest of format {MANIFEST_FORMAT}; prepare the data anew")
  return manifest


def _beside(directory: pathlib.Path, name: str) -> pathlib.Path:
  """The shard of that name. Raises: RecordError for a name that is a path."""
  if pathlib.PurePath(name).name != name:
    raise RecordError(f"{directory / MANIFEST}: the shard {name!r} is no file in its folder")
  return directory / name


def _check_size(file: pathlib.Path, expected: int) -> None:
  found = file.stat().st_size if file.is_file() else None
  if found != expected:
    is_now = "missing" if found is None else f"{found:,} bytes"
    raise RecordError(
      f"{file}: {is_now}, the manifest says {expected:,} bytes; prepare the data anew"
    )


class MemorySource:
  """Records in memory."""

  def __init__(self, records: Sequence[Record], name: str):
    self._records, self._name = tuple(records), name
    digest = hashlib.sha256()
    for record in self._records:
      image = record.image if isinstance(record.image, bytes) else record.image.tobytes()
      text = json.dumps([record.key, record.captions, record.label, len(image)])
      digest.update(text.encode() + image)
    self.fingerprint = digest.hexdigest()

  def __repr__(self) -> str:
    return f"MemorySource({self._name}, {self.fingerprint[:16]})"

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Record:
    return self._records[index]

  def locate(self, index: int) -> str:
    return f"{self._name} record {index}"


class ResilientSource:
  """Decoded records of `source`, in which a bad one is replaced by another.

  The replacement is a function of the index alone, the same on every host, in every worker and at
  every restart; the element carries the cause, so that counts are exact. An exception must not
  leave this class, unless the run should end: grain would lose the rest of a worker's records. A
  store that is down is no bad record: after three in a row that it does not give, the run ends.
  `decode` makes an image of a record's; `name` is the source's in errors.
  """

  def __init__(
    self, source: RecordSource, decode: Callable[[Any], Any] = images.as_image, name: str = ""
  ):
    self._source, self._decode, self._name = source, decode, name or repr(source)

  def __repr__(self) -> str:
    return f"ResilientSource({self._source!r})"

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """{image, captions, key, bad, index, attempts}; `bad` is an index into CAUSES.

    Raises: RecordError when the record and 99 that could replace it are bad, with the first ten of
      them; or when its store is down, with its last answer.
    """
    return self._element(int(index), 0, 0)

  def replacement(self, element: dict[str, Any], error: Exception) -> dict[str, Any]:
    """Another element in place of one that no example can be made of. Raises: RecordError."""
    bad = int(element["bad"]) or CAUSES.index(_cause(error))
    return self._element(element["index"], element["attempts"], bad)

  def _element(self, index: int, attempts: int, bad: int) -> dict[str, Any]:
    named: dict[int, str] = {}  # bad ones, with their causes
    unavailable, why = 0, ""
    for attempt in range(attempts, _ATTEMPTS):
      position = self._position(index, attempt)
      try:
        record = self._read(position)
        image = self._decode(record.image)
        captions = tuple(caption for caption in record.captions if caption.strip())
        if captions:
          fields = {"image": image, "captions": captions, "key": record.key}
          return {**fields, "bad": np.int32(bad), "index": index, "attempts": attempt + 1}
        cause, why, unavailable = "caption", "no caption", 0
      except (Exception, SystemExit) as error:  # of any kind: see the class
        cause, why = _cause(error), str(error) or type(error).__name__
        unavailable = unavailable + 1 if isinstance(error, storage.Unavailable) else 0
      bad = bad or CAUSES.index(cause)
      if unavailable == _UNAVAILABLE:
        raise RecordError(
          f"{self._name}: its store is down: {unavailable} records in a row could not be had, each "
          f"asked for twice; the last answer: {why}"
        )
      if len(named) < _NAMED and position not in named:
        named[position] = f"{self._source.locate(position)} ({cause})"
    raise RecordError(
      f"{self._name}: a bad record, and no substitute for it among {_ATTEMPTS} draws; the first "
      f"bad ones: {'; '.join(named.values())}; the last error: {why}"
    )

  def _position(self, index: int, attempt: int) -> int:
    if attempt == 0:
      return index
    digest = hashlib.sha256(f"{index} {attempt - 1}".encode()).digest()
    return int.from_bytes(digest[:8]) % len(self._source)

  def _read(self, index: int) -> Record:
    try:
      return self._source[index]
    except OSError:
      return self._source[index]  # storage may have a bad moment; a second failure counts


def _cause(error: BaseException) -> str:
  if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
    return "memory"
  if isinstance(error, images.ImageError):
    return error.cause
  if isinstance(error, TokenizerError):
    return "caption"
  if isinstance(error, OSError):
    return "storage"
  return "record" if isinstance(error, (RecordError, StopIteration, SystemExit)) else "other"
