"""master_weights: the baseline that ECO replaces, with the master weight split in two."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax import rounding as rounding_lib
from eco_optax import trees
from eco_optax.error_feedback import moved_paths, refuse_packed
from eco_optax.quantize_params import (
  PackedTransformation,
  add_update,
  float_gradients,
  require_params,
  stored_weight,
)
from eco_optax.quantized_array import QuantizedArray, dequantize, is_quantized

Residual = Literal["float32", "bfloat16", "int8"]

# Residuals below float32 are rounded stochastically, with random bits of their own stream.
_RESIDUAL_SEED = 0xD1B54A32D192ED03


class MasterWeightsState(NamedTuple):
  """State of `master_weights`."""

  step: jax.Array  # shape=(), dtype=jnp.int32. Steps taken.
  inner: optax.OptState  # Of the stock optimizer, on the master weights.
  quantizer: optax.OptState
  residual: Any  # Like the params, in the residual's dtype; MaskedNode if not quantized.


def _unit(weight: QuantizedArray) -> jax.Array:
  """The float32 value of one step of an int8 residual: 1/128 of the weight's own step."""
  step = rounding_lib.grid_step(weight.codes.astype(jnp.float32), weight.format.dtype)
  return weight.apply_scale(step) * np.float32(1 / 128)


def _decode(weight: Any, residual: jax.Array) -> jax.Array:
  if residual.dtype == jnp.int8:
    return residual.astype(jnp.float32) * _unit(weight)
  return residual.astype(jnp.float32)


def _encode(weight: Any, error: jax.Array, kind: Residual, bits: jax.Array) -> jax.Array:
  if kind == "int8":
    return rounding_lib.round_to_codes(error / _unit(weight), np.dtype(np.int8), bits)
  return rounding_lib.stochastic_cast(error, jnp.dtype(kind), bits)


def master_weights(
  inner: optax.GradientTransformation,
  quantizer: optax.GradientTransformation,
  residual: Residual = "float32",
) -> optax.GradientTransformationExtraArgs:
  r"""Quantized training with master weights, as a residual beside the stored weight.

  The master weight is θ* = θ̂ + r. A step of the optimizer at θ* proposes θ̃ = θ* + u; the
  quantizer stores θ̂' = q(θ̃), and r' = θ̃ − θ̂' is kept. No momentum is touched, so it serves any
  optimizer, Lion and Muon too.

  Args:
    inner: any stock optimizer; it sees the master weights.
    quantizer: `quantize_params`, or for float parameters any transformation that moves a proposed
      update.
    residual: what r is stored in. `"float32"` is the full master weight, 4 more bytes
      per quantized weight. `"bfloat16"` takes 2. `"int8"` takes 1: a multiple of 1/128 of the
      spacing of the weight's own grid at its value, for packed leaves. Both are rounded
      stochastically.

  Returns:
    A `GradientTransformationExtraArgs`. Apply its updates with `eco.apply_updates`.

  Raises:
    ValueError: for an unknown residual, or at `init`, naming the leaf, for an int8 residual of a
      leaf that is not packed.

  Example:
    >>> import jax.numpy as jnp, optax, eco_optax as eco
    >>> params = eco.quantize({"w": jnp.ones((4, 4))}, eco.FP8)
    >>> tx = eco.master_weights(optax.adamw(1e-3), eco.quantize_params(rounding="nearest"))
    >>> tx.init(params).residual["w"].dtype
    dtype('float32')

  References:
    Micikevicius et al, `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`_, 2017.
  """
  if residual not in ("float32", "bfloat16", "int8"):
    raise ValueError(f"residual must be 'float32', 'bfloat16' or 'int8', got {residual!r}")
  inner = optax.with_extra_args_support(inner)
  packed_quantizer = isinstance(quantizer, PackedTransformation)
  quantizer = optax.with_extra_args_support(quantizer)

  def init(params: Any) -> MasterWeightsState:
    if not packed_quantizer:
      trees.map_with_path(refuse_packed, params, is_leaf=is_quantized)
    quantizer_state = quantizer.init(params)
    moved = moved_paths(quantizer, quantizer_state, params)

    def start(path: str, leaf: Any) -> Any:
      if path not in moved:
        return optax.MaskedNode()
      if residual == "int8" and not is_quantized(leaf):
        raise ValueError(
          f"{trees.leaf_name(path)} is not packed, so an int8 residual has no step to count in: use"
          " residual='bfloat16', or pack it with eco.quantize"
        )
      return jnp.zeros(leaf.shape, residual)

    start_residual = trees.map_with_path(start, params, is_leaf=is_quantized)
    return MasterWeightsState(
      jnp.zeros([], jnp.int32), inner.init(dequantize(params)), quantizer_state, start_residual
    )

  def update(
    updates: Any, state: MasterWeightsState, params: Any = None, **extra_args: Any
  ) -> tuple[Any, MasterWeightsState]:
    require_params(params)
    updates = float_gradients(updates, params)
    is_leaf = lambda x: is_quantized(x) or isinstance(x, optax.MaskedNode)
    stored = dequantize(params)
    keeps = lambda r: not isinstance(r, optax.MaskedNode)
    master = jax.tree.map(
      lambda r, leaf, dense: add_update(dense, _decode(leaf, r)) if keeps(r) else dense,
      state.residual,
      params,
      stored,
      is_leaf=is_leaf,
    )
    updates, inner_state = inner.update(updates, state.inner, master, **extra_args)
    proposed = jax.tree.map(
      lambda r, weight, u: add_update(weight, u) if keeps(r) else None,
      state.residual,
      master,
      updates,
      is_leaf=is_leaf,
    )
    updates = jax.tree.map(
      lambda r, new, dense, u: new - dense if keeps(r) else u,
      state.residual,
      proposed,
      stored,
      updates,
      is_leaf=is_leaf,
    )
    quantized, quantizer_state = quantizer.update(updates, state.quantizer, params, **extra_args)

    def keep(path: str, r: Any, leaf: Any, new: Any, proposed: Any) -> Any:
      if not keeps(r):
        return r
      error = proposed - stored_weight(path, leaf, new)
      bits = rounding_lib.counter_bits(
        rounding_lib.stream_key(_RESIDUAL_SEED, state.step, path),
        error.shape,
        extra_args.get("layer"),
      )
      return _encode(new, error, residual, bits)

    new_residual = trees.map_with_path(
      keep, state.residual, params, quantized, proposed, is_leaf=is_leaf
    )
    step = optax.safe_increment(state.step)
    return quantized, MasterWeightsState(step, inner_state, quantizer_state, new_residual)

  return PackedTransformation(init, update)
