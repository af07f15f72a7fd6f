"""sgd: SGD with momentum and without master weights in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax.formats import Format
from eco_optax.fused.step import Moments, Step
from eco_optax.fused.transformation import Optimizer
from eco_optax.optimizers import build
from eco_optax.quantized_array import Rounding, Where


class SgdScalars(NamedTuple):
  """Of one step of SGD with momentum."""

  clip: Any  # Factor of the gradient.
  keep: Any  # Decay rate of the momentum.
  rate: Any  # Learning rate.
  injection: Any  # Of an error.


def _propose(nesterov: bool) -> Callable[..., tuple[jax.Array, Moments]]:
  def propose(
    s: SgdScalars, gradient: jax.Array, moments: Moments, weight: jax.Array
  ) -> tuple[jax.Array, Moments]:
    del weight
    gradient = gradient.astype(jnp.float32) * s.clip
    momentum = gradient + s.keep * moments[0]
    direction = gradient + s.keep * momentum if nesterov else momentum
    return -s.rate * direction, (momentum,)

  return propose


def _inject(s: SgdScalars, moments: Moments, error: jax.Array) -> jax.Array:
  del moments
  return jnp.where(s.injection != 0, s.injection * error, np.float32(0))


SGD = Step(SgdScalars, _propose(nesterov=False), _inject)
NESTEROV = Step(SgdScalars, _propose(nesterov=True), _inject)


def _closed_form(learning_rate: optax.ScalarOrSchedule, momentum: Any, nesterov: bool) -> Optimizer:
  """`optax.sgd` with momentum in closed form."""

  def scalars(
    state: optax.TraceState, count: jax.Array | None, clip: jax.Array, decay: Any
  ) -> SgdScalars:
    del state, decay
    keep, rate = jnp.asarray(momentum, jnp.float32), build.rate_at(learning_rate, count)
    j = -rate * keep * (keep if nesterov else 1)
    injection, _ = build.injection_per_error(learning_rate, count, j, keep)
    return SgdScalars(clip, keep, rate, injection)

  return Optimizer(NESTEROV if nesterov else SGD, optax.TraceState, ("trace",), scalars)


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
  fused: bool | None = None,
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
    fused: whether a packed leaf's step runs as one kernel where the device has one. False takes the
      same step in plain JAX, which moves more bytes. None asks the environment variable
      ECO_OPTAX_FUSED, where 0 is False.

  Returns:
    A `GradientTransformationExtraArgs`. Apply its updates with `eco.apply_updates`. On a mesh its
    `update` takes `shardings=`, a tree of the parameters' NamedShardings, by which each device does
    the step of its own part; without, the compiler splits the step, and moves more bytes. With
    `gradient_scale=`, a scalar by which gradients are multiplied before all else, a clip by a norm
    that is known already or a loss scale takes no pass over memory. One that is not finite skips
    the step: nothing changes, bit for bit.

  Raises:
    ValueError: naming the hyperparameter, if one is not a number.

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> params = eco.quantize({"w": jnp.ones((4, 4))}, eco.INT4)
    >>> state = eco.sgd(0.1, momentum=0.9).init(params)

  References:
    Nikdan et al, `ECO <https://arxiv.org/abs/2601.22101>`_, 2026, Algorithm 2.
  """
  build.require_numbers(learning_rate, momentum=momentum, max_norm=max_norm)
  arguments = {
    "learning_rate": learning_rate, "momentum": momentum, "nesterov": nesterov,
    "accumulator_dtype": accumulator_dtype,
  }  # fmt: skip
  optimizer = optax.sgd(**arguments)
  closed = _closed_form(learning_rate, momentum, nesterov) if momentum else None
  return build.without_master_weights(
    optimizer, closed, learning_rate, max_norm, keep_error,
    spelling=build.spelled("optax.sgd", optax.sgd, **arguments), momentum=momentum,
    format=format, where=where, rounding=rounding, seed=seed, fused=fused,
  )  # fmt: skip
