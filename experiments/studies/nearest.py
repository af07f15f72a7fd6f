"""What may be done for rounding to nearest: where the memory-free rule stands still, and remedies.

An update u ≪ Δ, half a step of the grid, is lost by rounding to nearest unless it is remembered.
Master weights sum updates and move after Δ/u steps. The memory-free rule has one number to hold
both the debt and the velocity. In a step that moves no weight, the error is the whole proposal,
e = −η m̃, which the rule turns into m = m̃ + (1 − 1/β) e / η = m̃ / β: the next m̃ is this one plus
(1 − β) g. So the debt grows by η (1 − β) g per step, 1 − β of what master weights add.
Once a weight moves it keeps pace, since m is then left at 0.44 of a step of the grid for β = 0.9;
at a turn of the gradient that is undone, again 1/(1 − β) times slower than with master weights.
What follows from that, and is tried here:

- a smaller β narrows the dead zone, as 1/(1 − β), and costs what momentum is good for;
- a schedule changes how long updates are too small, not the dead zone itself; one that decays to
  zero leaves but its last steps to pay in, and the rule bounds what these may pay;
- grids that do not move (scales of powers of two) lose nothing when a scale changes, and are
  coarser by half a bit on average;
- dither before rounding to nearest is stochastic rounding, if it is drawn anew at each step; a
  fixed one moves each weight's thresholds and leaves its dead zone as wide, so it is not tried;
- two numbers in the same bytes: a bfloat16 momentum and a 16-bit residual are master weights.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from eco_optax.training import methods
from eco_optax.training.methods import Moments
from experiments import figures
from experiments.studies import sweep
from experiments.studies.sweep import Run

SEEDS = (0, 1, 2)
LEARNING_RATE = 2e-4  # Low: most updates are far below the grid's spacing.

_MASTER = methods.BY_NAME["mw_rtn"]
_AWARE = methods.BY_NAME["eco_rtn"].changes
_PAPER = methods.METHODS["ECO + RTN, paper's rule"].changes

# What they change in the config; the first is what the others are held against.
RULES: dict[str, dict[str, Any]] = {
  "master weights": _MASTER.changes,
  "naive": methods.BY_NAME["naive_rtn"].changes,
  "paper's rule": _PAPER,
  "schedule-aware rule": _AWARE,
  "schedule-aware, b1 0.8": _AWARE | {"optimizer.b1": 0.8},
  "schedule-aware, b1 0.5": _AWARE | {"optimizer.b1": 0.5},
  "master weights, b1 0.5": _MASTER.changes | {"optimizer.b1": 0.5},
  "schedule-aware, warm-up from 1×": _AWARE | {"optimizer.start_fraction": 1.0},
  "schedule-aware, warm-up of half the run": _AWARE | {"optimizer.warmup_fraction": 0.5},
  "schedule-aware, flat after warm-up": _AWARE | {"optimizer.end_fraction": 1.0},
  "master weights, flat after warm-up": _MASTER.changes | {"optimizer.end_fraction": 1.0},
  "schedule-aware, decay to zero": _AWARE | {"optimizer.end_fraction": 0.0},
  "paper's rule, decay to zero": _PAPER | {"optimizer.end_fraction": 0.0},
  "master weights, decay to zero": _MASTER.changes | {"optimizer.end_fraction": 0.0},
  "schedule-aware, scales of powers of two": _AWARE | {"format": "FP8_POWER_OF_TWO"},
  "schedule-aware, stochastic in the last tenth": methods.BY_NAME["eco_rtn"]
  .but("", stochastic_after=0.9)
  .changes,
  "stochastic throughout": methods.BY_NAME["eco_sr"].changes,
  "bfloat16 momentum, int16 residual": _MASTER.but(
    "", residual="int16", moments=Moments("bfloat16", "float32")
  ).changes,
  "FP8 moments, int8 residual": methods.METHODS["int8 residual + RTN, FP8 moments"].changes,
}


def _names(rule: str) -> list[str]:
  return [f"{rule}, seed {seed}" for seed in SEEDS]


def runs(rows: Mapping[str, Any], steps: int) -> list[Run]:
  """All runs, of half so many steps, one seed after another, whatever `rows` are finished."""
  del rows
  own = {"format": "FP8", "optimizer.learning_rate": LEARNING_RATE, "steps": steps // 2}
  return [
    Run(_names(rule)[i], own | changes | {"seed": seed})
    for i, seed in enumerate(SEEDS)
    for rule, changes in RULES.items()
  ]


def table(rows: Mapping[str, Any]) -> str:
  """What came out, in Markdown; differences are paired by seed, with their standard errors."""
  first = next(iter(RULES))
  lines = [
    f"| round to nearest, FP8, peak {LEARNING_RATE:g} | bytes per parameter | validation loss"
    f" | against {first} |",
    "|---|---|---|---|",
  ]
  for rule in RULES:
    cells = [rule, sweep.used_bytes(rows, _names(rule))]
    cells += sweep.compared(rows, _names(rule), _names(first))
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def _color(changes: Mapping[str, Any]) -> str:
  method, residual = methods.BY_NAME[changes["method"]], changes.get("residual", "float32")
  return figures.color(method.but("", residual=residual))


def plot(rows: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Draws each rule's difference to master weights: seeds, mean, two errors (nearest.png)."""
  plt = figures.pyplot()
  figure, ax = plt.subplots(figsize=(9, 6), layout="constrained")
  first = next(iter(RULES))
  gaps = {rule: figures.paired(rows, _names(rule), _names(first)) for rule in RULES}
  figures.band(ax, figures.noise(gaps.values()), "x")
  figures.dots(ax, gaps, colors={rule: _color(changes) for rule, changes in RULES.items()})
  ax.set_xlabel(f"validation loss minus {first} with the usual schedule (nats per byte)")
  ax.set_title(f"FP8 weights rounded to nearest, peak learning rate {LEARNING_RATE:g}")
  figures.legend(ax, loc="upper left")
  figures.save(figure, folder / "nearest.png")
