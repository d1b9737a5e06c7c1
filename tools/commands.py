"""Other programs' commands, shown before they run; their errors in one line with the remedy."""

import contextlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence

# What a program said -> what to do, and whether asking again may help ("passing"), cannot
# ("final"), or nobody knows (""). The first pattern that is found counts.
_REMEDIES = (
  (
    r"attribute \[project\]|property \[core/project\]|project property is (?:not set|unset)",
    "no project is chosen: gcloud config set project PROJECT, or --project",
    "final",
  ),
  # Where kubectl looks when it has no cluster.
  (
    r"(?:localhost|127\.0\.0\.1|\[::1\]):8080",
    "kubectl knows no cluster: gcloud container clusters get-credentials CLUSTER",
    "final",
  ),
  (
    r"gke-gcloud-auth-plugin|getting credentials: exec",
    "kubectl cannot log in: gcloud components install gke-gcloud-auth-plugin, then gcloud "
    "container clusters get-credentials CLUSTER",
    "final",
  ),
  # Before the credentials: without a network gcloud advises to log in again.
  (
    r"Max retries exceeded|Failed to (?:establish|resolve)|name resolution|timed? ?out"
    r"|unable to find the server|connection (?:reset|aborted|refused|closed)"
    r"|connection to the server \S+ was refused|Unable to connect|no such host"
    r"|UNAVAILABLE|DEADLINE_EXCEEDED|\b50[0234]\b",
    "the network, the service or the cluster is out of reach",
    "passing",
  ),
  (
    r"active account|reauthentica|invalid_grant|invalid authentication|could not load the default"
    r"|credentials|must be logged in|Unauthorized|UNAUTHENTICATED",
    "no valid credentials: gcloud auth login (and, for kubectl, gcloud container clusters "
    "get-credentials CLUSTER)",
    "final",
  ),
  (
    r"has not been used in project|it is disabled|SERVICE_DISABLED",
    "the API is off: gcloud services enable tpu.googleapis.com",
    "final",
  ),
  (
    r"quota",
    "the project's quota is too small: ask for more of this chip in this zone at "
    "https://console.cloud.google.com/iam-admin/quotas (service: Cloud TPU API), or take a smaller "
    "--topology",
    "",
  ),
  (
    r"no more capacity|stockout|resources? (?:pool )?exhausted|insufficient capacity",
    "the zone has none left: another --zone, --spot, or later",
    "",
  ),
  (
    r"PERMISSION_DENIED|does not have permission|Forbidden",
    "this account may not do that: its administrator grants roles/tpu.admin (slices) or "
    "roles/container.developer (clusters)",
    "final",
  ),
  (
    r"no matches for kind \"JobSet\"|unknown field \"spec.failurePolicy",
    "the cluster has no JobSet of 0.6 or later: see https://jobset.sigs.k8s.io/docs/installation/",
    "final",
  ),
  (
    r"(?:zone|location)\S* .*not found|Invalid value.*(?:zone|location)",
    "is the --zone right?",
    "final",
  ),
  (r"INVALID_ARGUMENT|unrecognized arguments", "the command is shown above", "final"),
  (r"Invalid (?:account|partition|qos)|invalid partition", "see sinfo and sacctmgr show assoc", ""),
)
_SLURM = "run this on a Slurm login node"
_INSTALL = {
  "gcloud": "https://cloud.google.com/sdk/docs/install",
  "kubectl": "gcloud components install kubectl",
  "git": "apt-get install git",
  "sbatch": _SLURM,
  "squeue": _SLURM,
  "scancel": _SLURM,
}


class LaunchError(RuntimeError):
  """One line: what went wrong, what is left, what to do."""


class CommandFailed(LaunchError):
  """A command that ended with an error.

  Attributes: `said`, all that it printed; `passing`, the network or the service did not answer;
  `final`, asking again cannot help (credentials, permissions, a wrong argument).
  """

  def __init__(self, command: Sequence[str], code: int, said: str):
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
    telling = telling[:300].rstrip(".")
    remedy, kind = next(
      (row[1:] for row in _REMEDIES if re.search(row[0], said, re.IGNORECASE)), ("", "")
    )
    words = " ".join(command[:5])
    super().__init__(
      f"{words} ... failed (exit code {code})"
      + (f": {telling}" if telling else "")
      + (f". {remedy[0].upper()}{remedy[1:]}" if remedy else "")
    )
    self.said = said
    self.passing, self.final = kind == "passing", kind == "final"


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
    say(f"$ {shlex.join(command)}")
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
  """To standard error, if it is still there: what must be deleted is, also without a terminal."""
  with contextlib.suppress(OSError):
    print(text, file=sys.stderr, flush=True)


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
