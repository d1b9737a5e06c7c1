"""The linear probe's search for lambda beside scikit-learn's: seconds, objective, accuracy.

  python tools/bench/linear_probe.py [--examples 10000 --width 1024 --classes 100] [--threads 1]

scikit-learn walks the paper's search (`linear_probe.sweep`) by its own validation scores; ours fits
the same lambdas in the same order, twice: to the minimum, as the probe does, and until a gradient
is as short as scikit-learn's at its stop (`gradient_tolerance`). Ours includes laying the features
on the device and compiling. scikit-learn gets float32 and --threads threads; it stops at --tol, by
default its own 1e-4, at 1e-7 a few millionths above the minimum: only there do both give the same.

Printed of every lambda: how far each objective is above the least of them (float64), validation
accuracy, iterations, seconds. --optax adds optax.lbfgs on the turned features, scaled for even
probabilities, until it is within 1e-6 of our minimum, or after 600 iterations.

The features are synthetic: the j-th principal variance is 1 / j, that of the class means 1 / j^1.5;
turned at random, off the origin. --features FILE.npz takes real ones ("features" float [N, D],
"labels" int [N]), --features digits the pixels of scikit-learn's. A fifth is for validation.

scikit-learn's threads spin while they wait: with 2 cores and company, two of them took six times as
long as one. Run it on an idle machine, with --threads 1 and 2; the faster counts.
"""

import argparse
import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import threadpoolctl
from jax import lax
from scipy import special
from sklearn import datasets, exceptions, linear_model

from clip_jax import sharding
from clip_jax.evaluation.probe import lbfgs, linear_probe, logistic

_OPTAX_ITERATIONS = 600


@dataclasses.dataclass(frozen=True)
class Fitted:
  weights_DC: np.ndarray
  bias_C: np.ndarray
  iterations: int
  seconds: float


Fitter = Callable[[float], Fitted]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
  parser.add_argument("--examples", type=int, default=10_000)
  parser.add_argument("--width", type=int, default=1024)
  parser.add_argument("--classes", type=int, default=100)
  parser.add_argument("--features", help="an .npz file, or digits")
  parser.add_argument("--lambdas", type=float, nargs="+", help="these in place of the search")
  parser.add_argument("--threads", type=int, default=2, help="scikit-learn's")
  parser.add_argument("--tol", type=float, default=1e-4, help="scikit-learn's; 1e-4 is its own")
  parser.add_argument("--optax", action="store_true")
  options = parser.parse_args()
  train, validation = splits(options)
  classes = int(max(train.labels.max(), validation.labels.max())) + 1
  n, width = train.features_ND.shape
  print(f"{n} x {width} x {classes} classes, and {len(validation.labels)} to validate", flush=True)
  theirs, lambdas = f"scikit-learn, tol {options.tol:g}", options.lambdas
  ways: dict[str, Callable[[], Fitter]] = {
    theirs: lambda: scikit_learn(train, options),
    "ours": lambda: ours(train, classes, 0.0),
    "ours, gradient 1e-4": lambda: ours(train, classes, 1e-4),
  }
  found: dict[str, dict[float, Fitted]] = {}
  seconds = {}
  for name, make in ways.items():
    start = time.perf_counter()
    found[name] = walk(make(), validation, lambdas)
    seconds[name] = time.perf_counter() - start
    lambdas = list(found[name])
    iterations = sum(fit.iterations for fit in found[name].values())
    print(
      f"{name}: {len(lambdas)} lambdas, {iterations} iterations, {seconds[name]:.1f} s; "
      f"{seconds[theirs] / seconds[name]:.2f} times as fast as scikit-learn",
      flush=True,
    )
  report(found, train, validation)
  if options.optax:
    with_optax(train, classes, lambdas or [])


def splits(options: argparse.Namespace) -> tuple[linear_probe.Split, linear_probe.Split]:
  if options.features == "digits":
    pixels, labels = datasets.load_digits(return_X_y=True)
    everything = linear_probe.Split((pixels / 16).astype(np.float32), labels)
  elif options.features:
    with np.load(options.features) as file:
      everything = linear_probe.Split(file["features"].astype(np.float32), file["labels"])
  else:
    n = options.examples + options.examples // 4
    everything = synthetic(n, options.width, options.classes)
  return linear_probe.hold_back(everything)


def synthetic(n: int, width: int, classes: int) -> linear_probe.Split:
  rng, j = np.random.default_rng(0), np.arange(1, width + 1)
  deviation_D = np.sqrt(width / np.sum(1 / j) / j)  # mean variance 1
  axes_DD = np.linalg.qr(rng.normal(size=(width, width)))[0]
  mean_CD = 0.7 * rng.normal(size=(classes, width)) * deviation_D * j**-0.25
  labels = rng.permutation(np.arange(n) % classes)
  features_ND = mean_CD[labels] + rng.normal(size=(n, width)) * deviation_D
  features_ND = features_ND @ axes_DD + 0.5 * rng.normal(size=width)
  return linear_probe.Split(features_ND.astype(np.float32), labels)


def walk(
  fitter: Fitter, validation: linear_probe.Split, lambdas: Sequence[float] | None
) -> dict[float, Fitted]:
  found: dict[float, Fitted] = {}

  def score(lambda_: float) -> float:
    found[lambda_] = fitter(lambda_)
    return accuracy(found[lambda_], validation)

  if lambdas:
    for lambda_ in lambdas:
      score(lambda_)
  else:
    linear_probe.sweep(score)
  return found


def ours(train: linear_probe.Split, classes: int, gradient_tolerance: float) -> Fitter:
  jax.clear_caches()  # compiled anew for each way, as in a first probe
  problem = logistic.prepare(train.features_ND, train.labels, classes)
  fits: dict[float, logistic.Fit] = {}

  def fit(lambda_: float) -> Fitted:
    start, before = linear_probe.between(fits, lambda_), time.perf_counter()
    got = logistic.fit(
      problem, lambda_, start, logistic.Stop(gradient_tolerance=gradient_tolerance)
    )
    fits[lambda_] = got
    return Fitted(got.weights_DC, got.bias_C, got.iterations, time.perf_counter() - before)

  return fit


def scikit_learn(train: linear_probe.Split, options: argparse.Namespace) -> Fitter:
  def fit(lambda_: float) -> Fitted:
    model = linear_model.LogisticRegression(C=1 / lambda_, max_iter=1000, tol=options.tol)
    start = time.perf_counter()
    with threadpoolctl.threadpool_limits(options.threads), warnings.catch_warnings():
      warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
      model.fit(train.features_ND, train.labels)
    seconds = time.perf_counter() - start
    return Fitted(model.coef_.T, model.intercept_, int(model.n_iter_[0]), seconds)

  return fit


def report(
  found: dict[str, dict[float, Fitted]],
  train: linear_probe.Split,
  validation: linear_probe.Split,
) -> None:
  for lambda_ in sorted(found["ours"], reverse=True):
    fits = {name: of[lambda_] for name, of in found.items()}
    objectives = {name: objective(fit, train, lambda_) for name, fit in fits.items()}
    least = min(objectives.values())
    line: dict[str, Any] = {"lambda": float(f"{lambda_:.4g}")}
    for name, fit in fits.items():
      line[name] = {
        "objective": f"{objectives[name] / least - 1:+.1e}",
        "accuracy": round(100 * accuracy(fit, validation), 2),
        "iterations": fit.iterations,
        "seconds": round(fit.seconds, 2),
      }
    print(json.dumps(line))


def accuracy(fit: Fitted, split: linear_probe.Split) -> float:
  scores_NC = split.features_ND @ fit.weights_DC + fit.bias_C
  return float(np.mean(np.argmax(scores_NC, axis=1) == split.labels))


def objective(fit: Fitted, train: linear_probe.Split, lambda_: float) -> float:
  """In float64, from the margins of wrong classes over the right one."""
  weights_DC, rows = fit.weights_DC.astype(np.float64), np.arange(len(train.labels))
  wrong_NC = train.features_ND.astype(np.float64) @ weights_DC + fit.bias_C
  wrong_NC -= wrong_NC[rows, train.labels][:, None]
  wrong_NC[rows, train.labels] = -np.inf
  loss_N = np.logaddexp(0, special.logsumexp(wrong_NC, axis=1))
  return float((loss_N.sum() + lambda_ / 2 * np.sum(weights_DC**2)) / len(rows))


def with_optax(train: linear_probe.Split, classes: int, lambdas: Sequence[float]) -> None:
  """Iterations and seconds of both from zeros, ours to its own stop."""
  problem = logistic.prepare(train.features_ND, train.labels, classes, sharding.one_device())
  examples, columns = problem.examples, len(problem.mean_D) + 1
  loss, optimizer = lbfgs.Softmax(examples.target), optax.lbfgs(memory_size=10)

  @jax.custom_vjp
  def mean_loss(theta_AC: jax.Array) -> jax.Array:
    return forward(theta_AC)[0]

  def forward(theta_AC: jax.Array) -> tuple[jax.Array, jax.Array]:
    wrong_NC = loss.margins(lbfgs.dot("na,ac->nc", examples.features_NA, theta_AC))
    loss_N, residual_NC, _ = loss.at(wrong_NC)
    return loss_N @ examples.weight_N, residual_NC * examples.weight_N[:, None]

  def backward(residual_NC: jax.Array, scale: jax.Array) -> tuple[jax.Array]:
    return (scale * lbfgs.dot("na,nc->ac", examples.features_NA, residual_NC),)

  mean_loss.defvjp(forward, backward)

  @jax.jit
  def minimise(decay: jax.Array, target: jax.Array) -> Any:
    decay_A1 = jnp.full((columns, 1), decay).at[-1].set(0)
    scale_A1 = 1 / jnp.sqrt(examples.spread_A1 / classes + decay_A1)

    def value(x_AC: jax.Array) -> jax.Array:
      theta_AC = scale_A1 * x_AC
      return mean_loss(theta_AC) + 0.5 * jnp.sum(decay_A1 * jnp.square(theta_AC))

    value_and_gradient = optax.value_and_grad_from_state(value)

    def advance(carry: Any) -> Any:
      count, x_AC, state, _ = carry
      now, gradient = value_and_gradient(x_AC, state=state)
      step, state = optimizer.update(
        gradient, state, x_AC, value=now, grad=gradient, value_fn=value
      )
      return count + 1, optax.apply_updates(x_AC, step), state, now

    x_AC = jnp.zeros((columns, classes))
    return lax.while_loop(
      lambda carry: (carry[0] < _OPTAX_ITERATIONS) & (carry[3] > target),
      advance,
      (0, x_AC, optimizer.init(x_AC), jnp.float32(jnp.inf)),
    )

  jax.block_until_ready(minimise(jnp.float32(1), jnp.float32(1e9)))
  logistic.fit(problem, 1.0, stop=logistic.Stop(max_iterations=1))
  for lambda_ in lambdas:
    start = time.perf_counter()
    got = logistic.fit(problem, lambda_)
    middle = time.perf_counter()
    decay, target = jnp.float32(lambda_ / problem.count), jnp.float32(got.objective * (1 + 1e-6))
    count, _, _, value = jax.block_until_ready(minimise(decay, target))
    end = time.perf_counter()
    print(
      f"lambda {lambda_:.3g}: ours {got.iterations} iterations, {middle - start:.2f} s; optax "
      f"{int(count)}, {end - middle:.2f} s, {float(value) / got.objective - 1:+.1e}"
    )


if __name__ == "__main__":
  main()
