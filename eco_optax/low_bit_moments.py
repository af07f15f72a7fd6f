"""low_bit_moments: any optimizer's first and second moments in 8 or 16 bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax import momentum as momentum_lib
from eco_optax import rounding as rounding_lib
from eco_optax import trees
from eco_optax.formats import Format, grid_smallest
from eco_optax.quantize_params import PackedTransformation, require_params
from eco_optax.quantized_array import QuantizedArray, is_quantized, pack, quantize_array, scaled

MomentDtype = Literal["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"]

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
_LONGEST_BLOCK, _SHORTEST_BLOCK = 128, 16

# Of the random bits with which moments are rounded.
_SEED = 0xBF58476D1CE4E5B9


class LowBitMomentsState(NamedTuple):
  """State of `low_bit_moments`."""

  step: jax.Array  # shape=(), dtype=jnp.int32. Steps taken; it numbers the random bits.
  inner: optax.OptState  # With QuantizedArray, SecondMoment or bfloat16 leaves as moments.


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["qvalue", "scale", "tensor_scale", "sink"],
  meta_fields=["format", "odd"],
)
@dataclasses.dataclass(frozen=True)
class SecondMoment(QuantizedArray):
  """A non-negative array whose square root is stored: half as many binades to span."""

  def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
    """The stored values, `(codes × scale)²` computed in float32."""
    return jnp.square(super().dequantize()).astype(dtype)


def block_format(shape: tuple[int, ...], dtype: str) -> Format:
  """The format of a moment of this shape: blocks along its last axis, of 128 where these divide it.

  Args:
    shape: of the moment, with one axis or more.
    dtype: of the codes, a name.

  Returns:
    A format that fits. The scales of floating-point codes are powers of two, of one byte; those of
    integers, which have no bits to lose, are float32.
  """
  scale = "float32" if dtype == "int8" else "float8_e8m0fnu"
  size = shape[-1]
  block = max(n for n in range(1, min(size, _LONGEST_BLOCK) + 1) if size % n == 0)
  if block < min(size, _SHORTEST_BLOCK):  # Then a scale for the whole row costs less.
    return Format(dtype, "channel", scale, contraction_axis=-1)
  return Format(dtype, (block,), scale)


def _store_root(x: jax.Array, format: Format, bits: jax.Array) -> SecondMoment:
  """The nearest codes above and below √x, each as often as keeps the mean of their squares at x."""
  holder, y = scaled(jnp.sqrt(jnp.maximum(x, 0)), format, "stochastic")
  step = rounding_lib.grid_step(y, format.dtype)
  below = jnp.floor(y / step) * step
  # With p the chance of the code above, E[y²] = below² + p (above² − below²).
  y = below + (y - below) * (y + below) / (2 * below + step)
  # A step is divided by the root: what is not zero may not become so.
  y = jnp.where(x > 0, jnp.maximum(y, np.float32(grid_smallest(format.dtype))), y)
  qvalue, odd = pack(rounding_lib.code_bits(y, format.dtype, bits), format)
  return SecondMoment(qvalue, holder.scale, format, holder.tensor_scale, None, odd)


def store(x: jax.Array, kind: momentum_lib.Kind, dtype: str, bits: jax.Array) -> Any:
  """A moment in few bits, rounded stochastically.

  Args:
    x: a float array.
    kind: "first", or "second" for values that are not negative.
    dtype: of the codes, or "bfloat16".
    bits: uint32 random bits of x's shape.

  Returns:
    A QuantizedArray, a SecondMoment or a bfloat16 array, whose mean over the random bits is x.
  """
  x = x.astype(jnp.float32)
  if dtype == "bfloat16":
    return rounding_lib.stochastic_cast(x, jnp.dtype(dtype), bits)
  format = block_format(x.shape, dtype)
  if kind == "second":
    return _store_root(x, format, bits)
  return quantize_array(x, format, "stochastic", bits)


def shapes_of(params: Any) -> dict[str, tuple[int, ...]]:
  """Shapes of all parameters by path, by which an optimizer's moments are found."""
  return {path: leaf.shape for path, leaf in momentum_lib.flat(params).items()}


class Codec(NamedTuple):
  """How an optimizer's state is stored and read back."""

  store: Callable[..., Any]  # (state, shapes of the parameters by path, step, layer) → state
  read: Callable[[Any, Any], Any]  # (state, shapes) → state


def codec(mu: MomentDtype, nu: MomentDtype) -> Codec:
  """Stores first moments as `mu` and second ones as `nu`; see `low_bit_moments`."""
  for name, dtype in (("mu", mu), ("nu", nu)):
    if dtype not in DTYPES:
      raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {dtype!r}")
  dtypes = {"first": mu, "second": nu}

  def store_state(state: Any, shapes: Any, step: jax.Array, layer: Any = None) -> Any:
    def store_leaf(path: str, kind: momentum_lib.Kind, x: jax.Array) -> Any:
      if dtypes[kind] == "float32" or not x.ndim or not trees.is_float(x):
        return x
      key = rounding_lib.stream_key(_SEED, step, path)
      return store(x, kind, dtypes[kind], rounding_lib.counter_bits(key, x.shape, layer))

    return momentum_lib.map_moments(store_leaf, state, shapes)

  def read_leaf(path: str, kind: momentum_lib.Kind, x: Any) -> jax.Array:
    del path
    if is_quantized(x):
      return x.dequantize()
    return x.astype(jnp.float32) if dtypes[kind] == "bfloat16" and trees.is_float(x) else x

  return Codec(
    store_state, lambda state, shapes: momentum_lib.map_moments(read_leaf, state, shapes)
  )


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

  8-bit codes share a scale in blocks of up to 128 along the last axis. Of a second moment the
  square root is stored, rounded so that its square is unbiased; what is not zero stays so.

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
    return LowBitMomentsState(step, moments.store(state, shapes, step))

  def update(
    updates: Any, state: LowBitMomentsState, params: Any = None, **extra_args: Any
  ) -> tuple[Any, LowBitMomentsState]:
    require_params(params)
    shapes = shapes_of(params)
    updates, inner_state = inner_update(
      updates, moments.read(state.inner, shapes), params, **extra_args
    )
    stored = moments.store(inner_state, shapes, state.step, extra_args.get("layer"))
    return updates, LowBitMomentsState(optax.safe_increment(state.step), stored)

  kind = (
    PackedTransformation
    if isinstance(inner, PackedTransformation)
    else optax.GradientTransformationExtraArgs
  )
  return kind(init, update)
