import numpy as np
import pytest
from known_model import KnownModel, captioned, labelled

from clip_jax import config as config_lib
from clip_jax.evaluation import prompts, tasks

STAMPS = prompts.named("stamps")


def stamps_model():
  texts = {
    t.replace("{}", c): row
    for c, row in zip(("tower", "bird"), np.eye(2), strict=True)
    for t in STAMPS.templates
  }
  return KnownModel([[1, 0], [0, 1], [0, 1]], texts, 2)


def test_classes_may_come_from_the_source():
  source = labelled(["tower", "bird", "tower"])
  source.classes = ("tower", "bird")
  task = config_lib.Task("old stamps", "zero_shot", prompts="stamps", limit=2)
  result = tasks.run_task(stamps_model(), task, source, 2)
  assert (result.name, result.n, result.top1, result.classes) == (
    "old stamps",
    2,
    1.0,
    source.classes,
  )


def test_a_source_without_classes_cannot_lend_them():
  task = config_lib.Task("old stamps", "zero_shot", prompts="stamps")
  with pytest.raises(prompts.PromptError, match=r"'old stamps'.*names none"):
    tasks.run_task(stamps_model(), task, labelled(["tower"]), 2)


def test_retrieval_needs_no_prompts():
  model = KnownModel(np.eye(3), {f"t{i}": row for i, row in enumerate(np.eye(3))}, 2)
  task = config_lib.Task("", "retrieval")
  result = tasks.run_task(model, task, captioned([["t0"], ["t1"], ["t2"]]), 2)
  assert (result.name, result.images, result.text_to_image.recall[1]) == ("retrieval", 3, 1.0)


def test_held_out_classes_are_passed_on():
  found = prompts.named("scenes")
  texts = {t.replace("{}", c): [1.0] for c in found.classes for t in found.templates}
  task = config_lib.Task("scenes", "zero_shot", prompts="scenes")
  model = KnownModel([[1.0]], texts, 2)
  result = tasks.run_task(model, task, labelled([found.held_out[0]]), 2)
  assert result.held_out == found.held_out


def test_unknown_prompts_are_an_error():
  task = config_lib.Task("x", "zero_shot", prompts="imagenot")
  with pytest.raises(prompts.PromptError, match="imagenot"):
    tasks.run_task(stamps_model(), task, labelled(["tower"]), 2)
