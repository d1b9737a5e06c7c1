"""Reading weights' files: what torch and NumPy wrote comes back, what is hostile is refused."""

import contextlib
import functools
import io
import json
import os
import pickle
import random
import struct
import time
import tracemalloc
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.interop import archive, unpickle


def _state():
  generator = torch.Generator().manual_seed(0)
  base = torch.randn(6, 8, generator=generator)
  return {
    "a.weight": base,
    "a.transposed": base.T,
    "a.part": base[1:4, 2:],
    "half": base.half(),
    "brain": base.bfloat16(),
    "long": torch.arange(5),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "parameter": torch.nn.Parameter(base[0]),
  }


def _equal(array, tensor):
  assert array.shape == tuple(tensor.shape)
  if tensor.dtype == torch.bfloat16:
    assert array.dtype == ml_dtypes.bfloat16
    array, tensor = array.astype(np.float32), tensor.float()
  np.testing.assert_array_equal(array, tensor.detach().numpy())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
def test_what_torch_saved(tmp_path, wrap):
  torch.save(wrap(_state()), tmp_path / "w.pt")
  found = archive.read(tmp_path / "w.pt")
  assert found.format == "torch"
  assert found.arrays.keys() == _state().keys()
  for name, tensor in _state().items():
    _equal(found.arrays[name], tensor)
    assert not found.arrays[name].flags.writeable


class Inner(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.dense = torch.nn.Linear(4, 3)
    self.norm = torch.nn.BatchNorm2d(3)

  def forward(self, x):
    return self.dense(x)


class Outer(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.visual = Inner()
    self.blocks = torch.nn.Sequential(Inner(), Inner())
    self.scale = torch.nn.Parameter(torch.tensor(0.5))
    self.register_buffer("size", torch.tensor(224))
    self.width = 12

  def forward(self, x):
    return self.visual(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_torchscript_archive(tmp_path):
  module = Outer().half()
  torch.jit.script(module).save(str(tmp_path / "w.pt"))
  found = archive.read(tmp_path / "w.pt")
  assert found.format == "torchscript"
  state = module.state_dict()
  assert found.arrays.keys() == state.keys()
  for name, tensor in state.items():
    _equal(found.arrays[name], tensor)
  assert any("Outer" in name for name in found.facts["classes"])


def _safetensors(arrays, metadata=None):
  header, body = {}, b""
  if metadata:
    header["__metadata__"] = metadata
  names = {"float32": "F32", "float16": "F16", "int64": "I64", "bfloat16": "BF16"}
  for name, array in arrays.items():
    data = array.tobytes()
    header[name] = {
      "dtype": names[array.dtype.name],
      "shape": list(array.shape),
      "data_offsets": [len(body), len(body) + len(data)],
    }
    body += data
  text = json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + body


ARRAYS = {
  "a": np.arange(6, dtype=np.float32).reshape(2, 3),
  "b": np.arange(4, dtype=np.float16),
  "c": np.array(3, np.int64),
  "d": np.arange(3).astype(ml_dtypes.bfloat16),
}


def test_safetensors(tmp_path):
  (tmp_path / "w.bin").write_bytes(_safetensors(ARRAYS, {"format": "pt"}))  # told by content
  found = archive.read(tmp_path / "w.bin")
  assert found.format == "safetensors"
  for name, array in ARRAYS.items():
    np.testing.assert_array_equal(found.arrays[name], array)
    assert found.arrays[name].dtype == array.dtype


def test_safetensors_in_shards(tmp_path):
  parts = {"m-1.safetensors": ["a", "b"], "m-2.safetensors": ["c", "d"]}
  for file, names in parts.items():
    (tmp_path / file).write_bytes(_safetensors({n: ARRAYS[n] for n in names}))
  index = {n: file for file, names in parts.items() for n in names}
  path = tmp_path / "model.safetensors.index.json"
  path.write_text(json.dumps({"weight_map": index}))
  assert archive.read(tmp_path).arrays.keys() == ARRAYS.keys()
  path.write_text(json.dumps({"weight_map": {**index, "e": "m-2.safetensors"}}))
  with pytest.raises(archive.ArchiveError, match="promises 'e'"):
    archive.read(tmp_path)
  path.write_text(json.dumps({"weight_map": {**index, "e": "../x.safetensors"}}))
  with pytest.raises(archive.ArchiveError, match="outside its folder"):
    archive.read(tmp_path)


def test_npz(tmp_path):
  arrays = {"params/a": ARRAYS["a"], "params/f": np.asfortranarray(ARRAYS["a"]), "s": ARRAYS["c"]}
  np.savez(tmp_path / "w.npz", **arrays, brain=ARRAYS["d"].view("V2"))
  found = archive.read(tmp_path / "w.npz")
  assert found.format == "npz"
  for name, array in arrays.items():
    np.testing.assert_array_equal(found.arrays[name], array)
  np.testing.assert_array_equal(found.arrays["brain"], ARRAYS["d"])
  np.savez(tmp_path / "o.npz", x=np.array([{}], dtype=object))
  with pytest.raises(archive.ArchiveError, match="holds Python objects"):
    archive.read(tmp_path / "o.npz")
  np.savez_compressed(tmp_path / "z.npz", x=np.zeros(10_000_000))
  with pytest.raises(archive.ArchiveError, match="is compressed"):
    archive.read(tmp_path / "z.npz")


def _archive(tmp_path, data, records=None, name="w.pt", order=b"little"):
  with zipfile.ZipFile(tmp_path / name, "w") as file:
    file.writestr("w/data.pkl", data)
    file.writestr("w/byteorder", order)
    file.writestr("w/version", "3\n")
    for key, value in (records or {}).items():
      file.writestr(f"w/data/{key}", value)
  return tmp_path / name


class Evil:
  def __init__(self, call):
    self.call = call

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
  "call",
  [(os.system, ("touch {0}",)), (eval, ("open('{0}', 'w')",)), (pickle.loads, (b"",))],
)
def test_a_pickle_that_calls_is_refused_by_name(tmp_path, call, protocol, drill):
  function, (word,) = call
  word = word.format(tmp_path / "executed") if isinstance(word, str) else word
  data = pickle.dumps({"a": Evil((function, (word,)))}, protocol)
  wanted = function.__name__
  with pytest.raises(archive.ArchiveError, match=rf"asks for \w+\.{wanted}, .* not executed"):
    archive.read(_archive(tmp_path, data))
  executed = (tmp_path / "executed").exists()
  drill(33, payloads=1, run=executed)
  assert not executed


def _tensor_pickle(offset=0, shape=(2, 3), strides=(3, 1), numel=6, kind="FloatStorage", key="0"):
  """What torch.save writes of one tensor, its numbers chosen freely."""

  def short(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()

  def number(n):
    return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

  def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"

  storage = b"(" + short("storage") + f"ctorch\n{kind}\n".encode() + short(key) + short("cpu")
  storage += number(numel) + b"tQ"
  arguments = b"(" + storage + number(offset) + numbers(shape) + numbers(strides)
  arguments += b"\x89ccollections\nOrderedDict\n)Rt"
  rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
  return b"\x80\x02}" + short("w") + rebuilt + b"s."


SIX = np.arange(6, dtype=np.float32)


def test_the_hand_made_pickle_is_a_good_one(tmp_path):
  found = archive.read(_archive(tmp_path, _tensor_pickle(), {"0": SIX.tobytes()}))
  np.testing.assert_array_equal(found.arrays["w"], SIX.reshape(2, 3))
  assert torch.equal(torch.load(tmp_path / "w.pt")["w"], torch.tensor(SIX.reshape(2, 3)))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"offset": 1}, "reaches past its storage"),
    ({"offset": 2**62}, "reaches past its storage"),
    ({"offset": -1}, "are no such things"),
    ({"shape": (2, 2**40)}, "reaches past its storage"),
    ({"shape": (2, 2**40), "strides": (0, 0)}, "reaches past its storage"),
    ({"strides": (-3, 1)}, "are no such things"),
    ({"strides": (2**62, 1)}, "reaches past its storage"),
    ({"shape": (6,)}, r"shape \(6,\) and strides \(3, 1\)"),
    ({"numel": 2**50}, "not 1,125,899,906,842,624 numbers"),
    ({"numel": 7}, "24 bytes, not 7 numbers"),
    ({"key": "1"}, "missing, not 6"),
    ({"key": "../0"}, "missing, not 6"),
    ({"kind": "QInt8Storage"}, "QInt8Storage, which is not read"),
    ({"kind": "DoubleStorage"}, "24 bytes, not 6 numbers of float64"),
  ],
)
def test_tensors_out_of_bounds(tmp_path, changes, message):
  path = _archive(tmp_path, _tensor_pickle(**changes), {"0": SIX.tobytes()})
  with pytest.raises(archive.ArchiveError, match=message):
    archive.read(path)


def test_archives_that_are_odd(tmp_path):
  good = _tensor_pickle()
  records = {"0": SIX.tobytes()}
  with pytest.raises(archive.ArchiveError, match="byte order b'big'"):
    archive.read(_archive(tmp_path, good, records, order=b"big"))
  path = _archive(tmp_path, good, records)
  for size in (10, 60, 200, path.stat().st_size - 30):
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:size])
    with pytest.raises(archive.ArchiveError, match=r"cut\.pt"):
      archive.read(tmp_path / "cut.pt")
  with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
    file.writestr("w/data.pkl", bytes(50_000_000))
  with pytest.raises(archive.ArchiveError, match="is compressed"):
    archive.read(tmp_path / "bomb.pt")
  with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
    file.writestr("w/data/0", SIX.tobytes())
  with pytest.raises(archive.ArchiveError, match="there twice"):
    archive.read(path)
  (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}))
  with pytest.raises(archive.ArchiveError, match="a bare pickle"):
    archive.read(tmp_path / "old.pt")
  (tmp_path / "page.pt").write_text("<html>404</html>")
  with pytest.raises(archive.ArchiveError, match="neither a PyTorch archive"):
    archive.read(tmp_path / "page.pt")
  with pytest.raises(archive.ArchiveError, match="No such file"):
    archive.read(tmp_path / "none.pt")


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"\x80\x02i__main__\nx\n.", "the opcode INST"),
    (b"\x80\x02\x820.", "the opcode EXT1"),
    (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", "sets the state"),
    (b"\x80\x02(((((((", "damaged"),
    (b"\x80\x02h\x09.", "damaged"),
    (b"", "damaged"),
  ],
)
def test_pickles_that_are_odd(data, message):
  with pytest.raises(unpickle.PickleError, match=message):
    unpickle.load(data)


def test_safetensors_that_are_odd(tmp_path):
  path, good = tmp_path / "w.safetensors", _safetensors(ARRAYS)
  huge = struct.pack("<Q", 1 << 40) + good[8:]
  twice = good.replace(b'"b"', b'"a"')
  shared = good.replace(b"[24, 32]", b"[20, 28]")
  past = good.replace(b'"shape": [2, 3]', b'"shape": [9, 3]')
  for data, message in (
    (huge, "claims a header of 1,099,511,627,776 bytes"),
    (twice, "a name twice"),
    (shared, "share bytes"),
    (past, "'a' takes bytes 0 to 24"),
    (good[:-1], "cut off or damaged"),
    (good.replace(b'"F16"', b'"F99"'), "'b' is not described"),
    (good.replace(b'"shape": [4]', b'"shape": -4 '), "'b' is not described"),
  ):
    path.write_bytes(data)
    with pytest.raises(archive.ArchiveError, match=message):
      archive.read(path)


def _of_header(text, body=b""):
  return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
  "text",
  [
    b"{}",
    b"{}        ",
    b'{"__metadata__":{}}',
    b'{ "__metadata__" : { "a \\" b" : "\\u00e4 {}" , "c":"" } \n, "d" :'
    b'{"shape":[ 0 ],"dtype":"F32" ,"data_offsets":[0, 0]}}  ',
    b'{"d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"__metadata__":{"a":"\xc3\xa4"}}',
  ],
)
def test_headers_in_other_words(tmp_path, text):
  """What is JSON of the format is read, however it is written."""
  (tmp_path / "w.safetensors").write_bytes(_of_header(text))
  found = archive.read(tmp_path / "w.safetensors")
  names = json.loads(text).keys() - {"__metadata__"}
  assert found.arrays.keys() == names
  assert all(array.shape == (0,) and array.dtype == np.float32 for array in found.arrays.values())


@pytest.mark.parametrize(
  "text",
  [
    b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}',
    b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}}',
    b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},}',
    b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"shape":[0]}}',
    b'{"a":{"dtype":"F32","shape":' + b"[" * 1900 + b"}}",
    b'{"a\\u0000":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
    b'{"__metadata__":{},"__metadata__":{}}',
    b'{"__metadata__":{"a":{}}}',
    b'{"__metadata__":{"a":"b",}}',
    b'{"__metadata__":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
    b"{[]}",
    b"{,}",
    b"{",
  ],
)
def test_headers_that_are_none(tmp_path, text):
  (tmp_path / "w.safetensors").write_bytes(_of_header(text))
  with pytest.raises(
    archive.ArchiveError, match=r"w\.safetensors: .*(header|described|a name twice)"
  ):
    archive.read(tmp_path / "w.safetensors")


def _of_nothing(count):
  """So many tensors without a number in them, as short as they can be written."""
  entry = '"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
  return b"{" + ",".join(entry % i for i in range(count)).encode() + b"}"


def _filled(start, part, end):
  """A header of 16 MiB less a few bytes, of one part again and again."""
  count = ((16 << 20) - len(start) - len(end)) // len(part)
  return start + part * count + end


HEADERS = {
  "a million tensors": (
    lambda: _of_nothing(1_000_000),
    "a header of 55,930,097 bytes, over the 16,777,216",
  ),
  "too many in 16 MiB": (lambda: _of_nothing(300_000), "over 20,000 tensors"),
  "one too many": (lambda: _of_nothing(20_001), "over 20,000 tensors"),
  "as many as may be": (lambda: _of_nothing(20_000), None),
  "metadata": (lambda: _filled(b'{"__metadata__":{', b'"":"",', b'"":""}}'), None),
  "one long text": (lambda: _filled(b'{"__metadata__":{"a":"', "ä😀".encode(), b'"}}'), None),
  "lists": (lambda: _filled(b'{"a":{"shape":[', b"[],", b"[]]}}"), "not JSON of tensors"),
  "objects": (lambda: _filled(b'{"a":[', b"{},", b"{}]}"), "not JSON of tensors"),
  "depth": (lambda: _filled(b'{"a":', b'{"a":', b"1"), "not JSON of tensors"),
  "a name": (lambda: _filled(b'{"', b"a", b'":{}}'), "not JSON of tensors"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_takes_no_more_than_twice_its_file(tmp_path, name):
  """And seconds at most. The descriptions of 20,000 arrays are there besides."""
  text, message = HEADERS[name][0](), HEADERS[name][1]
  path = tmp_path / "w.safetensors"
  path.write_bytes(_of_header(text))
  size, began = path.stat().st_size, time.process_time()
  del text
  tracemalloc.start()
  try:
    if message is None:
      archive.read(path)
    else:
      with pytest.raises(archive.ArchiveError, match=message):
        archive.read(path)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  print(f"{size:,} bytes: {peak:,} at most")
  assert peak < 2 * size + 20_000 * 800
  assert time.process_time() - began < 5


def test_an_index_of_shards_is_a_small_file(tmp_path):
  path = tmp_path / "model.safetensors.index.json"
  path.write_bytes(b"[" + b"[]," * (2 << 20) + b"[]]")
  with pytest.raises(archive.ArchiveError, match="over 4,194,304 bytes, which no index"):
    archive.read(tmp_path)


class Tower(torch.nn.Module):
  """As OpenAI's files: modules within modules, parameters, a buffer."""

  def __init__(self):
    super().__init__()
    self.inner = torch.nn.Linear(3, 2)
    self.register_buffer("size", torch.tensor(7))

  def forward(self, x):
    return self.inner(x)


@functools.cache
def scripted() -> bytes:
  file = io.BytesIO()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.jit.save(torch.jit.script(Tower()), file)
  return file.getvalue()


def samples() -> list[bytes]:
  """One good file of each format."""
  torch_file, npz = io.BytesIO(), io.BytesIO()
  torch.save(_state(), torch_file)
  np.savez(npz, **{"params/a": ARRAYS["a"], "params/b": ARRAYS["b"]})
  return [torch_file.getvalue(), _safetensors(ARRAYS), npz.getvalue(), scripted()]


SAMPLES = samples()


@settings(max_examples=400, deadline=1000)
@given(st.integers(0, len(SAMPLES) - 1), st.integers(0, 2**32))
def test_mutated_files_are_read_or_refused(tmp_path_factory, which, seed):
  """tools/fuzz_archive.py does the same a hundred thousand times."""
  from tools import fuzz_archive

  path = tmp_path_factory.getbasetemp() / "fuzzed"
  fuzz_archive.one(path, SAMPLES[which], random.Random(seed))


# Pieces of pickles from which a machine of memo entries and containers can be made.
_PIECES = [
  b"K\x01", b"}", b"]", b")", b"(", b"t", b"\x85", b"\x86", b"\x87", b"q\x00", b"q\x01", b"h\x00",
  b"h\x01", b"s", b"u", b"a", b"e", b"Q", b"R", b"b", b"\x81", b"N", b"\x88", b"X\x01\x00\x00\x00a",
  b"X\x07\x00\x00\x00storage", b"ccollections\nOrderedDict\n", b"c__torch__.A\nB\n",
  b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"\x94",
]  # fmt: skip


@settings(max_examples=600, deadline=1000)
@given(st.lists(st.sampled_from(_PIECES), max_size=120), st.integers(0, 40))
def test_any_sequence_of_allowed_opcodes_ends(pieces, doublings):
  """Also with a last object made of itself, twice a time: the deadline and the memory are small."""
  doubled = b"".join(b"q\x02h\x02\x86" for _ in range(doublings))
  for tail in (b"", doubled, doubled + b"Q", b"}" + doubled + b"K\x01s"):
    with contextlib.suppress(unpickle.PickleError):
      unpickle.named_tensors(unpickle.load(b"\x80\x02" + b"".join(pieces) + tail + b"."))


def test_dictionaries_that_hold_one_another_twice_are_refused():
  both = b"X\x01\x00\x00\x00ah\x00sX\x01\x00\x00\x00bh\x00s"
  levels = b"".join(b"q\x00}" + both for _ in range(28))
  with pytest.raises(unpickle.PickleError, match="hold one another too often"):
    unpickle.named_tensors(unpickle.load(b"\x80\x02}" + levels + b"."))


def _mapped_bytes():
  """Pages of files that this process holds. Source: proc(5)."""
  with open("/proc/self/status") as status:
    return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssFile"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w.npz"])
def test_pages_are_given_back(tmp_path, name):
  array = np.ones((4096, 4096), np.float32)  # 64 MB
  if name == "w.pt":
    torch.save({"a": torch.from_numpy(array)}, tmp_path / name)
  elif name == "w.npz":
    np.savez(tmp_path / name, a=array)
  else:
    (tmp_path / name).write_bytes(_safetensors({"a": array}))
  found = archive.read(tmp_path / name).arrays["a"]
  assert found.sum() == array.size
  before = _mapped_bytes()
  archive.release(found)
  assert _mapped_bytes() < before - 0.8 * array.nbytes
  assert found.sum() == array.size
  archive.release(array)  # not from a file: nothing
