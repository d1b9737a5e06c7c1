"""What the launch tools refuse before they ask for anything, and the page's commands."""

import argparse
import pathlib
import shlex
import shutil
import subprocess

import pytest
from stand_ins import CONFIG, Cloud, nothing_there_then_active, tpu

from clip_jax import preflight
from tools import launch_gke, launch_slurm, launch_tpu

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  return Cloud(tmp_path, monkeypatch)


@pytest.fixture
def project(tmp_path, monkeypatch):
  """A project of its own, all committed."""
  folder = tmp_path / "project"
  (folder / "runs").mkdir(parents=True)
  for name in ("e.py", "model.py"):
    (folder / name).write_text("1")
  (folder / ".gitignore").write_text("runs\n")
  git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
  git += ["-c", "commit.gpgsign=false"]
  for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
    subprocess.run([*git, *words], check=True)
  monkeypatch.setattr(launch_tpu, "ROOT", folder)
  return folder


@pytest.mark.parametrize("name", ["new.py", "runs/ignored.py", "e.py"])
def test_a_config_that_is_not_committed_is_refused(cloud, project, capsys, name):
  (project / name).write_text("2")
  assert tpu(train=("--config", name)) == 2
  assert cloud.calls() == []
  assert f"--config {name} differs from the last commit" in capsys.readouterr().err


def test_what_else_is_not_committed_is_named(cloud, project, capsys):
  nothing_there_then_active(cloud)
  cloud.answers("run.exit; elif", out="0")
  assert tpu(train=("--config=e.py",)) == 0
  assert "not committed" not in capsys.readouterr().err
  (project / "model.py").write_text("2")
  (project / "new.py").write_text("2")
  assert tpu(train=("--config=e.py",)) == 0
  assert "not committed, so not on the hosts: model.py, new.py" in capsys.readouterr().err


@pytest.mark.parametrize(
  "train",
  [
    ("--config", "experiments/nothing.py"),
    ("--config", str(ROOT / CONFIG)),
    ("--config", f"../{ROOT.name}/{CONFIG}"),
    ("--config",),
    (),
  ],
)
def test_a_config_that_is_not_there_is_refused(cloud, capsys, train):
  slurm = ["submit", "b16", "--", *train]
  gke = ["apply", "b16", "--topology", "v5e:4x4", "--image", "x", "--bucket", "mine", "--", *train]
  assert (tpu(train=train), launch_slurm.main(slurm), launch_gke.main(gke)) == (2, 2, 2)
  assert cloud.calls() + cloud.calls("sbatch") + cloud.calls("kubectl") == []
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
  assert len(lines) == 3
  assert all((train[1] if len(train) > 1 else "comes --config FILE") in line for line in lines)


@pytest.mark.parametrize(
  ("tool", "options"),
  [
    (launch_tpu, ("--slices", "0")),
    (launch_tpu, ("--slices", "two")),
    (launch_tpu, ("--restarts", "-1")),
    (launch_tpu, ("--poll", "-1")),
    (launch_tpu, ("--wait-hours", "nan")),
    (launch_tpu, ("--bucket", "gs://mine/folder")),
    (launch_tpu, ("--bucket", "Mine")),
    (launch_gke, ("--slices", "0")),
    (launch_gke, ("--restarts", "-1")),
    (launch_gke, ("--bucket", "gs://mine/folder")),
    (launch_slurm, ("--nodes", "0")),
    (launch_slurm, ("--gpus", "-8")),
  ],
)
def test_bad_options_are_refused(cloud, capsys, tool, options):
  words = {
    launch_tpu: ["run", "b16", "--zone", "z", "--topology", "v5e:4x4", "--bucket", "mine"],
    launch_gke: ["apply", "b16", "--topology", "v5e:4x4", "--image", "x", "--bucket", "mine"],
    launch_slurm: ["submit", "b16"],
  }
  with pytest.raises(SystemExit) as stopped:
    tool.main([*words[tool], *options, "--", "--config", CONFIG])
  assert stopped.value.code == 2
  assert cloud.calls() + cloud.calls("sbatch") + cloud.calls("kubectl") == []
  assert f"argument {options[0]}: {options[1]!r}: want" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["B16", "b_16", "16b", "b16-", "../b16", "a" * 41, "b 16", ""])
def test_bad_names_are_refused(cloud, capsys, name):
  for words in (["run", name, "--zone", "z"], ["delete", name, "--zone", "z"]):
    with pytest.raises(SystemExit):
      launch_tpu.main(words)
  with pytest.raises(SystemExit):
    launch_gke.main(["delete", name])
  assert cloud.calls() + cloud.calls("kubectl") == []
  assert capsys.readouterr().err.count(f"argument name: {name!r}: want at most 40") == 3


@pytest.mark.parametrize("written", ["gs://mine", "gs://mine/"])
def test_a_bucket_may_be_given_as_an_address(cloud, capsys, written):
  assert tpu("--bucket", written, "--dry-run") == 0
  shown = capsys.readouterr().err
  assert "--rename-dir-limit 100000 mine ~/bucket" in shown
  assert "done: gs://mine/runs/b16" in shown


@pytest.mark.parametrize("generation", ["v4", "v5e", "v5p", "v6e"])
def test_unknown_topologies_are_refused(generation, capsys):
  with pytest.raises(SystemExit):
    tpu("--topology", f"{generation}:3x5")
  assert preflight.TOPOLOGIES[generation][-1] in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["4x4x12", "8x8x12"])
def test_cubes_of_whatever_number_are_taken(shape):
  assert launch_tpu.topology(f"v5p:{shape}") == f"v5p:{shape}"
  for other in (f"v5e:{shape}", f"v5p:{shape}x", "v5p:4x4x6", "v5p:4x4", "v5p:0x4x4", "v5p:-4x4x4"):
    with pytest.raises(argparse.ArgumentTypeError, match="multiples of 4"):
      launch_tpu.topology(other)


def test_gcloud_missing(monkeypatch, tmp_path, capsys):
  (tmp_path / "git").symlink_to(shutil.which("git"))
  monkeypatch.setenv("PATH", str(tmp_path))
  assert tpu() == 2
  assert "gcloud is not installed here: https://cloud.google.com/sdk" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("words", "program"),
  [(["submit", "b16"], "sbatch"), (["status", "b16"], "squeue"), (["cancel", "b16"], "scancel")],
)
def test_slurm_missing(monkeypatch, tmp_path, capsys, words, program):
  monkeypatch.setattr(launch_slurm, "ROOT", tmp_path)
  monkeypatch.setenv("PATH", str(tmp_path))
  (tmp_path / "e.py").touch()
  assert launch_slurm.main([*words, "--", "--config", "e.py"]) == 2
  assert (
    f"{program} is not installed here: run this on a Slurm login node" in capsys.readouterr().err
  )


def _commands_of_the_page():
  text = (ROOT / "docs" / "tpu_pod.md").read_text().replace("\\\n", " ")
  return [line for line in text.splitlines() if line.startswith("python tools/launch_")]


@pytest.mark.parametrize("line", _commands_of_the_page())
def test_the_pages_commands_are_understood(line, cloud):
  _, program, *words = shlex.split(line)
  words = ["mine" if word == "BUCKET" else word for word in words if word != "--dry-run"]
  tool = {"tpu": launch_tpu, "gke": launch_gke, "slurm": launch_slurm}[
    pathlib.Path(program).stem.removeprefix("launch_")
  ]
  at = words.index("--") if "--" in words else len(words)
  assert tool.main([*words[:at], "--dry-run", *words[at:]]) == 0
  assert cloud.calls() + cloud.calls("kubectl") + cloud.calls("sbatch") == []
  if "--config" in words:
    assert (ROOT / words[words.index("--config") + 1]).is_file()
