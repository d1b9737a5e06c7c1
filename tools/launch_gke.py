"""A training run on a TPU node pool of Google Kubernetes Engine, as a JobSet.

python tools/launch_gke.py apply NAME --topology v5e:4x4 --image IMAGE --bucket BUCKET \\
  -- --config experiments/clip_vit_b16.py

`apply` writes the manifest to standard output and hands it to kubectl; `status`, `logs` (of the
first host) and `delete` do what they say. --dry-run shows the manifest and the commands and runs
none. IMAGE holds this project (see the Dockerfile). The bucket is mounted as the project's data/
and runs/ (Cloud Storage FUSE); the run's workdir is gs://BUCKET/runs/NAME. A host that dies or is
preempted makes all stop, and the JobSet starts them again from the newest checkpoint, --restarts
times; an error that repeating will not cure ends it at once. It wants JobSet 0.6 or later.

GKE tells each host its place in the slice, and JAX reads it: no coordinator is named here. XPK
(github.com/AI-Hypercomputer/xpk) does the same for clusters that it made itself: `xpk workload
create --tpu-type v5litepod-16 --docker-image IMAGE --command "clip-jax train ..."`.

Sources: cloud.google.com/kubernetes-engine/docs, "Deploy TPU Multislices in GKE", "Mount Cloud
Storage buckets"; jobset.sigs.k8s.io, "Failure Policy"; kubernetes.io/docs/concepts/workloads/
controllers/job, "Pod failure policy".
"""

import argparse
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import yaml

if __package__ in (None, ""):
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from tools.arguments import bucket_name, config_file, number, resource_name, split
from tools.commands import Shell, exit_code
from tools.launch_tpu import topology

ROOT = pathlib.Path(__file__).parents[1]
_ACCELERATORS = {
  "v4": "tpu-v4-podslice",
  "v5e": "tpu-v5-lite-podslice",
  "v5p": "tpu-v5p-slice",
  "v6e": "tpu-v6e-slice",
}
_WORK = "/work"  # the project in the image


def hosts(slice_topology: str) -> tuple[int, int]:
  """(hosts of a slice, chips of a host). A v5e or v6e slice of up to 8 chips has one host."""
  generation, _, shape = slice_topology.partition(":")
  chips = math.prod(map(int, shape.split("x")))
  alone = chips <= 8 and generation in ("v5e", "v6e")
  return (1, chips) if alone else (max(chips // 4, 1), 4)


def manifest(options: argparse.Namespace) -> dict[str, Any]:
  """The JobSet: one job a slice, one pod a host."""
  generation, _, shape = options.topology.partition(":")
  count, chips = hosts(options.topology)
  train = ["clip-jax", "train", *options.train, "--workdir", f"runs/{options.name}"]
  mounts = [
    {"name": "bucket", "mountPath": f"{_WORK}/{name}", "subPath": name} for name in ("data", "runs")
  ]
  container = {
    "name": "train",
    "image": options.image,
    "workingDir": _WORK,
    "command": train,
    "ports": [{"containerPort": port} for port in (8471, 8080, 8476)],
    "resources": {"limits": {"google.com/tpu": chips}},
    "volumeMounts": [*mounts, {"name": "memory", "mountPath": "/dev/shm"}],
  }
  bucket = {
    "driver": "gcsfuse.csi.storage.gke.io",
    "volumeAttributes": {
      "bucketName": options.bucket,
      "mountOptions": "implicit-dirs,rename-dir-limit=100000",
    },
  }
  selector = {
    "cloud.google.com/gke-tpu-accelerator": _ACCELERATORS[generation],
    "cloud.google.com/gke-tpu-topology": shape,
  } | ({"cloud.google.com/gke-spot": "true"} if options.spot else {})
  pod = {
    "restartPolicy": "Never",
    "serviceAccountName": options.service_account,
    "terminationGracePeriodSeconds": 120,  # for the checkpoint after SIGTERM
    "nodeSelector": selector,
    "containers": [container],
    "volumes": [
      {"name": "bucket", "csi": bucket},
      {"name": "memory", "emptyDir": {"medium": "Memory"}},
    ],
  }
  # Not cured by repeating: clip-jax's errors (2), Python's own (1), no such program (126 to 128).
  # Older JobSets refuse a rule without the empty list of conditions.
  error = {"containerName": "train", "operator": "In", "values": [1, 2, 126, 127, 128]}
  failed = {"action": "FailJob", "onExitCodes": error, "onPodConditions": []}
  job = {
    "parallelism": count,
    "completions": count,
    "backoffLimit": 0,  # one host that stops, for whatever reason, ends the job
    "podFailurePolicy": {"rules": [failed]},
    "template": {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, "spec": pod},
  }
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {
      "name": options.name,
      "annotations": {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
      },
    },
    "spec": {
      "failurePolicy": {
        "maxRestarts": options.restarts,
        # Jobs that failed in another way are restarted: exit code 75 or 42, a lost node.
        "rules": [
          {"name": "error", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
        ],
      },
      "replicatedJobs": [{"name": "slice", "replicas": options.slices, "template": {"spec": job}}],
    },
  }


def apply(options: argparse.Namespace, shell: Shell) -> None:
  """Raises: LaunchError. kubectl creates the JobSet whole or not at all."""
  config_file(options.train, ROOT)  # the image is made from this project
  text = yaml.safe_dump(manifest(options), sort_keys=False)
  print(text)
  shell.run("kubectl", "apply", "--filename", "-", text=text)


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  own, rest = split(sys.argv[1:] if arguments is None else arguments)
  parser = argparse.ArgumentParser(
    usage="launch_gke.py VERB NAME [OPTION ...] [-- ARGUMENTS OF clip-jax train]",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("verb", choices=("apply", "status", "logs", "delete"))
  parser.add_argument("name", type=resource_name, help="of the JobSet and the run")
  parser.add_argument("--topology", type=topology, help="as v5e:4x4")
  parser.add_argument("--slices", type=number(int, 1), default=1, metavar="N")
  parser.add_argument("--image", help="with this project in /work")
  parser.add_argument("--bucket", type=bucket_name, help="its name, with or without gs://")
  parser.add_argument("--service-account", default="default", help="that may use the bucket")
  parser.add_argument("--spot", action="store_true", help="a node pool of Spot machines")
  count = number(int, 0)
  parser.add_argument("--restarts", type=count, default=20, metavar="N", help="at most (20)")
  parser.add_argument("--dry-run", action="store_true", help="show all, run nothing")
  options = parser.parse_args(own)
  options.train = rest
  if options.verb == "apply" and not (options.topology and options.image and options.bucket):
    parser.error("apply wants --topology, --image and --bucket")
  shell = Shell(options.dry_run)
  label = f"jobset.sigs.k8s.io/jobset-name={options.name}"
  first = f"{label},batch.kubernetes.io/job-completion-index=0"
  commands = {
    "status": ("get", f"jobset/{options.name}", "--output=wide"),
    "logs": ("logs", "--follow", f"--selector={first}", "--tail=-1", "--container=train"),
    "delete": ("delete", f"jobset/{options.name}", "--ignore-not-found"),
  }
  if options.verb == "apply":
    return exit_code(lambda: apply(options, shell))
  command = ("kubectl", *commands[options.verb])
  return exit_code(lambda: print(shell.run(*command, follow=options.verb == "logs"), end=""))


if __name__ == "__main__":
  sys.exit(main())
