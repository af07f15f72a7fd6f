"""ECO over stock optimizers: each one's gap to its own run with master weights.

Naive removal tells how much of a gap there is to close. In FP8 the optimizers' best learning rates
make updates large beside the grid, so that little is lost; INT4's grid is coarse enough to tell.

What to expect: an error that is injected comes back over about 1 / (1 − β) steps, whichever the
optimizer, because the rule divides by the optimizer's own derivative, and stored weights are then
where rounding the weights of plain training would put them (`grid`), whatever β. So gaps to master
weights should be zero for all. Naive removal's noise is Δ times the mean |update|, to which
gradient noise adds √((1 − β) / (1 + β)): a smaller β should cost it, and it alone.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from eco_optax.training import methods
from experiments import figures
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
  """Draws each optimizer's gaps: seeds, mean, two standard errors (optimizers.png)."""
  plt = figures.pyplot()
  figure, axes = plt.subplots(1, len(FORMATS), figsize=(11, 5), layout="constrained", sharey=True)
  compared = list(METHODS)[1:]
  for ax, format in zip(axes, FORMATS, strict=True):
    gaps = {
      method: {
        optimizer: figures.paired(
          rows,
          _names(rows, optimizer, method, format),
          _names(rows, optimizer, "master weights", format),
        )
        for optimizer in RATES
      }
      for method in compared
    }
    figures.band(ax, figures.noise(own for each in gaps.values() for own in each.values()), "x")
    for i, method in enumerate(compared):
      own = dict.fromkeys(RATES, figures.color(METHODS[method]))
      shift = 0.3 * (i - 0.5)
      figures.dots(ax, gaps[method], limits=(-0.15, 0.15), colors=own, shift=shift)
      ax.plot([], [], "o", color=figures.color(METHODS[method]), label=method)
    ax.set(title=f"{format} weights, stochastic rounding")
    ax.set_xlabel("validation loss minus the optimizer's\nown master weights (nats per byte)")
    figures.legend(ax, fontsize=8, loc="upper left", ncol=3)
  figures.save(figure, folder / "optimizers.png")
