"""One TPU slice: the gcloud commands that request it, ask about it, use it and delete it.

Sources: cloud.google.com/tpu/docs, "Manage queued resources", "TPU software versions".
"""

import argparse
import math
import shlex
import time

from tools.commands import CommandFailed, LaunchError, Shell, say

# Prefix of the accelerator type, what it counts a chip as, and the machines' image.
KINDS = {
  "v4": ("v4", 2, "tpu-ubuntu2204-base"),
  "v5e": ("v5litepod", 1, "v2-alpha-tpuv5-lite"),
  "v5p": ("v5p", 2, "v2-alpha-tpuv5"),
  "v6e": ("v6e", 1, "v2-alpha-tpuv6e"),
}
LOST = {"FAILED", "SUSPENDING", "SUSPENDED", "DELETING", ""}  # "": not there
_TRIES = 20  # 80 minutes of pauses with the usual --poll


class Slice:
  """The commands about one queued resource."""

  def __init__(self, options: argparse.Namespace, shell: Shell):
    self.options, self.shell = options, shell
    self._where = [f"--zone={options.zone}"]
    self._where += [f"--project={options.project}"] if options.project else []
    several = options.slices > 1
    self.nodes = (
      [f"{options.name}-{i}" for i in range(options.slices)] if several else [options.name]
    )

  def _queued(self, verb: str, *more: str) -> list[str]:
    names = ["gcloud", "compute", "tpus", "queued-resources", verb, self.options.name]
    return [*names, *self._where, *more]

  def _ask(self, verb: str, *more: str, pretend: str = "") -> str:
    """What the command answers. One that fails is asked again, at growing intervals.

    Raises: CommandFailed when asking again cannot help, or has not helped.
    """
    tries = 0
    while True:
      try:
        return self.shell.run(*self._queued(verb, *more), pretend=pretend)
      except CommandFailed as error:
        if tries and verb == "create" and "ALREADY_EXISTS" in error.said:
          return ""  # the first request came through, its answer did not
        tries += 1
        refused = error.final or "NOT_FOUND" in error.said
        if refused or (verb == "create" and not error.passing) or tries == _TRIES:
          raise
        self.pause(tries, str(error))

  def pause(self, tries: int, error: str) -> None:
    """Waits after the first, second, ... failure in a row."""
    seconds = self.options.poll * min(2 ** (tries - 1), 10)
    say(f"{error}; asked again in {seconds:g} s (failure {tries})")
    time.sleep(seconds)

  def state(self) -> str:
    """ACTIVE, WAITING_FOR_RESOURCES, ...; empty where there is none of that name."""
    try:
      return self._ask("describe", "--format=value(state.state)", pretend="ACTIVE").strip()
    except CommandFailed as error:
      if "NOT_FOUND" in error.said:
        return ""
      raise

  def create(self) -> None:
    """Raises: CommandFailed for want of quota, capacity, permission, ..."""
    kind, per_chip, image = KINDS[self.options.topology.partition(":")[0]]
    chips = math.prod(map(int, self.options.topology.partition(":")[2].split("x")))
    words = [f"--accelerator-type={kind}-{chips * per_chip}", f"--runtime-version={image}"]
    if self.options.slices > 1:
      words += [f"--node-count={self.options.slices}", f"--node-prefix={self.options.name}"]
    else:
      words.append(f"--node-id={self.options.name}")
    words += ["--spot"] if self.options.spot else []
    self._ask("create", *words, "--scopes=https://www.googleapis.com/auth/cloud-platform")

  def by_hand(self) -> str:
    return shlex.join(self._queued("delete", "--force", "--quiet"))

  def delete(self) -> None:
    """Raises: LaunchError saying that it may still cost money, and the command that ends that."""
    try:
      self._ask("delete", "--force", "--quiet")
    except BaseException as error:
      if isinstance(error, CommandFailed) and "NOT_FOUND" in error.said:
        return
      raise LaunchError(
        f"{self.options.name} MAY STILL BE THERE AND COST MONEY: its deletion failed "
        f"({str(error) or type(error).__name__}). Delete it by hand: {self.by_hand()}"
      ) from error

  def on_hosts(
    self, command: str, workers: str = "all", pretend: str = "", follow: bool = False
  ) -> str:
    """What the command prints on the hosts of all slices (`follow`: on the terminal)."""
    nodes = self.nodes[:1] if workers == "0" else self.nodes
    said = [
      self.shell.run(
        "gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *self._where,
        f"--worker={workers}", f"--command={command}", pretend=pretend, follow=follow,
      )
      for node in nodes
    ]  # fmt: skip
    return "\n".join(said)

  def copy(self, *files: str) -> None:
    """To the home folders of all hosts."""
    for node in self.nodes:
      words = ["gcloud", "compute", "tpus", "tpu-vm", "scp", *files, f"{node}:", *self._where]
      self.shell.run(*words, "--worker=all")
