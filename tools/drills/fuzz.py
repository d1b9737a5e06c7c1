"""Feeds damaged input to one reader for some seconds: it reads it, or raises its one exception.

python -m tools.drills.fuzz {images,records,tar,parquet,archives,tables} [--seconds 30] [--seed 0]

With atheris, where it is installed, which looks for new paths through the code; otherwise by random
changes of good files. The last line of the output is JSON: engine, executions, crashes. An input
that brings anything else to light is kept, and the exit code is 1.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import pathlib
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable

import pyarrow
import pyarrow.parquet
from PIL import Image

from clip_jax.data import images, parquet_source, records, storage, tables, tar
from clip_jax.interop import archive
from tools import fuzz_archive

ROOT = pathlib.Path(__file__).resolve().parents[2]
_SCRATCH = pathlib.Path("/dev/shm") if pathlib.Path("/dev/shm").is_dir() else None


def _image(data: bytes, path: pathlib.Path) -> None:
  del path
  with contextlib.suppress(images.ImageError):
    image = images.decode(data)
    assert image.mode == "RGB", image.mode
    assert min(images.fit(image, 8).shape) > 0


def _record(data: bytes, path: pathlib.Path) -> None:
  del path
  with contextlib.suppress(records.RecordError):
    record = records.unpack(data)
    assert records.unpack(records.pack(record)) == record


def _tar(data: bytes, path: pathlib.Path) -> None:
  path.write_bytes(data)
  with contextlib.suppress(tar.TarError):
    for member in tar.members(path):
      assert 0 <= member.offset <= member.offset + member.size <= len(data), member


def _parquet(data: bytes, path: pathlib.Path) -> None:
  path.write_bytes(data)
  file = storage.File(str(path), len(data), "")
  with contextlib.suppress(records.RecordError):
    source = parquet_source.ParquetSource([file])
    for i in range(min(len(source), 8)):
      with contextlib.suppress(records.RecordError):
        assert isinstance(source[i].image, bytes)


def _archive(data: bytes, path: pathlib.Path) -> None:
  path.write_bytes(data)
  with contextlib.suppress(archive.ArchiveError):
    for name, array in archive.read(path).arrays.items():
      assert array.nbytes <= 2 * len(data), name
      array.tobytes()


def _table(data: bytes, path: pathlib.Path) -> None:
  """As many rows and rejections come out as lines that are not blank went in."""
  for kind in (".csv", ".tsv", ".jsonl"):
    table = path.with_suffix(kind)
    table.write_bytes(data)
    with contextlib.suppress(tables.TableError):
      found = len(list(tables.read(table, ("image", "caption"))))
      lines = sum(not _blank(line, i == 0) for i, line in enumerate(data.split(b"\n")))
      assert found + (kind != ".jsonl") == lines, f"{found} of {lines} lines"


def _blank(line: bytes, first: bool) -> bool:
  try:
    return not line.decode("utf-8-sig" if first else "utf-8").strip()
  except UnicodeDecodeError:
    return False


def _pictures() -> list[bytes]:
  out = []
  for mode, kind in (
    ("RGB", "PNG"), ("P", "PNG"), ("I;16", "PNG"), ("RGB", "JPEG"), ("CMYK", "JPEG"), ("P", "GIF"),
    ("RGBA", "WEBP"), ("RGB", "BMP"), ("L", "TIFF"),
  ):  # fmt: skip
    file = io.BytesIO()
    Image.new(mode, (24, 16), 7 if mode in ("P", "L", "I;16") else None).save(file, kind)
    out.append(file.getvalue())
  return out


def _packed() -> list[bytes]:
  return [records.pack(records.Record("key", b"image", ("a caption", "größe"), label))
          for label in (None, "label")]  # fmt: skip


def _tars() -> list[bytes]:
  out = []
  for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as written:
      for name in ("a.jpg", "b/" + "c" * 90 + ".txt"):
        info = tarfile.TarInfo(name)
        info.size = 600
        written.addfile(info, io.BytesIO(bytes(600)))
    out.append(file.getvalue()[:4096])
  return out


def _parquets() -> list[bytes]:
  out = []
  for image, kind in (
    ([b"one", b"two", None], "snappy"),
    ([{"bytes": b"one", "path": "a"}], "zstd"),
  ):
    table = pyarrow.table({"image": image, "caption": [["a", "größe"]] * len(image)})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, row_group_size=2, compression=kind, store_schema=False)
    out.append(sink.getvalue().to_pybytes())
  return out


def _weights() -> list[bytes]:
  with tempfile.TemporaryDirectory() as folder:
    return [file.read_bytes() for file in fuzz_archive.own_files(pathlib.Path(folder))]


def _texts() -> list[bytes]:
  return [
    b'image,caption\na.png,"a ""quoted"" one"\nb.png,two\n',
    b"\xef\xbb\xbfimage\tcaption\na.png\tone\n\nb.png\ttwo\r\n",
    b'{"image": "a.png", "caption": ["one", "two"]}\n{"image": "b.png", "caption": "three"}\n',
  ]


# Name: what one input is given to, and good inputs to begin with.
TARGETS: dict[str, tuple[Callable[[bytes, pathlib.Path], None], Callable[[], list[bytes]]]] = {
  "images": (_image, _pictures),
  "records": (_record, _packed),
  "tar": (_tar, _tars),
  "parquet": (_parquet, _parquets),
  "archives": (_archive, _weights),
  "tables": (_table, _texts),
}


def by_changes(name: str, seconds: float, seed: int) -> tuple[int, int]:
  """Random changes of the good inputs. Returns: executions, crashes (0, or 1 and it ends)."""
  target, good = TARGETS[name]
  samples, end, count = good(), time.monotonic() + seconds, 0
  with tempfile.TemporaryDirectory(dir=_SCRATCH) as folder:
    path = pathlib.Path(folder) / "input"
    while time.monotonic() < end:
      data = fuzz_archive.mutate(samples[count % len(samples)], random.Random(f"{seed} {count}"))
      count += 1
      try:
        target(data, path)
      except Exception as error:
        kept = pathlib.Path(f"fuzz-{name}-{seed}-{count}.bin")
        kept.write_bytes(data)
        print(f"{kept}: {type(error).__name__}: {error}", file=sys.stderr)
        return count, 1
  return count, 0


_INSTRUMENTED = """
import atheris
with atheris.instrument_imports(include=["clip_jax", "tools"]):
  from tools.drills import fuzz
"""


def by_atheris(name: str, seconds: float, seed: int) -> tuple[int, int]:
  """The same by libFuzzer, in a process of its own, which it ends."""
  with tempfile.TemporaryDirectory(dir=_SCRATCH) as folder:
    corpus = pathlib.Path(folder) / "corpus"
    corpus.mkdir()
    for i, data in enumerate(TARGETS[name][1]()):
      (corpus / f"{i}").write_bytes(data)
    words = [f"-max_total_time={seconds:.0f}", f"-seed={seed + 1}", "-max_len=8192"]
    words += [f"-artifact_prefix=fuzz-{name}-", "-rss_limit_mb=4096", str(corpus)]
    code = _INSTRUMENTED + f"fuzz.libfuzzer({name!r}, {folder!r})"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, stderr=subprocess.PIPE)
  told = done.stderr.decode(errors="replace")
  runs = re.findall(r"Done (\d+) runs", told) or re.findall(r"^#(\d+)", told, re.MULTILINE)
  if done.returncode:
    print(told[-3000:], file=sys.stderr)
  return int(runs[-1]) if runs else 0, int(done.returncode != 0)


def libfuzzer(name: str, folder: str) -> None:
  """Does not return. The words of the command line are libFuzzer's."""
  import atheris

  target, path = TARGETS[name][0], pathlib.Path(folder) / "input"
  atheris.Setup(sys.argv, lambda data: target(data, path))
  atheris.Fuzz()


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
  parser.add_argument("target", choices=TARGETS)
  parser.add_argument("--seconds", type=float, default=30.0)
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  engine = "atheris" if importlib.util.find_spec("atheris") else "random changes"
  run = by_atheris if engine == "atheris" else by_changes
  executions, crashes = run(options.target, options.seconds, options.seed)
  print(json.dumps({"engine": engine, "executions": executions, "crashes": crashes}))
  return int(crashes > 0 or executions == 0)


if __name__ == "__main__":
  sys.exit(main())
