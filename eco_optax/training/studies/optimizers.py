"""ECO over stock optimizers: each one's gap to its own run with master weights.

Naive removal tells how much of a gap there is to close.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from eco_optax.training.studies import sweep
from eco_optax.training.studies.sweep import Run

SEEDS = (0, 1, 2)
METHODS: dict[str, dict[str, Any]] = {
  "master weights": {"method": "mw_sr"},
  "ECO": {"method": "eco_sr"},
  "naive": {"method": "naive_sr"},
}

# Peak learning rates that are tried, each with seed 0 and master weights; none of the best is at
# an end.
_ADAPTIVE = (6e-4, 2e-3, 6e-3)
RATES: dict[str, tuple[float, ...]] = {
  "adamw": _ADAPTIVE,
  "nadamw": _ADAPTIVE,
  "amsgrad": _ADAPTIVE,
  "ademamix": (2e-4, *_ADAPTIVE),  # Its direction is up to three times as long.
  "yogi": (*_ADAPTIVE, 2e-2),  # Its second moment starts above most squared gradients.
  "radam": _ADAPTIVE,
  "sgd": (0.03, 0.1, 0.3, 1.0),
}
_DECAY = 0.1 * 2e-3  # Learning rate × decoupled weight decay, of all.


def _name(optimizer: str, method: str, rate: float, seed: int) -> str:
  return f"{optimizer}, {method}, lr {rate:g}, seed {seed}"


def best(rows: Mapping[str, Any], optimizer: str) -> float | None:
  """The rate at which master weights do best with seed 0; None until all have been tried."""
  names = [_name(optimizer, "master weights", rate, 0) for rate in RATES[optimizer]]
  found = sweep.losses(rows, names)
  if None in found:
    return None
  return min(zip(found, RATES[optimizer], strict=True))[1]  # type: ignore[type-var]


def runs(rows: Mapping[str, Any], steps: int) -> list[Run]:
  """The runs that are wanted once `rows` are finished.

  Args:
    rows: finished runs.
    steps: of the config; all of them take half.

  Returns:
    Master weights at every rate; then, where the best is known, all methods there.
  """
  wanted = [
    (optimizer, "master weights", rate, 0) for optimizer, rates in RATES.items() for rate in rates
  ]
  for seed in SEEDS:
    for optimizer in RATES:
      if (rate := best(rows, optimizer)) is not None:
        wanted += [(optimizer, method, rate, seed) for method in METHODS]
  return [
    Run(
      _name(optimizer, method, rate, seed),
      {
        **METHODS[method],
        "optimizer.name": optimizer,
        "optimizer.learning_rate": rate,
        "optimizer.weight_decay": _DECAY / rate,
        "seed": seed,
        "steps": steps // 2,
      },
    )
    for optimizer, method, rate, seed in dict.fromkeys(wanted)
  ]


def table(rows: Mapping[str, Any]) -> str:
  """What came out, in Markdown; differences are paired by seed, with their standard errors."""
  lines = [
    "| optimizer, FP8 + SR | peak rate | bytes | master weights | ECO | against master weights"
    " | naive | against master weights |",
    "|---" * 8 + "|",
  ]
  for optimizer in RATES:
    rate = best(rows, optimizer)
    master, eco, naive = (
      [_name(optimizer, method, rate or math.nan, seed) for seed in SEEDS] for method in METHODS
    )
    used = f"{sweep.used_bytes(rows, master)} / {sweep.used_bytes(rows, eco)}"
    cells = [optimizer, f"{rate:g}" if rate else "–", used]
    cells += [sweep.compared(rows, master, master)[0], *sweep.compared(rows, eco, master)]
    cells += sweep.compared(rows, naive, master)
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def plot(rows: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Draws each optimizer's gaps, one point per seed (optimizers.png)."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
  compared = list(METHODS)[1:]
  for i, optimizer in enumerate(RATES):
    if (rate := best(rows, optimizer)) is None:
      continue
    master, *others = (
      sweep.losses(rows, [_name(optimizer, method, rate, seed) for seed in SEEDS])
      for method in METHODS
    )
    for j, losses in enumerate(others):
      gaps = [x - y for x, y in zip(losses, master, strict=True) if x is not None and y is not None]
      label = compared[j] if i == 0 else None
      ax.plot([i + 0.2 * (j - 0.5)] * len(gaps), gaps, "o", color=f"C{j}", alpha=0.7, label=label)
  ax.axhline(0, color="0.7", lw=1, zorder=0)
  ax.set_xticks(range(len(RATES)), list(RATES))
  ax.set_ylabel("against master weights\n(validation loss, nats per byte)")
  ax.legend(frameon=False)
  ax.grid(alpha=0.25, axis="y")
  figure.savefig(folder / "optimizers.png", dpi=140)
  plt.close(figure)
