"""The three studies in two processes: the figures of one, the work shared, one writer."""

import dataclasses
import json

import trees
import two_processes
from test_studies import workdir  # noqa: F401, a fixture

from clip_jax import inference, studies
from clip_jax.evaluation import chosen

CELLS = (("fog", "contrast"), (1, 5))
THRESHOLDS = {"hash": 0.0, "embedding": 1e-5}


def digits(weights, seed=0):
  return studies.Setup(str(weights), chosen.Asked("digits"), limit=20, batch=8, seed=seed)


def all_three(weights, root, output):
  """What each study returns, as JSON has it; they write below `output`."""
  result, notes = studies.predictions(digits(weights), output / "page.html", examples=20)
  examples = [[e.key, e.label, e.rank, [name for name, _ in e.likeliest]] for e in result.examples]
  found = {"predictions": [result.metrics(), result.confusion.tolist(), examples, notes]}
  result, notes = studies.stress(digits(weights), output / "stress", *CELLS)
  found["stress"] = [result.metrics(), notes]
  pictures = studies.Setup(
    str(weights), chosen.Asked(str(root / "eval")), batch=4, skip_unreadable=True
  )
  for by, threshold in THRESHOLDS.items():
    effect, matches, notes = studies.overlap_with(
      pictures, output / by, str(root / "seen"), by=by, threshold=threshold
    )
    pairs = [[pair.key, pair.train_key] for pair in matches.pairs if pair.distance <= threshold]
    found[by] = [dataclasses.asdict(effect), sorted(pairs), matches.trained, matches.unreadable]
    found[by].append(notes)
  return json.loads(json.dumps(found))


def counted(seen):
  """`encode_image` that counts the images it is given, those that fill a batch up too."""
  encode = inference.Clip.encode_image

  def encode_image(self, images):
    seen.append(len(images))
    return encode(self, images)

  return encode_image


TWO = """
  import json, pathlib, sys
  from clip_jax import hosts
  host, port, weights, folder = sys.argv[1], sys.argv[2], *map(pathlib.Path, sys.argv[3:])
  hosts.start(f"127.0.0.1:{port}", 2, int(host), timeout_seconds=60)
  with hosts.watched(12):
    import jax
    from clip_jax import inference, studies
    from test_studies_in_two import all_three, counted, digits
    assert (jax.process_count(), jax.device_count()) == (2, 4)
    seen = []
    inference.Clip.encode_image = counted(seen)
    found = all_three(weights, folder, folder / host)
    (folder / f"{host}.json").write_text(json.dumps([found, sum(seen)]))
    studies.predictions(digits(weights, seed=int(host)), folder / "other.html")
"""


def test_two_processes_give_what_one_gives(workdir, tmp_path, monkeypatch):  # noqa: F811
  """The first has two of five cells already, the other has no such file. At the end they differ."""
  for i in range(6):
    trees.write(tmp_path / "eval" / ("cat", "dog")[i % 2] / f"{i}.png", trees.png(i, (64, 64)))
  for i in (0, 3, 4, 100, 101):
    trees.write(tmp_path / "seen" / f"{i}.png", trees.png(i, (64, 64)))
  for broken in ("eval/dog", "seen"):
    trees.write(tmp_path / broken / "9.png", trees.png(9)[:-60])
  for name in ("alone", "0", "1"):
    (tmp_path / name).mkdir()
  alone, seen = tmp_path / "alone", []
  monkeypatch.setattr(inference.Clip, "encode_image", counted(seen))
  wanted = all_three(workdir, tmp_path, alone)
  lines = (alone / "stress" / "results.jsonl").read_bytes().splitlines(keepends=True)
  trees.write(tmp_path / "0" / "stress" / "results.jsonl", b"".join(lines[:2]))

  ends = two_processes.run(TWO, workdir, tmp_path, devices=2)
  said = "\n".join(text for _, text in ends)
  assert (tmp_path / "1.json").exists(), said
  for host in "01":
    found, encoded = json.loads((tmp_path / f"{host}.json").read_text())
    assert found == wanted
    assert 2 * encoded == sum(seen) - 2 * 24  # two cells of 20 images in batches of 8
  assert [found[by][0]["overlapping"] for by in THRESHOLDS] == [3, 3]
  assert "cannot be decoded" in found["hash"][-1][0]
  # What is written is what one process writes; the other one writes nothing.
  names = {path.relative_to(alone) for path in alone.rglob("*") if path.is_file()}
  assert names == {
    path.relative_to(tmp_path / "0") for path in (tmp_path / "0").rglob("*") if path.is_file()
  }
  assert len(names) > 8
  for name in sorted(names):
    if name.suffix in (".csv", ".json", ".md"):
      assert (tmp_path / "0" / name).read_text() == (alone / name).read_text(), name
  ours = (tmp_path / "0" / "stress" / "results.jsonl").read_bytes().splitlines(keepends=True)
  assert ours[:2] == lines[:2]
  assert [json.loads(line) | {"seconds": 0} for line in ours] == [
    json.loads(line) | {"seconds": 0} for line in lines
  ]
  assert not list((tmp_path / "1").iterdir())
  # With other images the second is told so, and ends the first.
  assert "process 1 has other weights, images or prompts than process 0; give all" in ends[1][1]
  assert ends[0][0] == 2, said
  assert "host 1" in ends[0][1].splitlines()[-1]
  assert not (tmp_path / "other.html").exists()
