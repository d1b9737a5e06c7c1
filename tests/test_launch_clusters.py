"""Runs on Kubernetes and Slurm, with stand-ins for kubectl, sbatch and srun."""

import os
import signal
import subprocess
import sys

import pytest
import yaml
from stand_ins import CONFIG, SAVES, Cloud

from tools import launch_gke, launch_slurm


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  return Cloud(tmp_path, monkeypatch)


@pytest.mark.parametrize(
  ("topology", "hosts", "chips"),
  [("v5e:4x4", 4, 4), ("v5e:2x4", 1, 8), ("v6e:16x16", 64, 4), ("v5p:2x2x1", 1, 4)],
)
def test_the_manifest(cloud, capsys, topology, hosts, chips):
  fixed = ["apply", "b16", "--topology", topology, "--image", "us/x:1", "--bucket", "mine"]
  assert launch_gke.main([*fixed, "--slices", "2", "--", "--config", CONFIG]) == 0
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
  assert container["command"] == ["clip-jax", "train", "--config", CONFIG, "--workdir", "runs/b16"]
  names = {volume["name"] for volume in pod["volumes"]}
  assert {mount["name"] for mount in container["volumeMounts"]} == names


def test_the_manifest_restarts_what_is_unfinished_and_ends_on_errors(cloud, capsys):
  """The fields and their limits as the Job and JobSet APIs have them."""
  fixed = ["apply", "b16", "--topology", "v5e:4x4", "--image", "x", "--bucket", "gs://mine"]
  assert launch_gke.main([*fixed, "--restarts", "7", "--", "--config", CONFIG]) == 0
  spec = yaml.safe_load(capsys.readouterr().out)["spec"]
  policy, job = spec["failurePolicy"], spec["replicatedJobs"][0]["template"]["spec"]
  assert policy["maxRestarts"] == 7
  (rule,) = policy["rules"]
  assert rule.keys() == {"name", "action", "onJobFailureReasons"}
  assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
  assert rule["name"].isalpha()  # no hyphen
  # A pod failure policy goes with this restart policy only; JobSet makes the new pods.
  assert (job["template"]["spec"]["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
  (failed,) = job["podFailurePolicy"]["rules"]
  assert (failed["action"], failed["onPodConditions"]) == ("FailJob", [])
  codes = failed["onExitCodes"]
  assert codes["containerName"] == job["template"]["spec"]["containers"][0]["name"]
  assert codes["operator"] == "In"
  assert codes["values"] == sorted(codes["values"])
  assert 2 in codes["values"]
  assert not {0, 75, 137, 143} & set(codes["values"])  # finished, unfinished, killed


@pytest.mark.parametrize(
  ("said", "remedy"),
  [
    ('error: no matches for kind "JobSet" in version', "jobset.sigs.k8s.io/docs/installation"),
    ('Error: strict decoding error: unknown field "spec.failurePolicy.rules"', "JobSet of 0.6"),
    ("error: You must be logged in to the server (Unauthorized)", "get-credentials CLUSTER"),
    (
      "Unable to connect to the server: getting credentials: exec: executable "
      "gke-gcloud-auth-plugin not found",
      "install gke-gcloud-auth-plugin",
    ),
    ("The connection to the server 10.0.0.2 was refused - did you", "cluster is out of reach"),
    (
      "The connection to the server localhost:8080 was refused - did you specify the right host",
      "Kubectl knows no cluster: gcloud container clusters get-credentials CLUSTER",
    ),
    ("Unable to connect to the server: dial tcp: i/o timeout", "cluster is out of reach"),
    (
      'Error from server (Forbidden): jobsets.jobset.x-k8s.io is forbidden: User "a" cannot create',
      "roles/container.developer",
    ),
  ],
)
def test_what_kubectl_refuses(cloud, capsys, said, remedy):
  cloud.answers("apply", err=said, code=1)
  fixed = ["apply", "b16", "--topology", "v5e:4x4", "--image", "us/x:1", "--bucket", "mine"]
  assert launch_gke.main([*fixed, "--", "--config", CONFIG]) == 2
  (line,) = capsys.readouterr().err.splitlines()[1:]
  assert line.startswith("error: kubectl apply")
  assert said[:40] in line
  assert remedy in line


def test_gke_verbs(cloud):
  for verb in ("status", "logs", "delete"):
    assert launch_gke.main([verb, "b16"]) == 0
  assert [call.split()[0] for call in cloud.calls("kubectl")] == ["get", "logs", "delete"]


def test_the_batch_script(cloud, capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(launch_slurm, "ROOT", tmp_path)
  (tmp_path / "e.py").touch()
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


# Runs one task a code, and returns the highest, as the real one does.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
highest=0
for code in $CODES; do
  CODE=$code "$@"
  code=$?
  [ $code -le $highest ] || highest=$code
done
exit $highest
"""


@pytest.mark.parametrize(
  ("codes", "code", "requeued"),
  [
    ("0 0", 0, 0),
    ("75 75", 75, 1),
    ("0 75", 75, 1),
    ("75 2 75", 100, 0),
    ("75 137", 137, 0),
    ("42 75", 75, 1),
    ("42 2", 100, 0),
  ],
)
def test_the_batch_script_goes_back_into_the_queue_while_unfinished(
  cloud, monkeypatch, tmp_path, codes, code, requeued
):
  monkeypatch.setattr(launch_slurm, "ROOT", tmp_path)
  (tmp_path / "e.py").touch()
  (tmp_path / "bin" / "scontrol").symlink_to(tmp_path / "bin" / "sbatch")
  for path, text in (("bin/srun", SRUN), (".venv/bin/clip-jax", '#!/bin/sh\nexit "$CODE"\n')):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text)
    (tmp_path / path).chmod(0o755)
  assert launch_slurm.main(["submit", "b16", "--", "--config", "e.py"]) == 0
  environment = {**os.environ, "SLURM_JOB_ID": "5", "CODES": codes}
  done = subprocess.run(["bash", str(tmp_path / "runs" / "b16.sbatch")], env=environment)
  assert done.returncode == code
  assert cloud.calls("scontrol") == ["requeue 5"] * requeued


def test_a_task_that_is_stopped_saves_before_its_shell_ends():
  words = ["bash", "-c", launch_slurm._TASK, "task", sys.executable, "-S", "-c", SAVES]
  task = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
  assert task.stdout.readline() == b"step 1\n"
  os.killpg(task.pid, signal.SIGTERM)
  assert task.communicate(timeout=30) == (b"", None)
  assert task.returncode == 75


def test_slurm_refusals(cloud, capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(launch_slurm, "ROOT", tmp_path)
  (tmp_path / "e.py").touch()
  cloud.answers("b16.sbatch", err="sbatch: error: invalid partition specified: x", code=1)
  assert launch_slurm.main(["submit", "b16", "--", "--config", "e.py"]) == 2
  assert "invalid partition specified: x. See sinfo" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    launch_slurm.main(["submit", "../b16", "--", "--config", "e.py"])
  for verb in ("status", "cancel"):
    assert launch_slurm.main([verb, "b16"]) == 0
  assert cloud.calls("scancel") == ["--me --name=b16"]
