"""matmul: multiplying by packed weights, with straight-through gradients."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from eco_optax import explicit_axes
from eco_optax.formats import Format
from eco_optax.quantized_array import QuantizedArray, is_quantized, quantize_array

_FLOAT8 = {jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)}


def _outer_scale(w: QuantizedArray) -> jax.Array | None:
  """The product's scale, one per output channel, for formats whose scale is outside the sum."""
  if w.format.granularity == "tensor" or (
    w.format.granularity == "channel" and w.format.contraction_axis == -2
  ):
    return jnp.squeeze(w.float_scale(), -2)
  return None


def _factor(x: jax.Array, format: Format | None) -> tuple[jax.Array, jax.Array | None]:
  """`x` as (values to multiply, scale to apply outside); plain when there is no format."""
  if format is None:
    return x, None
  packed = quantize_array(x, format)
  if format.granularity == "channel" and format.contraction_axis == -1:
    return packed.codes, packed.float_scale()
  return packed.dequantize(x.dtype), None


def _dot(values: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
  """The product of activations and a kernel, codes or floats, in float32.

  Two factors of float8 codes go to the compiler as they are, which takes float8 units where the
  machine has them and widens the codes, exactly, where not; int8 codes have integer sums. All other
  pairs are multiplied in `dtype`, that of the activations.
  """
  dims = (((values.ndim - 1,), (0,)), ((), ()))
  kinds = {values.dtype, kernel.dtype}
  if kinds == {jnp.dtype(jnp.int8)}:
    product = jax.lax.dot_general(values, kernel, dims, preferred_element_type=jnp.int32)
    return product.astype(jnp.float32)
  if not kinds <= _FLOAT8:
    values, kernel = values.astype(dtype), kernel.astype(dtype)
  return jax.lax.dot_general(values, kernel, dims, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(
  activation_format: Format | None,
  x: jax.Array,
  w: jax.Array | QuantizedArray,
  sink: jax.Array | None,
) -> jax.Array:
  del sink  # Only its gradient is of use.
  return _product(activation_format, x, w)


def _product(
  activation_format: Format | None, x: jax.Array, w: jax.Array | QuantizedArray
) -> jax.Array:
  values, x_scale = _factor(x, activation_format)
  w_scale = None
  if isinstance(w, QuantizedArray) and (w_scale := _outer_scale(w)) is not None:
    kernel = w.codes
  else:
    kernel = _dense(w, x.dtype)
  y = _dot(values, kernel, x.dtype)
  if x_scale is not None:
    y = y * x_scale
  if w_scale is not None:
    y = y * jax.lax.broadcast_to_rank(w_scale, y.ndim)
  return y.astype(x.dtype)


def _dense(w: jax.Array | QuantizedArray, dtype: Any) -> jax.Array:
  return w.dequantize(dtype) if isinstance(w, QuantizedArray) else w.astype(dtype)


def _forward(
  activation_format: Format | None, x: jax.Array, w: Any, sink: jax.Array | None
) -> tuple[jax.Array, Any]:
  # Without the sink, which a checkpoint would keep as an array of zeros.
  return _product(activation_format, x, w), (x, w, sink)


def _backward(activation_format: Format | None, residuals: Any, dy: jax.Array) -> tuple:
  x, w, sink = residuals

  def products(x: jax.Array, w: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, x_scale = _factor(x, activation_format)  # Made again: cheaper than keeping them.
    if x_scale is not None:
      values = values.astype(jnp.float32) * x_scale
    values = values.astype(x.dtype)
    kernel = _dense(w, x.dtype)
    dx = jnp.matmul(dy, kernel.T, preferred_element_type=jnp.float32).astype(x.dtype)
    dims = (tuple(range(x.ndim - 1)),) * 2
    dw = jax.lax.dot_general(values, dy, (dims, ((), ())), preferred_element_type=jnp.float32)
    return dx, dw

  like = x, w.qvalue if is_quantized(w) else w
  specs = lambda new: jax.tree.map(explicit_axes.spec_like, new, like)
  dx, dw = explicit_axes.call(products, specs, x, w, dy)
  if not is_quantized(w):
    return dx, dw.astype(w.dtype), None
  # Codes and scales have no gradient of their own: it leaves through the sink.
  return dx, None, None if sink is None else dw.astype(sink.dtype)


_matmul.defvjp(_forward, _backward)


def matmul(
  x: jax.Array, w: jax.Array | QuantizedArray, activation_format: Format | None = None
) -> jax.Array:
  """`x @ w` for a packed or float kernel, with activations quantized on the way in.

  .. math:: y = (codes(x) · codes(w)) · scale_x · scale_w

  Scales per token and per output channel are applied to the product, so that the codes themselves
  are multiplied: float8 by float8 where both factors are, with float32 sums. The backward pass is
  straight-through: it multiplies the stored values of both factors in x's dtype, as if rounding
  were the identity.

  Args:
    x: float activations of shape `(…, in)`.
    w: a kernel of shape `(in, out)`, packed or float. Inside `value_and_grad(…, dense=False)` a
      packed kernel collects its gradient.
    activation_format: of the activations, such as `eco.FP8_TOKEN` (one scale per token); always
      rounded to nearest. None leaves them as they are.

  Returns:
    Activations of shape `(…, out)` in x's dtype.

  Raises:
    ValueError: if the shapes do not match, or the format does not fit x.

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> w = eco.quantize(jnp.eye(4), eco.FP8)
    >>> eco.matmul(jnp.ones((2, 4)), w, eco.FP8_TOKEN).shape
    (2, 4)

  References:
    Nikdan et al, `ECO <https://arxiv.org/abs/2601.22101>`_, 2026, section 4 (FP8 forward pass).
  """
  if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
    raise ValueError(f"matmul takes (…, in) and (in, out), got {x.shape} and {w.shape}")
  if activation_format is not None:
    activation_format.check(x.shape, "activations")
  if isinstance(w, QuantizedArray):
    return _matmul(activation_format, x, dataclasses.replace(w, sink=None), w.sink)
  return _matmul(activation_format, x, w, None)
