"""INT4 fine-tuning of a tiny DeepSeek-MoE, end to end.

It is pretrained in FP8 without master weights, exported, read again, quantized to INT4 with one
scale per tensor, and fine-tuned on chats with master weights and without.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from eco_optax.training import evaluation, export, loop, methods
from experiments import figures
from experiments.studies import sweep
from experiments.studies.sweep import Run

LEARNING_RATES = (3e-4, 1e-3)
BEFORE = "INT4 before fine-tuning"
METHODS = {method.short: method for method in methods.BY_NAME.values() if method.rounding}
BASELINE = methods.BY_NAME["mw_rtn"].short
BASE_STEPS = 400


def base(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
  """The folder of the pretrained checkpoint, made if it is not there.

  Args:
    config: of the fine-tuning, whose model it is.
    workdir: of the study.
  """
  folder = workdir / "base_exported"
  if not folder.exists():
    own = ml_collections.ConfigDict(config.to_dict())
    own.method, own.format, own.activation_format = "eco_sr", "FP8", "FP8_TOKEN"
    own.data.path, own.steps, own.accumulation = "data/packages_1k", BASE_STEPS, 1
    own.optimizer.update(learning_rate=2e-3, start_fraction=0.01, warmup_fraction=0.1)
    own.optimizer.update(end_fraction=0.1, weight_decay=0.1)
    own.evaluate_every = own.checkpoint.every = 200
    loop.train(own, workdir / "base")
    export.export(evaluation.load(workdir / "base"), folder, "deepseek")
  return folder


def _name(method: str, rate: float) -> str:
  return f"{method}, lr {rate:g}"


def runs(rows: Mapping[str, Any], steps: int) -> list[Run]:
  """The rounded weights before fine-tuning, and every method at every learning rate."""
  del rows
  still = methods.BY_NAME["naive_rtn"].changes | {"steps": 1, "evaluate_every": 1}
  found = [Run(BEFORE, still | {"optimizer.learning_rate": 1e-30})]
  for rate in LEARNING_RATES:
    for label, method in METHODS.items():
      own = {"optimizer.learning_rate": rate, "steps": steps}
      found.append(Run(_name(label, rate), method.changes | own))
  return found


def table(rows: Mapping[str, Any]) -> str:
  """What came out, in Markdown."""
  before = sweep.losses(rows, [BEFORE])[0]
  lines = [
    f"| INT4 fine-tuning (before: {'–' if before is None else f'{before:.4f}'})"
    f" | bytes per parameter | {' | '.join(f'lr {rate:g}' for rate in LEARNING_RATES)}"
    " | at its best, against master weights |",
    "|---|---|" + "---|" * len(LEARNING_RATES) + "---|",
  ]
  for method in METHODS:
    names = [_name(method, rate) for rate in LEARNING_RATES]
    cells = [method, sweep.used_bytes(rows, names)]
    cells += ["–" if x is None else f"{x:.4f}" for x in sweep.losses(rows, names)]
    against = gap(rows, method)
    cells.append("–" if against is None else f"{against:+.4f}")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def gap(rows: Mapping[str, Any], method: str) -> float | None:
  """A method's best loss minus the baseline's; None until all their runs are finished."""
  own, reference = (
    sweep.losses(rows, [_name(each, rate) for rate in LEARNING_RATES])
    for each in (method, BASELINE)
  )
  finished = [x for x in own + reference if x is not None]
  if len(finished) < len(own + reference):
    return None
  return min(finished[: len(own)]) - min(finished[len(own) :])


def plot(rows: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Draws the loss of each method at each learning rate (finetune.png)."""
  plt = figures.pyplot()
  figure, ax = plt.subplots(figsize=(8, 4.6), layout="constrained")
  for label, method in METHODS.items():
    points = [
      (rate, loss)
      for rate in LEARNING_RATES
      if (loss := sweep.losses(rows, [_name(label, rate)])[0]) is not None
    ]
    if points:
      style = "o--" if method.rounding == "nearest" else "o-"
      ax.plot(*zip(*points, strict=True), style, label=label, color=figures.color(method))
  ax.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss (nats per token)")
  ax.set_xticks(LEARNING_RATES, [f"{rate:g}" for rate in LEARNING_RATES])
  ax.minorticks_off()
  ax.set_title("INT4 fine-tuning of a tiny DeepSeek-MoE on chats, one run each")
  ax.grid(alpha=0.3)
  figure.legend(loc="outside right center", frameon=False)
  figures.save(figure, folder / "finetune.png")
