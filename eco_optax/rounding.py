"""Rounding onto a format's grid, nearest or stochastic, and the random bits that it draws.

Everything here is element-wise, so it fuses, shards and gives the same codes on any device count.
"""

from __future__ import annotations

import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eco_optax import formats
from eco_optax.lowering import unlike_constant

_UINT32 = np.uint32


def _power_of_two(biased_exponent: jax.Array) -> jax.Array:
  """float32 2^(e − 127) from a biased exponent 1 … 254."""
  return jax.lax.bitcast_convert_type(biased_exponent << 23, jnp.float32)


def _biased_exponent(magnitude: jax.Array, dtype: np.dtype) -> jax.Array:
  """Biased exponent of the binade that sets `magnitude`'s grid spacing (subnormals share one)."""
  minimum = formats.grid(dtype)[1]
  assert minimum is not None  # Only floating-point grids have binades.
  exponent = jax.lax.bitcast_convert_type(magnitude, jnp.int32) >> 23
  return jnp.maximum(exponent, np.int32(minimum + 127))


def grid_step(y: jax.Array, dtype: np.dtype) -> jax.Array:
  """Spacing of the grid of `dtype` just above `|y|`: float32, 1 everywhere for integers."""
  mantissa, minimum = formats.grid(dtype)
  if minimum is None:
    return jnp.ones_like(y)
  return _power_of_two(_biased_exponent(jnp.abs(y), dtype) - np.int32(mantissa))


def _nearest(units: jax.Array) -> jax.Array:
  """Units, of at most 2^22, to the nearest int32, ties to even.

  By a sum whose last bits are the integer, because Triton has no instruction for it.
  """
  raw = jax.lax.bitcast_convert_type(units + np.float32(2**23), jnp.int32)
  return raw & np.int32(2**23 - 1)


def _dithered(units: jax.Array, integer_bits: int, bits: jax.Array) -> jax.Array:
  """floor(units + U) as int32, for units below 2^integer_bits.

  In fixed point, with every bit of the sum kept: a float sum would round to nearest after the
  dither, which biases the values just above a power of two.
  """
  fraction_bits = 31 - integer_bits
  fixed = (units * np.float32(2.0**fraction_bits)).astype(jnp.int32)
  dither = jax.lax.bitcast_convert_type(bits >> _UINT32(32 - fraction_bits), jnp.int32)
  # The sum may reach 2^31, which the unsigned shift reads as what it is.
  return jax.lax.shift_right_logical(fixed + dither, np.int32(fraction_bits))


def round_to_integers(y: jax.Array, largest: int, bits: jax.Array) -> jax.Array:
  """Rounds stochastically to the integers from −largest to largest, and saturates there.

  Args:
    y: float32 values, any shape.
    largest: below 2^24.
    bits: uint32 random bits of y's shape.

  Returns:
    int32 of y's shape; E[result] = y inside the range, and NaN becomes 0.
  """
  magnitude = jnp.where(jnp.isnan(y), 0, jnp.minimum(jnp.abs(y), np.float32(largest)))
  count = _dithered(magnitude, largest.bit_length(), bits)
  return jnp.where(y < 0, -count, count)


def code_bits(
  y: jax.Array, dtype: np.dtype, bits: jax.Array | None = None, exact: bool = False
) -> jax.Array:
  """`round_to_codes` before the codes are given their dtype.

  Args:
    y: as in `round_to_codes`.
    dtype: as in `round_to_codes`.
    bits: as in `round_to_codes`.
    exact: whether y is a quotient by a power of two.

  Returns:
    int32: the bit patterns of floating-point codes, and integer codes themselves.
  """
  mantissa, minimum = formats.grid(dtype)
  largest = formats.grid_max(dtype)
  magnitude = jnp.abs(y)
  if bits is not None and not exact:
    # y is a quotient, so a point of the grid arrives up to three float32 ulps beside it, and a
    # dither would then move it once in a million draws. Keep 21 of the 24 significant bits.
    raw = jax.lax.bitcast_convert_type(magnitude, jnp.int32)
    magnitude = jax.lax.bitcast_convert_type((raw + np.int32(4)) & np.int32(-8), jnp.float32)
  magnitude = jnp.minimum(magnitude, np.float32(largest))

  if minimum is None:
    units = magnitude
  else:
    exponent = _biased_exponent(magnitude, dtype)
    units = magnitude * _power_of_two(np.int32(254 + mantissa) - exponent)  # |y| / ulp, exactly.

  if bits is None:
    count = _nearest(units)
  else:
    integer_bits = mantissa + 1 if minimum is not None else int(largest).bit_length()
    count = _dithered(units, integer_bits, bits)

  if minimum is None:
    return jnp.where(y < 0, -count, count)
  # Code bits: the count of ulps added to the binade's first code; a carry moves to the next binade.
  code = ((exponent - np.int32(minimum + 127)) << mantissa) + count
  width = formats.grid_bits(dtype)
  sign = jax.lax.bitcast_convert_type(y, jnp.int32) >> 31
  return code | (sign & np.int32(1 << (width - 1)))


def decode(code: jax.Array, dtype: np.dtype) -> jax.Array:
  """The float32 values of codes: what a cast to float32 gives, by arithmetic on their bits.

  Compilers for devices without instructions for such floats take a longer way.

  Args:
    code: int32, as `code_bits` returns them, or with any bits above the code's own.
    dtype: of the codes.

  Returns:
    float32 of the same shape.

  Example:
    >>> import jax.numpy as jnp
    >>> from eco_optax import rounding
    >>> rounding.decode(jnp.array([0x38, 0xB9]), jnp.dtype("float8_e4m3fn"))
    Array([ 1.   , -1.125], dtype=float32)
  """
  mantissa, minimum = formats.grid(dtype)
  width = formats.grid_bits(dtype)
  if minimum is None:
    return ((code << (32 - width)) >> (32 - width)).astype(jnp.float32)  # Extends the sign.
  magnitude = code & np.int32((1 << (width - 1)) - 1)
  normal = (magnitude << (23 - mantissa)) + np.int32((minimum + 126) << 23)
  # Below the first binade a code counts steps; as a float32 it would be subnormal, which some
  # devices take for zero.
  steps = magnitude.astype(jnp.float32) * np.float32(2.0 ** (minimum - mantissa))
  raw = jnp.where(
    magnitude < np.int32(1 << mantissa), jax.lax.bitcast_convert_type(steps, jnp.int32), normal
  )
  if nan := formats.grid_nan(dtype):
    if np.dtype(dtype).name == "float8_e5m2":  # The code before it is infinity.
      raw = jnp.where(magnitude == np.int32(nan - 1), np.int32(0x7F800000), raw)
    raw = jnp.where(magnitude >= np.int32(nan), np.int32(0x7FC00000), raw)
  sign = (code << (32 - width)) & np.int32(-(2**31))
  return jax.lax.bitcast_convert_type(raw | sign, jnp.float32)


def from_code_bits(code: jax.Array, dtype: np.dtype) -> jax.Array:
  """Gives int32 codes, as `code_bits` returns them, their dtype."""
  if formats.grid(dtype)[1] is None:
    return code.astype(dtype)
  unsigned = jnp.dtype(f"uint{formats.grid_bits(dtype)}")
  return jax.lax.bitcast_convert_type(code.astype(unsigned), dtype)


def to_code_bits(codes: jax.Array) -> jax.Array:
  """The int32 from which `from_code_bits` makes these codes."""
  if formats.grid(codes.dtype)[1] is None:
    return codes.astype(jnp.int32)
  unsigned = jnp.dtype(f"uint{formats.grid_bits(codes.dtype)}")
  return jax.lax.bitcast_convert_type(codes, unsigned).astype(jnp.int32)


def round_to_codes(y: jax.Array, dtype: np.dtype, bits: jax.Array | None = None) -> jax.Array:
  """Rounds scaled values to codes, to nearest (ties to even) or stochastically.

  With ulp the spacing of the grid around `|y|` and U uniform in [0, 1):

  .. math:: q(y) = sign(y) · ulp · round(|y| / ulp)  or  sign(y) · ulp · floor(|y| / ulp + U)

  so that stochastically E[q(y)] = y, among subnormals too, and a point of the grid never moves. It
  saturates at the largest code.

  Args:
    y: float32 values, already divided by their scale; any shape.
    dtype: of the codes, see `Format.dtype`.
    bits: uint32 random bits of y's shape for stochastic rounding; None for nearest.

  Returns:
    Codes: an array of `dtype` and y's shape. What a NaN becomes is left to its scale, which is NaN.

  Example:
    >>> import jax.numpy as jnp
    >>> from eco_optax import rounding
    >>> rounding.round_to_codes(jnp.array([0.3, 1.49, -500.0]), jnp.dtype("float8_e4m3fn"))
    Array([0.3125, 1.5, -448], dtype=float8_e4m3fn)

  References:
    Nikdan et al, `ECO <https://arxiv.org/abs/2601.22101>`_, 2026, section 2 (Q_RTN and Q_SR).
  """
  return from_code_bits(code_bits(y, dtype, bits), dtype)


def stochastic_cast(x: jax.Array, dtype: np.dtype, bits: jax.Array) -> jax.Array:
  """Casts float32 to a 16-bit bfloat16 or to float32 itself, unbiased.

  Args:
    x: float32 values, any shape.
    dtype: bfloat16 (rounded stochastically) or float32 (returned as it is).
    bits: uint32 random bits of x's shape.

  Returns:
    An array of `dtype`; NaN and infinity stay what they are.
  """
  if np.dtype(dtype) == np.float32:
    return x
  if np.dtype(dtype).name != "bfloat16":
    return x.astype(dtype)
  raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
  dithered = jax.lax.bitcast_convert_type(
    (raw + (bits >> _UINT32(16))) & _UINT32(0xFFFF0000), jnp.float32
  )
  return jnp.where(jnp.isfinite(x), dithered, x).astype(dtype)


_FIRST, _SECOND = _UINT32(0x7FEB352D), _UINT32(0x846CA68B)


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of uint32 that flips each output bit with probability 1/2 (multiply-xorshift)."""
  x = x ^ (x >> _UINT32(16))
  x = x * _FIRST
  x = x ^ (x >> _UINT32(15))
  x = x * _SECOND
  return x ^ (x >> _UINT32(16))


def stream_key(seed: int | jax.Array, step: int | jax.Array, path: str) -> jax.Array:
  """The key of one leaf's random bits at one step.

  Args:
    seed: a Python integer of up to 64 bits, or a uint32 or int32 scalar.
    step: int32 scalar, the number of steps taken.
    path: the leaf's `/`-joined path in the parameters.

  Returns:
    uint32 array of shape (2,).
  """
  return _stacked_key(unlike_constant(stream_start(seed, path), step), step)


def stream_start(seed: int | jax.Array, path: str) -> Any:
  """The part of `stream_key` that is the same at all steps, a uint32 scalar of NumPy or JAX."""
  leaf = _UINT32(zlib.crc32(path.encode()))
  if isinstance(seed, (int, np.integer)):
    low, high = np.array([int(seed) & 0xFFFFFFFF, (int(seed) >> 32) & 0xFFFFFFFF], np.uint32)
    with np.errstate(over="ignore"):
      return _mix(_mix(low ^ leaf) + high)
  return _mix(_mix(jnp.asarray(seed).astype(jnp.uint32) ^ leaf))


def key_at(start: jax.Array, step: int | jax.Array) -> tuple[jax.Array, jax.Array]:
  """The two words of a `stream_key`, made of its `stream_start` and the step."""
  first = _mix(start + jnp.asarray(step).astype(jnp.uint32))
  return first, _mix(first + _UINT32(0x9E3779B9))


@functools.partial(jax.jit, inline=True)
def _stacked_key(start: jax.Array, step: int | jax.Array) -> jax.Array:
  return jnp.stack(key_at(start, step))


def mixed(element: jax.Array, offset: jax.Array | None = None) -> jax.Array:
  """Indices of elements as `element_bits` mixes them first: once for all streams of bits.

  Args:
    element: uint32 indices in their matrix, row after row.
    offset: uint32 below the lowest bit that is not zero in any `element`, to be added to them: for
      elements side by side, by their first.

  Returns:
    uint32 of element's shape, or of offset's.
  """
  x = element ^ (element >> _UINT32(16))
  x = (x if offset is None else x ^ offset) * _FIRST
  return (x ^ (x >> _UINT32(15))) * _SECOND


def element_bits(key: Any, element: jax.Array, matrix: jax.Array | None = None) -> jax.Array:
  """Random bits of elements told by their index.

  The key enters between two mixings. The leading bits, which rounding uses, are mixed best.

  Args:
    key: two uint32, see `stream_key`.
    element: `mixed` indices of the elements.
    matrix: uint32 numbers of their matrices in the stack, or None where there is no stack.

  Returns:
    uint32 of element's shape.
  """
  added = key[1] if matrix is None else key[1] + _mix(matrix + key[1])
  x = (element ^ key[0]) * _FIRST + added
  return (x ^ (x >> _UINT32(15))) * _SECOND


@functools.partial(jax.jit, static_argnames="shape", inline=True)
def counter_bits(
  key: jax.Array, shape: tuple[int, ...], layer: jax.Array | None = None
) -> jax.Array:
  """Random bits that depend on `key` and on each element's global index, and on nothing else.

  Under `jit` with sharded arrays the index stays the global one, so the bits are the same on any
  device count and mesh. An element's index is that in its matrix (the last two axes) and the number
  of its matrix, so that stacks of more than 2^32 elements are covered.

  Args:
    key: uint32 of shape (2,), see `stream_key`.
    shape: of the wanted array.
    layer: index along the first axis of the stack that the wanted array is one layer of, if it is:
      then the bits equal the whole stack's for that layer.

  Returns:
    uint32 array of `shape`.

  Example:
    >>> from eco_optax import rounding
    >>> rounding.counter_bits(rounding.stream_key(0, 1, "kernel"), (2, 2)).dtype
    dtype('uint32')
  """

  def linear_index(axes: range) -> jax.Array:
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(axes):
      iota = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
      index = index + iota * _UINT32(stride & 0xFFFFFFFF)
      stride *= shape[axis]
    return index

  lead = max(len(shape) - 2, 0)
  matrix = linear_index(range(lead)) if lead else None
  if layer is not None:
    matrices = math.prod(shape[:lead])
    first = jnp.asarray(layer).astype(jnp.uint32) * _UINT32(matrices & 0xFFFFFFFF)
    matrix = linear_index(range(lead)) + first
  return element_bits(key, mixed(linear_index(range(lead, len(shape)))), matrix)
