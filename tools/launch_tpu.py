"""A training run on a Cloud TPU slice, from the request to the deletion of the slice.

python tools/launch_tpu.py run NAME --topology v5e:4x4 --zone us-west4-a --bucket BUCKET \\
  -- --config experiments/clip_vit_b16.py

`run` requests the slice as a queued resource, waits for it, copies this commit there and installs
it, starts `clip-jax train` on all hosts, and follows the log of the first. When the slice is
preempted it asks for another, and when training stopped unfinished on one that is still there it
starts it again, from the newest checkpoint, --restarts times. When training is finished, or
anything failed, or on Ctrl-C, SIGTERM and SIGHUP, it deletes the slice (--keep leaves it, and tells
how to delete it). `status`, `logs` and `delete` do what they say, from any machine. --dry-run shows
all commands and runs none.

The bucket is mounted on every host (gcsfuse); its folders data/ and runs/ stand for those of the
project, so --config.data.sources[0].path=data/cc12m reads gs://BUCKET/data/cc12m, and the run's
workdir is gs://BUCKET/runs/NAME.

Sources: cloud.google.com/tpu/docs, "Manage TPU Spot VMs"; cloud.google.com/storage/docs/
cloud-storage-fuse.
"""

import argparse
import contextlib
import pathlib
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

if __package__ in (None, ""):
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from clip_jax import preflight
from clip_jax.hosts import UNFINISHED
from clip_jax.watchdog import STUCK
from tools.arguments import bucket_name, config_file, number, resource_name, split
from tools.commands import CommandFailed, LaunchError, Shell, exit_code, say
from tools.queued_resource import KINDS, LOST, Slice

ROOT = pathlib.Path(__file__).parents[1]
_STEP_TRIES = 6  # 12 minutes of pauses with the usual --poll: a host may start anew meanwhile
_LINGERING = 20  # questions until a host that goes on without the others is given up

_MOUNT = (
  "mountpoint -q ~/bucket || gcsfuse --implicit-dirs --rename-dir-limit 100000 BUCKET ~/bucket"
)
_SETUP = f"""\
set -eu
# The hosts' images update themselves after the start, and hold the lock meanwhile.
apt() {{ sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -qq "$@"; }}
if ! command -v gcsfuse > /dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee $key > /dev/null
  site=https://packages.cloud.google.com/apt
  echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" \\
    | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  apt update
  apt install -y gcsfuse
fi
command -v python3.11 > /dev/null || {{ apt update; apt install -y python3.11; }}
apt install -y python3.11-venv make
mkdir -p ~/bucket ~/clip_jax
{_MOUNT}
mkdir -p ~/bucket/data ~/bucket/runs
tar -xf ~/clip_jax.tar -C ~/clip_jax
cd ~/clip_jax
ln -sfn ~/bucket/data data
ln -sfn ~/bucket/runs runs
make install-tpu
"""
_RUNS = 'grep -qs train.sh "/proc/$(cat ~/run.pid)/cmdline"'
# Detached, so that a dropped connection ends nothing; a second start changes nothing. A host that
# was started anew has no bucket. Where one is stopped, all processes get SIGTERM: training saves,
# and the shell around it must live until then to note its exit code.
_START = f"""\
set -eu
cd ~/clip_jax
if [ -f ~/run.pid ] && {_RUNS}; then exit 0; fi
{_MOUNT}
rm -f ~/run.exit
cat > ~/train.sh << 'END'
exec TRAIN
END
setsid nohup sh -c 'trap : TERM; sh ~/train.sh > ~/run.log 2>&1; echo $? > ~/run.exit' \
  < /dev/null > /dev/null 2>&1 &
echo $! > ~/run.pid
"""
_FOLLOW = (
  f"touch ~/run.log; if {_RUNS}; "
  'then tail -n +1 -F --pid="$(cat ~/run.pid)" ~/run.log; else cat ~/run.log; fi'
)
# Neither a code nor a process: the host was started anew.
_STATE = (
  f"if [ -f ~/run.exit ]; then cat ~/run.exit; elif {_RUNS}; then echo running; "
  f"else echo {UNFINISHED}; fi"
)


class Lost(LaunchError):
  """The slice is no longer there, or of no use."""


def wait(tpu: Slice) -> None:
  """Returns once the slice is there. Raises: Lost; LaunchError after --wait-hours."""
  deadline = time.monotonic() + 3600 * tpu.options.wait_hours
  while (state := tpu.state()) != "ACTIVE":
    if state in LOST:
      raise Lost(f"{tpu.options.name} is {state or 'not there'}")
    if time.monotonic() > deadline:
      raise LaunchError(f"{tpu.options.name} was still {state} after {tpu.options.wait_hours:g} h")
    say(f"{tpu.options.name}: {state}")
    time.sleep(tpu.options.poll)


def on_slice(tpu: Slice, step: Callable[[], str], worked: bool = True) -> str:
  """What a step on the hosts says. One that fails is tried again while the slice is there.

  Raises: Lost, also after `_STEP_TRIES` failures on a slice that has `worked` (a host may be dead);
    LaunchError when another slice would not help.
  """
  tries = 0
  while True:
    try:
      return step()
    except CommandFailed as error:
      if (state := tpu.state()) in LOST:
        raise Lost(f"{tpu.options.name} is {state or 'not there'}") from error
      tries += 1
      if error.final or tries == _STEP_TRIES:
        kind = Lost if worked and not error.final else LaunchError
        raise kind(f"{tpu.options.name} is there, but {error}") from error
      tpu.pause(tries, str(error))


def install(tpu: Slice) -> str:
  """This commit, on all hosts. Raises: CommandFailed."""
  with tempfile.TemporaryDirectory() as folder:
    archive, script = f"{folder}/clip_jax.tar", f"{folder}/setup.sh"
    text = _SETUP.replace("BUCKET", tpu.options.bucket)
    pathlib.Path(script).write_text(text)
    if tpu.shell.dry_run:
      say(f"setup.sh:\n{text}")
    tpu.shell.run("git", "-C", str(ROOT), "archive", "--output", archive, "HEAD")
    tpu.copy(archive, script)
  return tpu.on_hosts("bash setup.sh")


def start(tpu: Slice) -> str:
  """Starts training on the hosts where it does not run. Raises: CommandFailed."""
  words = [".venv/bin/clip-jax", "train", *tpu.options.train]
  words += ["--workdir", f"runs/{tpu.options.name}"]
  text = _START.replace("BUCKET", tpu.options.bucket).replace("TRAIN", shlex.join(words))
  return tpu.on_hosts(text)


def follow(tpu: Slice) -> int:
  """Shows the first host's log until training has ended: its exit code. Raises: as `on_slice`."""
  lingering = 0
  while True:
    with contextlib.suppress(CommandFailed):  # a dropped connection: the states tell
      tpu.on_hosts(_FOLLOW, workers="0", follow=True)
    states = on_slice(tpu, lambda: tpu.on_hosts(_STATE, pretend="0")).split()
    codes = [int(state) for state in states if state.isdigit()]
    if "running" not in states:
      return verdict(codes)
    lingering += any(codes)  # those that stop for another's sake do so within the heartbeat
    if lingering > _LINGERING:
      raise Lost(f"{tpu.options.name}: a host neither trains nor ends (exit codes {codes})")
    time.sleep(tpu.options.poll)


def verdict(codes: Sequence[int]) -> int:
  """All hosts' exit codes in one: an error's before UNFINISHED, which is before 0.

  A host that was stuck is unfinished too.
  """
  codes = [UNFINISHED if code == STUCK else code for code in codes]
  return max([code for code in codes if code not in (0, UNFINISHED)] or codes, default=1)


def run(tpu: Slice) -> None:
  """See the module. Raises: LaunchError, after the slice was deleted."""
  name, limit = tpu.options.name, tpu.options.restarts
  check_commit(tpu.shell, config_file(tpu.options.train, ROOT))
  there, installed = not tpu.shell.dry_run and tpu.state() != "", False
  if there:
    fate = "kept" if tpu.options.keep else "deleted"
    say(f"{name} is already there: used as it is, and {fate} at the end")
  with _deleted_at_the_end(tpu):
    for attempt in range(limit + 1):
      if attempt:
        what = "training starts again on it" if there else "another is asked for"
        happened = "stopped unfinished" if there else "was lost"
        say(f"{name} {happened}: {what} ({attempt} of {limit})")
      if attempt and not there:
        tpu.delete()
      if not there:
        tpu.create()
      code = _once(tpu, installed)
      if code == 0:
        say(f"done: gs://{tpu.options.bucket}/runs/{name}")
        return
      if code not in (None, UNFINISHED):
        raise LaunchError(f"training ended with exit code {code}; its log is above")
      there = installed = code == UNFINISHED and tpu.state() not in LOST
    raise LaunchError(
      f"{name} stopped or was lost {limit + 1} times; the same command goes on from the newest "
      "checkpoint"
    )


def check_commit(shell: Shell, config: str) -> None:
  """The hosts get what is committed: says what is not. Raises: LaunchError if `config` is not."""
  status = ("git", "-C", str(ROOT), "status", "--porcelain")
  if shell.run(*status, "--ignored", "--", config):
    raise LaunchError(
      f"--config {config} differs from the last commit, and the hosts get commits only: git add "
      f"{config}, git commit"
    )
  changed = [line[3:] for line in shell.run(*status).splitlines()]
  if changed:
    say(f"warning: not committed, so not on the hosts: {', '.join(changed)}")


def _once(tpu: Slice, installed: bool) -> int | None:
  """Training's exit code on one slice; None when the slice was lost."""
  try:
    wait(tpu)
    if not installed:
      on_slice(tpu, lambda: install(tpu), worked=False)
    on_slice(tpu, lambda: start(tpu), worked=installed)
    code = follow(tpu)
  except Lost as error:
    say(str(error))
    return None
  if code == UNFINISHED:
    time.sleep(tpu.options.poll)  # a preemption shows in the slice's state a little later
  return code


@contextlib.contextmanager
def _deleted_at_the_end(tpu: Slice) -> Iterator[None]:
  """Whatever happens, also SIGTERM and SIGHUP; with --keep it tells how."""

  def end() -> None:
    for stop in before:
      signal.signal(stop, signal.SIG_IGN)  # a closing terminal sends more than one
    if tpu.options.keep:
      say(f"{tpu.options.name} is kept AND COSTS MONEY until: {tpu.by_hand()}")
    else:
      tpu.delete()

  before = {stop: signal.getsignal(stop) for stop in (signal.SIGTERM, signal.SIGHUP)}
  for stop, handler in before.items():
    if handler != signal.SIG_IGN:  # as under nohup
      signal.signal(stop, signal.default_int_handler)
  try:
    yield
  except BaseException as error:
    try:
      end()
    except LaunchError as second:
      raise LaunchError(f"{str(error) or 'interrupted'}; and {second}") from error
    raise
  else:
    end()
  finally:
    for stop, handler in before.items():
      signal.signal(stop, handler)


def topology(text: str) -> str:
  """An argparse type: a slice that Google Cloud may have."""
  generation, _, shape = text.partition(":")
  sides = [int(side) for side in shape.split("x") if side.isdecimal()]
  # v4 and v5p come in all sizes of whole cubes of 4 x 4 x 4
  cubes = generation in ("v4", "v5p") and len(sides) == 3 and not any(side % 4 for side in sides)
  known = generation in KINDS and shape in preflight.TOPOLOGIES[generation]
  if not (known or (cubes and all(sides) and shape.count("x") == 2)):
    names = "; ".join(f"{name}: {' '.join(preflight.TOPOLOGIES[name])}" for name in KINDS)
    also = ", and of v4 and v5p others whose sides are multiples of 4"
    raise argparse.ArgumentTypeError(f"{text!r} is unknown. Known are, as v5e:4x4, {names}{also}")
  return text


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    usage="launch_tpu.py VERB NAME --zone ZONE [OPTION ...] [-- ARGUMENTS OF clip-jax train]",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("verb", choices=("run", "status", "logs", "delete"))
  parser.add_argument("name", type=resource_name, help="of the queued resource and the run")
  parser.add_argument("--zone", required=True)
  parser.add_argument("--project", default="", help="gcloud's own when left out")
  parser.add_argument("--topology", type=topology, help="as v5e:4x4")
  parser.add_argument("--slices", type=number(int, 1), default=1, metavar="N")
  parser.add_argument("--bucket", type=bucket_name, help="its name, with or without gs://")
  parser.add_argument("--spot", action="store_true", help="cheaper, may be preempted")
  parser.add_argument("--keep", action="store_true", help="do not delete the slice at the end")
  count, amount = number(int, 0), number(float, 0)
  parser.add_argument("--restarts", type=count, default=20, metavar="N", help="at most (20)")
  parser.add_argument("--wait-hours", type=amount, default=24, metavar="H", help="for it (24)")
  parser.add_argument("--poll", type=amount, default=30, metavar="S", help="seconds (30)")
  parser.add_argument("--dry-run", action="store_true", help="show the commands, run none")
  return parser


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  own, rest = split(sys.argv[1:] if arguments is None else arguments)
  parser = _parser()
  options = parser.parse_args(own)
  options.train = rest
  if options.verb == "run" and not (options.topology and options.bucket):
    parser.error("run wants --topology and --bucket")
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
