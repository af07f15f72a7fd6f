"""Optimizers under quantization: which loses least, and whether outliers tell before it happens.

Each optimizer is tuned in float32. Its weights are then (a) rounded after training, alone and with
the inputs they are multiplied by; or it trains with rounded weights from the start, (b) beside
master weights, (c) without them, by ECO or where its rule does not hold by an 8-bit residual, and
(d) dropping what rounding loses. Of every model trained in float32 the outliers are measured: the
largest magnitude of a row in units of the row's mean, and kurtosis (normal numbers have 3).

What to expect: a scale follows the largest number of its row or block, so that outliers make the
grid coarse, and the error of one product should grow with the ratio. Optimizers whose steps are
spectrally flat (Muon, Shampoo, SOAP) should leave fewer of them. Whether the loss follows is
another matter: it depends on the directions that errors take too. "Beyond Outliers" (Vlassis et al,
`arXiv 2509.23500 <https://arxiv.org/abs/2509.23500>`_) finds that neither ratio nor kurtosis
predicts which optimizer loses least. In 8 bits no way should lose more than seeds differ by; in 4
bits rounding after training should lose most, and master weights and ECO about the same.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import eco_optax as eco
from eco_optax import trees
from eco_optax.training import config as config_lib
from eco_optax.training import evaluation, loop, methods, sharding
from eco_optax.training.data import pipeline
from eco_optax.training.models import modules, transformer
from experiments import figures
from experiments.studies import sweep
from experiments.studies.sweep import Run

SEEDS = (0, 1, 2)
FORMATS = ("FP8", "INT4_GROUP32", "INT8")
FLOAT, MASTER, WITHOUT, NAIVE = "float32", "master weights", "without", "naive"
_RESIDUAL = methods.METHODS["int8 residual + RTN"]
WAYS = {
  MASTER: methods.BY_NAME["mw_rtn"],
  WITHOUT: methods.BY_NAME["eco_sr"],
  NAIVE: methods.BY_NAME["naive_sr"],
}

# Peak learning rates that are tried first, with seed 0 in float32. While the best is at an end, the
# next one beyond is tried too.
LADDER = (2e-4, 6e-4, 2e-3, 6e-3, 2e-2, 6e-2, 0.2, 0.6, 2.0)
START: dict[str, tuple[float, ...]] = {
  "adamw": LADDER[1:4],
  "sgd": LADDER[5:8],
  "lion": LADDER[0:3],
  "muon": LADDER[2:5],
  "soap": LADDER[1:4],
  "shampoo": LADDER[1:4],
  "ademamix": LADDER[1:4],
}
_DECAY = 0.1 * 2e-3  # Learning rate × decoupled weight decay, of all.

# Inputs of layers rounded with the weights: in as many bits, one scale per token.
_TOKEN = {
  "FP8": eco.FP8_TOKEN,
  "INT8": eco.Format("int8", "channel", contraction_axis=-1),
  "INT4_GROUP32": eco.Format("int4", "channel", contraction_axis=-1),
}
_BATCHES = 32  # To round after training on, the same ones with and without.


def _name(optimizer: str, way: str, format: str, rate: float, seed: int) -> str:
  return f"{optimizer}, {way}, {format}, lr {rate:g}, seed {seed}"


def _tuning(optimizer: str, rate: float) -> str:
  return _name(optimizer, FLOAT, "none", rate, 0)


def tried(rows: Mapping[str, Any], optimizer: str) -> list[float]:
  """The rates to try as far as `rows` tell, in their order."""
  rates = list(START[optimizer])
  while True:
    found = sweep.losses(rows, [_tuning(optimizer, rate) for rate in rates])
    if None in found:
      return rates
    (_, best), at = min(zip(found, rates, strict=True)), LADDER.index  # type: ignore[type-var]
    if best == rates[0] and at(best) > 0:
      rates = [LADDER[at(best) - 1], *rates]
    elif best == rates[-1] and at(best) + 1 < len(LADDER):
      rates = [*rates, LADDER[at(best) + 1]]
    else:
      return rates


def best(rows: Mapping[str, Any], optimizer: str) -> float | None:
  """The rate at which float32 weights do best with seed 0; None until all have been tried."""
  rates = tried(rows, optimizer)
  found = sweep.losses(rows, [_tuning(optimizer, rate) for rate in rates])
  if None in found:
    return None
  return min(zip(found, rates, strict=True))[1]  # type: ignore[type-var]


def names(rows: Mapping[str, Any], optimizer: str, way: str, format: str = "none") -> list[str]:
  """Of the runs at the best learning rate, one per seed, finished or not."""
  rate = best(rows, optimizer) or math.nan
  return [_name(optimizer, way, format, rate, seed) for seed in SEEDS]


def runs(rows: Mapping[str, Any], steps: int) -> list[Run]:
  """The runs that are wanted once `rows` are finished, the most telling first.

  Args:
    rows: finished runs.
    steps: of the config; all of them take a quarter.

  Returns:
    Float32 weights at every rate; then, where the best is known, one seed after another, all ways
    in all formats.
  """
  wanted = [
    (optimizer, FLOAT, "none", rate, 0) for optimizer in START for rate in tried(rows, optimizer)
  ]
  rates = {optimizer: best(rows, optimizer) for optimizer in START}
  for seed in SEEDS:
    for optimizer, rate in rates.items():
      if rate is not None:
        wanted.append((optimizer, FLOAT, "none", rate, seed))
    for format in FORMATS:
      for way in WAYS:
        for optimizer, rate in rates.items():
          if rate is not None:
            wanted.append((optimizer, way, format, rate, seed))
  return [_run(*key, steps // 4) for key in dict.fromkeys(wanted)]


def _run(optimizer: str, way: str, format: str, rate: float, seed: int, steps: int) -> Run:
  changes: dict[str, Any] = {
    "optimizer.name": optimizer,
    "optimizer.learning_rate": rate,
    "optimizer.weight_decay": _DECAY / rate,
    "seed": seed,
    "steps": steps,
    "evaluate_batches_at_end": 96,
  }
  name = _name(optimizer, way, format, rate, seed)
  if way == FLOAT:
    measured = f"{__name__}:measure"
    return Run(name, methods.BY_NAME["bf16_mw"].changes | changes, measured)
  method = _RESIDUAL if way == WITHOUT and optimizer in methods.CARRY_NOTHING_BACK else WAYS[way]
  weights = {"format": format, "activation_format": "none"}  # Weights alone are rounded.
  return Run(name, method.changes | weights | changes)


def ratio(rows: np.ndarray) -> float:
  """The largest magnitude of a row in units of its mean magnitude, on average over rows."""
  size = np.abs(rows)
  return float(np.mean(size.max(-1) / np.maximum(size.mean(-1), 1e-30)))


def kurtosis(values: np.ndarray) -> float:
  """The fourth central moment in units of the squared second."""
  centered = values - values.mean()
  return float(np.mean(centered**4) / np.mean(centered**2) ** 2)


def inputs_of_layers(model: Any, params: Any, tokens: jax.Array) -> list[np.ndarray]:
  """What the linear layers of the blocks are multiplied by, float32 of shape (tokens, width)."""
  seen, call = [], modules.Linear.__call__

  def watched(self: modules.Linear, x: jax.Array) -> jax.Array:
    seen.append(np.asarray(x, np.float32).reshape(-1, x.shape[-1]))
    return call(self, x)

  with jax.disable_jit(), mock.patch.object(modules.Linear, "__call__", watched):
    transformer.apply(model, params, tokens)
  return seen


def measure(folder: pathlib.Path) -> dict[str, Any]:
  """Of a run that trained in float32: its outliers, and its loss once it is rounded.

  Args:
    folder: of the run.

  Returns:
    Means over layers of `ratio` and `kurtosis` of weights (a row is an output channel) and of
    inputs of layers (a row is a token); what rounding to nearest adds to the loss by format, of
    weights alone and of weights and inputs.
  """
  trained = evaluation.load(folder)
  model, batch_size = trained.model, trained.config.batch_size
  held_out = pipeline.validation_windows(
    loop.load_data(trained.config).validation, trained.config.length
  )

  def loss(params: Any, activation_format: eco.Format | None) -> float:
    own = dataclasses.replace(model, activation_format=activation_format)

    @jax.jit
    def sums(params: Any, batch: pipeline.Batch) -> tuple[jax.Array, jax.Array]:
      nats = transformer.nats(own, params, *batch)[0]
      return nats, jnp.full_like(nats, batch.tokens.shape[1] - 1)

    return loop.evaluate(sums, params, held_out, batch_size, trained.mesh, _BATCHES)

  with jax.set_mesh(trained.mesh):
    whole, added = loss(trained.params, None), {}
    for format, token in _TOKEN.items():
      weights = config_lib.FORMATS[format].transposed
      rounded = eco.quantize(trained.params, weights, transformer.is_quantized(model))
      added[format] = {
        "weights": loss(rounded, None) - whole,
        "weights and inputs": loss(rounded, token) - whole,
      }
    split = sharding.batch_sharding(trained.mesh)
    tokens = pipeline.batch(held_out, 0, batch_size, split).tokens[:, :-1]
    inputs = inputs_of_layers(model, trained.params, tokens)
  kernels = [
    matrix
    for path, stack in jax.tree_util.tree_leaves_with_path(trained.params)
    if transformer.is_block_kernel(trees.path_name(path))
    for matrix in np.asarray(stack, np.float32)
  ]
  outliers = {
    what: {
      "ratio": statistics.fmean(map(ratio, arrays)),
      "kurtosis": statistics.fmean(map(kurtosis, arrays)),
    }
    for what, arrays in (("weights", kernels), ("inputs", inputs))
  }
  return {"added": added, "outliers": outliers}


def _mean(values: list[float], digits: str) -> str:
  return format(statistics.fmean(values), digits) if values else "–"


def _measured(rows: Mapping[str, Any], optimizer: str) -> list[dict[str, Any]]:
  """What `measure` found, of each seed that has finished."""
  return [rows[name] for name in names(rows, optimizer, FLOAT) if name in rows]


def _column(rows: Mapping[str, Any], optimizer: str, *keys: str) -> list[float]:
  found = _measured(rows, optimizer)
  for key in keys:
    found = [row[key] for row in found]
  return found  # type: ignore[return-value]


def correlation(rows: Mapping[str, Any], outlier: tuple[str, str], added: tuple[str, str]) -> float:
  """Spearman's, over the optimizers that have been measured: 1 where the order is the same.

  Args:
    rows: finished runs.
    outlier: ("weights" or "inputs", "ratio" or "kurtosis").
    added: (format, "weights" or "weights and inputs"): what rounding adds to the loss.

  Returns:
    The correlation of ranks of both means; NaN of fewer than three optimizers.
  """
  pairs = [
    (_column(rows, optimizer, "outliers", *outlier), _column(rows, optimizer, "added", *added))
    for optimizer in START
  ]
  means = np.array([(statistics.fmean(a), statistics.fmean(b)) for a, b in pairs if a])
  if len(means) < 3:
    return math.nan
  ranks = means.argsort(0).argsort(0)
  return float(np.corrcoef(ranks[:, 0], ranks[:, 1])[0, 1])


def table(rows: Mapping[str, Any]) -> str:
  """What came out, in Markdown; differences are paired by seed, with their standard errors."""
  rounded = [(format, what) for format in FORMATS for what in ("weights", "weights and inputs")]
  head = ["optimizer", "peak rate", "float32 loss", *map(", ".join, rounded)]
  lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
  for optimizer in START:
    rate, own = best(rows, optimizer), names(rows, optimizer, FLOAT)
    cells = [optimizer, f"{rate:g}" if rate else "–", sweep.compared(rows, own, own)[0]]
    cells += [_mean(_column(rows, optimizer, "added", *each), "+.4f") for each in rounded]
    lines.append(f"| {' | '.join(cells)} |")
  for format in FORMATS:
    head = [f"trained in {format}", "bytes with and without master weights", *WAYS]
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for optimizer in START:
      reference = names(rows, optimizer, FLOAT)
      ways = [names(rows, optimizer, way, format) for way in WAYS]
      used = " / ".join(sweep.used_bytes(rows, way) for way in ways[:2])
      label = (
        f"{optimizer}, int8 residual" if optimizer in methods.CARRY_NOTHING_BACK else optimizer
      )
      gaps = [sweep.compared(rows, way, reference)[1] for way in ways]
      lines.append(f"| {' | '.join([label, used, *gaps])} |")
  head = ["optimizer", "ratio, weights", "ratio, inputs", "kurtosis, weights", "kurtosis, inputs"]
  lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
  outliers = [(what, how) for how in ("ratio", "kurtosis") for what in ("weights", "inputs")]
  for optimizer in START:
    cells = [_mean(_column(rows, optimizer, "outliers", *each), ".2f") for each in outliers]
    lines.append(f"| {' | '.join([optimizer, *cells])} |")
  for format, what in rounded:
    found = [correlation(rows, each, (format, what)) for each in outliers]
    cells = ["–" if math.isnan(x) else f"{x:+.2f}" for x in found]
    label = f"order of optimizers beside what {format} adds, {what}"
    lines.append(f"| {' | '.join([label, *cells])} |")
  return "\n".join(lines) + "\n"


def plot(rows: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Draws bytes against loss, and outliers against what rounding adds (outliers.png)."""
  plt = figures.pyplot()
  figure, axes = plt.subplots(1, len(FORMATS) + 1, figsize=(18, 5), layout="constrained")
  colors = {optimizer: f"C{i}" for i, optimizer in enumerate(START)}
  markers = {FLOAT: "s", MASTER: "^", WITHOUT: "o", NAIVE: "x"}
  for ax, format in zip(axes, FORMATS, strict=False):
    for optimizer in START:
      for way, marker in markers.items():
        own = names(rows, optimizer, way, "none" if way == FLOAT else format)
        found = [x for x in sweep.losses(rows, own) if x is not None and math.isfinite(x)]
        if found:
          used = float(sweep.used_bytes(rows, own))
          loss = statistics.fmean(found)
          ax.plot(used, loss, marker, ms=7, color=colors[optimizer], alpha=0.85)
    for way, marker in markers.items():
      ax.plot([], [], marker, color="0.3", label=way)
    for optimizer, color in colors.items():
      ax.plot([], [], "s", color=color, label=optimizer)
    ax.set(title=f"trained with {format} weights", xlabel="bytes per parameter", xscale="log")
    ax.set_xticks([3, 5, 10, 20, 40], ["3", "5", "10", "20", "40"])
    ax.minorticks_off()
    ax.set_ylabel("validation loss (nats per byte)")
  entries = axes[0].get_legend_handles_labels()
  figure.legend(*entries, loc="outside lower center", ncol=11, fontsize=10, frameon=False)
  for optimizer in START:
    ratios = _column(rows, optimizer, "outliers", "weights", "ratio")
    added = _column(rows, optimizer, "added", "INT4_GROUP32", "weights")
    axes[-1].plot(ratios, added, "s", color=colors[optimizer])
  axes[-1].set(title="rounded after training to INT4 in groups of 32")
  axes[-1].set(xlabel="largest weight of an output channel, in units of its mean")
  axes[-1].set_ylabel("added to the loss (nats per byte)")
  figures.save(figure, folder / "outliers.png")
