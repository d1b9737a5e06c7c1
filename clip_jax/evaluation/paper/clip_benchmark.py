"""Measured cells in the files that CLIP_benchmark's users read: its JSON results and its CSV.

The names and the layout are those of clip_benchmark 1.6.2: one JSON file a model, dataset and task,
with shares between 0 and 1; `clip_benchmark build FILES` makes the same CSV of them. Metrics that
it does not have keep names of their own, so that nobody takes one for another.
"""

import csv
import decimal
import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clip_jax.evaluation.paper import published, published_notes
from clip_jax.evaluation.paper import results as paper_results

_TASKS = {
  "10": "linear_probe",
  "11": "zeroshot_classification",
  "13": "zeroshot_retrieval",
  "16": "zeroshot_classification",
}
_METRICS = {
  "accuracy": "acc1",
  "mean per class": "mean_per_class_recall",
  "11-point mAP": "mean_average_precision_11_point",
  "ROC AUC": "roc_auc",
  "mean(top1, top5)": "mean_acc1_acc5",
  "PM0": "acc1_pm0",
  "PM10": "acc1_pm10",
}
_COLUMNS = ("dataset", "model", "pretrained", "task", "language", "model_fullname")


def results(measured: Iterable[paper_results.Measured]) -> tuple[Mapping[str, Any], ...]:
  """What its JSON files hold: the cells of Tables 10, 11, 13 and 16. The later of two counts."""
  out: dict[tuple[str, ...], dict[str, Any]] = {}
  for m in measured:
    if m.table not in _TASKS:
      continue
    model, probed = published.model_of(m.model)
    task = "linear_probe" if probed else _TASKS[m.table]
    names = {
      "dataset": published_notes.clip_benchmark_names().get(m.dataset, m.dataset),
      "model": re.sub(r"@(\d+)px$", r"-\1", model.replace("/", "-")),
      "pretrained": _pretrained(m.weights),
      "task": task,
    }
    result = out.setdefault(tuple(names.values()), {**names, "metrics": {}, "language": "en"})
    share = decimal.Decimal(str(m.value)) / 100  # decimal, so that 81.1 is 0.811
    result["metrics"][_metric(m.metric, task)] = float(share)
  return tuple(out.values())


def build(found: Sequence[Mapping[str, Any]]) -> str:
  """The CSV: a row a result, and a column a metric before the names."""
  names = sorted({name for result in found for name in result["metrics"]})
  out = io.StringIO()
  writer = csv.DictWriter(out, (*names, *_COLUMNS), lineterminator="\n")
  writer.writeheader()
  for result in found:
    row = {name: result[name] for name in _COLUMNS if name in result}
    fullname = f"{result['model']} {result['pretrained']}"
    writer.writerow({**result["metrics"], **row, "model_fullname": fullname})
  return out.getvalue()


def file_name(result: Mapping[str, Any]) -> str:
  """`DATASET_PRETRAINED_MODEL_en_TASK.json`; names that no file can have get a hash behind them."""
  names = [result[n] for n in ("dataset", "pretrained", "model", "language", "task")]
  wanted = "_".join([names[0].replace("/", "_"), *names[1:]])
  safe = re.sub(r"[^\w.@+-]", "-", wanted)
  if safe != wanted:
    safe += "-" + hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
  return f"{safe}.json"


def _metric(metric: str, task: str) -> str:
  if task == "zeroshot_retrieval":
    return metric.replace(" R@", " recall@").replace(" ", "_")
  name = _METRICS.get(metric, metric)
  return f"lp_{name}" if task == "linear_probe" else name


def _pretrained(weights: str) -> str:
  """What it calls the released weights, or the beginning of the hash of others."""
  released = {row["openai_checkpoint_sha256"] for row in published.rows("architectures.csv")}
  if weights in released:
    return "openai"
  return f"sha256-{weights[:12]}" if weights else "none"
