"""What a compiled program sends between devices, read from its HLO text."""

import dataclasses
import math
import re

from clip_jax import hlo

BETWEEN_SLICES = "between slices"  # what a TPU's host sends over the data-centre network
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of one kind in one run: `bytes` leave each device, by a ring's arithmetic."""

  kind: str
  count: int
  bytes: int


def collectives(module: hlo.Module) -> tuple[Collective, ...]:
  """By kind, `BETWEEN_SLICES` last. Raises: HloError on devices that are named in another form."""
  found: dict[str, list[tuple[int, int]]] = {kind: [] for kind in (*KINDS, BETWEEN_SLICES)}
  for name, times in module.runs.items():
    computation = module.computations[name]
    for instruction in computation.values():
      kind = instruction.opcode.removesuffix("-start")
      between = kind == "send" and "_xla_megascale_transfer_type" in instruction.attributes
      if not between and (kind not in KINDS or continues(instruction)):
        continue
      inputs = sum(hlo.size(computation[o].shape) for o in instruction.operands)
      if between:
        kind, sent = BETWEEN_SLICES, _sent(*_transfer(instruction), inputs, inputs)
      else:
        if name in module.fused and _scatters(instruction, computation):
          kind = "reduce-scatter"
        devices = _group(instruction, module.devices)
        sent = _sent(kind, devices, inputs, hlo.size(instruction.shape))
      if sent:
        found[kind].append((times, sent))
  return tuple(
    Collective(kind, sum(times for times, _ in all_), sum(times * sent for times, sent in all_))
    for kind, all_ in found.items()
    if all_
  )


def continues(instruction: hlo.Instruction) -> bool:
  """Whether it is a later step of a collective that a TPU cuts up between other work.

  Every step names the whole collective, and they share a chain_id (not always a channel_id of their
  own: all of a shard_map have 1). The first step has no flag to wait for.
  """
  flag = re.search(r'"flag_start":"(-?\d+)"', instruction.attributes)
  return flag is not None and int(flag[1]) >= 0


def _scatters(instruction: hlo.Instruction, computation: hlo.Computation) -> bool:
  """Whether it is a TPU's reduce-scatter: an all-reduce fused with the slices of its sums."""
  names, users = {instruction.name}, set()
  for later in computation.values():
    if names.intersection(later.operands):
      if later.opcode == "get-tuple-element":
        names.add(later.name)
      else:
        users.add(later.opcode)
  return instruction.opcode == "all-reduce" and users == {"dynamic-slice"}


def _group(instruction: hlo.Instruction, devices: int) -> int:
  """How many devices take part together. The forms are those of XLA's ReplicaGroup lists."""
  if instruction.opcode.startswith("collective-permute"):
    return 2
  _, written, groups = instruction.attributes.partition("replica_groups=")
  if explicit := re.match(r"\{\{([\d,]*)\}", groups):  # {{0,1},{2,3}}
    return _count(explicit[1])
  if iota := re.match(r"\[\d+,(\d+)\]<=\[", groups):  # [2,4]<=[8], with T(1,0) behind it or not
    return int(iota[1])
  if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}", groups):
    sizes = dict(axis.split("=") for axis in mesh[1].split(","))
    return math.prod(_axis(word, sizes) for word in mesh[2].split(",") if word)
  if groups.startswith("{}"):
    return devices
  said = f"replica_groups={groups[:60]}" if written else "it has no replica_groups"
  raise hlo.HloError(f"{instruction.name}: which devices take part is not understood: {said}")


def _axis(word: str, sizes: dict[str, str]) -> int:
  """'axis_0', all of it, or 'axis_0':(2)4, of which 4 take part."""
  name, _, part = word.partition(":")
  return int(part.partition(")")[2] or sizes[name])


def _transfer(send: hlo.Instruction) -> tuple[str, int]:
  """(kind, how many slices or devices take part) of what one slice sends to others."""
  named = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
  target = re.search(r'_xla_megascale_target="?\{+([^}]*)\}', send.attributes)
  kind = named[1].lower().replace("_", "-") if named else ""
  if kind == "one-to-one":
    return "collective-permute", 2
  if target is None or kind not in KINDS:
    raise hlo.HloError(f"{send.name}: what slices send is not understood: {send.attributes[:200]}")
  return kind, _count(target[1])


def _count(numbers: str) -> int:
  return numbers.count(",") + 1


def _sent(kind: str, devices: int, inputs: int, results: int) -> int:
  """Bytes that leave one device when it brings `inputs` bytes and gets `results`."""
  share = (devices - 1) / devices
  if kind == "all-reduce":  # sums go round, then their results, which a TPU may round to bfloat16
    return round(share * (inputs + results))
  return round(inputs * {"all-gather": devices - 1, "collective-permute": 1}.get(kind, share))
