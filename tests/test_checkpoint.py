"""Checkpoints: damage is found, partial folders ignored, failures told, meshes do not matter."""

import gc
import os
import pathlib
import resource
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import checkpoint, checksums, hosts, sharding
from clip_jax import config as config_lib

# A restore that fails leaves orbax's event loop to the garbage collector, which complains later.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collect_here():
  yield
  gc.collect()


def _trees(scale: float = 1.0):
  params = {
    "dense": {
      "kernel": scale * jnp.arange(4096.0).reshape(64, 64),
      "bias": jnp.full((8,), scale, jnp.float32),
    },
    "log_scale": jnp.float32(scale),
  }
  train = {
    "step": jnp.int32(scale),
    "moments": (jnp.full((16, 8), scale, jnp.bfloat16), jnp.zeros(3)),
  }
  return params, train


def _abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.fixture
def saved(tmp_path):
  """A workdir with steps 10 and 20."""
  checkpoints = checkpoint.Checkpoints(tmp_path)
  for step in (10, 20):
    checkpoints.save(step, *_trees(step), {"config": {"steps": 60}})
  checkpoints.close()
  return tmp_path


def _restore(workdir):
  checkpoints = checkpoint.Checkpoints(workdir)
  params, train = _trees()
  try:
    return checkpoints.restore_latest(_abstract(params), _abstract(train))
  finally:
    checkpoints.close()


def _assert_equal(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_round_trip_is_exact(saved):
  restored = _restore(saved)
  assert restored.step == 20
  _assert_equal((restored.params, restored.train), _trees(20))
  assert restored.meta["config"] == {"steps": 60}


def test_an_empty_workdir_has_nothing(tmp_path):
  assert _restore(tmp_path) is None


def test_weights_alone_can_be_read(saved):
  checkpoints = checkpoint.Checkpoints(saved, read_only=True)
  restored = checkpoints.restore_latest(_abstract(_trees()[0]))
  checkpoints.close()
  assert restored.train is None
  _assert_equal(restored.params, _trees(20)[0])


def _fabricate(folder: pathlib.Path) -> None:
  """What copies and crashes leave behind (drill 24)."""
  good = folder / "20"
  (folder / "30").mkdir()  # empty
  os.system(f"cp -r {good} {folder / '40'} && rm {folder / '40' / 'commit_success.txt'}")
  os.system(f"cp -r {good} {folder / '50'} && rm -r {folder / '50' / 'params'}")  # partial copy
  os.system(f"cp -r {good} {folder / '60'} && rm -r {folder / '60' / 'meta'}")
  (folder / "70.orbax-checkpoint-tmp").mkdir()
  (folder / "junk").mkdir()
  (folder / "notes.txt").write_text("hello")
  (folder / "80").write_text("a file, not a folder")


def test_partial_folders_are_passed_over(saved, caplog, drill):
  folder = saved / "checkpoints"
  before = len(list(folder.iterdir()))
  _fabricate(folder)
  drill(24, folders=len(list(folder.iterdir())) - before)
  restored = _restore(saved)
  assert restored.step == 20
  _assert_equal(restored.params, _trees(20)[0])
  assert "falling back" in caplog.text
  assert "moved to" in caplog.text
  checkpoints = checkpoint.Checkpoints(saved)  # the set-aside steps can be saved again
  for step in (30, 40, 50):
    checkpoints.save(step, *_trees(step), {})
  checkpoints.close()
  assert _restore(saved).step == 50


def test_a_changed_fact_is_damage(saved, caplog, drill):
  page = saved / "checkpoints" / "20" / "meta" / "metadata"
  page.write_text(page.read_text().replace('"steps": 60', '"steps": 61'))
  assert _restore(saved).step == 10
  assert "checksum differs in meta" in caplog.text
  drill(25, injected=1, detected=1, by_checksum=1, harmless=0)


@pytest.mark.parametrize("lost", ["meta", "meta/metadata"])
def test_facts_that_cannot_be_read_are_passed_over(saved, lost):
  os.system(f"rm -r {saved / 'checkpoints' / '20' / lost}")
  checkpoints = checkpoint.Checkpoints(saved)
  step, meta = checkpoints.newest_meta()
  checkpoints.close()
  assert (step, meta["config"]) == (10, {"steps": 60})
  assert _restore(saved).step == 10


def _data_file(step_folder: pathlib.Path) -> pathlib.Path:
  files = [f for f in (step_folder / "params").rglob("*") if f.is_file() and "d" in f.parent.name]
  return max(files, key=lambda f: f.stat().st_size)


@pytest.mark.parametrize("offset", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("damage", ["bit", "hole"])
def test_damaged_data_is_not_trained_on(saved, caplog, offset, damage, drill):
  path = _data_file(saved / "checkpoints" / "20")
  data = bytearray(path.read_bytes())
  at = int(len(data) * offset)
  if damage == "bit":
    data[at] ^= 4
  else:
    data[at : at + 512] = bytes(512)
  path.write_bytes(data)
  restored = _restore(saved)
  assert restored.step == 10
  _assert_equal((restored.params, restored.train), _trees(10))
  assert "step before" in caplog.text
  alone = "checksum differs in params/dense/kernel" in caplog.text
  drill(25, injected=1, detected=1, by_checksum=alone, harmless=0)


@pytest.mark.parametrize("reading", ["its meta", "its arrays"])
def test_what_another_host_cannot_read_is_not_used(saved, monkeypatch, caplog, reading):
  """This host reads all of step 20; what stands for the agreement says what host 1 met."""
  said = []

  def first_said(mine):
    said.append(mine)
    number = {"its meta": 2, "its arrays": 3}[reading]  # after the look at the folder
    return "20: cannot be read (met by host 1)" if len(said) == number else mine

  monkeypatch.setattr(hosts, "first_said", first_said)
  restored = _restore(saved)
  assert restored.step == 10
  _assert_equal((restored.params, restored.train), _trees(10))
  assert not any(said)
  assert caplog.messages[0] == (
    "20: cannot be read (met by host 1); falling back to the step before"
  )
  assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["10"]
  assert [p.name for p in (saved / "checkpoints_damaged").iterdir()] == ["20-0"]


def test_all_hosts_take_the_steps_that_the_first_sees(saved, monkeypatch):
  monkeypatch.setattr(hosts, "from_first", lambda data: {b"[10, 20]": b"[10]"}.get(data, data))
  checkpoints = checkpoint.Checkpoints(saved, read_only=True)
  assert checkpoints.steps() == [10]
  assert checkpoints.newest_meta()[0] == 10
  checkpoints.close()


def test_the_first_host_alone_sets_aside_and_all_hear_that_it_cannot(saved, monkeypatch):
  checkpoints = checkpoint.Checkpoints(saved)
  (saved / "checkpoints_damaged").write_text("in the way")
  damaged = "what is not whole there cannot be moved to .*checkpoints_damaged .*File exists"
  with pytest.raises(checkpoint.CheckpointError, match=damaged):
    checkpoints._set_aside_after(10)
  (saved / "checkpoints_damaged").unlink()
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  monkeypatch.setattr(hosts, "first_said", lambda mine: mine)
  checkpoints._set_aside_after(10)
  assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["10", "20"]
  monkeypatch.setattr(hosts, "first_said", lambda _: "it cannot be moved (met by host 0)")
  with pytest.raises(checkpoint.CheckpointError, match="met by host 0"):
    checkpoints._set_aside_after(10)
  monkeypatch.undo()
  checkpoints.close()


def test_nothing_whole_is_an_error(saved):
  for step in (10, 20):
    path = _data_file(saved / "checkpoints" / str(step))
    path.write_bytes(bytes(path.stat().st_size))
  with pytest.raises(checkpoint.CheckpointError, match=r"none of the steps \[10, 20\] is whole"):
    _restore(saved)


@pytest.mark.parametrize("index", [0, 1, 777, 4095])
def test_checksum_sees_every_single_element(index):
  array = jnp.arange(4096.0).reshape(64, 64)
  changed = array.reshape(-1).at[index].add(2.0**-10).reshape(64, 64)
  swapped = array.reshape(-1)[jnp.array([*range(1, 4096), 0])].reshape(64, 64)
  sums = [checksums.of_leaves({"x": x})["x"][2] for x in (array, changed, swapped)]
  assert len(set(sums)) == 3


def test_checksum_by_hand():
  bits = np.array([1.5, -2.0, 3.25], np.float32).view(np.uint32).astype(object)
  weights = [(i * 2654435761 % 2**32) | 1 for i in range(3)]
  expected = sum(int(b) * w for b, w in zip(bits, weights, strict=True)) % 2**32
  assert checksums.of_leaves({"x": jnp.array([1.5, -2.0, 3.25])})["x"] == [[3], "float32", expected]


@pytest.mark.parametrize("spec", [P("data"), P(None, "data"), P(("data", "fsdp"), "tensor"), P()])
@pytest.mark.parametrize("shape", [(16, 8), (8, 16, 3)])
def test_checksum_of_parts_is_that_of_the_whole(shape, spec):
  x = jax.random.normal(jax.random.key(0), shape)
  mesh = sharding.make_mesh(config_lib.Mesh(data=2, fsdp=2, tensor=2))
  laid_out = jax.device_put(x, NamedSharding(mesh, spec))
  assert checksums.of_leaves({"x": laid_out}) == checksums.of_leaves({"x": x})


@pytest.mark.parametrize(
  ("mesh", "spec"),
  [
    (config_lib.Mesh(data=1), P()),
    (config_lib.Mesh(data=4), P("data")),
    (config_lib.Mesh(data=8), P(None, "data")),
    (config_lib.Mesh(data=2, fsdp=4), P("fsdp")),
    (config_lib.Mesh(data=2, fsdp=4), P("data", "fsdp")),
    (config_lib.Mesh(data=2, fsdp=2, tensor=2), P(("data", "fsdp"), "tensor")),
    (config_lib.Mesh(data=1, fsdp=8), P(None, "fsdp")),
  ],
)
def test_restores_on_another_mesh(tmp_path, mesh, spec, drill):
  written = NamedSharding(sharding.make_mesh(devices=jax.devices()[:8]), P("data"))
  params = {"kernel": jax.device_put(jnp.arange(512.0).reshape(64, 8), written)}
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(1, params, {"step": jnp.int32(1)}, {})
  checkpoints.close()
  devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
  where = NamedSharding(sharding.make_mesh(mesh, devices), spec)
  wanted = {"kernel": jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=where)}
  restored = checkpoint.Checkpoints(tmp_path, read_only=True).restore_latest(wanted)
  assert restored.params["kernel"].sharding == where
  np.testing.assert_array_equal(restored.params["kernel"], params["kernel"])
  drill(27, pairs=1, exact=1)


def _changed(edit):
  params, train = _trees()
  edit(params, train)
  return _abstract(params), _abstract(train)


@pytest.mark.parametrize(
  ("edit", "named"),
  [
    (lambda p, t: p.pop("log_scale"), "params/log_scale is in it and not in this model"),
    (lambda p, t: p.update(extra=jnp.zeros(2)), "params/extra is not in it"),
    (lambda p, t: p.update(log_scale=jnp.zeros(2)), "params/log_scale is"),
    (lambda p, t: p.update(log_scale=jnp.zeros((), jnp.bfloat16)), "bfloat16"),
    (lambda p, t: p["dense"].update(kernel=jnp.zeros((64, 32))), "params/dense/kernel is"),
    (lambda p, t: t.update(moments=(jnp.zeros((16, 8)), jnp.zeros(3))), "train/moments/0 is"),
    (lambda p, t: t.update(moments=()), "train/moments/1 is in it"),
    (lambda p, t: t.update(second=jnp.zeros(3)), "train/second is not in it"),
    (lambda p, t: t.update(step=jnp.float32(0)), "train/step is"),
    (lambda p, t: p["dense"].update(bias=jnp.zeros((8,), jnp.int32)), "params/dense/bias is"),
  ],
)
def test_another_model_is_refused_by_leaf(saved, edit, named):
  checkpoints = checkpoint.Checkpoints(saved)
  with pytest.raises(checkpoint.Mismatch, match=named):
    checkpoints.restore_latest(*_changed(edit))
  checkpoints.close()
  assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["10", "20"]


def test_a_full_disk_is_told_and_leaves_the_last_good_step(saved, drill):
  """A file-size limit stands for a full disk (drill 26): no phantom step, the error names both."""
  checkpoints = checkpoint.Checkpoints(saved)
  checkpoints.restore_latest(*(_abstract(tree) for tree in _trees()))
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    checkpoints.save(30, *_trees(30), {})
    start = time.perf_counter()
    with pytest.raises(checkpoint.CheckpointError, match=r"step 30 could not.*step 20 is the last"):
      checkpoints.wait()
    drill(26, most_seconds=time.perf_counter() - start)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)
  drill(26, phantoms=len(set(checkpoints.steps()) - {10, 20}))
  assert checkpoints.steps() == [10, 20]
  checkpoints.close()
  assert _restore(saved).step == 20


def test_a_donated_state_is_saved_as_it_was(tmp_path):
  """The arrays may be overwritten in place as soon as `save` returns."""
  step = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  checkpoints = checkpoint.Checkpoints(tmp_path)
  params = {"kernel": jnp.arange(1_000_000.0)}
  checkpoints.save(1, params, {"step": jnp.int32(1)}, {})
  for _ in range(20):
    params = jax.tree.map(step, params)
  checkpoints.close()
  wanted = _abstract({"kernel": jnp.zeros(1_000_000)})
  restored = checkpoint.Checkpoints(tmp_path, read_only=True).restore_latest(wanted)
  np.testing.assert_array_equal(restored.params["kernel"], np.arange(1_000_000.0))


def test_a_missing_folder_is_named(tmp_path):
  with pytest.raises(checkpoint.CheckpointError, match="no checkpoints there"):
    checkpoint.Checkpoints(tmp_path / "nowhere", read_only=True)
