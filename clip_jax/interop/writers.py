"""What other frameworks read, written without them: safetensors, PyTorch's archive, JSON."""

import json
import math
import pathlib
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np


def safetensors(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """One file: the length of a JSON header, the header, the bytes in its order."""
  names = {"float32": "F32", "int64": "I64"}
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, array in arrays.items():
    start, end = end, end + array.nbytes
    header[name] = {
      "dtype": names[array.dtype.name],
      "shape": list(array.shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for array in arrays.values():
      file.write(array.reshape(-1).view(np.uint8).data)


def torch_archive(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """What `torch.load` reads as a dict of tensors: a zip of a pickle and the storages."""
  root, entries = path.stem, []
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    for key, (name, array) in enumerate(arrays.items()):
      entries.append(_string(name) + _tensor(array, str(key)))
    pickle = b"\x80\x02}(" + b"".join(entries) + b"u."  # protocol 2, {, the items, }, stop
    archive.writestr(f"{root}/data.pkl", pickle)
    archive.writestr(f"{root}/byteorder", "little")
    for key, array in enumerate(arrays.values()):
      with archive.open(f"{root}/data/{key}", "w", force_zip64=True) as file:
        file.write(array.reshape(-1).view(np.uint8).data)
    archive.writestr(f"{root}/version", "3\n")


def _tensor(array: np.ndarray, key: str) -> bytes:
  """The opcodes of a call of `_rebuild_tensor_v2` on a storage of its own, rows first."""
  kinds = {"float32": b"FloatStorage", "float16": b"HalfStorage", "int64": b"LongStorage"}
  kind = kinds[array.dtype.name]
  storage = b"(" + _string("storage") + b"ctorch\n" + kind + b"\n" + _string(key)
  storage += _string("cpu") + _number(array.size) + b"tQ"
  strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
  shape = b"(" + b"".join(map(_number, array.shape)) + b"t"
  layout = shape + b"(" + b"".join(map(_number, strides)) + b"t"
  hooks = b"ccollections\nOrderedDict\n)R"
  call = b"ctorch._utils\n_rebuild_tensor_v2\n("
  return call + storage + _number(0) + layout + b"\x89" + hooks + b"tR"


def _string(text: str) -> bytes:
  data = text.encode()
  return b"X" + struct.pack("<I", len(data)) + data


def _number(n: int) -> bytes:
  return b"\x8a\x08" + struct.pack("<q", n)


def json_file(path: pathlib.Path, value: Any) -> None:
  """Indented, UTF-8."""
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
