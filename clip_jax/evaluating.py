"""The evaluations of a training, on the way and at its end. A request to stop ends them early.

Each is between two batches when it looks (rule R10). What it found by then is dropped: the next
start makes the whole evaluation, as it does where one failed.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import rich.console

from clip_jax import common_stop, hosts, inference, metrics, stopping, summary, train_step
from clip_jax import config as config_lib
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.evaluation import tasks


def due(config: config_lib.Config, done: int) -> bool:
  """Whether to evaluate after `done` steps; after the last of all `last` does."""
  every = config.evaluation.every_steps
  return 0 < done < config.steps and every > 0 and done % every == 0


def made(workdir: pathlib.Path, step: int) -> bool:
  """Whether the figures of that step are written, as the first process sees it."""
  lines = metrics.read(workdir)
  found = any(line["step"] == step and any("eval/" in k for k in line) for line in lines)
  return bool(hosts.from_first(b"yes" if found else b""))


def on_the_way(
  config: config_lib.Config,
  state: train_step.TrainState,
  tokenizer: tokenizer_lib.Tokenizer,
  evaluated: Sequence[tasks.Ready],
  log: metrics.Log,
  stop: common_stop.CommonStop,
  begin: Callable[[str], None],
) -> bool:
  """Evaluates the weights of a step on all tasks, and logs the figures.

  Returns: whether it came to its end; False: a host was asked to stop, and nothing is logged.
  """
  step = int(state.step)

  def stopped(task: str) -> bool:
    begin(f"a batch of the evaluation of {task} after step {step}")
    return stop.asked()

  with log.time("evaluation"):
    model = inference.Clip(config, state.params, tokenizer, batch_stats=state.batch_stats)
    try:
      results = tasks.run(model, config, evaluated, stopped)
    except stopping.Stopped:
      return False
  log.write(step, tasks.figures(results))
  return True


def last(
  workdir: pathlib.Path,
  page: pathlib.Path,
  console: rich.console.Console,
  request: stopping.Request,
  begin: Callable[[str], None],
) -> tuple[dict[str, Any], list[tasks.Result]] | None:
  """`summary.finish` of a run that has trained to its end, as a part of its account of time.

  Returns: as that; None where a host was asked to stop: then nothing is written.
  """
  stop = common_stop.CommonStop(request)

  def stopped(task: str) -> bool:
    begin(f"a batch of the last evaluation, of {task}")
    return stop.asked()

  begin("the last evaluation")
  with metrics.timed_after(workdir, "evaluation", console):
    try:
      if not stop.asked():
        return summary.finish(workdir, page, stopped)
    except stopping.Stopped:
      pass
  console.print("stopped in the last evaluation; the same command makes it again")
  return None
