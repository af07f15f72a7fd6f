"""The paper's seven runs and ours beyond them, at several learning rates and seeds: what decides.

Every method has its own best learning rate, as a user would find it; those that decide a claim are
run there with more seeds, and the best without memory, beside their baselines, for more tokens.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from eco_optax.training import methods
from experiments.studies import storage, sweep
from experiments.studies.sweep import Run

Rows = Mapping[str, Mapping[str, Any]]  # Finished runs by name, see `sweep.read`.

LEARNING_RATES = (2e-3, 6e-4, 6e-3)
SEEDS = (0, 1, 2)
LONGER = 4  # Times the tokens, for the methods that matter most.

# Those that round weights; the one that does not is in no format.
METHODS = {label: method for label, method in methods.METHODS.items() if method.rounding}
# Methods that take another's best learning rate, for they differ in storage alone.
TUNED_AS = {
  "ECO + SR, FP8 moments": "ECO + SR, schedule-aware",
  "int8 residual + RTN, FP8 moments": "int8 residual + RTN",
}
BF16 = methods.BY_NAME["bf16_mw"].label
BASELINE, NAIVE = (methods.BY_NAME[name].label for name in ("mw_rtn", "naive_rtn"))
# Whose differences are claims: these have three seeds.
DECIDING = (
  "master weights + RTN",
  "master weights + SR",
  "naive SR",
  "ECO + RTN, paper's rule",
  "ECO + RTN, schedule-aware",
  "ECO + SR, paper's rule",
  "ECO + SR, schedule-aware",
  "int8 residual + RTN",
)
FORMATS = storage.FORMATS


class Key(NamedTuple):
  """What tells a run from the others."""

  method: str
  format: str
  learning_rate: float
  seed: int
  tokens: int  # Times those of the config.

  @property
  def name(self) -> str:
    """In results."""
    longer = f", {self.tokens} × tokens" if self.tokens > 1 else ""
    return f"{self.method}, {self.format}, lr {self.learning_rate:g}, seed {self.seed}{longer}"


def _run(key: Key, steps: int) -> Run:
  own = methods.METHODS[key.method].changes
  own |= {} if key.method == BF16 else FORMATS[key.format]
  return Run(
    key.name,
    own
    | {
      "optimizer.learning_rate": key.learning_rate,
      "seed": key.seed,
      "steps": key.tokens * steps,
      "evaluate_every": key.tokens * steps // 5,
    },
  )


def best(rows: Rows, method: str, format: str) -> float | None:
  """The learning rate with the lowest loss of seed 0; None until all have been tried.

  A method that diverges at all of them has the smallest.
  """
  losses = {}
  for rate in LEARNING_RATES:
    row = rows.get(Key(TUNED_AS.get(method, method), format, rate, 0, 1).name)
    if row is None:
      return None
    losses[rate] = math.inf if row["validation_loss"] is None else row["validation_loss"]
  return min(sorted(losses), key=lambda rate: losses[rate])


def _cells() -> Iterable[tuple[str, str]]:
  """Methods and formats; the baseline without quantization has one of its own."""
  return [(BF16, "none"), *((method, format) for format in FORMATS for method in METHODS)]


def runs(rows: Rows, steps: int) -> list[Run]:
  """The runs that are wanted once `rows` are finished, those that say most first.

  Args:
    rows: finished runs.
    steps: of the config.

  Returns:
    Seed 0 of every method at every learning rate; then, as these are finished, at its best one,
    those of `TUNED_AS`, the longer runs, and other seeds of `DECIDING`.
  """
  tuned = [cell for cell in _cells() if cell[0] not in TUNED_AS]
  keys = [Key(*cell, rate, 0, 1) for rate in LEARNING_RATES for cell in tuned]
  chosen = [(*cell, rate) for cell in _cells() if (rate := best(rows, *cell)) is not None]
  keys += [Key(*cell, 0, 1) for cell in chosen if cell[0] in TUNED_AS]
  keys += [Key(*cell, 0, LONGER) for cell in chosen if cell[0] in longer(rows, cell[1])]
  for seed in SEEDS[1:]:
    keys += [Key(*cell, seed, 1) for cell in chosen if cell[0] in (*DECIDING, BF16)]
  return [_run(key, steps) for key in keys]


def longer(rows: Rows, format: str) -> list[str]:
  """The two methods without memory whose losses of seed 0 are lowest, and their baselines.

  None until all have been tried.
  """
  memory_free = [
    label
    for label, method in METHODS.items()
    if method.family == methods.ECO and label not in TUNED_AS
  ]
  losses = {}
  for method in memory_free:
    if (rate := best(rows, method, format)) is None:
      return []
    loss = rows[Key(method, format, rate, 0, 1).name]["validation_loss"]
    losses[method] = math.inf if loss is None else loss
  baselines = [BASELINE, "master weights + SR", "naive SR"]
  return [*baselines, *sorted(memory_free, key=lambda method: losses[method])[:2]]


def mean(rows: Rows, method: str, format: str, tokens: int = 1) -> tuple[float, float, int]:
  """Mean loss at the best learning rate, its standard error over seeds, and how many there are.

  The loss is infinite if a run diverged, the error NaN of one seed.
  """
  found = sweep.losses(rows, names(rows, method, format, tokens))
  return sweep.mean_and_error([loss for loss in found if loss is not None])


def names(rows: Rows, method: str, format: str, tokens: int = 1) -> list[str]:
  """Of the runs at the best learning rate, one per seed, finished or not."""
  rate = best(rows, method, format)
  return [Key(method, format, rate or math.nan, seed, tokens).name for seed in SEEDS]


def _compared(rows: Rows, method: str, own: str, format: str, tokens: int = 1) -> tuple[str, str]:
  """Two cells: a method's loss at its best rate, and against master weights in a format."""
  return sweep.compared(
    rows, names(rows, method, own, tokens), names(rows, BASELINE, format, tokens)
  )


def table(rows: Rows) -> str:
  """What came out, in Markdown: a table per format.

  Differences to master weights are paired by seed, each method at its own best learning rate.
  """
  out = []
  rates = sorted(LEARNING_RATES)
  for format in FORMATS:
    reference, naive = mean(rows, BASELINE, format)[0], mean(rows, NAIVE, format)[0]
    head = ["method", "bytes", *(f"lr {rate:g}" for rate in rates), "at its best", "seeds"]
    head += ["against master weights + RTN", "of naive RTN's gap recovered"]
    head += [f"{LONGER} × tokens", f"against {BASELINE}"]
    out += ["", f"**{format}**", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method, own in [(BF16, "none"), *((method, format) for method in METHODS)]:
      tried = [Key(method, own, rate, 0, 1).name for rate in rates]
      cells = [method, sweep.used_bytes(rows, tried)]
      cells += [sweep.compared(rows, [name], [name])[0] for name in tried]
      value, _, seeds = mean(rows, method, own)
      loss, gap = _compared(rows, method, own, format)
      share = (naive - value) / (naive - reference)
      cells += [loss, str(seeds), gap, f"{share:.0%}" if math.isfinite(share) else "–"]
      cells += _compared(rows, method, own, format, LONGER)
      out.append(f"| {' | '.join(cells)} |")
  return "\n".join(out[1:]) + "\n"


def summary(rows: Rows) -> str:
  """Each method at its own best learning rate against master weights, both formats, in Markdown."""
  kinds = ("bytes", "loss", f"{LONGER} × tokens")
  head = ["", *(f"{format}: {kind}" for format in FORMATS for kind in kinds)]
  out = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
  for method in (BF16, *METHODS):
    cells = [method]
    for format in FORMATS:
      own = "none" if method == BF16 else format
      cells += [sweep.used_bytes(rows, names(rows, method, own))]
      for tokens in (1, LONGER):
        loss, gap = _compared(rows, method, own, format, tokens)
        cells += [loss if method == BASELINE else gap]
    out.append(f"| {' | '.join(cells)} |")
  return "\n".join(out) + "\n"


def plot(rows: Rows, folder: pathlib.Path) -> None:
  """Draws bytes against loss (pareto.png), learning rates (rates.png) and training (curves.png)."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  # What differs from another in storage alone is drawn as its lighter shade.
  shades = plt.get_cmap("tab20")
  colors = {method: shades(2 * i) for i, method in enumerate(METHODS) if method not in TUNED_AS}
  order = list(colors)
  colors |= {method: shades(2 * order.index(own) + 1) for method, own in TUNED_AS.items()}
  panels = lambda: plt.subplots(
    1, len(FORMATS), figsize=(2 + 5 * len(FORMATS), 4.4), layout="constrained", squeeze=False
  )

  figure, axes = panels()
  for ax, format in zip(axes[0], FORMATS, strict=True):
    for method, color in colors.items():
      value, error, _ = mean(rows, method, format)
      rate = best(rows, method, format)
      if rate is None or not math.isfinite(value):
        continue
      used = rows[Key(method, format, rate, 0, 1).name]["bytes_per_parameter"]["total"]
      bar = 0.0 if math.isnan(error) else 2 * error
      ax.errorbar(used, value, bar, marker="o", capsize=3, ls="", color=color, label=method)
    if math.isfinite(plain := mean(rows, BF16, "none")[0]):
      ax.axhline(plain, color="black", lw=0.8, ls=":", label=BF16)
    ax.set(title=format, xlabel="bytes per parameter: weights, moments, residual")
    ax.set_ylabel("validation loss at its best learning rate (nats per token)")
    ax.grid(alpha=0.25)
  figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
  figure.savefig(folder / "pareto.png", dpi=140)
  plt.close(figure)

  figure, axes = panels()
  for ax, format in zip(axes[0], FORMATS, strict=True):
    for method, color in colors.items():
      points = [
        (rate, row["validation_loss"])
        for rate in sorted(LEARNING_RATES)
        if (row := rows.get(Key(method, format, rate, 0, 1).name)) and row["validation_loss"]
      ]
      if points:
        ax.plot(*zip(*points, strict=True), marker="o", color=color, label=method)
    ax.set(title=format, xlabel="peak learning rate", xscale="log")
    ax.set_xticks(LEARNING_RATES, [f"{rate:g}" for rate in LEARNING_RATES])
    ax.minorticks_off()
    ax.set_ylabel("validation loss (nats per token)")
    ax.grid(alpha=0.25)
  figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
  figure.savefig(folder / "rates.png", dpi=140)
  plt.close(figure)

  def curve(method: str, format: str) -> dict[int, float]:
    rate = best(rows, method, format) or math.nan
    row = rows.get(Key(method, format, rate, 0, 1).name)
    return dict(row["training_curve"]) if row else {}

  figure, axes = panels()
  for ax, format in zip(axes[0], FORMATS, strict=True):
    # Batches are the same for all, and so most of what a loss owes to its batch.
    reference = curve(BASELINE, format)
    for method, color in colors.items():
      gaps = [
        (step, loss - reference[step])
        for step, loss in curve(method, format).items()
        if step in reference
      ]
      if gaps:
        ax.plot(*zip(*gaps, strict=True), color=color, lw=1.2, label=method)
    ax.set(title=format, xlabel="step")
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set_ylabel(f"training loss less that of {BASELINE}")
    ax.grid(alpha=0.25)
  figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
  figure.savefig(folder / "curves.png", dpi=140)
  plt.close(figure)
