"""CLIP (Radford et al. 2021, arXiv 2103.00020) in JAX and Flax.

The map, in the order in which data walks:

  config           every knob of a run          cli         `clip-jax VERB`
  data/            records -> batches by step   train       the loop
  models/          the specification of CLIP    train_step  (state, batch) -> (state, metrics)
  losses, sharding, optimizer                   checkpoint, metrics, summary
  inference        weights in use               evaluation/ zero-shot, retrieval, the report
  interop/         other frameworks' weights: `load`

The dimension key, a suffix on arrays of rank 2 or more:

  B global batch    b local batch    H heads       L text tokens    S image tokens    D width
  K head width      F mlp width      E embedding   V vocabulary     C classes         T templates
  P patch           R resolution     N any number (of images, texts, records)

`image_BE` is the embeddings of a global batch of images, `logits_bB` a device's rows of the logits.
"""

from typing import Any

__all__ = ["load", "tokenize"]


def __getattr__(name: str) -> Any:
  """The public API, imported when it is used: `import clip_jax` alone costs nothing."""
  if name == "load":
    from clip_jax.interop.sources import load

    return load
  if name == "tokenize":
    from clip_jax.data.tokenizer import tokenize

    return tokenize
  raise AttributeError(f"module 'clip_jax' has no attribute {name!r}")
