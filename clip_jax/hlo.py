"""The HLO text of a compiled program, read: its computations, and how often each one runs.

XLA's own cost analysis counts the body of a loop once, however often it runs; the text says both.
"""

import collections
import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

_BYTES = {
  "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
  "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_MOST_TRIPS = 2**20
_COMPARED: dict[str, Callable[[int, int], bool]] = {
  "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge,
  "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip
_SAME = ("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape")
_COMPUTED: dict[str, Callable[..., int]] = {
  "add": operator.add, "subtract": operator.sub, "multiply": operator.mul,
  **dict.fromkeys(_SAME, lambda x: x),
}  # fmt: skip
_CALLED = re.compile(
  r"(?:calls|to_apply|body|branch_computations|true_computation|false_computation|"
  r"called_computations)=\{?([^,}]*(?:, %[^,}]*)*)"
)


class HloError(ValueError):
  """A form of HLO text that this reader does not know: where, and what it says."""


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line; `operands` are names in the same computation."""

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str


class Computation(dict[str, Instruction]):
  """Instructions by name, in order; `root` is the last word of it."""

  root: Instruction


@dataclasses.dataclass(frozen=True)
class Module:
  """A whole program, as one of its `devices` runs it."""

  computations: dict[str, Computation]
  runs: dict[str, int]  # how often each computation runs that does; of a conditional, all branches
  devices: int

  @functools.cached_property
  def fused(self) -> set[str]:
    """Computations inside fusions and reductions: their arrays need not be in memory."""
    out = set()
    for computation in self.computations.values():
      for instruction in computation.values():
        if instruction.opcode not in ("while", "conditional", "call", "async-start"):
          out.update(called_by(instruction))
    return out


def parse(text: str) -> Module:
  """Args: text, `compiled.as_text()`, of any backend. Raises: HloError."""
  computations: dict[str, Computation] = {}
  entry = ""
  current = Computation()
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations[header[2]] = Computation()
      entry = header[2] if header[1] else entry
    elif line.startswith("  ") and " = " in line:
      instruction = instruction_of(line)
      current[instruction.name] = instruction
      if line.lstrip().startswith("ROOT "):
        current.root = instruction
  if not entry:
    raise HloError(f"no ENTRY computation in {text[:80]!r}")
  counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", text.split("\n", 1)[0])
  return Module(computations, _runs(computations, entry), math.prod(map(int, counts)))


def instruction_of(line: str) -> Instruction:
  """The instruction on a line of text."""
  name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
  end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode, rest = rest.split("(", 1)
  close = _closing("(" + rest) - 1
  operands = tuple(re.findall(r"%([\w.\-]+)", rest[:close]))
  # of these, a number stands where others have operands
  numbered = opcode in ("constant", "parameter")
  attributes = rest[: close + 1] if numbered else rest[close + 1 :]
  return Instruction(name.lstrip("%"), shape, opcode, operands, attributes)


def _closing(text: str) -> int:
  """Where the parenthesis that opens `text` closes."""
  depth = 0
  for place, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return place
  raise HloError(f"no closing parenthesis in {text[:80]!r}")


def _runs(computations: dict[str, Computation], entry: str) -> dict[str, int]:
  runs: dict[str, int] = collections.defaultdict(int)

  def visit(name: str, times: int) -> None:
    runs[name] += times
    for instruction in computations[name].values():
      loop = instruction.opcode == "while"
      trips = _trips(instruction, computations[name], computations) if loop else 1
      for called in called_by(instruction):
        visit(called, times * trips)

  visit(entry, 1)
  return dict(runs)


def called_by(instruction: Instruction) -> list[str]:
  """The computations that it runs; of a loop the body."""
  if instruction.opcode in ("async-update", "async-done"):  # the call that async-start began
    return []
  words = [word for group in _CALLED.findall(instruction.attributes) for word in group.split(",")]
  return [word.strip().lstrip("%") for word in words if word.strip()]


def _trips(loop: Instruction, outside: Computation, computations: dict[str, Computation]) -> int:
  """How often a loop runs: what XLA notes, or its counter counted.

  Raises: HloError where neither tells.
  """
  known = re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes)
  if known:
    return int(known[1])
  condition, body = (
    computations[re.findall(rf"\b{part}=%?([\w.\-]+)", loop.attributes)[0]]
    for part in ("condition", "body")
  )
  places = {_index(i) for i in condition.values() if i.opcode == "get-tuple-element"}
  counters: dict[int, int | None] = {}
  start = outside[loop.operands[0]]
  if start.opcode == "tuple" and body.root.opcode == "tuple":
    counters = {k: _integer(start.operands[k], outside, computations, {}) for k in places}
  for trips in range(_MOST_TRIPS):
    going = _integer(condition.root.name, condition, computations, counters)
    if going is None:
      break
    if not going:
      return trips
    counters = {k: _integer(body.root.operands[k], body, computations, counters) for k in places}
  raise HloError(f"{loop.name}: how often this loop runs does not follow from its constants")


def _integer(
  name: str,
  computation: Computation,
  computations: dict[str, Computation],
  given: Mapping[int, int | None],
) -> int | None:
  """The integer that an instruction gives; None where it does not follow from constants.

  Args: given, the counters of a loop by their place in its tuple, or the parameters of a fusion.
  """
  this = computation[name]
  if this.opcode == "constant":
    word = this.attributes.split(")")[0]
    return int(word) if word.lstrip("-").isdigit() else None
  if this.opcode == "parameter":
    return given.get(int(this.attributes.split(")")[0]))
  if this.opcode == "get-tuple-element":
    return given.get(_index(this)) if computation[this.operands[0]].opcode == "parameter" else None
  values = [_integer(o, computation, computations, given) for o in this.operands]
  if this.opcode in ("fusion", "call"):
    inner = computations[called_by(this)[0]]
    return _integer(inner.root.name, inner, computations, dict(enumerate(values)))
  numbers = [value for value in values if value is not None]
  if len(numbers) < len(values) or not numbers:
    return None
  if this.opcode == "compare":
    direction = re.search(r"direction=(\w+)", this.attributes)
    return int(_COMPARED[direction[1]](*numbers)) if direction else None
  return _COMPUTED[this.opcode](*numbers) if this.opcode in _COMPUTED else None


def _index(element: Instruction) -> int:
  """Of a get-tuple-element."""
  return int(element.attributes.partition("index=")[2].split(",")[0])


def arrays(shape: str) -> list[tuple[str, list[int], str]]:
  """(dtype, sizes, layout) of each array in a shape or tuple of them."""
  found = _ARRAY.findall(shape)
  return [
    (dtype, [int(n) for n in sizes.split(",") if n], layout) for dtype, sizes, layout in found
  ]


def size(shape: str) -> int:
  """Bytes of the values."""
  return sum(_BYTES.get(dtype, 0) * math.prod(sizes) for dtype, sizes, _ in arrays(shape))


class Buffer(NamedTuple):
  """Where one array lies: how many bytes it takes, and whether in a device's main memory."""

  bytes: int
  in_hbm: bool  # otherwise in a TPU's vector memory `S(1)`, or another space that it names

  @property
  def hbm_bytes(self) -> int:
    return self.bytes if self.in_hbm else 0


def buffers(shape: str) -> list[Buffer]:
  """Of each array in a shape. A TPU fills up arrays to whole tiles, as in `{1,0:T(8,128)}`."""
  out = []
  for dtype, sizes, layout in arrays(shape):
    order, _, rest = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", rest)
    if tile:
      sizes = [sizes[int(axis)] for axis in order.split(",") if axis]  # the innermost first
      for place, step in enumerate(map(int, reversed(tile[1].split(",")))):
        if place < len(sizes):
          sizes[place] = -(-sizes[place] // step) * step
    out.append(Buffer(_BYTES.get(dtype, 0) * math.prod(sizes), "S(" not in rest))
  return out
