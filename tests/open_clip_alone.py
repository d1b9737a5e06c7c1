"""open_clip's modules without its package, whose own start imports torchvision: an oracle."""

import importlib
import importlib.util
import pathlib
import sys
import types


def module(name: str) -> types.ModuleType:
  """open_clip's module of that name; what it takes from torchvision is a stand-in never called."""
  package_name = "open_clip_alone_package"
  if package_name not in sys.modules:
    found = importlib.util.find_spec("open_clip")
    package = types.ModuleType(package_name)
    package.__path__ = [str(pathlib.Path(found.origin).parent)]
    sys.modules[package_name] = package
    if importlib.util.find_spec("torchvision") is None:
      for stub in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
        sys.modules[stub] = types.ModuleType(stub)
        sys.modules[stub].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})
  return importlib.import_module(f"{package_name}.{name}")
