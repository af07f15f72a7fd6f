"""AdamW and SGD with momentum as element-wise functions: what a fused update computes per weight.

What does not depend on the weight is worked out beforehand, in a few float32 scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Moments = tuple[jax.Array, ...]  # The momentum comes first.


class Step(NamedTuple):
  """One optimizer."""

  scalars: Callable[..., Any]  # The NamedTuple of its float32 scalars.
  # (scalars, gradient, moments, θ̂) → (u, new moments)
  propose: Callable[[Any, jax.Array, Moments, jax.Array], tuple[jax.Array, Moments]]
  # (scalars, new moments, error) → what the rule adds to the momentum
  inject: Callable[[Any, Moments, jax.Array], jax.Array]


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


def _adam(nesterov: bool) -> Callable[..., tuple[jax.Array, Moments]]:
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


def _inject_adam(s: AdamScalars, moments: Moments, error: jax.Array) -> jax.Array:
  denominator = _denominator(s, moments[1])
  added = s.injection * denominator * error
  return jnp.where(denominator < s.limit, added, np.float32(0))


class SgdScalars(NamedTuple):
  """Of one step of SGD with momentum."""

  clip: Any  # Factor of the gradient.
  keep: Any  # Decay rate of the momentum.
  rate: Any  # Learning rate.
  injection: Any  # Of an error.


def _sgd(nesterov: bool) -> Callable[..., tuple[jax.Array, Moments]]:
  def propose(
    s: SgdScalars, gradient: jax.Array, moments: Moments, weight: jax.Array
  ) -> tuple[jax.Array, Moments]:
    del weight
    gradient = gradient.astype(jnp.float32) * s.clip
    momentum = gradient + s.keep * moments[0]
    direction = gradient + s.keep * momentum if nesterov else momentum
    return -s.rate * direction, (momentum,)

  return propose


def _inject_sgd(s: SgdScalars, moments: Moments, error: jax.Array) -> jax.Array:
  del moments
  return jnp.where(s.injection != 0, s.injection * error, np.float32(0))


ADAMW = Step(AdamScalars, _adam(nesterov=False), _inject_adam)
NADAMW = Step(AdamScalars, _adam(nesterov=True), _inject_adam)
SGD = Step(SgdScalars, _sgd(nesterov=False), _inject_sgd)
NESTEROV = Step(SgdScalars, _sgd(nesterov=True), _inject_sgd)
