"""The paper's seven runs at its smallest size, with its batches and settings, for fewer steps."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments import figures
from experiments.studies import claims, finetune, sweep
from experiments.studies.sweep import Run

# The paper's own first.
LEARNING_RATES = (1.2e-3, 2.4e-3)
METHODS = {claims.BF16: {"method": "bf16_mw"}} | finetune.METHODS
BASELINE = claims.BF16
# Losses after 3B tokens of C4, from the paper's table of 30M parameters.
PAPER = {
  "BF16 master weights": 3.3238,
  "master weights + RTN": 3.3248,
  "master weights + SR": 3.3309,
  "naive RTN": math.inf,
  "naive SR": 3.4008,
  "ECO + RTN": 3.3640,
  "ECO + SR": 3.3317,
}


def _name(method: str, rate: float) -> str:
  return f"{method}, lr {rate:g}"


def runs(rows: Mapping[str, Any], steps: int) -> list[Run]:
  """Every method at the paper's learning rate, then at the others."""
  del rows, steps
  return [
    Run(_name(method, rate), changes | {"optimizer.learning_rate": rate})
    for rate in LEARNING_RATES
    for method, changes in METHODS.items()
  ]


def best(rows: Mapping[str, Any], method: str) -> str:
  """The name of a method's run with the lowest loss, of those that are finished."""
  names = [_name(method, rate) for rate in LEARNING_RATES]
  losses = [math.inf if loss is None else loss for loss in sweep.losses(rows, names)]
  return names[losses.index(min(losses))]


def table(rows: Mapping[str, Any]) -> str:
  """What came out, in Markdown."""
  rates = " | ".join(f"lr {rate:g}" for rate in LEARNING_RATES)
  lines = [
    f"| method | bytes per parameter | {rates} | at its best, against {BASELINE}"
    " | the paper, 3B tokens |",
    "|---" * (4 + len(LEARNING_RATES)) + "|",
  ]
  for method in METHODS:
    names = [_name(method, rate) for rate in LEARNING_RATES]
    cells = [method, sweep.used_bytes(rows, names)]
    cells += [sweep.compared(rows, [name], [name])[0] for name in names]
    cells.append(sweep.compared(rows, [best(rows, method)], [best(rows, BASELINE)])[1])
    gap = PAPER[method] - PAPER[BASELINE]
    cells.append(f"{gap:+.4f}" if math.isfinite(gap) else "diverged")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def plot(rows: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Draws training at each method's best learning rate, and less the baseline's (scale.png)."""
  plt = figures.pyplot()
  figure, (whole, gaps) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
  curve = lambda method: dict(rows.get(best(rows, method), {}).get("training_curve", ()))
  reference = curve(BASELINE)
  for method in METHODS:
    own = curve(method)
    if not own:
      continue
    style = {
      "color": "black" if method == BASELINE else figures.color(method),
      "ls": "--" if "RTN" in method else "-",
      "lw": 1.6,
    }
    whole.plot(own.keys(), own.values(), label=method, **style)
    shared = [step for step in own if step in reference]
    gaps.plot(shared, [own[step] - reference[step] for step in shared], **style)
  whole.set_ylabel("training loss (nats per token)")
  whole.legend(frameon=False)
  gaps.set_ylabel(f"training loss minus {BASELINE}")
  for ax in (whole, gaps):
    ax.set_xlabel("step of 512 × 512 tokens")
    ax.grid(alpha=0.3)
  figure.suptitle("30M parameters, one run of each method: the noise of seeds was not measured")
  figures.save(figure, folder / "scale.png")
