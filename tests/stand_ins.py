"""Stand-ins for gcloud, kubectl and the programs of Slurm, that keep what they were told."""

import ast
import os
import shlex
import sys

from tools import launch_tpu, queued_resource

# Answers by the first rule whose words stand in the command; each rule is used `times` times. Few
# imports, for there are many starts.
STAND_IN = """#!{python} -S
import os, sys
os.chdir({folder!r})
words = " ".join(sys.argv[1:])
with open("calls", "a") as calls:
  calls.write(repr([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
with open("rules") as file:
  rules = eval(file.read())
for rule in rules:
  if rule["words"] in words and rule["times"]:
    rule["times"] -= 1
    with open("rules", "w") as file:
      file.write(repr(rules))
    if rule["signal"]:
      os.kill(os.getppid(), rule["signal"])
      sys.exit(1)
    print(rule["out"])
    print(rule["err"], file=sys.stderr)
    sys.exit(rule["code"])
"""
NONE = "ERROR: (gcloud) NOT_FOUND: Resource was not found."
BUSY = "ERROR: (gcloud) HttpError: status 503, The service is currently unavailable."
# What gcloud says without a network, though the credentials are as good as ever.
NO_NETWORK = (
  "ERROR: (gcloud) There was a problem refreshing your current auth tokens: HTTPSConnectionPool("
  "host='oauth2.googleapis.com', port=443): Max retries exceeded with url: /token (Caused by "
  "NameResolutionError)\nPlease run:\n  $ gcloud auth login\nto obtain new credentials."
)
CONFIG = "experiments/clip_vit_b16.py"
ONCE = ["create", "copy", "install", "start", "delete"]
# Saves when asked to, as training does.
SAVES = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("step 1", flush=True)
time.sleep(60)
"""


class Cloud:
  """The programs, first in PATH, and what they were told. A failing question has few tries."""

  def __init__(self, folder, monkeypatch):
    self.folder, self.rules = folder, []
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(queued_resource, "_TRIES", 5)
    (folder / "rules").write_text("[]")
    for name in ("gcloud", "kubectl", "sbatch", "squeue", "scancel"):
      program = folder / "bin" / name
      program.parent.mkdir(exist_ok=True)
      program.write_text(STAND_IN.format(python=sys.executable, folder=str(folder)))
      program.chmod(0o755)

  def answers(self, words, out="", err="", code=0, times=1000, signalled=0):
    self.rules.append(
      {"words": words, "out": out, "err": err, "code": code, "times": times, "signal": signalled}
    )
    (self.folder / "rules").write_text(repr(self.rules))

  def calls(self, program="gcloud"):
    path = self.folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [shlex.join(c[1:]) for c in map(ast.literal_eval, lines) if c[0] == program]

  def verbs(self):
    """What was done to the slice, in order, without the questions."""
    names = {"queued-resources create": "create", "queued-resources delete": "delete",
             "scp": "copy", "setup.sh": "install", "cat > ~/train.sh": "start"}  # fmt: skip
    found = []
    for call in self.calls():
      verb = next((names[key] for key in names if key in call), None)
      found += [verb] if verb and not ("copy" in found[-1:] and verb == "copy") else []
    return found


def tpu(*options, train=("--config", CONFIG)):
  fixed = ["run", "b16", "--zone", "us-west4-a", "--topology", "v5e:4x4", "--bucket", "mine"]
  return launch_tpu.main([*fixed, "--poll", "0", *options, "--", *train])


def nothing_there_then_active(cloud):
  cloud.answers("describe", err=NONE, code=1, times=1)
  cloud.answers("describe", out="WAITING_FOR_RESOURCES", times=2)
  cloud.answers("describe", out="ACTIVE")
