"""Losses, gradients and weights that are not finite: which step, which leaf, and what follows."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import ml_collections

import eco_optax as eco
from eco_optax.training import metrics


class Bad(NamedTuple):
  """A loss, gradient or update of a step that was not finite."""

  row: int  # Number of the step's row of metrics.
  what: str
  is_undone: bool  # Whether the step left weights and moments as they were.


def first(rows: list[dict[str, Any]], params: Any) -> Bad | None:
  """The first row whose weights are not finite, or else whose gradient is not; None if all are.

  Args:
    rows: metrics of steps, see `step.make_train_step`.
    params: of the run, whose leaves the rows number.
  """
  is_packed = lambda leaf: isinstance(leaf, eco.QuantizedArray)
  flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_packed)[0]
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
  for i, row in enumerate(rows):
    if (leaf := int(row["bad_weight"])) >= 0:
      return Bad(i, f"an update too large for the weights, first of {names[leaf]},", False)
  for i, row in enumerate(rows):
    if not metrics.is_finite(row["loss"], row["grad_norm"]):
      leaf = int(row["bad_leaf"])
      where = f", first in the gradient of {names[leaf]}," if leaf >= 0 else ""
      return Bad(i, f"loss {row['loss']} and gradient norm {row['grad_norm']}{where}", True)
  return None


def report(config: ml_collections.ConfigDict, step: int, what: str, is_undone: bool = True) -> str:
  """A line that names the step, or an error where the run has to stop.

  Raises:
    FloatingPointError: naming the step, where `config.nonfinite` is "stop", or "skip" and the step
      cannot be undone.
  """
  line = f"{what} at step {step} with method {config.method!r}"
  if config.nonfinite == "stop" or not (is_undone or config.nonfinite == "record"):
    raise FloatingPointError(
      f"{line}: lower config.optimizer.learning_rate, or set config.nonfinite to 'skip' or"
      " 'record'; what is saved is from before that step"
    )
  return f"{line}: {config.nonfinite}"
