"""low_bit_moments: any optimizer's first and second moments in 8 or 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from eco_optax import rounding as rounding_lib
from eco_optax import trees
from eco_optax.fused.transformation import FusedTransformation
from eco_optax.quantized_array import is_quantized
from eco_optax.transforms import momentum as momentum_lib
from eco_optax.transforms.momentum import shapes_of
from eco_optax.transforms.quantize_params import PackedTransformation, require_params
from eco_optax.transforms.stored_moments import (
  DTYPES,
  Kind,
  MomentDtype,
  block_axis,
  read,
  store,
)

# Of the random bits with which moments are rounded.
_SEED = 0xBF58476D1CE4E5B9


class LowBitMomentsState(NamedTuple):
  """State of `low_bit_moments`."""

  step: jax.Array  # shape=(), dtype=jnp.int32. Steps taken; it numbers the random bits.
  inner: optax.OptState  # With QuantizedArray, SecondMoment or bfloat16 leaves as moments.


class Codec(NamedTuple):
  """How an optimizer's state is stored and read back; shapes are of the parameters, by path."""

  store: Callable[..., Any]  # (state, parameters, step, layer) → state
  read: Callable[[Any, Any], Any]  # (state, shapes) → state
  keys: Callable[..., Any]  # (state, shapes, step) → state with keys of random bits as moments


def codec(mu: MomentDtype, nu: MomentDtype) -> Codec:
  """Stores first moments as `mu` and second ones as `nu`; see `low_bit_moments`."""
  for name, dtype in (("mu", mu), ("nu", nu)):
    if dtype not in DTYPES:
      raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {dtype!r}")
  dtypes = {"first": mu, "second": nu}
  key = lambda step, path: rounding_lib.stream_key(_SEED, step, path)

  def store_state(state: Any, params: Any, step: jax.Array, layer: Any = None) -> Any:
    weights = momentum_lib.flat(params)

    def store_leaf(path: str, kind: Kind, x: jax.Array) -> Any:
      if dtypes[kind] == "float32" or not x.ndim or not trees.is_float(x):
        return x
      bits = rounding_lib.counter_bits(key(step, path), x.shape, layer)
      # The longest end of the moment's path that is one of a parameter.
      owner = next(end for end in trees.path_ends(path) if end in weights)
      weight = weights[owner]
      if not is_quantized(weight):
        return store(x, kind, dtypes[kind], bits)
      return store(x, kind, dtypes[kind], bits, True, block_axis(weight.format))

    return momentum_lib.map_moments(store_leaf, state, shapes_of(params))

  def read_state(state: Any, shapes: Any) -> Any:
    def read_leaf(path: str, kind: Kind, x: Any) -> jax.Array:
      del path
      is_low = is_quantized(x) or (dtypes[kind] == "bfloat16" and trees.is_float(x))
      return read(x) if is_low else x

    return momentum_lib.map_moments(read_leaf, state, shapes)

  def keys(state: Any, shapes: Any, step: jax.Array) -> Any:
    return momentum_lib.map_moments(lambda path, kind, x: key(step, path), state, shapes)

  return Codec(store_state, read_state, keys)


def low_bit_moments(
  inner: optax.GradientTransformation,
  mu: MomentDtype = "float8_e4m3fn",
  nu: MomentDtype = "float8_e4m3fn",
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps the moments of any optimizer in 8 or 16 bits between its steps.

  A step reads the moments as float32, and rounds what the optimizer leaves there stochastically,
  so that small changes survive in the mean: those of a slow average, and the quantization errors
  that `error_feedback_to_momentum` puts there. With FP8 weights and 8-bit moments, training
  without master weights takes 3.1 bytes per parameter instead of 9.

  Codes of matrices are in blocks of 32 rows with scales of powers of two (MXFP8, MXINT8); INT8
  codes of parameters that are not packed, such as an embedding, in blocks of up to 128 along the
  last axis. Of a second moment the square root is stored, rounded so that its square is unbiased;
  what is not zero stays so. Steps of `eco.adamw` and `eco.sgd` read and write them in the same pass
  as the weights.

  Args:
    inner: any optimizer, stock or of this package, whole: `eco.adamw(…)`,
      `error_feedback_to_momentum(optax.adamw(…), …)`, `optax.MultiSteps(…)`, `optax.adam(…)`.
    mu: what momenta and other first moments are stored in: `"float8_e4m3fn"`, `"int8"`,
      `"float8_e5m2"`, `"bfloat16"`, or `"float32"` to leave them as they are.
    nu: what second moments are stored in.

  Returns:
    A `GradientTransformationExtraArgs` whose state has the state of `inner` with such moments in
    it. Around it `layer_by_layer` keeps the float32 copies to those of one layer.

  Raises:
    ValueError: for an unknown dtype, or at `init` if the optimizer has no moments.

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> params = eco.quantize({"w": jnp.ones((128, 128))}, eco.FP8)
    >>> tx = eco.low_bit_moments(eco.adamw(1e-3))
    >>> state = tx.init(params)
    >>> state.inner.inner[0].mu["w"].qvalue.dtype, state.inner.inner[0].nu["w"].qvalue.dtype
    (dtype(float8_e4m3fn), dtype(float8_e4m3fn))

  References:
    Dettmers et al, `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021.
  """
  inner_update = optax.with_extra_args_support(inner).update
  moments = codec(mu, nu)

  def init(params: Any) -> LowBitMomentsState:
    step, state = jnp.zeros([], jnp.int32), inner.init(params)
    shapes = shapes_of(params)
    if shapes and not momentum_lib.has_moments(state, shapes):
      raise ValueError(
        f"the optimizer keeps no moments in its {type(state).__name__} that could be stored in few"
        " bits: use it without eco_optax.low_bit_moments"
      )
    # Under `jit` they are constants, whose codes XLA would work out as it compiles, for minutes.
    state = jax.lax.optimization_barrier(state)
    return LowBitMomentsState(step, moments.store(state, params, step))

  def update(
    updates: Any, state: LowBitMomentsState, params: Any = None, **extra_args: Any
  ) -> tuple[Any, LowBitMomentsState]:
    require_params(params)
    if isinstance(inner, FusedTransformation):
      updates, stored = inner.update(
        updates, state.inner, params, codec=moments, codec_step=state.step, **extra_args
      )
    else:
      unpacked = moments.read(state.inner, shapes_of(params))
      updates, inner_state = inner_update(updates, unpacked, params, **extra_args)
      stored = moments.store(inner_state, params, state.step, extra_args.get("layer"))
    return updates, LowBitMomentsState(optax.safe_increment(state.step), stored)

  if isinstance(inner, FusedTransformation):
    takes_whole = lambda state, params: inner.takes_whole(state.inner, params, rounds=True)
    return PackedTransformation(init, update, takes_whole)
  if isinstance(inner, PackedTransformation):
    return PackedTransformation(init, update)
  return optax.GradientTransformationExtraArgs(init, update)
