"""The published models as configs. Source: Table 20."""

from clip_jax.config import Model, Text, Vision

_BASE_TEXT = Text(width=512, heads=8)
_LARGE_TEXT = Text(width=768, heads=12)

VIT_B_32 = Model(Vision(224, 32, width=768, layers=12, heads=12), _BASE_TEXT, 512)
VIT_B_16 = Model(Vision(224, 16, width=768, layers=12, heads=12), _BASE_TEXT, 512)
VIT_L_14 = Model(Vision(224, 14, width=1024, layers=24, heads=16), _LARGE_TEXT, 768)
VIT_L_14_336 = Model(Vision(336, 14, width=1024, layers=24, heads=16), _LARGE_TEXT, 768)

PUBLISHED = {
  "ViT-B/32": VIT_B_32,
  "ViT-B/16": VIT_B_16,
  "ViT-L/14": VIT_L_14,
  "ViT-L/14@336px": VIT_L_14_336,
}
