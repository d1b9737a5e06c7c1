"""Where the wall time of a run went, over all of its starts.

Parts: "start" (until the run is ready for its first batch), "first step" (compiling, with that
step), "data wait", "step", "evaluation" (the last one too), "checkpoint" (in which training waits),
and "redone": what was spent after the checkpoint that a later start went on from, whatever it was
spent on. The rest of "total" is Python between them.
The account is written when a start is ready, with the figures of steps, after every checkpoint,
every ten seconds of steps, and at the end, also that of a run that fails. So what a killed start
spent counts up to its last line: its first compilation, if it was killed in it, and some seconds of
steps or a last evaluation under way are in no part, as is what passed between two starts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

PREFIX = "seconds/"
PARTS = ("start", "first step", "data wait", "step", "evaluation", "checkpoint", "redone")


def carried(lines: Sequence[Mapping[str, Any]], start_step: int) -> dict[str, float]:
  """The account that a start from `start_step` goes on with, of the lines of `metrics.jsonl`.

  That of the newest line up to there; what later lines have beyond it was lost and is "redone".
  Returns: seconds by part, as `figures` names them.
  """
  told = [line for line in lines if PREFIX + "total" in line]
  kept = [line for line in told if line["step"] <= start_step]
  account = _account(kept[-1]) if kept else {}
  lost = _account(told[-1])["total"] - account.get("total", 0.0) if told else 0.0
  if lost > 0:
    account["redone"] = account.get("redone", 0.0) + lost
    account["total"] = account.get("total", 0.0) + lost
  return account


def figures(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
  """The account of the whole run as a line of `metrics.jsonl` has it, of what came before."""
  parts = dict.fromkeys((*PARTS, *before, *now))
  return {PREFIX + p.replace(" ", "_"): before.get(p, 0.0) + now.get(p, 0.0) for p in parts}


def with_more(lines: Sequence[Mapping[str, Any]], part: str, seconds: float) -> dict[str, Any]:
  """The line to write when `part` has gone on after the last account of `lines`; empty: none."""
  told = [line for line in lines if PREFIX + "total" in line]
  if not told:
    return {}
  more = figures(_account(told[-1]), {part: seconds, "total": seconds})
  return {"step": told[-1]["step"], **more}


def sentence(line: Mapping[str, Any]) -> str:
  """The account of a line for people: "312 s: 91% step, 4% first step, 3% checkpoint, 0% redone".

  Parts under half a percent are left out, but for what had to be done again.
  """
  account = _account(line)
  total = account.pop("total")
  other = total - sum(account.values())
  shares = sorted((*account.items(), ("other", other)), key=lambda part: -part[1])
  words = [
    f"{seconds / total:.0%} {part}"
    for part, seconds in shares
    if total and (seconds / total >= 0.005 or part == "redone")
  ]
  return f"{total:,.0f} s: {', '.join(words)}"


def _account(line: Mapping[str, Any]) -> dict[str, float]:
  found = {k.removeprefix(PREFIX): v for k, v in line.items() if k.startswith(PREFIX)}
  return {part.replace("_", " "): float(s) for part, s in found.items()}
