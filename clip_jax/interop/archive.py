"""Files of weights -> arrays by name, without the frameworks that wrote them.

PyTorch archives (`torch.save` and TorchScript), safetensors, and NumPy's npz. Nothing is executed,
and the arrays are read-only views into the mapped file, which cost no memory until they are used.
(The safetensors library copies every array, and does not read bfloat16 into NumPy: its format is a
JSON header and the bytes, so it is read here, and without making objects of all that a stranger
may have put into the header.)
"""

import dataclasses
import io
import itertools
import json
import math
import mmap
import pathlib
import re
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from clip_jax.interop import unpickle

_MAX_PICKLE_BYTES = 4 << 20  # a byte of it may become 64 of memory; 300 arrays take 40 kB
_MAX_INDEX_BYTES = 4 << 20
_MAX_HEADER_BYTES = 16 << 20
_MAX_TENSORS = 20_000

_STORAGES = {
  "FloatStorage": "<f4", "HalfStorage": "<f2", "DoubleStorage": "<f8", "LongStorage": "<i8",
  "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1",
  "BoolStorage": "?", "BFloat16Storage": ml_dtypes.bfloat16,
}  # fmt: skip
_SAFETENSORS = {
  "F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": ml_dtypes.bfloat16, "I64": "<i8", "I32": "<i4",
  "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip

# A safetensors header: {"__metadata__": {"text": "text", ...}, "name": {...}, ...}, in any order.
_GAP, _STRING = rb"[ \t\r\n]*+", rb'"(?:[^"\\]++|\\.)*+"'
_COLON, _NEXT = _GAP + b":" + _GAP, _GAP + rb"([,}])" + _GAP
_PAIR = _GAP + _STRING + _COLON + _STRING + _GAP
_TEXTS = rb"\{(?:" + _PAIR + b"(?:," + _PAIR + b")*+)?+" + _GAP + rb"\}"
_METADATA = re.compile(_GAP + b'"__metadata__"' + _COLON + _TEXTS + _NEXT, re.DOTALL)
_ENTRY = re.compile(
  _GAP + rb'"([ !#-\[\]-~]{1,1000}+)"' + _COLON + rb"(\{[^{}]{0,2000}+\})" + _NEXT
)
_NOTHING = re.compile(_GAP + rb"\}" + _GAP)


class ArchiveError(ValueError):
  """A file of weights that cannot be read: which, what is wrong with it, what to do."""


@dataclasses.dataclass(frozen=True)
class Tensors:
  """What a file holds. `facts`: its plain values by name; `classes` of a TorchScript archive."""

  path: pathlib.Path
  format: str  # "torchscript", "torch", "safetensors" or "npz"
  arrays: dict[str, np.ndarray]
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def read(path: pathlib.Path) -> Tensors:
  """A file, told by its content, or a Hugging Face folder's `model.safetensors` (sharded too).

  Raises: ArchiveError, one line naming the file.
  """
  path = pathlib.Path(path)
  try:
    return _read_folder(path) if path.is_dir() else _read_file(path)
  except ArchiveError:
    raise
  except OSError as error:
    raise ArchiveError(f"{error.filename or path}: {error.strerror or error}") from error
  except unpickle.PickleError as error:
    raise ArchiveError(f"{path}: {error}") from error
  except Exception as error:  # whatever zipfile, json or numpy make of damaged bytes
    reason = f"{type(error).__name__}: {error}"
    raise ArchiveError(f"{path}: damaged ({reason}); get the file again") from error


def release(array: np.ndarray) -> None:
  """Gives the memory of the file's pages back; the array stays good, a next use reads them again.

  A mapped page that was read counts as the process's own until then. Nothing on arrays that are
  not from `read`, or where the system has no such call.
  """
  owner: Any = array
  while owner is not None and not isinstance(owner, mmap.mmap):
    owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
  if owner is not None and hasattr(mmap, "MADV_DONTNEED"):
    owner.madvise(mmap.MADV_DONTNEED)


def _read_file(path: pathlib.Path) -> Tensors:
  with path.open("rb") as file:
    size = file.seek(0, 2)
    if size < 8:
      raise ArchiveError(f"{path}: {size} bytes are no weights")
    data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
  if data[:4] == b"PK\x03\x04":
    return _read_zip(path, data)
  if data[8:9] == b"{":
    return Tensors(path, "safetensors", _safetensors(path, data))
  if data[:1] == b"\x80":
    raise ArchiveError(
      f"{path}: a bare pickle (torch.save before version 1.6), which is not read: load it with "
      "torch and save it again as safetensors"
    )
  raise ArchiveError(f"{path}: neither a PyTorch archive nor safetensors nor npz")


def _read_folder(folder: pathlib.Path) -> Tensors:
  index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
  if not single.is_file() and not index.is_file():
    torch_only = " (its .bin: save it again with safe_serialization=True)"
    has = any(folder.glob("pytorch_model*.bin"))
    raise ArchiveError(f"{folder}: no model.safetensors in it{torch_only if has else ''}")
  if single.is_file():
    return _read_file(single)
  if index.stat().st_size > _MAX_INDEX_BYTES:
    raise ArchiveError(f"{index}: over {_MAX_INDEX_BYTES:,} bytes, which no index of weights has")
  try:
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    shards = sorted(set(names.values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ArchiveError(f"{index}: not an index of safetensors ({error})") from error
  if not all(isinstance(s, str) and "/" not in s and s.endswith(".safetensors") for s in shards):
    raise ArchiveError(f"{index}: names files outside its folder, or of another kind")
  arrays: dict[str, np.ndarray] = {}
  for shard in shards:
    for name, array in _read_file(folder / shard).arrays.items():
      if names.get(name) != shard:
        raise ArchiveError(f"{folder / shard}: holds {name!r}, which the index puts elsewhere")
      arrays[name] = array
  missing = sorted(set(names) - set(arrays))
  if missing:
    raise ArchiveError(f"{index}: promises {missing[0]!r}, which its files do not hold")
  return Tensors(folder, "safetensors", arrays)


def _safetensors(path: pathlib.Path, data: memoryview) -> dict[str, np.ndarray]:
  length = struct.unpack("<Q", data[:8])[0]
  if length > len(data) - 8:
    raise ArchiveError(
      f"{path}: claims a header of {length:,} bytes in a file of {len(data):,}: cut off or damaged"
    )
  if length > _MAX_HEADER_BYTES:
    raise ArchiveError(
      f"{path}: a header of {length:,} bytes, over the {_MAX_HEADER_BYTES:,} that are read"
    )
  body = data[8 + length :]
  arrays: dict[str, np.ndarray] = {}
  ranges: list[tuple[int, int, str]] = []
  for name, text in _entries(path, data[8 : 8 + length]):
    if name in arrays:
      raise ArchiveError(f"{path}: its header has a name twice ({name!r})")
    try:
      entry = json.loads(text.decode(), object_pairs_hook=_no_twins)
      dtype = np.dtype(_SAFETENSORS[entry["dtype"]])
      shape, (start, end) = entry["shape"], entry["data_offsets"]
      whole = [start, end, *shape]
      if not all(type(n) is int and n >= 0 for n in whole) or len(shape) > 32:
        raise ValueError("its shape or offsets are no such things")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
      raise ArchiveError(f"{path}: {name!r} is not described as a tensor ({error!r})") from error
    wanted = math.prod(shape) * dtype.itemsize
    if end > len(body) or end - start != wanted:
      raise ArchiveError(
        f"{path}: {name!r} takes bytes {start:,} to {end:,} of {len(body):,} for {wanted:,}: cut "
        "off or damaged; get the file again"
      )
    ranges.append((start, end, name))
    arrays[name] = np.ndarray(shape, dtype, body, start)
  ranges.sort()
  for (_, end, name), (start, _, after) in itertools.pairwise(ranges):
    if start < end:
      raise ArchiveError(f"{path}: {name!r} and {after!r} share bytes: damaged")
  return arrays


def _entries(path: pathlib.Path, header: memoryview) -> Iterator[tuple[str, bytes]]:
  """Names of tensors and what describes them, one at a time.

  They are found in the mapped file: a million tensors, or a list of a million lists where a shape
  should be, become no objects. The metadata is passed over; nothing here needs it.
  Raises: ArchiveError on what is no header, or has too many.
  """
  at, count, metadata, more = 1, 0, False, b","  # after the first {
  if _NOTHING.fullmatch(header, at):
    return
  while more == b",":
    if not metadata and (found := _METADATA.match(header, at)):
      metadata = True
    elif (found := _ENTRY.match(header, at)) and found[1] != b"__metadata__":
      if (count := count + 1) > _MAX_TENSORS:
        raise ArchiveError(f"{path}: over {_MAX_TENSORS:,} tensors, which no weights have")
      yield found[1].decode(), found[2]
    else:
      raise ArchiveError(f"{path}: its header is not JSON of tensors (at its byte {at:,})")
    at, more = found.end(), found[found.lastindex or 0]
  if at != len(header):
    raise ArchiveError(f"{path}: its header goes on after its end (at its byte {at:,})")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  if len({name for name, _ in pairs}) != len(pairs):
    raise ValueError("a name twice")
  return dict(pairs)


def _read_zip(path: pathlib.Path, data: memoryview) -> Tensors:
  members = _members(path, data)
  if members and all(name.endswith(".npy") for name in members):
    arrays = {n.removesuffix(".npy"): _npy(path, n, view) for n, view in members.items()}
    return Tensors(path, "npz", arrays)
  pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
  if len(pickles) != 1:
    raise ArchiveError(f"{path}: a zip archive, but not of PyTorch (no data.pkl) nor of NumPy")
  root = pickles[0].removesuffix("data.pkl")
  if len(members[pickles[0]]) > _MAX_PICKLE_BYTES:
    raise ArchiveError(f"{path}: its data.pkl has over {_MAX_PICKLE_BYTES:,} bytes")
  order = bytes(members.get(root + "byteorder", b"little"))
  if order != b"little":
    raise ArchiveError(f"{path}: byte order {order[:20]!r}, only little is read")
  tree = unpickle.load(bytes(members[pickles[0]]))
  script = isinstance(tree, unpickle.Record)
  if not script and isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
    tree = tree["state_dict"]  # a training checkpoint
  tensors, facts, classes = unpickle.named_tensors(tree)
  if not tensors:
    raise ArchiveError(f"{path}: no tensors in it")
  arrays = {n: _view(path, n, tensor, members, root) for n, tensor in tensors.items()}
  facts = {**facts, "classes": sorted(set(classes))} if script else facts
  return Tensors(path, "torchscript" if script else "torch", arrays, facts)


def _members(path: pathlib.Path, data: memoryview) -> dict[str, memoryview]:
  """The uncompressed records of a zip archive as views (TorchScript compresses its code only).

  Raises: ArchiveError on an odd one, or on a compressed one that would hold arrays.
  """
  members: dict[str, memoryview] = {}
  with zipfile.ZipFile(path) as archive:
    for info in archive.infolist():
      header = bytes(data[info.header_offset : info.header_offset + 30])
      if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ArchiveError(f"{path}: record {info.filename!r} is not where the directory says")
      start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
      view = data[start : start + info.file_size]
      if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        if info.filename.endswith((".npy", "data.pkl")) or "/data/" in info.filename:
          raise ArchiveError(
            f"{path}: record {info.filename!r} is compressed or encrypted: save it anew without "
            "(np.savez, torch.save)"
          )
        continue
      if len(view) != info.file_size or info.filename in members:
        raise ArchiveError(f"{path}: record {info.filename!r} is cut off, or there twice")
      members[info.filename] = view
  return members


def _view(
  path: pathlib.Path,
  name: str,
  tensor: unpickle.Tensor,
  members: dict[str, memoryview],
  root: str,
) -> np.ndarray:
  """The tensor's numbers in its storage's record, every bound checked."""
  storage = tensor.storage
  record = members.get(f"{root}data/{storage.key}")
  if storage.kind not in _STORAGES:
    raise ArchiveError(f"{path}: {name!r} is of {storage.kind}, which is not read")
  dtype = np.dtype(_STORAGES[storage.kind])
  if record is None or len(record) != storage.numel * dtype.itemsize:
    found = "missing" if record is None else f"{len(record):,} bytes"
    raise ArchiveError(
      f"{path}: the storage of {name!r} is {found}, not {storage.numel:,} numbers of {dtype}"
    )
  if len(tensor.shape) != len(tensor.strides) or len(tensor.shape) > 32:
    raise ArchiveError(f"{path}: {name!r} has shape {tensor.shape} and strides {tensor.strides}")
  count = math.prod(tensor.shape)
  pairs = zip(tensor.shape, tensor.strides, strict=True)
  last = tensor.offset + sum((n - 1) * stride for n, stride in pairs)
  if count and (last >= storage.numel or count > storage.numel):
    raise ArchiveError(
      f"{path}: {name!r} of shape {tensor.shape} reaches past its storage of {storage.numel:,}"
    )
  if count == 0:
    return np.frombuffer(b"", dtype).reshape(tensor.shape)
  flat = np.frombuffer(record, dtype)
  strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
  return np.lib.stride_tricks.as_strided(
    flat[tensor.offset :], tensor.shape, strides, writeable=False
  )


def _npy(path: pathlib.Path, name: str, view: memoryview) -> np.ndarray:
  head = io.BytesIO(bytes(view[:20_000]))
  try:
    version = np.lib.format.read_magic(head)
    reader = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, fortran, dtype = reader[version](head)
    wanted = math.prod(shape) * dtype.itemsize
  except (ValueError, KeyError, TypeError, SyntaxError, OverflowError) as error:
    raise ArchiveError(f"{path}: {name} is not a NumPy array ({error})") from error
  if dtype.hasobject:
    raise ArchiveError(f"{path}: {name} holds Python objects, which are not read")
  body = view[head.tell() :]
  if len(body) != wanted:
    raise ArchiveError(f"{path}: {name} has {len(body):,} bytes for {wanted:,}: cut off or damaged")
  if dtype == np.dtype("V2"):  # NumPy's way to write bfloat16
    dtype = np.dtype(ml_dtypes.bfloat16)
  return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")
