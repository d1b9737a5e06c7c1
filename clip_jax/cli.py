"""`clip-jax VERB`: each verb a thin function over one module."""

import argparse
import functools
import json
import logging
import os
import pathlib
import runpy
import sys
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.table

_EPILOG = """\
examples:
  clip-jax train --config experiments/demo.py --workdir runs/demo --config.steps=500
  clip-jax evaluate --weights runs/demo
  clip-jax classify photo.png --labels "a cat,a dog" --weights runs/demo
  clip-jax embed --weights runs/demo --texts "a red circle" --output texts.npy
  clip-jax import ViT-B-32.pt weights/vit_b_32
"""


_MOST_COLUMNS = 8  # of labels in a table


class UsageError(ValueError):
  """A command line that cannot be carried out."""


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs one verb. Returns: the exit code, 2 after an error that is told in one line."""
  options, rest = _parser().parse_known_args(arguments)
  overrides = [word for word in rest if word.startswith("--config.")]
  unknown = [word for word in rest if word not in overrides]
  logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
  for name in ("absl", "asyncio"):  # Orbax's own accounts of an error that is told below
    logging.getLogger(name).setLevel(logging.ERROR if options.debug else logging.CRITICAL)
  try:
    if unknown or (overrides and options.verb != "train"):
      words = " ".join(unknown or overrides)
      raise UsageError(
        f"unknown option: {words}; see clip-jax {options.verb} --help (a config value is given as "
        "--config.KEY=VALUE, in one word)"
      )
    return _VERBS[options.verb](options, overrides)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130
  except Exception as error:
    if options.debug:
      raise
    print(f"error: {_one_line(error)}", file=sys.stderr)
    return 2


def run() -> None:
  """The console command. An error's line is its last word: no library's farewell follows it."""
  code = main()
  sys.stdout.flush()
  sys.stderr.flush()
  if code:
    os._exit(code)


def _one_line(error: Exception) -> str:
  """What went wrong, without a stack trace; a foreign error also says where to look."""
  if isinstance(error, OSError) and error.strerror:
    return f"{error.filename or 'input or output'}: {error.strerror}"
  text = " ".join(str(error).split()) or type(error).__name__
  foreign = not type(error).__module__.startswith("clip_jax") and not isinstance(error, ValueError)
  return f"{type(error).__name__}: {text} (--debug shows where)" if foreign else text


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="clip-jax",
    description="CLIP in JAX: train on image-text pairs, evaluate, classify, embed.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
  add = functools.partial(verbs.add_parser, allow_abbrev=False)
  common = argparse.ArgumentParser(add_help=False)
  common.add_argument("--json", action="store_true", help="print JSON for programs, not a table")
  common.add_argument("--debug", action="store_true", help="show the stack trace of an error")
  weights = argparse.ArgumentParser(add_help=False)
  weights.add_argument("--weights", required=True, metavar="DIR", help="a workdir with checkpoints")

  train = add(
    "train",
    parents=[common],
    help="train from a config file, or go on with a workdir",
    description="Trains, evaluates and writes a report. The same command on the same workdir goes "
    "on from its newest checkpoint. A config file is Python code and is executed.",
  )
  train.add_argument(
    "--config", required=True, metavar="FILE", help="experiment file with get_config()"
  )
  train.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints, metrics, report")
  train.add_argument(
    "--accept-changes",
    action="store_true",
    help="go on from a checkpoint although its config or data differ from this run's",
  )
  train.add_argument(
    "--config.KEY",
    dest="_",
    metavar="VALUE",
    help="override a value of the config, e.g. --config.steps=100",
  )

  evaluate = add(
    "evaluate",
    parents=[common, weights],
    help="run a checkpoint's evaluation tasks",
    description="Zero-shot classification and retrieval on the tasks of the run's config.",
  )
  evaluate.add_argument("--report", metavar="FILE", help="also write the HTML report here")

  classify = verbs.add_parser(
    allow_abbrev=False,
    name="classify",
    parents=[common, weights],
    help="zero-shot labels for images",
  )
  classify.add_argument("images", nargs="+", metavar="IMAGE")
  classify.add_argument("--labels", required=True, help='comma-separated, e.g. "a cat,a dog"')
  classify.add_argument(
    "--template",
    action="append",
    metavar="TEXT",
    help='prompt with {} for the label, may be repeated; default "{}": the labels as they are',
  )

  load = add(
    "import",
    parents=[common],
    help="weights of other frameworks -> a checkpoint",
    description="Reads OpenAI's .pt archives, open_clip's state dicts (with open_clip_config.json "
    "beside them), Hugging Face's folders of CLIPModel and SiglipModel, and big_vision's .npz.",
  )
  load.add_argument("source", metavar="SOURCE", help="file or folder")
  load.add_argument("dest", metavar="DEST", help="new folder, as --weights takes it")
  load.add_argument(
    "--activation",
    choices=("quick_gelu", "gelu"),
    help="of a state dict that does not say it (OpenAI's and DFN's: quick_gelu)",
  )

  embed = verbs.add_parser(
    allow_abbrev=False,
    name="embed",
    parents=[common, weights],
    help="embeddings of images and texts",
  )
  embed.add_argument("images", nargs="*", metavar="IMAGE")
  embed.add_argument("--texts", action="append", default=[], metavar="TEXT", help="may be repeated")
  embed.add_argument(
    "--output", metavar="FILE.npy", help="float32 [N, E], images first, then texts"
  )
  return parser


def _console(options: argparse.Namespace) -> rich.console.Console:
  """People read standard output, unless it carries JSON."""
  return rich.console.Console(stderr=options.json)


def _print(options: argparse.Namespace, table: rich.table.Table, value: Any) -> None:
  if options.json:
    print(json.dumps(value))
  else:
    rich.console.Console().print(table)


def _train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
  from clip_jax import metrics, summary, train
  from clip_jax.evaluation import report

  config = load_config(options.config, overrides)
  workdir, console = pathlib.Path(options.workdir), _console(options)
  if not train.train(config, workdir, console, options.accept_changes):
    step = metrics.read(workdir)[-1]["step"]
    console.print(f"stopped at step {step} and saved in {workdir}; the same command continues")
    return 0
  facts, results = summary.finish(workdir, workdir / "report.html")
  _print(options, report.table(results), facts)
  console.print(f"report: {workdir / 'report.html'}")
  return 0


def load_config(path: str, overrides: Sequence[str]) -> Any:
  """Executes an experiment file, applies `--config.KEY=VALUE`, and checks the result.

  Raises: UsageError or ConfigError naming the key, with the nearest one that exists.
  """
  from absl import flags
  from ml_collections import config_flags

  from clip_jax import config as config_lib

  if not pathlib.Path(path).is_file():
    raise UsageError(f"{path}: no such config file")
  experiment = runpy.run_path(path)
  if "get_config" not in experiment:
    raise UsageError(f"{path}: no function get_config() in it")
  values, words = flags.FlagValues(), ["clip-jax", *overrides]
  try:
    config_flags.DEFINE_config_dict(
      "config", experiment["get_config"](), flag_values=values, sys_argv=words
    )
    values(words)
  except (flags.Error, AttributeError, LookupError, TypeError) as error:
    text = str(error).strip("'\"").replace("\\'", "'").replace("\\n", "; ")
    raise UsageError(f"{path} with {' '.join(overrides)}: {text}") from error
  return config_lib.parse(values["config"].value)


def _evaluate(options: argparse.Namespace, _: Sequence[str]) -> int:
  from clip_jax import summary
  from clip_jax.evaluation import report

  page = pathlib.Path(options.report) if options.report else None
  if page is not None and not page.absolute().parent.is_dir():
    raise UsageError(f"--report {page}: there is no folder {page.absolute().parent}")
  facts, results = summary.finish(pathlib.Path(options.weights), page)
  _print(options, report.table(results), facts)
  return 0


def _classify(options: argparse.Namespace, _: Sequence[str]) -> int:
  from clip_jax.interop import sources

  labels = [label.strip() for label in options.labels.split(",")]
  _check_texts("--labels", labels)
  model = sources.load(options.weights)
  probabilities_NC = model.classify(options.images, labels, options.template or ("{}",))
  shown = len(labels) if len(labels) <= _MOST_COLUMNS else 5  # then the likeliest few, by name
  table = rich.table.Table("image", *(labels if shown == len(labels) else ["likeliest labels"]))
  value = []
  for image, row in zip(options.images, probabilities_NC, strict=True):
    best = sorted(zip(labels, row, strict=True), key=lambda pair: -pair[1])[:shown]
    few = [", ".join(f"{label} {p:.1%}" for label, p in best)]
    table.add_row(image, *([f"{p:.1%}" for p in row] if shown == len(labels) else few))
    value.append({"image": image, "probabilities": dict(zip(labels, row.tolist(), strict=True))})
  _print(options, table, value)
  return 0


def _embed(options: argparse.Namespace, _: Sequence[str]) -> int:
  import numpy as np

  from clip_jax.interop import sources

  if not options.images and not options.texts:
    raise UsageError("nothing to embed: give images, or --texts")
  _check_texts("--texts", options.texts)
  if options.output and not pathlib.Path(options.output).absolute().parent.is_dir():
    raise UsageError(f"--output {options.output}: there is no such folder")
  model = sources.load(options.weights)
  embeddings_NE = np.concatenate(
    [model.encode_image(options.images), model.encode_text(options.texts)]
  )
  inputs = [*options.images, *options.texts]
  if options.output:
    temporary = pathlib.Path(options.output + ".tmp")
    with temporary.open("wb") as file:
      np.save(file, embeddings_NE)
    os.replace(temporary, options.output)
  table = rich.table.Table("input", "embedding")
  for name, row in zip(inputs, embeddings_NE, strict=True):
    table.add_row(name, " ".join(f"{x:+.3f}" for x in row[:6]) + " ...")
  pairs = zip(inputs, embeddings_NE.tolist(), strict=True)
  _print(options, table, [{"input": name, "embedding": row} for name, row in pairs])
  return 0


def _check_texts(option: str, texts: Sequence[str]) -> None:
  """Raises: UsageError for an empty text, or one that was not UTF-8 on the command line."""
  for text in texts:
    if not text.strip():
      raise UsageError(f"{option}: an empty text among {', '.join(map(repr, texts))}")
    try:
      text.encode()
    except UnicodeEncodeError:
      raise UsageError(f"{option}: {text!r} is not valid UTF-8") from None


def _import(options: argparse.Namespace, _: Sequence[str]) -> int:
  from clip_jax.interop import sources
  from clip_jax.models import clip

  model = sources.load(options.source, options.activation)
  sources.save(model, pathlib.Path(options.dest))
  m, p = model.config.model, model.preprocess
  tower = f"ResNet {list(m.image.blocks)}" if m.image.blocks else f"ViT of {m.image.layers} layers"
  facts = {
    "written": str(options.dest),
    "parameters": f"{clip.parameter_counts(m)['total']:,}",
    "image": f"{tower}, width {m.image.width}, {m.image.resolution} pixels",
    "text": f"{m.text.layers} layers, width {m.text.width}, {m.text.context_length} tokens",
    "activation": m.activation,
    "preprocessing": f"{p.resize}, bicubic, mean {p.mean}, std {p.std}",
    "tokenizer": "CLIP's" if model.tokenizer else "not here: give tokens",
  }
  table = rich.table.Table(show_header=False)
  for name, value in facts.items():
    table.add_row(name, value)
  _print(options, table, facts)
  return 0


_VERBS = {
  "import": _import,
  "train": _train,
  "evaluate": _evaluate,
  "classify": _classify,
  "embed": _embed,
}

if __name__ == "__main__":
  run()
