"""The paper's seven runs at its smallest size, with its batches and settings, for fewer steps."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from eco_optax.training import methods
from experiments import figures
from experiments.studies import sweep
from experiments.studies.sweep import Run

# The paper's own first.
LEARNING_RATES = (1.2e-3, 2.4e-3)
METHODS = {method.short: method for method in methods.BY_NAME.values()}
BASELINE = methods.BY_NAME["bf16_mw"].short
# Losses after 3B tokens of C4 by `config.method`, from the paper's table of 30M parameters.
PAPER = {
  "bf16_mw": 3.3238,
  "mw_rtn": 3.3248,
  "mw_sr": 3.3309,
  "naive_rtn": math.inf,
  "naive_sr": 3.4008,
  "eco_rtn": 3.3640,
  "eco_sr": 3.3317,
}


def _name(method: str, rate: float) -> str:
  return f"{method}, lr {rate:g}"


def runs(rows: Mapping[str, Any], steps: int) -> list[Run]:
  """Every method at the paper's learning rate, then at the others."""
  del rows, steps
  return [
    Run(_name(label, rate), method.changes | {"optimizer.learning_rate": rate})
    for rate in LEARNING_RATES
    for label, method in METHODS.items()
  ]


def best(rows: Mapping[str, Any], method: str) -> str:
  """The name of a method's finished run with the lowest loss."""
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
  for label, method in METHODS.items():
    names = [_name(label, rate) for rate in LEARNING_RATES]
    cells = [label, sweep.used_bytes(rows, names)]
    cells += [sweep.compared(rows, [name], [name])[0] for name in names]
    cells.append(sweep.compared(rows, [best(rows, label)], [best(rows, BASELINE)])[1])
    gap = PAPER[method.name] - PAPER[METHODS[BASELINE].name]
    cells.append(f"{gap:+.4f}" if math.isfinite(gap) else "diverged")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def plot(rows: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Draws training at each method's best learning rate, and less the baseline's (scale.png)."""
  plt = figures.pyplot()
  figure, (whole, gaps) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
  curve = lambda label: dict(rows.get(best(rows, label), {}).get("training_curve", ()))
  reference = curve(BASELINE)
  for label, method in METHODS.items():
    own = curve(label)
    if not own:
      continue
    style = {
      "color": "black" if label == BASELINE else figures.color(method),
      "ls": "--" if method.rounding == "nearest" else "-",
      "lw": 1.6,
    }
    whole.plot(own.keys(), own.values(), label=label, **style)
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
