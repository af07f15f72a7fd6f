"""What fused optimizers have in common: their transformation, and the scalars of the rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax.formats import Format
from eco_optax.fused.transformation import Optimizer, fuse
from eco_optax.quantized_array import Rounding, Where
from eco_optax.transforms import error_feedback
from eco_optax.transforms.packed import require_rate, require_scalar
from eco_optax.transforms.quantize_params import quantize_params


def require_numbers(learning_rate: Any, **scalars: Any) -> None:
  """Raises `ValueError` for hyperparameters that are not numbers; None and schedules may stay."""
  if learning_rate is not None:
    require_rate(learning_rate)
  for name, value in scalars.items():
    if value is not None and not callable(value):
      require_scalar(name, value)


def rate_at(learning_rate: optax.ScalarOrSchedule, count: jax.Array | None) -> jax.Array:
  """The learning rate of a step, float32; count is the schedule's."""
  rate = learning_rate(count) if callable(learning_rate) else learning_rate
  return jnp.asarray(rate, jnp.float32)


def injection_per_error(
  learning_rate: optax.ScalarOrSchedule,
  count: jax.Array | None,
  j: jax.Array,
  b: jax.Array,
  bias_count: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The rule's addition to the momentum per error, and whether it adds anything.

  Args:
    learning_rate: the optimizer's.
    count: the schedule's.
    j: J = ∂u/∂m.
    b: B = ∂m̃/∂m.
    bias_count: as in `error_feedback.payback`.
  """
  count = jnp.zeros([], jnp.int32) if count is None else count
  rates = error_feedback.rates_ahead(learning_rate, count)
  steps = error_feedback.payback(rates, b, bias_count)
  return error_feedback.inject(jnp.ones([], jnp.float32), j, steps)


def spelled(name: str, fn: Callable[..., Any], **arguments: Any) -> str:
  """A call as a line of code, with the arguments that are not the defaults of `fn`.

  A number is written out, anything else, as a schedule, by the name of its argument.
  """
  defaults = inspect.signature(fn).parameters
  is_plain = lambda x: x is None or type(x) in (bool, int, float, str)
  given = [
    f"{key}={value!r}" if is_plain(value) else f"{key}={key}"
    for key, value in arguments.items()
    if not (is_plain(value) and value == defaults[key].default)
  ]
  return f"{name}({', '.join(given)})"


def _decays(momentum: Any) -> bool:
  """Whether a decay rate is a number above 0 and below 1."""
  return isinstance(momentum, (float, np.floating)) and bool(0 < momentum < 1)


def without_master_weights(
  optimizer: optax.GradientTransformation,
  closed: Optimizer | None,
  learning_rate: optax.ScalarOrSchedule,
  max_norm: float | None,
  keep_error: bool,
  *,
  spelling: str = "optimizer",
  momentum: Any = None,
  format: Format | None,
  where: Where | None,
  rounding: Rounding,
  seed: int,
  fused: bool | None = None,
  **decay: Any,
) -> optax.GradientTransformationExtraArgs:
  """ECO over a stock optimizer, with fused steps where its closed form covers them.

  Args:
    optimizer: the stock optimizer.
    closed: its closed form, if it has one with these hyperparameters.
    learning_rate: the optimizer's.
    max_norm: clips the gradients' global norm, if given.
    keep_error: as in `error_feedback_to_momentum`.
    spelling: of the stock optimizer, see `spelled`.
    momentum: decay rate of the momentum of an optimizer that is known to suit the rule, with its
      learning rate behind the momentum; else the optimizer is tried.
    format: as in `quantize_params`.
    where: as in `quantize_params`.
    rounding: as in `quantize_params`.
    seed: as in `quantize_params`.
    fused: as in `eco_optax.adamw`.
    **decay: `decay` and `mask` as in `fuse`.
  """
  # Clipped before the momentum, never after: the momentum also holds the weights' errors.
  if max_norm is not None:
    optimizer = optax.chain(optax.clip_by_global_norm(max_norm), optimizer)
    clip = spelled("optax.clip_by_global_norm", optax.clip_by_global_norm, max_norm=max_norm)
    spelling = f"optax.chain({clip}, {spelling})"
  quantizer = quantize_params(format, where, rounding, seed)
  quantizer_spelling = spelled(
    "eco_optax.quantize_params", quantize_params, format=format, where=where, rounding=rounding,
    seed=seed,
  )  # fmt: skip
  general = error_feedback.build(
    optimizer, quantizer, learning_rate, keep_error,
    is_known=_decays(momentum) and not isinstance(learning_rate, jax.core.Tracer),
    spelling=f"{spelling}, {quantizer_spelling}",
  )  # fmt: skip
  if closed is None or keep_error or learning_rate is None:
    return general
  return fuse(general, closed, rounding, seed, max_norm, fused=fused, **decay)
