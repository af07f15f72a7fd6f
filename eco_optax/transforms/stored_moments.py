"""What optimizers' moments are stored as: floats, 8-bit codes with a scale per block, or means."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eco_optax import rounding as rounding_lib
from eco_optax.formats import Format, grid_smallest
from eco_optax.quantized_array import (
  IEEE,
  Division,
  Groups,
  QuantizedArray,
  Rounding,
  groups_of,
  is_quantized,
  pack,
  scaled,
  times_scale,
)
from eco_optax.transforms.factored import FactoredMoment, Factors, is_array
from eco_optax.transforms.packed import add_update

Kind = Literal["first", "second"]  # Momenta; second moments, which are not negative.
MomentDtype = Literal["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"]

SecondMomentDtype = MomentDtype | Literal["factored"]

DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")
SECOND_DTYPES = (*DTYPES, "factored")

BLOCK = 32  # Rows that share a scale, as in the MX formats.
_LONGEST_BLOCK, _SHORTEST_BLOCK = 128, 16

# Float parameters are matrices if both of the last two axes have so many elements, as in
# `optax.scale_by_factored_rms`; else they may be a stack of vectors.
_SMALLEST_MATRIX = 128


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["qvalue", "scale", "tensor_scale", "sink", "guard"],
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
  # A step is divided by the root: a value that is not zero may not become zero.
  return jnp.where(x > 0, jnp.maximum(y, np.float32(grid_smallest(dtype))), y)


def root(x: jax.Array) -> jax.Array:
  """A second moment in few bits: codes of its square root."""
  return jnp.sqrt(jnp.maximum(x, 0))


def root_codes(y: jax.Array, x: jax.Array, dtype: np.dtype, bits: jax.Array | None) -> jax.Array:
  """Codes, see `rounding.code_bits`, of the roots y of x in units of their scale."""
  return rounding_lib.code_bits(root_on_grid(y, x, dtype), dtype, bits)


class Arithmetic(NamedTuple):
  """How a device computes numbers that are the same on all of them, bit for bit."""

  division: Division = IEEE
  decode: Callable[[jax.Array, np.dtype], jax.Array] = rounding_lib.decode
  code_bits: Callable[..., jax.Array] = rounding_lib.code_bits
  root: Callable[[jax.Array], jax.Array] = root
  root_codes: Callable[..., jax.Array] = root_codes
  # Products with a scale and sums with an update, each rounded.
  times: Callable[[jax.Array, jax.Array], jax.Array] = times_scale
  add: Callable[[jax.Array, jax.Array], jax.Array] = add_update


PLAIN = Arithmetic()


class Codes(NamedTuple):
  """Codes on their way through a step: unpacked, with the float32 factors of their groups."""

  code: jax.Array  # int32, see `rounding.code_bits`.
  scale: jax.Array


class Rounded(NamedTuple):
  """Values on the grid of their format."""

  code: jax.Array  # int32, see `rounding.code_bits`.
  scale: jax.Array  # float32 as stored; see `quantized_array.Scaled`.
  factor: jax.Array  # float32 that the codes are multiplied by.


class Stored(NamedTuple):
  """How an array that a step changes, or a part of it, is stored: a weight or a moment."""

  dtype: np.dtype
  format: Format | None = None  # Of codes; None for floats.
  groups: Groups | None = None  # Of codes; None for floats.
  is_root: bool = False  # Whether the codes are those of its square root.
  is_read_only: bool = False  # Whether it comes as factors, and what replaces it is made elsewhere.

  def read(self, stored: Codes | Factors | jax.Array, how: Arithmetic = PLAIN) -> jax.Array:
    """The float32 values."""
    if isinstance(stored, Factors):
      return stored.dense()
    if not isinstance(stored, Codes):
      return stored.astype(jnp.float32)
    assert self.groups is not None
    value = self.groups.times(how.decode(stored.code, self.dtype), stored.scale, how.times)
    return jnp.square(value) if self.is_root else value

  def rounded(
    self,
    x: jax.Array,
    rounding: Rounding,
    bits: jax.Array | None,
    largest: jax.Array | None = None,
    unit: jax.Array | None = None,
    how: Arithmetic = PLAIN,
  ) -> Rounded:
    """Codes of float32 values; arguments as in `quantized_array.scaled`.

    With stochastic rounding their mean over the random bits is x, also where the codes are those
    of its square root: the nearest codes above and below √x, each as often as that takes.
    """
    assert self.format is not None
    assert self.groups is not None
    value = how.root(x) if self.is_root else x
    y, scale, factor = scaled(
      value, self.format, self.groups, rounding, largest, unit, how.division
    )
    if self.is_root:
      code = how.root_codes(y, x, self.dtype, bits)
    else:
      code = how.code_bits(y, self.dtype, bits, self.format.power_of_two)
    return Rounded(code, scale, factor)

  def write(
    self, x: jax.Array, bits: Callable[[], jax.Array], how: Arithmetic = PLAIN
  ) -> Codes | jax.Array | None:
    """A moment's float32 values as stored, rounded stochastically where it is in few bits.

    Args:
      x: the values.
      bits: gives uint32 random bits of x's shape, where there is rounding.
      how: the device computes.
    """
    if self.is_read_only:
      return None
    if self.format is None:
      return x if self.dtype == np.float32 else rounding_lib.stochastic_cast(x, self.dtype, bits())
    code, scale, _ = self.rounded(x, "stochastic", bits(), how=how)
    return Codes(code, scale)


def stored_as(array: Any) -> Stored:
  """How an array, packed or not, is stored."""
  if isinstance(array, Factors):
    return Stored(array.row.dtype, is_read_only=True)
  if not is_quantized(array):
    return Stored(array.dtype)
  groups = groups_of(array.format, array.shape)
  return Stored(array.format.dtype, array.format, groups, isinstance(array, SecondMoment))


def unpack(array: Any) -> Any:
  """An array as a step reads it: `Codes` if it is packed, itself if not."""
  if not is_quantized(array):
    return array
  return Codes(array.code_bits.astype(jnp.int32), array.float_scale())


def pack_like(old: Any, new: Codes | jax.Array | None) -> Any:
  """The reverse of `unpack`; `old` tells how it is stored, and is kept where there is no new."""
  if not isinstance(new, Codes):
    return old if new is None else new
  qvalue, odd = pack(new.code, old.format)
  scale = new.scale.astype(old.format.scale_dtype)
  return dataclasses.replace(old, qvalue=qvalue, scale=scale, odd=odd)


@functools.partial(jax.jit, static_argnames=("kind", "dtype", "packed", "axis"), inline=True)
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
  format, is_root = block_format(x.shape, dtype, packed, axis), kind == "second"
  stored = Stored(format.dtype, format, groups_of(format, x.shape), is_root)
  code, scale, _ = stored.rounded(x, "stochastic", bits)
  qvalue, odd = pack(code, format)
  array = SecondMoment if is_root else QuantizedArray
  return array(qvalue, scale.astype(format.scale_dtype), format, odd=odd)


def read(stored: Any) -> jax.Array:
  """The float32 values of a stored moment."""
  return stored.dequantize() if is_array(stored) else stored.astype(jnp.float32)


def dtype_name(stored: Any) -> str:
  """What a moment is stored in, as `low_bit_moments` calls it."""
  if isinstance(stored, FactoredMoment):
    return "factored"
  return str(stored.format.dtype.name if is_quantized(stored) else stored.dtype.name)


def is_factored(parameter: Any) -> bool:
  """Whether a second moment of a parameter consists of matrices, which can be factored."""
  shape = parameter.shape
  if len(shape) < 2 or 0 in shape:
    return False
  return is_quantized(parameter) or min(shape[-2:]) >= _SMALLEST_MATRIX
