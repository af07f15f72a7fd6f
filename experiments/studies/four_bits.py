"""Pretraining in the four-bit formats that people use: what is lost with and without a residual.

The study of claims has INT4 with one scale per tensor, where stochastic rounding itself costs 0.08
nats. Here the same model and text are trained in INT4 with a scale for each 32 inputs, in MXFP4 and
in NVFP4, each method at its own best learning rate.

What to expect: a stochastically rounded weight is off by a random part of its grid step, and the
loss rises with the mean square of that error weighted by curvature, whichever method keeps the
memory. Smaller blocks have smaller steps, so that the loss of stochastic rounding should fall with
the mean squared error that `measure` finds, and ECO with stochastic rounding should lose what
master weights with stochastic rounding lose. Errors of nearest rounding are half as large in the
mean square and are the same from step to step, so that training fits around them: master weights,
or a residual of one byte, should lose less than either. ECO to nearest meets the dead zone of the
grid and should lose most in the coarsest one.

The first runs did not bear out the last sentence: ECO to nearest was ahead of float32 weights in
MXFP4, and behind in the other two. Formats that differ in their scales alone tell why.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import eco_optax as eco
from eco_optax.quantized_array import is_quantized
from eco_optax.training import config as config_lib
from eco_optax.training import evaluation, loop, methods
from eco_optax.training.data import pipeline
from eco_optax.training.models import transformer
from experiments import figures
from experiments.studies import sweep
from experiments.studies.sweep import Run

Rows = Mapping[str, Mapping[str, Any]]

FORMATS = ("INT4_GROUP32", "MXFP4", "NVFP4")
SEEDS = (0, 1, 2)
# The peak learning rates tried first, with seed 0. The next one beyond the better is the third.
LADDER = (6e-4, 2e-3, 6e-3, 2e-2)
_FIRST = (6e-3, 2e-3)

FLOAT = methods.BY_NAME["bf16_mw"].label
BASELINE = methods.BY_NAME["mw_rtn"].label
_LABELS = (
  BASELINE,
  "master weights + SR",
  "naive SR",
  "ECO + RTN, schedule-aware",
  "ECO + SR, schedule-aware",
  "int8 residual + RTN",
)
METHODS = {label: methods.METHODS[label] for label in _LABELS}
# It tells the cost of the rounding from the cost of memory, at the rate of the method without.
_TUNED_AS = {"master weights + SR": "ECO + SR, schedule-aware"}
_BATCHES = 64  # To round trained weights on.
# Formats that differ in their scales alone: of any size, in float32 or E4M3, and powers of two.
SCALES = {
  "FP4, 32 inputs": ("FP4_GROUP32", "MXFP4"),
  "FP4, 16 inputs": ("NVFP4", "NVFP4_POWER_OF_TWO"),
  "INT4, 32 inputs": ("INT4_GROUP32", "INT4_GROUP32_POWER_OF_TWO"),
  "INT4, whole matrix": ("INT4", "INT4_POWER_OF_TWO"),
  "FP8, output channel": ("FP8", "FP8_POWER_OF_TWO"),
}
_SCALED = ("ECO + RTN, schedule-aware", BASELINE, "ECO + SR, schedule-aware")
# Of float32 weights, beside a decay of 0.1 and b1 0.9: what could be a coarse grid's advantage.
CONTROLS: dict[str, dict[str, Any]] = {
  "weight decay 0": {"optimizer.weight_decay": 0.0},
  "weight decay 0.3": {"optimizer.weight_decay": 0.3},
  "b1 0.8": {"optimizer.b1": 0.8},
  "b1 0.97": {"optimizer.b1": 0.97},
}


def _name(method: str, format: str, rate: float, seed: int) -> str:
  return f"{method}, {format}, lr {rate:g}, seed {seed}"


def _control(label: str) -> str:
  return f"{FLOAT}, none, {label}, lr {_FIRST[0]:g}, seed 0"


def _cells() -> list[tuple[str, str]]:
  """Methods and formats; weights that are not rounded have no format."""
  return [(FLOAT, "none"), *((method, format) for method in METHODS for format in FORMATS)]


def tried(rows: Rows, method: str, format: str) -> list[float]:
  """The rates to try as far as `rows` tell, in their order: two, then one beyond the better."""
  found = sweep.losses(rows, [_name(method, format, rate, 0) for rate in _FIRST])
  if None in found:
    return list(_FIRST)
  higher = found[0] <= found[1]  # type: ignore[operator]
  return [*_FIRST, LADDER[-1] if higher else LADDER[0]]


def best(rows: Rows, method: str, format: str) -> float | None:
  """The rate with the lowest loss of seed 0; None until three have been tried."""
  method = _TUNED_AS.get(method, method)
  rates = tried(rows, method, format)
  found = sweep.losses(rows, [_name(method, format, rate, 0) for rate in rates])
  if len(rates) < 3 or None in found:
    return None
  return min(zip(found, rates, strict=True))[1]  # type: ignore[type-var]


def names(rows: Rows, method: str, format: str) -> list[str]:
  """Of the runs at the best learning rate, one per seed, finished or not."""
  rate = best(rows, method, format) or math.nan
  return [_name(method, format, rate, seed) for seed in SEEDS]


def runs(rows: Rows, steps: int) -> list[Run]:
  """The runs wanted once `rows` are finished, the most telling first.

  Args:
    rows: finished runs.
    steps: of the config; all take as many.

  Returns:
    Seed 0 of all methods at one rate after another; then, at the best, the other seeds.
  """
  tuned = [cell for cell in _cells() if cell[0] not in _TUNED_AS]
  keys = [(*cell, rate, 0) for rate in _FIRST for cell in tuned]
  keys += [(*cell, rate, 0) for cell in tuned for rate in tried(rows, *cell)]
  for seed in SEEDS:
    for cell in _cells():
      if (rate := best(rows, *cell)) is not None:
        keys.append((*cell, rate, seed))
  keys += _scaled()
  return [*(_run(*key, steps) for key in dict.fromkeys(keys)), *_controls(steps)]


def _scaled() -> list[tuple[str, str, float, int]]:
  """Runs that tell codes from scales: method, format, rate and seed."""
  formats = [format for formats in zip(*SCALES.values(), strict=True) for format in formats]
  keys = [(method, format, 0) for method in _SCALED for format in formats]
  for seed in SEEDS[1:]:
    keys += [(FLOAT, "none", seed), *((_SCALED[0], format, seed) for format in formats)]
  return [(method, format, _FIRST[0], seed) for method, format, seed in keys]


def _controls(steps: int) -> list[Run]:
  run = _run(FLOAT, "none", _FIRST[0], 0, steps)
  return [Run(_control(label), run.changes | changes) for label, changes in CONTROLS.items()]


def _run(method: str, format: str, rate: float, seed: int, steps: int) -> Run:
  changes = {
    "optimizer.learning_rate": rate, "seed": seed, "steps": steps, "evaluate_every": steps // 5,
  }  # fmt: skip
  name = _name(method, format, rate, seed)
  if method == FLOAT:
    return Run(name, methods.METHODS[method].changes | changes, f"{__name__}:measure")
  weights = {"format": format, "activation_format": "none"}  # Weights alone are rounded.
  return Run(name, METHODS[method].changes | weights | changes)


def _squares(params: Any, rounded: Any) -> tuple[float, float]:
  """Of the leaves that were rounded: the sum of squared errors, and of squared weights."""
  error = size = 0.0
  leaves = jax.tree.leaves(rounded, is_leaf=is_quantized)
  for own, new in zip(jax.tree.leaves(params), leaves, strict=True):
    if is_quantized(new):
      error += float(jnp.sum(jnp.square(new.dequantize() - own)))
      size += float(jnp.sum(jnp.square(own)))
  return error, size


def measure(folder: pathlib.Path) -> dict[str, Any]:
  """Of a run that trained in float32: what rounding its weights once does, by format.

  Args:
    folder: of the run.

  Returns:
    By format and rounding: the mean squared error in units of the mean squared weight, over all
    kernels of the blocks, and what it adds to the loss.
  """
  trained = evaluation.load(folder)
  model, batch_size = trained.model, trained.config.batch_size
  windows = pipeline.validation_windows(
    loop.load_data(trained.config).validation, trained.config.length
  )

  @jax.jit
  def sums(params: Any, batch: pipeline.Batch) -> tuple[jax.Array, jax.Array]:
    nats = transformer.nats(model, params, *batch)[0]
    return nats, jnp.full_like(nats, batch.tokens.shape[1] - 1)

  def loss(params: Any) -> float:
    return loop.evaluate(sums, params, windows, batch_size, trained.mesh, _BATCHES)

  found: dict[str, Any] = {}
  with jax.set_mesh(trained.mesh):
    whole = loss(trained.params)
    for format in ("INT4", *FORMATS):
      for rounding in ("nearest", "stochastic"):
        rounded = eco.quantize(
          trained.params,
          config_lib.FORMATS[format].transposed,
          transformer.is_quantized(model),
          rounding,
          jax.random.key(0) if rounding == "stochastic" else None,
        )
        error, size = _squares(trained.params, rounded)
        added = loss(rounded) - whole
        found.setdefault(format, {})[rounding] = {"error": error / size, "added": added}
  return {"rounded": found}


def _lines(head: list[str], rows: list[list[str]]) -> str:
  """A table in Markdown."""
  line = lambda cells: f"| {' | '.join(cells)} |\n"
  return line(head) + "|---" * len(head) + "|\n" + "".join(map(line, rows))


def _mean_loss(rows: Rows, names: list[str]) -> str:
  return sweep.compared(rows, names, names)[0]


def _at_first(method: str, format: str) -> list[str]:
  """The names of runs at the first rate, one per seed."""
  return [_name(method, format, _FIRST[0], seed) for seed in SEEDS]


def _of_format(rows: Rows, format: str) -> str:
  """Each method in a format; differences are paired by seed, with their standard errors."""
  head = [f"trained in {format}", "bytes", *(f"lr {rate:g}" for rate in LADDER), "at its best"]
  lines = []
  for method, own in [(FLOAT, "none"), *((method, format) for method in METHODS)]:
    at_rates = [_name(method, own, rate, 0) for rate in LADDER]
    cells = [method, sweep.used_bytes(rows, at_rates)]
    cells += [_mean_loss(rows, [name]) for name in at_rates]
    mine = names(rows, method, own)
    loss, gap = sweep.compared(rows, mine, names(rows, FLOAT, "none"))
    beside = sweep.compared(rows, mine, names(rows, BASELINE, format))[1]
    lines.append([*cells, loss, gap, beside])
  return _lines([*head, f"against {FLOAT}", f"against {BASELINE}"], lines)


def scales_table(rows: Rows) -> str:
  """What scales do, in Markdown: mean losses of the seeds that have finished."""
  lines = [
    [codes, scales, *(_mean_loss(rows, _at_first(method, format)) for method in _SCALED)]
    for codes, formats in SCALES.items()
    for scales, format in zip(("of any size", "powers of two"), formats, strict=True)
  ]
  empty = ["–"] * (len(_SCALED) - 1)
  lines.append([FLOAT, "–", _mean_loss(rows, _at_first(FLOAT, "none")), *empty])
  return _lines([f"lr {_FIRST[0]:g}: codes", "scales", *_SCALED], lines)


def _controls_table(rows: Rows) -> str:
  own = {"weight decay 0.1, b1 0.9": _name(FLOAT, "none", _FIRST[0], 0)}
  own |= {label: _control(label) for label in CONTROLS}
  lines = [[label, _mean_loss(rows, [name])] for label, name in own.items()]
  return _lines([f"{FLOAT}, lr {_FIRST[0]:g}, seed 0", "loss"], lines)


def _rounded_table(rows: Rows) -> str:
  measured = [rows[name]["rounded"] for name in names(rows, FLOAT, "none") if name in rows]
  head = ["float32 weights, rounded after training"]
  for rounding in ("nearest", "stochastic"):
    head += [f"{rounding}: squared error", f"{rounding}: loss added"]
  lines = []
  for format in ("INT4", *FORMATS):
    cells = [format]
    for rounding in ("nearest", "stochastic"):
      for key, digits in (("error", ".2%"), ("added", "+.4f")):
        values = [row[format][rounding][key] for row in measured]
        cells.append(f"{sum(values) / len(values):{digits}}" if values else "–")
    lines.append(cells)
  return _lines(head, lines)


def table(rows: Rows) -> str:
  """What came out, in Markdown."""
  parts = [_of_format(rows, format) for format in FORMATS]
  return "\n".join([*parts, scales_table(rows), _controls_table(rows), _rounded_table(rows)])


def plot_scales(rows: Rows, folder: pathlib.Path) -> None:
  """Draws what scales do to ECO with rounding to nearest (scales.png).

  INT4 with one scale for a matrix is left out, whose losses are beyond the others' by far.
  """
  plt = figures.pyplot()
  figure, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
  found = lambda method, format: [
    x for x in sweep.losses(rows, _at_first(method, format)) if x is not None
  ]
  shown = {codes: formats for codes, formats in SCALES.items() if "INT4" not in formats}
  style = {"of any size": ("o", "tab:red"), "powers of two": ("s", "tab:blue")}
  for y, formats in enumerate(shown.values()):
    for (scales, (marker, color)), format in zip(style.items(), formats, strict=True):
      losses = found(_SCALED[0], format)
      label = None if y else f"ECO to nearest, scales {scales}"
      ax.plot(losses, [y] * len(losses), marker, color=color, alpha=0.8, ls="", label=label)
  for i, loss in enumerate(found(FLOAT, "none")):
    ax.axvline(loss, color="black", lw=0.8, label=None if i else FLOAT)
  ax.set_yticks(range(len(shown)), shown)
  ax.set_ylim(len(shown) - 0.5, -0.5)
  ax.set_xlabel("validation loss (nats per token), one mark for each seed")
  ax.grid(axis="x", alpha=0.3)
  figures.legend(ax, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3)
  figures.save(figure, folder / "scales.png")


def plot(rows: Rows, folder: pathlib.Path) -> None:
  """Draws scales.png, and each method's difference to weights not rounded (four_bits.png)."""
  plot_scales(rows, folder)
  plt = figures.pyplot()
  figure, axes = plt.subplots(1, len(FORMATS), figsize=(14, 4.4), layout="constrained", sharex=True)
  for ax, format in zip(axes, FORMATS, strict=True):
    gaps, colors = {}, {}
    for label, method in METHODS.items():
      own = names(rows, label, format)
      shown = f"{method.short}, {sweep.used_bytes(rows, own)} bytes"
      gaps[shown] = figures.paired(rows, own, names(rows, FLOAT, "none"))
      colors[shown] = figures.color(method)
    figures.band(ax, figures.noise(gaps.values()), "x")
    figures.dots(ax, gaps, colors=colors)
    ax.set(title=format, xlabel=f"validation loss minus {FLOAT}")
    figures.legend(ax, fontsize=8, loc="upper left")
  figure.suptitle("Pretraining in four bits: nats per token, mean of seeds, two standard errors")
  figures.save(figure, folder / "four_bits.png")
