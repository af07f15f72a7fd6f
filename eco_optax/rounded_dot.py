"""A product stored in 16 bits by the unit that makes it, where no devices add their parts to it.

A float32 product that a second operation rounds is written and read back in float32 for it. A
product asked for in bfloat16 is not; but where its sum runs over an axis that is split over
devices, the compiler would add their parts in bfloat16 too. Only the lowering knows how many
devices a program is for, so that a primitive has to stand between.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from eco_optax import explicit_axes
from eco_optax.lowering import is_alone

_p = Primitive("eco_rounded_dot")


def rounded_dot(a: jax.Array, b: jax.Array, contracting: Any, dtype: Any) -> jax.Array:
  """`lax.dot_general` with float32 sums, each rounded to a dtype once.

  Args:
    a: float array.
    b: float array.
    contracting: axes of a and of b that are summed over, as two tuples.
    dtype: of the result.

  Returns:
    The product, with the remaining axes of a and then the remaining axes of b. If it is of 16 bits,
    and a and b have its dtype or 8 bits, a GPU or TPU by itself stores the sums in that dtype as it
    makes them. Otherwise the sums are stored in float32 first, and devices add them in float32.
  """
  how: Any = {"contracting": tuple(map(tuple, contracting)), "dtype": jnp.dtype(dtype)}
  is_small = {a.dtype, b.dtype} == {how["dtype"]} or a.dtype.itemsize == b.dtype.itemsize == 1
  if how["dtype"].itemsize != 2 or not is_small:
    return _stored_twice(a, b, **how)
  a, b = explicit_axes.vary_like(a, b), explicit_axes.vary_like(b, a)
  return _p.bind(a, b, **how)


def _stored_once(a: jax.Array, b: jax.Array, *, contracting: Any, dtype: Any) -> jax.Array:
  return jax.lax.dot_general(a, b, (contracting, ((), ())), preferred_element_type=dtype)


def _stored_twice(a: jax.Array, b: jax.Array, *, contracting: Any, dtype: Any) -> jax.Array:
  return _stored_once(a, b, contracting=contracting, dtype=jnp.float32).astype(dtype)


def _lower(ctx: Any, *args: Any, **params: Any) -> Any:
  chosen = _stored_once if is_alone(ctx) else _stored_twice
  return mlir.lower_fun(functools.partial(chosen, **params), multiple_results=False)(ctx, *args)


@_p.def_impl
def _impl(a: jax.Array, b: jax.Array, **params: Any) -> jax.Array:
  if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
    return _stored_twice(a, b, **params)
  return _compiled(**params)(a, b)


@functools.cache
def _compiled(**params: Any) -> Any:
  return jax.jit(functools.partial(_p.bind, **params))


@_p.def_abstract_eval
def _abstract_eval(a: Any, b: Any, *, contracting: Any, dtype: Any) -> Any:
  # JAX's own rule knows the axes of meshes, too.
  aval, _ = jax.lax.dot_general_p.abstract_eval(
    a,
    b,
    dimension_numbers=(contracting, ((), ())),
    precision=None,
    preferred_element_type=dtype,
    out_sharding=None,
  )
  return aval


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
  tangents = map(ad.instantiate_zeros, tangents)
  return jax.jvp(functools.partial(_stored_twice, **params), primals, tuple(tangents))


def _batched(args: Any, axes: Any, **params: Any) -> tuple[jax.Array, int]:
  return jax.vmap(functools.partial(_stored_twice, **params), in_axes=axes)(*args), 0


ad.primitive_jvps[_p] = _jvp
batching.primitive_batchers[_p] = _batched
# Units of CPUs have no use of it, and some round partial sums.
mlir.register_lowering(_p, mlir.lower_fun(_stored_twice, multiple_results=False))
mlir.register_lowering(_p, _lower, platform="cuda")
mlir.register_lowering(_p, _lower, platform="tpu")
