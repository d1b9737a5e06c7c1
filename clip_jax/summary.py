"""What a run says of itself: the plan before the first step, the figures and page at the end."""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import rich.table
from jax.sharding import Mesh

from clip_jax import config as config_lib
from clip_jax import inference, metrics, sharding, train_step
from clip_jax.data import records
from clip_jax.evaluation import embedding_map, report, tasks, zero_shot
from clip_jax.models import clip


def plan(
  config: config_lib.Config,
  mesh: Mesh,
  sources: Sequence[records.RecordSource],
  done: int,
) -> rich.table.Table:
  """What is about to happen: pairs, epochs, steps, parameters, devices, bytes."""
  batch, counts = config.data.batch_pairs, clip.parameter_counts(config.model)
  state = train_step.abstract_state(config, mesh)
  device_rows = batch // (mesh.shape["data"] * mesh.shape["fsdp"])
  image, text = config.model.image, config.model.text
  locked = config.optimizer.lock_image
  flops = clip.training_flops_per_pair(config.model, locked) * batch * config.steps
  rows = {
    "model": f"{counts['total']:,} parameters (image {counts['image']:,}, text {counts['text']:,})",
    "products in": np.dtype(clip.compute_dtype(config.model)).name,
    "input": f"{image.resolution} x {image.resolution} pixels, {text.context_length} tokens",
    "steps": f"{config.steps:,} of {batch:,} pairs" + (f", {done:,} of them done" if done else ""),
    "pairs": f"{config.steps * batch:,}",
    **_source_rows(config, sources),
    "compute": f"{flops:.3g} FLOP",
    "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {jax.process_count()} host(s)",
    "memory": f"{_bytes(state):,} bytes of state a device, "
    f"{device_rows * (image.resolution**2 * 3 + 4 * text.context_length):,} of input",
  }
  table = rich.table.Table(title=f"{config.name or 'training'}: the plan", show_header=False)
  for name, value in rows.items():
    table.add_row(name, value)
  return table


def _source_rows(
  config: config_lib.Config, sources: Sequence[records.RecordSource]
) -> dict[str, str]:
  weight = sum(source.weight for source in config.data.sources)
  rows = {}
  for i, (source, settings) in enumerate(zip(sources, config.data.sources, strict=True)):
    share = settings.weight / weight
    epochs = config.steps * config.data.batch_pairs * share / len(source)
    name = settings.path or settings.kind
    rows[f"source {i}"] = (
      f"{name} {settings.split}: {len(source):,} records, {share:.0%} of the pairs, "
      f"{epochs:.1f} epochs"
    )
  return rows


def _bytes(tree: Any) -> int:
  """Of one device's parts of the arrays."""
  parts = ((x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree))
  return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)


def machine() -> dict[str, str]:
  """Where the figures come from."""
  processor = platform.processor() or platform.machine()
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  if cpuinfo.exists():
    names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    processor = names[0].split(":", 1)[1].strip() if names else processor
  device = jax.devices()[0]
  return {
    "device": f"{jax.device_count()} x {device.device_kind}",
    "processor": f"{processor}, {os.cpu_count()} cores",
    "python": platform.python_version(),
    "jax": jax.__version__,
    "clip_jax": importlib.metadata.version("clip-jax-tpu"),
  }


def finish(
  workdir: pathlib.Path,
  page: pathlib.Path | None,
  stopped: Callable[[str], bool] | None = None,
) -> tuple[dict[str, Any], list[tasks.Result]]:
  """Evaluates the newest checkpoint of a workdir on the tasks of its config.

  All devices of all processes share the work. Writes `results.json` into the workdir, and the
  report to `page` where one is asked for. Of several processes all must call; the first writes.
  Args: stopped, as of `tasks.run`; what that raises leaves both files as they were.
  Returns: what `results.json` holds, and the results themselves.
  """
  model = inference.load(workdir, sharding.make_mesh())
  config = model.config
  results = tasks.run(model, config, tasks.ready(config), stopped)
  lines = metrics.read(workdir)
  facts: dict[str, Any] = {
    "name": config.name,
    "step": model.step,
    "pairs": model.step * config.data.batch_pairs,
    "parameters": clip.parameter_counts(config.model)["total"],
    "train_seconds": max((line.get("seconds/total", 0.0) for line in lines), default=0.0),
    "pairs_per_second": _median(lines, "train/pairs_per_second"),
    "data_wait": _median(lines, "train/data_wait"),
    "machine": machine(),
    "figures": tasks.figures(results),
  }
  if jax.process_index() > 0:
    return facts, results
  metrics.write_atomically(workdir / "results.json", json.dumps(facts, indent=1) + "\n")
  if page is not None:
    lines = [line for line in lines if line["step"] != model.step or "train/loss" in line]
    curves = [*lines, {"step": model.step, **facts["figures"]}]
    report.write(page, _page_head(config, facts, results), curves, results, _map(results))
  return facts, results


def _median(lines: Sequence[dict[str, Any]], name: str) -> float | None:
  values = [line[name] for line in lines if line.get(name) is not None]
  return float(np.median(values)) if values else None


def _page_head(
  config: config_lib.Config, facts: dict[str, Any], results: Sequence[tasks.Result]
) -> report.RunSummary:
  plan_rows = {
    "steps": f"{facts['step']:,} of {config.data.batch_pairs:,} pairs each",
    "pairs": f"{facts['pairs']:,}",
    "parameters": f"{facts['parameters']:,}",
    "training time": f"{facts['train_seconds'] / 60:.1f} minutes",
    **facts["machine"],
  }
  held_out = [r.name for r in results if isinstance(r, zero_shot.ZeroShotResult) and r.held_out]
  notes = tuple(
    f"{name}: a supervised classifier over the training compositions scores 0 on the held-out "
    "ones by construction, because it has no output for them; here they compete with all others."
    for name in held_out
  )
  speed = facts["pairs_per_second"]
  headline = {} if speed is None else {"pairs a second": f"{speed:,.0f}"}
  return report.RunSummary(config.name or "clip_jax run", plan_rows, headline, notes)


def _map(results: Sequence[tasks.Result]) -> embedding_map.EmbeddingMap | None:
  """The map of the first zero-shot task that shows several classes."""
  for result in results:
    if isinstance(result, zero_shot.ZeroShotResult):
      return embedding_map.project(result)
  return None
