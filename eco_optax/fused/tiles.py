"""What kernels of TPUs and of GPUs share: a leaf as their operands, tiles of moments, results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eco_optax import rounding as rounding_lib
from eco_optax.formats import Format
from eco_optax.fused import fused_update as fused
from eco_optax.fused.steps import Moments
from eco_optax.quantized_array import (
  QuantizedArray,
  group_scale,
  is_quantized,
  largest_magnitude,
  matrix_scale,
  times_scale,
)
from eco_optax.transforms import stored_moments
from eco_optax.transforms.stored_moments import SecondMoment


class Stored(NamedTuple):
  """How a moment is stored."""

  dtype: Any
  format: Format | None  # Of codes in blocks of rows; None for floats.
  height: int  # Rows of a block.
  is_root: bool  # Whether the codes are those of its square root.


def kinds(leaf: fused.Leaf) -> tuple[Stored, ...]:
  """How each of a leaf's moments is stored."""
  return tuple(
    Stored(x.format.dtype, x.format, fused.block_rows(x), isinstance(x, SecondMoment))
    if is_quantized(x)
    else Stored(x.dtype, None, 1, False)
    for x in leaf.moments
  )


class Place(NamedTuple):
  """Which random bits those of a leaf are."""

  columns: int  # Of whole matrices, of which the leaf's may be parts.
  numbers: int  # Of matrices that the bits depend on; 0 of a single one.


def place(leaf: fused.Leaf, stack: int) -> Place:
  """That of a leaf of so many matrices."""
  stacked = leaf.layer is not None or leaf.weight.ndim > 2
  return Place(fused.origin(leaf).columns, stack if stacked else 0)


def operands(leaf: fused.Leaf) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
  """A leaf as a kernel takes it.

  Returns:
    int32 numbers (first row and column, numbers of the matrices, keys of the random bits), the
    step's float32 scalars, and arrays: scales in float32, codes, gradient, and what moments are
    stored in, of codes their scales first.
  """
  first = jnp.stack([jnp.asarray(x, jnp.int32) for x in fused.origin(leaf)[:2]])
  numbers = fused.matrix_numbers(leaf)
  keys = (jax.lax.bitcast_convert_type(key, jnp.int32) for key in (leaf.key, *leaf.moment_keys))
  integers = jnp.concatenate([first, *([] if numbers is None else [numbers]), *keys])
  scalars = jnp.stack([jnp.asarray(x, jnp.float32) for x in leaf.scalars])
  moments = [
    x
    for moment in leaf.moments
    for x in ((moment.float_scale(), moment.qvalue) if is_quantized(moment) else (moment,))
  ]
  weight = leaf.weight
  return integers, scalars, [weight.float_scale(), weight.qvalue, leaf.gradient, *moments]


def bits(
  integers: Any,
  place: Place,
  k: int,
  matrix: jax.Array,
  row: jax.Array,
  column: jax.Array,
  shape: tuple[int, ...],
) -> jax.Array:
  """Random bits of a tile.

  Args:
    integers: of `operands`.
    place: of the leaf.
    k: 0 for those of the weight, or the number of a moment, from 1 on.
    matrix: the tile's, in the stack.
    row: its first.
    column: its first.
    shape: its own.

  Returns:
    uint32 of that shape.
  """
  begin = 2 + place.numbers + 2 * k
  words = (integers[begin + i] for i in (0, 1))
  first, second = (jax.lax.bitcast_convert_type(word, jnp.uint32) for word in words)
  number = integers[2 + matrix] if place.numbers else None
  row, column = integers[0] + row, integers[1] + column
  return fused.tile_bits((first, second), number, place.columns, row, column, shape)


def read_moment(kind: Stored, code: jax.Array, scale: jax.Array) -> jax.Array:
  """Values of a tile of codes, whose scales are (blocks, columns)."""
  value = rounding_lib.decode(code, kind.dtype).reshape(-1, kind.height, code.shape[1])
  value = times_scale(value, scale[:, None, :]).reshape(code.shape)
  return jnp.square(value) if kind.is_root else value


def store_moment(
  kind: Stored,
  x: jax.Array,
  bits: Callable[[], jax.Array],
  pack: Callable[[jax.Array, Format], jax.Array],
  divide: Callable[[jax.Array, Any], jax.Array],
  over: Callable[[jax.Array, jax.Array, Format], jax.Array],
) -> tuple[jax.Array, ...]:
  """`stored_moments.store_like` for a tile: scales and codes, or a float array.

  Args:
    kind: how it is stored.
    x: float32 values.
    bits: gives the random bits, where there is rounding.
    pack: int32 codes as they are stored.
    divide: two numbers, as IEEE asks.
    over: values by their scales, likewise.
  """
  if kind.format is None:
    return (rounding_lib.stochastic_cast(x, kind.dtype, bits()),)
  value = stored_moments.root(x) if kind.is_root else x
  grouped = value.reshape(-1, kind.height, x.shape[1])
  largest = largest_magnitude(grouped, (1,), True)
  scale = group_scale(largest, None, kind.format, "stochastic", divide)
  y = over(grouped, scale, kind.format).reshape(x.shape)
  if kind.is_root:
    y = stored_moments.root_on_grid(y, x, kind.dtype)
  return scale[:, 0], pack(rounding_lib.code_bits(y, kind.dtype, bits()), kind.format)


def results(
  leaf: fused.Leaf,
  scale: jax.Array,
  qvalue: jax.Array,
  moments: Sequence[jax.Array],
  largest: jax.Array | None,
) -> tuple[QuantizedArray, Moments]:
  """New weight and moments from what a kernel made of `operands`' arrays, in any stacked shape.

  Args:
    leaf: the old.
    scale: float32, of the weight.
    qvalue: its codes; these and those of moments may be given as bytes.
    moments: what they are stored in.
    largest: the largest proposal of each matrix, which scales of scales follow.
  """
  typed = lambda x, like: jax.lax.bitcast_convert_type(x, like.dtype).reshape(like.shape)
  weight, format = leaf.weight, leaf.weight.format
  tensor_scale = weight.tensor_scale
  if tensor_scale is not None and largest is not None:
    tensor_scale = matrix_scale(largest, format).reshape(tensor_scale.shape)
  new = QuantizedArray(
    typed(qvalue, weight.qvalue),
    scale.reshape(weight.scale.shape).astype(format.scale_dtype),
    format,
    tensor_scale,
  )
  arrays = iter(moments)
  new_moments: list[Any] = []
  for old in leaf.moments:
    if is_quantized(old):
      scale = next(arrays).reshape(old.scale.shape).astype(old.scale.dtype)
      old = dataclasses.replace(old, scale=scale, qvalue=typed(next(arrays), old.qvalue))
      new_moments.append(old)
    else:
      new_moments.append(next(arrays).reshape(old.shape))
  return new, tuple(new_moments)
