"""The verbs that look closely at a model: predictions, stress, overlap, probe."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.console
import rich.table
import rich.text

from clip_jax.cli_output import UsageError

Study = Callable[[argparse.Namespace], int]


def predictions(options: argparse.Namespace, _: Sequence[str]) -> int:
  return _together(_predictions, options)


def stress(options: argparse.Namespace, _: Sequence[str]) -> int:
  return _together(_stress, options)


def overlap(options: argparse.Namespace, _: Sequence[str]) -> int:
  return _together(_overlap, options)


def probe(options: argparse.Namespace, _: Sequence[str]) -> int:
  return _together(_probe, options)


def _together(study: Study, options: argparse.Namespace) -> int:
  """A study in all processes of its run, once they have found each other."""
  from clip_jax import hosts

  hosts.start(
    options.coordinator, options.processes, options.process, heartbeat_seconds=options.heartbeat
  )
  with hosts.watched(options.heartbeat):
    return study(options)


def _predictions(options: argparse.Namespace) -> int:
  from clip_jax import studies
  from clip_jax.evaluation import pages

  result, notes = studies.predictions(
    _setup(options), options.output, options.examples, options.halves
  )
  right = sum(example.correct for example in result.examples)
  rows = {
    f"top-1 of {result.n:,} images": pages.percent(result.top1),
    "right of those on the page": f"{right:,} of {len(result.examples):,}",
    "page": options.output,
  }
  examples = [
    {
      "key": example.key,
      "label": example.label,
      "probability": example.probability,
      "rank": example.rank,
      "likeliest": [{"class": name, "probability": p} for name, p in example.likeliest],
    }
    for example in result.examples
  ]
  figures = {"name": result.name, **result.metrics(), "page": options.output}
  return _tell(options, result.name, rows, notes, {**figures, "examples": examples})


def _stress(options: argparse.Namespace) -> int:
  from clip_jax import studies
  from clip_jax.evaluation import pages
  from clip_jax.evaluation.stress import corruptions

  names = options.corruptions or corruptions.NAMES
  result, notes = studies.stress(
    _setup(options), options.output, names, options.severities, _console(options)
  )
  rows = {"clean": pages.percent(result.clean)}
  rows |= {f"{n.replace('_', ' ')}, mean": pages.percent(v) for n, v in result.means.items()}
  rows |= {"mean of all": pages.percent(result.mean), "written": options.output}
  value = {"name": result.name, "written": options.output, **_finite(result.metrics())}
  return _tell(options, result.name, rows, notes, value)


def _overlap(options: argparse.Namespace) -> int:
  from clip_jax import studies
  from clip_jax.evaluation.overlap import writers as overlap_writers

  by, threshold = options.by, options.threshold
  threshold = studies.THRESHOLDS[by] if threshold is None else threshold
  where = (options.output, options.training, options.training_split)
  effect, matches, notes = studies.overlap_with(
    _setup(options), *where, by, threshold, _console(options)
  )
  rows = {
    what: f"{figure} ({images} images)" if images else figure
    for what, figure, images in overlap_writers.effect_rows(effect)
  }
  value = overlap_writers.results(effect, matches, by, threshold)
  rows["written"] = options.output
  return _tell(options, effect.name, rows, notes, {**value, "written": options.output})


def _probe(options: argparse.Namespace) -> int:
  from clip_jax import probing
  from clip_jax.evaluation import pages
  from clip_jax.evaluation.probe import study

  shots = None if options.shots is None else _whole_numbers("--shots", options.shots)
  asked = probing.Asked(
    options.train_split,
    options.validation_split,
    options.features,
    shots,
    _whole_numbers("--seeds", options.seeds),
  )
  found, notes = probing.probe(_setup(options), options.output, asked, _console(options))
  full, zero_shot = found.full, found.zero_shot
  rows = {"zero-shot": pages.percent(zero_shot.score)} if zero_shot else {}
  rows |= {f"{study.counted(few.shots)}, mean": pages.percent(few.mean) for few in found.few}
  rows[f"linear probe, {full.examples:,} examples"] = pages.percent(full.score)
  if found.equal:
    rows["zero-shot is worth"] = f"{found.equal} a class"
  rows["written"] = options.output
  value = {**found.metrics(), "written": options.output}
  return _tell(options, f"{found.name}, {found.metric}", rows, notes, value)


def _whole_numbers(option: str, text: str) -> tuple[int, ...]:
  """Of a list with commas; "none" is an empty one. Raises: UsageError."""
  if text.strip() == "none":
    return ()
  words = [word.strip() for word in text.split(",")]
  if not all(word.isascii() and word.isdecimal() for word in words):
    raise UsageError(f"{option} {text!r}: want whole numbers, as 1,2,4")
  return tuple(map(int, words))


def _setup(options: argparse.Namespace) -> Any:
  from clip_jax import studies
  from clip_jax.evaluation import chosen

  asked = chosen.Asked(
    data=options.data,
    split=options.split,
    dataset=options.dataset,
    fold=options.fold,
    prompts=options.prompts,
    classes=options.classes,
    templates=tuple(options.template),
  )
  return studies.Setup(
    options.weights,
    asked,
    options.limit,
    options.batch,
    options.seed,
    skip_unreadable=options.corrupt_images == "skip",
  )


def _first() -> bool:
  """Whether this is the process that speaks for all."""
  import jax

  return jax.process_index() == 0


def _console(options: argparse.Namespace) -> rich.console.Console:
  """For progress: never on standard output."""
  return rich.console.Console(stderr=True, quiet=options.json or not _first())


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
  """What is not a number as null: JSON has no nan."""
  return {name: value if value == value else None for name, value in values.items()}


def _tell(
  options: argparse.Namespace,
  name: str,
  rows: Mapping[str, str],
  notes: Sequence[str],
  value: Mapping[str, Any],
) -> int:
  """The figures on standard output, for people or for a program; of several processes the first."""
  if not _first():
    return 0
  if options.json:
    print(json.dumps({**value, "notes": list(notes)}))
    return 0
  table = rich.table.Table(show_header=False, title=_plain(name))
  for what, figure in (*rows.items(), *(("note", note) for note in notes)):
    table.add_row(_plain(what), _plain(figure))
  rich.console.Console().print(table)
  return 0


def _plain(text: str) -> rich.text.Text:
  """Words that no terminal reads anything into: names of folders and files may hold any."""
  return rich.text.Text("".join(c if c.isprintable() else "?" for c in text))
