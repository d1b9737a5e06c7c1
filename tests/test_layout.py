"""The house by its imports: a room uses only rooms below it, some libraries only one room."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# From the bottom up; a module imports only modules of lower layers.
LAYERS = (
  (
    "config",
    "chips",
    "hlo",
    "hosts",
    "rounding",
    "cli_options_studies",
    "cli_output",
    "json_lines",
    "evaluation.markdown",
    "evaluation.noise_and_blur",
    "evaluation.shifts",
    "data.bytepairs",
    "data.cleaning",
    "data.images",
    "evaluation.published",
    "data.labels",
    "data.tar",
    "interop.layouts",
    "interop.onnx_edits",
    "interop.writers",
  ),
  (
    "cli_options",
    "collectives",
    "sharding",
    "evaluation.weather_and_digital",
    "evaluation.shift_accuracy",
  ),
  (
    "models.transformer",
    "models.presets",
    "models.resize",
    "optimizer",
    "parsing",
    "program",
    "data.tokenizer",
    "data.records",
    "evaluation.published_notes",
    "evaluation.paper_results",
    "interop.naming",
    "interop.unpickle",
  ),
  (
    "models.vit",
    "models.resnet",
    "models.text",
    "ring",
    "data.scenes",
    "data.tar_source",
    "data.folder_source",
    "data.tfds_source",
    "evaluation.datasets",
    "checkpoint",
    "metrics",
    "evaluation.paper_verdicts",
    "evaluation.clip_benchmark",
    "evaluation.lbfgs",
    "interop.architecture",
    "interop.archive",
  ),
  (
    "models.clip",
    "losses",
    "data.pipeline",
    "evaluation.prompts",
    "evaluation.encoding",
    "evaluation.paper_tables",
    "evaluation.copies",
    "evaluation.logistic",
  ),
  (
    "gradients",
    "agreement",
    "evaluation.paper_page",
    "evaluation.opening",
    "evaluation.feature_file",
  ),
  (
    "interop.weights",
    "interop.writers",
    "train_step",
    "inference",
    "evaluation.classifier",
    "evaluation.zero_shot",
    "evaluation.retrieval",
    "evaluation.corruptions",
    "evaluation.overlap",
    "evaluation.overlap_effect",
    "evaluation.paper_writers",
    "evaluation.scores",
    "evaluation.linear_probe",
    "evaluation.features",
    "evaluation.probe_file",
    "evaluation.paper_units",
    "evaluation.paper_progress",
  ),
  ("interop.graphs", "interop.inputs"),
  (
    "interop.sources",
    "evaluation.paper_cells",
    "evaluation.chosen",
    "evaluation.curves",
    "evaluation.embedding_map",
  ),
  (
    "evaluation.tasks",
    "evaluation.figures",
    "evaluation.stress",
    "interop.exports",
    "initial",
    "evaluation.paper_models",
  ),
  ("evaluation.pages", "evaluation.stress_cells", "evaluation.paper_run"),
  (
    "evaluation.report",
    "evaluation.stress_writers",
    "evaluation.overlap_writers",
    "interop.verify",
  ),
  ("evaluation.predictions", "summary", "preflight"),
  ("train", "preflight_text", "remedies", "studies"),
  ("cli_studies", "cli_evaluation"),
  ("cli",),
)

# Which module may import a library.
FENCES = {
  "orbax": {"checkpoint"},
  "grain": {"data.pipeline"},
  "array_record": {"data.records"},
  "tokenizers": {"data.bytepairs"},
  "PIL": {"data.images", "data.scenes", "evaluation.figures", "evaluation.weather_and_digital"},
  "tensorflow_datasets": {"data.tfds_source"},
  "tensorboardX": {"metrics"},
  "jinja2": {"evaluation.pages", "evaluation.paper_page"},
  "argparse": {
    "cli",
    "cli_evaluation",
    "cli_options",
    "cli_options_studies",
    "cli_output",
    "cli_studies",
  },
  "torch": set(),
  "tensorflow": set(),
}


def _modules() -> dict[str, ast.Module]:
  package = ROOT / "clip_jax"
  files = sorted(package.rglob("*.py"))
  names = {f: ".".join(f.relative_to(package).with_suffix("").parts) for f in files}
  return {name: ast.parse(f.read_text()) for f, name in names.items() if f.name != "__init__.py"}


def _imports(tree: ast.Module) -> set[str]:
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


MODULES = _modules()
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
  assert name in RANK, f"{name} has no layer: give it one in LAYERS"
  for imported in _imports(MODULES[name]):
    if not imported.startswith("clip_jax."):
      continue
    parts = imported.split(".")[1:]
    target = next((".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in MODULES), None)
    assert target is not None, f"{name} imports {imported}, which is no module"
    assert RANK[target] < RANK[name], f"{name} imports {target}, which is not below it"


@pytest.mark.parametrize("name", MODULES)
def test_libraries_stay_in_their_rooms(name):
  for imported in _imports(MODULES[name]):
    library = imported.split(".")[0]
    assert name in FENCES.get(library, {name}), f"{name} imports {library}"


def test_every_layer_entry_exists():
  assert set(RANK) == set(MODULES)


# Rooms that are tested through another one's front door.
TESTED_WITH = {
  "data.bytepairs": "tokenizer",
  "data.cleaning": "tokenizer",
  "evaluation.copies": "opening",
  "interop.layouts": "weights",
  "interop.unpickle": "archive",
  "cli_evaluation": "cli",
  "cli_options": "cli",
  "cli_output": "cli",
  "cli_options_studies": "studies",
  "cli_studies": "studies",
  "config": "parsing",
  "chips": "preflight",
  "collectives": "program",
  "hlo": "program",
  "preflight_text": "preflight",
  "remedies": "preflight",
  "interop.verify": "exports",
  "interop.inputs": "sources",
  "interop.writers": "exports",
  "interop.onnx_edits": "graphs",
  "interop.naming": "weights",
  "interop.architecture": "weights",
  "models.transformer": "models",
  "models.vit": "models",
  "models.text": "models",
  "models.clip": "models",
  "models.presets": "models",
  "summary": "train",
  "ring": "losses",
  "evaluation.noise_and_blur": "corruptions",
  "evaluation.weather_and_digital": "corruptions",
  "evaluation.published_notes": "published",
  "evaluation.paper_verdicts": "paper_tables",
  "evaluation.paper_page": "paper_writers",
  "evaluation.feature_file": "features",
  "evaluation.probe_file": "paper_cells",
  "evaluation.paper_units": "paper_cells",
  "evaluation.paper_progress": "paper_run",
  "evaluation.markdown": "stress_writers",
  "evaluation.stress_cells": "stress_writers",
  "evaluation.lbfgs": "logistic",
}


def test_every_module_has_its_test():
  tests = {f.stem.removeprefix("test_") for f in (ROOT / "tests").glob("test_*.py")}
  for name in MODULES:
    test = TESTED_WITH.get(name, name.split(".")[-1])
    assert test in tests, f"{name} has no tests/test_{test}.py"


def test_modules_and_functions_stay_small():
  for name, tree in MODULES.items():
    lines = max(node.end_lineno for node in ast.walk(tree) if hasattr(node, "end_lineno"))
    assert lines <= 350, f"{name} has {lines} lines"
    for node in ast.walk(tree):
      if isinstance(node, ast.FunctionDef):
        length = node.end_lineno - node.lineno + 1
        assert length <= 90, f"{name}.{node.name} has {length} lines"


def test_removed_names_of_jax_are_not_used():
  gone = {"pjit", "device_put_sharded", "device_put_replicated", "tree_map", "pmap", "xmap"}
  for name, tree in MODULES.items():
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not used & gone, f"{name} uses {used & gone}"
