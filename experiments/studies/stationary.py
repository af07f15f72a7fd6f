"""The package's transforms under white noise, beside the closed forms of `eco_optax.theory`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from eco_optax import theory
from eco_optax.training import report


class Point(NamedTuple):
  """A setting of SGD with momentum on f(x) = L x²/2."""

  learning_rate: float  # η
  beta: float
  curvature: float  # L


BETAS = (0.5, 0.9, 0.99)
_RATES = {1.0: (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0), 4.0: (1e-3, 1e-2, 1e-1, 1.0)}
POINTS = tuple(
  Point(rate, beta, curvature)
  for beta in BETAS
  for curvature, rates in _RATES.items()
  for rate in rates
)
SMALL_POINTS = (Point(1e-1, 0.9, 1.0), Point(1.0, 0.5, 4.0), Point(3e-2, 0.9, 4.0))

TOLERANCE = 0.02  # Of E[x̂²], which the whole 99% interval must keep.
_T99 = 2.626  # Student's t of 99 degrees of freedom: 100 groups of chains.
# Standard errors that a closed form may be off; beyond by chance in one of 50,000 points.
_SPREAD = 4.5


def study(
  points: Iterable[Point] = POINTS,
  chains: int = 200_000,
  seed: int = 0,
  show: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
  """Simulates every method at every point.

  Args:
    points: settings.
    chains: per simulation.
    seed: of the first simulation; each has its own.
    show: told of every row.

  Returns:
    A row per method and point.
  """
  rows: list[dict[str, Any]] = []
  for point in points:
    for method in theory.METHODS:
      number = seed + len(rows)
      found = theory.simulate_stationary(method, *point, chains=chains, seed=number)
      wanted = theory.stationary_second_moment(method, *point)
      rows.append(
        {"method": method}
        | point._asdict()
        | {
          "closed_form": wanted,
          "simulated": found.value,
          "deviation": found.value / wanted - 1,
          "half_interval": _T99 * found.standard_error / wanted,
          "standard_errors": (found.value - wanted) / found.standard_error,
          "chains": chains,
          "burn_in": found.burn_in,
          "steps": found.steps,
          "seed": number,
        }
      )
      show(_line(rows[-1]))
  return rows


def _line(row: dict[str, Any]) -> str:
  return (
    f"  {row['method']:<15} η {row['learning_rate']:<6g} β {row['beta']:<5g}"
    f" L {row['curvature']:<3g} closed form {row['closed_form']:10.5g}"
    f"  simulated {row['simulated']:10.5g}"
    f"  {row['deviation']:+.3%} ± {row['half_interval']:.3%}"
  )


def failures(rows: list[dict[str, Any]], tolerance: float = TOLERANCE) -> list[str]:
  """The rows whose 99% interval leaves the tolerance, or whose closed form is off."""
  return [
    _line(row)
    for row in rows
    if abs(row["deviation"]) + row["half_interval"] > tolerance
    or abs(row["standard_errors"]) > _SPREAD
  ]


def summary(rows: list[dict[str, Any]]) -> str:
  """The rows as a Markdown table: by method, how far simulations and closed forms are apart."""
  lines = [
    "| method | points | η | largest deviation | largest 99% half-interval"
    " | largest deviation in standard errors | their root mean square |",
    "|---|---|---|---|---|---|---|",
  ]
  for method in theory.METHODS:
    own = [row for row in rows if row["method"] == method]
    column = lambda name, own=own: np.abs([row[name] for row in own])
    rates = column("learning_rate")
    lines.append(
      f"| {method} | {len(own)} | {rates.min():g} – {rates.max():g}"
      f" | {column('deviation').max():.2%} | {column('half_interval').max():.2%}"
      f" | {column('standard_errors').max():.2f}"
      f" | {np.sqrt(np.mean(column('standard_errors') ** 2)):.2f} |"
    )
  return "\n".join(lines) + "\n"


STYLES = {
  "naive": ("naive removal", "C3", "s"),
  "eco": ("ECO", "C0", "o"),
  "master_weights": ("master weights", "C2", "D"),
  "eco_keep_error": ("ECO, last error kept", "k", "+"),
}


def plot(rows: list[dict[str, Any]], out: pathlib.Path) -> None:
  """Draws closed forms as lines and simulations as points.

  Args:
    rows: of `study`.
    out: the PNG to write.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  betas = sorted({row["beta"] for row in rows})
  figure, panels = plt.subplots(
    1, len(betas), figsize=(3.4 * len(betas) + 0.6, 3.9), sharey=True, squeeze=False,
    layout="constrained",
  )  # fmt: skip
  low, high = 6e-4, 8.0
  for axes, beta in zip(panels[0], betas, strict=True):
    limit = theory.stability_limit(beta, 1.0)
    line = np.geomspace(low, min(high, 0.97 * limit), 400)
    for method, (label, color, marker) in STYLES.items():
      own = [row for row in rows if row["method"] == method and row["beta"] == beta]
      if method != "eco_keep_error":  # Its line coincides with master weights.
        axes.plot(line, theory.stationary_second_moment(method, line, beta, 1.0), color, lw=1.4)
      axes.plot(
        [row["learning_rate"] * row["curvature"] for row in own],
        [row["simulated"] for row in own],
        marker, color=color, label=label,
        ms=8 if marker == "+" else 5, mfc="none" if marker != "+" else color, mew=1.2,
      )  # fmt: skip
    small = dict(textcoords="offset points", fontsize=8, color="0.35")
    for level, text, above in ((1 / (1 - beta**2), "$1/(1-\\beta^2)$", 3), (1.0, "$1$", -10)):
      axes.axhline(level, color="0.6", lw=0.8, ls=":")
      axes.annotate(text, (low, level), (3, above), **small)
    axes.plot(line, 1 / (2 * line), color="0.6", lw=0.8, ls=":", zorder=0)
    axes.annotate("$1/(2\\eta L)$", (2e-2, 1 / 4e-2), (-3, -2), ha="right", va="top", **small)
    if limit < high:
      axes.axvline(limit, color="0.6", lw=0.8, ls="--")
      axes.annotate("stability", (limit, 900), (-9, 0), rotation=90, va="top", **small)
    axes.set(
      xscale="log", yscale="log", xlim=(low, high), ylim=(0.6, 1500),
      xlabel="$\\eta L$", title=f"$\\beta = {beta:g}$",
    )  # fmt: skip
    axes.grid(alpha=0.2)
  panels[0][0].set_ylabel("$E[\\hat x^2]\\,/\\,\\sigma^2$")
  panels[0][-1].legend(frameon=False, fontsize=8, loc="upper right")
  figure.suptitle("Where a weight settles: closed forms (lines) and simulations (markers)")
  figure.savefig(out, dpi=140)
  plt.close(figure)


def run(out: pathlib.Path, small: bool = False) -> list[str]:
  """Runs the study and writes stationary.json, stationary.md and stationary.png.

  Args:
    out: the folder to write to.
    small: whether a few points and chains are enough, and three times the tolerance with them.

  Returns:
    What does not hold.
  """
  rows = study(SMALL_POINTS, 20_000) if small else study()
  figures = report.describe_machine() | {"rows": rows}
  (out / "stationary.json").write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
  (out / "stationary.md").write_text(summary(rows))
  plot(rows, out / "stationary.png")
  return failures(rows, 3 * TOLERANCE if small else TOLERANCE)
