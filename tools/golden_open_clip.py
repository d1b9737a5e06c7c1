"""Writes tests/golden/open_clip.json: what open_clip's CLIP says of tiny models.

The weights are random, biases, gains and running statistics too, and drawn from a seed, so the file
holds outputs only. Needs torch and open_clip, which the tests then do not:

  python -m tools.golden_open_clip
"""

import copy
import importlib
import importlib.metadata
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from clip_jax import config as c
from clip_jax import metrics
from clip_jax.interop import architecture, naming, weights
from tools import golden_siglip

ROOT = pathlib.Path(__file__).parents[1]
PATH = ROOT / "tests" / "golden" / "open_clip.json"

_TEXT = {"context_length": 9, "vocab_size": 70, "width": 24, "heads": 3, "layers": 2}
_VIT = {
  "embed_dim": 20,
  "vision_cfg": {
    "image_size": 40, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8, "mlp_ratio": 3.5
  },
  "text_cfg": _TEXT,
}  # fmt: skip
_RESNET = {"image_size": 96, "layers": [1, 2, 3, 1], "width": 8}
CONFIGS: dict[str, dict[str, Any]] = {
  "vit_gelu": _VIT,
  "vit_quick_gelu": {**_VIT, "quick_gelu": True},
  "resnet": {"embed_dim": 20, "vision_cfg": _RESNET, "text_cfg": _TEXT, "quick_gelu": True},
}


def random_variables(model: c.Model, seed: int) -> dict[str, Any]:
  """Float32 weights and running statistics, nothing left at zero or one."""
  rng = np.random.default_rng(seed)

  def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    noise = rng.normal(size=leaf.shape)
    name = path[-1].key
    if name == "variance":
      values = 0.5 + np.abs(noise)
    elif name == "kernel":
      values = 1.5 * noise * int(np.prod(leaf.shape[-4:-1])) ** -0.5
    else:
      values = (1.0 if name == "scale" else 0.0) + 0.2 * noise
    return values.astype(np.float32)

  variables = jax.tree_util.tree_map_with_path(draw, weights.abstract_variables(model))
  return {**variables, "params": {**variables["params"], "log_scale": np.float32(2.5)}}


def inputs(model: c.Model) -> tuple[np.ndarray, np.ndarray]:
  """(image_BRR3 float32, tokens_BL int32), each text with one end token, the highest number."""
  image_BRR3, tokens_BL = golden_siglip.random_inputs(model, seed=1)
  tokens_BL = np.minimum(tokens_BL, model.text.vocab_size - 2)
  tokens_BL[range(4), [3, 8, 5, 7]] = model.text.vocab_size - 1
  return image_BRR3, tokens_BL


def outputs(config: dict[str, Any]) -> dict[str, Any]:
  """open_clip's `image` and `text` embeddings [B, E] and `logits` [images, texts]."""
  torch = importlib.import_module("torch")
  sys.path.insert(0, str(ROOT / "tests"))
  open_clip = importlib.import_module("open_clip_alone").module("model")
  model = architecture.from_open_clip_config(config)
  arrays = weights.to_theirs(random_variables(model, seed=0), naming.openai(model))
  theirs = open_clip.CLIP(**copy.deepcopy(config), output_dict=False).eval()
  state = {name: torch.tensor(array) for name, array in arrays.items()}
  missing, surplus = theirs.load_state_dict(state, strict=False)
  assert not surplus, surplus
  assert all("num_batches_tracked" in name or name == "attn_mask" for name in missing), missing
  image_BRR3, tokens_BL = inputs(model)
  with torch.no_grad():
    image = torch.tensor(image_BRR3).permute(0, 3, 1, 2)
    image_BE, text_BE, scale = theirs(image, torch.tensor(tokens_BL).long())
  logits = scale * image_BE @ text_BE.T
  found = {"image": image_BE, "text": text_BE, "logits": logits}
  return {name: value.numpy().astype(float).round(7).tolist() for name, value in found.items()}


def main() -> None:
  source = f"open_clip {importlib.metadata.version('open_clip_torch')}, CLIP, float32 on CPU"
  models = {name: outputs(config) for name, config in CONFIGS.items()}
  metrics.write_atomically(PATH, json.dumps({"source": source, **models}) + "\n")
  print(f"{PATH}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
  main()
