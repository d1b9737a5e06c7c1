"""What the verbs of `clip-jax` have in common: a mistake of the user, and how results are shown."""

import argparse
import json
from typing import Any

import rich.console
import rich.table


class UsageError(ValueError):
  """A command line that cannot be carried out."""


def show(options: argparse.Namespace, table: rich.table.Table, value: Any) -> None:
  """A table for people, or JSON for programs, on standard output."""
  if options.json:
    print(json.dumps(value))
  else:
    rich.console.Console().print(table)
