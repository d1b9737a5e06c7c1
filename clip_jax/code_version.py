"""Which code measured a figure."""

import importlib.metadata
import pathlib
import subprocess


def current() -> str:
  """The installed version; in a checkout with its commit, and whether files were changed."""
  version = importlib.metadata.version("clip-jax-tpu")
  root = pathlib.Path(__file__).resolve().parents[1]
  if not (root / ".git").exists():
    return version

  def git(*words: str) -> str:
    found = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    found.check_returncode()
    return found.stdout.strip()

  try:
    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
  except (OSError, subprocess.CalledProcessError):
    return version
  return f"{version}+g{commit}{'.changed' if changed else ''}"
