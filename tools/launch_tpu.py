"""A training run on a Cloud TPU slice, from the request to the deletion of the slice.

python tools/launch_tpu.py run NAME --topology v5e:4x4 --zone us-west4-a --bucket BUCKET \\
  -- --config experiments/clip_vit_b16.py

`run` requests the slice as a queued resource, waits for it, copies this commit there and installs
it, starts `clip-jax train` on all hosts, and follows the log of the first. When the slice is
preempted it asks for another and goes on from the newest checkpoint. When training has ended, or
anything failed, or on Ctrl-C, it deletes the slice (--keep leaves it, and tells how to delete it).
`status`, `logs` and `delete` do what they say, from any machine. --dry-run shows all commands and
runs none.

The bucket is mounted on every host (gcsfuse); its folders data/ and runs/ stand for those of the
project, so --config.data.sources[0].path=data/cc12m reads gs://BUCKET/data/cc12m, and the run's
workdir is gs://BUCKET/runs/NAME.

Sources: cloud.google.com/tpu/docs, "Manage queued resources", "Manage TPU Spot VMs", "TPU software
versions"; cloud.google.com/storage/docs/cloud-storage-fuse.
"""

import argparse
import contextlib
import math
import pathlib
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

if __package__ in (None, ""):
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from clip_jax import preflight
from tools.commands import CommandFailed, LaunchError, Shell, exit_code, say, split

ROOT = pathlib.Path(__file__).parents[1]
# Prefix of the accelerator type, what it counts a chip as, and the machines' image.
_KINDS = {
  "v4": ("v4", 2, "tpu-ubuntu2204-base"),
  "v5e": ("v5litepod", 1, "v2-alpha-tpuv5-lite"),
  "v5p": ("v5p", 2, "v2-alpha-tpuv5"),
  "v6e": ("v6e", 1, "v2-alpha-tpuv6e"),
}
_LOST = {"FAILED", "SUSPENDING", "SUSPENDED", "DELETING", ""}  # "": not there

_SETUP = """\
set -eu
# The hosts' images update themselves after the start, and hold the lock meanwhile.
apt() { sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -qq "$@"; }
if ! command -v gcsfuse > /dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee $key > /dev/null
  site=https://packages.cloud.google.com/apt
  echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" \\
    | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  apt update
  apt install -y gcsfuse
fi
command -v python3.11 > /dev/null || { apt update; apt install -y python3.11; }
apt install -y python3.11-venv make
mkdir -p ~/bucket ~/clip_jax
mountpoint -q ~/bucket || gcsfuse --implicit-dirs --rename-dir-limit 100000 BUCKET ~/bucket
mkdir -p ~/bucket/data ~/bucket/runs
tar -xf ~/clip_jax.tar -C ~/clip_jax
cd ~/clip_jax
ln -sfn ~/bucket/data data
ln -sfn ~/bucket/runs runs
make install-tpu
"""
# Detached, so that a dropped connection ends nothing; a second start changes nothing.
_START = """\
cd ~/clip_jax
if [ -f ~/run.pid ] && kill -0 "$(cat ~/run.pid)" 2> /dev/null; then exit 0; fi
rm -f ~/run.exit
cat > ~/train.sh << 'END'
TRAIN
END
setsid nohup sh -c 'sh ~/train.sh > ~/run.log 2>&1; echo $? > ~/run.exit' \
  < /dev/null > /dev/null 2>&1 &
echo $! > ~/run.pid
"""
_FOLLOW = 'touch ~/run.log; tail -n +1 -F --pid="$(cat ~/run.pid)" ~/run.log'
_STATE = (
  'if [ -f ~/run.exit ]; then cat ~/run.exit; elif kill -0 "$(cat ~/run.pid)"; '
  "then echo running; else echo 1; fi"
)


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

  def _queued(self, verb: str) -> list[str]:
    names = ["gcloud", "compute", "tpus", "queued-resources", verb, self.options.name]
    return [*names, *self._where]

  def state(self) -> str:
    """ACTIVE, WAITING_FOR_RESOURCES, ...; empty where there is none of that name."""
    try:
      said = self.shell.run(
        *self._queued("describe"), "--format=value(state.state)", pretend="ACTIVE"
      )
    except CommandFailed as error:
      if "NOT_FOUND" in error.said:
        return ""
      raise
    return said.strip()

  def create(self) -> None:
    kind, per_chip, image = _KINDS[self.options.topology.partition(":")[0]]
    chips = math.prod(map(int, self.options.topology.partition(":")[2].split("x")))
    command = self._queued("create")
    command += [f"--accelerator-type={kind}-{chips * per_chip}", f"--runtime-version={image}"]
    if self.options.slices > 1:
      command += [f"--node-count={self.options.slices}", f"--node-prefix={self.options.name}"]
    else:
      command.append(f"--node-id={self.options.name}")
    command += ["--spot"] if self.options.spot else []
    self.shell.run(*command, "--scopes=https://www.googleapis.com/auth/cloud-platform")

  def by_hand(self) -> str:
    return shlex.join([*self._queued("delete"), "--force", "--quiet"])

  def delete(self) -> None:
    """Raises: LaunchError saying that it still costs money, and the command that ends that."""
    try:
      self.shell.run(*shlex.split(self.by_hand()))
    except BaseException as error:
      if isinstance(error, CommandFailed) and "NOT_FOUND" in error.said:
        return
      raise LaunchError(
        f"{self.options.name} MAY STILL BE THERE AND COST MONEY: its deletion failed "
        f"({error or type(error).__name__}). Delete it by hand: {self.by_hand()}"
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
    for node in self.nodes:
      words = ["gcloud", "compute", "tpus", "tpu-vm", "scp", *files, f"{node}:", *self._where]
      self.shell.run(*words, "--worker=all")


def wait(tpu: Slice) -> bool:
  """Until the slice is there: True; False when the request was lost. Raises: LaunchError."""
  deadline = time.monotonic() + 3600 * tpu.options.wait_hours
  while (state := tpu.state()) != "ACTIVE":
    if state in _LOST:
      return False
    if time.monotonic() > deadline:
      raise LaunchError(f"{tpu.options.name} was still {state} after {tpu.options.wait_hours:g} h")
    say(f"{tpu.options.name}: {state}")
    time.sleep(tpu.options.poll)
  return True


def install(tpu: Slice) -> None:
  """This commit, on all hosts."""
  with tempfile.TemporaryDirectory() as folder:
    archive, script = f"{folder}/clip_jax.tar", f"{folder}/setup.sh"
    text = _SETUP.replace("BUCKET", tpu.options.bucket)
    pathlib.Path(script).write_text(text)
    if tpu.shell.dry_run:
      say(f"setup.sh:\n{text}")
    tpu.shell.run("git", "-C", str(ROOT), "archive", "--output", archive, "HEAD")
    tpu.copy(archive, script)
  tpu.on_hosts("bash setup.sh")


def train(tpu: Slice) -> int | None:
  """Starts training where it does not run, and follows it: its exit code; None: slice lost."""
  words = [".venv/bin/clip-jax", "train", *tpu.options.train]
  words += ["--workdir", f"runs/{tpu.options.name}"]
  tpu.on_hosts(_START.replace("TRAIN", shlex.join(words)))
  return follow(tpu)


def follow(tpu: Slice) -> int | None:
  """See `train`."""
  unheard = 0
  while True:
    with contextlib.suppress(CommandFailed):  # a dropped connection: the states tell
      tpu.on_hosts(_FOLLOW, workers="0", follow=True)
    try:
      states = tpu.on_hosts(_STATE, pretend="0").split()
    except CommandFailed as error:
      if tpu.state() in _LOST:
        return None
      unheard += 1
      if unheard > 5:
        raise LaunchError(f"{tpu.options.name} is there and does not answer: {error}") from error
      states = ["running"]
    if "running" not in states:
      return max((int(state) for state in states if state.isdigit()), default=1)
    time.sleep(tpu.options.poll)


def run(tpu: Slice) -> None:
  """See the module. Raises: LaunchError, after the slice was deleted."""
  there = not tpu.shell.dry_run and tpu.state() != ""
  name, limit = tpu.options.name, tpu.options.restarts
  with _deleted_at_the_end(tpu):
    for attempt in range(limit + 1):
      if attempt:
        say(f"{name} was lost: another is asked for ({attempt} of {limit})")
        tpu.delete()
      if attempt or not there:
        tpu.create()
      code = _once(tpu)
      if code == 0:
        say(f"done: gs://{tpu.options.bucket}/runs/{name}")
        return
      if code is not None:
        raise LaunchError(f"training ended with exit code {code}; its log is above")
    raise LaunchError(
      f"{name} was lost {limit + 1} times; the same command goes on from the newest checkpoint"
    )


def _once(tpu: Slice) -> int | None:
  """Training's exit code on one slice; None when the slice was lost."""
  if not wait(tpu):
    return None
  try:
    install(tpu)
    return train(tpu)
  except CommandFailed:
    if tpu.state() in _LOST:
      return None
    raise


@contextlib.contextmanager
def _deleted_at_the_end(tpu: Slice) -> Iterator[None]:
  """Whatever happens, also SIGTERM; with --keep it tells how."""

  def end() -> None:
    if tpu.options.keep:
      say(f"{tpu.options.name} is kept AND COSTS MONEY until: {tpu.by_hand()}")
    else:
      tpu.delete()

  before = signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    yield
  except BaseException as error:
    try:
      end()
    except LaunchError as second:
      raise LaunchError(f"{error or 'interrupted'}; and {second}") from error
    raise
  else:
    end()
  finally:
    signal.signal(signal.SIGTERM, before)


def topology(text: str) -> str:
  generation, _, shape = text.partition(":")
  if generation not in _KINDS or shape not in preflight.TOPOLOGIES[generation]:
    known = "; ".join(f"{name}: {' '.join(preflight.TOPOLOGIES[name])}" for name in _KINDS)
    raise argparse.ArgumentTypeError(f"{text!r} is unknown. Known are, as v5e:4x4, {known}")
  return text


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    usage="launch_tpu.py VERB NAME --zone ZONE [OPTION ...] [-- ARGUMENTS OF clip-jax train]",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("verb", choices=("run", "status", "logs", "delete"))
  parser.add_argument("name", help="of the queued resource, the slice and the run")
  parser.add_argument("--zone", required=True)
  parser.add_argument("--project", default="", help="gcloud's own when left out")
  parser.add_argument("--topology", type=topology, help="as v5e:4x4")
  parser.add_argument("--slices", type=int, default=1, metavar="N")
  parser.add_argument("--bucket", help="name of the bucket, without gs://")
  parser.add_argument("--spot", action="store_true", help="cheaper, may be preempted")
  parser.add_argument("--keep", action="store_true", help="do not delete the slice at the end")
  parser.add_argument(
    "--restarts", type=int, default=20, metavar="N", help="after preemptions (20)"
  )
  parser.add_argument("--wait-hours", type=float, default=24, metavar="H", help="in the queue (24)")
  parser.add_argument("--poll", type=float, default=30, metavar="S", help="seconds (30)")
  parser.add_argument("--dry-run", action="store_true", help="show the commands, run none")
  return parser


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  own, rest = split(sys.argv[1:] if arguments is None else arguments)
  parser = _parser()
  options = parser.parse_args(own)
  options.train = rest
  if options.verb == "run" and not (options.topology and options.bucket and "--config" in rest):
    parser.error("run wants --topology, --bucket and, after --, --config FILE")
  tpu = Slice(options, Shell(options.dry_run))
  work = {
    "run": lambda: run(tpu),
    "status": lambda: print(tpu.state() or "there is none of that name"),
    "logs": lambda: say(f"exit code {follow(tpu)}"),
    "delete": tpu.delete,
  }
  return exit_code(work[options.verb])


if __name__ == "__main__":
  sys.exit(main())
