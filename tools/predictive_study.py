"""Zero-shot accuracy over pairs seen: captions or words predicted, and contrastive (Figure 2).

  python tools/predictive_study.py --output docs/predictive

Trains the experiment with each of the three objectives from each seed and writes OUTPUT.json, .md
and .svg. A finished run stands in the work folder and is not made again: a study that was stopped
goes on with the run it was in. KEY=VALUE overrides the experiment: --config.steps=100.
"""

import argparse
import ast
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
from jax.sharding import Mesh

if __package__ in (None, ""):
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from clip_jax import cli, inference, metrics, sharding, summary, train, train_step
from clip_jax import config as config_lib
from clip_jax.data import pipeline, records
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.evaluation import encoding, prompts, tasks
from clip_jax.evaluation.paper import efficiency
from clip_jax.models import clip
from tools import arguments
from tools.predictive import heads, page, scoring, training

_VERSION = 1  # raise it when the same settings would give other figures


@dataclasses.dataclass(frozen=True)
class Study:
  """What all runs share. The seed of `config` is the first."""

  config: config_lib.Config
  mesh: Mesh
  tokenizer: Tokenizer
  evaluated: tasks.Ready
  sources: Sequence[records.RecordSource]
  points: tuple[int, ...]  # the steps after which a run is evaluated

  @property
  def prompt_set(self) -> prompts.PromptSet:
    assert self.evaluated.prompt_set is not None  # `training.checked_task`: zero-shot
    return self.evaluated.prompt_set


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, or 2 for a mistake."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  whole = arguments.number(int, 1)
  parser.add_argument("--config", default="experiments/predictive.py")
  parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/predictive"))
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/predictive"))
  parser.add_argument("--seeds", type=whole, default=3)
  parser.add_argument("--evaluations", type=arguments.number(int, 2), default=10)
  options, overrides = parser.parse_known_args(argv)
  console = rich.console.Console(stderr=True, highlight=False, soft_wrap=True)
  try:
    config = cli.load_config(options.config, overrides)
    study = opened(config, options.workdir, options.evaluations)
    runs = [
      kept_run(study, objective, config.seed + i, options.workdir, console)
      for i in range(options.seeds)
      for objective in efficiency.OBJECTIVES
    ]
    write(described(study, options.config, runs), options.output)
  except (ValueError, RuntimeError, OSError) as error:
    console.print(f"error: {error}", markup=False)
    return 2
  return 0


def opened(config: config_lib.Config, workdir: pathlib.Path, evaluations: int) -> Study:
  """Everything that can be wrong is found before the first step.

  Raises: StudyError for settings that the objectives do not share, or images of several classes;
    ValueError, OSError.
  """
  task = training.checked_task(config)
  evaluated = tasks.ready(config)[config.evaluation.tasks.index(task)]
  if evaluated.several:
    raise training.StudyError(
      f"config.evaluation.tasks: images of {evaluated.name} show several classes; the figure is of "
      "top-1 accuracy, which wants one"
    )
  sources = train.open_sources(config)
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch(config.data.batch_pairs, mesh)
  workdir.mkdir(parents=True, exist_ok=True)
  tokenizer = train.workdir_tokenizer(config, sources, workdir)
  points = log_spaced(config.steps, evaluations)
  return Study(config, mesh, tokenizer, evaluated, sources, points)


def log_spaced(steps: int, count: int) -> tuple[int, ...]:
  """At most `count` steps from a hundredth of all of them, or 1, to the last, as ratios even."""
  raw = np.geomspace(max(1, steps // 100), steps, count)
  return tuple(int(step) for step in np.unique(np.round(raw)))


def kept_run(
  study: Study, objective: str, seed: int, workdir: pathlib.Path, console: rich.console.Console
) -> dict[str, Any]:
  """The run that is kept in `workdir`, or a new one, which then is.

  Raises: StudyError when the kept one is of other settings or data.
  """
  config = dataclasses.replace(study.config, seed=seed)
  path = workdir / f"{objective}_{seed}.json"
  page_of_facts = json.loads(json.dumps(facts(study, config, objective)))
  if path.exists():
    kept = _read(path)
    changed = [key for key, value in page_of_facts.items() if kept["facts"].get(key) != value]
    if changed:
      raise training.StudyError(
        f"{path}: made with another {', '.join(changed)}; choose another --workdir, or remove it"
      )
    console.print(f"{objective}, seed {seed}: kept from {path}")
    return kept
  found = {
    "objective": objective,
    "seed": seed,
    "facts": page_of_facts,
    **run(study, config, objective, console),
  }
  metrics.write_atomically(path, json.dumps(found, indent=1) + "\n")
  return found


def _read(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    raise training.StudyError(f"{path}: not a run as JSON; remove it ({error})") from error


def facts(study: Study, config: config_lib.Config, objective: str) -> dict[str, Any]:
  """All that decides a run's figures."""
  return {
    "version": _VERSION,
    "objective": objective,
    "config": config_lib.to_dict(config),
    "data": pipeline.fingerprint(config, study.sources, study.tokenizer),
    "test": study.evaluated.source.fingerprint,
    "prompts": study.prompt_set.fingerprint,
    "points": study.points,
  }


def run(
  study: Study, config: config_lib.Config, objective: str, console: rich.console.Console
) -> dict[str, Any]:
  """Trains one objective with one seed: an evaluation at each of the study's points.

  Returns: {"seconds", "evaluations": [{"step", "pairs", "loss", "accuracy": {rule: share}}]}, where
    the loss is the mean since the evaluation before.
  Raises: StudyError when the loss is not finite or a record is bad.
  """
  start = time.perf_counter()
  state, step_fn, evaluate = _trainer(study, config, objective)
  batches = pipeline.host_batches(config, study.sources, study.tokenizer)
  stream = pipeline.Prefetcher(batches, functools.partial(_place, study), depth=2)
  lines: list[dict[str, Any]] = []
  losses: list[jax.Array] = []
  try:
    for step in range(1, config.steps + 1):
      state, current = step_fn(state, next(stream))
      losses.append(current["loss"])
      if step in study.points:
        loss = float(np.mean(jax.device_get(losses)))
        if not np.isfinite(loss):
          raise training.StudyError(
            f"{objective}, seed {config.seed}: the loss up to step {step} is {loss}; lower "
            "config.optimizer.learning_rate"
          )
        pairs = step * config.data.batch_pairs
        lines.append({"step": step, "pairs": pairs, "loss": loss, "accuracy": evaluate(state)})
        losses = []
        shown = ", ".join(f"{rule} {a:.1%}" for rule, a in lines[-1]["accuracy"].items())
        console.print(f"{objective}, seed {config.seed}, {pairs:,} pairs: loss {loss:.3f}; {shown}")
  finally:
    stream.close()
  return {"seconds": time.perf_counter() - start, "evaluations": lines}


def _trainer(
  study: Study, config: config_lib.Config, objective: str
) -> tuple[Any, Any, Callable[[Any], dict[str, float]]]:
  """(first state, step, evaluation); the contrastive ones are those of `clip-jax train`."""
  mesh = study.mesh
  if objective == "contrastive":

    def top1(state: Any) -> dict[str, float]:
      model = inference.Clip(config, state.params, study.tokenizer, batch_stats=state.batch_stats)
      (found,) = tasks.run(model, config, [study.evaluated])
      return {"cosine": found.metrics()["top1"]}

    step_fn = train_step.make_train_step(config, mesh)
    return train_step.init_state(config, mesh), step_fn, top1
  prediction: heads.Prediction = "captions" if objective == "captions" else "bag_of_words"
  length = config.model.text.context_length
  tokens_PL, class_P = scoring.prompt_tokens(study.prompt_set, study.tokenizer, length)

  def by_rule(state: training.State) -> dict[str, float]:
    return scoring.accuracies(
      config,
      prediction,
      mesh,
      state,
      tokens_PL,
      class_P,
      study.prompt_set.classes,
      study.evaluated.source,
      study.evaluated.task.limit,
      study.sources[0],
    )

  step_fn = training.make_step(config, prediction, mesh)
  return training.init_state(config, prediction, mesh), step_fn, by_rule


def _place(study: Study, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  bad = np.flatnonzero(batch["bad"])
  if len(bad):
    source, record, cause = (batch[name][bad[0]] for name in ("source", "record", "bad"))
    raise training.StudyError(
      f"{study.sources[source].locate(int(record))}: bad ({records.CAUSES[cause]}); repair it: the "
      "runs of a study see the same pairs"
    )
  arrays = {name: batch[name] for name in ("image", "tokens", "bad")}
  return sharding.global_batch({**arrays, "stop": np.zeros_like(batch["bad"])}, study.mesh)


def described(study: Study, path: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
  """What OUTPUT.json holds: all that page and drawing are made of."""
  config, task = study.config, study.evaluated.task
  kept = ("objective", "seed", "seconds", "evaluations")
  counts = clip.parameter_counts(config.model)
  predictive: dict[str, heads.Prediction] = {
    "captions": "captions",
    "bag_of_words": "bag_of_words",
  }
  cost = {
    name: {
      "head": heads.parameter_counts(config.model, prediction)["head"],
      "flops": heads.flops_per_pair(config.model, prediction),
    }
    for name, prediction in predictive.items()
  }
  image = heads.parameter_counts(config.model, "captions")["image"]
  cost["contrastive"] = {
    "head": counts["total"] - image,
    "flops": clip.flops_per_pair(config.model),
  }
  module = ast.parse(pathlib.Path(path).read_text(encoding="utf-8"))
  return {
    "config": path,
    "notes": ast.get_docstring(module) or "",
    "steps": config.steps,
    "batch_pairs": config.data.batch_pairs,
    "task": task.name or task.kind,
    "images": encoding.count(study.evaluated.source, config.evaluation.batch, task.limit),
    "classes": len(study.prompt_set.classes),
    "prompts": sum(map(len, study.prompt_set.names)) * len(study.prompt_set.templates),
    "machine": summary.machine(),
    "cost": cost,
    "runs": [{key: one[key] for key in kept} for one in runs],
  }


def write(study: dict[str, Any], output: pathlib.Path) -> None:
  """OUTPUT.json, .svg and .md, each whole or not at all."""
  output.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(study, indent=1) + "\n"
  metrics.write_atomically(output.with_suffix(".json"), text)
  metrics.write_atomically(output.with_suffix(".svg"), page.drawing(study))
  drawing_name = output.with_suffix(".svg").name
  metrics.write_atomically(output.with_suffix(".md"), page.page(study, drawing_name))


if __name__ == "__main__":
  sys.exit(main())
