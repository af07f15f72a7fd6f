"""Stochastic rounding on a real grid, where its noise is not white: what that does to each method.

The theory of `stationary` takes rounding for noise of one variance at every step. On a grid of
spacing Δ a weight that is stored on a point and proposed an update u moves by Δ with probability
|u|/Δ: the variance is Δ|u|, and vanishes with the update. On f(d) = d'Hd / 2, d = θ̂ − θ°, with
small learning rates η and gradient noise of variance s² that means:

- Naive removal: d'Hd changes by −2η‖Hd‖² + ηΔ Σ H_ii |m_i| a step on average, so that it settles at
  E‖∇f‖² = (Δ/2) Σ H_ii E|m_i|. No learning rate is in that: it neither grows as 1/η, as under white
  noise, nor falls. It is high where the momentum is full of gradient noise, and low where many
  weights share a gradient: then the errors of some are made good by others.
- ECO's weights follow their targets, θ = θ̂ + D m: from θ̂ they move by
  (1 − B)(θ − θ̂) on average, and of the two points around θ each is taken as often as if θ itself
  had been rounded. So ECO settles where master weights with stochastic rounding do, at
  E‖∇f‖² = Σ H_ij² Δ²/6, and η s²/2 Σ H_ii of gradient noise; not at the 1/(1 − β²) times as much
  that white noise would make.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax import theory
from eco_optax.formats import Format
from eco_optax.quantized_array import quantize
from eco_optax.training import report
from eco_optax.transforms.quantize_params import quantize_params
from experiments.studies import stationary

BETA = 0.9
SIZE = 32  # Weights of a problem.
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SMALL_RATES = (1e-2, 1e-1)
METHODS = ("master_weights", "naive", "eco")


class Problem(NamedTuple):
  """A quadratic of `SIZE` weights on a grid of spacing 1; its largest curvature is 1."""

  coupled: bool  # One gradient for all weights; else each has its own.
  gradient_noise: float  # s


PROBLEMS = {
  "apart": Problem(False, 0.0),
  "apart, gradient noise": Problem(False, 3.0),
  "coupled": Problem(True, 0.0),
}
TITLES = {
  "apart": "weights with gradients of their own",
  "apart, gradient noise": "the same with gradient noise",
  "coupled": "32 weights share one gradient",
}
TOLERANCE = 0.05  # Of predictions, which are limits: at the smallest rate terms of order η remain.
_SPREAD = 4  # Standard errors; beyond by chance in one row of 16,000.
_MEMORY = 8  # Times 1 / η steps to settle in, and as many to average over.
_GROUPS = 20


def measure(
  problem: Problem, method: str, learning_rate: float, copies: int = 400, seed: int = 0
) -> dict[str, float]:
  """Trains many copies of a problem in INT8 with stochastic rounding, until they settle.

  Args:
    problem: what to train on.
    method: a name of `METHODS`.
    learning_rate: η.
    copies: independent ones, a multiple of 20.
    seed: of optima, roundings and gradient noise.

  Returns:
    The mean of ‖∇f‖² over copies and steps, its standard error, and what theory has for it.
  """
  shape, (direction_key, optimum_key) = (copies, SIZE), jax.random.split(jax.random.key(seed))
  direction = jax.random.normal(direction_key, shape)
  direction /= jnp.linalg.norm(direction, axis=1, keepdims=True)
  optimum = jax.random.uniform(optimum_key, shape, minval=-20.0, maxval=20.0)
  # One more row holds a weight that sets the scale, 1, and has no gradient.
  start = jnp.zeros((copies + 1, SIZE)).at[-1, 0].set(127.0)
  diagonal = jnp.square(direction) if problem.coupled else jnp.ones(shape)  # H_ii

  def gradient(weights: jax.Array) -> jax.Array:
    distance = weights[:-1] - optimum
    if problem.coupled:  # H projects on the direction.
      return direction * jnp.sum(direction * distance, axis=1, keepdims=True)
    return distance

  def loss(weights: jax.Array) -> jax.Array:
    return jnp.sum((weights[:-1] - optimum) * gradient(weights)) / 2

  inner = optax.chain(
    optax.add_noise(problem.gradient_noise**2, 0.0, seed + 1),
    optax.stateless(lambda updates, _: updates.at[-1].set(0)),
    theory.sgdm(learning_rate, BETA),
  )
  tx = theory.METHODS[method](inner, quantize_params(rounding="stochastic", seed=seed))
  settle = math.ceil(_MEMORY / learning_rate)

  def seen(grads: Any, weights: Any, state: Any) -> tuple[jax.Array, jax.Array]:
    del grads
    momentum = optax.tree_utils.tree_get(state, "ema")
    squared = jnp.sum(jnp.square(gradient(weights.dequantize())), axis=1)
    return (
      jnp.mean(squared.reshape(_GROUPS, -1), axis=1),
      jnp.mean(jnp.sum(diagonal * jnp.abs(momentum[:-1]), axis=1)),
    )

  packed = quantize(start, Format("int8", "tensor"))
  squared, momenta = theory.simulate(tx, loss, packed, 2 * settle, seen)
  groups = np.asarray(squared, np.float64)[settle:].mean(axis=0)
  size = 1 if problem.coupled else SIZE  # The trace of H, and of H².
  rounded = size / 6
  wanted = rounded + learning_rate * problem.gradient_noise**2 / 2 * size
  if method == "naive":
    wanted = float(np.asarray(momenta, np.float64)[settle:].mean()) / 2
  return {
    "squared_gradient": float(groups.mean()),
    "standard_error": float(groups.std(ddof=1) / math.sqrt(_GROUPS)),
    "predicted": wanted,
    "rounded_optimum": rounded,
  }


def study(
  rates: Sequence[float] = RATES,
  copies: int = 400,
  seed: int = 0,
  show: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
  """Measures every problem with every method at every learning rate.

  Args:
    rates: learning rates.
    copies: of each problem.
    seed: of the first; each has its own.
    show: told of every row.

  Returns:
    A row per problem, method and rate.
  """
  rows: list[dict[str, Any]] = []
  for name, problem in PROBLEMS.items():
    for method in METHODS:
      for rate in rates:
        setting = {"problem": name, "method": method, "learning_rate": rate, "beta": BETA}
        number = seed + len(rows)
        found = measure(problem, method, rate, copies, number)
        rows.append(setting | found | {"copies": copies, "seed": number})
        show(_line(rows[-1]))
  return rows


def _line(row: dict[str, Any]) -> str:
  return (
    f"  {row['problem']:<22} {row['method']:<15} η {row['learning_rate']:<6g}"
    f" predicted {row['predicted']:8.4g}  measured {row['squared_gradient']:8.4g}"
    f" ± {row['standard_error']:.2g}"
  )


def failures(rows: list[dict[str, Any]], tolerance: float = TOLERANCE) -> list[str]:
  """The rows of the smallest learning rate that miss the prediction for small rates."""
  smallest = min(row["learning_rate"] for row in rows)
  return [
    _line(row)
    for row in rows
    if row["learning_rate"] == smallest
    and abs(row["squared_gradient"] - row["predicted"])
    > tolerance * row["predicted"] + _SPREAD * row["standard_error"]
  ]


def table(rows: list[dict[str, Any]]) -> str:
  """E‖∇f‖² in units of what rounding the optimum stochastically makes, in Markdown."""
  rates = sorted({row["learning_rate"] for row in rows})
  lines = [
    f"| weights | method | {' | '.join(f'η = {rate:g}' for rate in rates)}"
    f" | predicted at {rates[0]:g} | white noise at {rates[0]:g} |",
    "|---" * (len(rates) + 4) + "|",
  ]
  for problem in PROBLEMS:
    for method in METHODS:
      own = {
        row["learning_rate"]: row
        for row in rows
        if (row["problem"], row["method"]) == (problem, method)
      }
      of = lambda row, key: f"{row[key] / row['rounded_optimum']:.3g}"
      error = lambda row: f"{row['standard_error'] / row['rounded_optimum']:.1g}"
      white = theory.stationary_second_moment(method, rates[0], BETA, 1.0)
      cells = [f"{of(own[rate], 'squared_gradient')} ± {error(own[rate])}" for rate in rates]
      cells += [of(own[rates[0]], "predicted"), f"{white:.3g}"]
      lines.append(f"| {problem} | {stationary.STYLES[method][0]} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], out: pathlib.Path) -> None:
  """Draws measurements, predictions for small rates, and white noise.

  Args:
    rows: of `study`.
    out: the PNG to write.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, panels = plt.subplots(
    1, len(PROBLEMS), figsize=(11, 3.9), sharey=True, layout="constrained"
  )
  for axes, problem in zip(panels, PROBLEMS, strict=True):
    for method, (label, color, marker) in stationary.STYLES.items():
      if method not in METHODS:
        continue
      own = [row for row in rows if (row["problem"], row["method"]) == (problem, method)]
      own.sort(key=lambda row: row["learning_rate"])
      rates = np.array([row["learning_rate"] for row in own])
      share = lambda key, own=own: [row[key] / row["rounded_optimum"] for row in own]
      axes.plot(
        rates,
        share("squared_gradient"),
        marker,
        color=color,
        label=label,
        mfc="none",
        ms=10 if method == "eco" else 5,
      )
      axes.plot(rates, share("predicted"), color=color, lw=1.2)
      line = np.geomspace(rates[0], rates[-1], 100)
      white = theory.stationary_second_moment(method, line, BETA, 1.0)
      axes.plot(line, white, color=color, lw=1, ls=":", alpha=0.7)
    axes.set(xscale="log", yscale="log", xlabel="learning rate", title=TITLES[problem])
    axes.grid(alpha=0.2)
  panels[0].set_ylabel("$E\\|\\nabla f\\|^2$ relative to the rounded optimum")
  panels[0].plot([], [], color="0.4", lw=1.2, label="predicted on a grid, small rates")
  panels[0].plot([], [], color="0.4", lw=1, ls=":", label="under white noise")
  panels[0].legend(frameon=False, fontsize=8, loc="upper right")
  figure.savefig(out, dpi=140)
  plt.close(figure)


def run(out: pathlib.Path, small: bool = False) -> list[str]:
  """Runs the study and writes grid.json, grid.md and grid.png.

  Args:
    out: the folder to write to.
    small: whether two larger rates and few copies are enough, and three times the tolerance.

  Returns:
    What does not hold.
  """
  rows = study(SMALL_RATES, 40) if small else study()
  figures = report.describe_machine() | {"rows": rows}
  (out / "grid.json").write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
  (out / "grid.md").write_text(table(rows))
  plot(rows, out / "grid.png")
  return failures(rows, 3 * TOLERANCE if small else TOLERANCE)
