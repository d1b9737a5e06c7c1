"""A preflight's report for people."""

import math

from clip_jax import chips, collectives
from clip_jax.preflight import Report, gib


def lines(found: Report, price: float = 0.0) -> list[tuple[str, str]]:
  """(what, figure) of a report, for people. price: dollars a chip-hour; 0: not given."""
  moved = [f"{c.kind} x{c.count}, {gib(c.bytes)}" for c in found.collectives] or ["none"]
  known = math.isfinite(found.capacity_bytes)
  memory = gib(found.peak_bytes) + (f" of {gib(found.capacity_bytes)}" if known else "")
  fits = "fits" if found.evaluation_bytes <= found.capacity_bytes else "does not fit"
  evaluation = (f"{fits}: " if known else "") + f"{gib(found.evaluation_bytes)}, estimated"
  out = [
    ("chips", f"{found.chips} ({found.devices} devices), {found.device_kind}"),
    ("batch", f"{found.batch_pairs:,} pairs, {found.batch_pairs / found.devices:g} a device"),
    ("memory a device", memory),
    ("  state and batch", gib(found.argument_bytes)),
    ("  temporaries", gib(found.temporary_bytes)),
    ("evaluation beside it", evaluation),
    ("FLOPs a device, analytic", f"{found.analytic_flops:.3e}"),
    ("FLOPs a device, compiled", f"{found.compiled_flops:.3e}, ratio {found.flops_ratio:.2f}"),
    ("memory traffic, estimated", gib(found.hbm_bytes)),
    ("collectives, sent a device", "; ".join(moved)),
    ("compiled in", f"{found.compile_seconds:.0f} s"),
  ]
  chip = chips.find(found.device_kind)
  if chip is None:
    missing = "no roofline" if known else "no capacity, no roofline"
    return [*out, (found.device_kind, f"not in the table of chips: {missing}")]
  between = any(c.kind == collectives.BETWEEN_SLICES for c in found.collectives)
  if between and not chip.slices_bytes_per_second:
    out.append(("network between slices", "not in the estimate: no rate is published"))
  parts = (found.compute_seconds, found.hbm_seconds, found.network_seconds)
  step = "{:.3f} s (the largest of compute {:.3f}, memory {:.3f}, network {:.3f})"
  out += [
    ("step, estimated", step.format(found.step_seconds, *parts)),
    ("step, at the least", f"{found.compute_seconds:.3f} s: its FLOPs at the chip's peak"),
    ("pairs a second, estimated", f"{found.pairs_per_second:,.0f} (MFU {found.mfu:.0%})"),
    ("the run, estimated", f"{found.run_hours:,.1f} h, {found.run_chip_hours:,.0f} chip-hours"),
  ]
  if price:
    dollars = found.run_chip_hours * price
    out.append(("money, estimated", f"${dollars:,.0f} at ${price:g} a chip-hour"))
  return out
