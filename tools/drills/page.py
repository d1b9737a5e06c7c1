"""The drills' results as a page for people."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tools.drills import results
from tools.drills.rows import ROWS, Row

_UNKNOWN = "?"  # in place of a machine's letter
_HEAD = """# What was tried against it

Every way in which a training run is known to break, what is promised then, and what was measured.
Written by `make drills` and `make fuzz`; a row that has not run says so, and a failed one fails the
command. A part keeps what it gave until it runs again: the last column says at which commit (+: and
changes) and on which machine.

F: tests of every push. N: longer ones, most of them in real processes. Z: fuzzing (`make fuzz`).
What was not tried, and what is otherwise than planned, stands below the table.
"""

NOT_TRIED = (  # what, why not and what is therefore not known
  ("object stores", "there was none: reading from one was tried against a local HTTP server that "
   "fails, cuts and waits; checkpoints were written to local disks alone. A bucket that is mounted "
   "as a folder may rename without being atomic"),
  ("NFS, and buckets mounted by gcsfuse", "there was neither. That a second trainer is refused "
   "rests on flock, which some of these keep within one machine, or ignore"),
  ("loss of power", "processes were killed, machines were not: what a disk had said to have "
   "written and then lost was never seen. Checksums would find it in a checkpoint"),
  ("TPUs: bit-exactness", "there was none. The same program on the same chips should give the same "
   "bits; nobody has looked. A TPU's preemption was played by signals"),
  ("GPUs: bit-exactness", "of these rows none ran on one. Some of XLA's kernels for GPUs add in an "
   "order that changes; `--xla_gpu_deterministic_ops=true` forbids them"),
  ("more than 4 processes or 8 devices", "two cores run no more in the time of a test, and the "
   "devices are parts of one CPU. What grows with the hosts (start, agreement, the watch over the "
   "others, a save by all) was not measured"),
  ("real networks", "all processes were on one machine and talked through its loopback: no lost "
   "packet, no partition, no slow link"),
  ("weeks", "the longest run of a drill takes minutes; leaks were looked for over ten epochs of a "
   "small data set (`tools/bench/sources.py`)"),
  ("memory that errs while it computes", "a wrong sum that is finite is trained on. Checksums are "
   "made of what was in memory"),
  ("an attacker who can write to the workdir",
   "checksums find damage, not forgery: see SECURITY.md"),
)  # fmt: skip

DIFFERENCES = (  # what the rules that this was built by ask for, what is here, why
  ("`jax.distributed` in a run of one process", "a process alone does not start it. Its use there "
   "would be to notice SIGTERM, which the loop's own handlers do (rows 18 to 20); without it no "
   "port is open, and nothing has to be reached before the first step"),
  ("a setting to train on when a checkpoint cannot be written", "the run always stops, with the "
   "error (row 26): what cannot save should not compute for days. The same command goes on once "
   "there is room"),
  ("pinned actions, and a weekly run with the newest libraries", "no hosted service tests this: "
   "one script does, `.ci/run`. Lock files hold every version by its hash, setup.cfg bounds JAX, "
   "Orbax and Grain from above, and `make lock` with the tests is the way to newer ones"),
  ("kept collections of inputs for fuzzing", "each target makes its good inputs when it starts, "
   "and keeps only one that brought an error to light"),
  ("one address for the coordinator, always", "where JAX itself finds it (Cloud TPU, GKE, Slurm) "
   "it listens on all addresses of its host: see SECURITY.md"),
)  # fmt: skip


def _sources(row: Row) -> str:
  files: dict[str, list[str]] = {}
  for part in results.parts(row):
    for test in row.tests(part):
      name = test.partition("::")[0].removeprefix("tests/").removesuffix(".py")
      files.setdefault(part, [])
      if name not in files[part]:
        files[part].append(name)
  return "; ".join(f"{part}: {', '.join(names)}" for part, names in files.items())


def _line(row: Row, found: Mapping[str, Any]) -> str:
  seconds = sum(part["seconds"] for part in found.values())
  origins: dict[str, list[str]] = {}
  for part, result in found.items():
    origins.setdefault(f"{result['commit']} {result.get('machine', _UNKNOWN)}", []).append(part)
  cells = (
    str(row.number),
    row.area,
    row.fault,
    row.promise,
    "; ".join(results.sentences(row, found)) or "-",
    results.outcome(row, found),
    _sources(row),
    f"{seconds:.0f}" if found else "-",
    "; ".join(f"{', '.join(sorted(parts))}: {where}" for where, parts in origins.items()) or "-",
  )
  return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _word(outcome: str) -> str:
  """An outcome without which part it is that failed or has not run."""
  return "passed in part" if ";" in outcome else outcome.partition(":")[0]


def _machines(document: Mapping[str, Any]) -> list[str]:
  """A line each: those of the parts that are there."""
  lines = [
    f"- {letter}: " + ", ".join(f"{name} {value}" for name, value in known.items())
    for letter, known in document["machines"].items()
  ]
  parts = [part for row in document["rows"].values() for part in row.values()]
  if any("machine" not in part for part in parts):
    lines.append(f"- {_UNKNOWN}: a machine that was not kept")
  return lines


def markdown(document: Mapping[str, Any]) -> str:
  """The page. Args: document, as docs/reliability.json holds it."""
  found = {row.number: document["rows"].get(str(row.number), {}) for row in ROWS}
  words = Counter(_word(results.outcome(row, found[row.number])) for row in ROWS)
  told = ", ".join(f"{count} {word}" for word, count in words.most_common())
  head = ("#", "area", "fault", "promise", "figure", "outcome", "tests", "seconds", "at")
  lines = [
    _HEAD,
    f"{len(ROWS)} rows: {told}.\n",
    *_machines(document),
    "",
    "| " + " | ".join(head) + " |",
    "| ---: | --- | --- | --- | --- | --- | --- | ---: | --- |",
    *(_line(row, found[row.number]) for row in ROWS),
    "",
    "## What was not tried",
    "",
    *(f"- **{what}**: {why}." for what, why in NOT_TRIED),
    "",
    "## Where this differs from the rules",
    "",
    *(f"- **{what}**: {why}." for what, why in DIFFERENCES),
  ]
  return "\n".join(lines) + "\n"
