"""What is installed: known by its hash, or named in SECURITY.md."""

import configparser
import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
LOCKS = sorted(ROOT.glob("*.lock"))


def _pins(lock):
  """{name: (version, hashes)} of a lock file; every line of it is one of a package's."""
  text = lock.read_text().replace("\\\n", " ")
  found = {}
  for line in text.splitlines():
    if not line.strip() or line.startswith("#"):
      continue
    package, *hashes = line.split(" --hash=sha256:")
    name, _, version = package.partition(";")[0].strip().partition("==")
    name = canonicalize_name(name.partition("[")[0])
    assert name not in found, f"{lock.name}: {name} twice"
    found[name] = (version, [one.strip() for one in hashes])
  return found


def _wanted(section="options", key="install_requires"):
  parser = configparser.ConfigParser()
  parser.read(ROOT / "setup.cfg")
  return [Requirement(line) for line in parser[section][key].split("\n") if line.strip()]


def test_the_lock_files_are_those_that_are_installed():
  names = [lock.name for lock in LOCKS]
  ends = ("-build", "-cluster", "-interop", "-remote", "-test", "-tpu", "")
  assert names == [f"requirements{end}.lock" for end in ends]
  installed = re.findall(r"--require-hashes --requirement (\S+)", (ROOT / "Makefile").read_text())
  assert sorted(installed) == names


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_package_has_a_version_and_hashes(lock):
  found = _pins(lock)
  assert found
  for name, (version, hashes) in found.items():
    assert re.fullmatch(r"\d[\w.+!]*", version), f"{name} {version}"
    assert hashes, f"{name} has no hash"
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in hashes), name


def test_a_line_without_a_hash_would_be_seen(tmp_path):
  (tmp_path / "x.lock").write_text("a==1 \\\n    --hash=sha256:00\nb==2\n")
  assert _pins(tmp_path / "x.lock") == {"a": ("1", ["00"]), "b": ("2", [])}


def test_what_setup_cfg_asks_for_is_locked_within_its_bounds():
  pins = _pins(ROOT / "requirements.lock")
  for wanted in _wanted():
    version, _ = pins[canonicalize_name(wanted.name)]
    assert wanted.specifier.contains(version), f"{wanted} and {version}"


@pytest.mark.parametrize("name", ["jax", "orbax-checkpoint", "grain"])
def test_what_breaks_in_new_versions_is_bounded_from_above(name):
  """At the next version that may break: 0.11 after 0.10.2."""
  (wanted,) = (one for one in _wanted() if one.name == name)
  version, _ = _pins(ROOT / "requirements.lock")[name]
  major, minor, *_ = version.split(".")
  assert not wanted.specifier.contains(f"{major}.{int(minor) + 1}.0")
  assert wanted.specifier.contains(version)


def test_what_builds_the_package_is_locked_too():
  (build,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
  ((name, (version, _)),) = _pins(ROOT / "requirements-build.lock").items()
  assert f"{name}=={version}" == build


def test_the_makefile_installs_without_a_hash_only_what_security_md_lists():
  listed = (ROOT / "SECURITY.md").read_text().partition("By version alone")[2]
  free = {
    "--no-deps --no-build-isolation --editable .": "",  # this package
    "$(ORACLES)": "PyTorch and open_clip",
    "--no-deps $(ORACLES_ALONE)": "PyTorch and open_clip",
    "--no-deps $(JAX2ONNX)": "jax2onnx",
    "--only-binary :all: $(FUZZER)": "atheris",
    "pip-tools==7.6.2": "pip-tools",
  }
  for words in re.findall(
    r"\$\(PIP\) install (.*?)(?: \|\|.*)?\n", (ROOT / "Makefile").read_text()
  ):
    if "--require-hashes" not in words:
      assert words in free, f"pip install {words}: no hash"
      assert free[words] in listed
