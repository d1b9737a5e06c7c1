import json
import pathlib
import subprocess
import sys
import zipfile

import pytest

from clip_jax.evaluation import prompts
from tools import import_prompts

EMOTIONS = """\
classes = [
    ['angry'],
    ('happy', 'smiling'),
    "o'clock",
]

templates = [
    'a "{}" face.',
]
"""
PAGE = f"""# Prompts

Words with `classes` and `templates`.

## FacialEmotionRecognition2013

```bash
{EMOTIONS}```



## KITTI

```python
classes = ['near', 'far']
```

More words.

```
templates = [
    '{{}}'
]
```
"""


def test_a_page_of_the_published_shape():
  assert import_prompts.of_page(PAGE) == {
    "fer2013": import_prompts.Published(
      [["angry"], ["happy", "smiling"], ["o'clock"]], ['a "{}" face.']
    ),
    "kitti": import_prompts.Published([["near"], ["far"]], ["{}"]),
  }


@pytest.mark.parametrize(
  ("code", "message"),
  [
    ("classes = ['a']", "has no templates"),
    ("classes = []\ntemplates = ['{}']", "has no classes"),
    ("classes = ['a'", "is no Python"),
    ("classes = open('x')\ntemplates = ['{}']", "classes holds more than literals"),
    ("import os\nclasses = ['a']", "'import os' on line 1"),
    ("print('a')", "print"),
    ("classes = templates = ['{}']", "has no templates"),
    ("classes[0] = 'a'", "want `classes"),
    ("classes = ['a']\nclasses = ['b']", "want classes once"),
    ("classes = 'ab'\ntemplates = ['{}']", "want classes once, as a list"),
    ("classes = ['a', 1]\ntemplates = ['{}']", "class 1 is neither"),
    ("classes = ['a', []]\ntemplates = ['{}']", r"class \[\] is neither"),
    ("classes = [['a', 1]]\ntemplates = ['{}']", "neither a string nor"),
    ("classes = ['a']\ntemplates = [1]", "templates that are not strings"),
  ],
)
def test_a_bad_block_is_refused_with_its_dataset(code, message):
  with pytest.raises(import_prompts.PromptsImportError, match=message) as error:
    import_prompts.of_page(f"## SST2\n\n```bash\n{code}\n```\n")
  assert str(error.value).startswith("rendered_sst2: ")


def test_a_page_executes_nothing(tmp_path):
  file = tmp_path / "made"
  code = f"classes = [__import__('pathlib').Path({str(file)!r}).touch()]\ntemplates = ['{{}}']"
  with pytest.raises(import_prompts.PromptsImportError, match="more than literals"):
    import_prompts.of_page(f"## SST2\n```\n{code}\n```\n")
  assert not file.exists()


def test_a_dataset_that_stands_twice_is_refused():
  with pytest.raises(import_prompts.PromptsImportError, match="fer2013: stands twice"):
    import_prompts.of_page(PAGE + f"\n## FacialEmotionRecognition2013\n```\n{EMOTIONS}```\n")


def published_page():
  """A page in OpenAI's shape with what ships: 26 datasets."""
  sections = []
  for name in prompts.published():
    found = prompts.named(name)
    heading = import_prompts.counts()[name]["dataset"]
    if heading != "ImageNet":
      classes = [own[0] if len(own) == 1 else list(own) for own in found.names]
      lists = f"classes = {classes}\n\ntemplates = {list(found.templates)}\n"
      sections.append(f"## {heading}\n\n```bash\n{lists}```\n\n\n\n")
  return "# Prompts\n\n" + "".join(sections)


def test_a_whole_page_becomes_the_files_that_ship(tmp_path):
  (tmp_path / "prompts.md").write_text(published_page(), encoding="utf-8")
  shipped = pathlib.Path(prompts.__file__).parents[1] / "assets" / "prompts"
  version = json.loads((shipped / "kitti.json").read_text())["source"]["version"]
  arguments = [str(tmp_path / "prompts.md"), str(tmp_path / "out"), "--version", version]
  assert import_prompts.main(arguments) == 0
  made = sorted((tmp_path / "out").iterdir())
  assert len(made) == 26
  for file in made:
    assert file.read_text(encoding="utf-8") == (shipped / file.name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    ("'zumba'", "", "kinetics700: expected 700 classes, found 699"),
    ("'{}'", "'{}', 'a {}'", "kitti: expected 1 templates, found 2"),
    ("'happy', 'smiling'", "'happy'", "fer2013: expected 12 class strings, found 11"),
    ("## MNIST", "## EMNIST", "lacks mnist"),
    ("# Prompts\n", "## X\n```\nclasses=['a']\ntemplates=['{}']\n```\n", "x: none of the paper's"),
  ],
)
def test_a_count_that_is_not_as_published_fails_and_nothing_is_written(
  tmp_path, capsys, old, new, message
):
  page = published_page()
  assert old in page
  (tmp_path / "prompts.md").write_text(page.replace(old, new), encoding="utf-8")
  assert import_prompts.main([str(tmp_path / "prompts.md"), str(tmp_path / "out")]) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def wheel(folder, classes, templates):
  path = folder / "clip_benchmark-1.6.2-py2.py3-none-any.whl"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("clip_benchmark/datasets/en_classnames.json", json.dumps(classes))
    archive.writestr(
      "clip_benchmark/datasets/en_zeroshot_classification_templates.json", json.dumps(templates)
    )
  return path


def test_of_a_wheel_only_unchanged_sets_are_taken(tmp_path, capsys):
  kitti = prompts.named("kitti")
  classes = {"kitti_closest_vehicle_distance": kitti.classes, "pets": ["Abyssinian"]}
  path = wheel(
    tmp_path,
    classes,
    {"kitti_closest_vehicle_distance": ["{c}"], "pets": ["a photo of a {c}, a type of pet."]},
  )
  found = import_prompts.read(path, ["kitti"])
  assert list(found) == ["kitti"]
  assert found["kitti"]["templates"] == ["{}"]
  assert found["kitti"]["source"]["version"] == "1.6.2"
  assert import_prompts.main([str(path), str(tmp_path / "out"), "oxford_pets"]) == 2
  assert "lacks oxford_pets; it has kitti" in capsys.readouterr().err
  with pytest.raises(import_prompts.PromptsImportError, match="lacks caltech101, country211"):
    import_prompts.read(path)


def test_a_broken_wheel_is_named(tmp_path):
  path = tmp_path / "clip_benchmark-1.6.2.whl"
  path.write_bytes(b"not a zip")
  with pytest.raises(import_prompts.PromptsImportError, match="no whole wheel of clip_benchmark"):
    import_prompts.read(path)


def test_a_page_that_is_no_text_is_named(tmp_path, capsys):
  (tmp_path / "prompts.md").write_bytes(b"\xff\xfe")
  assert import_prompts.main([str(tmp_path / "prompts.md"), str(tmp_path / "out")]) == 2
  assert "prompts.md: no text in UTF-8" in capsys.readouterr().err


def test_the_tool_runs_as_a_script(tmp_path):
  script = pathlib.Path(import_prompts.__file__)
  done = subprocess.run(
    [sys.executable, str(script), str(tmp_path / "missing.md"), str(tmp_path / "out")],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.startswith("error: ")
  assert "missing.md" in done.stderr
