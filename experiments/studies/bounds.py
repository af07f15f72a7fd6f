"""The bounds of `eco_optax.theory` on a small network with packed FP8 weights."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import eco_optax as eco
from eco_optax import rounding as rounding_lib
from eco_optax import theory
from eco_optax.training import report


class Problem(NamedTuple):
  """A non-convex loss whose constants hold everywhere, not only where a run comes."""

  loss: Callable[[Any], jax.Array]  # By chain.
  smoothness: float  # L
  gradient: float  # G
  inputs: int
  hidden: int


def network(inputs: int = 8, hidden: int = 8, examples: int = 64, seed: int = 0) -> Problem:
  r"""A network of one hidden layer, fitted to another of the same kind, so that f* = 0.

  .. math:: f(W) = \frac1n \sum_i \tfrac12 (v^T \tanh(W^T x_i) - y_i)^2

  The output weights v = ±1/√k are fixed, so that a residual is at most R = ‖v‖₁ + max|y|. With λ
  the largest eigenvalue of XᵀX/n, |tanh'| ≤ 1 and |tanh''| ≤ 4/(3√3), everywhere

  .. math::
    L = \lambda \left(\|v\|^2 + R \max|v| \frac{4}{3\sqrt3}\right), \quad
    G = \sqrt\lambda\, R\, \|v\|

  Args:
    inputs: d.
    hidden: k.
    examples: n.
    seed: of examples and teacher.

  Returns:
    The problem; its parameters are {"w": (chains, d, k)}.
  """
  generator = np.random.default_rng(seed)
  x = generator.standard_normal((examples, inputs)) / math.sqrt(inputs)
  v = np.resize([1.0, -1.0], hidden) / math.sqrt(hidden)
  y = np.tanh(x @ generator.standard_normal((inputs, hidden))) @ v

  largest = float(np.linalg.eigvalsh(x.T @ x / examples)[-1])
  norm, residual = float(np.linalg.norm(v)), float(np.abs(v).sum() + np.abs(y).max())
  bend = residual * float(np.abs(v).max()) * 4 / (3 * math.sqrt(3))
  x_NxD, v_K, y_N = (jnp.asarray(array, jnp.float32) for array in (x, v, y))

  def loss(params: Any) -> jax.Array:
    hidden_CxNxK = jnp.tanh(jnp.einsum("nd,cdk->cnk", x_NxD, params["w"]))
    return jnp.mean(jnp.square(hidden_CxNxK @ v_K - y_N) / 2, axis=-1)

  return Problem(
    loss, largest * (norm**2 + bend), math.sqrt(largest) * residual * norm, inputs, hidden
  )


Rounding = Literal["nearest", "stochastic"]


class Setting(NamedTuple):
  """How the network is trained."""

  rounding: Rounding
  learning_rate: float  # η
  beta: float


_ROUNDINGS: tuple[Rounding, ...] = ("stochastic", "nearest")
SETTINGS = tuple(
  Setting(rounding, rate, beta)
  for rounding in _ROUNDINGS
  for beta in (0.5, 0.9)
  for rate in (3e-3, 1e-2, 3e-2, 1e-1)
)
SMALL_SETTINGS = tuple(Setting(rounding, 3e-2, 0.9) for rounding in _ROUNDINGS)


def _square(x_CxDxK: jax.Array) -> jax.Array:
  return jnp.sum(jnp.square(x_CxDxK), axis=(1, 2))


def measure(
  problem: Problem, setting: Setting, steps: int, chains: int, seed: int = 0
) -> dict[str, Any]:
  """Trains packed FP8 weights with ECO and holds what happens against the bounds.

  L, G and f* are the problem's own and hold everywhere. σ² and δ² are the largest sum over weights
  of (ulp/2)², where ulp is the spacing of the grid at a stored weight: neither the variance of
  stochastic rounding nor the square of nearest rounding's error exceeds it. The largest is over all
  that the run visits.

  The bounds for stochastic rounding are on expectations, which means over chains estimate; those
  for nearest rounding hold for each chain; the worst chain counts.

  Args:
    problem: to fit.
    setting: rounding, learning rate and momentum.
    steps: T.
    chains: independent starts.
    seed: of starts and rounding.

  Returns:
    A row: the setting, the constants, and squares of norms beside their bounds. `gradient` is the
    mean over steps, for which the bound on the smallest holds too; `momentum` and `error` are the
    largest of all steps.
  """
  rounding, learning_rate, beta = setting
  shape = (chains, problem.inputs, problem.hidden)
  params = eco.quantize({"w": jax.random.normal(jax.random.key(seed), shape)}, eco.FP8)
  tx = eco.diagnostics.watch(
    theory.sgdm(learning_rate, beta), eco.quantize_params(rounding=rounding, seed=seed)
  )

  def seen(grads: Any, params: Any, state: Any) -> dict[str, jax.Array]:
    w = params["w"]
    ulp = w.apply_scale(rounding_lib.grid_step(w.codes.astype(jnp.float32), w.format.dtype))
    return {
      "gradient": _square(grads["w"]),
      "momentum": _square(state.inner.inner[0].ema["w"]),
      "error": _square(state.error["w"]),
      "largest_error": _square(ulp / 2),
    }

  total = lambda params: jnp.sum(problem.loss(params))
  series_TxC = theory.simulate(tx, total, params, steps, seen)
  series_TxC = {name: np.asarray(x, np.float64) for name, x in series_TxC.items()}
  gap_C = np.asarray(problem.loss(eco.dequantize(params)), np.float64)  # f* = 0.
  largest_error = float(series_TxC["largest_error"].max())

  if rounding == "stochastic":
    momentum_bound = lambda variance: theory.momentum_bound(
      learning_rate, beta, problem.gradient, variance
    )
    largest = lambda x_TxC: float(x_TxC.mean(1).max())
  else:
    momentum_bound = lambda square: theory.nearest_momentum_bound(
      learning_rate, beta, problem.gradient, math.sqrt(square)
    )
    largest = lambda x_TxC: float(x_TxC.max())
  error = largest(series_TxC["error"])

  def bound(gap: float, steps: float = steps, error: float = largest_error) -> float:
    return theory.gradient_bound(
      gap, steps, learning_rate, beta, problem.smoothness, momentum_bound(error)
    )

  chosen = list(range(chains))
  if rounding == "nearest":
    mean_C = series_TxC["gradient"].mean(0)
    chosen = [int(np.argmax(mean_C / np.array([bound(gap) for gap in gap_C])))]
  gradient_T, gap = series_TxC["gradient"][:, chosen].mean(1), float(gap_C[chosen].mean())
  row: dict[str, Any] = {
    **setting._asdict(),
    "steps": steps,
    "chains": chains,
    "seed": seed,
    "smoothness": problem.smoothness,
    "gradient_limit": problem.gradient,
    "gap": gap,
    "error_bound": largest_error,
    "error": error,
    "gradient": float(gradient_T.mean()),
    "smallest_gradient": float(gradient_T.min()),
    "start_gradient": float(gradient_T[0]),
    "gradient_bound": bound(gap),
    "gradient_floor": bound(gap, math.inf),
    "gradient_bound_of_measured_error": bound(gap, error=error),
    "momentum": largest(series_TxC["momentum"]),
    "momentum_bound": momentum_bound(largest_error),
  }
  return row | {
    "gradient_ratio": row["gradient"] / row["gradient_bound"],
    "momentum_ratio": row["momentum"] / row["momentum_bound"],
  }


def study(
  settings: Iterable[Setting] = SETTINGS,
  steps: int = 20_000,
  chains: int = 64,
  show: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
  """`measure` for each setting."""
  problem, rows = network(), []
  for setting in settings:
    rows.append(measure(problem, setting, steps, chains))
    show("  " + table(rows[-1:]).splitlines()[-1])
  return rows


def failures(rows: list[dict[str, Any]]) -> list[str]:
  """What exceeds its bound."""
  return [
    f"{row['rounding']}, η {row['learning_rate']:g}, β {row['beta']:g}: {name} {row[name]:.4g}"
    f" exceeds {row[name + '_bound']:.4g}"
    for row in rows
    for name in ("gradient", "momentum", "error")
    if not row[name] <= row[name + "_bound"]
  ]


def table(rows: list[dict[str, Any]]) -> str:
  """The rows as a Markdown table, below a line that says what they have in common."""
  first = rows[0]
  lines = [
    f"{first['chains']} networks, T = {first['steps']:,}, L = {first['smoothness']:.3f},"
    f" G² = {first['gradient_limit'] ** 2:.2f}, f* = 0. A bound above G² says nothing.",
    "",
    "| rounding | β | η | mean ‖∇f‖² | smallest | its bound | as T → ∞ | with measured ‖e‖²"
    " | mean / bound | largest ‖m‖² | its bound | ratio | largest ‖e‖² | its bound |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  numbers = (
    "gradient", "smallest_gradient", "gradient_bound", "gradient_floor",
    "gradient_bound_of_measured_error", "gradient_ratio", "momentum", "momentum_bound",
    "momentum_ratio", "error", "error_bound",
  )  # fmt: skip
  lines += [
    f"| {row['rounding']} | {row['beta']:g} | {row['learning_rate']:g} | "
    + " | ".join(f"{row[name]:.2g}" for name in numbers)
    + " |"
    for row in rows
  ]
  return "\n".join(lines) + "\n"


def run(out: pathlib.Path, small: bool = False) -> list[str]:
  """Runs the study and writes bounds.json and bounds.md.

  Args:
    out: the folder to write to.
    small: whether two settings and short runs are enough.

  Returns:
    What does not hold.
  """
  rows = study(SMALL_SETTINGS, 1000, 16) if small else study()
  figures = report.describe_machine() | {"rows": rows}
  (out / "bounds.json").write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
  (out / "bounds.md").write_text(table(rows))
  return failures(rows)
