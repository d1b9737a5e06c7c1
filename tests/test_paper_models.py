"""Models by name, over all devices, and what their hash depends on."""

import dataclasses
import hashlib

import jax
import numpy as np
import pytest
import two_processes
from test_inference import workdir  # noqa: F401, a fixture

import clip_jax
from clip_jax import inference
from clip_jax.evaluation.paper import models as paper_models
from clip_jax.interop import sources


@pytest.mark.parametrize("count", [1, 3, 8, 13])
def test_eight_devices_give_what_one_gives(workdir, count):  # noqa: F811
  weights = paper_models.load(paper_models.Named("tiny", workdir))
  alone = clip_jax.load(workdir)
  assert len(weights.model.params["log_scale"].devices()) == jax.device_count() == 8
  rng = np.random.default_rng(0)
  image_NRR3 = rng.integers(0, 256, (count, 16, 16, 3)).astype(np.uint8)
  for name in ("encode_image", "image_features"):
    got, wanted = (getattr(model, name)(image_NRR3) for model in (weights.model, alone))
    np.testing.assert_allclose(got, wanted, atol=1e-5)
  texts = [f"a {word}" for word in "bcdefghijklmn"[:count]]
  np.testing.assert_allclose(weights.model.encode_text(texts), alone.encode_text(texts), atol=1e-5)
  assert weights.name == "tiny"
  assert weights.hash == paper_models.fingerprint(workdir, alone)


TWO = """
import pathlib, sys
import numpy as np
from clip_jax import hosts
host, port, weights, folder = int(sys.argv[1]), sys.argv[2], *map(pathlib.Path, sys.argv[3:])
hosts.start(f"127.0.0.1:{port}", 2, host, timeout_seconds=60)
with hosts.watched(20):
  import jax
  from clip_jax.evaluation.paper import models as paper_models
  found = paper_models.load(paper_models.Named("tiny", weights))
  assert (jax.process_count(), jax.device_count()) == (2, 4)
  assert len(found.model.params["log_scale"].sharding.device_set) == 4
  assert found.hash == (folder / "hash").read_text()
  image_NRR3, wanted_NE = np.load(folder / "images.npy"), np.load(folder / "wanted.npy")
  mine = slice(3 * host, 3 * host + 3)
  np.testing.assert_allclose(found.model.encode_image(image_NRR3[mine]), wanted_NE[mine], atol=1e-5)
print("done")
"""


def test_two_processes_give_what_one_gives(workdir, tmp_path):  # noqa: F811
  model = clip_jax.load(workdir)
  image_NRR3 = np.random.default_rng(1).integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)
  np.save(tmp_path / "images.npy", image_NRR3)
  np.save(tmp_path / "wanted.npy", model.encode_image(image_NRR3))
  (tmp_path / "hash").write_text(paper_models.fingerprint(workdir, model))
  ends = two_processes.run(TWO, workdir, tmp_path, devices=2)
  assert [said.splitlines()[-1] for _, said in ends] == ["done", "done"], ends


def test_the_hash_is_of_all_that_the_model_computes_by(workdir):  # noqa: F811
  model = clip_jax.load(workdir)
  found = [paper_models.fingerprint(workdir, model)]
  assert found[0] == paper_models.fingerprint(workdir, clip_jax.load(workdir))

  def other(config=model.config, tokenizer=model.tokenizer, params=model.params):
    changed = inference.Clip(config, params, tokenizer, batch_stats=model.batch_stats)
    return paper_models.fingerprint(workdir, changed)

  others = {"gelu": "quick_gelu", "quick_gelu": "gelu"}
  activation = others[model.config.model.activation]
  activation = dataclasses.replace(model.config.model, activation=activation)
  squash = dataclasses.replace(model.config.preprocess, resize="squash")
  found.append(other(dataclasses.replace(model.config, model=activation)))
  found.append(other(dataclasses.replace(model.config, preprocess=squash)))
  found.append(other(tokenizer=None))
  found.append(other(params={**model.params, "log_scale": model.params["log_scale"] + 1e-6}))
  assert len(set(found)) == 5
  assert other() == found[0]


def test_a_released_file_is_known_by_its_own_hash(tmp_path, monkeypatch, workdir):  # noqa: F811
  path = tmp_path / "RN50.pt"
  path.write_bytes(b"weights")
  own = hashlib.sha256(b"weights").hexdigest()
  model = clip_jax.load(workdir)
  assert paper_models.fingerprint(path, model) == paper_models.fingerprint(workdir, model)
  monkeypatch.setitem(sources.RELEASED, "RN50", own)
  assert paper_models.fingerprint(path, model) == own


def test_names_and_paths():
  found = paper_models.parse(["ViT-L/14@336px=a=b.pt", "my own=c"])
  assert [(n.name, str(n.path)) for n in found] == [("ViT-L/14@336px", "a=b.pt"), ("my own", "c")]


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ([], "no models"),
    (["RN50"], "'RN50': want NAME=WEIGHTS, as RN50="),
    (["=x"], "want NAME=WEIGHTS"),
    (["RN50="], "want NAME=WEIGHTS"),
    (["a=1", "a=2"], "'a': two models of one name"),
    (["a\nb=1"], "in one line"),
    ([" a=1"], "without spaces around it"),
  ],
)
def test_bad_names_are_refused(words, message):
  with pytest.raises(paper_models.ModelsError, match=message):
    paper_models.parse(words)
