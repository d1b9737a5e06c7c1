"""A pickle reader that makes tensors' descriptions, containers, numbers and strings: nothing else.

It runs the standard library's pure-Python machine on a short list of opcodes and of globals. None
of these is looked up: each name stands for an inert stand-in. All else is refused by name.
"""

import collections
import dataclasses
import io
import pickle
import pickletools
from typing import Any, ClassVar

_OPCODES = """
  PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
  SHORT_BINUNICODE EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS
  SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE FRAME GLOBAL STACK_GLOBAL REDUCE
  NEWOBJ BUILD BINPERSID
""".split()  # noqa: SIM905
_LONGEST_NAME = 1000  # characters
_MOST_VISITS, _MOST_CHARACTERS = 200_000, 5_000_000  # of objects in a tree, and their names
_NAMES = {ord(op.code): op.name for op in pickletools.opcodes}


class PickleError(ValueError):
  """A pickle that is damaged, or wants something that is not on the lists."""


@dataclasses.dataclass(frozen=True)
class Storage:
  """What a persistent id says: numbers of one type, in the record of that key."""

  kind: str  # "FloatStorage"
  key: str
  numel: int


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A view into a storage, as `torch._utils._rebuild_tensor_v2` is told; all in elements."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class Record:
  """An object of a TorchScript class: its attributes, and no behaviour."""

  class_name = ""


class _Ordered(dict[Any, Any]):
  """Stands for collections.OrderedDict; takes attributes, as a state dict's `_metadata`."""


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
  numbers = [offset, *shape, *strides]
  if not isinstance(storage, Storage) or not all(type(n) is int and n >= 0 for n in numbers):
    raise PickleError("a tensor whose storage, offset, shape or strides are no such things")
  return Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *_: Any) -> Any:
  return tensor


def _ordered(*arguments: Any) -> _Ordered:
  if arguments:
    raise PickleError("an OrderedDict made from arguments")
  return _Ordered()


def _shape(numbers: Any = ()) -> tuple[Any, ...]:
  return tuple(numbers)


_GLOBALS: dict[tuple[str, str], Any] = {
  ("torch._utils", "_rebuild_tensor_v2"): _tensor,
  ("torch._utils", "_rebuild_parameter"): _parameter,
  ("collections", "OrderedDict"): _ordered,
  ("torch", "Size"): _shape,
  ("torch.jit._pickle", "build_intlist"): _parameter,
  ("torch.jit._pickle", "build_doublelist"): _parameter,
  ("torch.jit._pickle", "build_boollist"): _parameter,
  ("torch.jit._pickle", "build_tensorlist"): _parameter,
  ("torch.jit._pickle", "restore_type_tag"): _parameter,
}


class _Machine(pickle._Unpickler):  # the pure-Python one
  dispatch: ClassVar[dict[int, Any]] = {
    code: handler
    for code, handler in pickle._Unpickler.dispatch.items()
    if _NAMES.get(code) in _OPCODES
  }

  def load_build(self) -> None:
    stack = self.stack  # type: ignore[attr-defined]
    if len(stack) < 2 or not isinstance(stack[-2], (Record, _Ordered)):
      raise PickleError("it sets the state of something that has none")
    super().load_build()  # type: ignore[misc]

  def load_setitem(self) -> None:
    self._check_keys(self.stack[-2:-1])  # type: ignore[attr-defined]
    super().load_setitem()  # type: ignore[misc]

  def load_setitems(self) -> None:
    self._check_keys(self.stack[::2])  # type: ignore[attr-defined]
    super().load_setitems()  # type: ignore[misc]

  def _check_keys(self, keys: list[Any]) -> None:
    """Before one is hashed: a tuple of tuples, each there twice, would take for ever."""
    for key in keys:
      if type(key) not in (str, int) or (type(key) is str and len(key) > _LONGEST_NAME):
        raise PickleError(f"a key that is no name or number ({type(key).__name__})")

  dispatch |= {ord("b"): load_build, ord("s"): load_setitem, ord("u"): load_setitems}

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) in _GLOBALS:
      return _GLOBALS[module, name]
    if module == "torch" and name.endswith("Storage"):
      return name
    if module == "__torch__" or module.startswith("__torch__."):
      return type("TorchScript", (Record,), {"class_name": f"{module}.{name}"})
    raise PickleError(f"it asks for {module}.{name}, which weights do not need: not executed")

  def persistent_load(self, pid: Any) -> Storage:
    if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
      raise PickleError("a persistent id that is no storage")  # not shown: it may be endless
    _, kind, key, _, numel = pid
    if not (isinstance(kind, str) and isinstance(key, str) and type(numel) is int and numel >= 0):
      raise PickleError("a storage whose type, key or size is none")
    return Storage(kind, key, numel)


def load(data: bytes) -> Any:
  """What the pickle holds. Raises: PickleError; nothing in it is ever executed."""
  machine = _Machine(io.BytesIO(data))
  try:
    return machine.load()
  except PickleError:
    raise
  except KeyError as error:
    code = error.args[0] if error.args else None
    name = _NAMES.get(code, "") if isinstance(code, int) else ""
    if name and name not in _OPCODES:
      raise PickleError(f"it uses the opcode {name}, which weights do not need") from None
    raise PickleError("damaged: an opcode or memo entry that does not exist") from None
  except Exception as error:  # whatever a damaged pickle makes of the machine's stack
    raise PickleError(f"damaged ({type(error).__name__}: {str(error)[:100]})") from error


def named_tensors(root: Any) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
  """A state dict or a tree of records -> tensors and plain values by dotted name, and class names.

  Raises: PickleError on a tree that is too deep or too large, or has the same name twice.
  """
  tensors: dict[str, Tensor] = {}
  facts: dict[str, Any] = {}
  classes: list[str] = []
  stack: collections.deque[tuple[str, Any, int]] = collections.deque([("", root, 0)])
  visits = characters = 0
  while stack:
    prefix, value, depth = stack.popleft()
    if depth > 30:
      raise PickleError("its objects hold one another too deep")
    if isinstance(value, Record):
      classes.append(type(value).class_name)
      value = vars(value)
    if isinstance(value, Tensor):
      if prefix in tensors:
        raise PickleError(f"{prefix!r} is there twice")
      tensors[prefix] = value
    elif isinstance(value, dict):
      for key, inner in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        visits, characters = visits + 1, characters + len(name)
        if visits > _MOST_VISITS or characters > _MOST_CHARACTERS:
          raise PickleError("its objects hold one another too often")
        stack.append((name, inner, depth + 1))
    elif isinstance(value, (int, float, str, bool)):
      facts[prefix] = value
  return tensors, facts, classes
