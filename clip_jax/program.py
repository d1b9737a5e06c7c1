"""What a compiled program does in one run on one device, read from its HLO text.

FLOPs are those of matrix products and convolutions. Traffic is an estimate: each instruction reads
its operands and writes its results once, as XLA's `bytes accessed` has it, but only in main memory
(a TPU's compiler plans what lies in vector memory, and XLA counts that too), as often as loops run,
and of a slice or an update in place that part alone. Counted as XLA counts, the two agree: 1.00 for
a training step on a CPU, 0.98 to 1.04 for four small ones on v5e. In main memory alone these move
0.08 to 0.15 of XLA's figure: small arrays stay in vector memory.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from clip_jax import collectives as collectives_lib
from clip_jax import hlo

_FREE = {
  "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call",
  "after-all", "partition-id", "replica-id", "iota",
}  # fmt: skip
_FREE_CALLS = (
  "ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart",
  "AsyncCollectiveDone",
)  # fmt: skip
_SLICES = ("slice", "dynamic-slice", "gather")


@dataclasses.dataclass(frozen=True)
class Work:
  """One run of the program on one device."""

  loops: float  # FLOPs of matrix products and convolutions over those with loop bodies counted once
  hbm_bytes: int  # read and written in main memory; an estimate
  collectives: tuple[collectives_lib.Collective, ...]


def work(text: str) -> Work:
  """Args: text, `compiled.as_text()`, of any backend. Raises: hlo.HloError."""
  module = hlo.parse(text)
  computations, runs = module.computations, module.runs
  once = sum(_flops(computations[name]) for name in runs)
  total = flops(module)
  outer = {name: computations[name] for name in runs if name not in module.fused}
  traffic = sum(runs[name] * _traffic(c, computations) for name, c in outer.items())
  loops = total / once if once else 1.0
  return Work(loops, traffic, collectives_lib.collectives(module))


def flops(module: hlo.Module) -> int:
  """Of all its matrix products and convolutions."""
  return sum(times * _flops(module.computations[name]) for name, times in module.runs.items())


def _traffic(computation: hlo.Computation, computations: dict[str, hlo.Computation]) -> int:
  """Bytes that the instructions of one computation read from main memory and write to it, once."""
  total = 0
  for instruction in computation.values():
    if instruction.opcode not in _FREE and not instruction.opcode.endswith("-done"):
      total += sum(_moved(instruction, computation, computations))
  return total


def _moved(
  this: hlo.Instruction, computation: hlo.Computation, computations: dict[str, hlo.Computation]
) -> list[int]:
  """What it reads of each operand, and what it writes of each result."""
  given, made = [computation[o].shape for o in this.operands], hlo.buffers(this.shape)
  reads = [sum(b.hbm_bytes for b in hlo.buffers(shape)) for shape in given]
  writes = [b.hbm_bytes for b in made]
  if this.opcode == "fusion":
    return _moved_by_fusion(this, reads, writes, computations[hlo.called_by(this)[0]])
  if this.opcode == "custom-call" and any(name in this.attributes for name in _FREE_CALLS):
    return []
  if this.opcode in ("copy-start", "slice-start"):  # their shapes name the source beside the result
    result = made[0 if this.opcode == "copy-start" else 1]
    return [result.bytes if reads[0] else 0, result.hbm_bytes]
  if this.opcode in ("all-gather-start", "collective-permute-start"):
    return [sum(writes)]
  if this.opcode in _SLICES:
    reads[0] = min(reads[0], sum(b.bytes for b in made))
  if this.opcode == "dynamic-update-slice":
    reads[0], writes = 0, [min(writes[0], hlo.size(given[1]))]
  return [*reads, *writes]


def _moved_by_fusion(
  fusion: hlo.Instruction, reads: list[int], writes: list[int], inner: hlo.Computation
) -> list[int]:
  """Of an operand that it slices it reads the slices; into one that it updates, it writes those."""
  if any("AsyncCollectiveDone" in i.attributes for i in inner.values()):
    return []
  users = collections.defaultdict(list)
  for instruction in inner.values():
    for place, operand in enumerate(instruction.operands):
      users[operand].append((instruction, place))

  def uses(name: str) -> Iterator[tuple[hlo.Instruction, int]]:
    for instruction, place in users[name]:
      if instruction.opcode == "bitcast":
        yield from uses(instruction.name)
      else:
        yield instruction, place

  for parameter in (i for i in inner.values() if i.opcode == "parameter"):
    place, used = int(parameter.attributes.split(")")[0]), list(uses(parameter.name))
    if used and all(i.opcode in (*_SLICES, "dynamic-update-slice") and at == 0 for i, at in used):
      slices = (i for i, _ in used if i.opcode in _SLICES)
      sliced = sum(b.bytes for i in slices for b in hlo.buffers(i.shape))
      reads[place] = min(reads[place], sliced)
  results = inner.root.operands if inner.root.opcode == "tuple" else (inner.root.name,)
  for place, name in enumerate(results if len(results) == len(writes) else ()):
    while inner[name].opcode == "bitcast":
      name = inner[name].operands[0]
    if inner[name].opcode == "dynamic-update-slice":
      update = hlo.buffers(inner[inner[name].operands[1]].shape)[0]
      writes[place] = min(writes[place], update.bytes)
  steps = [i for i in inner.values() if i.opcode in collectives_lib.KINDS]
  if steps:  # of a collective between other work: what only passes through is not moved
    aliases = re.findall(r"\{(\d*)\}: \((\d+), \{", fusion.attributes)
    for result, operand in aliases:
      writes[int(result or 0)] = 0
      if collectives_lib.continues(steps[0]):
        reads[int(operand)] = 0
  return [*reads, *writes]


def _flops(computation: hlo.Computation) -> int:
  """Of the matrix products and convolutions in it, loops counted once."""
  total = 0
  for instruction in computation.values():
    if instruction.opcode == "dot":
      total += _dot_flops(instruction, computation)
    elif instruction.opcode == "custom-call" and '"__cublas$' in instruction.attributes:
      total += _dot_flops(instruction, computation)  # a GPU's
    elif instruction.opcode == "convolution":
      total += _convolution_flops(instruction, computation)
  return total


def _dot_flops(dot: hlo.Instruction, computation: hlo.Computation) -> int:
  contracted = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', dot.attributes)
  left = hlo.arrays(computation[dot.operands[0]].shape)[0][1]
  dims = [int(d) for d in contracted[1].replace('"', "").split(",") if d] if contracted else []
  return 2 * math.prod(hlo.arrays(dot.shape)[0][1]) * math.prod(left[d] for d in dims)


def _convolution_flops(convolution: hlo.Instruction, computation: hlo.Computation) -> int:
  """2 a multiply-add; positions in padding and between dilated inputs are not counted."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
  assert labels is not None
  left, right = (hlo.arrays(computation[o].shape)[0][1] for o in convolution.operands[:2])
  out = hlo.arrays(convolution.shape)[0][1]
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
