"""Clips of the gradient: by its norm, by that of the step before, and of each layer by its own.

Gradient release never has the whole gradient, and has to go backwards twice to know its norm. The
other two clips cost no second pass. Released steps with the exact clip store the same codes as
ordinary ones (tests/training/test_released_step.py), so that one run stands for both.
"""

from __future__ import annotations

import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

from experiments import figures
from experiments.studies import sweep
from experiments.studies.sweep import Run

SEEDS = (0, 1, 2)
MAX_NORMS = (1.0,)

# What they change in the config; the first is what the others are held against.
CLIPS: dict[str, dict[str, Any]] = {
  "exact": {"optimizer.clip": "exact"},
  "previous": {"optimizer.clip": "previous"},
  "layer, released": {"optimizer.clip": "layer", "release": True},
}


def _names(clip: str, max_norm: float) -> list[str]:
  return [f"{clip}, max_norm {max_norm:g}, seed {seed}" for seed in SEEDS]


def runs(rows: Mapping[str, Any], steps: int) -> list[Run]:
  """All runs, of half so many steps, one seed after another, whatever `rows` are finished."""
  del rows
  return [
    Run(
      _names(clip, max_norm)[i],
      changes | {"optimizer.max_norm": max_norm, "seed": seed, "steps": steps // 2},
    )
    for i, seed in enumerate(SEEDS)
    for max_norm in MAX_NORMS
    for clip, changes in CLIPS.items()
  ]


def table(rows: Mapping[str, Any]) -> str:
  """What came out, in Markdown; differences are paired by seed, with their standard errors."""
  first = next(iter(CLIPS))
  lines = []
  for max_norm in MAX_NORMS:
    lines += [
      "",
      f"| clip to a norm of {max_norm:g} | bytes per parameter | validation loss"
      f" | against {first} |",
      "|---|---|---|---|",
    ]
    for clip in CLIPS:
      names, references = (_names(x, max_norm) for x in (clip, first))
      cells = [clip, sweep.used_bytes(rows, names), *sweep.compared(rows, names, references)]
      lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines[1:]) + "\n"


def plot(rows: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Draws each clip's training loss minus the exact one's, the mean over seeds (clips.png)."""
  plt = figures.pyplot()
  size = (6 * len(MAX_NORMS), 4)
  figure, axes = plt.subplots(
    1, len(MAX_NORMS), figsize=size, layout="constrained", sharey=True, squeeze=False
  )
  first, *others = CLIPS
  for ax, max_norm in zip(axes[0], MAX_NORMS, strict=True):
    for clip in others:
      gaps: dict[int, list[float]] = {}
      for name, reference in zip(_names(clip, max_norm), _names(first, max_norm), strict=True):
        own, other = (dict(rows.get(x, {}).get("training_curve", ())) for x in (name, reference))
        for step in own.keys() & other.keys():
          gaps.setdefault(step, []).append(own[step] - other[step])
      if gaps:
        steps = sorted(gaps)
        ax.plot(steps, [statistics.fmean(gaps[step]) for step in steps], lw=1.2, label=clip)
    ax.axhline(0, color="0.4", lw=1, zorder=0)
    ax.set(title=f"clipped to a norm of {max_norm:g}", xlabel="step")
    figures.legend(ax, fontsize=9)
  axes[0][0].set_ylabel(f"training loss minus {first}'s (nats per byte)")
  figures.save(figure, folder / "clips.png")
