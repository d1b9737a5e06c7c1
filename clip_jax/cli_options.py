"""The verbs of `clip-jax` and their options, with their help."""

import argparse
import functools
from collections.abc import Callable

from clip_jax import cli_options_studies

# As in interop/exports.py, which is not imported for a word of help.
FORMATS = ("openai", "open_clip", "huggingface", "onnx", "stablehlo", "savedmodel")

_EPILOG = """\
examples:
  clip-jax train --config experiments/demo.py --workdir runs/demo --config.steps=500
  clip-jax evaluate --weights runs/demo
  clip-jax paper --models RN50=RN50.pt --data DATA --output tables
  clip-jax classify photo.png --labels "a cat,a dog" --weights runs/demo
  clip-jax embed --weights runs/demo --texts "a red circle" --output texts.npy
  clip-jax import ViT-B-32.pt weights/vit_b_32
  clip-jax export runs/demo demo_open_clip --format open_clip
  clip-jax predictions --weights runs/demo --data digits --output page.html
  clip-jax probe --weights runs/demo --data digits --output probe
"""


def parser() -> argparse.ArgumentParser:
  """Every verb with its options; `--config.KEY=VALUE` is left over for the config."""
  top = argparse.ArgumentParser(
    prog="clip-jax",
    description="CLIP in JAX: train on image-text pairs, evaluate, classify, embed.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
  add = functools.partial(verbs.add_parser, allow_abbrev=False)
  common = argparse.ArgumentParser(add_help=False)
  common.add_argument("--json", action="store_true", help="print JSON for programs, not a table")
  common.add_argument("--debug", action="store_true", help="show the stack trace of an error")
  weights = argparse.ArgumentParser(add_help=False)
  weights.add_argument(
    "--weights", required=True, metavar="DIR", help="a workdir, or what import takes"
  )

  _add_training(add, common)
  evaluate = add(
    "evaluate",
    parents=[common],
    help="run a checkpoint's evaluation tasks",
    description="Zero-shot classification and retrieval on the tasks of the run's config.",
  )
  evaluate.add_argument("--weights", required=True, metavar="DIR", help="a workdir")
  evaluate.add_argument("--report", metavar="FILE", help="also write the HTML report here")

  _add_paper(add, common)
  classify = verbs.add_parser(
    allow_abbrev=False,
    name="classify",
    parents=[common, weights],
    help="zero-shot labels for images",
  )
  classify.add_argument("images", nargs="+", metavar="IMAGE")
  classify.add_argument("--labels", required=True, help='comma-separated, e.g. "a cat,a dog"')
  classify.add_argument(
    "--template",
    action="append",
    metavar="TEXT",
    help='prompt with {} for the label, may be repeated; default "{}": the labels as they are',
  )

  _add_interop(add, common)
  embed = verbs.add_parser(
    allow_abbrev=False,
    name="embed",
    parents=[common, weights],
    help="embeddings of images and texts",
  )
  embed.add_argument("images", nargs="*", metavar="IMAGE")
  embed.add_argument("--texts", action="append", default=[], metavar="TEXT", help="may be repeated")
  embed.add_argument(
    "--output", metavar="FILE.npy", help="float32 [N, E], images first, then texts"
  )
  cli_options_studies.add_to(add, common, weights, _add_several)
  return top


def _add_interop(
  add: Callable[..., argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
  load = add(
    "import",
    parents=[common],
    help="weights of other frameworks -> a checkpoint",
    description="Reads OpenAI's .pt archives, open_clip's state dicts (with open_clip_config.json "
    "beside them), Hugging Face's folders of CLIPModel and SiglipModel, and big_vision's .npz.",
  )
  load.add_argument("source", metavar="SOURCE", help="file or folder")
  load.add_argument("dest", metavar="DEST", help="new folder, as --weights takes it")
  load.add_argument(
    "--activation",
    choices=("quick_gelu", "gelu"),
    help="of a state dict that does not say it (OpenAI's and DFN's: quick_gelu)",
  )
  load.add_argument(
    "--resolution",
    type=int,
    default=0,
    metavar="PIXELS",
    help="resize the image positions to it, as ViT-L/14's from 224 to 336",
  )

  export = add(
    "export",
    parents=[common],
    help="weights -> files of other frameworks",
    description="Writes the weights for another framework, then reads them back and compares: "
    "always with clip-jax's own reader, and with the framework itself where it is installed.",
  )
  export.add_argument("source", metavar="SOURCE", help="a workdir, or anything that import takes")
  export.add_argument("dest", metavar="DEST", help="new folder; for openai a new file")
  export.add_argument("--format", required=True, choices=FORMATS)
  export.add_argument("--activation", choices=("quick_gelu", "gelu"), help="as for import")


def _add_paper(
  add: Callable[..., argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
  paper = add(
    "paper",
    parents=[common],
    help="measure the paper's tables, beside the published figures",
    description="Measures Tables 10 (linear probe), 11 (zero-shot), 13 (retrieval) and 16 (natural "
    "shifts) cell by cell and writes them with the published figures, the differences and a "
    "verdict; Tables 1, 12, 14, 15 and Figures 5, 9, 13 are made of their cells, Table 9 of the "
    "copies of the data, Tables 18 to 20 of the experiment files, Figure 2 of a study. The same "
    "command goes on where it was stopped. What is not on this machine is told, with how to get "
    "it. Exit code 2: some of what is there could not be measured.",
  )
  paper.add_argument(
    "--models",
    default=[],
    nargs="+",
    metavar="NAME=WEIGHTS",
    help="as --weights takes them; not for Tables 9 and 18 to 20 and Figures 2 and 9",
  )
  paper.add_argument(
    "--data", default=[], nargs="+", metavar="ROOT", help="folders with data sets below them"
  )
  paper.add_argument("--output", required=True, metavar="DIR", help="results and tables")
  paper.add_argument(
    "--tables",
    default="10,11,13,16",
    metavar="N,N",
    help="of 1, 9 to 16, 18 to 20, figure2, figure5, figure9, figure13; default 10,11,13,16",
  )
  paper.add_argument(
    "--predictive", metavar="FILE", help="for figure2: OUTPUT.json of tools/predictive_study.py"
  )
  paper.add_argument(
    "--standard-models",
    metavar="FILE",
    help="for figure13: a CSV of ImageNet models (columns model, kind, ImageNet, ImageNetV2, ..., "
    "'ImageNet on ImageNet-A classes', ...; kind standard), above whose line effective robustness "
    "is counted",
  )
  paper.add_argument(
    "--datasets", nargs="+", default=[], metavar="KEY", help="these only, as Food101"
  )
  paper.add_argument(
    "--limit",
    type=int,
    default=0,
    metavar="N",
    help="the first N records of every split; such figures are not compared with the paper's",
  )
  paper.add_argument(
    "--corrupt-images",
    choices=("error", "skip"),
    default="error",
    help="what to do with an image that cannot be decoded (default: error, naming it); a figure "
    "that does without one gets a row of its own",
  )
  paper.add_argument(
    "--remeasure",
    action="store_true",
    help="measure the cells asked for again, without features and probes that another version of "
    "the code kept",
  )
  paper.add_argument(
    "--features",
    choices=("penultimate", "projected"),
    default="penultimate",
    help="of the linear probe; projected is what other tools probe, and gets a row of its own",
  )
  paper.add_argument(
    "--prompts",
    nargs="+",
    default=[],
    metavar="KEY=FILE",
    help="class names and templates of a data set, as JSON, in place of the published ones",
  )
  paper.add_argument(
    "--caption-prefix",
    default="a photo of ",
    metavar="TEXT",
    help='before every caption of retrieval; default "a photo of ", as in the paper',
  )
  paper.add_argument(
    "--cache", metavar="DIR", help="of features, hashes; default: cache in DIR of output"
  )
  paper.add_argument("--batch", type=int, default=256, metavar="N", help="images at a time (256)")
  _add_several(paper)


def _add_several(verb: argparse.ArgumentParser) -> None:
  """How the processes of a run find each other."""
  several = verb.add_argument_group(
    "several processes",
    "one a host, each with this command; to be told where no TPU, GKE, Slurm or Open MPI does it",
  )
  several.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, the same for all")
  several.add_argument("--processes", type=int, metavar="N", help="how many there are")
  several.add_argument("--process", type=int, metavar="I", help="which this one is, from 0")
  several.add_argument(
    "--heartbeat",
    type=float,
    default=30.0,
    metavar="SECONDS",
    help="a process that is silent for so long ends the others (30)",
  )


def _add_training(
  add: Callable[..., argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
  """The verbs that take a config: train and preflight."""
  train = add(
    "train",
    parents=[common],
    help="train from a config file, or go on with a workdir",
    description="Trains, evaluates and writes a report. The same command on the same workdir goes "
    "on from its newest checkpoint. A config file is Python code and is executed. Exit code 0: the "
    "run is finished; 75: it stopped early and saved, or another host died, and the same command "
    "continues; 42: it made no progress, and the same command continues; 2: an error.",
  )
  train.add_argument(
    "--config", required=True, metavar="FILE", help="experiment file with get_config()"
  )
  train.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints, metrics, report")
  _add_several(train)
  train.add_argument(
    "--stuck",
    type=float,
    default=1800.0,
    metavar="SECONDS",
    help="the longest that a step, a checkpoint or a batch of an evaluation may take before the "
    "process shows where it stands and ends (1800)",
  )
  train.add_argument(
    "--accept-changes",
    action="store_true",
    help="go on from a checkpoint although its config or data differ from this run's",
  )
  train.add_argument(
    "--config.KEY",
    dest="_",
    metavar="VALUE",
    help="override a value of the config, e.g. --config.steps=100",
  )

  preflight = add(
    "preflight",
    parents=[common],
    help="compile a training step for a TPU slice that is not here: memory, time, cost",
    description="Compiles the very step that train would run, for any TPU topology, on any "
    "machine. If it does not fit, what would. Exit code 1: it does not fit.",
  )
  preflight.add_argument("--config", required=True, metavar="FILE", help="as for train")
  preflight.add_argument(
    "--topology", required=True, metavar="NAME", help="v5e:16x16, v4:4x4x8, ...; cuda: GPUs here"
  )
  preflight.add_argument(
    "--slices", type=int, default=1, metavar="N", help="so many slices of it, over the network"
  )
  preflight.add_argument(
    "--price", type=float, default=0.0, metavar="DOLLARS", help="of one chip for one hour"
  )
