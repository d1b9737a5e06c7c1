"""Which code measured a figure."""

import collections
import importlib.metadata
import pathlib
import subprocess
from collections.abc import Iterable


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


def note(codes: Iterable[str], now: str) -> str:
  """In words how many figures are not of the code `now`, and of which; "" where all are.

  Args: codes, of each figure the version that measured it; "": it was not written down.
  """
  found = collections.Counter(codes)
  others = [f"{code or 'not known'} ({found[code]:,})" for code in sorted(set(found) - {now})]
  count = found.total() - found[now]
  if not others:
    return ""
  which = f"{count:,} of {found.total():,} figures {'was' if count == 1 else 'were'} measured"
  return f"{which} by other versions of the code than this one, {now}: {', '.join(others)}"
