"""Do the savings of memory change how a model learns? One small real run for each, on this machine.

  python tools/bench/learning_curves.py [--config experiments/demo.py] [--steps 1300]

Trains the experiment once for each entry of VARIANTS, on the same batches, into
runs/learning_curves (finished runs are not trained again), and writes docs/learning_curves.json,
.md and .svg. The measure is the same run from other first weights, twice: what chance alone does.

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
  weights_stream: int = 0  # of random numbers, of no other use in train_step; 0: the usual one
  nearest: bool = False


_MOMENTS, _TEXT = {"moments_dtype": "bfloat16"}, {"text_weights_dtype": "bfloat16"}
VARIANTS = {
  _BASE: Variant(),
  "float32, other first weights": Variant(weights_stream=1000),
  "float32, still other ones": Variant(weights_stream=1001),
  "moments in bfloat16": Variant(optimizer=_MOMENTS),
  "text weights in bfloat16": Variant(optimizer=_TEXT),
  "moments and text weights": Variant(optimizer=_MOMENTS | _TEXT),
  "both, rounded to nearest": Variant(optimizer=_MOMENTS | _TEXT, nearest=True),
  "remat tuned": Variant(model={"remat": "tuned"}),
  "compute in bfloat16": Variant(model={"compute_dtype": "bfloat16"}),
  "all of these, as on a TPU": Variant(
    {"remat": "tuned", "compute_dtype": "bfloat16"}, _MOMENTS | _TEXT
  ),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
  parser.add_argument("--config", default="experiments/demo.py")
  parser.add_argument("--steps", type=int, default=1300)
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
  runs = {name: run(config, v, options.workdir / _folder(name)) for name, v in VARIANTS.items()}
  found = {
    "experiment": options.config,
    "steps": config.steps,
    "pairs a step": config.data.batch_pairs,
    "machine": summary.machine(),
    "runs": compare(runs, config.optimizer.warmup_steps),
  }
  path = options.docs / "learning_curves.md"
  metrics.write_atomically(path.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
  metrics.write_atomically(path.with_suffix(".svg"), drawing(found["runs"]))
  metrics.write_atomically(path, page(found))


def _folder(name: str) -> str:
  return name.replace(",", "").replace(" ", "_")


def run(config: config_lib.Config, variant: Variant, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains and evaluates one variant: the loss of every step, and the figures at the end."""
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, **variant.model),
    optimizer=dataclasses.replace(config.optimizer, **variant.optimizer),
  )
  with contextlib.ExitStack() as stack:
    if variant.weights_stream:
      stack.enter_context(mock.patch.object(train_step, "_WEIGHTS", variant.weights_stream))
    if variant.nearest:
      stack.enter_context(mock.patch.object(rounding, "_rounded", _nearest))
    train.train(config, workdir, rich.console.Console())
  figures = summary.finish(workdir, None)[0]["figures"]
  losses = [line["train/loss"] for line in metrics.read(workdir) if "train/loss" in line]
  return {"losses": losses, "figures": {k: v for k, v in figures.items() if k.endswith("/top1")}}


def _nearest(x: jax.Array, noise: jax.Array) -> jax.Array:
  del noise
  return x.astype(jnp.bfloat16)


def compare(runs: dict[str, dict[str, Any]], warmup_steps: int) -> dict[str, dict[str, Any]]:
  """For each run: its figures, and how far its smoothed loss is from the first run's at most.

  Steps of the warm-up do not count: the loss falls so fast there that a step's delay is a distance.
  """
  smooth = {name: smoothed(found["losses"]) for name, found in runs.items()}
  out = {}
  for name, found in runs.items():
    losses, distances = found["losses"], np.abs(smooth[name] - smooth[_BASE])[warmup_steps:]
    out[name] = {
      "last loss": losses[-1],
      "mean loss of the last tenth": float(np.mean(losses[-(len(losses) // 10) :])),
      "greatest distance": float(distances.max()),
      "mean distance": float(distances.mean()),
      "figures": found["figures"],
      "smoothed loss": {
        "steps": list(range(_SMOOTH, len(losses) + 1, 10)),
        "values": [round(float(value), 4) for value in smooth[name][::10]],
      },
    }
  return out


def smoothed(losses: Sequence[float]) -> np.ndarray:
  """Means of `_SMOOTH` steps in a row; the first is that of steps 1 to `_SMOOTH`."""
  return np.convolve(losses, np.ones(_SMOOTH) / _SMOOTH, mode="valid")


def page(found: dict[str, Any]) -> str:
  """docs/learning_curves.md."""
  runs, machine = found["runs"], found["machine"]
  tasks = list(runs[_BASE]["figures"])
  names = [task.removeprefix("eval/").removesuffix("/top1") for task in tasks]
  heads = ["run", "last loss", "last tenth", *(f"{n}, top-1" for n in names), "distance", "mean"]
  lines = [
    "# What the savings of memory do to learning",
    "",
    f"`{found['experiment']}` for {found['steps']:,} steps of {found['pairs a step']} pairs, once "
    "for each row, all on the same batches. Written by `python tools/bench/learning_curves.py` on "
    f"{machine['processor']} ({machine['device']}, jax {machine['jax']}).",
    "",
    "Last loss: of the last step. Last tenth: the mean over the last tenth of the steps. Distance: "
    f"the greatest, and the mean, between this run's loss and the float32 run's, each a running "
    f"mean over {_SMOOTH} steps, after the warm-up. The second and third rows are the measure: "
    "nothing changed but the random first weights.",
    "",
    "| " + " | ".join(heads) + " |",
    "| --- " + "| ---: " * (len(heads) - 1) + "|",
  ]
  for name, row in runs.items():
    values = [f"{row['last loss']:.4f}", f"{row['mean loss of the last tenth']:.4f}"]
    values += [f"{row['figures'][task]:.1%}" for task in tasks]
    values += [f"{row['greatest distance']:.4f}", f"{row['mean distance']:.4f}"]
    lines.append("| " + " | ".join([name, *values]) + " |")
  lines += ["", *_reading(runs)]
  lines += ["", "![The smoothed loss of each run over steps](learning_curves.svg)", ""]
  return "\n".join(lines)


def _reading(runs: dict[str, dict[str, Any]]) -> list[str]:
  """Which runs are outside what the float32 ones, of several first weights, span."""
  chance = [row for name, row in runs.items() if name.startswith(_BASE)]
  out = []
  for key in ("mean loss of the last tenth", "mean distance", "greatest distance"):
    low, high = min(row[key] for row in chance), max(row[key] for row in chance)
    outside = [f"{name} ({row[key]:.4f})" for name, row in runs.items() if row[key] > high]
    out.append(f"- {key}, float32: {low:.4f} to {high:.4f}; above: {', '.join(outside) or 'none'}")
  return out


_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 760, 260, 60, 34, 60
_COLOURS = (
  "#000000", "#888888", "#bbbbbb", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7",
  "#7a5195",
)  # fmt: skip


def drawing(runs: dict[str, dict[str, Any]]) -> str:
  """Two panels: the smoothed losses, and their differences from the first run's. SVG."""
  base = np.array(runs[_BASE]["smoothed loss"]["values"])
  steps = np.array(runs[_BASE]["smoothed loss"]["steps"])
  values = {name: np.array(row["smoothed loss"]["values"]) for name, row in runs.items()}
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
