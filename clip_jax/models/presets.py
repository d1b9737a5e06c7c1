"""The published models as configs, and the families people use beside them.

Source: Tables 19 and 20; details of openai/CLIP model.py.
"""

from clip_jax.config import Model, Text, Vision

_BASE_TEXT = Text(width=512, heads=8)
_LARGE_TEXT = Text(width=768, heads=12)


def _resnet(
  blocks: tuple[int, ...], resolution: int, width: int, text: Text, embed_dim: int
) -> Model:
  vision = Vision(resolution, 32, width=width, layers=0, heads=width // 2, blocks=blocks)
  return Model(vision, text, embed_dim)


RN50 = _resnet((3, 4, 6, 3), 224, 64, _BASE_TEXT, 1024)
RN101 = _resnet((3, 4, 23, 3), 224, 64, _BASE_TEXT, 512)
RN50X4 = _resnet((4, 6, 10, 6), 288, 80, Text(width=640, heads=10), 640)
RN50X16 = _resnet((6, 8, 18, 8), 384, 96, _LARGE_TEXT, 768)
RN50X64 = _resnet((3, 15, 36, 10), 448, 128, Text(width=1024, heads=16), 1024)

VIT_B_32 = Model(Vision(224, 32, width=768, layers=12, heads=12), _BASE_TEXT, 512)
VIT_B_16 = Model(Vision(224, 16, width=768, layers=12, heads=12), _BASE_TEXT, 512)
VIT_L_14 = Model(Vision(224, 14, width=1024, layers=24, heads=16), _LARGE_TEXT, 768)
VIT_L_14_336 = Model(Vision(336, 14, width=1024, layers=24, heads=16), _LARGE_TEXT, 768)

PUBLISHED = {
  "RN50": RN50,
  "RN101": RN101,
  "RN50x4": RN50X4,
  "RN50x16": RN50X16,
  "RN50x64": RN50X64,
  "ViT-B/32": VIT_B_32,
  "ViT-B/16": VIT_B_16,
  "ViT-L/14": VIT_L_14,
  "ViT-L/14@336px": VIT_L_14_336,
}

# LAION's larger models, with the exact GELU. Source: open_clip model_configs/ViT-H-14.json,
# ViT-bigG-14.json (its mlp_ratio is 4.9231).
VIT_H_14 = Model(
  Vision(224, 14, width=1280, layers=32, heads=16),
  Text(width=1024, layers=24, heads=16),
  1024,
  activation="gelu",
)
VIT_BIGG_14 = Model(
  Vision(224, 14, width=1664, layers=48, heads=16, mlp_width=8192),
  Text(width=1280, layers=32, heads=20),
  1280,
  activation="gelu",
)

LAION = {"ViT-H/14": VIT_H_14, "ViT-bigG/14": VIT_BIGG_14}


def _siglip(
  resolution: int, patch: int, width: int, layers: int, heads: int, mlp_width: int = 0
) -> Model:
  """Both towers of one size. Source: big_vision configs, google/siglip-* config.json."""
  return Model(
    Vision(
      resolution,
      patch,
      width=width,
      layers=layers,
      heads=heads,
      mlp_width=mlp_width,
      pooling="map",
    ),
    Text(64, 32000, width, layers, heads, mlp_width, pooling="last"),
    width,
    activation="gelu_tanh",
    norm_epsilon=1e-6,
    loss="sigmoid",
  )


SIGLIP_B_16 = _siglip(224, 16, width=768, layers=12, heads=12)
SIGLIP_B_16_256 = _siglip(256, 16, width=768, layers=12, heads=12)
SIGLIP_L_16_256 = _siglip(256, 16, width=1024, layers=24, heads=16)
SIGLIP_SO400M_14_384 = _siglip(384, 14, width=1152, layers=27, heads=16, mlp_width=4304)

SIGLIP = {
  "SigLIP-B/16-224": SIGLIP_B_16,
  "SigLIP-B/16-256": SIGLIP_B_16_256,
  "SigLIP-L/16-256": SIGLIP_L_16_256,
  "SigLIP-So400m/14-384": SIGLIP_SO400M_14_384,
}
