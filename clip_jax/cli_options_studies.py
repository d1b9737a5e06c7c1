"""The options of the verbs that look closely at a model: predictions, stress, overlap, probe."""

import argparse
from collections.abc import Callable


def add_to(
  add: Callable[..., argparse.ArgumentParser],
  common: argparse.ArgumentParser,
  weights: argparse.ArgumentParser,
  several: Callable[[argparse.ArgumentParser], None],
) -> None:
  """Adds the four verbs.

  Args: add, makes a verb; common and weights, what verbs share; several, adds the options of
    several processes.
  """
  shared = [common, weights, _data()]
  for verb in (_predictions, _stress, _overlap, _probe):
    several(verb(add, shared))


def _predictions(
  add: Callable[..., argparse.ArgumentParser], shared: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
  predictions = add(
    "predictions",
    parents=shared,
    help="a page of single images with their likeliest prompts",
    description="Zero-shot classification of a data set, and a page of images drawn at random: "
    "the true label with its probability and rank, the five likeliest prompts, failures too.",
  )
  predictions.add_argument("--output", required=True, metavar="FILE.html")
  predictions.add_argument(
    "--examples", type=int, default=36, metavar="N", help="so many images on the page (36)"
  )
  predictions.add_argument(
    "--halves",
    action="store_true",
    help="half of them from what is right and half from what is wrong, not at random from all",
  )
  return predictions


def _stress(
  add: Callable[..., argparse.ArgumentParser], shared: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
  stress = add(
    "stress",
    parents=shared,
    help="accuracy under noise, blur, weather and compression",
    description="Zero-shot accuracy under each corruption at each severity: curves, Markdown, "
    "CSV. Every figure is kept in results.jsonl as soon as it is measured: the same command goes "
    "on after a kill.",
  )
  stress.add_argument("--output", required=True, metavar="DIR")
  stress.add_argument(
    "--corruptions", type=_words, default=[], metavar="NAMES", help="comma-separated; default: all"
  )
  stress.add_argument(
    "--severities",
    type=_numbers,
    default=[1, 2, 3, 4, 5],
    metavar="NUMBERS",
    help="comma-separated, of 1 to 5; default: all",
  )
  return stress


def _overlap(
  add: Callable[..., argparse.ArgumentParser], shared: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
  overlap = add(
    "overlap",
    parents=shared,
    help="near duplicates of a data set in training data, and what they are worth",
    description="The nearest training image of each evaluated one, by a perceptual hash or by the "
    "model's embedding; the pairs on a page to look at; accuracy on Overlap, Clean and All with "
    "the paper's tests. Hashes and embeddings are kept: the same command goes on after a kill.",
  )
  overlap.add_argument("--output", required=True, metavar="DIR")
  overlap.add_argument(
    "--training",
    required=True,
    metavar="PATH",
    help="the training images: a prepared folder, tar files, a folder of images; digits, scenes",
  )
  overlap.add_argument("--training-split", default="train", metavar="NAME", help="(train)")
  overlap.add_argument(
    "--by", choices=("hash", "embedding"), default="hash", help="how pairs are found (hash)"
  )
  overlap.add_argument(
    "--threshold",
    type=float,
    metavar="T",
    help="the largest distance that counts: bits of the hash's 64 (8), or 1 - cosine (0.05)",
  )
  return overlap


def _probe(
  add: Callable[..., argparse.ArgumentParser], shared: list[argparse.ArgumentParser]
) -> argparse.ArgumentParser:
  probe = add(
    "probe",
    parents=shared,
    help="linear probe and few-shot probe, beside zero-shot",
    description="The paper's linear probe (logistic regression on the features of the frozen image "
    "encoder) of a few labelled examples a class and of all of them, and how many examples "
    "zero-shot is worth: a page with the curve, Markdown, CSV. Every figure is kept in "
    "results.jsonl as soon as it is measured: the same command goes on after a kill.",
  )
  probe.add_argument("--output", required=True, metavar="DIR")
  probe.add_argument(
    "--train-split", default="train", metavar="NAME", help="to learn from (train); --split: to test"
  )
  probe.add_argument(
    "--validation-split",
    default="",
    metavar="NAME",
    help="to choose lambda on; default: the data's own (validation, valid, val), or a fifth of "
    "train that is held back",
  )
  probe.add_argument(
    "--features",
    choices=("penultimate", "projected"),
    default="penultimate",
    help="before the projection, as the paper's (default), or the embedding",
  )
  probe.add_argument(
    "--shots",
    metavar="NUMBERS",
    help="examples a class, comma-separated (1,2,4,8,16), or none",
  )
  probe.add_argument(
    "--seeds", default="0,1,2", metavar="NUMBERS", help="that draw the shots, each once (0,1,2)"
  )
  return probe


def _data() -> argparse.ArgumentParser:
  """What is evaluated, with which prompts."""
  out = argparse.ArgumentParser(add_help=False)
  data = out.add_argument_group("images")
  data.add_argument(
    "--data",
    required=True,
    metavar="PATH",
    help="a prepared folder; a folder of images as CLASS/IMAGE or SPLIT/CLASS/IMAGE; the root of "
    "a --dataset; or the word digits or scenes",
  )
  data.add_argument("--split", default="test", metavar="NAME", help="(test)")
  data.add_argument(
    "--dataset", default="", metavar="KEY", help="one of the paper's, e.g. CIFAR10, below --data"
  )
  data.add_argument(
    "--fold", type=int, default=0, metavar="K", help="of a dataset that has folds, from 1"
  )
  data.add_argument(
    "--limit", type=int, default=0, metavar="N", help="so many images, drawn with the seed; 0: all"
  )
  data.add_argument("--seed", type=int, default=0, metavar="S", help="of what is drawn (0)")
  data.add_argument("--batch", type=int, default=256, metavar="B", help="images at a time (256)")
  data.add_argument(
    "--corrupt-images",
    choices=("error", "skip"),
    default="error",
    help="what to do with images that cannot be decoded: an error that names one (default), or "
    "leave them out and say which",
  )
  words = out.add_argument_group("prompts", "by default a dataset's own, or the data's class names")
  words.add_argument(
    "--classes",
    default="",
    metavar="FILE",
    help='a class a line, or a .json with {"classes": [...], "templates": [...]}',
  )
  words.add_argument(
    "--prompts", default="", metavar="NAME", help="a prompt set, e.g. imagenet, fashion_mnist"
  )
  words.add_argument(
    "--template",
    action="append",
    default=[],
    metavar="TEXT",
    help='with {} for the class, may be repeated; default: the prompts\' own or "a photo of a {}."',
  )
  return out


def _words(text: str) -> list[str]:
  return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
  """Raises: ArgumentTypeError for what is no list of whole numbers, or is empty."""
  try:
    found = [int(word) for word in _words(text)]
  except ValueError:
    found = []
  if not found:
    raise argparse.ArgumentTypeError(f"{text!r}: want whole numbers, as 1,3,5")
  return found
