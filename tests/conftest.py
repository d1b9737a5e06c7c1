"""Strict switches for all tests: 8 virtual CPU devices, no implicit rank promotion, no network."""

import importlib.util
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax  # after the switches above
import network_seal
import pytest

network_seal.start_with_children()

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def no_other_machine():
  """A test that tries to reach another machine, itself or in a child process, fails for it.

  Loopback, this machine's own addresses and sockets in the file system are free.
  """
  yield
  network_seal.check()


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
  """Compiled programs of a file are let go after it: all of them together take gigabytes."""
  yield
  jax.clear_caches()


# Files that take minutes, which two processes share out best when they begin with them.
LONGEST = (
  "test_train", "test_hosts", "test_gradients", "test_resnet", "test_train_step",
  "test_prepare_scale", "test_paper_run", "test_predictive", "test_studies_in_two", "test_models",
  "test_checkpoint",
)  # fmt: skip


def pytest_collection_modifyitems(items):
  ranks = {name: rank for rank, name in enumerate(LONGEST)}
  items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture
def drill(record_property):
  """Gives figures of a row of docs/reliability.md to tools/drills, as numbers by name.

  Of a row's tests they are added up; those whose name begins with `most_` are compared, and the
  largest counts.
  """

  def give(row: int, **figures: float) -> None:
    for name, value in figures.items():
      record_property(f"drill {row} {name}", float(value))

  return give


# The full comparison is `make test-interop`, which installs what it needs.
collect_ignore = [] if importlib.util.find_spec("transformers") else ["interop"]
collect_ignore += ["drills"]  # many minutes: `make drills` names its files, which overrides this
