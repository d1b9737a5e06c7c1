"""The tasks of a run's config -> their results."""

import dataclasses
from collections.abc import Sequence

from clip_jax import config as config_lib
from clip_jax.data import records
from clip_jax.evaluation import classifier, encoding, prompts, retrieval, zero_shot

Result = zero_shot.ZeroShotResult | retrieval.RetrievalResult


def run_task(
  model: encoding.Model, task: config_lib.Task, source: records.RecordSource, batch: int
) -> Result:
  """Evaluates `model` on the first `task.limit` records of `source`, `batch` at a time.

  Raises: PromptError for unknown prompts or prompts without classes; EvaluationError naming the
    record or text that cannot be evaluated.
  """
  name = task.name or task.kind
  if task.kind == "retrieval":
    return retrieval.evaluate(model, source, batch, task.limit, name=name)
  prompt_set = prompts.named(task.prompts)
  classes = prompt_set.classes or tuple(getattr(source, "classes", ()))
  if not classes:
    raise prompts.PromptError(
      f"task {name!r}: prompts {task.prompts!r} take their classes from the source, and "
      f"{task.source.path or task.source.kind} names none; choose prompts with classes"
    )
  prompt_set = dataclasses.replace(prompt_set, classes=classes)
  return zero_shot.evaluate(
    model,
    source,
    classes,
    prompt_set.templates,
    batch,
    task.limit,
    name=name,
    held_out=prompt_set.held_out,
    class_CE=classifier.classifier(model, prompt_set, None, "", batch),
  )


def run(
  model: encoding.Model, config: config_lib.Config, sources: Sequence[records.RecordSource]
) -> list[Result]:
  """All tasks of `config.evaluation`, in order; `sources` holds one source a task."""
  pairs = zip(config.evaluation.tasks, sources, strict=True)
  return [run_task(model, task, source, config.evaluation.batch) for task, source in pairs]


def figures(results: Sequence[Result]) -> dict[str, float]:
  """All figures under names for `metrics.jsonl`: `eval/<task>/<measure>`."""
  return {f"eval/{r.name}/{name}": value for r in results for name, value in r.metrics().items()}
