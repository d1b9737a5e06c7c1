"""The three studies by their commands in two processes: the figures of one, the work shared."""

import contextlib
import io
import json

import trees
import two_processes
from test_studies import workdir  # noqa: F401, a fixture

from clip_jax import cli, inference

THRESHOLDS = {"hash": 0.0, "embedding": 1e-5}


def said(verb, *words):
  """What a command tells programs, but for where it wrote; empty where another process tells it."""
  with contextlib.redirect_stdout(io.StringIO()) as out:
    assert cli.main([verb, *map(str, words), "--json"]) == 0
  found = json.loads(out.getvalue() or "{}")
  return {name: value for name, value in found.items() if name not in ("page", "written")}


def digits(weights, seed=0):
  fixed = ("--data", "digits", "--limit", "20", "--batch", "8")
  return ("--weights", str(weights), *fixed, "--seed", str(seed))


def all_three(weights, root, output, *several):
  """What each study says; they write below `output`."""
  page = ("--output", output / "page.html", "--examples", 20)
  found = {"predictions": said("predictions", *digits(weights), *page, *several)}
  for example in found["predictions"].get("examples", ()):  # probabilities may round otherwise
    del example["probability"]
    example["likeliest"] = [one["class"] for one in example["likeliest"]]
  cells = ("--corruptions", "fog,contrast", "--severities", "1,5", "--output", output / "stress")
  found["stress"] = said("stress", *digits(weights), *cells, *several)
  pictures = ("--weights", weights, "--data", root / "eval", "--batch", 4)
  pictures = (*pictures, "--corrupt-images", "skip", "--training", root / "seen")
  for by, threshold in THRESHOLDS.items():
    more = ("--by", by, "--threshold", threshold, "--output", output / by)
    found[by] = said("overlap", *pictures, *more, *several)
  return found


def counted(seen):
  """`encode_image` that counts the images it is given, those that fill a batch up too."""
  encode = inference.Clip.encode_image

  def encode_image(self, images):
    seen.append(len(images))
    return encode(self, images)

  return encode_image


# A process joins a run once: at the first command, which the others then are part of.
TWO = """
  import contextlib, json, pathlib, sys
  from clip_jax import cli, hosts, inference
  host, port, weights, folder = sys.argv[1], sys.argv[2], *map(pathlib.Path, sys.argv[3:])
  from test_studies_in_two import all_three, counted, digits
  start, watched, asked, seen = hosts.start, hosts.watched, [], []
  several = ("--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", host)
  several += ("--heartbeat", "12")
  with contextlib.ExitStack() as run:
    def join(*given, heartbeat_seconds):
      asked.append([*given, heartbeat_seconds])
      if len(asked) == 1:
        start(*given, heartbeat_seconds=heartbeat_seconds)
        run.enter_context(watched(heartbeat_seconds))
    hosts.start, hosts.watched = join, contextlib.nullcontext
    inference.Clip.encode_image = counted(seen)
    found = all_three(weights, folder, folder / host, *several)
    import jax
    assert (jax.process_count(), jax.device_count()) == (2, 4)
    assert asked == [[f"127.0.0.1:{port}", 2, int(host), 12.0]] * 4
    (folder / f"{host}.json").write_text(json.dumps([found, sum(seen)]))
    other = ("--output", str(folder / "other.html"), "--debug")
    cli.main(["predictions", *digits(weights, seed=int(host)), *other, *several])
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
  wanted = all_three(workdir, tmp_path, alone, "--processes", "1")
  lines = (alone / "stress" / "results.jsonl").read_bytes().splitlines(keepends=True)
  trees.write(tmp_path / "0" / "stress" / "results.jsonl", b"".join(lines[:2]))

  ends = two_processes.run(TWO, workdir, tmp_path, devices=2)
  said = "\n".join(text for _, text in ends)
  assert (tmp_path / "1.json").exists(), said
  for host in "01":
    found, encoded = json.loads((tmp_path / f"{host}.json").read_text())
    assert found == (wanted if host == "0" else {key: {} for key in wanted})
    assert 2 * encoded == sum(seen) - 2 * 24  # two cells of 20 images in batches of 8
  assert [wanted[by]["overlapping"] for by in THRESHOLDS] == [3, 3]
  assert "cannot be decoded" in wanted["hash"]["notes"][0]
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
