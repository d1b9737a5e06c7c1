"""A training run on GPU nodes of a Slurm cluster.

python tools/launch_slurm.py submit NAME --nodes 4 --gpus 8 --time 24:00:00 \\
  -- --config experiments/clip_vit_b16.py

`submit` writes runs/NAME.sbatch and hands it to sbatch: one process a GPU, which find each other by
what Slurm tells them. Before the time is up, and on preemption, Slurm sends SIGTERM: all save, and
the job goes back into the queue until the run has its results. `status`, `logs` and `cancel` do
what they say. --dry-run shows the script and the commands and runs none.

The project must lie on a file system that all nodes share. Source: slurm.schedmd.com, sbatch and
srun; jax.distributed.initialize, "Slurm".
"""

import argparse
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence

if __package__ in (None, ""):
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from clip_jax import metrics
from tools.commands import LaunchError, Shell, exit_code, split

ROOT = pathlib.Path(__file__).parents[1]


def script(options: argparse.Namespace) -> str:
  """What sbatch is given."""
  workdir = f"runs/{options.name}"
  train = shlex.join([".venv/bin/clip-jax", "train", *options.train, "--workdir", workdir])
  lines = [
    "#!/bin/bash",
    f"#SBATCH --job-name={options.name}",
    f"#SBATCH --nodes={options.nodes}",
    f"#SBATCH --gpus-per-node={options.gpus}",
    f"#SBATCH --ntasks-per-node={options.gpus}",
    f"#SBATCH --cpus-per-task={options.cpus}",
    f"#SBATCH --time={options.time}",
    f"#SBATCH --output={workdir}.log",
    "#SBATCH --open-mode=append",
    "#SBATCH --requeue",
    "#SBATCH --signal=TERM@180",  # to the processes, three minutes before the end
    *[f"#SBATCH --{name}={value}" for name in ("partition", "account")
      if (value := getattr(options, name))],
    "",
    f"cd {shlex.quote(str(ROOT))}",
    f"srun --kill-on-bad-exit=1 {train}",
    "code=$?",
    f"if [ $code = 0 ] && [ ! -f {workdir}/results.json ]; then",
    '  scontrol requeue "$SLURM_JOB_ID"  # stopped and saved, not finished',
    "fi",
    "exit $code",
    "",
  ]  # fmt: skip
  return "\n".join(lines)


def submit(options: argparse.Namespace, shell: Shell) -> None:
  """Raises: LaunchError."""
  text, path = script(options), ROOT / "runs" / f"{options.name}.sbatch"
  print(text)
  if not options.dry_run:
    path.parent.mkdir(exist_ok=True)
    metrics.write_atomically(path, text)
  print(shell.run("sbatch", str(path)), end="")


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  own, rest = split(sys.argv[1:] if arguments is None else arguments)
  parser = argparse.ArgumentParser(
    usage="launch_slurm.py VERB NAME [OPTION ...] [-- ARGUMENTS OF clip-jax train]",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("verb", choices=("submit", "status", "logs", "cancel"))
  parser.add_argument("name", help="of the job and the run: letters, digits, - and _")
  parser.add_argument("--nodes", type=int, default=1, metavar="N")
  parser.add_argument("--gpus", type=int, default=8, metavar="N", help="a node (8)")
  parser.add_argument("--cpus", type=int, default=12, metavar="N", help="a GPU (12)")
  parser.add_argument("--time", default="24:00:00", help="limit of one start (24:00:00)")
  parser.add_argument("--partition", default="")
  parser.add_argument("--account", default="")
  parser.add_argument("--dry-run", action="store_true", help="show all, run nothing")
  options = parser.parse_args(own)
  options.train = rest
  if options.verb == "submit" and "--config" not in rest:
    parser.error("submit wants, after --, --config FILE")
  shell = Shell(options.dry_run)
  if not re.fullmatch(r"[\w-]+", options.name):
    return exit_code(lambda: _refuse(options.name))
  if options.verb == "submit":
    return exit_code(lambda: submit(options, shell))
  commands = {
    "status": ("squeue", "--me", f"--name={options.name}"),
    "logs": ("tail", "-n", "+1", "-F", str(ROOT / "runs" / f"{options.name}.log")),
    "cancel": ("scancel", "--me", f"--name={options.name}"),
  }
  command = commands[options.verb]
  return exit_code(lambda: print(shell.run(*command, follow=options.verb == "logs"), end=""))


def _refuse(name: str) -> None:
  raise LaunchError(f"{name!r}: a name has letters, digits, - and _ only")


if __name__ == "__main__":
  sys.exit(main())
