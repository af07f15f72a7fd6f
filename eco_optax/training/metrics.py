"""What a run leaves behind: a JSONL of metrics and a loss curve."""

from __future__ import annotations

import json
import math
import pathlib
import time
from typing import Any

import numpy as np
import optax


def append_metrics(path: pathlib.Path, step: int, **values: float) -> None:
  """Adds one JSON object as a line and closes the file, so that a run that dies has its metrics.

  Args:
    path: of the metrics file.
    step: that the values belong to.
    **values: numbers; those that are not finite become null, because JSON has no NaN.
  """
  numbers = {name: float(value) for name, value in values.items()}
  row = {"step": step} | {n: x if math.isfinite(x) else None for n, x in numbers.items()}
  with path.open("a") as file:
    file.write(json.dumps(row, allow_nan=False) + "\n")


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a metrics file; None where a number was not finite."""
  return [json.loads(line) for line in path.read_text().splitlines()]


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
    # Two columns even of no rows, so that a run that diverged at once still has its legend.
    train, held_out = (
      np.array([(r["step"], r[key]) for r in rows if r.get(key) is not None]).reshape(-1, 2).T
      for key in ("loss", "validation_loss")
    )
    if len(runs) == 1:
      axes.plot(*train, color=color, alpha=0.35, lw=1, label=f"{label}, training")
    axes.plot(*held_out, color=color, marker="o", ms=3, label=f"{label}, validation")
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

  def resume(self, step: int) -> None:
    """Starts the clock once `step` steps have ended."""
    self._since_step, self._since = step, time.perf_counter()

  def pause(self, step: int) -> None:
    """Stops the clock once `step` steps have ended."""
    self._seconds += time.perf_counter() - self._since
    self._steps += step - self._since_step

  @property
  def tokens_per_second(self) -> float:
    """Mean so far; 0 before any step counted."""
    return self._tokens_per_step * self._steps / self._seconds if self._steps else 0.0


def is_finite(*values: Any) -> bool:
  """Whether all scalars are finite."""
  return all(math.isfinite(float(value)) for value in values)


def learning_rate_at(schedule: optax.Schedule, step: int) -> float:
  """The schedule's value as a number."""
  return float(schedule(step))
