import csv
import json

from paper_cells import measured

from clip_jax.evaluation.paper import clip_benchmark, published

OPENAI = {r["model"]: r["openai_checkpoint_sha256"] for r in published.rows("architectures.csv")}


def test_a_result_has_the_keys_of_the_tools_json():
  large = {"model": "ViT-L/14@336px", "weights": OPENAI["ViT-L/14@336px"]}
  cells = [
    measured(dataset="Food101", value=81.1, **large),
    measured("10", dataset="Food101", value=95.9, **large),
    measured("13", dataset="Flickr30k", metric="text retrieval R@1", value=88.0, **large),
    measured("13", dataset="Flickr30k", metric="image retrieval R@10", value=95.2, **large),
    measured("18", "", "", "batch size", 32768, n=0),  # no such task there
  ]
  names = {"model": "ViT-L-14-336", "pretrained": "openai", "language": "en"}
  assert list(clip_benchmark.results(cells)) == [
    {
      "dataset": "food101",
      "task": "zeroshot_classification",
      "metrics": {"acc1": 0.811},
      **names,
    },
    {"dataset": "food101", "task": "linear_probe", "metrics": {"lp_acc1": 0.959}, **names},
    {
      "dataset": "flickr30k",
      "task": "zeroshot_retrieval",
      "metrics": {"text_retrieval_recall@1": 0.88, "image_retrieval_recall@10": 0.952},
      **names,
    },
  ]


def test_metrics_that_it_does_not_have_are_not_called_as_its_own():
  metrics = {
    "Oxford Pets": ("mean per class", "mean_per_class_recall"),
    "VOC2007": ("11-point mAP", "mean_average_precision_11_point"),
    "HatefulMemes": ("ROC AUC", "roc_auc"),
    "Kinetics700": ("mean(top1, top5)", "mean_acc1_acc5"),
  }
  for dataset, (metric, name) in metrics.items():
    (result,) = clip_benchmark.results([measured(dataset=dataset, metric=metric, value=50.0)])
    assert result["metrics"] == {name: 0.5}


def test_zero_shot_and_probe_of_table_16_are_two_tasks():
  labels = ("Zero-Shot CLIP (RN50)", "Linear Probe CLIP (RN50)", "own")
  cells = [measured("16", label, "ImageNetV2", value=60.0) for label in labels]
  cells.append(measured("16", labels[0], "ImageNet-Vid", "PM10", 50.0))
  found = clip_benchmark.results(cells)
  assert [(r["model"], r["dataset"], r["task"], r["metrics"]) for r in found] == [
    ("RN50", "imagenetv2", "zeroshot_classification", {"acc1": 0.6}),
    ("RN50", "imagenetv2", "linear_probe", {"lp_acc1": 0.6}),
    ("own", "imagenetv2", "zeroshot_classification", {"acc1": 0.6}),
    ("RN50", "ImageNet-Vid", "zeroshot_classification", {"acc1_pm10": 0.5}),
  ]


def test_the_csv_is_what_the_tools_build_command_makes_of_the_json():
  """Its rows: a result's metrics, then its other keys without "metrics", then `model_fullname`."""
  cells = [measured(value=81.1), measured("10", value=86.4), measured(model="own", value=5.0)]
  found = clip_benchmark.results(cells)
  expected = []
  for data in map(json.loads, map(json.dumps, found)):
    row = {**data["metrics"], **data}
    del row["metrics"]
    row["model_fullname"] = row["model"] + " " + row["pretrained"]
    expected.append({name: str(value) for name, value in row.items()})
  rows = list(csv.DictReader(clip_benchmark.build(found).splitlines()))
  assert [{k: v for k, v in row.items() if v} for row in rows] == expected
  assert {name for row in expected for name in row} == set(rows[0])


def test_other_weights_are_called_by_their_hash():
  (own,) = clip_benchmark.results([measured(weights="f" * 64)])
  assert own["pretrained"] == "sha256-ffffffffffff"
  (none,) = clip_benchmark.results([measured(weights="")])
  assert none["pretrained"] == "none"


def test_files_are_called_as_the_tool_calls_them():
  (found,) = clip_benchmark.results([measured("10", weights=OPENAI["RN50"], dataset="DTD")])
  assert clip_benchmark.file_name(found) == "vtab_dtd_openai_RN50_en_linear_probe.json"
  odd = [measured(model=m, dataset="../a b") for m in ("x/y", "x:y")]
  names = {clip_benchmark.file_name(r) for r in clip_benchmark.results(odd)}
  assert len(names) == 2
  assert not any(set(name) & set("/: ") for name in names)
