"""How other frameworks lay out a weight, and how we do: functions and their inverses.

Queries, keys and values are one array [D, 3, H, K] here (H heads of width K); PyTorch keeps dense
layers as [out, in], and its packed attention as [3 * D, D].
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Arrays = list[np.ndarray]


class Layout(NamedTuple):
  """How theirs is laid out as ours, and back."""

  to_ours: Callable[[Arrays], Arrays]
  to_theirs: Callable[[Arrays], Arrays]


def one(
  to_ours: Callable[[np.ndarray], np.ndarray], to_theirs: Callable[[np.ndarray], np.ndarray]
) -> Layout:
  return Layout(lambda x: [to_ours(x[0])], lambda x: [to_theirs(x[0])])


SAME = one(lambda x: x, lambda x: x)
DENSE = one(np.transpose, np.transpose)  # [out, in] there, [in, out] here
CONVOLUTION = one(  # [out, in, height, width] there, [height, width, in, out] here
  lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)
SCALAR = one(lambda x: x.reshape(()), lambda x: x)
SCALAR_1 = one(lambda x: x.reshape(()), lambda x: x.reshape(1))
FIRST = one(lambda x: x[0], lambda x: x[None])  # [1, S, D] there, [S, D] here
PROBE = one(lambda x: x.reshape(-1), lambda x: x.reshape(1, 1, -1))


def patches(patch: int) -> Layout:
  """[D, 3, P, P] <-> [P * P * 3, D]."""
  return one(
    lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    lambda x: x.reshape(patch, patch, -1, x.shape[-1]).transpose(3, 2, 0, 1),
  )


def split(heads: int) -> Layout:
  """A dense layer into heads: [H * K, D] <-> [D, H, K]."""
  return one(lambda x: x.T.reshape(x.shape[1], heads, -1), lambda x: x.reshape(x.shape[0], -1).T)


def split_bias(heads: int) -> Layout:
  return one(lambda x: x.reshape(heads, -1), lambda x: x.reshape(-1))


def merge(heads: int) -> Layout:
  """A dense layer out of heads: [D, H * K] <-> [H, K, D]."""
  return one(lambda x: x.T.reshape(heads, -1, x.shape[0]), lambda x: x.reshape(-1, x.shape[-1]).T)


def qkv(heads: int) -> Layout:
  """Queries, keys, values: [3 * D, D], or three of [D, D], <-> [D, 3, H, K]."""

  def to_ours(x: Arrays) -> Arrays:
    rows = np.concatenate(x) if len(x) > 1 else x[0]
    return [rows.T.reshape(rows.shape[1], 3, heads, -1)]

  return Layout(to_ours, lambda x: [x[0].reshape(x[0].shape[0], -1).T])


def qkv_bias(heads: int) -> Layout:
  def to_ours(x: Arrays) -> Arrays:
    return [(np.concatenate(x) if len(x) > 1 else x[0]).reshape(3, heads, -1)]

  return Layout(to_ours, lambda x: [x[0].reshape(-1)])


def apart(layout: Layout) -> Layout:
  """The same with queries, keys and values in three arrays there."""
  return Layout(layout.to_ours, lambda x: np.split(layout.to_theirs(x)[0], 3))


def q_and_kv(layout: Layout, axis: int) -> Layout:
  """The same with queries apart from keys and values here: `axis` is that of the three."""

  def to_ours(x: Arrays) -> Arrays:
    q, kv = np.split(layout.to_ours(x)[0], [1], axis)
    return [q.squeeze(axis), kv]

  def to_theirs(x: Arrays) -> Arrays:
    return layout.to_theirs([np.concatenate([np.expand_dims(x[0], axis), x[1]], axis)])

  return Layout(to_ours, to_theirs)


def stacked(axis: int) -> Layout:
  """Three arrays there, stacked on `axis` here."""
  return Layout(
    lambda x: [np.stack(x, axis)],
    lambda x: [part.squeeze(axis) for part in np.split(x[0], 3, axis)],
  )
