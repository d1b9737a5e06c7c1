"""What the launch tools are told: checked before anything is asked of a cloud or a cluster."""

import argparse
import contextlib
import itertools
import math
import pathlib
import re
from collections.abc import Callable, Sequence

from tools.commands import LaunchError


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
  """What stands before `--` and after it."""
  words = list(arguments)
  at = words.index("--") if "--" in words else len(words)
  return words[:at], words[at + 1 :]


def number(kind: type[int] | type[float], least: int) -> Callable[[str], float]:
  """An argparse type: a finite number that is no smaller than `least`."""

  def parse(text: str) -> float:
    with contextlib.suppress(ValueError):
      value = kind(text)
      if math.isfinite(value) and value >= least:
        return value
    what = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"{text!r}: want {what}, at least {least}")

  return parse


def resource_name(text: str) -> str:
  """An argparse type: what slices and JobSets may be called, with room for their hosts' numbers."""
  if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", text):
    raise argparse.ArgumentTypeError(
      f"{text!r}: want at most 40 lower-case letters, digits and hyphens, a letter first and no "
      "hyphen last"
    )
  return text


def bucket_name(text: str) -> str:
  """An argparse type: `mine` of mine, gs://mine and gs://mine/."""
  name = text.removeprefix("gs://").removesuffix("/")
  if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", name):
    raise argparse.ArgumentTypeError(f"{text!r}: want a bucket's name, without a folder")
  return name


def config_file(words: Sequence[str], root: pathlib.Path) -> str:
  """The file that --config names, relative to the project in `root`.

  Raises: LaunchError when none is named, or one that is not there.
  """
  named = ""
  for word, following in itertools.pairwise([*words, ""]):
    if word == "--config":
      named = following
    elif word.startswith("--config="):
      named = word.removeprefix("--config=")
  if not named:
    raise LaunchError("after -- comes --config FILE, as --config experiments/clip_vit_b16.py")
  path = pathlib.PurePath(named)
  if path.is_absolute() or ".." in path.parts or not (root / path).is_file():
    raise LaunchError(f"--config {named}: the project in {root} has no such file")
  return str(path)
