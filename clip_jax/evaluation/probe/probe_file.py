"""A linear probe that was trained, kept on disk by what it was trained on."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from clip_jax import hosts
from clip_jax.evaluation.probe import logistic

_FORMAT = "probe/2"  # part of every key: raise it when the same key would mean another classifier
_DIGEST = 32  # bytes of a sha256


@dataclasses.dataclass(frozen=True)
class Probe:
  """A classifier, the lambda that was chosen for it, and which images it was not trained on."""

  fit: logistic.Fit
  lambda_: float
  left_out: tuple[str, ...] = ()  # where the records stand whose image cannot be decoded


def kept(
  folder: str | os.PathLike[str] | None,
  trained_on: str,
  classes: int,
  learn: Callable[[], Probe],
) -> Probe:
  """What `learn` gives, or gave once for the same.

  Every process must call it with the same arguments; what process 0 finds decides for all of them,
  and it alone writes. `folder` None: nothing is kept. A full disk loses no result: it is a warning.
  Args: trained_on, tells the features, their labels and the metric of the search apart from others.
  """
  first = folder is not None and jax.process_index() == 0
  key = hashlib.sha256(json.dumps([_FORMAT, trained_on, classes]).encode()).hexdigest()
  path = pathlib.Path(folder or "") / f"{key}.probe"
  data = hosts.from_first(path.read_bytes() if first and path.is_file() else b"")
  found = _parsed(data, classes)
  if found is None:
    found = learn()
    if first:
      _save(path, found)
  return found


def _parsed(data: bytes, classes: int) -> Probe | None:
  """The probe in a file: the sha256 of what follows, and an npz. None of anything else."""
  if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
    return None
  try:
    with np.load(io.BytesIO(data[_DIGEST:]), allow_pickle=False) as arrays:
      fit = logistic.Fit(
        arrays["weights_DC"],
        arrays["bias_C"],
        float(arrays["objective"]),
        int(arrays["iterations"]),
        bool(arrays["converged"]),
      )
      left_out = tuple(map(str, json.loads(str(arrays["left_out"]))))
      found = Probe(fit, float(arrays["lambda"]), left_out)
  except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile):
    return None
  return found if fit.weights_DC.shape[1:] == fit.bias_C.shape == (classes,) else None


def _save(path: pathlib.Path, probe: Probe) -> None:
  fit, buffer = probe.fit, io.BytesIO()
  own: dict[str, Any] = {"lambda": probe.lambda_, "left_out": json.dumps(probe.left_out)}
  np.savez(
    buffer,
    **own,
    weights_DC=fit.weights_DC,
    bias_C=fit.bias_C,
    objective=fit.objective,
    iterations=fit.iterations,
    converged=fit.converged,
  )
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = buffer.getvalue()
    temporary.write_bytes(hashlib.sha256(content).digest() + content)
    os.replace(temporary, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink()
    warnings.warn(
      f"{path.parent}: a trained probe is not kept ({error.strerror}); it will be trained again",
      RuntimeWarning,
      stacklevel=3,
    )
