"""The paper's seven runs and ours beyond them, at several learning rates and seeds: what decides.

Every method has its own best learning rate, as a user would find it; methods that decide claims are
run there with more seeds, and the best without memory, beside their baselines, for more tokens.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from eco_optax.training import methods
from experiments import figures
from experiments.studies import storage, sweep
from experiments.studies.sweep import Run

Rows = Mapping[str, Mapping[str, Any]]  # Finished runs by name, see `sweep.read`.

LEARNING_RATES = (2e-3, 6e-4, 6e-3)
SEEDS = (0, 1, 2)
LONGER = 4  # Times the tokens, for the methods that matter most.

# Methods that round weights; the other one is in no format.
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
  """The runs wanted once `rows` are finished, the most telling first.

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


# The rows of the short table: the usual way, naive rounding, ECO, and ECO in the fewest bytes.
_SHORT = (
  "master weights + RTN",
  "master weights + SR",
  "naive SR",
  "ECO + SR, paper's rule",
  "ECO + SR, schedule-aware",
  "ECO + SR, FP8 moments",
)
_DEVICES = {"NVIDIA H200": "H200", "NVIDIA H100 80GB HBM3": "H100", "cpu": "CPU"}


def short_summary(rows: Rows) -> str:
  """The methods of `_SHORT` against master weights, with their machines, in Markdown."""
  head = ["", *(f"{format}: {kind}" for format in FORMATS for kind in ("bytes", "loss"))]
  head += [f"{format}: {LONGER} × tokens" for format in FORMATS]
  head.append("machines")
  out = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
  for method in _SHORT:
    cells, used = [method], set()
    longer_cells: list[str] = []
    for format in FORMATS:
      cells += [sweep.used_bytes(rows, names(rows, method, format))]
      for tokens, where in ((1, cells), (LONGER, longer_cells)):
        loss, gap = _compared(rows, method, format, format, tokens)
        where.append(loss if method == BASELINE else gap)
        own = [rows[name] for name in names(rows, method, format, tokens) if name in rows]
        used |= {row["machine"]["device"] for row in own}
    there = [name for device, name in _DEVICES.items() if device in used]
    there += sorted(used - set(_DEVICES))
    out.append(f"| {' | '.join([*cells, *longer_cells, ', '.join(there)])} |")
  return "\n".join(out) + "\n"


def _gaps(rows: Rows, method: str, format: str) -> list[float]:
  """Differences to master weights at the best learning rates, one for each seed."""
  own = "none" if method == BF16 else format
  return figures.paired(rows, names(rows, method, own), names(rows, BASELINE, format))


def plot(rows: Rows, folder: pathlib.Path) -> None:
  """Draws bytes against loss (pareto.png), learning rates (rates.png) and training (curves.png)."""
  plt = figures.pyplot()
  _plot_bytes(plt, rows, folder / "pareto.png")
  _plot_rates(plt, rows, folder / "rates.png")
  _plot_training(plt, rows, folder / "curves.png")


_MARKERS = {methods.FLOAT: "D", methods.NAIVE: "v"}


def _style(label: str) -> dict[str, Any]:
  """Filled and solid for stochastic rounding, open and dashed for nearest; thin for the paper's."""
  method = methods.METHODS[label]
  nearest = method.rounding == "nearest"
  small_moments = method.moments != methods.FLOAT32_MOMENTS
  return {
    "color": figures.color(method),
    "marker": _MARKERS.get(method.family, "s" if small_moments else "o"),
    "mfc": "white" if nearest else figures.color(method),
    "ls": "--" if nearest else "-",
    "lw": 1.6 if method.schedule_aware else 0.9,
  }


def _panels(plt: Any) -> Any:
  return plt.subplots(1, len(FORMATS), figsize=(11, 4.6), layout="constrained", squeeze=False)


def _plot_bytes(plt: Any, rows: Rows, path: pathlib.Path) -> None:
  """Loss against bytes: each method at its best learning rate, the rule schedule-aware."""
  shown = [label for label, method in methods.METHODS.items() if method.schedule_aware]
  figure, axes = _panels(plt)
  for ax, format in zip(axes[0], FORMATS, strict=True):
    figures.band(ax, figures.noise(_gaps(rows, method, format) for method in shown))
    for method in shown:
      own = "none" if method == BF16 else format
      found = [rows[name] for name in names(rows, method, own) if name in rows]
      gap, error, seeds = sweep.mean_and_error(_gaps(rows, method, format))
      if not seeds or not math.isfinite(gap):
        continue
      used = found[0]["bytes_per_parameter"]["total"]
      bar = 0.0 if math.isnan(error) else 2 * error
      style = _style(method) | {
        "ls": "",
        "ms": 11 if methods.METHODS[method].family == methods.NAIVE else 8,
        "mew": 1.6,
        "capsize": 3,
      }
      ax.errorbar(used, gap, bar, label=methods.METHODS[method].short, **style)
    ax.set(title=f"{format} weights", xlabel="bytes per parameter: weights, moments, residual")
    ax.set_xlim(0, 14)
    ax.grid(alpha=0.25)
    ax.legend(*_noise_alone(ax), loc="upper left", fontsize=8, frameon=False)
  axes[0][0].set_ylabel(f"validation loss minus {BASELINE}\n(nats per token; lower is better)")
  handles, labels = axes[0][0].get_legend_handles_labels()
  methods_only = [i for i, label in enumerate(labels) if not label.startswith(figures.NOISE)]
  figure.legend(
    [handles[i] for i in methods_only], [labels[i] for i in methods_only],
    title="filled: stochastic rounding (SR); open: rounding to nearest (RTN)",
    loc="outside lower center", ncol=3, fontsize=9, title_fontsize=9, frameon=False,
  )  # fmt: skip
  figures.save(figure, path)


def _noise_alone(ax: Any) -> tuple[list[Any], list[str]]:
  """The legend's entry of the noise, which each panel has of its own."""
  found = zip(*ax.get_legend_handles_labels(), strict=True)
  own = [(handle, label) for handle, label in found if label.startswith(figures.NOISE)]
  return [handle for handle, _ in own], [label for _, label in own]


def _plot_rates(plt: Any, rows: Rows, path: pathlib.Path) -> None:
  """Loss at each peak learning rate, seed 0."""
  figure, axes = _panels(plt)
  for ax, format in zip(axes[0], FORMATS, strict=True):
    lowest = math.inf
    for method in METHODS:
      points = [
        (rate, row["validation_loss"])
        for rate in sorted(LEARNING_RATES)
        if (row := rows.get(Key(method, format, rate, 0, 1).name)) and row["validation_loss"]
      ]
      if points and method not in TUNED_AS:
        ax.plot(*zip(*points, strict=True), label=method, **_style(method))
        lowest = min(lowest, *(loss for _, loss in points))
    if math.isfinite(lowest):  # Far above, the others could not be told apart.
      top = min(ax.get_ylim()[1], lowest + 1.2)
      ax.set_ylim(lowest - 0.05 * (top - lowest), top)
    ax.set(title=f"{format} weights", xlabel="peak learning rate", xscale="log")
    ax.set_xticks(LEARNING_RATES, [f"{rate:g}" for rate in LEARNING_RATES])
    ax.minorticks_off()
    ax.grid(alpha=0.25)
  axes[0][0].set_ylabel("validation loss (nats per token)")
  handles, labels = axes[0][0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncol=3, fontsize=9, frameon=False)
  figures.save(figure, path)


_SMOOTHED = 5  # Logged steps that a point of the training curves is the mean of.


def _plot_training(plt: Any, rows: Rows, path: pathlib.Path) -> None:
  """Training loss minus the baseline's, seed 0: batches are the same for all methods."""

  def curve(method: str, format: str) -> dict[int, float]:
    rate = best(rows, method, format) or math.nan
    row = rows.get(Key(method, format, rate, 0, 1).name)
    return dict(row["training_curve"]) if row else {}

  figure, axes = _panels(plt)
  for ax, format in zip(axes[0], FORMATS, strict=True):
    reference = curve(BASELINE, format)
    ax.axhline(0, color="0.4", lw=1, zorder=0)
    for method in METHODS:
      own = curve(method, format)
      steps = [step for step in own if step in reference]
      gaps = [own[step] - reference[step] for step in steps]
      smooth = [sum(gaps[i : i + _SMOOTHED]) / _SMOOTHED for i in range(len(gaps) - _SMOOTHED + 1)]
      if smooth and method not in (BASELINE, *TUNED_AS):
        style = _style(method) | {"marker": None}
        ax.plot(steps[_SMOOTHED - 1 :], smooth, label=method, **style)
    ax.set(title=f"{format} weights", xlabel="step")
    ax.grid(alpha=0.25)
  axes[0][0].set_ylabel(f"training loss minus {BASELINE}\n(nats per token, mean of {_SMOOTHED})")
  handles, labels = axes[0][0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncol=3, fontsize=9, frameon=False)
  figures.save(figure, path)
