"""Do the savings of memory change how a model learns? Small real runs of each, on this machine.

  python tools/bench/learning_curves.py [--config experiments/demo.py] [--steps 400]

Trains the experiment for each entry of VARIANTS from each of three sets of first weights, all on
the same batches, and for each entry of SLOW once, at a learning rate so small that an update is
less than half of a bfloat16's last place; into runs/learning_curves (finished runs are not trained
again). Writes docs/learning_curves.json, .md and .svg.

Nearest rounding and other first weights are no options of clip_jax. They are made here, by putting
another function or number in the place of a private one while the run is traced.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from clip_jax import cli, metrics, rounding, summary, train, train_step
from clip_jax import config as config_lib
from clip_jax.evaluation import curves

_SMOOTH = 50  # steps in the running mean of the loss
_BASE = "float32"


@dataclasses.dataclass(frozen=True)
class Variant:
  model: dict[str, Any] = dataclasses.field(default_factory=dict)
  optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)
  nearest: bool = False


_MOMENTS, _TEXT = {"moments_dtype": "bfloat16"}, {"text_weights_dtype": "bfloat16"}
VARIANTS = {
  _BASE: Variant(),
  "moments in bfloat16": Variant(optimizer=_MOMENTS),
  "text weights in bfloat16": Variant(optimizer=_TEXT),
  "moments and text weights": Variant(optimizer=_MOMENTS | _TEXT),
  "residual stream in bfloat16": Variant({"residual_dtype": "bfloat16"}),
  "all of these, products too": Variant(
    {"residual_dtype": "bfloat16", "compute_dtype": "bfloat16"}, _MOMENTS | _TEXT
  ),
}
SLOW = {
  _BASE: Variant(),
  "moments and text weights": Variant(optimizer=_MOMENTS | _TEXT),
  "both, rounded to nearest": Variant(optimizer=_MOMENTS | _TEXT, nearest=True),
}
_FIRST_WEIGHTS = (0, 1000, 1001)  # streams of random numbers; 0 is train_step's own
_SLOWER = 30


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
  parser.add_argument("--config", default="experiments/demo.py")
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/learning_curves"))
  parser.add_argument("--docs", type=pathlib.Path, default=pathlib.Path("docs"))
  options = parser.parse_args()
  config = cli.load_config(options.config, [])
  config = dataclasses.replace(
    config,
    steps=options.steps,
    log_every_steps=1,
    evaluation=dataclasses.replace(config.evaluation, every_steps=0),
    checkpoint=config_lib.Checkpoint(every_steps=options.steps, keep=1),
  )
  slow = dataclasses.replace(
    config.optimizer, learning_rate=config.optimizer.learning_rate / _SLOWER
  )
  runs = {
    name: [
      run(config, v, stream, options.workdir / f"{_folder(name)}_{stream}")
      for stream in _FIRST_WEIGHTS
    ]
    for name, v in VARIANTS.items()
  }
  slow_config = dataclasses.replace(config, optimizer=slow)
  slow_runs = {
    name: run(slow_config, v, 0, options.workdir / f"{_folder(name)}_slow")
    for name, v in SLOW.items()
  }
  found = {
    "experiment": options.config,
    "steps": config.steps,
    "pairs a step": config.data.batch_pairs,
    "learning rates": [config.optimizer.learning_rate, slow.learning_rate],
    "machine": summary.machine(),
    "runs": compare(runs),
    "slow": {name: _slow(slow_runs[_BASE], one) for name, one in slow_runs.items()},
  }
  path = options.docs / "learning_curves.md"
  metrics.write_atomically(path.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
  metrics.write_atomically(path.with_suffix(".svg"), drawing(found["runs"]))
  metrics.write_atomically(path, page(found))


def _folder(name: str) -> str:
  return name.replace(",", "").replace(" ", "_")


def run(
  config: config_lib.Config, variant: Variant, first_weights: int, workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains and evaluates one variant: the loss of every step, and the figures at the end."""
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, **variant.model),
    optimizer=dataclasses.replace(config.optimizer, **variant.optimizer),
  )
  with contextlib.ExitStack() as stack:
    stack.enter_context(mock.patch.object(train_step, "_WEIGHTS", first_weights))
    if variant.nearest:
      stack.enter_context(mock.patch.object(rounding, "_rounded", _nearest))
    train.train(config, workdir, rich.console.Console())
  figures = summary.finish(workdir, None)[0]["figures"]
  losses = [line["train/loss"] for line in metrics.read(workdir) if "train/loss" in line]
  return {"losses": losses, "figures": {k: v for k, v in figures.items() if k.endswith("/top1")}}


def _nearest(x: jax.Array, noise: jax.Array) -> jax.Array:
  del noise
  return x.astype(jnp.bfloat16)


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
  """Of each variant the figures from each set of first weights, and the mean of its curves."""
  out = {}
  for name, all_of_it in runs.items():
    row: dict[str, Any] = {"loss": [_last_tenth(one) for one in all_of_it]}
    for task in all_of_it[0]["figures"]:
      row[task] = [one["figures"][task] for one in all_of_it]
    smooth = np.mean([smoothed(one["losses"]) for one in all_of_it], axis=0)
    out[name] = row | {
      "steps": list(range(_SMOOTH, len(all_of_it[0]["losses"]) + 1, 10)),
      "smoothed loss": [round(float(value), 4) for value in smooth[::10]],
    }
  return out


def _last_tenth(one: dict[str, Any]) -> float:
  return float(np.mean(one["losses"][-(len(one["losses"]) // 10) :]))


def _slow(base: dict[str, Any], one: dict[str, Any]) -> dict[str, float]:
  distance = np.abs(smoothed(one["losses"]) - smoothed(base["losses"]))
  return {"loss": _last_tenth(one), "greatest distance": float(distance.max())}


def smoothed(losses: Sequence[float]) -> np.ndarray:
  """Means of `_SMOOTH` steps in a row; the first is that of steps 1 to `_SMOOTH`."""
  return np.convolve(losses, np.ones(_SMOOTH) / _SMOOTH, mode="valid")


def page(found: dict[str, Any]) -> str:
  """docs/learning_curves.md."""
  runs, machine, (rate, slow_rate) = found["runs"], found["machine"], found["learning rates"]
  keys = [key for key in runs[_BASE] if key not in ("steps", "smoothed loss")]
  names = [key.removeprefix("eval/").removesuffix("/top1") for key in keys[1:]]
  lines = [
    "# What the savings of memory do to learning",
    "",
    f"`{found['experiment']}` for {found['steps']:,} steps of {found['pairs a step']} pairs at a "
    f"learning rate of {rate:g}, from {len(_FIRST_WEIGHTS)} sets of first weights for each row, "
    "all on the same batches. Written by `python tools/bench/learning_curves.py` on "
    f"{machine['processor']} ({machine['device']}, jax {machine['jax']}).",
    "",
    "Loss: the mean over the last tenth of the steps. Behind each figure, how far it is from that "
    "of float32 from the same first weights: mean and standard error of the differences. What "
    "chance alone does stands in the first row: the standard deviation between first weights.",
    "",
    "| run | loss | " + " | ".join(f"{name}, top-1" for name in names) + " |",
    "| --- " + "| ---: " * len(keys) + "|",
  ]
  for name, row in runs.items():
    cells = [_cell(name, key, row[key], runs[_BASE][key]) for key in keys]
    lines.append("| " + " | ".join([name, *cells]) + " |")
  lines += ["", f"- more than two standard errors from float32: {_outside(runs, keys)}", ""]
  lines += ["![The smoothed losses, means over first weights](learning_curves.svg)", ""]
  lines += [
    "## Why the rounding is stochastic",
    "",
    f"The same at a learning rate of {slow_rate:.2g}, where most updates are less than half of a "
    "bfloat16's last place, once each. Distance: the greatest between the running means over "
    f"{_SMOOTH} steps of this run's loss and of float32's.",
    "",
    "| run | loss | distance |",
    "| --- | ---: | ---: |",
  ]
  for name, row in found["slow"].items():
    lines.append(f"| {name} | {row['loss']:.4f} | {row['greatest distance']:.4f} |")
  return "\n".join([*lines, ""])


def _difference(values: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
  """Mean of the differences, and its standard error."""
  differences = np.subtract(values, base)
  return float(differences.mean()), float(differences.std(ddof=1) / len(differences) ** 0.5)


def _cell(name: str, key: str, values: list[float], base: list[float]) -> str:
  loss = key == "loss"
  show = (lambda x: f"{x:.4f}") if loss else (lambda x: f"{x:.1%}")
  if name == _BASE:
    return f"{show(np.mean(values))} (chance {show(np.std(values, ddof=1))})"
  mean, error = _difference(values, base)
  sign = "+" if mean >= 0 else "-"
  return f"{show(np.mean(values))} ({sign}{show(abs(mean))} +- {show(error)})"


def _outside(runs: dict[str, dict[str, Any]], keys: Sequence[str]) -> str:
  found = []
  for name in list(runs)[1:]:
    for key in keys:
      mean, error = _difference(runs[name][key], runs[_BASE][key])
      if abs(mean) > 2 * error:
        found.append(f"{name} ({key})")
  return ", ".join(found) or "none"


_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 760, 260, 60, 34, 60
_COLOURS = (
  "#000000", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7",
)  # fmt: skip


def drawing(runs: dict[str, dict[str, Any]]) -> str:
  """Two panels: the smoothed losses, and their differences from float32's. SVG."""
  base = np.array(runs[_BASE]["smoothed loss"])
  steps = np.array(runs[_BASE]["steps"])
  values = {name: np.array(row["smoothed loss"]) for name, row in runs.items()}
  differences = {name: y - base for name, y in values.items()}
  height = 2 * (_HEIGHT + _GAP) + 20 * len(runs) + _TOP
  body = _panel("Loss, running mean", steps, values, _TOP)
  body += _panel("Loss less that of float32", steps, differences, _TOP + _HEIGHT + _GAP)
  for i, (name, colour) in enumerate(zip(runs, _COLOURS, strict=True)):
    y = 2 * (_HEIGHT + _GAP) + _TOP + 20 * i
    body.append(f'<path d="M{_LEFT} {y}h28" stroke="{colour}" stroke-width="2.5"/>')
    body.append(f'<text x="{_LEFT + 36}" y="{y + 4}">{name}</text>')
  head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" fill="none">'
  style = "<style>text{font:13px sans-serif;fill:#222}.r{text-anchor:end}.m{text-anchor:middle}"
  ground = f'</style><rect width="{_WIDTH}" height="{height}" fill="#fff"/>'
  return "\n".join([head, style + ground, *body, "</svg>"]) + "\n"


def _panel(title: str, steps: np.ndarray, values: dict[str, np.ndarray], top: int) -> list[str]:
  lowest = float(min(y.min() for y in values.values()))
  highest = float(max(y.max() for y in values.values()))
  ticks, right, bottom = curves.ticks(lowest, highest, 5), _WIDTH - 20, top + _HEIGHT
  x = np.interp(steps, [0, steps[-1]], [_LEFT, right])
  out = [f'<text x="{_LEFT}" y="{top - 10}" font-weight="bold">{title}</text>']
  for tick in ticks:
    y = float(np.interp(tick, [ticks[0], ticks[-1]], [bottom, top]))
    out.append(f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
    out.append(f'<text class="r" x="{_LEFT - 6}" y="{y + 4:.1f}">{curves.number(tick)}</text>')
  for tick in curves.ticks(0, int(steps[-1]), 6):
    if tick <= steps[-1]:
      place = float(np.interp(tick, [0, steps[-1]], [_LEFT, right]))
      words = curves.number(tick) + (" steps" if tick == 0 else "")
      out.append(f'<text class="m" x="{place:.1f}" y="{bottom + 18}">{words}</text>')
  for (_, row), colour in zip(values.items(), _COLOURS, strict=True):
    y_row = np.interp(row, [ticks[0], ticks[-1]], [bottom, top])
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y_row, strict=True))
    out.append(f'<polyline points="{points}" stroke="{colour}" stroke-width="1.5"/>')
  return out


if __name__ == "__main__":
  main()
