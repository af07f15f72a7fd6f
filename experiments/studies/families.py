"""ECO against master weights on a small model of each family."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from eco_optax.training import config as config_lib
from eco_optax.training import methods
from experiments import figures
from experiments.studies import sweep
from experiments.studies.sweep import Run

FAMILIES = ("llama_3m", "gemma_3m", "smoe_3m", "deepseek_3m")  # Configs by name.
METHODS = {methods.BY_NAME[name].family: methods.BY_NAME[name] for name in ("mw_sr", "eco_sr")}
SEEDS = (0, 1, 2)


def _name(family: str, method: str, seed: int) -> str:
  return f"{family}, {method}, seed {seed}"


def names(family: str, method: str) -> list[str]:
  """Of a family's runs, one per seed."""
  return [_name(family, method, seed) for seed in SEEDS]


def runs(configs: Mapping[str, ml_collections.ConfigDict]) -> list[Run]:
  """Both methods on every family, a seed after the other.

  Args:
    configs: by name of the family.
  """
  return [
    Run(
      _name(family, method, seed),
      config_lib.flat(configs[family]) | {"nonfinite": "record", "seed": seed} | own.changes,
    )
    for seed in SEEDS
    for family in FAMILIES
    for method, own in METHODS.items()
  ]


def table(rows: Mapping[str, Any]) -> str:
  """What came out, in Markdown; differences are paired by seed."""
  lines = [
    "| config | parameters | quantized | master weights | ECO | gap | seeds"
    " | bytes per quantized parameter |",
    "|---" * 8 + "|",
  ]
  for family in FAMILIES:
    master, eco = (names(family, method) for method in METHODS)
    done = [rows[name] for name in eco if name in rows]
    sizes = [f"{done[0][key]:,}" if done else "–" for key in ("parameters", "quantized_parameters")]
    loss, gap = sweep.compared(rows, eco, master)
    cells = [family, *sizes, sweep.compared(rows, master, master)[0], loss, gap, str(len(done))]
    cells.append(" / ".join(sweep.used_bytes(rows, own) for own in (master, eco)))
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def plot(rows: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Draws each family's losses on held-out text, and ECO's final differences (families.png)."""
  plt = figures.pyplot()
  figure, axes = plt.subplots(
    1, len(FAMILIES) + 1, figsize=(13, 3.6), layout="constrained",
    width_ratios=[1] * len(FAMILIES) + [1.5],
  )  # fmt: skip
  gaps = {}
  for ax, family in zip(axes, FAMILIES, strict=False):
    for method, own in METHODS.items():
      done = [rows[name]["validation_curve"] for name in names(family, method) if name in rows]
      for i, curve in enumerate(curve for curve in done if curve):
        label = None if i else method
        ax.plot(*zip(*curve, strict=True), color=figures.color(own), lw=1, label=label)
    ax.set(title=family, xlabel="step")
    ax.sharey(axes[0])
    ax.grid(alpha=0.3)
    master, eco = (names(family, method) for method in METHODS)
    gaps[family] = figures.paired(rows, eco, master)
  axes[0].set_ylabel("validation loss (nats per byte)")
  axes[0].legend(frameon=False)
  figures.band(axes[-1], figures.noise(gaps.values()), "x")
  figures.dots(axes[-1], gaps, colors=dict.fromkeys(FAMILIES, figures.ECO))
  axes[-1].set(title="after the last step", xlabel="ECO minus master weights")
  figures.legend(axes[-1], fontsize=8, loc="upper left")
  figures.save(figure, folder / "families.png")
