"""`clip-jax VERB`: each verb a thin function over one module."""

import argparse
import ast
import contextlib
import importlib.metadata
import io
import logging
import math
import os
import pathlib
import runpy
import sys
from collections.abc import Sequence
from typing import Any

import rich.console
import rich.table

from clip_jax import cli_evaluation, cli_options, cli_studies, stopping
from clip_jax.cli_output import UsageError, show

_MOST_COLUMNS = 8  # of labels in a table
_NOT_BEGUN = "{}: stopped before there was anything to save; the same command starts again"


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs one verb. Returns: the exit code: 0; 2 after an error, which is told in one line; 130
  after Ctrl-C; `stopping.UNFINISHED` where training stopped early and saved, or had nothing to
  save. (A training that makes no progress ends with `watchdog.STUCK`, not here.)
  """
  options, rest = cli_options.parser().parse_known_args(arguments)
  overrides = [word for word in rest if word.startswith("--config.")]
  unknown = [word for word in rest if word not in overrides]
  logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
  for name in ("absl", "asyncio"):  # Orbax's own accounts of an error that is told below
    logging.getLogger(name).setLevel(logging.ERROR if options.debug else logging.CRITICAL)
  try:
    if unknown or (overrides and options.verb not in ("train", "preflight")):
      words = " ".join(unknown or overrides)
      raise UsageError(
        f"unknown option: {words}; see clip-jax {options.verb} --help (a config value is given as "
        "--config.KEY=VALUE, in one word)"
      )
    return _VERBS[options.verb](options, overrides)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130
  except stopping.Stopped as stopped:
    print(_NOT_BEGUN.format(stopped), file=sys.stderr)
    return stopping.UNFINISHED
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
  text = "".join(c if c.isprintable() else "?" for c in text)  # a name from a file may hold any
  foreign = not type(error).__module__.startswith("clip_jax") and not isinstance(error, ValueError)
  return f"{type(error).__name__}: {text} (--debug shows where)" if foreign else text


def _train(options: argparse.Namespace, overrides: Sequence[str]) -> int:
  with stopping.requests() as request:  # before what takes seconds to import
    import jax

    from clip_jax import hosts

    config = load_config(options.config, overrides)
    hosts.start(
      options.coordinator, options.processes, options.process, heartbeat_seconds=options.heartbeat
    )
    request.listen()  # JAX has taken SIGTERM
    with hosts.watched(options.heartbeat):
      try:
        return _train_here(options, config, request)
      except stopping.Stopped as stopped:
        if not jax.distributed.is_initialized():
          raise
        print(_NOT_BEGUN.format(stopped), file=sys.stderr, flush=True)
        os._exit(stopping.UNFINISHED)  # to the other hosts it is gone, and not failed


def _train_here(options: argparse.Namespace, config: Any, request: stopping.Request) -> int:
  import jax

  from clip_jax import evaluating, train, watchdog
  from clip_jax.evaluation import report

  workdir, first = pathlib.Path(options.workdir), jax.process_index() == 0
  console = rich.console.Console(stderr=options.json, quiet=not first)
  experiment = pathlib.Path(options.config)
  changes = options.accept_changes
  with watchdog.watching(options.stuck) as begin:
    if not train.train(config, workdir, console, changes, experiment, request, begin):
      return stopping.UNFINISHED
    found = evaluating.last(workdir, workdir / "report.html", console, request, begin)
  if found is None:
    return stopping.UNFINISHED
  facts, results = found
  if first:
    show(options, report.table(results), facts)
  console.print(f"report: {workdir / 'report.html'}")
  return 0


def load_config(path: str, overrides: Sequence[str]) -> Any:
  """Executes an experiment file, applies `--config.KEY=VALUE`, and checks the result.

  Raises: UsageError or ConfigError naming the key, with the nearest one that exists.
  """
  from absl import flags
  from ml_collections import config_flags

  from clip_jax import parsing

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
    text = str(error)
    with contextlib.suppress(SyntaxError, ValueError):  # that of a KeyError is a literal
      text = str(ast.literal_eval(text))
    text = "; ".join(text.splitlines())
    given = f" with {' '.join(overrides)}" if overrides else ""
    raise UsageError(f"{path}{given}: {text}") from error
  return parsing.parse(values["config"].value)


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
  show(options, table, value)
  return 0


def _embed(options: argparse.Namespace, _: Sequence[str]) -> int:
  import numpy as np

  from clip_jax import metrics
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
    content = io.BytesIO()
    np.save(content, embeddings_NE)
    metrics.write_atomically(pathlib.Path(options.output), content.getvalue())
  table = rich.table.Table("input", "embedding")
  for name, row in zip(inputs, embeddings_NE, strict=True):
    table.add_row(name, " ".join(f"{x:+.3f}" for x in row[:6]) + " ...")
  pairs = zip(inputs, embeddings_NE.tolist(), strict=True)
  show(options, table, [{"input": name, "embedding": row} for name, row in pairs])
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

  model = sources.load(options.source, options.activation, options.resolution)
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
  show(options, table, facts)
  return 0


def _export(options: argparse.Namespace, _: Sequence[str]) -> int:
  from clip_jax.interop import exports, sources, verify

  dest = pathlib.Path(options.dest)
  model = sources.load(options.source, options.activation)
  exports.export(model, dest, options.format)
  table = rich.table.Table("read back by", "largest difference", title=str(dest))
  found = verify.compare(model, dest, options.format)
  for comparison in found:
    difference = comparison.largest_difference
    table.add_row(comparison.runtime, "not checked" if difference is None else f"{difference:.1e}")
  read = [{"runtime": c.runtime, "largest_difference": c.largest_difference} for c in found]
  show(options, table, {"written": str(dest), "read_back": read})
  wrong = [str(c) for c in found if c.largest_difference is not None and not c.agrees]
  if wrong:
    raise UsageError(f"{dest}: written, but not the same when read back: {'; '.join(wrong)}")
  return 0


def _preflight(options: argparse.Namespace, overrides: Sequence[str]) -> int:
  import dataclasses

  from clip_jax import preflight, preflight_text, remedies, sharding

  if not 0 <= options.price < math.inf:
    raise UsageError(f"--price {options.price}: dollars a chip-hour, 0 or more")
  config = load_config(options.config, overrides)
  devices = preflight.devices_of(options.topology, options.slices)
  asked = {
    "experiment": config.name,
    "topology": options.topology,
    "slices": options.slices,
    "options": list(overrides),
    "versions": {name: importlib.metadata.version(name) for name in ("clip-jax-tpu", "jax")},
  }
  console = rich.console.Console(stderr=True)

  def measure(config: Any) -> preflight.Report:
    pairs, remat = config.data.batch_pairs, config.model.remat
    what = f"{pairs} pairs, remat {remat}, {config.mesh}, {config.microbatches} microbatches"
    with console.status(f"compiling for {options.topology}: {what}"):
      return preflight.report(config, devices)

  table = rich.table.Table(show_header=False, title=f"{config.name} on {options.topology}")
  try:
    found = measure(config)
  except preflight.DoesNotFit as error:
    tried = []
    parts = len(devices) // sharding.make_mesh(config.mesh, devices).shape["tensor"]
    table.add_row("does not fit", str(error))
    for words, _, result in remedies.search(config, parts, error, measure):
      if isinstance(result, preflight.Report):
        table.add_row(words, f"fits: {dict(preflight_text.lines(result))['memory a device']}")
        tried.append({"options": words, "fits": True, **_finite(dataclasses.asdict(result))})
      else:
        table.add_row(words, str(result))
        why = {"why": result} if isinstance(result, str) else {"used_bytes": result.used_bytes}
        tried.append({"options": words, "fits": False, **why})
    memory = {"used_bytes": error.used_bytes, "capacity_bytes": error.capacity_bytes}
    show(options, table, {**asked, "fits": False, **_finite(memory), "tried": tried})
    return 1
  for name, value in preflight_text.lines(found, options.price):
    table.add_row(name, value)
  money = {"dollars": found.run_chip_hours * options.price} if options.price else {}
  show(options, table, {**asked, "fits": True, **_finite({**dataclasses.asdict(found), **money})})
  return 0


def _finite(values: dict[str, Any]) -> dict[str, Any]:
  """What is not known as null, as JSON has neither nan nor infinity."""
  known = lambda x: not isinstance(x, float) or math.isfinite(x)  # noqa: E731
  return {name: x if known(x) else None for name, x in values.items()}


_VERBS = {
  "import": _import,
  "export": _export,
  "train": _train,
  "preflight": _preflight,
  "evaluate": cli_evaluation.evaluate,
  "paper": cli_evaluation.paper,
  "classify": _classify,
  "embed": _embed,
  "predictions": cli_studies.predictions,
  "stress": cli_studies.stress,
  "overlap": cli_studies.overlap,
  "probe": cli_studies.probe,
}

if __name__ == "__main__":
  run()
