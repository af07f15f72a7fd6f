"""What all figures share: colors by family of method, the noise of seeds, rows of dots."""

from __future__ import annotations

import math
import pathlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eco_optax.training import methods
from eco_optax.training.methods import Method
from experiments.studies import sweep

MASTER, RESIDUAL, NAIVE, ECO = "0.3", "tab:green", "tab:red", "tab:blue"
NOISE = "within the noise of the seeds"


def pyplot() -> Any:
  """Matplotlib's pyplot, drawing to files."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
  return plt


def save(figure: Any, path: pathlib.Path) -> None:
  """Writes a figure and forgets it."""
  figure.savefig(path, dpi=140)
  pyplot().close(figure)


def color(method: Method) -> str:
  """One color for each family: naive rounding, ECO, small residuals, master weights."""
  if method.family == methods.MASTER_WEIGHTS and method.residual != "float32":
    return RESIDUAL
  return {methods.NAIVE: NAIVE, methods.ECO: ECO}.get(method.family, MASTER)


def paired(rows: Mapping[str, Any], names: Sequence[str], references: Sequence[str]) -> list[float]:
  """Differences of validation loss to reference runs, one for each seed that both have."""
  pairs = zip(sweep.losses(rows, names), sweep.losses(rows, references), strict=True)
  found = [own - other for own, other in pairs if own is not None and other is not None]
  return [gap for gap in found if math.isfinite(gap)]


def noise(gaps: Iterable[Sequence[float]]) -> float:
  """Two standard errors of a mean difference: the median over methods; 0 without seeds."""
  errors = [sweep.mean_and_error(own)[1] for own in gaps if len(set(own)) > 1]
  return 2 * statistics.median(errors) if errors else 0.0


def band(ax: Any, width: float, across: str = "y") -> None:
  """Shades the differences that seeds do not tell from none."""
  line, span = (ax.axhline, ax.axhspan) if across == "y" else (ax.axvline, ax.axvspan)
  if width:
    text = f"{NOISE} (±{width:.3f})"
    span(-width, width, color="0.5", alpha=0.18, lw=0, zorder=0, label=text)
  line(0, color="0.4", lw=1, zorder=0)


def legend(ax: Any, **options: Any) -> None:
  """A legend of what has a label, if anything has."""
  if ax.get_legend_handles_labels()[0]:
    ax.legend(frameon=False, **options)


def dots(
  ax: Any,
  rows: Mapping[str, Sequence[float]],
  *,
  colors: Mapping[str, str],
  limits: tuple[float, float] | None = None,
  shift: float = 0.0,
) -> None:
  """Draws a row of dots for each method: its seeds, their mean and two standard errors.

  Args:
    ax: where.
    rows: by label, a value for each seed.
    colors: by label.
    limits: of the axis; a mean beyond is written at the edge.
    shift: down, so that two calls do not draw upon each other.
  """
  for i, (label, values) in enumerate(rows.items()):
    if not values:
      continue
    own, place = colors[label], i + shift
    mean, error, _ = sweep.mean_and_error(values)
    if limits and mean > limits[1]:
      ax.text(limits[1], place, f"{mean:+.2f} → ", ha="right", va="center", color=own, fontsize=9)
      continue
    ax.plot(values, [place] * len(values), "o", ms=4, mew=0, alpha=0.35, color=own, clip_on=True)
    spread = 0.0 if math.isnan(error) else 2 * error
    ax.errorbar(mean, place, xerr=spread, fmt="o", ms=6, capsize=3, color=own)
  ax.set_yticks(range(len(rows)), list(rows))
  ax.set_ylim(len(rows) - 0.4, -1.4)  # With room for a legend above.
  if limits:
    ax.set_xlim(*limits)
  ax.grid(alpha=0.25, axis="x")
