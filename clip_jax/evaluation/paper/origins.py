"""Which figures of the paper are those of its large tables under other names.

The cells of Tables 1, 12, 14 and 15 and of Figures 5 and 13 are made of cells of Tables 10, 11 and
16: a way tells how, and what the model and the data set are called there.
"""

import dataclasses
import types
from collections.abc import Mapping

from clip_jax.evaluation.paper import published

LARGE = "ViT-L/14@336px"  # the paper's CLIP, where it names no model
PROBED = "ResNet-50"  # whose linear probe is subtracted in Figure 5


@dataclasses.dataclass(frozen=True)
class Way:
  """From a measured table: `{}` in `label` stands for the model's name there."""

  table: str
  label: str = "{}"
  metric: str = ""  # what the figure is called; "": as in the measured table

  def name(self, key: str, model: str) -> str:
    """What the table of `key` calls a model of the measured table."""
    return self.label.replace("{}", _CLIP.get(key, model) if model == LARGE else model)


_BOTH = (Way("10", "{} linear"), Way("11", "{} zero-shot"))
WAYS: Mapping[str, tuple[Way, ...]] = types.MappingProxyType(
  {
    "1": (Way("11"),),
    "12": (Way("10", metric="linear probe"), Way("11", metric="zero-shot")),
    "14": _BOTH,
    "15": _BOTH,
    "figure5": (Way("11", "{} minus linear probe", "difference"),),
    "figure13": (Way("16"),),
  }
)
_CLIP = {"1": "CLIP", "14": "CLIP", "15": "CLIP", "figure5": "zero-shot"}
_DATASETS = {"SUN": "SUN397", "Hateful Memes": "HatefulMemes", "SST-2": "Rendered SST2"}


def dataset(name: str) -> str:
  """What the large tables call a data set."""
  return _DATASETS.get(name, name)


def columns(key: str) -> Mapping[str, str]:
  """The data sets of a table: what the large tables call them -> what it does."""
  return {dataset(cell.dataset): cell.dataset for cell in published.places(key)}


def origin(cell: published.Cell) -> published.Cell | None:
  """The cell of a large table that this one is made of; None for one that is not.

  Its value is empty: the paper does not always print the same in both.
  """
  for way in WAYS.get(cell.table, ()):
    before, _, after = way.label.partition("{}")
    named = cell.model.startswith(before) and cell.model.endswith(after)
    if named and way.metric in ("", cell.metric):
      model = cell.model[len(before) : len(cell.model) - len(after)]
      model = LARGE if model == _CLIP.get(cell.table) else model
      metric = "" if way.metric else cell.metric
      return published.Cell(way.table, model, dataset(cell.dataset), metric, "")
  return None
