"""The options that data sets of one's own have in common, and what they say."""

import argparse
import contextlib

from tools.prepare import cluster, duplicates, parallel
from tools.prepare.evaluation_sets import evaluated
from tools.prepare.filters import Filters
from tools.prepare.passes import Choices


def add(parser: argparse.ArgumentParser) -> None:
  """Adds them in groups, as people look for them."""
  group = parser.add_argument_group("what is kept", "0 or nothing said: no limit")
  group.add_argument(
    "--max-side", type=count, default=0, metavar="N",
    help="reduce images to N pixels of the longer side: lossy ones as JPEG of quality 95, lossless "
    "ones and those with alpha (on white) as PNG",
  )  # fmt: skip
  group.add_argument(
    "--min-side", type=count, default=0, metavar="N", help="pixels of the shorter side"
  )
  group.add_argument(
    "--max-aspect", type=ratio, default=0.0, metavar="X", help="longer side over shorter side"
  )
  group.add_argument(
    "--min-caption", type=count, default=0, metavar="N", help="characters, of whatever language"
  )
  group.add_argument("--max-caption", type=count, default=0, metavar="N", help="characters")
  group.add_argument(
    "--deduplicate", choices=("none", "exact", "near"), default="none",
    help="keep the first of images with the same pixels (exact), or also of those that look nearly "
    "the same, by a perceptual hash (near): mirrored copies are not looked for, and an image of "
    "one colour is like itself alone",
  )  # fmt: skip
  group.add_argument(
    "--against", action="append", default=[], metavar="EVALSET",
    help="leave out images that look nearly like one of these: a prepared folder, a TFDS data set, "
    "a folder of images or of .tar or .parquet files (FOLDER, or FOLDER:SPLIT for one split), such "
    "a file or a table; may stand several times",
  )  # fmt: skip
  group.add_argument(
    "--near-bits", type=bits, default=duplicates.BITS, metavar="N",
    help=f"of 64 in which nearly the same images may differ ({duplicates.BITS})",
  )  # fmt: skip
  group.add_argument(
    "--validation-fraction", type=fraction, default=0.0, metavar="X",
    help="share held out as the split validation, by the hash of the image's pixels: the same "
    "image is on the same side in every data set (0)",
  )  # fmt: skip
  group = parser.add_argument_group("who does it")
  group.add_argument(
    "--workers", type=positive, default=parallel.cores(), metavar="N",
    help="processes (as many as cores)",
  )  # fmt: skip
  group.add_argument(
    "--ray", metavar="ADDRESS",
    help="a Ray cluster in place of processes here ('local' starts one of this machine); all its "
    "machines must see SOURCE and DEST under the same paths; wants pip install -e '.[cluster]'",
  )  # fmt: skip


def chosen(asked: argparse.Namespace) -> Choices:
  """What was asked for. Raises: PrepareError for limits that leave nothing, or EVALSETs."""
  if not hasattr(asked, "deduplicate"):  # a data set as it was published
    return Choices()
  return Choices(
    Filters(asked.max_side, asked.min_side, asked.max_aspect, asked.min_caption, asked.max_caption),
    asked.deduplicate,
    tuple(evaluated(place) for place in asked.against),
    asked.near_bits,
    asked.validation_fraction,
  )


def engine(asked: argparse.Namespace) -> contextlib.AbstractContextManager[parallel.Engine]:
  """Who does the work, while it is needed. Raises: PrepareError when entered."""
  workers = getattr(asked, "workers", 1)
  if getattr(asked, "ray", None):
    return cluster.engine(asked.ray, workers)
  return contextlib.nullcontext(parallel.Processes(workers))


def count(text: str) -> int:
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
  return int(text)


def positive(text: str) -> int:
  if count(text) < 1:
    raise argparse.ArgumentTypeError("wants at least 1")
  return int(text)


def bits(text: str) -> int:
  if count(text) > duplicates.MOST_BITS:
    raise argparse.ArgumentTypeError(f"{text} of 64 bits are too many: want 0 to 11")
  return int(text)


def fraction(text: str) -> float:
  value = _number(text)
  if not 0 <= value < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
  return value


def ratio(text: str) -> float:
  value = _number(text)
  if not (value == 0 or 1 <= value < float("inf")):
    raise argparse.ArgumentTypeError(f"{text!r}: want 1 (squares alone) or more, or 0 for any")
  return value


def _number(text: str) -> float:
  try:
    return float(text)
  except ValueError:
    return -1.0
