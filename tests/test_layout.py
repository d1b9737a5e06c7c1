"""The house by its imports: a room uses only rooms below it, some libraries only one room."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# From the bottom up; a module imports only modules of lower layers.
LAYERS = (
  (
    "chips",
    "cli_options_studies",
    "cli_output",
    "code_version",
    "config",
    "data.bytepairs",
    "data.cleaning",
    "data.contents",
    "data.images",
    "data.labels",
    "data.storage",
    "data.tables",
    "data.tar",
    "evaluation.curves",
    "evaluation.markdown",
    "evaluation.paper.efficiency",
    "evaluation.paper.progress",
    "evaluation.paper.published",
    "evaluation.shifts.robustness",
    "evaluation.stress.noise_and_blur",
    "goodput",
    "hlo",
    "interop.layouts",
    "interop.onnx_edits",
    "interop.unpickle",
    "json_lines",
    "listening",
    "rounding",
    "stopping",
    "watchdog",
  ),
  (
    "alarms",
    "cli_options",
    "collectives",
    "data.crops",
    "data.records",
    "data.tar_index",
    "data.tokenizer",
    "data.workers",
    "evaluation.paper.origins",
    "evaluation.paper.results",
    "evaluation.stress.weather_and_digital",
    "hosts",
    "interop.archive",
    "interop.naming",
    "models.presets",
    "models.resize",
    "optimizer",
    "parsing",
    "sharding",
  ),
  (
    "checksums",
    "data.folder_source",
    "data.parquet_source",
    "data.scenes",
    "data.table_source",
    "data.tar_source",
    "data.tfds_source",
    "data.webdataset_source",
    "evaluation.datasets",
    "evaluation.encoding",
    "evaluation.paper.published_notes",
    "evaluation.probe.cells",
    "evaluation.probe.lbfgs",
    "evaluation.stress.corruptions",
    "interop.architecture",
    "metrics",
    "models.transformer",
    "program",
    "ring",
  ),
  (
    "checkpoint",
    "data.places",
    "evaluation.copies",
    "evaluation.overlap.effect",
    "evaluation.paper.clip_benchmark",
    "evaluation.paper.verdicts",
    "evaluation.probe.feature_file",
    "evaluation.probe.logistic",
    "evaluation.probe.study",
    "evaluation.prompts",
    "evaluation.retrieval",
    "evaluation.scores",
    "evaluation.stress.curves",
    "interop.writers",
    "losses",
    "models.resnet",
    "models.text",
    "models.vit",
  ),
  (
    "data.pipeline",
    "evaluation.classifier",
    "evaluation.opening",
    "evaluation.paper.tables",
    "evaluation.probe.drawing",
    "evaluation.probe.features",
    "evaluation.probe.linear_probe",
    "evaluation.probe.probe_file",
    "evaluation.shifts.accuracy",
    "evaluation.stress.cells",
    "evaluation.zero_shot",
    "models.clip",
  ),
  (
    "agreement",
    "common_stop",
    "culprit",
    "evaluation.embedding_map",
    "evaluation.overlap.search",
    "evaluation.paper.charts",
    "evaluation.paper.notes",
    "evaluation.paper.units",
    "evaluation.probe.splits",
    "gradients",
    "inference",
    "interop.weights",
  ),
  (
    "evaluation.chosen",
    "evaluation.figures",
    "evaluation.paper.cells",
    "evaluation.paper.facts",
    "interop.graphs",
    "interop.inputs",
    "train_step",
  ),
  (
    "evaluation.pages",
    "evaluation.paper.views",
    "evaluation.probe.data",
    "evaluation.tasks",
    "interop.sources",
    "preflight",
  ),
  (
    "evaluation.overlap.writers",
    "evaluation.paper.models",
    "evaluation.paper.page",
    "evaluation.probe.writers",
    "evaluation.report",
    "evaluation.stress.writers",
    "initial",
    "interop.exports",
    "preflight_text",
    "remedies",
  ),
  (
    "evaluation.paper.writers",
    "evaluation.predictions",
    "interop.verify",
    "summary",
  ),
  ("evaluating",),
  (
    "evaluation.paper.run",
    "studies",
    "train",
  ),
  (
    "cli_evaluation",
    "probing",
  ),
  ("cli_studies",),
  ("cli",),
)

# Which module may import a library.
FENCES = {
  "orbax": {"checkpoint"},
  "grain": {"data.pipeline"},
  "array_record": {"data.records"},
  "tokenizers": {"data.bytepairs"},
  "cykooz_resizer": {"data.crops"},
  "PIL": {
    "data.crops",
    "data.images",
    "data.scenes",
    "evaluation.figures",
    "evaluation.stress.weather_and_digital",
  },
  "tensorflow_datasets": {"data.tfds_source"},
  "fsspec": {"data.storage"},
  "pyarrow": {"data.parquet_source"},
  "tensorboardX": {"metrics"},
  "jinja2": {"evaluation.pages"},
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
    target = next((".".join(parts[:n]) for n in (3, 2, 1) if ".".join(parts[:n]) in MODULES), None)
    assert target is not None, f"{name} imports {imported}, which is no module"
    assert RANK[target] < RANK[name], f"{name} imports {target}, which is not below it"


@pytest.mark.parametrize("name", MODULES)
def test_libraries_stay_in_their_rooms(name):
  for imported in _imports(MODULES[name]):
    library = imported.split(".")[0]
    assert name in FENCES.get(library, {name}), f"{name} imports {library}"


def test_only_training_decodes_at_a_scale():
  """Evaluation's pixels are the original's: it reaches neither Pillow's short cuts nor the training
  data that take them. (figures.py makes small pictures for a page.)"""
  may_use = {
    "draft": {"data.crops"},
    "reducing_gap": set(),
    "thumbnail": {"evaluation.figures"},
    "crops": {"data.pipeline"},
    "example_dataset": {"culprit"},  # for the name of a training record
    "host_batches": {"train"},
  }
  for name, tree in MODULES.items():
    nodes = list(ast.walk(tree))
    used = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    used |= {n.arg for n in nodes if isinstance(n, ast.keyword)}
    used |= {imported.rpartition(".")[2] for imported in _imports(tree)}
    for word in used & may_use.keys():
      assert name in may_use[word], f"{name} uses {word}"


def test_every_layer_entry_exists():
  assert set(RANK) == set(MODULES)


# Rooms that are tested through another one's front door.
TESTED_WITH = {
  "data.bytepairs": "tokenizer",
  "data.cleaning": "tokenizer",
  "data.tables": "prepare_folder",
  "data.tar_index": "webdataset_source",
  "data.workers": "pipeline",
  "evaluation.copies": "opening",
  "interop.layouts": "weights",
  "interop.unpickle": "archive",
  "cli_evaluation": "cli",
  "cli_options": "cli",
  "cli_output": "cli",
  "cli_options_studies": "studies",
  "cli_studies": "studies",
  "config": "parsing",
  "checksums": "checkpoint",
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
  "culprit": "train",
  "evaluating": "train",
  "goodput": "metrics",
  "stopping": "cli",
  "summary": "train",
  "ring": "losses",
  "evaluation.stress.noise_and_blur": "corruptions",
  "evaluation.stress.weather_and_digital": "corruptions",
  "evaluation.paper.published_notes": "published",
  "evaluation.paper.verdicts": "paper_tables",
  "evaluation.paper.page": "paper_writers",
  "evaluation.paper.efficiency": "predictive_study",
  "evaluation.paper.origins": "paper_views",
  "evaluation.paper.facts": "paper_views",
  "evaluation.paper.charts": "paper_views",
  "evaluation.probe.feature_file": "features",
  "evaluation.probe.probe_file": "paper_cells",
  "evaluation.probe.splits": "features",
  "evaluation.probe.cells": "probe_writers",
  "evaluation.probe.study": "probe_writers",
  "evaluation.probe.drawing": "probe_writers",
  "evaluation.probe.data": "probing",
  "evaluation.paper.units": "paper_cells",
  "evaluation.paper.notes": "paper_run",
  "evaluation.paper.progress": "paper_run",
  "evaluation.markdown": "stress_writers",
  "evaluation.stress.cells": "stress_writers",
  "evaluation.probe.lbfgs": "logistic",
}


def test_every_module_has_its_test():
  tests = {f.stem.removeprefix("test_") for f in (ROOT / "tests").glob("test_*.py")}
  for name in MODULES:
    parts = name.split(".")
    own = {parts[-1], "_".join(parts[-2:])}  # evaluation.paper.cells: test_paper_cells.py
    wanted = {TESTED_WITH[name]} if name in TESTED_WITH else own
    assert wanted & tests, f"{name} has none of tests/: {sorted(wanted)}"


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
