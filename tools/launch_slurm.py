"""A training run on GPU nodes of a Slurm cluster.

python tools/launch_slurm.py submit NAME --nodes 4 --gpus 8 --time 24:00:00 \\
  -- --config experiments/clip_vit_b16.py

`submit` writes runs/NAME.sbatch and hands it to sbatch: one process a GPU, which find each other by
what Slurm tells them. Before the time is up, and on preemption, Slurm sends SIGTERM: all save, and
the job goes back into the queue until the run is finished. `status`, `logs` and `cancel` do what
they say. --dry-run shows the script and the commands and runs none.

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
from clip_jax.hosts import UNFINISHED
from clip_jax.watchdog import STUCK
from tools.arguments import config_file, number, split
from tools.commands import Shell, exit_code

ROOT = pathlib.Path(__file__).parents[1]
# srun returns the highest exit code, so an error's must be higher than UNFINISHED. The shell gets
# the signals too, and must live until training has saved.
_TASK = (
  f'trap : TERM; "$@"; code=$?; [ $code != {STUCK} ] || code={UNFINISHED}; '
  f"[ $code = 0 ] || [ $code -ge {UNFINISHED} ] || code=100; exit $code"
)


def script(options: argparse.Namespace) -> str:
  """What sbatch is given."""
  workdir = f"runs/{options.name}"
  words = [".venv/bin/clip-jax", "train", *options.train, "--workdir", workdir]
  task = shlex.join(["bash", "-c", _TASK, "task", *words])
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
    # The first that has saved must not kill the rest; one that hangs must not hold the nodes.
    f"srun --kill-on-bad-exit=0 --wait=600 {task}",
    "code=$?",
    f"if [ $code = {UNFINISHED} ]; then",
    '  scontrol requeue "$SLURM_JOB_ID"',
    "fi",
    "exit $code",
    "",
  ]  # fmt: skip
  return "\n".join(lines)


def submit(options: argparse.Namespace, shell: Shell) -> None:
  """Raises: LaunchError."""
  config_file(options.train, ROOT)
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
  count = number(int, 1)
  parser.add_argument("name", type=_name, help="of the job and the run: letters, digits, - and _")
  parser.add_argument("--nodes", type=count, default=1, metavar="N")
  parser.add_argument("--gpus", type=count, default=8, metavar="N", help="a node (8)")
  parser.add_argument("--cpus", type=count, default=12, metavar="N", help="a GPU (12)")
  parser.add_argument("--time", default="24:00:00", help="limit of one start (24:00:00)")
  parser.add_argument("--partition", default="")
  parser.add_argument("--account", default="")
  parser.add_argument("--dry-run", action="store_true", help="show all, run nothing")
  options = parser.parse_args(own)
  options.train = rest
  shell = Shell(options.dry_run)
  if options.verb == "submit":
    return exit_code(lambda: submit(options, shell))
  commands = {
    "status": ("squeue", "--me", f"--name={options.name}"),
    "logs": ("tail", "-n", "+1", "-F", str(ROOT / "runs" / f"{options.name}.log")),
    "cancel": ("scancel", "--me", f"--name={options.name}"),
  }
  command = commands[options.verb]
  return exit_code(lambda: print(shell.run(*command, follow=options.verb == "logs"), end=""))


def _name(text: str) -> str:
  if not re.fullmatch(r"[\w-]+", text):
    raise argparse.ArgumentTypeError(f"{text!r}: want letters, digits, - and _ only")
  return text


if __name__ == "__main__":
  sys.exit(main())
