"""open_clip's modules without its package, whose own start imports torchvision: an oracle."""

import importlib
import importlib.util
import pathlib
import sys
import types
from unittest import mock

_PACKAGE = "open_clip_alone_package"


def module(name: str) -> types.ModuleType:
  """open_clip's module of that name; what it takes from torchvision is a stand-in never called.

  The stand-in is there during the import only: other libraries ask whether torchvision is.
  """
  if _PACKAGE not in sys.modules:
    found = importlib.util.find_spec("open_clip")
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(pathlib.Path(found.origin).parent)]
    sys.modules[_PACKAGE] = package
  # None: not to be found. transformers, which open_clip can do without, would ask for torchvision.
  stubs: dict[str, types.ModuleType | None] = {"transformers": None}
  if importlib.util.find_spec("torchvision") is None:
    for stub in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
      stubs[stub] = types.ModuleType(stub)
      stubs[stub].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})
  with mock.patch.dict(sys.modules, stubs):
    before = set(sys.modules)
    found = importlib.import_module(f"{_PACKAGE}.{name}")
    imported = {key: sys.modules[key] for key in set(sys.modules) - before}
  sys.modules.update(imported)  # which the end of the patch takes away
  return found
