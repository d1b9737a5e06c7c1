"""The launch tools, with stand-ins for gcloud, kubectl and sbatch that keep what they were told."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys

import pytest
import yaml

from clip_jax import preflight
from tools import launch_gke, launch_slurm, launch_tpu

ROOT = pathlib.Path(__file__).parents[1]

# Answers by the first rule whose words all stand in the command; each rule is used `times` times.
STAND_IN = """#!{python}
import json, os, pathlib, signal, sys
folder = pathlib.Path({folder!r})
name, words = pathlib.Path(sys.argv[0]).name, " ".join(sys.argv[1:])
with (folder / "calls").open("a") as calls:
  calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
rules = json.loads((folder / "rules").read_text())
for rule in rules:
  if rule["words"] in words and rule["times"]:
    rule["times"] -= 1
    (folder / "rules").write_text(json.dumps(rules))
    if rule["signal"]:
      os.kill(os.getppid(), rule["signal"])
      sys.exit(1)
    print(rule["out"])
    print(rule["err"], file=sys.stderr)
    sys.exit(rule["code"])
"""
NONE = "ERROR: (gcloud) NOT_FOUND: Resource was not found."


class Cloud:
  def __init__(self, folder):
    self.folder, self.rules = folder, []
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
    (self.folder / "rules").write_text(json.dumps(self.rules))

  def calls(self, program="gcloud"):
    path = self.folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [shlex.join(c[1:]) for c in map(json.loads, lines) if c[0] == program]

  def verbs(self):
    """What was done to the slice, in order, without the questions."""
    names = {"queued-resources create": "create", "queued-resources delete": "delete",
             "scp": "copy", "setup.sh": "install", "train.sh": "start"}  # fmt: skip
    found = []
    for call in self.calls():
      verb = next((names[key] for key in names if key in call and "tail -n" not in call), None)
      found += [verb] if verb and not ("copy" in found[-1:] and verb == "copy") else []
    return found


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
  return Cloud(tmp_path)


def tpu(*options, train=("--config", "experiments/clip_vit_b16.py")):
  fixed = ["run", "b16", "--zone", "us-west4-a", "--topology", "v5e:4x4", "--bucket", "mine"]
  return launch_tpu.main([*fixed, "--poll", "0", *options, "--", *train])


def nothing_there_then_active(cloud):
  cloud.answers("describe", err=NONE, code=1, times=1)
  cloud.answers("describe", out="WAITING_FOR_RESOURCES", times=2)
  cloud.answers("describe", out="ACTIVE")


def test_a_run_from_request_to_deletion(cloud, capsys):
  nothing_there_then_active(cloud)
  cloud.answers("run.exit; elif", out="running\n0\n0\n0", times=1)
  cloud.answers("run.exit; elif", out="0\n0\n0\n0")
  assert tpu("--spot", "--project", "ours") == 0
  assert cloud.verbs() == ["create", "copy", "install", "start", "delete"]
  create = next(call for call in cloud.calls() if "create" in call)
  for words in ("v5litepod-16", "v2-alpha-tpuv5-lite", "--spot", "--project=ours", "--node-id=b16"):
    assert words in create
  shown = capsys.readouterr().err
  assert all(f"$ gcloud {call}" in shown for call in cloud.calls())
  start = next(call for call in cloud.calls() if "run.pid" in call and "cat > " in call)
  assert "--config experiments/clip_vit_b16.py --workdir runs/b16" in start


def test_the_hosts_scripts_are_shell():
  for text in (launch_tpu._SETUP, launch_tpu._START, launch_tpu._FOLLOW, launch_tpu._STATE):
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_the_start_runs_what_it_is_told_and_keeps_the_exit_code(tmp_path):
  """The very command, in a home folder of its own: quotes survive, a second start does nothing."""
  (tmp_path / "clip_jax").mkdir()
  words = [sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "a[0]=it's"]
  environment = {**os.environ, "HOME": str(tmp_path)}
  command = launch_tpu._START.replace("TRAIN", shlex.join(words))
  subprocess.run(["bash", "-c", command], check=True, env=environment)
  ask = ["bash", "-c", f"{launch_tpu._FOLLOW}; {launch_tpu._STATE}"]
  log = subprocess.run(ask, check=True, env=environment, capture_output=True, text=True).stdout
  assert '["a[0]=it\'s"]' in (tmp_path / "run.log").read_text()
  while not (tmp_path / "run.exit").exists():
    pass
  state = ["bash", "-c", launch_tpu._STATE]
  assert subprocess.run(state, env=environment, capture_output=True, text=True).stdout == "7\n", log


def test_preempted_slices_are_asked_for_again(cloud, capsys):
  cloud.answers("describe", err=NONE, code=1, times=1)
  cloud.answers("describe", out="ACTIVE", times=1)
  cloud.answers("run.exit; elif", err="connection closed", code=255, times=1)
  cloud.answers("describe", out="SUSPENDED", times=1)
  cloud.answers("describe", out="FAILED", times=1)  # the second one never comes
  cloud.answers("describe", out="ACTIVE")
  cloud.answers("run.exit; elif", out="0")
  assert tpu() == 0
  once = ["create", "copy", "install", "start", "delete"]
  assert cloud.verbs() == [*once, "create", "delete", *once]
  assert "was lost: another is asked for (2 of 20)" in capsys.readouterr().err


def test_lost_too_often(cloud, capsys):
  cloud.answers("describe", err=NONE, code=1, times=1)
  cloud.answers("describe", out="FAILED")
  assert tpu("--restarts", "2") == 2
  assert cloud.verbs() == ["create", "delete"] * 3
  assert "b16 was lost 3 times" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("said", "remedy"),
  [
    ("ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV5sLitepodPerZone' exceeded.", "quotas"),
    ("ERROR: (gcloud) There is no more capacity in the zone", "another --zone"),
    ("ERROR: (gcloud) PERMISSION_DENIED: Cloud TPU API has not been used in project", "enable tpu"),
  ],
)
def test_a_refused_request_leaves_nothing(cloud, capsys, said, remedy):
  cloud.answers("describe", err=NONE, code=1)
  cloud.answers("create", err=said, code=1)
  cloud.answers("delete", err=NONE, code=1)
  assert tpu() == 2
  assert cloud.verbs() == ["create", "delete"]
  (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
  assert said.removeprefix("ERROR: ")[:30] in line
  assert remedy in line


def test_without_credentials_nothing_is_requested(cloud, capsys):
  cloud.answers("describe", err="ERROR: You do not currently have an active account", code=1)
  assert tpu() == 2
  assert cloud.verbs() == []
  assert "gcloud auth login" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["scp", "setup.sh --", "cat > ~/train.sh"])
def test_what_fails_after_the_request_deletes_it(cloud, capsys, step):
  nothing_there_then_active(cloud)
  words = "--command=bash setup.sh" if step.startswith("setup") else step
  cloud.answers(words, err="ERROR: it broke", code=1)
  assert tpu() == 2
  assert cloud.verbs()[-1] == "delete"
  assert "it broke" in capsys.readouterr().err


def test_a_failed_training_is_told_and_deleted(cloud, capsys):
  nothing_there_then_active(cloud)
  cloud.answers("run.exit; elif", out="75\n2\n75\n75")
  assert tpu() == 2
  assert cloud.verbs()[-1] == "delete"
  assert "training ended with exit code 75" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_waiting_deletes(cloud, capsys, number):
  cloud.answers("describe", err=NONE, code=1, times=1)
  cloud.answers("describe", signalled=int(number), times=1)
  cloud.answers("describe", out="WAITING_FOR_RESOURCES")
  assert tpu() == 130
  assert cloud.verbs() == ["create", "delete"]
  assert "interrupted" in capsys.readouterr().err


def test_a_failed_deletion_is_told_with_the_command(cloud, capsys):
  nothing_there_then_active(cloud)
  cloud.answers("run.exit; elif", out="2")
  cloud.answers("delete", err="ERROR: try again later", code=1)
  assert tpu() == 2
  shown = capsys.readouterr().err
  assert "training ended with exit code 2" in shown
  assert "MAY STILL BE THERE AND COST MONEY" in shown
  by_hand = "gcloud compute tpus queued-resources delete b16 --zone=us-west4-a --force --quiet"
  assert f"Delete it by hand: {by_hand}" in shown


def test_keep_leaves_the_slice_and_tells(cloud, capsys):
  nothing_there_then_active(cloud)
  cloud.answers("run.exit; elif", out="0")
  assert tpu("--keep") == 0
  assert "delete" not in cloud.verbs()
  assert "is kept AND COSTS MONEY until: gcloud compute" in capsys.readouterr().err


def test_a_slice_that_is_there_is_used(cloud):
  cloud.answers("describe", out="ACTIVE")
  cloud.answers("run.exit; elif", out="0")
  assert tpu() == 0
  assert cloud.verbs() == ["copy", "install", "start", "delete"]


def test_several_slices(cloud):
  nothing_there_then_active(cloud)
  cloud.answers("run.exit; elif", out="0")
  assert tpu("--slices", "2") == 0
  create = next(call for call in cloud.calls() if "create" in call)
  assert "--node-count=2 --node-prefix=b16" in create
  assert {
    name for call in cloud.calls() for name in ("ssh b16-0", "ssh b16-1") if name in call
  } == {
    "ssh b16-0",
    "ssh b16-1",
  }


def test_a_dry_run_runs_nothing(cloud, capsys):
  assert tpu("--dry-run") == 0
  assert cloud.calls() == []
  shown = capsys.readouterr().err
  for verb in ("create", "describe", "scp", "setup.sh", "tail -n", "delete b16"):
    assert verb in shown


def test_gcloud_missing(monkeypatch, tmp_path, capsys):
  monkeypatch.setenv("PATH", str(tmp_path))
  assert tpu() == 2
  assert "gcloud is not installed here: https://cloud.google.com/sdk" in capsys.readouterr().err


@pytest.mark.parametrize("generation", ["v4", "v5e", "v5p", "v6e"])
def test_unknown_topologies_are_refused(generation, capsys):
  with pytest.raises(SystemExit):
    tpu("--topology", f"{generation}:3x5")
  assert preflight.TOPOLOGIES[generation][-1] in capsys.readouterr().err


@pytest.mark.parametrize(
  ("topology", "hosts", "chips"),
  [("v5e:4x4", 4, 4), ("v5e:2x4", 1, 8), ("v6e:16x16", 64, 4), ("v5p:2x2x1", 1, 4)],
)
def test_the_manifest(cloud, capsys, topology, hosts, chips):
  fixed = ["apply", "b16", "--topology", topology, "--image", "us/x:1", "--bucket", "mine"]
  assert launch_gke.main([*fixed, "--slices", "2", "--", "--config", "e.py"]) == 0
  assert cloud.calls("kubectl") == ["apply --filename -"]
  found = yaml.safe_load(capsys.readouterr().out)
  assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  (group,) = found["spec"]["replicatedJobs"]
  job = group["template"]["spec"]
  assert (group["replicas"], job["parallelism"], job["completions"]) == (2, hosts, hosts)
  pod = job["template"]["spec"]
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology.split(":")[1]
  (container,) = pod["containers"]
  assert container["resources"]["limits"] == {"google.com/tpu": chips}
  assert container["command"] == ["clip-jax", "train", "--config", "e.py", "--workdir", "runs/b16"]
  names = {volume["name"] for volume in pod["volumes"]}
  assert {mount["name"] for mount in container["volumeMounts"]} == names


def test_a_cluster_without_job_sets(cloud, capsys):
  cloud.answers("apply", err='error: no matches for kind "JobSet" in version', code=1)
  fixed = ["apply", "b16", "--topology", "v5e:4x4", "--image", "us/x:1", "--bucket", "mine"]
  assert launch_gke.main([*fixed, "--", "--config", "e.py"]) == 2
  assert "jobset.sigs.k8s.io/docs/installation" in capsys.readouterr().err


def test_gke_verbs(cloud):
  for verb in ("status", "logs", "delete"):
    assert launch_gke.main([verb, "b16"]) == 0
  assert [call.split()[0] for call in cloud.calls("kubectl")] == ["get", "logs", "delete"]


def test_the_batch_script(cloud, capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(launch_slurm, "ROOT", tmp_path)
  words = ["submit", "b16", "--nodes", "4", "--gpus", "8", "--partition", "gpu"]
  assert launch_slurm.main([*words, "--", "--config", "e.py", "--config.name=it's"]) == 0
  path = tmp_path / "runs" / "b16.sbatch"
  assert cloud.calls("sbatch") == [str(path)]
  text = path.read_text()
  assert text in capsys.readouterr().out
  subprocess.run(["bash", "-n", str(path)], check=True)
  for line in ("--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu",
               "--requeue", "--signal=TERM@180"):  # fmt: skip
    assert f"#SBATCH {line}\n" in text


@pytest.mark.parametrize(
  ("code", "results", "requeued"), [(0, False, 1), (0, True, 0), (2, False, 0)]
)
def test_the_batch_script_asks_again_until_there_are_results(
  cloud, monkeypatch, tmp_path, code, results, requeued
):
  monkeypatch.setattr(launch_slurm, "ROOT", tmp_path)
  assert launch_slurm.main(["submit", "b16", "--", "--config", "e.py"]) == 0
  for name in ("srun", "scontrol"):
    (tmp_path / "bin" / name).symlink_to(tmp_path / "bin" / "sbatch")
  (tmp_path / "runs" / "b16").mkdir(parents=True)
  if results:
    (tmp_path / "runs" / "b16" / "results.json").write_text("{}")
  cloud.answers("clip-jax train", code=code)
  environment = {**os.environ, "SLURM_JOB_ID": "5"}
  done = subprocess.run(["bash", str(tmp_path / "runs" / "b16.sbatch")], env=environment)
  assert done.returncode == code
  assert len(cloud.calls("srun")) == 1
  assert cloud.calls("scontrol") == ["requeue 5"] * requeued


def test_slurm_refusals(cloud, capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(launch_slurm, "ROOT", tmp_path)
  cloud.answers("b16.sbatch", err="sbatch: error: invalid partition specified: x", code=1)
  assert launch_slurm.main(["submit", "b16", "--", "--config", "e.py"]) == 2
  assert "invalid partition specified: x. See sinfo" in capsys.readouterr().err
  assert launch_slurm.main(["submit", "../b16", "--", "--config", "e.py"]) == 2
  for verb in ("status", "cancel"):
    assert launch_slurm.main([verb, "b16"]) == 0
  assert cloud.calls("scancel") == ["--me --name=b16"]


def _commands_of_the_page():
  text = (ROOT / "docs" / "tpu_pod.md").read_text().replace("\\\n", " ")
  return [line for line in text.splitlines() if line.startswith("python tools/launch_")]


@pytest.mark.parametrize("line", _commands_of_the_page())
def test_the_pages_commands_are_understood(line, cloud):
  _, program, *words = shlex.split(line)
  words = [word for word in words if word != "--dry-run"]
  tool = {"tpu": launch_tpu, "gke": launch_gke, "slurm": launch_slurm}[
    pathlib.Path(program).stem.removeprefix("launch_")
  ]
  at = words.index("--") if "--" in words else len(words)
  assert tool.main([*words[:at], "--dry-run", *words[at:]]) == 0
  assert cloud.calls() + cloud.calls("kubectl") + cloud.calls("sbatch") == []
  if "--config" in words:
    assert (ROOT / words[words.index("--config") + 1]).is_file()
