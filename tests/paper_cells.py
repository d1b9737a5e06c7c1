"""Measured cells for tests: a published one as if it had been measured, or any other."""

from clip_jax.evaluation.paper import published
from clip_jax.evaluation.paper import results as paper_results

WEIGHTS, DATA, PROMPTS = "a" * 64, "b" * 64, "c" * 64


def number(text):
  """As a measurement gives it: a float where the text is a number."""
  try:
    return float(text)
  except ValueError:
    return text


def measured(table="11", model="RN50", dataset="Food101", metric="accuracy", value=81.1, **others):
  n = published_n(dataset) if others.get("n") is None else others["n"]
  made = {"weights": WEIGHTS, "data": DATA, "prompts": PROMPTS, "code": "v1", "seconds": 1.5}
  made |= {**others, "n": n}
  return paper_results.Measured(table, model, dataset, metric, value, **made)


def published_n(dataset):
  sizes = {row["key"]: int(row["test_size"]) for row in published.rows("datasets.csv")}
  return sizes.get(dataset, 0)


def as_if_measured(tables):
  """Every published cell of these tables, measured as it is printed."""
  return [
    measured(c.table, c.model, c.dataset, c.metric, number(c.value))
    for key in tables
    for c in published.cells(key)
  ]
