"""What a quantized run should watch: saturation, weights moved, similar errors, lost injection."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from eco_optax.advice import Advice as Advice
from eco_optax.advice import Grid as Grid
from eco_optax.advice import Verdict as Verdict
from eco_optax.advice import advise as advise
from eco_optax.quantized_array import is_quantized
from eco_optax.transforms import error_feedback
from eco_optax.transforms.low_bit_moments import (
  LowBitMomentsState,
  MomentStorage,
  check_moment_dtypes,
)
from eco_optax.transforms.momentum import Leaves, shapes_of
from eco_optax.transforms.packed import Context, PackedTransformation, run
from eco_optax.transforms.stored_moments import MomentDtype, SecondMomentDtype


def _norm(leaves: list[jax.Array]) -> jax.Array:
  return jnp.sqrt(sum((jnp.sum(jnp.square(x)) for x in leaves), jnp.zeros([], jnp.float32)))


def _ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  """The ratio; NaN where the divisor is zero."""
  return numerator / jnp.where(denominator > 0, denominator, jnp.nan)


def _packed(params: Any) -> list:
  return [leaf for leaf in jax.tree.leaves(params, is_leaf=is_quantized) if is_quantized(leaf)]


def saturation(params: Any) -> jax.Array:
  """Share of the quantized weights that sit at their format's largest code.

  One weight per scale does under nearest rounding; many more mean that scales are too small.

  Args:
    params: a tree with QuantizedArray leaves.

  Returns:
    float32 scalar in [0, 1].

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> from eco_optax import diagnostics
    >>> diagnostics.saturation(eco.quantize({"w": jnp.eye(4)}, eco.FP8))
    Array(0.25, dtype=float32)
  """
  leaves = _packed(params)
  full = sum(jnp.sum(jnp.abs(leaf.codes.astype(jnp.float32)) >= leaf.format.max) for leaf in leaves)
  return jnp.asarray(full, jnp.float32) / max(sum(leaf.size for leaf in leaves), 1)


def fraction_moved(old_params: Any, new_params: Any) -> jax.Array:
  """Share of the quantized weights whose stored value differs between two trees.

  Args:
    old_params: a tree with QuantizedArray leaves.
    new_params: the same tree, later.

  Returns:
    float32 scalar in [0, 1].

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> from eco_optax import diagnostics
    >>> params = eco.quantize({"w": jnp.eye(4)}, eco.FP8)
    >>> diagnostics.fraction_moved(params, params)
    Array(0., dtype=float32)
  """
  pairs = list(zip(_packed(old_params), _packed(new_params), strict=True))
  moved = sum(jnp.sum(old.dequantize() != new.dequantize()) for old, new in pairs)
  return jnp.asarray(moved, jnp.float32) / max(sum(old.size for old, _ in pairs), 1)


def error_similarity(previous: Any, current: Any) -> tuple[jax.Array, jax.Array]:
  """Similarity of two consecutive quantization errors, which the paper's derivation assumes.

  Args:
    previous: a tree of float32 errors.
    current: the errors one step later, in the same tree.

  Returns:
    float32 scalars ‖e_{t+1}‖ / ‖e_t‖ and cos(e_t, e_{t+1}); NaN where an error is zero.

  Example:
    >>> import jax.numpy as jnp
    >>> from eco_optax import diagnostics
    >>> diagnostics.error_similarity({"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([6.0, 8.0])})
    (Array(2., dtype=float32), Array(1., dtype=float32))

  References:
    Nikdan et al, `ECO <https://arxiv.org/abs/2601.22101>`_, 2026 (similarity of errors).
  """
  before, after = jax.tree.leaves(previous), jax.tree.leaves(current)
  product = sum(
    (jnp.sum(a * b) for a, b in zip(before, after, strict=True)), jnp.zeros([], jnp.float32)
  )
  norms = _norm(before), _norm(after)
  return _ratio(norms[1], norms[0]), _ratio(product, norms[0] * norms[1])


def lost_injection(proposed: Any, injection: Any, stored: Any) -> jax.Array:
  """Share of an injection that a momentum's own precision swallowed.

  Args:
    proposed: the momentum m̃ that the optimizer proposed, a float32 tree.
    injection: what the rule adds to it, float32.
    stored: the momentum as it is kept, in any dtype.

  Returns:
    float32 scalar ‖stored − m̃ − injection‖ / ‖injection‖; NaN where nothing is injected.

  Example:
    >>> import jax.numpy as jnp
    >>> from eco_optax import diagnostics
    >>> diagnostics.lost_injection(jnp.ones(1), jnp.ones(1), jnp.ones(1))
    Array(1., dtype=float32)
  """
  lost = jax.tree.map(lambda m, i, s: s.astype(jnp.float32) - m - i, proposed, injection, stored)
  return _ratio(_norm(jax.tree.leaves(lost)), _norm(jax.tree.leaves(injection)))


def kept_injection(proposed: Any, injection: Any, stored: Any) -> jax.Array:
  """How much of an injection a momentum holds once it is stored: 1 is all of it.

  Rounding to nearest loses small parts, so that this falls below 1; stochastic rounding keeps
  it in the mean, whatever noise `lost_injection` finds beside it.

  Args:
    proposed: the momentum m̃ that the optimizer proposed, a float32 tree.
    injection: what the rule adds to it, float32.
    stored: the momentum as it is kept, in any dtype.

  Returns:
    float32 scalar ⟨stored − m̃, injection⟩ / ‖injection‖²; NaN where nothing is injected.

  Example:
    >>> import jax.numpy as jnp
    >>> from eco_optax import diagnostics
    >>> diagnostics.kept_injection(jnp.ones(1), jnp.ones(1), jnp.full(1, 1.5))
    Array(0.5, dtype=float32)
  """
  kept = jax.tree.map(
    lambda m, i, s: jnp.sum((s.astype(jnp.float32) - m) * i), proposed, injection, stored
  )
  total = sum(jax.tree.leaves(kept), jnp.zeros([], jnp.float32))
  return _ratio(total, jnp.square(_norm(jax.tree.leaves(injection))))


class Metrics(NamedTuple):
  """What `watch` measures at each step; float32 scalars over all quantized leaves."""

  error_norm: jax.Array  # ‖e_{t+1}‖
  error_norm_ratio: jax.Array  # ‖e_{t+1}‖ / ‖e_t‖
  error_cosine: jax.Array  # cos(e_t, e_{t+1})
  injection_to_momentum: jax.Array  # ‖injection‖ / ‖m̃‖
  lost_injection: jax.Array  # ‖m − m̃ − injection‖ / ‖injection‖
  kept_injection: jax.Array  # ⟨m − m̃, injection⟩ / ‖injection‖²
  unpaid: jax.Array  # ‖e − D injection‖ / ‖e‖; 0 but where conjugate residuals find the injection


class WatchState(NamedTuple):
  """State of `watch`."""

  inner: error_feedback.ErrorFeedbackState | LowBitMomentsState
  error: Leaves  # float32, by path.
  metrics: Metrics  # Of the last step; NaN before the first.


def watch(
  inner: optax.GradientTransformation,
  quantizer: optax.GradientTransformation,
  learning_rate: optax.ScalarOrSchedule | None = None,
  keep_error: bool = False,
  mu: MomentDtype = "float32",
  nu: SecondMomentDtype = "float32",
) -> optax.GradientTransformationExtraArgs:
  """`error_feedback_to_momentum` that also measures itself; the trajectory is the same.

  It stores the last error to compare with, so it costs 4 bytes per quantized weight: for runs that
  are looked at, not for the largest ones.

  Args:
    inner: as in `error_feedback_to_momentum`.
    quantizer: as in `error_feedback_to_momentum`.
    learning_rate: as in `error_feedback_to_momentum`.
    keep_error: as in `error_feedback_to_momentum`.
    mu: as in `low_bit_moments`, to see what it leaves of the injection.
    nu: as in `low_bit_moments`.

  Returns:
    A `GradientTransformationExtraArgs` whose state has `.metrics`.

  Example:
    >>> import jax.numpy as jnp, optax, eco_optax as eco
    >>> params = eco.quantize({"w": jnp.ones((4, 4))}, eco.FP8)
    >>> tx = eco.diagnostics.watch(optax.adamw(1e-3), eco.quantize_params())
    >>> _, state = tx.update({"w": jnp.ones((4, 4))}, tx.init(params), params)
    >>> state.metrics.error_norm.shape
    ()
  """
  tx = error_feedback.build(inner, quantizer, learning_rate, keep_error, observe=lambda seen: seen)
  check_moment_dtypes(mu, nu)
  is_low_bit = (mu, nu) != ("float32", "float32")

  def init(params: Any) -> WatchState:
    state = tx.init(params)
    nan = jnp.full([], jnp.nan, jnp.float32)
    paths = error_feedback.moved_paths(quantizer, quantizer.init(params), params)
    shapes = shapes_of(params)
    if is_low_bit:
      step = jnp.zeros([], jnp.int32)
      state = LowBitMomentsState(step, MomentStorage(mu, nu, step).store(state, params))
    error = {path: jnp.zeros(shapes[path], jnp.float32) for path in paths}
    return WatchState(state, error, Metrics(*[nan] * len(Metrics._fields)))

  def update(
    updates: Any, state: WatchState, params: Any, context: Context, **extra_args: Any
  ) -> tuple[Any, WatchState]:
    inner_state, shapes = state.inner, shapes_of(params)
    if is_low_bit:
      moments = MomentStorage(mu, nu, state.inner.step)
      inner_state = moments.read(state.inner.inner, params)
    updates, (new_state, seen) = run(tx, updates, inner_state, params, context, extra_args)
    if is_low_bit:
      stored = moments.store(new_state, params, context.layer, state.inner.inner)
      new_state = LowBitMomentsState(optax.safe_increment(moments.step), stored)
      where = error_feedback.Momentum(shapes, tuple(seen.stored))
      seen = seen._replace(stored=where.get(moments.read(stored.inner, params)))
    norm_ratio, cosine = error_similarity(state.error, seen.error)
    metrics = Metrics(
      error_norm=_norm(jax.tree.leaves(seen.error)),
      error_norm_ratio=norm_ratio,
      error_cosine=cosine,
      injection_to_momentum=_ratio(
        _norm(jax.tree.leaves(seen.injection)), _norm(jax.tree.leaves(seen.momentum))
      ),
      lost_injection=lost_injection(seen.momentum, seen.injection, seen.stored),
      kept_injection=kept_injection(seen.momentum, seen.injection, seen.stored),
      unpaid=_ratio(_norm(list(seen.unpaid.values())), _norm(list(seen.owed.values()))),
    )
    return updates, WatchState(new_state, seen.error, metrics)

  return PackedTransformation(init, update)
