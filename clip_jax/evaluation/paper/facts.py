"""Tables for which no model is run: what copies hold, what experiments set, what a study found.

Source: Table 9; Tables 18, 19 and 20; Figure 2.
"""

import dataclasses
import hashlib
import pathlib
import runpy
from collections.abc import Callable, Collection, Mapping, Sequence

from clip_jax import config as config_lib
from clip_jax import parsing
from clip_jax.evaluation import datasets
from clip_jax.evaluation.paper import efficiency, published
from clip_jax.evaluation.paper.results import Measured
from clip_jax.evaluation.paper.units import Opener
from clip_jax.models import presets

NOT_ASKED = "not asked for: --datasets names others"
EXPERIMENTS = pathlib.Path(__file__).resolve().parents[3] / "experiments"
_PAIRS = 400_000_000  # of WIT
_CHOICES = (
  "Table 18: what section 2.5 says of the paper's own machines and is otherwise here (moments and "
  "text weights in half precision), and what the paper leaves open, stands with reasons in "
  "experiments/README.md"
)


@dataclasses.dataclass(frozen=True)
class Filled:
  """What a table has beside its published cells. `rows`: models to show, measured or not."""

  measured: Sequence[Measured]
  missing: Mapping[str, str]  # of a model or a data set: how to get it
  rows: Sequence[str] = ()
  notes: Sequence[str] = ()
  failures: Sequence[str] = ()  # of what is there and cannot be used


def _fact(cell: published.Cell, value: float | str, n: int, data: str, code: str) -> Measured:
  names = (cell.table, cell.model, cell.dataset, cell.metric)
  return Measured(*names, value=value, n=n, weights="", data=data, prompts="", code=code, seconds=0)


def sizes(copy_of: Opener, wanted: Collection[str], code: str) -> Filled:
  """Table 9 of the copies on this machine: of STL10 and UCF101 the first fold, if it can be told.

  Args: wanted, keys of data sets, to open no others (none: all).
  """
  measured, missing, failures = [], {}, []
  cells = {(cell.dataset, cell.metric): cell for cell in published.cells("9")}
  for key in published.metrics():
    if wanted and key not in wanted:
      missing[key] = NOT_ASKED
      continue
    dataset, found = datasets.named(key), dict[str, datasets.Copy]()
    for split in ("train", "test"):
      try:
        found[split] = _copy(copy_of, dataset, split)
      except datasets.DatasetError as error:
        missing.setdefault(key, str(error))
        if not isinstance(error, datasets.NotAvailable):
          failures.append(f"Table 9: {error}")
    values: dict[str, tuple[float | str, datasets.Copy]] = {}
    for split, copy in found.items():
      values[f"{split} size"] = (len(copy), copy)
      values["classes"] = (len(copy.classes), copy)
      printed = cells[key, "metric"].value  # typed in two ways: mean per class, mean-per-class
      same = printed.replace("-per-", " per ") == dataset.metric
      values["metric"] = (printed if same else dataset.metric, copy)
    for metric, (value, copy) in values.items():
      measured.append(_fact(cells[key, metric], value, len(copy), copy.fingerprint, code))
  return Filled(measured, missing, failures=failures)


def _copy(copy_of: Opener, dataset: datasets.Dataset, split: str) -> datasets.Copy:
  """Raises: NotAvailable, DatasetError."""
  if dataset.folds > 1:
    try:
      return copy_of(dataset, split, 1)
    except datasets.NotAvailable:
      pass
  return copy_of(dataset, split, 0)


_Value = Callable[[config_lib.Config], float | str]
_COMMON: Mapping[str, _Value] = {
  "batch size": lambda c: c.data.batch_pairs,
  "vocabulary size": lambda c: c.model.text.vocab_size,
  "training epochs": lambda c: c.steps * c.data.batch_pairs / _PAIRS,
  "maximum temperature": lambda c: c.optimizer.max_logit_scale,
  "weight decay": lambda c: c.optimizer.weight_decay,
  "warmup iterations": lambda c: c.optimizer.warmup_steps,
  "adam beta1": lambda c: c.optimizer.beta1,
  "adam beta2": lambda c: c.optimizer.beta2,
  "adam epsilon": lambda c: c.optimizer.epsilon,
}
_OWN: Mapping[str, _Value] = {
  "learning rate": lambda c: c.optimizer.learning_rate,
  "embedding dimension": lambda c: c.model.embed_dim,
  "input resolution": lambda c: c.model.image.resolution,
  "ResNet blocks": lambda c: "-".join(map(str, c.model.image.blocks)),
  "ResNet width": lambda c: c.model.image.width,
  "vision layers": lambda c: c.model.image.layers,
  "vision width": lambda c: c.model.image.width,
  "vision heads": lambda c: c.model.image.heads,
  "text layers": lambda c: c.model.text.layers,
  "text width": lambda c: c.model.text.width,
  "text heads": lambda c: c.model.text.heads,
}


def settings(key: str, code: str, folder: pathlib.Path = EXPERIMENTS) -> Filled:
  """Table 18, 19 or 20 of the experiment files of the nine models, which are executed.

  Epochs are those of the models that start from random weights: ViT-L/14@336px goes on for one.
  Raises: ConfigError naming a key that is wrong.
  """
  paths = {model: folder / f"clip_{_file(model)}.py" for model in presets.PUBLISHED}
  found = {model: path for model, path in paths.items() if path.is_file()}
  configs = {m: parsing.parse(runpy.run_path(str(p))["get_config"]()) for m, p in found.items()}
  digests = {m: hashlib.sha256(p.read_bytes()).hexdigest() for m, p in found.items()}
  measured = []
  for cell in published.cells(key):
    own = {m: c for m, c in configs.items() if _is_of(m, c, cell)}
    values = {m: (_COMMON if key == "18" else _OWN)[cell.metric](c) for m, c in own.items()}
    if values:
      value, *others = dict.fromkeys(values.values())
      if others:
        value = "; ".join(f"{model} {own}" for model, own in values.items())
      data = [digests[m] for m in own]
      data = data if len(data) == 1 else [hashlib.sha256("".join(data).encode()).hexdigest()]
      measured.append(_fact(cell, value, 0, data[0], code))
  why = f"{folder}/clip_*.py are not all there: they are in a checkout, not in an installed package"
  missing = {cell.model: why for cell in published.cells(key)}
  return Filled(measured, missing, notes=(_CHOICES,) if key == "18" else ())


def _file(model: str) -> str:
  return model.lower().replace("-", "_").replace("/", "").replace("@336px", "_336")


def _is_of(model: str, config: config_lib.Config, cell: published.Cell) -> bool:
  """Whether a cell of Table 18, 19 or 20 speaks of that model."""
  if cell.table != "18":
    return model == cell.model
  family = "ResNet" if config.model.image.blocks else "ViT"
  return cell.model in ("", family) and not (cell.metric == "training epochs" and config.init)


def ratios(study: efficiency.Study | None, code: str) -> Filled:
  """Figure 2 of a study on this project's own small scale."""
  cells = published.cells("figure2")
  if study is None:
    how = "python tools/predictive_study.py --output OUTPUT; then give --predictive OUTPUT.json"
    return Filled((), {cell.model: how for cell in cells})
  measured, missing, words = [], {}, []
  for cell in cells:
    ratio = study.ratios[cell.model]
    if ratio.of_means is None:
      missing[cell.model] = "not all runs of the study reach one accuracy"
      continue
    measured.append(_fact(cell, ratio.of_means, 0, study.fingerprint, code))
    if ratio.spread and len(ratio.of_seeds) > 1:
      words.append(f"{cell.model} {ratio.spread[0]:.2f} to {ratio.spread[1]:.2f}")
  note = f"Figure 2: where all runs reach {study.about}"
  note += f"; of single seeds: {'; '.join(words)}" if words else ""
  return Filled(measured, missing, notes=(note,))
