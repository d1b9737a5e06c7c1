"""What a compiled program does in one run on one device, read from its HLO text.

XLA's own cost analysis counts the body of a loop once, however often it runs, and names no
collectives; the text says both.
"""

import collections
import dataclasses
import functools
import math
import re
from typing import Any

_BYTES = {
  "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
  "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|branch_computations|called_computations)=\{?([^,}]*(?:, %[^,}]*)*)"
)
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
_FREE = {
  "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call",
  "after-all", "partition-id", "replica-id", "iota",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind in one run: `bytes` leave each device, by a ring's arithmetic."""

  kind: str
  count: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class Work:
  """One run of the program on one device."""

  loops: float  # FLOPs of matrix products and convolutions over those with loop bodies counted once
  hbm_bytes: int  # read and written by instructions; an estimate
  collectives: tuple[Collective, ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str


class _Computation(dict[str, _Instruction]):
  """Instructions by name, in order; `root` is the last word of it."""

  root: _Instruction


def work(text: str) -> Work:
  """Args: text, `compiled.as_text()`, of any backend."""
  computations, entry = _parse(text)
  runs = _runs(computations, entry)
  inner = _fused(computations)
  once = sum(_flops(c) for name, c in computations.items() if name in runs)
  total = sum(runs[name] * _flops(c) for name, c in computations.items() if name in runs)
  outer = {name: c for name, c in computations.items() if name in runs and name not in inner}
  traffic = sum(runs[name] * _traffic(c, computations) for name, c in outer.items())
  return Work(total / once if once else 1.0, traffic, _collectives(computations, runs))


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  computations: dict[str, _Computation] = {}
  entry = ""
  current = _Computation()
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations[header[2]] = _Computation()
      entry = header[2] if header[1] else entry
    elif line.startswith("  ") and " = " in line:
      instruction = _instruction(line)
      current[instruction.name] = instruction
      if line.lstrip().startswith("ROOT "):
        current.root = instruction
  return computations, entry


def _instruction(line: str) -> _Instruction:
  name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
  end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode, rest = rest.split("(", 1)
  close = _closing("(" + rest) - 1
  operands = tuple(re.findall(r"%([\w.\-]+)", rest[:close]))
  # of these, a number stands where others have operands
  numbered = opcode in ("constant", "parameter")
  attributes = rest[: close + 1] if numbered else rest[close + 1 :]
  return _Instruction(name.lstrip("%"), shape, opcode, operands, attributes)


def _closing(text: str) -> int:
  """Where the parenthesis that opens `text` closes."""
  depth = 0
  for place, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if depth == 0:
      return place
  raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _runs(computations: dict[str, _Computation], entry: str) -> dict[str, int]:
  """How often each computation runs."""
  runs: dict[str, int] = collections.defaultdict(int)

  def visit(name: str, times: int) -> None:
    runs[name] += times
    for instruction in computations[name].values():
      trips = _trips(instruction, computations) if instruction.opcode == "while" else 1
      for called in _called(instruction):
        visit(called, times * trips)

  visit(entry, 1)
  return dict(runs)


def _called(instruction: _Instruction) -> list[str]:
  words = [word for group in _CALLED.findall(instruction.attributes) for word in group.split(",")]
  return [word.strip().lstrip("%") for word in words if word.strip()]


def _trips(loop: _Instruction, computations: dict[str, _Computation]) -> int:
  """What XLA knows, or the constant with which the condition compares its counter."""
  known = re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes)
  if known:
    return int(known[1])
  condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
  names = [condition[1]] if condition else []
  limits = []
  while names:
    body = computations[names.pop()]
    names += [called for instruction in body.values() for called in _called(instruction)]
    constants = [i for i in body.values() if i.opcode == "constant" and i.shape[1:3] == "32"]
    limits += [int(i.attributes.split(")")[0]) for i in constants]
  return max([limit for limit in limits if limit > 0], default=1)


def _fused(computations: dict[str, _Computation]) -> set[str]:
  """Computations inside fusions and reductions: their arrays need not be in memory."""
  out = set()
  for computation in computations.values():
    for instruction in computation.values():
      if instruction.opcode not in ("while", "conditional", "call", "async-start"):
        out.update(_called(instruction))
  return out


def _arrays(shape: str) -> list[tuple[str, list[int], str]]:
  """(dtype, sizes, layout) of each array in a shape or tuple of them."""
  found = _ARRAY.findall(shape)
  return [
    (dtype, [int(n) for n in sizes.split(",") if n], layout) for dtype, sizes, layout in found
  ]


def _size(shape: str, everywhere: bool = False) -> int:
  """Bytes; without those in a TPU's vector memory (space 1), unless `everywhere`."""
  return sum(
    _BYTES.get(dtype, 0) * math.prod(sizes)
    for dtype, sizes, layout in _arrays(shape)
    if everywhere or "S(1)" not in layout
  )


def _traffic(computation: _Computation, computations: dict[str, _Computation]) -> int:
  """Bytes that the instructions of one computation read and write, once."""
  total = 0
  for instruction in computation.values():
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
      continue
    reads = [_size(computation[o].shape) for o in instruction.operands if o in computation]
    writes = _size(instruction.shape)
    if instruction.opcode == "dynamic-slice":
      reads = [writes]
    elif instruction.opcode == "dynamic-update-slice":
      writes = _size(computation[instruction.operands[1]].shape)
      reads = [writes]
    elif instruction.opcode == "fusion":
      reads, writes = _fusion_traffic(instruction, reads, writes, computations)
    total += sum(reads) + writes
  return total


def _fusion_traffic(
  fusion: _Instruction, reads: list[int], writes: int, computations: dict[str, _Computation]
) -> tuple[list[int], int]:
  """A fusion that slices an operand reads the slice; one that updates in place, the update."""
  inner = computations[_called(fusion)[0]]
  parameters = [i for i in inner.values() if i.opcode == "parameter"]
  parameters.sort(key=lambda i: int(i.attributes.split(")")[0]))
  users = collections.defaultdict(list)
  for instruction in inner.values():
    for place, operand in enumerate(instruction.operands):
      users[operand].append((instruction, place))
  for place, parameter in enumerate(parameters[: len(reads)]):
    uses = users[parameter.name]
    if uses and all(i.opcode == "dynamic-slice" and at == 0 for i, at in uses):
      reads[place] = min(reads[place], sum(_size(i.shape) for i, _ in uses))
    elif uses and all(i.opcode == "dynamic-update-slice" and at == 0 for i, at in uses):
      reads[place] = 0
  for instruction in inner.values():
    if instruction.opcode == "dynamic-update-slice":
      update = inner.get(instruction.operands[1])
      if update is not None:
        writes -= max(0, _size(instruction.shape) - _size(update.shape))
  return reads, max(0, writes)


def _flops(computation: _Computation) -> int:
  """Of the matrix products and convolutions in it, loops counted once."""
  total = 0
  for instruction in computation.values():
    if instruction.opcode == "dot":
      total += _dot_flops(instruction, computation)
    elif instruction.opcode == "convolution":
      total += _convolution_flops(instruction, computation)
  return total


def _dot_flops(dot: _Instruction, computation: _Computation) -> int:
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
  left = _arrays(computation[dot.operands[0]].shape)[0][1]
  dims = [int(d) for d in contracted[1].split(",") if d] if contracted else []
  return 2 * math.prod(_arrays(dot.shape)[0][1]) * math.prod(left[d] for d in dims)


def _convolution_flops(convolution: _Instruction, computation: _Computation) -> int:
  """2 a multiply-add; positions in padding and between dilated inputs are not counted."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
  assert labels is not None
  left, right = (_arrays(computation[o].shape)[0][1] for o in convolution.operands[:2])
  out = _arrays(convolution.shape)[0][1]
  axis = lambda sizes, part, label: sizes[labels[part].index(label)]  # noqa: E731
  window = dict(
    re.findall(
      r"(\w+)=([\w\-]+)", (re.findall(r"window=\{([^}]*)\}", convolution.attributes) or [""])[0]
    )
  )
  total = 2 * axis(out, 3, "b") * axis(out, 3, "f") * axis(right, 2, "i")
  for i, spatial in enumerate(sorted(c for c in labels[3] if c.isdigit())):

    def of(name: str, default: str, i: int = i) -> str:
      return window[name].split("x")[i] if name in window else default

    low = int(of("pad", "0_0").split("_")[0])
    total *= _positions(
      axis(left, 1, spatial), axis(right, 2, spatial), axis(out, 3, spatial),
      int(of("stride", "1")), low, int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1")),
    )  # fmt: skip
  groups = re.search(r"batch_group_count=(\d+)", convolution.attributes)
  return total // int(groups[1]) if groups else total


@functools.cache
def _positions(
  size: int, kernel: int, out: int, stride: int, low: int, dilated: int, kernel_dilated: int
) -> int:
  """Pairs of an output and a kernel position that meet an input, along one axis."""
  found = 0
  for k in range(kernel):
    for o in range(out):
      place = o * stride + k * kernel_dilated - low
      found += 0 <= place < (size - 1) * dilated + 1 and place % dilated == 0
  return found


def _collectives(
  computations: dict[str, _Computation], runs: dict[str, int]
) -> tuple[Collective, ...]:
  """By kind. A TPU cuts one collective into steps between other work, all of one channel."""
  seen: dict[Any, tuple[str, int, int]] = {}
  for name, computation in computations.items():
    for instruction in computation.values():
      kind = instruction.opcode.removesuffix("-start")
      if kind not in _COLLECTIVES or name not in runs:
        continue
      channel = re.search(r"channel_id=(\d+)", instruction.attributes)
      key = (kind, channel[1]) if channel else (name, instruction.name)
      inputs = sum(_size(computation[o].shape, True) for o in instruction.operands)
      sent = _sent(kind, inputs, _group(instruction.attributes))
      if sent and (key not in seen or runs[name] > seen[key][1]):
        seen[key] = (kind, runs[name], sent)
  out = []
  for kind in _COLLECTIVES:
    found = [(times, sent) for k, times, sent in seen.values() if k == kind]
    if found:
      count, total = sum(t for t, _ in found), sum(times * sent for times, sent in found)
      out.append(Collective(kind, count, total))
  return tuple(out)


def _group(attributes: str) -> int:
  """How many devices take part."""
  explicit = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
  if explicit:
    return explicit[1].count(",") + 1
  iota = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
  return int(iota[1]) if iota else 2  # a permutation has pairs


def _sent(kind: str, inputs: int, devices: int) -> int:
  """Bytes that leave one device when it brings `inputs` bytes."""
  share = (devices - 1) / devices
  factor = {"all-gather": devices - 1, "all-reduce": 2 * share, "collective-permute": 1}
  return round(inputs * factor.get(kind, share))
