"""Writes tests/golden/siglip.json: what Hugging Face's SiglipModel says of a tiny model.

The weights are random, biases and gains too, and drawn from a seed, so the file holds outputs
only. Needs torch and transformers, which the tests then do not:

  python -m tools.golden_siglip
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax import config as c
from clip_jax import metrics
from clip_jax.models import clip

PATH = pathlib.Path(__file__).parents[1] / "tests" / "golden" / "siglip.json"

# Odd on purpose: 5 pixels left over by 3 x 3 patches, towers of other widths, no MLP of 4 D.
TINY = c.Model(
  image=c.Vision(29, 8, width=32, layers=2, heads=4, mlp_width=72, pooling="map"),
  text=c.Text(9, 50, width=24, layers=3, heads=3, mlp_width=40, pooling="last"),
  embed_dim=32,
  activation="gelu_tanh",
  norm_epsilon=1e-6,
  loss="sigmoid",
)


def random_params(model: c.Model, seed: int) -> Any:
  """Float32 weights of this model, nothing left at zero or one; leaves drawn in sorted order."""
  shapes = jax.eval_shape(clip.CLIP(model).init, jax.random.key(0), *_shapes(model))["params"]
  rng = np.random.default_rng(seed)

  def draw(path: tuple[Any, ...], leaf: Any) -> jax.Array:
    middle = 1.0 if path[-1].key == "scale" else 0.0
    values = middle + 0.2 * rng.normal(size=leaf.shape)
    return jnp.asarray(values, jnp.float32)

  params = jax.tree_util.tree_map_with_path(draw, shapes)
  return {**params, "log_scale": jnp.float32(1.5), "logit_bias": jnp.float32(-2.5)}


def _shapes(model: c.Model) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  side = model.image.resolution
  return (
    jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),
    jax.ShapeDtypeStruct((1, model.text.context_length), jnp.int32),
  )


def random_inputs(model: c.Model, seed: int, batch: int = 4) -> tuple[np.ndarray, np.ndarray]:
  """(image_BRR3 float32, tokens_BL int32)."""
  rng = np.random.default_rng(seed)
  image, tokens = _shapes(model)
  image_BRR3 = rng.normal(size=(batch, *image.shape[1:])).astype(np.float32)
  tokens_BL = rng.integers(0, model.text.vocab_size, (batch, *tokens.shape[1:]))
  return image_BRR3, tokens_BL.astype(np.int32)


def hugging_face_outputs(
  model: c.Model, params: Any, image_BRR3: np.ndarray, tokens_BL: np.ndarray
) -> dict[str, np.ndarray]:
  """`image` [B, D], `text` [B, E], both before normalisation, and `logits` [images, texts]."""
  import torch

  theirs = _hugging_face_model(model)
  flat = _hugging_face_names(model, jax.tree.map(np.asarray, params))
  weights = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in flat.items()}
  theirs.load_state_dict(weights, strict=True)
  with torch.no_grad():
    out = theirs(
      input_ids=torch.tensor(tokens_BL, dtype=torch.long),
      pixel_values=torch.tensor(image_BRR3).permute(0, 3, 1, 2),
    )
  return {
    "image": out.vision_model_output.pooler_output.numpy(),
    "text": out.text_model_output.pooler_output.numpy(),
    "logits": out.logits_per_image.numpy(),
  }


def _hugging_face_model(model: c.Model) -> Any:
  from transformers import SiglipConfig, SiglipModel

  def tower(encoder: c.Vision | c.Text) -> dict[str, Any]:
    return {
      "hidden_size": encoder.width,
      "intermediate_size": encoder.mlp_width or 4 * encoder.width,
      "num_hidden_layers": encoder.layers,
      "num_attention_heads": encoder.heads,
      "hidden_act": "gelu_pytorch_tanh",
      "layer_norm_eps": model.norm_epsilon,
    }

  text = {
    "vocab_size": model.text.vocab_size,
    "max_position_embeddings": model.text.context_length,
    "projection_size": model.embed_dim,
    "bos_token_id": 1,
    "eos_token_id": 1,
  }
  vision = {"image_size": model.image.resolution, "patch_size": model.image.patch}
  config = SiglipConfig(
    text_config=tower(model.text) | text, vision_config=tower(model.image) | vision
  )
  return SiglipModel(config).eval()


def _hugging_face_names(model: c.Model, params: Any) -> dict[str, np.ndarray]:
  image, text, patch = params["image"], params["text"], model.image.patch
  kernel = image["stem"]["patch_embedding"]["kernel"].reshape(patch, patch, 3, -1)
  out = {
    "logit_scale": params["log_scale"][None],
    "logit_bias": params["logit_bias"][None],
    "vision_model.embeddings.patch_embedding.weight": kernel.transpose(3, 2, 0, 1),
    "vision_model.embeddings.patch_embedding.bias": image["stem"]["patch_embedding"]["bias"],
    "vision_model.embeddings.position_embedding.weight": image["positional_embedding"],
    "text_model.embeddings.token_embedding.weight": text["token_embedding"]["embedding"],
    "text_model.embeddings.position_embedding.weight": text["positional_embedding"],
    "text_model.head.weight": params["text_projection"].T,
    "text_model.head.bias": params["text_projection_bias"],
  }
  out |= _norm("vision_model.post_layernorm", image["ln_post"])
  out |= _norm("text_model.final_layer_norm", text["ln_final"])
  for name, tower in (("vision_model", image), ("text_model", text)):
    blocks = tower["transformer"]["blocks"]
    for i in range(len(blocks["ln_1"]["scale"])):
      block = jax.tree.map(lambda x, i=i: x[i], blocks)
      out |= _block(f"{name}.encoder.layers.{i}", block)
  return out | _pooling("vision_model.head", image["pooling"])


def _block(name: str, block: Any) -> dict[str, np.ndarray]:
  out = _norm(f"{name}.layer_norm1", block["ln_1"]) | _norm(f"{name}.layer_norm2", block["ln_2"])
  width, qkv = len(block["ln_1"]["scale"]), block["attention"]["qkv"]
  for i, part in enumerate("qkv"):
    out[f"{name}.self_attn.{part}_proj.weight"] = qkv["kernel"][:, i].reshape(width, width).T
    out[f"{name}.self_attn.{part}_proj.bias"] = qkv["bias"][i].reshape(width)
  out[f"{name}.self_attn.out_proj.weight"] = (
    block["attention"]["out"]["kernel"].reshape(width, width).T
  )
  out[f"{name}.self_attn.out_proj.bias"] = block["attention"]["out"]["bias"]
  return out | _mlp(f"{name}.mlp", block["mlp"])


def _pooling(name: str, pooling: Any) -> dict[str, np.ndarray]:
  width = len(pooling["probe"])
  q, kv, out = pooling["q"], pooling["kv"], pooling["out"]
  kernels = [q["kernel"], kv["kernel"][:, 0], kv["kernel"][:, 1]]
  biases = [q["bias"], *kv["bias"]]
  return {
    f"{name}.probe": pooling["probe"][None, None],
    f"{name}.attention.in_proj_weight": np.concatenate([k.reshape(width, -1).T for k in kernels]),
    f"{name}.attention.in_proj_bias": np.concatenate([b.reshape(-1) for b in biases]),
    f"{name}.attention.out_proj.weight": out["kernel"].reshape(width, width).T,
    f"{name}.attention.out_proj.bias": out["bias"],
    **_norm(f"{name}.layernorm", pooling["ln"]),
    **_mlp(f"{name}.mlp", pooling["mlp"]),
  }


def _mlp(name: str, mlp: Any) -> dict[str, np.ndarray]:
  return {
    f"{name}.fc1.weight": mlp["fc"]["kernel"].T,
    f"{name}.fc1.bias": mlp["fc"]["bias"],
    f"{name}.fc2.weight": mlp["proj"]["kernel"].T,
    f"{name}.fc2.bias": mlp["proj"]["bias"],
  }


def _norm(name: str, norm: Any) -> dict[str, np.ndarray]:
  return {f"{name}.weight": norm["scale"], f"{name}.bias": norm["bias"]}


def main() -> None:
  outputs = hugging_face_outputs(TINY, random_params(TINY, seed=0), *random_inputs(TINY, seed=1))
  import transformers

  source = f"transformers {transformers.__version__}, SiglipModel, float32 on CPU"
  lists = {name: value.astype(float).round(7).tolist() for name, value in outputs.items()}
  lines = ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in lists.items())
  text = f'{{\n "source": {json.dumps(source)},\n{lines}\n}}\n'
  metrics.write_atomically(PATH, text)
  print(f"{PATH}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
  main()
