"""ECO over stock optimizers: each one's gap to its own run with master weights.

Naive removal tells how much of a gap there is to close. In FP8 the optimizers' best learning rates
make updates large beside the grid, so that little is lost; INT4's grid is coarse enough to tell.

What to expect: an error that is injected comes back over about 1 / (1 − β) steps, whichever the
optimizer, because the rule divides by the optimizer's own derivative, and stored weights are then
where rounding the weights of plain training would put them (`grid`), whatever β. So gaps to master
weights should be alike, and none. Naive removal's noise is Δ times the mean |update|, of which
gradient noise makes √((1 − β) / (1 + β)): a smaller β should cost it, and it alone.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from eco_optax.training import methods
from experiments.studies import sweep
from experiments.studies.storage import FORMATS
from experiments.studies.sweep import Run

SEEDS = (0, 1, 2)
# Where three do not tell: seeds of sgd differ by five times as much as those of adamw.
MORE_SEEDS = {("sgd", "FP8"): tuple(range(9))}
METHODS = {
  methods.BY_NAME[name].family: methods.BY_NAME[name] for name in ("mw_sr", "eco_sr", "naive_sr")
}
_TUNED_IN = "FP8"

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
  "adamw, b1 0.5": _ADAPTIVE,
}
_B1 = {"adamw, b1 0.5": 0.5}  # Where it is not the config's.
_DECAY = 0.1 * 2e-3  # Learning rate × decoupled weight decay, of all.


def _seeds(optimizer: str, format: str) -> tuple[int, ...]:
  return MORE_SEEDS.get((optimizer, format), SEEDS)


def _name(optimizer: str, method: str, format: str, rate: float, seed: int) -> str:
  return f"{optimizer}, {method}, {format}, lr {rate:g}, seed {seed}"


def _names(rows: Mapping[str, Any], optimizer: str, method: str, format: str) -> list[str]:
  """Of the runs at the best learning rate, one per seed, finished or not."""
  rate = best(rows, optimizer) or math.nan
  return [_name(optimizer, method, format, rate, seed) for seed in _seeds(optimizer, format)]


def best(rows: Mapping[str, Any], optimizer: str) -> float | None:
  """The rate at which master weights do best with seed 0; None until all have been tried."""
  names = [_name(optimizer, "master weights", _TUNED_IN, rate, 0) for rate in RATES[optimizer]]
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
    Master weights at every rate; then, where the best is known, all methods and formats there.
  """
  wanted = [
    (optimizer, "master weights", _TUNED_IN, rate, 0)
    for optimizer, rates in RATES.items()
    for rate in rates
  ]
  for method in METHODS:
    for format in FORMATS:
      for optimizer in RATES:
        if (rate := best(rows, optimizer)) is not None:
          seeds = _seeds(optimizer, format)
          wanted += [(optimizer, method, format, rate, seed) for seed in seeds]
  return [
    Run(
      _name(optimizer, method, format, rate, seed),
      {
        **METHODS[method].changes,
        **FORMATS[format],
        "optimizer.name": optimizer.split(",")[0],
        "optimizer.learning_rate": rate,
        "optimizer.weight_decay": _DECAY / rate,
        "seed": seed,
        "steps": steps // 2,
      }
      | ({"optimizer.b1": _B1[optimizer]} if optimizer in _B1 else {}),
    )
    for optimizer, method, format, rate, seed in dict.fromkeys(wanted)
  ]


def table(rows: Mapping[str, Any]) -> str:
  """What came out, in Markdown; differences are paired by seed, with their standard errors."""
  lines = []
  for format in FORMATS:
    lines += [
      "",
      f"| optimizer, {format} + SR | peak rate | bytes | master weights | ECO"
      " | against master weights | naive | against master weights |",
      "|---" * 8 + "|",
    ]
    for optimizer in RATES:
      rate = best(rows, optimizer)
      master, eco, naive = (_names(rows, optimizer, method, format) for method in METHODS)
      used = f"{sweep.used_bytes(rows, master)} / {sweep.used_bytes(rows, eco)}"
      cells = [optimizer, f"{rate:g}" if rate else "–", used]
      cells += [sweep.compared(rows, master, master)[0]]
      cells += [*sweep.compared(rows, eco, master), *sweep.compared(rows, naive, master)]
      lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines[1:]) + "\n"


def plot(rows: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Draws each optimizer's gaps, one point per seed (optimizers.png)."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(len(FORMATS), figsize=(8, 6.5), layout="constrained", sharex=True)
  for ax, format in zip(axes, FORMATS, strict=True):
    gaps = [0.0]
    for j, method in enumerate(list(METHODS)[1:]):
      points = [
        (i + 0.2 * (j - 0.5), own - reference)
        for i, optimizer in enumerate(RATES)
        for own, reference in zip(
          sweep.losses(rows, _names(rows, optimizer, method, format)),
          sweep.losses(rows, _names(rows, optimizer, "master weights", format)),
          strict=True,
        )
        if own is not None and reference is not None and math.isfinite(own - reference)
      ]
      if points:
        ax.plot(*zip(*points, strict=True), "o", color=f"C{j}", alpha=0.7, label=method)
        gaps += [gap for _, gap in points]
    ax.axhline(0, color="0.7", lw=1, zorder=0)
    ax.set_xticks(range(len(RATES)), [name.replace(", ", "\n") for name in RATES])
    ax.set(title=f"{format}, stochastic rounding")
    ax.set_yscale("symlog", linthresh=0.1)  # Linear to there: one optimizer may be far off.
    ticks = (-0.1, -0.05, 0, 0.05, 0.1, 0.5)
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_ylim(min(-0.1, 1.3 * min(gaps)), max(0.1, 1.3 * max(gaps)))
    ax.grid(alpha=0.25, axis="y")
  axes[0].legend(frameon=False)
  figure.supylabel("against master weights (validation loss, nats per byte)")
  figure.savefig(folder / "optimizers.png", dpi=140)
  plt.close(figure)
