"""What a run leaves behind: a JSONL of metrics, a loss curve, and the bytes its arrays take."""

from __future__ import annotations

import json
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import optax

import eco_optax as eco


class MetricsWriter:
  """Appends one JSON object per line, flushed, so that a run that dies has its metrics."""

  def __init__(self, path: pathlib.Path):
    self._file = path.open("w")

  def write(self, step: int, **values: float) -> None:
    """One line; numbers only."""
    row = {"step": step} | {key: float(value) for key, value in values.items()}
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
  """The rows of a metrics file."""
  return [json.loads(line) for line in path.read_text().splitlines()]


class Bytes(NamedTuple):
  """Bytes per quantized parameter, counted from live arrays."""

  weights: float  # Codes and scales.
  moments: float
  residual: float  # Of master weights that are kept beside the stored weights.

  @property
  def total(self) -> float:
    """All of it."""
    return sum(self)


def bytes_per_parameter(params: Any, opt_state: Any, where: Any) -> Bytes:
  """What the parameters chosen by `where` occupy, divided by their number.

  Args:
    params: the live parameters, packed or float.
    opt_state: the live optimizer state.
    where: called with path and leaf, as in `eco.quantize`.

  Returns:
    Bytes per parameter.
  """
  is_packed = lambda leaf: isinstance(leaf, eco.QuantizedArray)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  chosen = {
    name(path): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)[0]
    if where(name(path), leaf)
  }
  count = sum(math.prod(leaf.shape) for leaf in chosen.values())
  kept = {"moments": 0, "residual": 0}
  for path, leaf in jax.tree_util.tree_flatten_with_path(opt_state)[0]:
    if any(name(path).endswith("/" + parameter) for parameter in chosen):
      kept["residual" if "residual/" in name(path) else "moments"] += leaf.nbytes
  weights = sum(leaf.nbytes for leaf in chosen.values())
  return Bytes(weights / count, kept["moments"] / count, kept["residual"] / count)


def plot_losses(runs: dict[str, pathlib.Path], out: pathlib.Path) -> None:
  """Draws training and validation losses of runs from their metrics files.

  Args:
    runs: metrics file by the name that the legend gives the run.
    out: the PNG to write.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(figsize=(7, 4.3), layout="constrained")
  for i, (label, path) in enumerate(runs.items()):
    color = f"C{i}"
    rows = read_metrics(path)
    train = [(r["step"], r["loss"]) for r in rows if "loss" in r and math.isfinite(r["loss"])]
    held_out = [(r["step"], r["validation_loss"]) for r in rows if "validation_loss" in r]
    if train and len(runs) == 1:
      axes.plot(
        *zip(*train, strict=True), color=color, alpha=0.35, lw=1, label=f"{label}, training"
      )
    if held_out:
      axes.plot(
        *zip(*held_out, strict=True), color=color, marker="o", ms=3, label=f"{label}, validation"
      )
  axes.set(xlabel="step", ylabel="loss (nats per byte)")
  low, high = axes.get_ylim()
  axes.set_ylim(low, min(high, low + 2.5))
  axes.grid(alpha=0.25)
  axes.legend(frameon=False)
  figure.savefig(out, dpi=140)
  plt.close(figure)


def clock(seconds: float) -> str:
  """Minutes and seconds, as a progress line shows them."""
  return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Throughput:
  """Tokens per second since the first step ended, evaluations apart."""

  def __init__(self, tokens_per_step: int):
    self._tokens_per_step = tokens_per_step
    self._steps = 0
    self._seconds = 0.0
    self._since: float | None = None

  def resume(self) -> None:
    """Starts the clock, before steps that count."""
    self._since = time.perf_counter()

  def pause(self, steps: int) -> None:
    """Stops the clock once `steps` more steps have ended."""
    if self._since is not None:
      self._seconds += time.perf_counter() - self._since
      self._steps += steps
    self._since = None

  @property
  def tokens_per_second(self) -> float:
    """Mean so far; 0 before any step counted."""
    return self._tokens_per_step * self._steps / self._seconds if self._seconds else 0.0


def is_finite(*values: Any) -> bool:
  """Whether all scalars are finite."""
  return all(math.isfinite(float(value)) for value in values)


def learning_rate_at(schedule: optax.Schedule, step: int) -> float:
  """The schedule's value as a number."""
  return float(schedule(step))
