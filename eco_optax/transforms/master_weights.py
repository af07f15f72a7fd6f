"""master_weights: the baseline that ECO replaces, with the master weight split in two."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax import rounding as rounding_lib
from eco_optax import trees
from eco_optax.quantized_array import QuantizedArray, dequantize, is_quantized
from eco_optax.transforms.error_feedback import moved_paths, refuse_packed
from eco_optax.transforms.packed import (
  Context,
  PackedTransformation,
  add_update,
  float_gradients,
  is_packed_transformation,
  require_params,
  require_state,
  require_stock,
  run,
  stored_weight,
  update_stock,
)

Residual = Literal["float32", "bfloat16", "int16", "int12", "int8"]

# Largest integer of residuals, which count in parts of a step of the weight's own grid.
_LARGEST = {"int16": 2**15 - 1, "int12": 2**11 - 1, "int8": 2**7 - 1}
KINDS: tuple[Residual, ...] = ("float32", "bfloat16", "int16", "int12", "int8")

# Residuals below float32 are rounded stochastically, with random bits of their own stream.
_RESIDUAL_SEED = 0xD1B54A32D192ED03


class MasterWeightsState(NamedTuple):
  """State of `master_weights`."""

  step: jax.Array  # shape=(), dtype=jnp.int32. Steps taken.
  inner: optax.OptState  # Of the stock optimizer, on the master weights.
  quantizer: optax.OptState
  residual: Any  # By leaf: an array as `residual` says; MaskedNode if not quantized.


def _pack_pairs(count: jax.Array) -> jax.Array:
  """12-bit integers as uint8, two in three bytes along the second last axis (or the only one).

  A byte for the low eight bits of each, and one for the high four of both.
  """
  axis = max(count.ndim - 2, 0)
  size = count.shape[axis]
  odd = [(0, size % 2 if i == axis else 0) for i in range(count.ndim)]
  pairs = jnp.pad(count, odd).reshape(*count.shape[:axis], -1, 2, *count.shape[axis + 1 :])
  first, second = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
  high = ((first >> 8) & 15) | ((second >> 8) & 15) << 4
  packed = jnp.stack([(x & 255).astype(jnp.uint8) for x in (first, second, high)], axis + 1)
  return packed.reshape(*count.shape[:axis], -1, *count.shape[axis + 1 :])


def _unpack_pairs(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The int32 values that `_pack_pairs` stored, in their shape."""
  axis = max(len(shape) - 2, 0)
  triples = packed.reshape(*shape[:axis], -1, 3, *shape[axis + 1 :]).astype(jnp.int32)
  first, second, high = (
    jax.lax.index_in_dim(triples, i, axis + 1, keepdims=False) for i in range(3)
  )
  # The shifts up and down again extend the sign.
  counts = [(first | high << 8) << 20 >> 20, (second | high >> 4 << 8) << 20 >> 20]
  pairs = jnp.stack(counts, axis + 1).reshape(*shape[:axis], -1, *shape[axis + 1 :])
  return jax.lax.slice_in_dim(pairs, 0, shape[axis], axis=axis)


def _unit(weight: QuantizedArray, kind: Residual, largest_error: float) -> jax.Array:
  """What an integer residual counts: a part of the weight's own step, by which q may be off."""
  step = rounding_lib.grid_step(weight.codes.astype(jnp.float32), weight.format.dtype)
  return weight.apply_scale(step) * np.float32(largest_error / _LARGEST[kind])


def _decode(weight: Any, residual: jax.Array, kind: Residual, largest_error: float) -> jax.Array:
  if kind not in _LARGEST:
    return residual.astype(jnp.float32)
  count = _unpack_pairs(residual, weight.shape) if kind == "int12" else residual
  return count.astype(jnp.float32) * _unit(weight, kind, largest_error)


def _encode(
  weight: Any, error: jax.Array, kind: Residual, largest_error: float, bits: jax.Array
) -> jax.Array:
  if kind not in _LARGEST:
    return rounding_lib.stochastic_cast(error, jnp.dtype(kind), bits)
  # Where a unit is 0, as in a row of zeros, 0 / 0 becomes the count 0.
  units = error / _unit(weight, kind, largest_error)
  count = rounding_lib.round_to_integers(units, _LARGEST[kind], bits)
  return _pack_pairs(count) if kind == "int12" else count.astype(kind)


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
    residual: what r is stored in. `"float32"` is the full master weight, 4 more bytes per quantized
      weight; `"bfloat16"` takes 2. `"int16"`, `"int12"` and `"int8"` take 2, 1.5 and 1: they count
      equal parts of the spacing of the weight's own grid, over which r is spread evenly; a float is
      coarse for the larger half of them (there int16 is 128 times finer than bfloat16). For nearest
      rounding, which is off by half a step at most, a part is half of what it is otherwise: keep
      the quantizer's rounding as long as the state. All below float32 are rounded stochastically.

  Returns:
    A `GradientTransformationExtraArgs`. Apply its updates with `eco.apply_updates`.

  Raises:
    ValueError: for an unknown residual, or at `init`, naming the leaf, for an integer residual of
      a leaf that is not packed.

  Example:
    >>> import jax.numpy as jnp, optax, eco_optax as eco
    >>> params = eco.quantize({"w": jnp.ones((4, 4))}, eco.FP8)
    >>> tx = eco.master_weights(optax.adamw(1e-3), eco.quantize_params(rounding="nearest"))
    >>> tx.init(params).residual["w"].dtype
    dtype('float32')

  References:
    Micikevicius et al, `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`_, 2017.
  """
  require_stock(
    inner, "eco_optax.master_weights", "give it the optimizer, and round by its quantizer"
  )
  if residual not in KINDS:
    raise ValueError(f"residual must be one of {', '.join(KINDS)}, got {residual!r}")
  inner = optax.with_extra_args_support(inner)
  stored_in = jnp.dtype("uint8" if residual == "int12" else residual)
  packed_quantizer = is_packed_transformation(quantizer)
  largest_error = getattr(quantizer, "largest_error", 1.0)

  def check_residual(path: str, r: Any) -> None:
    if r.dtype != stored_in:
      raise ValueError(
        f"the residual of {trees.leaf_name(path)} in the state is {r.dtype}, but residual="
        f"{residual!r} is stored in {stored_in}: keep residual= as long as the state, or call"
        " tx.init(params)"
      )

  def init(params: Any) -> MasterWeightsState:
    if not packed_quantizer:
      trees.map_with_path(refuse_packed, params, is_leaf=is_quantized)
    quantizer_state = quantizer.init(params)
    moved = moved_paths(quantizer, quantizer_state, params)

    def start(path: str, leaf: Any) -> Any:
      if path not in moved:
        return optax.MaskedNode()
      if residual in _LARGEST and not is_quantized(leaf):
        raise ValueError(
          f"{trees.leaf_name(path)} is not packed, so an {residual} residual has no step to count"
          " in: use residual='bfloat16', or pack it with eco.quantize"
        )
      dense = leaf.dequantize() if is_quantized(leaf) else leaf
      zeros = jnp.zeros_like(dense, jnp.int32 if residual == "int12" else residual)
      return _pack_pairs(zeros) if residual == "int12" else zeros

    start_residual = trees.map_with_path(start, params, is_leaf=is_quantized)
    return MasterWeightsState(
      jnp.zeros([], jnp.int32), inner.init(dequantize(params)), quantizer_state, start_residual
    )

  def update(
    updates: Any, state: MasterWeightsState, params: Any, context: Context, **extra_args: Any
  ) -> tuple[Any, MasterWeightsState]:
    require_params(params)
    require_state(state, MasterWeightsState, "eco_optax.master_weights")
    trees.map_with_path(check_residual, state.residual)
    updates, context = context.scale(updates)
    updates = float_gradients(updates, params)
    is_leaf = lambda x: is_quantized(x) or isinstance(x, optax.MaskedNode)
    stored = dequantize(params)
    keeps = lambda r: not isinstance(r, optax.MaskedNode)
    master = jax.tree.map(
      lambda r, leaf, dense: (
        add_update(dense, _decode(leaf, r, residual, largest_error)) if keeps(r) else dense
      ),
      state.residual,
      params,
      stored,
      is_leaf=is_leaf,
    )
    updates, inner_state = update_stock(inner, updates, state.inner, master, extra_args)
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
    quantized, quantizer_state = run(
      quantizer, updates, state.quantizer, params, context, extra_args
    )

    def keep(path: str, r: Any, leaf: Any, new: Any, proposed: Any) -> Any:
      if not keeps(r):
        return r
      error = proposed - stored_weight(path, leaf, new)
      bits = rounding_lib.counter_bits(
        rounding_lib.stream_key(_RESIDUAL_SEED, state.step, path),
        error.shape,
        context.layer,
      )
      return _encode(new, error, residual, largest_error, bits)

    new_residual = trees.map_with_path(
      keep, state.residual, params, quantized, proposed, is_leaf=is_leaf
    )
    step = optax.safe_increment(state.step)
    return quantized, MasterWeightsState(step, inner_state, quantizer_state, new_residual)

  return PackedTransformation(init, update)
