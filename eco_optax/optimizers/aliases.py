"""adamw and sgd: an optimizer without master weights in one call."""

from __future__ import annotations

from typing import Any

import optax

from eco_optax.formats import Format
from eco_optax.fused import transformation as fused
from eco_optax.quantized_array import Rounding, Where
from eco_optax.transforms.error_feedback import error_feedback_to_momentum
from eco_optax.transforms.quantize_params import PackedTransformation, quantize_params


def _without_master_weights(
  optimizer: optax.GradientTransformation,
  closed: fused.Closed | None,
  learning_rate: optax.ScalarOrSchedule,
  max_norm: float | None,
  keep_error: bool,
  *,
  format: Format | None,
  where: Where | None,
  rounding: Rounding,
  seed: int,
  **decay: Any,
) -> optax.GradientTransformationExtraArgs:
  # Clipped before the momentum, never after: the momentum also holds what is owed to the weights.
  if max_norm is not None:
    optimizer = optax.chain(optax.clip_by_global_norm(max_norm), optimizer)
  quantizer = quantize_params(format, where, rounding, seed)
  general = error_feedback_to_momentum(optimizer, quantizer, learning_rate, keep_error)
  if closed is None or keep_error or learning_rate is None:

    def update(
      updates: Any, state: Any, params: Any = None, gradient_scale: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
      updates = fused.scale_gradients(updates, gradient_scale)
      return general.update(updates, state, params, **extra_args)

    return PackedTransformation(general.init, update)
  return fused.fuse(general, closed, rounding, seed, max_norm, **decay)


def adamw(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  eps_root: float = 0.0,
  mu_dtype: Any = None,
  weight_decay: float = 1e-4,
  mask: Any = None,
  *,
  nesterov: bool = False,
  max_norm: float | None = None,
  rounding: Rounding = "stochastic",
  seed: int = 0,
  format: Format | None = None,
  where: Where | None = None,
  keep_error: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """AdamW without master weights: `optax.adamw` with its hyperparameters, and ECO.

  Args:
    learning_rate: a number or a schedule; the rule follows it.
    b1: as in `optax.adamw`.
    b2: as in `optax.adamw`.
    eps: as in `optax.adamw`.
    eps_root: as in `optax.adamw`.
    mu_dtype: as in `optax.adamw`.
    weight_decay: as in `optax.adamw`.
    mask: as in `optax.adamw`.
    nesterov: as in `optax.adamw`.
    max_norm: clips the gradients' global norm, if given.
    rounding: as in `quantize_params`.
    seed: as in `quantize_params`.
    format: as in `quantize_params`.
    where: as in `quantize_params`.
    keep_error: as in `error_feedback_to_momentum`.

  Returns:
    A `GradientTransformationExtraArgs`. Apply its updates with `eco.apply_updates`. On a mesh its
    `update` takes `shardings=`, a tree of the parameters' NamedShardings, by which each device does
    the step of its own part; without, the compiler splits the step, and moves more bytes. With
    `gradient_scale=`, a scalar by which gradients are multiplied before all else, a clip by a norm
    that is known already or a loss scale takes no pass over memory.

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> params = eco.quantize({"w": jnp.ones((4, 4))}, eco.FP8)
    >>> tx = eco.adamw(1e-3, b1=0.9, b2=0.98, max_norm=1.0, rounding="stochastic", seed=0)
    >>> state = tx.init(params)

  References:
    Nikdan et al, `ECO <https://arxiv.org/abs/2601.22101>`_, 2026, Algorithm 3.
  """
  optimizer = optax.adamw(
    learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
  )
  closed = None
  if not callable(weight_decay):
    closed = fused.adamw(learning_rate, b1, b2, eps, eps_root, nesterov)
  return _without_master_weights(
    optimizer, closed, learning_rate, max_norm, keep_error,
    format=format, where=where, rounding=rounding, seed=seed, decay=weight_decay, mask=mask,
  )  # fmt: skip


def sgd(
  learning_rate: optax.ScalarOrSchedule,
  momentum: float = 0.9,
  nesterov: bool = False,
  accumulator_dtype: Any = None,
  *,
  max_norm: float | None = None,
  rounding: Rounding = "stochastic",
  seed: int = 0,
  format: Format | None = None,
  where: Where | None = None,
  keep_error: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """SGD with momentum, without master weights: `optax.sgd` and ECO.

  Args:
    learning_rate: a number or a schedule; the rule follows it.
    momentum: decay rate of the momentum, in (0, 1).
    nesterov: as in `optax.sgd`.
    accumulator_dtype: as in `optax.sgd`.
    max_norm: clips the gradients' global norm, if given.
    rounding: as in `quantize_params`.
    seed: as in `quantize_params`.
    format: as in `quantize_params`.
    where: as in `quantize_params`.
    keep_error: as in `error_feedback_to_momentum`; then it equals master weights.

  Returns:
    A `GradientTransformationExtraArgs`. Apply its updates with `eco.apply_updates`. On a mesh its
    `update` takes `shardings=`, a tree of the parameters' NamedShardings, by which each device does
    the step of its own part; without, the compiler splits the step, and moves more bytes. With
    `gradient_scale=`, a scalar by which gradients are multiplied before all else, a clip by a norm
    that is known already or a loss scale takes no pass over memory.

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> params = eco.quantize({"w": jnp.ones((4, 4))}, eco.INT4)
    >>> state = eco.sgd(0.1, momentum=0.9).init(params)

  References:
    Nikdan et al, `ECO <https://arxiv.org/abs/2601.22101>`_, 2026, Algorithm 2.
  """
  optimizer = optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype)
  closed = fused.sgd(learning_rate, momentum, nesterov) if momentum else None
  return _without_master_weights(
    optimizer, closed, learning_rate, max_norm, keep_error,
    format=format, where=where, rounding=rounding, seed=seed,
  )  # fmt: skip
