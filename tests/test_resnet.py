"""The modified ResNet against PyTorch: values, gradients, running statistics; on one device or 8."""

import csv
import dataclasses
import functools
import importlib.util
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import open_clip_train
import pytest
import rich.console
import torch

import clip_jax
from clip_jax import checkpoint, optimizer, sharding, train, train_step
from clip_jax import config as c
from clip_jax.evaluation import tasks
from clip_jax.models import clip, presets, resnet

F = torch.nn.functional
GOLDEN = pathlib.Path(__file__).parent / "golden" / "architectures.csv"
PUBLISHED = {r["model"]: r for r in csv.DictReader(GOLDEN.read_text().splitlines())}
RESNETS = [name for name in presets.PUBLISHED if name.startswith("RN")]

# The last grid is 3 x 3 and the head width 64; stages have one, two and three blocks.
VISION = c.Vision(resolution=96, patch=32, width=16, layers=0, heads=8, blocks=(2, 1, 3, 1))
EMBED = 24


def _encoder(**options):
  return resnet.ModifiedResNet(VISION, EMBED, jnp.dtype("float32"), **options)


def _images(batch: int = 4, side: int = 96) -> np.ndarray:
  return np.random.default_rng(0).normal(size=(batch, side, side, 3)).astype(np.float32)


@functools.cache
def _variables():
  """Random weights and statistics everywhere: no zero scale or unit variance hides a term."""
  variables = jax.jit(_encoder().init)(jax.random.key(0), _images(1))
  rng = np.random.default_rng(1)

  def vary(path, x):
    factor = np.exp(rng.normal(0, 0.3, x.shape)) if path[-1].key == "variance" else 1
    return jnp.asarray(factor * x + (factor is 1) * 0.1 * rng.normal(size=x.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(vary, variables)
