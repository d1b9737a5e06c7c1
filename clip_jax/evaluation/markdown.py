"""Tables in Markdown, of words that strangers wrote."""

import html
import re
from collections.abc import Iterable, Sequence


def escaped(text: str) -> str:
  """Text that no Markdown reads anything into; half a surrogate pair is written as its number."""
  text = text.encode("utf-8", "backslashreplace").decode()
  return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(text, quote=False))


def row(cells: Iterable[str]) -> str:
  """One line of a table, of cells that are Markdown."""
  return "| " + " | ".join(cells) + " |"


def heading(heads: Sequence[str]) -> list[str]:
  """The first two lines of a table: words to the left in the first column, figures to the right."""
  return [row(heads), row(["---", *["---:"] * (len(heads) - 1)])]
