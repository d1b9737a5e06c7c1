"""What `verify` asks open_clip itself; torchvision, by which it resizes pictures, is a stub."""

import importlib.abc
import importlib.machinery
import json
import sys
import types

import pytest
import test_exports

from clip_jax import cli
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.interop import architecture, exports, sources, verify


class _Stub(types.ModuleType):
  """A module in which every name is a class that does nothing."""

  __path__: list[str] = []  # noqa: RUF012
  __version__ = "0"

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)
    if name == "InterpolationMode":
      return types.SimpleNamespace(BICUBIC="bicubic", BILINEAR="bilinear", NEAREST="nearest")
    return type(name, (), {"__init__": lambda *_, **__: None, "__call__": lambda _, x: x})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  def find_spec(self, name, path, target=None):
    if name.split(".")[0] == "torchvision":
      return importlib.machinery.ModuleSpec(name, self, is_package=True)
    return None

  def create_module(self, spec):
    return _Stub(spec.name)

  def exec_module(self, module):
    pass


@pytest.fixture
def open_clip(monkeypatch):
  """open_clip, imported beside the stub; both are gone afterwards."""
  finder, before = _Finder(), dict(sys.modules)
  sys.meta_path.insert(0, finder)
  monkeypatch.setitem(sys.modules, "transformers", None)  # which would look for torchvision's parts
  yield
  sys.meta_path.remove(finder)
  for name in sys.modules.keys() - before.keys():
    if name.split(".")[0] in ("torchvision", "open_clip"):
      del sys.modules[name]


@pytest.mark.filterwarnings("default")  # theirs to keep
@pytest.mark.parametrize("format", ["open_clip", "openai"])
def test_the_frameworks_own_difference(tmp_path, open_clip, capsys, format):
  config = architecture.from_open_clip_config(test_exports.CONFIGS["wide"])
  model, dest = test_exports._clip(config, tokenizer_lib.original()), tmp_path / "out.pt"
  exports.export(model, dest, format)
  own, theirs = verify.compare(model, dest, format)
  assert theirs.runtime == "open_clip 3.3.0"
  assert theirs.agrees, str(theirs)
  print(format, theirs)
  sources.save(model, tmp_path / "ours")
  words = ["export", str(tmp_path / "ours"), str(tmp_path / "again.pt"), "--format", format]
  assert cli.main([*words, "--json"]) == 0
  read = json.loads(capsys.readouterr().out.splitlines()[-1])["read_back"]
  assert [each["runtime"] for each in read] == ["clip_jax", "open_clip 3.3.0"]
  assert own.agrees
