"""The similarity of consecutive quantization errors, from which the paper derives ECO."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import eco_optax as eco
from eco_optax.diagnostics import WatchState
from eco_optax.training import config as config_lib
from eco_optax.training import methods, report, sharding
from eco_optax.training import step as step_lib
from eco_optax.training.data import corpus, pipeline
from eco_optax.training.methods import Method
from eco_optax.transforms import momentum as momentum_lib
from eco_optax.transforms.master_weights import MasterWeightsState

# The paper measures it on the first.
RUNS = {
  methods.BY_NAME[name].short: methods.BY_NAME[name] for name in ("mw_rtn", "eco_rtn", "eco_sr")
}

Series = dict[str, list[float | None]]  # By metric, a value per step; None where there is none.


def watched_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformationExtraArgs:
  """The optimizer of `config.method`, with its last quantization error in its state."""
  method = methods.of(config)
  if method.family == methods.MASTER_WEIGHTS:
    return methods.optimizer(config)  # Its residual is the error.
  learning_rate = methods.schedule(config) if method.schedule_aware else None
  watch = eco.diagnostics.watch(
    methods.stock_optimizer(config), methods.quantizer(config), learning_rate
  )
  return optax.with_extra_args_support(optax.chain(optax.identity(), watch))


def _only(state: Any, kinds: tuple[type, ...]) -> Any:
  """The one node of a state that is of one of some types."""
  is_kind = lambda node: isinstance(node, kinds)
  (found,) = (node for node in jax.tree.leaves(state, is_leaf=is_kind) if is_kind(node))
  return found


def _error(opt_state: Any) -> dict[str, jax.Array]:
  """The last quantization error by path, float32."""
  node = _only(opt_state, (MasterWeightsState, WatchState))
  return momentum_lib.flat(node.residual if isinstance(node, MasterWeightsState) else node.error)


def compare_errors(
  before: Any, after: Any, learning_rate: jax.Array, b1: float, b2: float, eps: float
) -> dict[str, jax.Array]:
  r"""How much the quantization error changed in a step of AdamW.

  `change` is the paper's, in which Adam's error is not in units of its momentum; `adam_change` has
  them, so that it is how far the memory-free rule is from the one that keeps the last error:

  .. math::
    \frac{\|e_{t+1} - e_t\|}{\eta \|m_{t+1}\|}, \quad
    \frac{\|(1 - \beta_1^t) (\sqrt{\hat v} + \epsilon) \odot (e_{t+1} - e_t)\|}{\eta\|m_{t+1}\|}

  Args:
    before: state of the optimizer before the step.
    after: state after it.
    learning_rate: η of the step.
    b1: of AdamW.
    b2: of AdamW.
    eps: of AdamW.

  Returns:
    float32 scalars over all quantized leaves, NaN where there was no error before: `norm` and
    `norm_ratio` of the error, `cosine` with the last one, `change` and `adam_change`.
  """
  old, new = _error(before), _error(after)
  adam = _only(after, (optax.ScaleByAdamState,))
  momentum, variance = (momentum_lib.flat(tree) for tree in (adam.mu, adam.nu))
  t = adam.count.astype(jnp.float32)
  change = {path: new[path] - old[path] for path in new}
  in_momentum = {
    path: (1 - b1**t) * (jnp.sqrt(variance[path] / (1 - b2**t)) + eps) * x
    for path, x in change.items()
  }
  norm_ratio, cosine = eco.diagnostics.error_similarity(old, new)
  size = learning_rate * methods.global_norm({path: momentum[path] for path in new})
  size = jnp.where(jnp.isnan(norm_ratio), jnp.nan, size)
  return {
    "norm": methods.global_norm(new),
    "norm_ratio": norm_ratio,
    "cosine": cosine,
    "change": methods.global_norm(change) / size,
    "adam_change": methods.global_norm(in_momentum) / size,
  }


def measure(config: ml_collections.ConfigDict, show: Callable[[str], Any] = print) -> Series:
  """Trains on the standard library and compares errors at every step.

  Args:
    config: of the run, on one device.
    show: told how it goes.

  Returns:
    Lists over steps: `learning_rate`, `loss` and what `compare_errors` gives, null where there is
    none.
  """
  config_lib.validate(config)
  mesh = sharding.make_mesh(config.mesh.to_dict())
  tx, schedule, o = watched_optimizer(config), methods.schedule(config), config.optimizer
  windows = pipeline.train_windows(
    corpus.standard_library_dataset().train, config.length, config.seed
  )
  series: Series = {}
  with jax.set_mesh(mesh):
    state = step_lib.init_state(config, tx, mesh)
    train_step = step_lib.make_train_step(config, tx, mesh)

    @jax.jit
    def watched(state: Any, batch: Any, rate: jax.Array) -> Any:
      new_state, metrics = train_step(state, batch)
      seen = compare_errors(state.opt_state, new_state.opt_state, rate, o.b1, o.b2, o.eps)
      return new_state, {"learning_rate": rate, "loss": metrics["loss"]} | seen

    batches = pipeline.batches(windows, 0, config.batch_size, sharding.batch_sharding(mesh))
    for t in range(config.steps):
      state, seen = watched(state, next(batches), jnp.asarray(schedule(t), jnp.float32))
      for name, value in jax.device_get(seen).items():
        series.setdefault(name, []).append(float(f"{value:.5g}") if math.isfinite(value) else None)
      if (t + 1) % 50 == 0:
        show(f"  {config.method} step {t + 1}/{config.steps} " + _line(series))
  return series


def _line(series: Series) -> str:
  return "  ".join(f"{name} {values[-1]:.4g}" for name, values in series.items())


def study(
  config: ml_collections.ConfigDict,
  runs: Mapping[str, Method] = RUNS,
  show: Callable[[str], Any] = print,
) -> dict[str, Series]:
  """`measure` for each run, by name.

  Args:
    config: of all runs, but for their method.
    runs: method by name.
    show: told how it goes.

  Returns:
    What `measure` returns, by name.
  """
  return {
    name: measure(ml_collections.ConfigDict(config.to_dict() | method.changes), show)
    for name, method in runs.items()
  }


def plot(series: dict[str, Series], out: pathlib.Path) -> None:
  """Draws the similarity of errors over the schedule.

  Args:
    series: of `study`.
    out: the PNG to write.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  from matplotlib import ticker

  panels = {
    "norm_ratio": r"$\Vert e_{t+1}\Vert\;/\;\Vert e_t\Vert$",
    "cosine": r"$\cos(e_t, e_{t+1})$",
    "adam_change": "change of the error\n/ momentum",
  }
  figure, axes = plt.subplots(
    len(panels) + 1, 1, figsize=(7, 7.4), sharex=True, layout="constrained",
    height_ratios=[0.6] + [1] * len(panels),
  )  # fmt: skip
  first = next(iter(series.values()))
  steps = range(1, len(first["learning_rate"]) + 1)
  axes[0].plot(steps, first["learning_rate"], "0.3")
  axes[0].set_ylabel("learning rate")
  for panel, (name, label) in zip(axes[1:], panels.items(), strict=True):
    for i, (run, own) in enumerate(series.items()):
      panel.plot(steps, [np.nan if x is None else x for x in own[name]], f"C{i}", lw=1, label=run)
    panel.set_ylabel(label)
  axes[1].set_ylim(0.95, 1.1)  # The first steps start from weights on the grid: far above.
  axes[2].axhline(0, color="0.6", lw=0.8, ls=":")
  axes[3].set_yscale("log")
  axes[3].set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
  axes[3].yaxis.set_minor_locator(ticker.NullLocator())
  axes[1].legend(frameon=False, fontsize=8, loc="upper right")
  axes[-1].set_xlabel("step")
  for panel in axes:
    panel.grid(alpha=0.2)
  figure.savefig(out, dpi=140)
  plt.close(figure)


def _median(values: list[float | None]) -> float:
  return float(np.median([x for x in values if x is not None]))


def table(series: dict[str, Series]) -> str:
  """Medians over tenths of the schedule as a Markdown table."""
  columns = ("norm_ratio", "cosine", "change", "adam_change")
  lines = [
    "| run | steps | learning rate | ‖e(t+1)‖ / ‖e(t)‖ | cos(e(t), e(t+1)) | change / momentum"
    " | in Adam's units |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, own in series.items():
    steps = len(own["learning_rate"])
    edges = np.linspace(0, steps, 11).astype(int)
    # The warm-up, the peak, the middle and the end.
    for i in (0, 1, 5, 9):
      part = slice(edges[i], edges[i + 1])
      middle = lambda key, own=own, part=part: np.median(
        [x for x in own[key][part] if x is not None]
      )
      lines.append(
        f"| {name} | {edges[i] + 1} – {edges[i + 1]} | {middle('learning_rate'):.2g} | "
        + " | ".join(f"{middle(key):.3g}" for key in columns)
        + " |"
      )
  return "\n".join(lines) + "\n"


def failures(series: dict[str, Series]) -> list[str]:
  """Where a run is unlike the paper's: norms that do not settle, or no dip at high learning rates.

  Args:
    series: of `study`, with the names of `RUNS`.

  Returns:
    Of each run whose last tenth has a median norm ratio more than 5% from 1, and of each with
    nearest rounding whose errors are no more alike there than at the peak of the learning rate.
  """
  found = []
  for name, own in series.items():
    steps = len(own["norm"])
    last, peak = (
      slice(-max(steps // 10, 1), None),
      int(np.argmax(np.array(own["learning_rate"], float))),
    )
    around = slice(peak, peak + max(steps // 10, 1))
    # 5%: the published runs end within 0.2% of 1, and shorter ones need room.
    if not abs(_median(own["norm_ratio"][last]) - 1) <= 0.05:
      found.append(f"{name}: norm ratio {_median(own['norm_ratio'][last]):.3f} at the end")
    cosines = _median(own["cosine"][around]), _median(own["cosine"][last])
    if RUNS[name].rounding == "nearest" and not cosines[1] > cosines[0]:
      found.append(f"{name}: cosine {cosines[0]:.3f} at the peak, {cosines[1]:.3f} at the end")
  return found


def run(
  config: ml_collections.ConfigDict, out: pathlib.Path, runs: Mapping[str, Method] = RUNS
) -> list[str]:
  """Runs the study and writes similarity.json, similarity.md and similarity.png.

  Args:
    config: of the runs, but for their method.
    out: the folder to write to.
    runs: some of `RUNS`.

  Returns:
    What does not hold.
  """
  series = study(config, runs)
  figures = report.describe_machine() | {"config": config.to_dict(), "runs": series}
  (out / "similarity.json").write_text(json.dumps(figures, allow_nan=False) + "\n")
  (out / "similarity.md").write_text(table(series))
  plot(series, out / "similarity.png")
  return failures(series)
