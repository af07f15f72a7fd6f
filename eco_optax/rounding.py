"""Rounding onto a format's grid, nearest or stochastic, and the random bits that it draws.

Everything here is element-wise, so it fuses, shards and gives the same codes on any device count.
"""

from __future__ import annotations

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from eco_optax import formats

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
  """Spacing of the grid of `dtype` just above |y|: float32, 1 everywhere for integers."""
  mantissa, minimum = formats.grid(dtype)
  if minimum is None:
    return jnp.ones_like(y)
  return _power_of_two(_biased_exponent(jnp.abs(y), dtype) - np.int32(mantissa))


def round_to_codes(y: jax.Array, dtype: np.dtype, bits: jax.Array | None = None) -> jax.Array:
  """Rounds scaled values to codes, to nearest (ties to even) or stochastically.

  With ulp the spacing of the grid around |y| and U uniform in [0, 1):

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
  mantissa, minimum = formats.grid(dtype)
  largest = formats.grid_max(dtype)
  magnitude = jnp.abs(y)
  if bits is not None:
    # y is a quotient, so a point of the grid arrives up to three float32 ulps beside it, and a
    # dither would then move it once in a million draws. Keep 21 of the 24 significant bits.
    raw = jax.lax.bitcast_convert_type(magnitude, jnp.uint32)
    magnitude = jax.lax.bitcast_convert_type((raw + _UINT32(4)) & _UINT32(0xFFFFFFF8), jnp.float32)
  magnitude = jnp.minimum(magnitude, np.float32(largest))

  if minimum is None:
    units = magnitude
  else:
    exponent = _biased_exponent(magnitude, dtype)
    units = magnitude * _power_of_two(np.int32(254 + mantissa) - exponent)  # |y| / ulp, exactly.

  if bits is None:
    count = jnp.round(units).astype(jnp.int32)  # Ties to even.
  else:
    # Fixed point: floor(units + U) with every bit of the sum kept. A float sum would round to
    # nearest after the dither, which biases the values just above a power of two.
    integer_bits = mantissa + 1 if minimum is not None else int(largest).bit_length()
    fraction_bits = 31 - integer_bits
    fixed = (units * np.float32(2.0**fraction_bits)).astype(jnp.int32).astype(jnp.uint32)
    dither = bits >> _UINT32(32 - fraction_bits)
    count = ((fixed + dither) >> _UINT32(fraction_bits)).astype(jnp.int32)

  if minimum is None:
    return jnp.where(y < 0, -count, count).astype(dtype)
  # Code bits: the count of ulps added to the binade's first code; a carry moves to the next binade.
  code = ((exponent - np.int32(minimum + 127)) << mantissa) + count
  sign = jnp.signbit(y).astype(jnp.int32)
  if np.dtype(dtype).name == "float4_e2m1fn":
    return jax.lax.bitcast_convert_type((code | (sign << 3)).astype(jnp.uint4), dtype)
  return jax.lax.bitcast_convert_type((code | (sign << 7)).astype(jnp.uint8), dtype)


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


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of uint32 that flips each output bit with probability 1/2 (multiply-xorshift)."""
  x = x ^ (x >> _UINT32(16))
  x = x * _UINT32(0x7FEB352D)
  x = x ^ (x >> _UINT32(15))
  x = x * _UINT32(0x846CA68B)
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
  if isinstance(seed, (int, np.integer)):
    words = np.array([int(seed) & 0xFFFFFFFF, (int(seed) >> 32) & 0xFFFFFFFF], np.uint32)
    low, high = jnp.asarray(words[0]), jnp.asarray(words[1])
  else:
    low, high = jnp.asarray(seed).astype(jnp.uint32), jnp.zeros([], jnp.uint32)
  leaf = _UINT32(zlib.crc32(path.encode()))
  count = jnp.asarray(step).astype(jnp.uint32)
  first = _mix(_mix(_mix(low ^ leaf) + high) + count)
  second = _mix(first + _UINT32(0x9E3779B9))
  return jnp.stack([first, second])


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
      then the bits are those that the whole stack would give that layer.

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
  word = _mix(linear_index(range(lead, len(shape))) ^ key[0]) + key[1]
  if layer is not None:
    matrices = math.prod(shape[:lead])
    first = jnp.asarray(layer).astype(jnp.uint32) * _UINT32(matrices & 0xFFFFFFFF)
    word = word + _mix(linear_index(range(lead)) + first + key[1])
  elif lead:
    word = word + _mix(linear_index(range(lead)) + key[1])
  return _mix(word)
