"""The tasks of a run's config -> their results."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from clip_jax import config as config_lib
from clip_jax.data import pipeline, records
from clip_jax.evaluation import (
  chosen,
  classifier,
  datasets,
  encoding,
  opening,
  prompts,
  retrieval,
  zero_shot,
)

Result = zero_shot.ZeroShotResult | zero_shot.SeveralResult | retrieval.RetrievalResult


@dataclasses.dataclass(frozen=True)
class Ready:
  """A task whose data and prompts are there."""

  task: config_lib.Task
  source: records.RecordSource
  prompt_set: prompts.PromptSet | None  # None for a retrieval
  metric: str = "accuracy"  # of a published dataset, its tables': one of `scores.METRICS`
  several: bool = False  # whether an image is of several classes

  @property
  def name(self) -> str:
    return self.task.name or self.task.dataset or self.task.kind


def ready(config: config_lib.Config) -> list[Ready]:
  """All tasks of `config.evaluation`, opened: before any device time is spent.

  Raises: PromptError for unknown prompts or prompts without classes; NotAvailable for a published
    dataset that is not there; what opening the source raises.
  """
  return [_ready(task, config) for task in config.evaluation.tasks]


def _ready(task: config_lib.Task, config: config_lib.Config) -> Ready:
  resolution = config.model.image.resolution
  if task.dataset and task.kind == "retrieval":
    roots = [task.source.path]
    return Ready(task, opening.open_dataset(datasets.named(task.dataset), "test", roots), None)
  if task.dataset:
    asked = chosen.Asked(task.source.path, dataset=task.dataset, prompts=task.prompts)
    found = chosen.choose(asked, resolution)
    return Ready(task, found.source, found.prompt_set, found.metric, found.several)
  source = pipeline.open_source(task.source, resolution, config.seed)
  if task.kind == "retrieval":
    return Ready(task, source, None)
  prompt_set = prompts.named(task.prompts)
  classes = prompt_set.classes or tuple(getattr(source, "classes", ()))
  if not classes:
    raise prompts.PromptError(
      f"task {task.name or task.kind!r}: prompts {task.prompts!r} take their classes from the "
      f"source, and {task.source.path or task.source.kind} names none; choose prompts with classes"
    )
  return Ready(task, source, dataclasses.replace(prompt_set, classes=classes))


def run(
  model: encoding.Model,
  config: config_lib.Config,
  opened: Sequence[Ready],
  stopped: Callable[[str], bool] | None = None,
) -> list[Result]:
  """Evaluates `model` on the first `limit` records of each task, by its dataset's metric.

  Args: stopped, is asked before every batch, with the task's name; by all processes equally often.
  Raises: EvaluationError naming the record or text that cannot be evaluated, or the metric that
    these records do not have (ROC AUC where all are of one class); stopping.Stopped.
  """
  out = []
  for task in opened:
    asking = stopped and encoding.Stoppable(model, functools.partial(stopped, task.name))
    out.append(_run(asking or model, task, config.evaluation.batch))
  return out


def _run(model: encoding.Model, opened: Ready, batch: int) -> Result:
  task, prompt_set = opened.task, opened.prompt_set
  if prompt_set is None:  # of a published dataset with all captions, as its tables have it
    every = bool(task.dataset)
    return retrieval.evaluate(
      model, opened.source, batch, task.limit, all_captions=every, name=opened.name
    )
  classes, class_CE = prompt_set.classes, classifier.classifier(model, prompt_set, None, "", batch)
  if opened.several:
    return zero_shot.evaluate_several(
      model, opened.source, classes, class_CE, opened.metric, batch, task.limit, name=opened.name
    )
  return zero_shot.evaluate(
    model,
    opened.source,
    classes,
    prompt_set.templates,
    batch,
    task.limit,
    name=opened.name,
    held_out=prompt_set.held_out,
    class_CE=class_CE,
    metric=opened.metric,
  )


def figures(results: Sequence[Result]) -> dict[str, float]:
  """All figures under names for `metrics.jsonl`: `eval/<task>/<measure>`."""
  return {f"eval/{r.name}/{name}": value for r in results for name, value in r.metrics().items()}
