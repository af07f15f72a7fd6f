"""Arithmetic of the kernels for NVIDIA GPUs: the library's numbers in fewer instructions.

Each function gives the bits of the one it stands for, which is what it is in interpreted kernels:
`rounding.decode`, `rounding.code_bits`, `rounding.element_bits` and IEEE division. Arrays of a tile
have the elements that lie side by side in one thread, four or eight, on their last axis.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as pltriton

from eco_optax import rounding as rounding_lib
from eco_optax.formats import Format, grid_smallest
from eco_optax.quantized_array import Division, divide
from eco_optax.transforms import stored_moments

_F32 = jnp.float32


class Target(NamedTuple):
  """What kernels are compiled for."""

  interpret: bool = False  # In plain JAX, on any device.
  has_float8: bool = True  # Instructions that convert E4M3: compute capability 8.9 on.


HOPPER = Target()


def _asm(text: str, constraints: str, pack: int, args: list[jax.Array], dtype: Any) -> jax.Array:
  shape = args[0].shape
  (result,) = pltriton.elementwise_inline_asm(
    text,
    args=args,
    constraints=constraints,
    pack=pack,
    result_shape_dtypes=[jax.ShapeDtypeStruct(shape, dtype)],
  )
  return result


def bits_of(x: jax.Array) -> jax.Array:
  """float32 or uint32 as int32."""
  return jax.lax.bitcast_convert_type(x, jnp.int32)


def float_of(raw: jax.Array) -> jax.Array:
  """The reverse."""
  return jax.lax.bitcast_convert_type(raw, jnp.float32)


def ieee_divide(target: Target, x: jax.Array, divisor: Any) -> jax.Array:
  """`quantized_array.divide`; Triton's `/` may be two last places off."""
  if target.interpret:
    return divide(x, divisor)
  # The instruction takes arrays, of one shape, that were computed.
  divisor = jnp.where(jnp.isnan(x), np.float32(1), divisor)
  shape = x.shape or (1,)
  args = [x.reshape(shape), divisor.reshape(shape)]
  return _asm("div.rn.f32 $0, $1, $2;", "=f,f,f", 1, args, _F32).reshape(x.shape)


def forget(target: Target, known: jax.Array, value: Any) -> Any:
  """A scalar or codes as they are, computed with again from here on.

  Else a compiler keeps what it computed from them before in registers, of which there are too few.

  Args:
    target: of the kernel.
    known: int32 that is not negative, as no compiler can tell, one number.
    value: a float32 scalar, or codes: uint8, or int32.
  """
  if target.interpret:
    return value
  zero = known.reshape(()) >> 31
  if value.ndim == 0:
    return float_of(bits_of(value) | zero)
  if value.dtype == jnp.int32:
    return value | zero
  assert value.dtype == jnp.uint8, value.dtype
  zeros = jnp.broadcast_to(zero.astype(jnp.int8), value.shape)
  return _asm("or.b32 $0, $1, $2;", "=r,r,r", 4, [value, zeros], jnp.int8).astype(jnp.uint8)


class Divisor(NamedTuple):
  """A scale that many values are divided by."""

  scale: jax.Array
  power_of_two: bool
  factor: Any = None  # A power of two that takes the scale to 1 … 2,
  mantissa: Any = None  # where it is this,
  inverse: Any = None  # whose correctly rounded reciprocal this is.


def divisor(target: Target, scale: jax.Array, power_of_two: bool) -> Divisor:
  """Prepares a scale (normal, or NaN) for `over`."""
  if target.interpret or power_of_two:
    return Divisor(scale, power_of_two)
  raw = bits_of(scale)
  exponent = raw & np.int32(0x7F800000)
  # 2^(127 − e); of the largest exponents it is subnormal, which is a number like any other here.
  factor = float_of(
    jnp.where(exponent >= np.int32(254 << 23), np.int32(1 << 22), np.int32(254 << 23) - exponent)
  )
  mantissa = float_of((raw & np.int32(0x007FFFFF)) | np.int32(127 << 23))
  mantissa = jnp.where(jnp.isnan(scale), scale, mantissa)
  return Divisor(
    scale, False, factor, mantissa, ieee_divide(target, jnp.ones_like(mantissa), mantissa)
  )


def over(target: Target, x: jax.Array, by: Divisor) -> jax.Array:
  """X / scale as IEEE division rounds it, but for the sign of zero.

  Let b in [1, 2) be the scale's mantissa, y its correctly rounded reciprocal and a the value times
  the same power of two, which is exact. q₀ = a·y is within 2 units of its last place of a/b. With
  the remainder a − b·q₀, which one multiply-add gives exactly, q₁ is within one, and then the same
  step once more is the correctly rounded quotient (Markstein, 1990: y correctly rounded, q₁ within
  one unit, the remainder exact). The remainder is exact unless |a| < 2^-100, for which any quotient
  that comes out is below 2^-99, and rounds to the same code: E4M3 counts in 2^-36 before its
  dither, integers in 2^-24 or more, and a half step is more than either.
  """
  if target.interpret:
    return divide(x, jnp.broadcast_to(by.scale, x.shape))
  if by.power_of_two:
    inverse = float_of(np.int32(254 << 23) - bits_of(by.scale))
    inverse = jnp.where(jnp.isnan(by.scale), by.scale, inverse)
    return x * inverse
  spread = [jnp.broadcast_to(y, x.shape) for y in (by.factor, by.mantissa, by.inverse)]
  return _asm(
    "{ .reg .f32 a, q, e, n;"
    " mul.rn.f32 a, $1, $2; mul.rn.f32 q, a, $4; neg.f32 n, $3;"
    " fma.rn.f32 e, n, q, a; fma.rn.f32 q, e, $4, q;"
    " fma.rn.f32 e, n, q, a; fma.rn.f32 $0, e, $4, q; }",
    "=f,f,f,f,f",
    1,
    [x, *spread],
    _F32,
  )


def _is_e4m3(dtype: np.dtype) -> bool:
  return np.dtype(dtype).name == "float8_e4m3fn"


def decode(target: Target, code: jax.Array, dtype: np.dtype) -> jax.Array:
  """`rounding.decode` of codes in bytes, int32 or uint8."""
  if target.interpret or not target.has_float8 or not _is_e4m3(dtype):
    return rounding_lib.decode(code.astype(jnp.int32), dtype)
  # E4M3's values, NaN among them, are values of float16 too.
  return _asm(
    "{ .reg .b16 l, h, a, b; .reg .b32 p;"
    " mov.b32 {l, h}, $4;"
    " cvt.rn.f16x2.e4m3x2 p, l; mov.b32 {a, b}, p; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b;"
    " cvt.rn.f16x2.e4m3x2 p, h; mov.b32 {a, b}, p; cvt.f32.f16 $2, a; cvt.f32.f16 $3, b; }",
    "=f,=f,=f,=f,r",
    4,
    [code.astype(jnp.uint8)],
    _F32,
  )


def _stochastic_e4m3() -> str:
  """Codes of four values from their bits, random bits, and what has their signs.

  Above the smallest normal a code is the value's own bits, rebiased and cut after three bits of
  mantissa, and a dither in the bits below carries as `rounding.code_bits` has it: this keeps 21 of
  24 significant bits, so of the dither's 27 bits only the upper 20 meet any. What is smaller is
  rare, and takes the way of `rounding.code_bits`.
  """
  each = range(4)
  lines = ["{ .reg .b32 t<4>, d<4>, s<4>, a, b, m, x; .reg .pred p, q; .reg .f32 f;"]
  for k in each:
    lines += [
      f"add.s32 t{k}, ${1 + k}, 4; and.b32 t{k}, t{k}, 0x7FFFFFF8;",
      f"min.s32 t{k}, t{k}, 0x43E00000;",  # 448
      f"shr.u32 d{k}, ${5 + k}, 12; add.s32 s{k}, t{k}, d{k};",
      f"add.s32 s{k}, s{k}, -1006632960; shr.u32 s{k}, s{k}, 20;",  # The bias: 120 << 23.
    ]
  lines += [
    "min.s32 m, t0, t1; min.s32 x, t2, t3; min.s32 m, m, x;",
    "setp.ge.s32 p, m, 0x3C800000; @p bra NORMAL;",  # 2^-6
  ]
  for k in each:
    lines += [
      f"mov.b32 f, t{k}; mul.rn.f32 f, f, 0f51800000; cvt.rzi.s32.f32 x, f;",  # 2^36
      f"shr.u32 d{k}, ${5 + k}, 5; add.s32 x, x, d{k}; shr.u32 x, x, 27;",
      f"setp.lt.s32 q, t{k}, 0x3C800000; selp.b32 s{k}, x, s{k}, q;",
    ]
  lines += [
    "NORMAL:",
    "prmt.b32 a, s0, s1, 0x0040; prmt.b32 b, s2, s3, 0x0040; prmt.b32 m, a, b, 0x5410;",
    "prmt.b32 a, $9, $10, 0x0073; prmt.b32 b, $11, $12, 0x0073; prmt.b32 x, a, b, 0x5410;",
    "and.b32 x, x, 0x80808080; or.b32 $0, m, x; }",
  ]
  return " ".join(lines)


_NEAREST_E4M3 = (
  "{ .reg .b16 l, h; .reg .b32 a, b, m, x;"
  " cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3;"
  " mov.b32 m, {l, h};"
  " prmt.b32 a, $5, $6, 0x0073; prmt.b32 b, $7, $8, 0x0073; prmt.b32 x, a, b, 0x5410;"
  " and.b32 x, x, 0x80808080; and.b32 m, m, 0x7F7F7F7F; or.b32 $0, m, x; }"
)


def code_bits(
  target: Target, y: jax.Array, sign: jax.Array, dtype: np.dtype, bits: jax.Array | None
) -> jax.Array:
  """`rounding.code_bits`, whose upper bits are left out, of y with the signs of another array.

  The code of a NaN is another: its scale is NaN too, which makes it one.

  Returns:
    int32 or uint8 codes.
  """
  if target.interpret or not _is_e4m3(dtype) or (bits is None and not target.has_float8):
    magnitude = bits_of(y) & np.int32(0x7FFFFFFF)
    y = float_of(magnitude | (bits_of(sign) & np.int32(-(2**31))))
    return rounding_lib.code_bits(y, dtype, bits)
  if bits is None:
    code = _asm(_NEAREST_E4M3, "=r,f,f,f,f,r,r,r,r", 4, [y, bits_of(sign)], jnp.int8)
  else:
    args = [bits_of(y), bits_of(bits), bits_of(sign)]
    code = _asm(_stochastic_e4m3(), "=r" + ",r" * 12, 4, args, jnp.int8)
  return code.astype(jnp.uint8)  # Triton's own integers have no sign.


def root_on_grid(target: Target, y: jax.Array, x: jax.Array, dtype: np.dtype) -> jax.Array:
  """`stored_moments.root_on_grid`, of roots from 0 to E4M3's largest."""
  if target.interpret or not _is_e4m3(dtype):
    return stored_moments.root_on_grid(y, x, dtype)
  # Of a normal number the code below is its own upper bits. Below 2^-6 codes are multiples of
  # 2^-9, and the sum with 2^14, rounded down, is one. Divisors are far from the range's ends, where
  # the shorter division gives what `/` does.
  result = _asm(
    "{ .reg .b32 r, b, s; .reg .f32 f, g, h, n; .reg .pred p;"
    " mov.b32 r, $1; and.b32 b, r, 0x7FF00000;"
    " add.rm.f32 f, $1, 0f46800000; sub.rn.f32 f, f, 0f46800000; mov.b32 s, f;"
    " setp.lt.s32 p, r, 0x3C800000; selp.b32 b, s, b, p; mov.b32 f, b;"
    " and.b32 s, r, 0x7F800000; add.s32 s, s, -25165824; max.s32 s, s, 0x3B000000;"
    " mov.b32 g, s; add.rn.f32 h, f, f; add.rn.f32 h, h, g;"
    " sub.rn.f32 n, $1, f; add.rn.f32 g, $1, f; mul.rn.f32 n, n, g;"
    " div.approx.f32 n, n, h; add.rn.f32 $0, f, n; }",
    "=f,f",
    1,
    [y],
    _F32,
  )
  smallest = np.float32(grid_smallest(dtype))
  return jnp.where(x > 0, jnp.maximum(result, smallest), result)


_UINT32 = np.uint32


def element_bits(key: Any, first: jax.Array, per: int, matrix: jax.Array | None) -> jax.Array:
  """`rounding.element_bits` of `per` elements side by side, told by the first of them.

  Its first step, x ^ (x >> 16), is done for all of them at once: their indices differ in the last
  bits, of which the first's are zeros.

  Args:
    key: two uint32 scalars.
    first: uint32, multiples of `per`, of the shape (…, 1).
    per: 4 or 8.
    matrix: uint32 scalar, the number of the matrix in its stack, or None where there is no stack.

  Returns:
    uint32 of the shape (…, per).
  """
  x = first ^ key[0]
  x = x ^ (x >> _UINT32(16))
  shape = (*first.shape[:-1], per)
  x = jnp.broadcast_to(x, shape) ^ jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
  x = x * _UINT32(0x7FEB352D)
  x = x ^ (x >> _UINT32(15))
  x = x * _UINT32(0x846CA68B)
  x = x ^ (x >> _UINT32(16))
  added = key[1] if matrix is None else key[1] + rounding_lib._mix(matrix + key[1])
  return rounding_lib._mix(x + added)


def arithmetic(target: Target) -> stored_moments.Arithmetic:
  """The numbers of a step as a target computes them."""

  def by_scale(x: jax.Array, scale: jax.Array, format: Format) -> jax.Array:
    return over(target, x, divisor(target, scale, format.power_of_two))

  return stored_moments.Arithmetic(
    division=Division(functools.partial(ieee_divide, target), by_scale),
    decode=functools.partial(decode, target),
    code_bits=functools.partial(code_bits, target),
    root_on_grid=functools.partial(root_on_grid, target),
    times=lambda y, scale: y * scale,
    add=lambda stored, update: stored + update,
  )
