"""Where packages come from, and the command line of the tool."""

import os
import pathlib
import subprocess
import sys

import pytest
import trees

from tools import prepare_data
from tools.prepare import packages

ROOT = pathlib.Path(__file__).parents[1]


def _fake_tools(folder: pathlib.Path, monkeypatch, apt: str) -> None:
  """An apt-get that runs these shell lines, and a dpkg whose .deb files hold a folder's path."""
  for name, lines in (("apt-get", apt), ("dpkg", 'cp -r "$(cat "$2")/." "$3"')):
    path = folder / "bin" / name
    trees.write(path, f"#!/bin/sh\nset -e\n{lines}\n")
    path.chmod(0o755)
  monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def test_packages_are_downloaded_unpacked_and_cleared_away(tmp_path, monkeypatch):
  trees.fashion_tree(tmp_path / "tree")
  _fake_tools(
    tmp_path, monkeypatch, f'for n in "$@"; do echo {tmp_path}/tree > "${{n}}_1_all.deb"; done'
  )
  monkeypatch.chdir(tmp_path)
  assert prepare_data.main(["fashion-mnist", "out"]) == 0  # as make prepare says it
  assert len(trees.read_all(tmp_path / "out", "train")) == 30
  assert not (tmp_path / "out" / "packages").exists()


def test_a_failed_download_says_how_to_get_the_files(tmp_path, monkeypatch, capsys):
  _fake_tools(tmp_path, monkeypatch, "echo E: no such package >&2; exit 100")
  assert prepare_data.main(["fashion-mnist", str(tmp_path / "out")]) == 2
  error = capsys.readouterr().err
  assert "https://packages.debian.org/stable/dataset-fashion-mnist" in error
  assert "--packages: E: no such package" in error.replace(")", "")


def test_without_apt_or_packages_it_says_how_to_get_them(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("PATH", str(tmp_path))
  assert prepare_data.main(["clipart", str(tmp_path / "out")]) == 2
  assert "packages.debian.org/stable/openclipart-svg" in capsys.readouterr().err
  assert prepare_data.main(["clipart", str(tmp_path / "out"), "--packages", str(tmp_path)]) == 2
  assert "holds no openclipart-png, openclipart-svg, tux" in capsys.readouterr().err
  trees.write(tmp_path / "dataset-fashion-mnist_1_all.deb", "")
  verb = ["fashion-mnist", str(tmp_path / "out"), "--packages", str(tmp_path)]
  assert prepare_data.main(verb) == 2
  assert "dpkg, which unpacks it, is not installed" in capsys.readouterr().err


def test_a_fingerprint_changes_with_any_file(tmp_path):
  trees.art_tree(tmp_path)
  seen = {packages.fingerprint(tmp_path, (".png", ".svg"))}
  trees.write(tmp_path / "new.png", b"")
  seen.add(packages.fingerprint(tmp_path, (".png", ".svg")))
  trees.write(tmp_path / "new.png", b"1")
  seen.add(packages.fingerprint(tmp_path, (".png", ".svg")))
  trees.write(tmp_path / "new.txt", b"not read")
  seen.add(packages.fingerprint(tmp_path, (".png", ".svg")))
  assert len(seen) == 3


def test_the_command_line_as_people_call_it(tmp_path):
  tool = [sys.executable, str(ROOT / "tools" / "prepare_data.py")]
  done = subprocess.run([*tool, "--help"], capture_output=True, text=True, cwd=tmp_path)
  assert done.returncode == 0
  assert "folder" in done.stdout
  for verb in ("fashion-mnist", "clipart", "folder"):
    with pytest.raises(SystemExit, match="0"):
      prepare_data.main([verb, "--help"])
