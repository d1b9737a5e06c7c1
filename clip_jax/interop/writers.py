"""What other frameworks read, written without them: safetensors, PyTorch's archive, JSON."""

import contextlib
import json
import math
import pathlib
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from clip_jax.interop.architecture import WeightsError


@contextlib.contextmanager
def whole(dest: pathlib.Path, file: bool = False) -> Iterator[pathlib.Path]:
  """A new folder to write into, which becomes `dest` when all went well, and else goes away.

  With `file`, the file of that name within it becomes `dest`.
  Raises: WeightsError when `dest` is there already (an empty folder may be) or cannot be written.
  """
  if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
    raise WeightsError(f"{dest}: is there already; give a new name")
  unfinished: pathlib.Path | None = None
  try:
    dest.parent.mkdir(parents=True, exist_ok=True)
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    yield unfinished
    for path in (unfinished, *unfinished.rglob("*")):  # some writers keep theirs to themselves
      path.chmod(0o755 if path.is_dir() else 0o644)
    (unfinished / dest.name if file else unfinished).rename(dest)
  except OSError as error:
    raise WeightsError(f"{dest}: cannot be written ({error.strerror or error})") from error
  finally:
    if unfinished is not None:
      shutil.rmtree(unfinished, ignore_errors=True)


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
