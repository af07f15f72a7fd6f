"""The runs that are compared: each is an expression of the library's public names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

import eco_optax as eco

_ROUNDING = {"rtn": "nearest", "sr": "stochastic"}


def schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
  """Linear warm-up to the peak, then a cosine; the paper's is 0.01× → 1× (10%) → 0.1×."""
  optimizer, peak = config.optimizer, config.optimizer.learning_rate
  warmup = max(int(optimizer.warmup_fraction * config.steps + 1e-6), 1)
  return optax.warmup_cosine_decay_schedule(
    optimizer.start_fraction * peak,
    peak,
    warmup,
    max(config.steps, warmup + 1),
    optimizer.end_fraction * peak,
  )


def global_norm(tree: Any) -> jax.Array:
  """Euclidean norm of all leaves together, summed in float32 whatever their dtype."""
  return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
  """`optax.clip_by_global_norm` that is told the norm: `update(…, grad_norm=…)`, see `global_norm`.

  Optax would sum bfloat16 gradients in bfloat16.
  """

  def update(
    grads: Any, state: Any, params: Any = None, *, grad_norm: jax.Array, **extra_args: Any
  ) -> tuple[Any, Any]:
    del params, extra_args
    factor = jnp.minimum(1.0, max_norm / jnp.maximum(grad_norm, 1e-30))
    return jax.tree.map(lambda g: (g.astype(jnp.float32) * factor).astype(g.dtype), grads), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def stock_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """AdamW with the settings of the config."""
  o = config.optimizer
  return optax.adamw(schedule(config), o.b1, o.b2, o.eps, weight_decay=o.weight_decay)


def _low_bit(
  config: ml_collections.ConfigDict, tx: optax.GradientTransformation
) -> optax.GradientTransformation:
  """The optimizer with its moments stored as the config says."""
  if set(config.moments.values()) == {"float32"}:
    return tx
  return eco.low_bit_moments(tx, **config.moments)


def optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformationExtraArgs:
  """The optimizer of `config.method`, layer by layer behind a clip by global norm.

  Its update takes the norm of the gradients too: `tx.update(…, grad_norm=global_norm(grads))`.
  """
  inner = stock_optimizer(config)
  clip = clip_by_global_norm(config.optimizer.max_norm)
  if config.method == "bf16_mw":
    return optax.with_extra_args_support(optax.chain(clip, _low_bit(config, inner)))
  family, rounding = config.method.split("_")
  quantizer = eco.quantize_params(rounding=_ROUNDING[rounding], seed=config.seed)  # type: ignore[arg-type]
  if family == "mw":
    tx = eco.master_weights(inner, quantizer, config.residual)
  elif family == "naive":
    tx = eco.chain(inner, quantizer)
  else:
    learning_rate = schedule(config) if config.schedule_aware else None
    tx = eco.error_feedback_to_momentum(inner, quantizer, learning_rate)
  tx = eco.layer_by_layer(_low_bit(config, tx))
  return optax.with_extra_args_support(optax.chain(clip, tx))
