"""Other programs' commands, shown before they run; their errors in one line with the remedy."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence

# What a program said -> what to do. The first pattern that is found counts.
_REMEDIES = (
  (
    r"active account|reauthentica|invalid_grant|invalid authentication|could not load the default"
    r"|credentials",
    "no valid credentials: gcloud auth login (and, for kubectl, gcloud container clusters "
    "get-credentials CLUSTER)",
  ),
  (
    r"has not been used in project|it is disabled|SERVICE_DISABLED",
    "the API is off: gcloud services enable tpu.googleapis.com",
  ),
  (
    r"quota",
    "the project's quota is too small: ask for more of this chip in this zone at "
    "https://console.cloud.google.com/iam-admin/quotas (service: Cloud TPU API), or take a smaller "
    "--topology",
  ),
  (
    r"no more capacity|stockout|resources? (?:pool )?exhausted|insufficient capacity",
    "the zone has none left: another --zone, --spot, or later",
  ),
  (r"PERMISSION_DENIED|does not have permission|Forbidden", "this account may not do that"),
  (
    r"no matches for kind \"JobSet\"",
    "the cluster has no JobSet: see https://jobset.sigs.k8s.io/docs/installation/",
  ),
  (r"Unable to connect|connection refused|no such host", "the cluster or network is out of reach"),
  (r"(?:zone|location)\S* .*not found|Invalid value.*(?:zone|location)", "is the --zone right?"),
  (r"Invalid (?:account|partition|qos)|invalid partition", "see sinfo and sacctmgr show assoc"),
)
_INSTALL = {
  "gcloud": "https://cloud.google.com/sdk/docs/install",
  "kubectl": "gcloud components install kubectl",
  "sbatch": "run this on a Slurm login node",
}


class LaunchError(RuntimeError):
  """One line: what went wrong, what is left, what to do."""


class CommandFailed(LaunchError):
  """A command that ended with an error. `said`: all that it printed."""

  def __init__(self, command: Sequence[str], code: int, said: str):
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
    remedy = next((r for pattern, r in _REMEDIES if re.search(pattern, said, re.IGNORECASE)), "")
    words = " ".join(command[:5])
    super().__init__(
      f"{words} ... failed (exit code {code})"
      + (f": {telling[:300]}" if telling else "")
      + (f". {remedy[0].upper()}{remedy[1:]}" if remedy else "")
    )
    self.said = said


class Shell:
  """Runs commands; with `dry_run` only shows them."""

  def __init__(self, dry_run: bool = False):
    self.dry_run = dry_run

  def run(self, *command: str, text: str = "", pretend: str = "", follow: bool = False) -> str:
    """Standard output of a command that is shown first.

    Args: text, its standard input; pretend, the answer of a dry run; follow, its output goes to
      the terminal as it comes, and is not returned.
    Raises: LaunchError when it is not installed; CommandFailed.
    """
    print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
    if self.dry_run:
      return pretend
    pipe = None if follow else subprocess.PIPE
    try:
      done = subprocess.run(command, input=text, stdout=pipe, stderr=pipe, text=True, check=False)
    except FileNotFoundError:
      how = _INSTALL.get(command[0], "install it")
      raise LaunchError(f"{command[0]} is not installed here: {how}") from None
    if done.returncode:
      raise CommandFailed(command, done.returncode, f"{done.stderr or ''}\n{done.stdout or ''}")
    return done.stdout or ""


def say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
  """What stands before `--` and after it."""
  words = list(arguments)
  at = words.index("--") if "--" in words else len(words)
  return words[:at], words[at + 1 :]


def exit_code(work: Callable[[], None]) -> int:
  """Runs a tool. 0; 2 for an error, told in one line; 130 when interrupted."""
  try:
    work()
  except LaunchError as error:
    say(f"error: {error}")
    return 2
  except KeyboardInterrupt:
    say("interrupted")
    return 130
  return 0
