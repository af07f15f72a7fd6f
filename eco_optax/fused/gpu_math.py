"""Arithmetic of the kernels for NVIDIA GPUs: the library's numbers in fewer instructions.

Each function gives the bits of the one it stands for, which is what it is in interpreted kernels:
`rounding.decode`, `rounding.code_bits`, `rounding.element_bits` and IEEE division. Arrays of a tile
have the elements that lie side by side in one thread, four or eight, on their last axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as pltriton
from jax.extend import core

from eco_optax import rounding as rounding_lib
from eco_optax.formats import Format
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


def _quotient(x: jax.Array, y: jax.Array) -> jax.Array:
  """`x / y` to two units of the last place; subnormal numbers count as zero."""
  return _asm("div.approx.ftz.f32 $0, $1, $2;", "=f,f,f", 1, [x, y], _F32)


def _square_root(x: jax.Array) -> jax.Array:
  """`√x` to a unit of the last place; 2^-63, not zero, where x is less than any normal number."""
  text = "{ .reg .f32 x; max.f32 x, $1, 0f00800000; sqrt.approx.ftz.f32 $0, x; }"
  return _asm(text, "=f,f", 1, [x], _F32)


def _multiply_add(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
  """`x · y + z`, rounded once."""
  return _asm("{ fma.rn.f32 $0, $1, $2, $3; }", "=f,f,f,f", 1, [x, y, z], _F32)


_SHORTER: dict[str, Callable[..., jax.Array]] = {"div": _quotient, "sqrt": _square_root}


def shorter(target: Target, fn: Callable[..., Any]) -> Callable[..., Any]:
  """An optimizer's element-wise function in fewer instructions.

  The hardware makes the quotients and roots. A sum that has a product in it is rounded once, as XLA
  does when it compiles the definition for GPUs. Last places differ.
  """
  if target.interpret:
    return fn

  def wrapped(*args: Any) -> Any:
    flat, treedef = jax.tree.flatten(args)
    returned = []

    def of_leaves(*leaves: Any) -> list[Any]:
      outputs, out_tree = jax.tree.flatten(fn(*jax.tree.unflatten(treedef, leaves)))
      returned.append(out_tree)
      return outputs

    jaxpr = jax.make_jaxpr(of_leaves)(*flat)
    return jax.tree.unflatten(returned[0], _evaluate(jaxpr.jaxpr, jaxpr.consts, flat))

  return wrapped


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
  values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
  values |= zip(jaxpr.invars, args, strict=True)
  factors: dict[Any, list[Any]] = {}  # Of variables that are products.
  read = lambda x: x.val if isinstance(x, core.Literal) else values[x]
  for eqn in jaxpr.eqns:
    name, operands, out = eqn.primitive.name, [read(x) for x in eqn.invars], eqn.outvars[0]
    if name in ("jit", "pjit"):
      inner = eqn.params["jaxpr"]
      values |= zip(eqn.outvars, _evaluate(inner.jaxpr, inner.consts, operands), strict=True)
      continue
    # An instruction takes arrays that were computed.
    computed = not any(isinstance(x, core.Literal) for x in eqn.invars)
    made: Any = out.aval
    if made.dtype == _F32 and made.shape and computed:
      spread = [jnp.broadcast_to(x, made.shape) for x in operands]
      product = next((i for i, x in enumerate(eqn.invars) if x in factors), None)
      if name in _SHORTER:
        values[out] = _SHORTER[name](*spread)
        continue
      if name == "add" and product is not None:
        x, y = factors[eqn.invars[product]]
        values[out] = _multiply_add(x, y, spread[1 - product])
        continue
      if name == "mul":
        factors[out] = spread
    outputs = eqn.primitive.bind(*operands, **eqn.params)
    values |= zip(
      eqn.outvars, outputs if eqn.primitive.multiple_results else [outputs], strict=True
    )
  return [read(x) for x in jaxpr.outvars]


def over(target: Target, x: jax.Array, scale: jax.Array, power_of_two: bool) -> jax.Array:
  """X / scale as IEEE division rounds it.

  Let y be the scale's correctly rounded reciprocal. q₀ = x·y is within 1.5 units of its last place
  of the quotient, and with the remainder r = x − scale·q₀, which one multiply-add gives exactly,
  q₁ = q₀ + r·y misses it by less than 2^-23 units before it is rounded. So it is the rounded
  quotient, but where that lies so near the middle of two numbers, once in millions, that it may be
  the other one (Markstein, 1990, has a theorem where q₀ is within one unit). The remainder is exact
  unless x or the scale is close to the ends of the range; then q₁ is off by less than 2^-24 or
  belongs to a number below 2^-36, and rounds to a code all the same.

  Args:
    target: of the kernel.
    x: float32 values.
    scale: float32, normal or NaN, of a shape that broadcasts against x's.
    power_of_two: whether it is one.
  """
  if target.interpret:
    return divide(x, jnp.broadcast_to(scale, x.shape))
  if power_of_two:
    inverse = float_of(np.int32(254 << 23) - bits_of(scale))
    inverse = jnp.where(jnp.isnan(scale), scale, inverse)
    return x * inverse
  inverse = ieee_divide(target, jnp.ones_like(scale), scale)
  scale, inverse = (jnp.broadcast_to(y, x.shape) for y in (scale, inverse))
  return _asm(
    # With the remainder's sign reversed a zero keeps its own.
    "{ .reg .f32 q, r, n;"
    " mul.rn.f32 q, $1, $3; neg.f32 n, $1; fma.rn.f32 r, $2, q, n;"
    " neg.f32 n, $3; fma.rn.f32 $0, r, n, q; }",
    "=f,f,f,f",
    1,
    [x, scale, inverse],
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


def _stochastic_e4m3(roots: bool, exact: bool = False) -> str:
  """Codes $0 of four values $1 … $4, from random bits $5 … $8.

  From the smallest normal code on, a code is the upper bits of the value's own, and a dither in the
  bits below carries into them as `rounding.code_bits` has it: that keeps 21 of 24 significant bits,
  so of the dither's 27 bits only the upper 20 meet any. The rest converts exactly, and where it
  carried beyond the largest code, comes back to it. Smaller values are rare, and take the way of
  `rounding.code_bits`.

  Args:
    roots: whether values are roots, to be moved first as `stored_moments.root_on_grid` does: r to
      b + (r² − b²) / (2b + step), where b is the code below.
    exact: as in `rounding.code_bits`: of roots, squares are not.
  """
  cut = lambda x: "" if exact else f" add.s32 {x}, {x}, 4; and.b32 {x}, {x}, 0xFFFFFFF8;"
  each = range(4)
  lines = [
    "{ .reg .b32 t<4>, d<4>, x, b, s; .reg .f32 z<4>, m, f, g, h, n; .reg .b16 lo, hi;"
    " .reg .pred p, q;"
  ]
  for k in each:
    lines.append(f"mov.b32 t{k}, ${1 + k};")
    if roots:
      # Of a normal number the code below is its own upper bits.
      lines += [
        f"mov.b32 z{k}, t{k}; and.b32 b, t{k}, 0x7FF00000; mov.b32 f, b;",
        f"and.b32 s, t{k}, 0x7F800000; add.s32 s, s, -25165824; mov.b32 g, s;",  # 3 << 23
        "fma.rn.f32 h, f, 0f40000000, g; neg.f32 n, f; mul.rn.f32 n, n, f;",
        f"fma.rn.f32 n, z{k}, z{k}, n; rcp.approx.ftz.f32 h, h; fma.rn.f32 f, n, h, f;",
        f"mov.b32 d{k}, f;",
      ]
    else:
      lines.append(f"mov.b32 d{k}, t{k};")
    lines += [
      f"{cut(f'd{k}')} shr.u32 x, ${5 + k}, 12; add.s32 x, d{k}, x;",
      f"and.b32 x, x, 0xFFF00000; mov.b32 z{k}, x;",
      f"mov.b32 f, t{k}; abs.f32 f, f;" + (" min.f32 m, m, f;" if k else " mov.f32 m, f;"),
    ]
  lines.append("setp.ge.f32 p, m, 0f3C800000; @p bra NORMAL;")  # 2^-6
  for k in each:
    lines.append(f"and.b32 x, t{k}, 0x7FFFFFFF; mov.b32 f, x;")
    if roots:
      # Codes are multiples of 2^-9, and the sum with 2^14, rounded down, is one.
      lines += [
        "add.rm.f32 g, f, 0f46800000; sub.rn.f32 g, g, 0f46800000;",
        "fma.rn.f32 h, g, 0f40000000, 0f3B000000; sub.rn.f32 n, f, g; add.rn.f32 m, f, g;",
        "mul.rn.f32 n, n, m; rcp.approx.ftz.f32 h, h; fma.rn.f32 g, n, h, g;",
        "max.f32 g, g, 0f3B000000; setp.gt.f32 q, f, 0f00000000; selp.f32 g, g, f, q;",
        "setp.lt.f32 q, f, 0f3C800000;",
      ]
    else:
      lines.append("setp.lt.f32 q, f, 0f3C800000; mov.f32 g, f;")
    lines += [
      f"mov.b32 x, g;{cut('x')} mov.b32 g, x;",
      f"mul.rn.f32 g, g, 0f51800000; cvt.rzi.s32.f32 x, g;"  # 2^36
      f" shr.u32 s, ${5 + k}, 5; add.s32 x, x, s; shr.u32 x, x, 27;",
      "cvt.rn.f32.s32 g, x; mul.rn.f32 g, g, 0f3B000000; mov.b32 x, g;",
      f"and.b32 s, t{k}, 0x80000000; or.b32 x, x, s; mov.b32 g, x; selp.f32 z{k}, g, z{k}, q;",
    ]
  lines += [
    "NORMAL:",
    "cvt.rn.satfinite.e4m3x2.f32 lo, z1, z0; cvt.rn.satfinite.e4m3x2.f32 hi, z3, z2;",
    "mov.b32 $0, {lo, hi}; }",
  ]
  return " ".join(lines)


_NEAREST_E4M3 = (
  "{ .reg .b16 lo, hi;"
  " cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1; cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3;"
  " mov.b32 $0, {lo, hi}; }"
)


def code_bits(
  target: Target, y: jax.Array, dtype: np.dtype, bits: jax.Array | None, exact: bool = False
) -> jax.Array:
  """`rounding.code_bits`. The code of a NaN is another: its scale is NaN too, which makes it one.

  Returns:
    int32 or uint8 codes.
  """
  if target.interpret or not _is_e4m3(dtype) or not target.has_float8:
    return rounding_lib.code_bits(y, dtype, bits, exact)
  if bits is None:
    code = _asm(_NEAREST_E4M3, "=r,f,f,f,f", 4, [y], jnp.int8)
  else:
    args = [bits_of(y), bits_of(bits)]
    code = _asm(_stochastic_e4m3(roots=False, exact=exact), "=r" + ",r" * 8, 4, args, jnp.int8)
  return code.astype(jnp.uint8)  # Triton's own integers have no sign.


def root(target: Target, x: jax.Array) -> jax.Array:
  """`stored_moments.root` to a unit of the last place. The root of a subnormal number is zero."""
  if target.interpret:
    return stored_moments.root(x)
  text = "{ .reg .f32 x; max.f32 x, $1, 0f00000000; sqrt.approx.ftz.f32 $0, x; }"
  return _asm(text, "=f,f", 1, [x], _F32)


def root_codes(
  target: Target, y: jax.Array, x: jax.Array, dtype: np.dtype, bits: jax.Array | None
) -> jax.Array:
  """`stored_moments.root_codes`."""
  if target.interpret or not _is_e4m3(dtype) or not target.has_float8 or bits is None:
    return code_bits(target, stored_moments.root_on_grid(y, x, dtype), dtype, bits)
  args = [bits_of(y), bits_of(bits)]
  code = _asm(_stochastic_e4m3(roots=True), "=r" + ",r" * 8, 4, args, jnp.int8)
  return code.astype(jnp.uint8)


def arithmetic(target: Target) -> stored_moments.Arithmetic:
  """The numbers of a step as a target computes them."""

  def by_scale(x: jax.Array, scale: jax.Array, format: Format) -> jax.Array:
    return over(target, x, scale, format.power_of_two)

  return stored_moments.Arithmetic(
    division=Division(functools.partial(ieee_divide, target), by_scale),
    decode=functools.partial(decode, target),
    code_bits=functools.partial(code_bits, target),
    root=functools.partial(root, target),
    root_codes=functools.partial(root_codes, target),
    times=lambda y, scale: y * scale,
    add=lambda stored, update: stored + update,
  )
