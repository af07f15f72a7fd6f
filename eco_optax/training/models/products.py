"""Products of float arrays with float32 sums, backward as well as forward."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(spec: str, x: jax.Array, y: jax.Array, precision: str | None = None) -> jax.Array:
  """`einsum` of two arrays in float32, whose gradients are products in the narrower dtype.

  JAX's own gradient of a product of bfloat16 arrays with float32 sums multiplies the float32
  cotangent, for which tensor cores take at least twice as long. Here it is rounded to the arrays'
  dtype first, as in frameworks whose products return bfloat16.

  Args:
    spec: as `jnp.einsum` takes it; every letter is in two of its three terms at least, and in none
      twice.
    x: of any float dtype.
    y: of any float dtype; where it differs from x's, both are widened for the product, and the
      wider one is rounded to the other's for the gradients.
    precision: as `jnp.einsum` takes it.

  Returns:
    Float32; the gradients have the dtypes of x and y.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((2, 3), jnp.bfloat16)
    >>> product("ij,kj->ik", x, x).dtype
    dtype('float32')
    >>> jax.grad(lambda y: product("ij,kj->ik", x, y).sum())(jnp.ones((4, 3))).dtype
    dtype('float32')
  """
  if x.dtype != y.dtype:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=jnp.float32)


def _forward(
  spec: str, x: jax.Array, y: jax.Array, precision: str | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return product(spec, x, y, precision), (x, y)


def _backward(
  spec: str, precision: str | None, residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, y = residuals
  terms, out = spec.split("->")
  first, second = terms.split(",")
  dtype = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
  narrow_x, narrow_y, narrow_grad = (array.astype(dtype) for array in (x, y, grad))
  dx = product(f"{out},{second}->{first}", narrow_grad, narrow_y, precision)
  dy = product(f"{out},{first}->{second}", narrow_grad, narrow_x, precision)
  return dx.astype(x.dtype), dy.astype(y.dtype)


product.defvjp(_forward, _backward)
