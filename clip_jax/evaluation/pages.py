"""What the pages for people have in common: HTML that holds all that it shows, and runs nothing."""

import functools
import os
import pathlib
from typing import Any

import jinja2

from clip_jax import metrics
from clip_jax.evaluation import curves, figures


def render(template: str, **values: Any) -> str:
  """A template beside this file -> a page. Every string in `values` is escaped.

  Templates may use `size` (the geometry of curves), and the filters percent, clip and data_uri.
  """
  return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> jinja2.Environment:
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    autoescape=True,  # captions, labels and keys come from strangers
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters.update(percent=percent, clip=clip, data_uri=figures.data_uri)
  environment.globals["size"] = curves
  return environment


def write(path: str | os.PathLike[str], page: str) -> None:
  """The whole page under its name, or nothing. Raises: OSError with the file's name."""
  content = page.encode("utf-8", "replace")  # captions may hold half a surrogate
  metrics.write_atomically(pathlib.Path(path), content)


def percent(share: float) -> str:
  """A share as people read it: one decimal, two under 1 %, and never 100 % of what is less."""
  value = 100 * share
  if 99.95 <= value < 100:
    return ">99.9%"
  if value == 0 or value >= 1:
    return f"{value:.1f}%"
  return f"{value:.2f}%" if value >= 0.01 else "<0.01%"


def clip(text: str, size: int = 160) -> str:
  """Captions of any length, cut to what a page can show."""
  return text if len(text) <= size else text[: size - 1] + "…"
