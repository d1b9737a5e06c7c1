"""Our exports in transformers and its own folders here: towers, logits, tokens, pixels."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import clip_jax
from clip_jax import config as c
from clip_jax import inference
from clip_jax.data import images as images_lib
from clip_jax.data import tokenizer as tokenizer_lib
from clip_jax.interop import exports, weights
from clip_jax.models import presets
from tools import golden_siglip

pytestmark = pytest.mark.filterwarnings("default")  # theirs to keep

TINY = c.Model(
  image=c.Vision(40, 8, width=32, layers=2, heads=4, mlp_width=72),
  text=c.Text(11, 49408, width=24, layers=3, heads=3, mlp_width=40),
  embed_dim=20,
)
B32 = presets.PUBLISHED["ViT-B/32"]


def _inputs(model, count=3):
  rng = np.random.default_rng(0)
  side, length = model.image.resolution, model.text.context_length
  image_BRR3 = rng.normal(size=(count, side, side, 3)).astype(np.float32)
  tokens_BL = rng.integers(1, model.text.vocab_size - 2, (count, length)).astype(np.int32)
  tokens_BL[range(count), rng.integers(2, length, count)] = model.text.vocab_size - 1
  return image_BRR3, tokens_BL


def _close(ours, theirs):
  """Embeddings within 1e-5 of their length, which is 1; logits within 1e-4."""
  image_BRR3, tokens_BL = _inputs(ours.config.model)
  image, tokens = torch.tensor(image_BRR3).permute(0, 3, 1, 2), torch.tensor(tokens_BL).long()
  with torch.no_grad():
    out = theirs.eval()(pixel_values=image, input_ids=tokens)
    features_BD = theirs.vision_model(pixel_values=image).pooler_output.numpy()
  np.testing.assert_allclose(ours.image_features(image_BRR3), features_BD, rtol=1e-4, atol=2e-5)
  image_BE, text_BE = ours.encode_image(image_BRR3), ours.encode_text(tokens_BL)
  logits_BB = ours.logit_scale * image_BE @ text_BE.T + float(ours.params.get("logit_bias", 0))
  found = {
    "image": np.abs(image_BE - out.image_embeds.numpy()).max(),
    "text": np.abs(text_BE - out.text_embeds.numpy()).max(),
    "logits": np.abs(logits_BB - out.logits_per_image.numpy()).max(),
  }
  print(type(theirs).__name__, {name: f"{value:.1e}" for name, value in found.items()})
  assert found["image"] < 1e-5
  assert found["text"] < 1e-5
  assert found["logits"] < 1e-4


def _theirs(model, seed=0):
  """transformers' CLIPModel of the same sizes, its weights, biases and gains at random."""

  def tower(encoder):
    return {
      "hidden_size": encoder.width, "intermediate_size": encoder.mlp_width or 4 * encoder.width,
      "num_hidden_layers": encoder.layers, "num_attention_heads": encoder.heads,
      "hidden_act": model.activation,
    }  # fmt: skip

  vocabulary = model.text.vocab_size
  ids = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
  text = {"vocab_size": vocabulary, "max_position_embeddings": model.text.context_length, **ids}
  image = {"image_size": model.image.resolution, "patch_size": model.image.patch}
  torch.manual_seed(seed)
  theirs = transformers.CLIPModel(
    transformers.CLIPConfig(
      text_config=tower(model.text) | text,
      vision_config=tower(model.image) | image,
      projection_dim=model.embed_dim,
    )
  )
  with torch.no_grad():
    for value in theirs.parameters():
      value.add_(0.05 * torch.randn(value.shape))
    theirs.logit_scale.fill_(3.0)
  return theirs.eval()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("shard", [None, "20KB"])
def test_their_folder_here(tmp_path, activation, shard):
  model = dataclasses.replace(TINY, activation=activation)
  theirs = _theirs(model)
  theirs.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
  assert (tmp_path / "model.safetensors.index.json").exists() == bool(shard)
  processor = transformers.CLIPImageProcessor(
    size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}
  )
  processor.save_pretrained(tmp_path)
  ours = clip_jax.load(tmp_path)
  assert ours.config.model == model
  _close(ours, theirs)


def test_vit_b_32_both_ways(tmp_path):
  """The published size: from transformers here, back, and into transformers again."""
  theirs = _theirs(B32)
  theirs.save_pretrained(tmp_path / "theirs")
  transformers.CLIPImageProcessor().save_pretrained(tmp_path / "theirs")
  ours = clip_jax.load(tmp_path / "theirs")
  assert ours.config.model == B32
  _close(ours, theirs)
  exports.export(ours, tmp_path / "ours", "huggingface")
  again = transformers.CLIPModel.from_pretrained(tmp_path / "ours")
  before, after = theirs.state_dict(), again.state_dict()
  assert before.keys() == after.keys()
  for name, value in before.items():
    assert torch.equal(after[name], value), name


def test_siglip_in_transformers(tmp_path):
  params = golden_siglip.random_params(golden_siglip.TINY, seed=2)
  config = c.Config(model=golden_siglip.TINY, preprocess=c.Preprocess(resize="squash"))
  ours = inference.Clip(config, params, None)
  exports.export(ours, tmp_path / "out", "huggingface")
  _close(ours, transformers.SiglipModel.from_pretrained(tmp_path / "out"))


def test_siglip_from_transformers(tmp_path):
  """Their own default sizes, B/16 at 224 pixels."""
  torch.manual_seed(0)
  theirs = transformers.SiglipModel(transformers.SiglipConfig()).eval()
  theirs.save_pretrained(tmp_path)
  transformers.SiglipImageProcessor().save_pretrained(tmp_path)
  ours = clip_jax.load(tmp_path)
  assert ours.config.model == presets.SIGLIP_B_16
  _close(ours, theirs)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  folder = tmp_path_factory.mktemp("exported") / "out"
  params = jax.tree.map(
    lambda s: jax.numpy.full(s.shape, 0.01), weights.abstract_variables(TINY)["params"]
  )
  model = inference.Clip(c.Config(model=TINY), params, tokenizer_lib.original())
  exports.export(model, folder, "huggingface")
  return model, folder


@pytest.mark.parametrize("size", [(51, 83), (83, 51), (40, 40), (23, 31)])
def test_their_processor_gives_our_tokens_and_pixels(exported, size):
  model, folder = exported
  processor = transformers.CLIPProcessor.from_pretrained(folder)
  texts = ["a cat", "it's 2021!", "東京 🚀", "a very long caption " * 5]
  pixels = np.random.default_rng(1).integers(0, 256, (*size, 3)).astype(np.uint8)
  out = processor(
    text=texts,
    images=Image.fromarray(pixels),
    return_tensors="np",
    padding="max_length",
    truncation=True,
  )
  ours_NL = model.tokenizer(texts, 11, truncate=True)
  for ours, theirs in zip(ours_NL, out["input_ids"], strict=True):
    end = ours.argmax() + 1  # after it they repeat the end token, which nothing reads
    np.testing.assert_array_equal(theirs[:end], ours[:end])
  p = model.preprocess
  ready = images_lib.normalise(images_lib.fit(Image.fromarray(pixels), 40)[None], p.mean, p.std)
  np.testing.assert_allclose(out["pixel_values"].transpose(0, 2, 3, 1), ready, atol=1e-5)


def test_the_tokenizer_files_are_the_originals(exported):
  _, folder = exported
  vocabulary = json.loads((folder / "vocab.json").read_text())
  assert len(vocabulary) == 49408
  assert vocabulary["<|endoftext|>"] == 49407
  theirs = transformers.CLIPTokenizer.from_pretrained(folder)
  for text in ("a photo of a cat", "it's 2021, déjà vu!", "東京 🚀"):
    assert theirs(text)["input_ids"][1:-1] == tokenizer_lib.original().encode(text)
