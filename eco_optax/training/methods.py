"""The runs that are compared: each is an expression of the library's public names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
import optax.contrib

import eco_optax as eco
from eco_optax.quantized_array import Rounding
from eco_optax.transforms.master_weights import MasterWeightsState
from eco_optax.transforms.packed import PackedTransformation, scale_gradients

_ROUNDING: dict[str, Rounding] = {"rtn": "nearest", "sr": "stochastic"}


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


def clip_factor(max_norm: float, grad_norm: jax.Array) -> jax.Array:
  """What gradients of a norm are multiplied by, so that it is `max_norm` at most."""
  return jnp.minimum(1.0, max_norm / jnp.maximum(grad_norm, 1e-30))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
  """`optax.clip_by_global_norm` that is told the norm: `update(…, grad_norm=…)`, see `global_norm`.

  Optax would sum bfloat16 gradients in bfloat16.
  """

  def update(
    grads: Any, state: Any, params: Any = None, *, grad_norm: jax.Array, **extra_args: Any
  ) -> tuple[Any, Any]:
    del params, extra_args
    return scale_gradients(grads, clip_factor(max_norm, grad_norm)), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def stock_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """Optax's optimizer of the config's name, with decoupled weight decay."""
  o = config.optimizer
  adam = {"b1": o.b1, "b2": o.b2, "eps": o.eps}
  directions: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.scale_by_adam(**adam),
    "nadamw": lambda: optax.scale_by_adam(**adam, nesterov=True),
    "amsgrad": lambda: optax.scale_by_amsgrad(**adam),
    # Its slow momentum forgets within a short run too.
    "ademamix": lambda: optax.contrib.scale_by_ademamix(**adam, b3=0.99, alpha=2.0),
    "yogi": lambda: optax.scale_by_yogi(**adam),
    "radam": lambda: optax.scale_by_radam(**adam),
    "sgd": lambda: optax.trace(o.b1),
  }
  return optax.chain(
    directions[o.name](),
    optax.add_decayed_weights(o.weight_decay),
    optax.scale_by_learning_rate(schedule(config)),
  )


def until(
  step: int, first: optax.GradientTransformation, then: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
  """The quantizer `first` for so many steps, and `then` from there on; both have one state."""
  first_update, then_update = first.update, then.update

  def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
    before, new_state = first_update(updates, state, params, **extra_args)
    after, _ = then_update(updates, state, params, **extra_args)
    choose = lambda a, b: jnp.where(state.step < step, a, b)

    def leaf(old: Any, a: Any, b: Any) -> Any:
      if a is old:  # What no quantizer moves has to be handed on as it is.
        return a
      return jax.tree.map(choose, a, b)

    return jax.tree.map(leaf, updates, before, after), new_state

  return PackedTransformation(first.init, update)


def _quantizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
  make = lambda rounding: eco.quantize_params(rounding=rounding, seed=config.seed)
  quantizer = make(_ROUNDING[config.method.split("_")[1]])
  if config.stochastic_after < 1:
    quantizer = until(int(config.stochastic_after * config.steps), quantizer, make("stochastic"))
  return quantizer


def clip_on_the_way(
  max_norm: float, tx: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
  """`tx`, a fused one, behind `clip_by_global_norm`, of which no array is made."""
  inner = optax.with_extra_args_support(tx)

  def update(
    grads: Any, state: Any, params: Any = None, *, grad_norm: jax.Array, **extra_args: Any
  ) -> tuple[Any, Any]:
    scale = clip_factor(max_norm, grad_norm)
    return inner.update(grads, state, params, gradient_scale=scale, **extra_args)

  return optax.GradientTransformationExtraArgs(inner.init, update)


_FUSED = ("adamw", "nadamw")


def _fused(config: ml_collections.ConfigDict) -> optax.GradientTransformationExtraArgs:
  """ECO over `stock_optimizer`, with the step of a leaf in one pass where there is a kernel."""
  o = config.optimizer
  return eco.adamw(
    schedule(config),
    o.b1,
    o.b2,
    o.eps,
    weight_decay=o.weight_decay,
    nesterov=o.name == "nadamw",
    rounding=_ROUNDING[config.method.split("_")[1]],
    seed=config.seed,
  )


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
  family, quantizer = config.method.split("_")[0], _quantizer(config)
  if family == "mw":
    tx = eco.master_weights(inner, quantizer, config.residual)
  elif family == "naive":
    tx = eco.chain(inner, quantizer)
  elif config.optimizer.name in _FUSED and config.schedule_aware and config.stochastic_after == 1:
    tx = eco.layer_by_layer(_low_bit(config, _fused(config)))
    # All states have the clip's place.
    return optax.chain(optax.identity(), clip_on_the_way(config.optimizer.max_norm, tx))
  else:
    learning_rate = schedule(config) if config.schedule_aware else None
    tx = eco.error_feedback_to_momentum(inner, quantizer, learning_rate)
  tx = eco.layer_by_layer(_low_bit(config, tx))
  return optax.with_extra_args_support(optax.chain(clip, tx))


def with_master(
  config: ml_collections.ConfigDict, params: Any, opt_state: Any, master: Any
) -> tuple[Any, Any]:
  """What a run with master weights starts from if these are given in float.

  A step of an optimizer that changes nothing, from any stored weights to the master weights, leaves
  the latter's rounding in the one and the rest in the residual.

  Args:
    config: of the run.
    params: packed, as `opt_state` was made from.
    opt_state: of `optimizer`, no step made.
    master: float32 weights in the tree of `eco.dequantize(params)`.

  Returns:
    Parameters and state.
  """
  move = eco.layer_by_layer(
    eco.master_weights(optax.identity(), _quantizer(config), config.residual)
  )
  way = jax.tree.map(jnp.subtract, master, eco.dequantize(params))
  updates, moved = move.update(way, move.init(params), params)
  kept = lambda state: isinstance(state, MasterWeightsState)
  (start,) = [x for x in jax.tree.leaves(moved, is_leaf=kept) if kept(x)]
  put = lambda x: x._replace(residual=start.residual) if kept(x) else x
  return eco.apply_updates(params, updates), jax.tree.map(put, opt_state, is_leaf=kept)
