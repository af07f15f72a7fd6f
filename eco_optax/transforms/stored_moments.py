"""What optimizers' moments are stored as: floats, or 8-bit codes with a scale per block."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from eco_optax import rounding as rounding_lib
from eco_optax.formats import Format, grid_smallest
from eco_optax.quantized_array import QuantizedArray, is_quantized, pack, quantize_array, scaled

Kind = Literal["first", "second"]  # Momenta; second moments, which are not negative.
MomentDtype = Literal["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"]

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")

BLOCK = 32  # Rows that share a scale, as in the MX formats.
_LONGEST_BLOCK, _SHORTEST_BLOCK = 128, 16


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["qvalue", "scale", "tensor_scale", "sink"],
  meta_fields=["format", "odd", "role"],
)
@dataclasses.dataclass(frozen=True)
class SecondMoment(QuantizedArray):
  """A non-negative array whose square root is stored: half as many binades to span."""

  def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
    """The stored values, `(codes × scale)²` computed in float32."""
    return jnp.square(super().dequantize()).astype(dtype)


def block_axis(format: Format) -> int:
  """The axis that the blocks of moments lie along, of a parameter packed in a format.

  That which the weight's own scales run over: where a row of the weight is one group, so is a
  row of a block, and one program of a kernel has both whole.
  """
  by_row = format.granularity == "channel" and format.contraction_axis == -1
  by_row |= isinstance(format.granularity, tuple) and format.granularity[:-1] == (1,)
  return -1 if by_row else -2


def block_format(shape: tuple[int, ...], dtype: str, packed: bool, axis: int = -2) -> Format:
  """The format of a moment of this shape.

  Codes of matrices are in blocks of 32 rows, with scales of powers of two in one byte: MXFP8 and
  MXINT8, which a step on columns reads and writes as it goes. Integers span fewer binades, too few
  for the rows of an embedding, whose tokens are not equally frequent: where the parameter is not
  packed, their blocks lie along the last axis, 128 long where that divides it, with scales in
  float32. So do those of vectors.

  Args:
    shape: of the moment, with one axis or more.
    dtype: of the codes, a name.
    packed: whether its parameter is a packed leaf.
    axis: that the blocks of a packed leaf's moments lie along, see `block_axis`.

  Returns:
    A format that fits.
  """
  if packed and axis == -1 and len(shape) > 1 and shape[-1] % BLOCK == 0:
    return Format(dtype, (1, BLOCK), "float8_e8m0fnu")
  by_rows = packed or dtype != "int8"
  if by_rows and len(shape) > 1 and shape[-2] % BLOCK == 0:
    return Format(dtype, (BLOCK, 1), "float8_e8m0fnu")
  scale = "float32" if dtype == "int8" else "float8_e8m0fnu"
  size = shape[-1]
  block = max(n for n in range(1, min(size, _LONGEST_BLOCK) + 1) if size % n == 0)
  if block < min(size, _SHORTEST_BLOCK):  # Then a scale for the whole row costs less.
    return Format(dtype, "channel", scale, contraction_axis=-1)
  return Format(dtype, (block,), scale)


def between_squares(y: jax.Array, step: jax.Array) -> jax.Array:
  """Where a root y, in steps of the grid, is to be rounded from, to keep its square in the mean.

  With p the chance of the code above, E[y²] = below² + p (above² − below²).
  """
  below = jnp.floor(y / step) * step
  return below + (y - below) * (y + below) / (2 * below + step)


def root_on_grid(y: jax.Array, x: jax.Array, dtype: np.dtype) -> jax.Array:
  """The roots y of x in units of their scale, ready for stochastic rounding to `dtype`."""
  y = between_squares(y, rounding_lib.grid_step(y, dtype))
  # A step is divided by the root: what is not zero may not become so.
  return jnp.where(x > 0, jnp.maximum(y, np.float32(grid_smallest(dtype))), y)


def root(x: jax.Array) -> jax.Array:
  """What is stored of a second moment."""
  return jnp.sqrt(jnp.maximum(x, 0))


def _store_root(x: jax.Array, format: Format, bits: jax.Array) -> SecondMoment:
  """The nearest codes above and below √x, each as often as keeps the mean of their squares at x."""
  holder, y = scaled(root(x), format, "stochastic")
  y = root_on_grid(y, x, format.dtype)
  qvalue, odd = pack(rounding_lib.code_bits(y, format.dtype, bits), format)
  return SecondMoment(qvalue, holder.scale, format, holder.tensor_scale, None, odd)


def store(
  x: jax.Array, kind: Kind, dtype: str, bits: jax.Array, packed: bool = False, axis: int = -2
) -> Any:
  """A moment in few bits, rounded stochastically.

  Args:
    x: a float array.
    kind: "first", or "second" for values that are not negative.
    dtype: of the codes, or "bfloat16".
    bits: uint32 random bits of x's shape.
    packed: whether its parameter is a packed leaf.
    axis: as in `block_format`.

  Returns:
    A QuantizedArray, a SecondMoment or a bfloat16 array, whose mean over the random bits is x.
  """
  x = x.astype(jnp.float32)
  if dtype == "bfloat16":
    return rounding_lib.stochastic_cast(x, jnp.dtype(dtype), bits)
  format = block_format(x.shape, dtype, packed, axis)
  if kind == "second":
    return _store_root(x, format, bits)
  return quantize_array(x, format, "stochastic", bits)


def store_like(old: Any, x: jax.Array, bits: jax.Array) -> Any:
  """`store` as `old` is stored."""
  if isinstance(old, SecondMoment):
    return _store_root(x, old.format, bits)
  if is_quantized(old):
    return quantize_array(x, old.format, "stochastic", bits)
  return rounding_lib.stochastic_cast(x, old.dtype, bits)


def read(stored: Any) -> jax.Array:
  """The float32 values of a stored moment."""
  return stored.dequantize() if is_quantized(stored) else stored.astype(jnp.float32)
