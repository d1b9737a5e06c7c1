"""Debian packages as folders: given unpacked, given as .deb files, or downloaded by apt."""

import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence

import rich.progress

from tools.prepare.jobs import PrepareError


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What a package holds for us: a folder inside it, and the kinds of files that are read."""

  folder: str
  suffixes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Tree:
  """An unpacked package: the wanted folder, and the sha256 of all that is read there."""

  root: pathlib.Path
  fingerprint: str


def trees(
  wanted: Mapping[str, Wanted],
  given: pathlib.Path | None,
  cache: pathlib.Path,
  progress: rich.progress.Progress,
) -> dict[str, Tree]:
  """Package name -> its files.

  Args: given, a folder with .deb files or unpacked packages ("/" where they are installed), None
    to download; cache, where .deb files are put and unpacked.
  Raises: PrepareError naming the packages that are missing and where they can be had.
  """
  found = {name: _unpacked(name, want, given) for name, want in wanted.items()}
  missing = [name for name, root in found.items() if root is None]
  debs = {name: _deb(name, given or cache) for name in missing}
  absent = [name for name, path in debs.items() if path is None]
  if absent and given is not None:
    raise PrepareError(
      f"{given}: holds no {', '.join(absent)}, neither unpacked nor as .deb; {_how(absent)}"
    )
  if absent:
    _download(absent, cache, progress)
    debs = {name: _deb(name, cache) for name in missing}
  for name, path in debs.items():
    if path is None:
      raise PrepareError(f"apt-get download brought no file of {name}; {_how([name])}")
    task = progress.add_task(f"unpacking {name}", total=None)
    found[name] = _unpack(name, path, wanted[name], cache)
    progress.remove_task(task)
  out = {}
  for name, root in found.items():
    assert root is not None
    out[name] = Tree(root, fingerprint(root, wanted[name].suffixes))
  return out


def fingerprint(root: pathlib.Path, suffixes: Sequence[str]) -> str:
  """sha256 over the names and contents of all files below `root` of these kinds."""
  digest = hashlib.sha256()
  for path in walk(root, suffixes):
    name = path.relative_to(root).as_posix()
    content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
    digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode("utf-8", "replace"))
  return digest.hexdigest()


def walk(root: pathlib.Path, suffixes: Sequence[str]) -> list[pathlib.Path]:
  """All files below `root` of these kinds, links among them, in the order of their names."""
  return sorted(p for p in root.rglob("*") if p.suffix in suffixes and not p.is_dir())


def _unpacked(name: str, want: Wanted, given: pathlib.Path | None) -> pathlib.Path | None:
  if given is None:
    return None
  try:
    folders = _near(given)
  except OSError as error:
    raise PrepareError(f"{given}: {error.strerror}; --packages wants a folder") from error
  for folder in folders:
    root = folder / want.folder
    if os.access(root, os.R_OK) and walk(root, want.suffixes):
      return root
  return None


def _near(folder: pathlib.Path) -> list[pathlib.Path]:
  """A folder and, unless it is the system's root, the folders in it and in those."""
  children = [path for path in sorted(folder.iterdir()) if path.is_dir()]
  if folder.resolve() == pathlib.Path("/"):
    return [folder]
  readable = [path for path in children if os.access(path, os.R_OK | os.X_OK)]
  below = [path for child in readable for path in sorted(child.iterdir()) if path.is_dir()]
  return [folder, *children, *below]


def _deb(name: str, folder: pathlib.Path) -> pathlib.Path | None:
  folders = _near(folder) if folder.is_dir() else []
  found = [path for near in folders for path in sorted(near.glob(f"{name}_*.deb"))]
  if len(found) > 1:
    names = ", ".join(path.name for path in found)
    raise PrepareError(f"{folder}: more than one {name} ({names}); leave one of them")
  return found[0] if found else None


def _unpack(name: str, deb: pathlib.Path, want: Wanted, cache: pathlib.Path) -> pathlib.Path:
  if shutil.which("dpkg") is None:
    raise PrepareError(
      f"{deb}: dpkg, which unpacks it, is not installed; unpack it elsewhere (ar x, then tar xf "
      "data.tar.*) and give that folder as --packages"
    )
  target, temporary = cache / "unpacked" / name, cache / "unpacked" / f"{name}.tmp"
  if not target.is_dir():
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    # absolute, because dpkg runs in another folder
    words = ["dpkg", "-x", str(deb.absolute()), str(temporary.absolute())]
    run(words, deb.parent, f"{deb}: cannot be unpacked")
    os.replace(temporary, target)
  root = target / want.folder
  if not (root.is_dir() and walk(root, want.suffixes)):
    raise PrepareError(f"{deb}: holds no {want.folder} with {', '.join(want.suffixes)} files")
  return root


def _download(names: Sequence[str], cache: pathlib.Path, progress: rich.progress.Progress) -> None:
  if shutil.which("apt-get") is None:
    raise PrepareError(f"apt-get, which downloads {', '.join(names)}, is not here; {_how(names)}")
  partial = cache / "partial"
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  task = progress.add_task(f"downloading {', '.join(names)}", total=None)
  run(
    ["apt-get", "download", *names],
    partial,
    f"apt-get cannot download {', '.join(names)} (apt-get update may help; else {_how(names)})",
  )
  for path in partial.glob("*.deb"):
    os.replace(path, cache / path.name)
  progress.remove_task(task)


def run(command: Sequence[str], folder: pathlib.Path, failure: str) -> None:
  """Runs a command. Raises: PrepareError with its last words."""
  done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
  if done.returncode:
    words = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
    raise PrepareError(f"{failure}: {words}")


def _how(names: Sequence[str]) -> str:
  pages = ", ".join(f"https://packages.debian.org/stable/{name}" for name in names)
  return f"get the .deb files ({pages}, architecture all) and give their folder as --packages"
