"""Published class names and prompt templates -> one JSON a dataset, as clip_jax/assets/prompts has.

python tools/import_prompts.py prompts.md DEST --version "commit e184f608"     # OpenAI's page
python tools/import_prompts.py clip_benchmark-1.6.2-py2.py3-none-any.whl DEST imagenet

The page is data/prompts.md of https://github.com/openai/CLIP: 26 of the paper's 27 datasets.
ImageNet's names and templates are in a notebook there; the wheel (pip download --no-deps
clip_benchmark==1.6.2) carries them unchanged, with six of the other sets. Nothing that is read is
executed, and nothing is written unless every count is that of clip_jax/assets/paper/prompts.csv.
"""

import argparse
import ast
import csv
import json
import pathlib
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

if __package__ in (None, ""):
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from clip_jax import metrics

COUNTS = pathlib.Path(__file__).parents[1] / "clip_jax" / "assets" / "paper" / "prompts.csv"

# The page's headings where the paper's tables call the dataset otherwise; others in lower case.
_NAMES = {
  "CLEVRCounts": "clevr",
  "DescribableTextures": "dtd",
  "FGVCAircraft": "fgvc_aircraft",
  "FacialEmotionRecognition2013": "fer2013",
  "OxfordPets": "oxford_pets",
  "PascalVOC2007": "voc2007",
  "PatchCamelyon": "pcam",
  "SST2": "rendered_sst2",
  "StanfordCars": "stanford_cars",
}

# Where the published names do not stand in the order of the copies that people have of the dataset.
_BY_NAME = "match the labels of a copy by name, never by their numbers"
_ORDER = {
  "caltech101": "background and the two faces first; TFDS sorts all by name in lower case",
  "clevr": "sorted as text, 10 first; TFDS and CLIP_benchmark count from 3 up",
  "eurosat": "of its own; TFDS and CLIP_benchmark sort the classes by folder name",
  "fer2013": "the competition's numbers 0 to 6; CLIP_benchmark sorts by name, neutral before sad",
  "oxford_pets": "cats before dogs; TFDS and CLIP_benchmark sort without regard to case",
  "sun397": "jail cell before jail indoor; TFDS has these two the other way round",
  "ucf101": "Hammer Throw before Hammering, Jump Rope before Jumping Jack; TFDS has both pairs the "
  "other way round",
  "voc2007": "diningtable and pottedplant after sofa; TFDS has all in the alphabet's order",
}

_PAGE = ("https://github.com/openai/CLIP", "data/prompts.md", "MIT, Copyright (c) 2021 OpenAI")
_WHEEL = ("https://pypi.org/project/clip-benchmark", "MIT, Copyright (c) 2022, Mehdi Cherti")
_WHEEL_FOLDER = "clip_benchmark/datasets/"
_WHEEL_FILES = ("en_classnames.json", "en_zeroshot_classification_templates.json")


class PromptsImportError(ValueError):
  """A page or wheel that is not as published: which dataset, what was expected, what was found."""


class Published(NamedTuple):
  """A dataset's classes, each with all its names, and its templates."""

  classes: list[list[str]]
  templates: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line. Returns the exit code: 0, or 2 for a mistake."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("source", type=pathlib.Path, metavar="FILE_OR_WHEEL")
  parser.add_argument("dest", type=pathlib.Path, metavar="DEST", help="a folder; made if missing")
  parser.add_argument("names", nargs="*", metavar="NAME", help="only these, as voc2007 (all)")
  parser.add_argument("--version", default="", help="of the page, for the record")
  options = parser.parse_args(arguments)
  try:
    pages = read(options.source, options.names, options.version)
    options.dest.mkdir(parents=True, exist_ok=True)
    for name, page in pages.items():
      metrics.write_atomically(options.dest / f"{name}.json", as_text(page))
  except (PromptsImportError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(f"{options.dest}: {len(pages)} sets, all counts as published: {', '.join(pages)}")
  return 0


def read(source: pathlib.Path, names: Sequence[str] = (), version: str = "") -> dict[str, Any]:
  """Name -> the page of its JSON, for the datasets `names` (none: all that `source` carries).

  Raises: PromptsImportError naming the dataset, and the expected and the found count.
  """
  rows = counts()
  if source.suffix == ".whl":
    found = {n: p for n, p in of_wheel(source).items() if unchanged(rows[n])}
    project, licence = _WHEEL
    where = {
      "project": project,
      "version": version or source.name.split("-")[1],
      "file": ", ".join(_WHEEL_FOLDER + file for file in _WHEEL_FILES),
      "licence": licence,
    }
    expected = [name for name, row in rows.items() if unchanged(row)]
  else:
    try:
      found = of_page(source.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
      raise PromptsImportError(f"{source}: no text in UTF-8, so not the prompts page") from None
    project, file, licence = _PAGE
    where = {"project": project, "version": version, "file": file, "licence": licence}
    expected = [name for name in rows if name != "imagenet"]
  lacking = [name for name in names or expected if name not in found]
  if lacking:
    raise PromptsImportError(f"{source}: lacks {', '.join(lacking)}; it has {', '.join(found)}")
  chosen = {name: found[name] for name in names or found}
  for name, published in chosen.items():
    check(name, published, rows)
  return {
    name: {
      "name": rows[name]["dataset"],
      "source": where,
      "order": f"{_ORDER[name]}: {_BY_NAME}" if name in _ORDER else "as published",
      "classes": published.classes,
      "templates": published.templates,
    }
    for name, published in chosen.items()
  }


def counts() -> dict[str, dict[str, str]]:
  """The rows of prompts.csv by this project's names of the datasets."""
  with COUNTS.open(encoding="utf-8", newline="") as file:
    return {name_of(row["dataset"]): row for row in csv.DictReader(file)}


def name_of(heading: str) -> str:
  """A dataset's name here: "PascalVOC2007" -> "voc2007"."""
  return _NAMES.get(heading, heading.lower())


def unchanged(row: Mapping[str, str]) -> bool:
  """Whether the wheel's classes and templates are OpenAI's, in their order."""
  return row["cb_classes_vs_openai"] == row["cb_templates_vs_openai"] == "equal"


def check(name: str, published: Published, rows: Mapping[str, Mapping[str, str]]) -> None:
  """Raises: PromptsImportError where a count is not that of prompts.csv."""
  if name not in rows:
    raise PromptsImportError(f"{name}: none of the paper's datasets ({', '.join(rows)})")
  strings = sum(map(len, published.classes))
  for what, found in {
    "classes": len(published.classes),
    "templates": len(published.templates),
    "class_strings": strings,
    "prompts": strings * len(published.templates),
  }.items():
    expected = int(rows[name][f"openai_{what}"])
    if found != expected:
      raise PromptsImportError(
        f"{name}: expected {expected:,} {what.replace('_', ' ')}, found {found:,}; is the file "
        "whole, and as it was published?"
      )


def of_page(text: str) -> dict[str, Published]:
  """Every `## heading` of a markdown page with its lists `classes` and `templates`.

  Raises: PromptsImportError naming the dataset whose lists are missing, double or no lists.
  """
  out = {}
  for section in re.split(r"^## +", text, flags=re.MULTILINE)[1:]:
    heading, _, body = section.partition("\n")
    name, blocks = name_of(heading.strip()), re.findall(r"^```.*?\n(.*?)^```", body, re.M | re.S)
    if name in out:
      raise PromptsImportError(f"{name}: stands twice on the page")
    lists = _assignments(name, "\n".join(blocks))
    templates = lists["templates"]
    if not all(isinstance(template, str) for template in templates):
      raise PromptsImportError(f"{name}: templates that are not strings")
    out[name] = Published([_names(name, entry) for entry in lists["classes"]], list(templates))
  return out


def _assignments(name: str, code: str) -> dict[str, Sequence[Any]]:
  """`classes` and `templates` as literals; code of any other kind is refused, never run."""
  try:
    statements = ast.parse(code).body
  except (SyntaxError, ValueError) as error:
    raise PromptsImportError(f"{name}: its block is no Python ({error})") from error
  found: dict[str, Sequence[Any]] = {}
  for statement in statements:
    target = statement.targets[0] if isinstance(statement, ast.Assign) else None
    known = isinstance(target, ast.Name) and target.id in ("classes", "templates")
    if not (isinstance(statement, ast.Assign) and isinstance(target, ast.Name) and known):
      raise PromptsImportError(
        f"{name}: {ast.unparse(statement)[:60]!r} on line {statement.lineno} of its block; want "
        "`classes = [...]` and `templates = [...]` alone"
      )
    try:
      value = ast.literal_eval(statement.value)
    except ValueError as error:
      raise PromptsImportError(f"{name}: {target.id} holds more than literals") from error
    if target.id in found or not isinstance(value, (list, tuple)):
      raise PromptsImportError(f"{name}: want {target.id} once, as a list")
    found[target.id] = value
  for wanted in ("classes", "templates"):
    if not found.get(wanted):
      raise PromptsImportError(f"{name}: has no {wanted}")
  return found


def _names(name: str, entry: Any) -> list[str]:
  """One class: a string, or a list or tuple of the names that it goes by."""
  names = [entry] if isinstance(entry, str) else entry
  listed = isinstance(names, (list, tuple)) and names
  if not listed or not all(isinstance(one, str) for one in names):
    raise PromptsImportError(f"{name}: class {entry!r} is neither a string nor a list of strings")
  return list(names)


def of_wheel(wheel: pathlib.Path) -> dict[str, Published]:
  """The sets of a clip_benchmark wheel that has both lists, by this project's names.

  Raises: PromptsImportError when it is no such wheel.
  """
  try:
    with zipfile.ZipFile(wheel) as archive:
      classes, templates = (json.loads(archive.read(_WHEEL_FOLDER + f)) for f in _WHEEL_FILES)
  except (zipfile.BadZipFile, KeyError, ValueError) as error:
    raise PromptsImportError(f"{wheel}: no whole wheel of clip_benchmark ({error})") from error
  keys = {name: row["clip_benchmark_key"] for name, row in counts().items()}
  return {
    name: Published(
      [_names(name, entry) for entry in classes[key]],
      [template.replace("{c}", "{}") for template in templates[key]],
    )
    for name, key in keys.items()
    if key in classes and key in templates
  }


def as_text(page: Mapping[str, Any]) -> str:
  """JSON with one class or template a line, so that a change shows as a line."""
  head = {key: page[key] for key in ("name", "source", "order")}
  lines = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
  return f"{lines},\n{_list('classes', page)},\n{_list('templates', page)}\n}}\n"


def _list(key: str, page: Mapping[str, Any]) -> str:
  entries: Iterable[str] = (json.dumps(entry, ensure_ascii=False) for entry in page[key])
  return f' "{key}": [\n  ' + ",\n  ".join(entries) + "\n ]"


if __name__ == "__main__":
  sys.exit(main())
