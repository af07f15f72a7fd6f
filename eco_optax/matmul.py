"""matmul: multiplying by packed weights, with straight-through gradients."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eco_optax import explicit_axes, lowering, rounding
from eco_optax.formats import FP8, FP8_E5M2_TOKEN, Format, grid_bits
from eco_optax.quantized_array import QuantizedArray, is_quantized, quantize_array, seed_of
from eco_optax.rounded_dot import rounded_dot

_FLOAT8 = {jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)}


class _How(NamedTuple):
  """The static part of a product; formats of factors are None where these stay float."""

  activation: Format | None
  gradient: Format | None
  kernel_gradient: Format | None
  axis: int = 0  # Of the kernel, that the product sums over: 1 of (out, in).


class _Streams(NamedTuple):
  """Of random bits, for the cotangents in either gradient; None rounds to nearest."""

  inputs: jax.Array | None = None
  kernel: jax.Array | None = None


_STREAMS = ("cotangent", "cotangent of the kernel")  # Their names, in that order.


def _is_float8_over(format: Format, axis: int) -> bool:
  """Whether a format has float8 codes, and one scale for all of them along an axis."""
  by = format.granularity, format.contraction_axis
  return format.dtype in _FLOAT8 and by == ("channel", axis)


def check_gradient_format(format: Format, weights: Format) -> None:
  """Raises `ValueError` if cotangents in a format cannot be multiplied by the codes of weights.

  Args:
    format: of the cotangents.
    weights: of the kernel.
  """
  if not _is_float8_over(format, -1):
    raise ValueError(
      f"gradient_format must be of float8 codes with one scale per token, got {format}: use"
      f" {FP8_E5M2_TOKEN} (eco_optax.FP8_E5M2_TOKEN) or eco_optax.FP8_TOKEN"
    )
  if weights.granularity not in ("tensor", "channel"):
    raise ValueError(
      f"gradient_format {format} has no way through weights in {weights}: scales of blocks are"
      " inside the sum of the input's gradient. Use weights with one scale per channel or matrix,"
      " such as eco_optax.FP8, or no gradient_format"
    )
  if weights.dtype not in _FLOAT8 and grid_bits(weights.dtype) == 8:
    raise ValueError(
      f"gradient_format {format} multiplies float8 by the codes of weights, and float8 does not"
      f" have all the codes of {weights}: use eco_optax.FP8 or 4-bit weights, or no gradient_format"
    )


def check_kernel_gradient_format(format: Format) -> None:
  """Raises `ValueError` if a format is not one of float8 codes with a scale per channel."""
  if not _is_float8_over(format, -2):
    raise ValueError(
      f"kernel_gradient_format must be of float8 codes with one scale per channel, got {format}:"
      f" use {FP8} (eco_optax.FP8) or eco_optax.FP8_E5M2"
    )


def _float8(codes: jax.Array) -> jax.Array:
  """Codes as float8, which has all 4-bit codes."""
  return codes if codes.dtype in _FLOAT8 else codes.astype(jnp.float8_e4m3fn)


def _outer_scale(w: QuantizedArray, axis: int) -> jax.Array | None:
  """The product's scale, one per output channel, for formats whose scale is outside the sum."""
  if w.format.granularity == "tensor" or (
    w.format.granularity == "channel" and w.format.contraction_axis == axis - 2
  ):
    return jnp.squeeze(w.float_scale(), axis)
  return None


def _factor(x: jax.Array, format: Format | None) -> tuple[jax.Array, jax.Array | None]:
  """`x` as (values to multiply, scale to apply outside); plain when there is no format."""
  if format is None:
    return x, None
  packed = quantize_array(x, format)
  if format.granularity == "channel" and format.contraction_axis == -1:
    return packed.codes, packed.float_scale()
  return packed.dequantize(x.dtype), None


def _dot(values: jax.Array, kernel: jax.Array, dtype: Any, kernel_axis: int) -> jax.Array:
  """The product of activations and a kernel, codes or floats, over one axis of the kernel.

  Two factors of float8 codes go to the compiler unconverted, which takes float8 units where the
  machine has them and widens the codes, exactly, where not; int8 codes have integer sums. All other
  pairs are multiplied in `dtype`, the activations'. Sums are float32.

  Returns:
    bfloat16 where that is `dtype`, else float32, still to be multiplied by the scales. Units for
    matrices store their sums in the dtype that is asked for, and scales per token and channel are
    applied by the operation that reads them: float32 would be written and read back for it. The
    rounding is by at most 2⁻⁸ of the product, a sixteenth of E4M3's of one factor.
  """
  dims = (((values.ndim - 1,), (kernel_axis,)), ((), ()))
  kinds = {values.dtype, kernel.dtype}
  if kinds == {jnp.dtype(jnp.int8)}:
    product = jax.lax.dot_general(values, kernel, dims, preferred_element_type=jnp.int32)
    return product.astype(jnp.float32)
  if not kinds <= _FLOAT8:
    values, kernel = values.astype(dtype), kernel.astype(dtype)
  return jax.lax.dot_general(values, kernel, dims, preferred_element_type=_of_sums(dtype))


def _of_sums(dtype: Any) -> Any:
  """What sums of codes are stored in, where they are scaled to a dtype: float16 has no range."""
  return jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32


def _times(y: jax.Array, scale: jax.Array | None) -> jax.Array:
  """`y × scale` in float32, the scale spread over y's leading axes."""
  if scale is None:
    return y
  return y.astype(jnp.float32) * jax.lax.broadcast_to_rank(scale, y.ndim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(
  how: _How,
  x: jax.Array,
  w: jax.Array | QuantizedArray,
  sink: jax.Array | None,
  streams: _Streams,
) -> jax.Array:
  del sink, streams  # Of use in the backward pass only.
  return _product(how, x, w)


def _product(how: _How, x: jax.Array, w: jax.Array | QuantizedArray) -> jax.Array:
  values, x_scale = _factor(x, how.activation)
  w_scale = None
  if isinstance(w, QuantizedArray) and (w_scale := _outer_scale(w, how.axis)) is not None:
    kernel = w.codes
  else:
    kernel = _dense(w, x.dtype)
  y = _dot(values, kernel, x.dtype, how.axis)
  return _times(_times(y, x_scale), w_scale).astype(x.dtype)


def _dense(w: jax.Array | QuantizedArray, dtype: Any) -> jax.Array:
  return w.dequantize(dtype) if isinstance(w, QuantizedArray) else w.astype(dtype)


def _rounded(x: jax.Array, format: Format, stream: jax.Array | None) -> QuantizedArray:
  bits = None if stream is None else rounding.counter_bits(stream, x.shape)
  return quantize_array(x, format, "nearest" if bits is None else "stochastic", bits)


def _input_gradient(
  format: Format, axis: int, dy: jax.Array, w: QuantizedArray, stream: jax.Array | None
) -> jax.Array:
  """`dy @ wᵀ` of cotangents rounded per token and the codes of w, whose inputs are on an axis.

  The sum runs over output channels. Their scales are multiplied into the cotangents before the
  rounding. Scales per input channel are applied to the sums.
  """
  scale, y = w.float_scale(), dy
  is_by_output = scale.shape[axis] == 1
  if is_by_output:
    y = _times(y, jnp.squeeze(scale, axis))
  packed = _rounded(y, format, stream)
  dx = _dot(packed.codes, _float8(w.codes), dy.dtype, 1 - axis)
  dx = _times(dx, packed.float_scale())
  return (dx if is_by_output else _times(dx, jnp.squeeze(scale, 1 - axis))).astype(dy.dtype)


def _kernel_gradient(
  how: _How, x: jax.Array, dy: jax.Array, dtype: Any, stream: jax.Array | None
) -> jax.Array:
  """`xᵀ @ dy`, or its transpose for a kernel of (out, in).

  The sum runs over tokens, so each factor has one scale for each of its channels. Activations are
  rounded from the floats that the layer was given, not from their codes per token: a second
  rounding would add its error to that of the first.
  """
  if how.kernel_gradient is None:
    values, x_scale = _factor(x, how.activation)  # Made again: cheaper than keeping them.
    factors = _times(values, x_scale).astype(x.dtype), dy
    tokens = (tuple(range(x.ndim - 1)),) * 2
    return rounded_dot(*(factors[::-1] if how.axis else factors), tokens, dtype)
  x, dy = (y.reshape(-1, y.shape[-1]) for y in (x, dy))
  packed = quantize_array(x, FP8), _rounded(dy, how.kernel_gradient, stream)
  # Float8 units of Hopper want tokens along rows. Left alone, XLA turns the float32 arrays that
  # codes are made of; so held, it turns codes.
  packed = lowering.barrier(lowering.row_major(packed))
  first, second = packed[::-1] if how.axis else packed
  dw = rounded_dot(first.codes, second.codes, ((0,), (0,)), _of_sums(dtype))
  return _times(dw, first.float_scale().T * second.float_scale()).astype(dtype)


def _forward(
  how: _How, x: jax.Array, w: Any, sink: jax.Array | None, streams: _Streams
) -> tuple[jax.Array, Any]:
  # Without the sink, which a checkpoint would keep as an array of zeros.
  return _product(how, x, w), (x, w, sink, streams)


def _backward(how: _How, residuals: Any, dy: jax.Array) -> tuple:
  x, w, sink, streams = residuals
  dw_dtype = w.dtype if not is_quantized(w) else jnp.float32 if sink is None else sink.dtype

  def products(
    x: jax.Array, w: Any, dy: jax.Array, streams: _Streams
  ) -> tuple[jax.Array, jax.Array]:
    if how.gradient is None:
      dx = _dot(dy, _dense(w, x.dtype), x.dtype, 1 - how.axis).astype(x.dtype)
    else:
      dx = _input_gradient(how.gradient, how.axis, dy, w, streams.inputs)
    return dx, _kernel_gradient(how, x, dy, dw_dtype, streams.kernel)

  like = x, w.qvalue if is_quantized(w) else w
  specs = lambda new: jax.tree.map(explicit_axes.spec_like, new, like)
  dx, dw = explicit_axes.call(products, specs, x, w, dy, streams)
  if not is_quantized(w):
    return dx, dw, None, None
  # Codes and scales have no gradient of their own: it leaves through the sink.
  return dx, None, None if sink is None else dw, None


_matmul.defvjp(_forward, _backward)


def matmul(
  x: jax.Array,
  w: jax.Array | QuantizedArray,
  activation_format: Format | None = None,
  gradient_format: Format | None = None,
  gradient_key: Any = None,
  transposed: bool = False,
  kernel_gradient_format: Format | None = None,
) -> jax.Array:
  """`x @ w` for a packed or float kernel, with activations quantized on the way in.

  .. math:: y = (codes(x) · codes(w)) · scale_x · scale_w

  Scales per token and per output channel are applied to the product, so that the codes themselves
  are multiplied: float8 by float8 where both factors are, with float32 sums. The backward pass is
  straight-through: it multiplies the stored values of both factors in x's dtype, as if rounding
  were the identity. With a `gradient_format` the input's gradient is a product of codes too,

  .. math:: dx = (codes(dy · scale_w) · codes(w)^T) · scale_{dy}

  with one scale for each token's cotangent. With a `kernel_gradient_format` so is the kernel's,

  .. math:: dw = (codes(x)^T · codes(dy)) · scale_x · scale_{dy}

  with one scale for each channel of x and of dy, over all tokens.

  Args:
    x: float activations of shape `(…, in)`.
    w: a kernel of shape `(in, out)`, packed or float. Inside `value_and_grad(…, dense=False)` a
      packed kernel collects its gradient.
    activation_format: of the activations, such as `eco.FP8_TOKEN` (one scale per token); always
      rounded to nearest. None leaves them unchanged.
    gradient_format: of the cotangents that the input's gradient is made of, `eco.FP8_E5M2_TOKEN` or
      `eco.FP8_TOKEN`; w is then packed, with one scale per channel (of outputs or inputs) or per
      matrix, in float8 or 4 bits. None leaves them unchanged. NVIDIA's GPUs have no product of
      E5M2 by E5M2: for `eco.FP8_E5M2` weights take `eco.FP8_TOKEN`.
    gradient_key: a PRNG key or an integer, a new one for every step and layer: cotangents are then
      rounded stochastically, and dx and dw are on average what they are with the cotangents
      unrounded. None rounds to nearest.
    transposed: whether w is stored `(out, in)`; the product is `x @ wᵀ`. Scales per output channel
      are then those of a format with `contraction_axis=-1`. Float8 units of Hopper read kernels so,
      and others as fast.
    kernel_gradient_format: of the cotangents that the kernel's gradient is made of, `eco.FP8` or
      `eco.FP8_E5M2`; activations are then rounded to `eco.FP8` for it. The kernel may be float.
      Scales over tokens take one more pass over both factors, which only large products repay:
      most recipes, and the paper's, leave this product in bfloat16. None does.

  Returns:
    Activations of shape `(…, out)` in x's dtype. A token whose cotangent has a NaN or an infinity
    gets NaN throughout dx, and so does a channel of dw with a `kernel_gradient_format`.

  Raises:
    ValueError: if the shapes do not match, the activation format does not fit x, or a gradient
      format is not one or not for this kernel.

  Example:
    >>> import jax, jax.numpy as jnp, eco_optax as eco
    >>> w = eco.quantize(jnp.eye(4), eco.FP8)
    >>> eco.matmul(jnp.ones((2, 4)), w, eco.FP8_TOKEN).shape
    (2, 4)
    >>> loss = lambda x: eco.matmul(x, w, eco.FP8_TOKEN, eco.FP8_E5M2_TOKEN).sum()
    >>> jax.grad(loss)(jnp.ones((2, 4))).dtype
    dtype('float32')

  References:
    Nikdan et al, `ECO <https://arxiv.org/abs/2601.22101>`_, 2026, section 4 (FP8 forward pass);
    Micikevicius et al, `FP8 formats for deep learning <https://arxiv.org/abs/2209.05433>`_, 2022
    (E5M2 for gradients).
  """
  if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[int(transposed)]:
    kernel = "(out, in)" if transposed else "(in, out)"
    raise ValueError(f"matmul takes (…, in) and {kernel}, got {x.shape} and {w.shape}")
  if activation_format is not None:
    activation_format.check(x.shape, "activations")
  if gradient_format is kernel_gradient_format is None and gradient_key is not None:
    raise ValueError(
      "gradient_key is for the rounding of cotangents: pass gradient_format= or"
      " kernel_gradient_format= too, or no key"
    )
  if kernel_gradient_format is not None:
    check_kernel_gradient_format(kernel_gradient_format)
  if gradient_format is not None:
    if not isinstance(w, QuantizedArray):
      raise ValueError(
        f"gradient_format {gradient_format} multiplies by the codes of a packed kernel, got floats"
        f" of shape {w.shape}: pack it by eco_optax.quantize and differentiate by"
        " eco_optax.value_and_grad(…, dense=False), or pass no gradient_format"
      )
    check_gradient_format(gradient_format, w.format)
  how = _How(activation_format, gradient_format, kernel_gradient_format, int(transposed))
  streams = _Streams()
  if gradient_key is not None:
    seed = seed_of(gradient_key)
    streams = _Streams(*(rounding.stream_key(seed, 0, name) for name in _STREAMS))
  vary = explicit_axes.vary_like
  if isinstance(w, QuantizedArray):
    sink = None if w.sink is None else vary(w.sink, x)
    return _matmul(how, vary(x, w.qvalue), dataclasses.replace(w, sink=None), sink, streams)
  return _matmul(how, vary(x, w), vary(w, x), None, streams)
