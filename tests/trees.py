"""Small folders like those that data are prepared from, made up, and what was made of them."""

import gzip
import io
import json
import pathlib
import tarfile

import numpy as np
import rich.progress
from PIL import Image

from clip_jax.data import records
from tools import prepare_data
from tools.prepare import jobs, shards


def png(seed: int, size: tuple[int, int] = (20, 30), kind: str = "PNG") -> bytes:
  """A picture of random blocks, unlike that of any other seed."""
  blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
  out = io.BytesIO()
  Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(out, kind)
  return out.getvalue()


def write(path: pathlib.Path, data: bytes | str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data.encode() if isinstance(data, str) else data)


def tar(
  path: pathlib.Path,
  files: dict[str, bytes | str | tarfile.TarInfo],
  form: int = tarfile.PAX_FORMAT,
) -> pathlib.Path:
  """A tar file of these members."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w", format=form) as archive:
    for name, data in files.items():
      if isinstance(data, tarfile.TarInfo):
        archive.addfile(data)
        continue
      content = data.encode() if isinstance(data, str) else data
      info = tarfile.TarInfo(name)
      info.size, info.mtime = len(content), 1234.5  # pax writes a header for the half second
      archive.addfile(info, io.BytesIO(content))
  return path


def pair(i: int) -> dict[str, bytes | str]:
  """A picture and its caption, as img2dataset names them."""
  key = f"{i:09d}"
  return {
    f"{key}.jpg": png(i, kind="JPEG"),
    f"{key}.txt": f"picture {i}",
    f"{key}.json": "{}",
  }


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
  """A member that is no plain file."""
  info = tarfile.TarInfo(name)
  info.type, info.linkname = kind, target
  return info


def read_all(folder: pathlib.Path, split: str) -> list[records.Record]:
  source = records.ArrayRecordSource(folder, split)
  return [source[i] for i in range(len(source))]


def read_rejected(folder: pathlib.Path) -> dict[str, str]:
  lines = (folder / "rejected.jsonl").read_text().splitlines()
  return {entry["key"]: entry["reason"] for entry in map(json.loads, lines)}


def read_manifest(folder: pathlib.Path) -> dict:
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["inputs"] == manifest["kept"] + sum(manifest["rejected"].values())
  return manifest


def array_record(place: pathlib.Path, made: list[records.Record], classes=()) -> None:
  """A prepared folder of these records, as its split "test"."""
  items = [jobs.Item(r.key, ("test",), lambda r=r: r) for r in made]
  plan = jobs.Plan(items, [], list(classes))
  job = jobs.Job("x", "", "", {}, {}, lambda progress: plan)
  with rich.progress.Progress(disable=True) as progress:
    shards.write(job, place, 10, progress)


def raising(kind):
  """A function that raises it."""

  def load():
    raise kind

  return load


def photos(tmp_path: pathlib.Path, count: int) -> tuple[pathlib.Path, pathlib.Path]:
  """A table of captions, and the folder of its pictures."""
  folder = tmp_path / "photos"
  lines = ["image,caption"]
  for i in range(count):
    write(folder / f"{i}.png", png(i))
    lines.append(f"{i}.png,picture {i}")
  write(tmp_path / "captions.csv", "\n".join(lines) + "\n")
  return tmp_path / "captions.csv", folder


def idx_file(array: np.ndarray) -> bytes:
  sizes = b"".join(size.to_bytes(4) for size in array.shape)
  return gzip.compress(bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes())


def fashion_tree(root: pathlib.Path) -> np.ndarray:
  image_NRR = np.random.default_rng(0).integers(0, 256, (40, 28, 28)).astype(np.uint8)
  labels = np.arange(40, dtype=np.uint8) % 10
  folder = root / "usr/share/datasets/fashion-mnist"
  for prefix, part in (("train", slice(0, 30)), ("t10k", slice(30, 40))):
    write(folder / f"{prefix}-images-idx3-ubyte.gz", idx_file(image_NRR[part]))
    write(folder / f"{prefix}-labels-idx1-ubyte.gz", idx_file(labels[part]))
  return image_NRR


SVG = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:cc="http://web.resource.org/cc/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><metadata><rdf:RDF><cc:Work rdf:about="">
<dc:title>{}</dc:title><dc:description>{}</dc:description>
<dc:subject><rdf:Bag><rdf:li></rdf:li>{}</rdf:Bag></dc:subject>
<dc:creator><cc:Agent><dc:title>Ann Artist</dc:title></cc:Agent></dc:creator>
</cc:Work></rdf:RDF></metadata></svg>"""


def clip_art(root: pathlib.Path, name: str, seed: int, title="", text="", keywords=()) -> None:
  write(root / f"usr/share/openclipart/png/{name}.png", png(seed))
  words = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
  write(root / f"usr/share/openclipart/svg/{name}.svg", SVG.format(title, text, words))


def stamp(root: pathlib.Path, name: str, seed: int, text: str | bytes | None) -> None:
  path = root / f"usr/share/tuxpaint/stamps/{name}"
  write(path.with_suffix(".png"), png(seed))
  if text is not None:
    write(path.with_suffix(".txt"), text)


WORDS = ("apple", "boat", "cloud", "dragon", "engine", "forest", "garden", "island", "ladder")


def art_tree(root: pathlib.Path) -> None:
  for i, word in enumerate(WORDS):
    clip_art(
      root, f"things/{word}_artist_01", i, f"Red {word}", f"A drawn {word}.", (word, "thing")
    )
    stamp(root, f"animals/birds/{word}", 100 + i, f"A {word} bird.\nde.utf8=Ein Vogel.\n")
  pngs = root / "usr/share/openclipart/png"
  (pngs / "alias.png").symlink_to("things/apple_artist_01.png")
  clip_art(root, "things/twin", 3, "The same pixels")
  clip_art(root, "things/say_nothing", 20, "Untitled", "Made with Inkscape", ("unsorted", "hash"))
  clip_art(root, "things/white", 21, "A white thing")
  out = io.BytesIO()
  Image.new("RGBA", (9, 9), (255, 255, 255, 255)).save(out, "PNG")
  write(pngs / "things/white.png", out.getvalue())
  clip_art(root, "things/cut", 22, "A cut thing")
  write(pngs / "things/cut.png", png(22)[:-60])
  write(pngs / "things/alone.png", png(23))
  write(pngs / "things/01_._.png", png(24))
  clip_art(root, "things/01_._", 24, "Untitled")
  for i in range(25):
    clip_art(root, f"stars/star_{i}pt", 200 + i, "gramastar", keywords=("stars",))
  stamp(root, "animals/birds/apple2", 150, "An apple bird, flying.")  # a variant of apple
  stamp(root, "animals/birds/hen_mirror", 151, None)
  stamp(root, "animals/birds/translated", 152, "de.utf8=Ein Vogel.\n")
  stamp(root, "animals/birds/latin", 153, "Caf\xe9".encode("latin-1"))
  stamp(root, "animals/frog", 154, "\ufeffA frog.")
  write(root / "usr/share/tuxpaint/stamps/animals/birds/drawn.svg", "<svg/>")


def prepare_clipart(tmp_path: pathlib.Path, *options: str) -> int:
  sizes = ("--test-clipart", "4", "--test-stamps", "3")
  arguments = [str(tmp_path / "out"), "--packages", str(tmp_path / "tree"), *sizes]
  return prepare_data.main(["clipart", *arguments, *options])
