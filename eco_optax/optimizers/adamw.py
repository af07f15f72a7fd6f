"""adamw: AdamW without master weights in one call."""

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
from eco_optax.transforms.inverse import SMALLEST_DERIVATIVE


class AdamScalars(NamedTuple):
  """Of one step of AdamW."""

  clip: Any  # Factor of the gradient.
  new1: Any  # 1 − b1
  keep1: Any  # b1
  new2: Any
  keep2: Any
  debias1: Any  # Factor of the momentum in the direction: its bias correction.
  lookahead: Any  # Factor of the gradient in the direction, with Nesterov.
  debias2: Any
  eps_root: Any
  eps: Any
  decay: Any  # Decoupled weight decay.
  rate: Any  # Learning rate.
  injection: Any  # Of an error, times the denominator.
  limit: Any  # Denominators up to which the update feels the momentum.


def _denominator(s: AdamScalars, second: jax.Array) -> jax.Array:
  return jnp.sqrt(second * s.debias2 + s.eps_root) + s.eps


def _propose(nesterov: bool) -> Callable[..., tuple[jax.Array, Moments]]:
  def propose(
    s: AdamScalars, gradient: jax.Array, moments: Moments, weight: jax.Array
  ) -> tuple[jax.Array, Moments]:
    gradient = gradient.astype(jnp.float32) * s.clip
    first = s.new1 * gradient + s.keep1 * moments[0]
    second = s.new2 * (gradient * gradient) + s.keep2 * moments[1]
    direction = first * s.debias1
    if nesterov:
      direction = direction + gradient * s.lookahead
    update = -s.rate * (direction / _denominator(s, second) + s.decay * weight)
    return update, (first, second)

  return propose


def _inject(s: AdamScalars, moments: Moments, error: jax.Array) -> jax.Array:
  denominator = _denominator(s, moments[1])
  added = s.injection * denominator * error
  return jnp.where(denominator < s.limit, added, np.float32(0))


ADAMW = Step(AdamScalars, _propose(nesterov=False), _inject)
NADAMW = Step(AdamScalars, _propose(nesterov=True), _inject)


def _closed_form(
  learning_rate: optax.ScalarOrSchedule,
  b1: Any,
  b2: Any,
  eps: Any,
  eps_root: Any,
  nesterov: bool,
) -> Optimizer:
  """`optax.adamw` in closed form."""

  def scalars(
    state: optax.ScaleByAdamState, count: jax.Array | None, clip: jax.Array, decay: Any
  ) -> AdamScalars:
    t = optax.safe_increment(state.count).astype(jnp.float32)
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    keep1, keep2, rate = f32(b1), f32(b2), build.rate_at(learning_rate, count)
    debias1, lookahead = 1 / (1 - keep1**t), f32(0)
    if nesterov:
      debias1, lookahead = keep1 / (1 - keep1 ** (t + 1)), f32(1 - b1) * debias1
    # J is this over the denominator.
    j = -rate * keep1 * debias1
    injection, usable = build.injection_per_error(learning_rate, count, j, keep1, t)
    limit = jnp.where(usable, jnp.abs(j) / SMALLEST_DERIVATIVE, 0)
    return AdamScalars(
      clip, f32(1 - b1), keep1, f32(1 - b2), keep2, debias1, lookahead, 1 / (1 - keep2**t),
      f32(eps_root), f32(eps), f32(decay), rate, injection, limit,
    )  # fmt: skip

  step = NADAMW if nesterov else ADAMW
  return Optimizer(step, optax.ScaleByAdamState, ("mu", "nu"), scalars)


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
  fused: bool | None = None,
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
    >>> params = eco.quantize({"w": jnp.ones((4, 4))}, eco.FP8)
    >>> tx = eco.adamw(1e-3, b1=0.9, b2=0.98, max_norm=1.0, rounding="stochastic", seed=0)
    >>> state = tx.init(params)

  References:
    Nikdan et al, `ECO <https://arxiv.org/abs/2601.22101>`_, 2026, Algorithm 3.
  """
  build.require_numbers(
    learning_rate, b1=b1, b2=b2, eps=eps, eps_root=eps_root, weight_decay=weight_decay,
    max_norm=max_norm,
  )  # fmt: skip
  arguments = {
    "learning_rate": learning_rate, "b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root,
    "mu_dtype": mu_dtype, "weight_decay": weight_decay, "mask": mask, "nesterov": nesterov,
  }  # fmt: skip
  optimizer = optax.adamw(**arguments)
  closed = None
  if not callable(weight_decay):
    closed = _closed_form(learning_rate, b1, b2, eps, eps_root, nesterov)
  return build.without_master_weights(
    optimizer, closed, learning_rate, max_norm, keep_error,
    spelling=build.spelled("optax.adamw", optax.adamw, **arguments), momentum=b1,
    format=format, where=where, rounding=rounding, seed=seed, fused=fused, decay=weight_decay,
    mask=mask,
  )  # fmt: skip
