"""A leaf whose whole step is taken at once: its arrays, where they lie, and its random bits."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eco_optax import rounding as rounding_lib
from eco_optax import trees
from eco_optax.quantized_array import (
  QuantizedArray,
  is_quantized,
  largest_magnitude,
  matrix_scale,
)
from eco_optax.transforms.factored import FactoredMoment, Factors
from eco_optax.transforms.stacks import write_layer


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["first"],
  meta_fields=["shape", "sharing", "rows", "columns"],
)
@dataclasses.dataclass(frozen=True)
class Part:
  """A device's part of a leaf."""

  first: tuple[jax.Array, ...]  # int32: index of its first element, on each axis of the leaf.
  shape: tuple[int, ...]  # Of the whole leaf.
  sharing: tuple[str, ...]  # Mesh axes along which parts have weights of one scale.
  rows: tuple[str, ...]  # Mesh axes that the rows are split over.
  columns: tuple[str, ...]  # And the columns.


class Leaf(NamedTuple):
  """Operands of one leaf's step."""

  scalars: Any  # Of the optimizer's step, float32.
  # What keys of random bits are made of, of the weight and, if any is in few bits, of each moment.
  # Kernels make them: programs that did would be other ones for each leaf, to compile and launch.
  starts: jax.Array  # uint32, see `rounding.stream_start`.
  steps: jax.Array  # int32, the steps taken.
  layer: jax.Array | None  # Index of the layer, where the leaf is one layer of a stack.
  weight: QuantizedArray  # Of the leaf, or the stack that it lies in.
  gradient: jax.Array
  # As stored, see `fits`, the momentum first; or `Factors` of what a step reads and does not write.
  # Like the weight they are the leaf's own, or the stacks that these lie in.
  moments: tuple[Any, ...]
  part: Part | None = None  # Where the arrays are one device's part of the leaf.

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the leaf itself."""
    return self.gradient.shape

  @property
  def in_stack(self) -> bool:
    """Whether weight and moments are whole stacks. The step then changes one layer in place."""
    return self.weight.ndim > self.gradient.ndim

  @property
  def alone(self) -> Leaf:
    """The leaf with a weight and moments of its own, cut out of stacks."""
    if not self.in_stack:
      return self
    at = lambda x: jax.lax.dynamic_index_in_dim(x, self.layer, keepdims=False)
    cut = lambda x: x if isinstance(x, Factors) else jax.tree.map(at, x)
    moments = tuple(map(cut, self.moments))
    return self._replace(weight=jax.tree.map(at, self.weight), moments=moments)

  def placed(self, old: jax.Array, new: jax.Array) -> jax.Array:
    """What takes the place of an array of the weight or a moment, in its shape.

    Args:
      old: the array, of the leaf or of a stack.
      new: it once more, changed, or where that is a stack perhaps only the leaf's part.
    """
    if new.size == old.size:
      return new.reshape(old.shape)
    assert self.layer is not None
    return write_layer(old, new.reshape(old.shape[1:]), self.layer)

  def key(self, k: int) -> jax.Array:
    """Of the random bits of the weight, 0, or of a moment, from 1 on: a `rounding.stream_key`."""
    key = jnp.stack(rounding_lib.key_at(self.starts[k], self.steps[k]))
    return jax.lax.optimization_barrier(key)  # Else XLA works it out for each element.

  @property
  def results(self) -> tuple[QuantizedArray, tuple[Any, ...]]:
    """The new weight and moments have the structure, shapes and dtypes of these."""
    return dataclasses.replace(self.weight, sink=None), self.moments


TakeStep = Callable[..., tuple[QuantizedArray, tuple[Any, ...]]]


def on_layers(take_step: TakeStep) -> TakeStep:
  """`take_step(step, rounding, leaf)` for leaves in stacks too: cut out, and written back."""

  @functools.wraps(take_step)
  def take(step: Any, rounding: Any, leaf: Leaf) -> tuple[QuantizedArray, tuple[Any, ...]]:
    new = take_step(step, rounding, leaf.alone)
    if not leaf.in_stack:
      return new
    return jax.tree.map(leaf.placed, leaf.results, new)  # type: ignore[no-any-return]

  return take


def fits(moment: Any, rounds: bool) -> bool:
  """Whether a fused step reads and writes a moment as it is stored.

  It takes float32; if it `rounds` what it writes also bfloat16, codes in blocks, and means.
  """
  if isinstance(moment, FactoredMoment):
    return rounds
  if is_quantized(moment):
    granularity = moment.format.granularity
    return rounds and isinstance(granularity, tuple) and len(granularity) == 2
  return moment.dtype == jnp.float32 or (rounds and moment.dtype == jnp.bfloat16)


def block_rows(moment: Any) -> int:
  """Rows of a moment that share a scale; 1 if it has none."""
  return int(moment.format.granularity[0]) if is_quantized(moment) else 1


def block_columns(moment: Any) -> int:
  """Columns of a moment that share a scale; 1 if it has none."""
  return int(moment.format.granularity[1]) if is_quantized(moment) else 1


class Matrices(NamedTuple):
  """A leaf as a stack of matrices."""

  stack: int
  rows: int
  columns: int
  unit: int  # Rows that stay together: those of a block, or of the codes in a byte.


def matrices(leaf: Leaf) -> Matrices | None:
  """The leaf as matrices; None unless columns, rows, matrices or blocks share scales."""
  weight, shape = leaf.weight, leaf.shape
  format = weight.format
  unit = 8 // format.bits
  if weight.odd or len(shape) < 2:
    return None
  if isinstance(format.granularity, tuple):
    if len(format.granularity) != 2:
      return None
    unit = math.lcm(unit, format.granularity[0])
  elif format.granularity == "channel" and format.contraction_axis not in (-2, -1):
    return None
  unit = math.lcm(unit, *map(block_rows, leaf.moments))
  return Matrices(math.prod(shape[:-2]), shape[-2], shape[-1], unit)


def matrix_numbers(leaf: Leaf) -> jax.Array | None:
  """Numbers, int32, of a leaf's matrices in its whole stack; None where there is no stack."""
  lead = leaf.shape[:-2]
  if leaf.layer is None and not lead:
    return None
  whole = leaf.part.shape[:-2] if leaf.part else lead
  number = jnp.zeros(lead, jnp.int32)
  for axis, size in enumerate(whole):
    index = jax.lax.broadcasted_iota(jnp.int32, lead, axis)
    index = index + leaf.part.first[axis] if leaf.part else index
    number = number * np.int32(size) + index
  if leaf.layer is not None:
    number = number + leaf.layer.astype(jnp.int32) * np.int32(math.prod(whole))
  return number.reshape(-1)


class Origin(NamedTuple):
  """The place of a leaf's matrices in the whole ones, and the width of these."""

  row: jax.Array | int
  column: jax.Array | int
  columns: int


def origin(leaf: Leaf) -> Origin:
  """The place of a part, or of a whole leaf."""
  if leaf.part is None:
    return Origin(0, 0, leaf.shape[-1])
  return Origin(leaf.part.first[-2], leaf.part.first[-1], leaf.part.shape[-1])


def tile_bits(
  key: Any,
  matrix: jax.Array | None,
  columns: int,
  row: jax.Array | int,
  column: jax.Array | int,
  shape: tuple[int, ...],
) -> jax.Array:
  """`rounding.counter_bits` of a tile, which starts at `row` and `column` of each matrix."""
  row, column = (
    jax.lax.broadcasted_iota(jnp.int32, shape, axis) + first
    for axis, first in zip((len(shape) - 2, len(shape) - 1), (row, column), strict=True)
  )
  unsigned = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32)
  element = unsigned(row * np.int32(columns) + column)
  number = None if matrix is None else unsigned(matrix)
  return rounding_lib.element_bits(key, rounding_lib.mixed(element), number)


def random_bits(leaf: Leaf, k: int) -> jax.Array:
  """`rounding.counter_bits` of a leaf, or of its part: of the weight, 0, or of a moment, from 1."""
  key, shape = leaf.key(k), leaf.shape
  if leaf.part is None:
    return rounding_lib.counter_bits(key, shape, leaf.layer)
  numbers, at = matrix_numbers(leaf), origin(leaf)
  numbers = None if numbers is None else numbers.reshape(*shape[:-2], 1, 1)
  return tile_bits(key, numbers, at.columns, at.row, at.column, shape)


def over_parts(leaf: Leaf, largest: jax.Array) -> jax.Array:
  """The largest magnitudes of whole groups from those of a part, the same on all devices."""
  if not (leaf.part and leaf.part.sharing):
    return largest
  # Magnitudes are in the order of their bits, with NaN above all.
  bits = jax.lax.pmax(jax.lax.bitcast_convert_type(largest, jnp.int32), leaf.part.sharing)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def largest_proposal(leaf: Leaf, proposal: jax.Array) -> jax.Array:
  """The largest magnitude of each whole column, row or matrix with one scale, on all devices."""
  format = leaf.weight.format
  axes = format.reduce_axes(2) if format.granularity == "channel" else (-2, -1)
  return over_parts(leaf, largest_magnitude(proposal, axes, keepdims=True))


def with_new_scales(
  leaf: Leaf,
  qvalue: jax.Array,
  scale: jax.Array,
  largest: jax.Array | None,
  skip: jax.Array | None,
) -> QuantizedArray:
  """The new weight, from its codes and what a kernel made of its scales.

  Args:
    leaf: the old.
    qvalue: codes, in the place of the old ones.
    scale: float32 or, as uint8, the bytes of the stored scales; in any stacked shape.
    largest: the largest proposal of each matrix, which scales of scales follow.
    skip: whether the step changes nothing, where the kernel does not see to scales; else None.
  """
  weight, old = leaf.weight, leaf.alone.weight
  scale_dtype = weight.format.scale_dtype
  if scale.dtype == jnp.uint8:
    scale = jax.lax.bitcast_convert_type(scale, scale_dtype)
  scale, tensor_scale = scale.astype(scale_dtype), weight.tensor_scale
  if skip is not None:
    scale = trees.select(skip, old.scale, scale.reshape(old.scale.shape))
  if tensor_scale is not None and old.tensor_scale is not None and largest is not None:
    new = matrix_scale(largest, weight.format).reshape(old.tensor_scale.shape)
    new = new if skip is None else trees.select(skip, old.tensor_scale, new)
    tensor_scale = leaf.placed(tensor_scale, new)
  return QuantizedArray(qvalue, leaf.placed(weight.scale, scale), weight.format, tensor_scale)


class Stream(NamedTuple):
  """The static part of a leaf's place in the streams of random bits."""

  columns: int  # Of whole matrices; the leaf may have parts of these.
  numbers: int  # Of matrices that the bits depend on; 0 of a single matrix.


def stream(leaf: Leaf) -> Stream:
  """The place of a leaf's matrices."""
  stacked = leaf.layer is not None or len(leaf.shape) > 2
  return Stream(origin(leaf).columns, math.prod(leaf.shape[:-2]) if stacked else 0)


def scale_of_byte(byte: jax.Array) -> jax.Array:
  """float32 scales from the bytes of float8_e8m0fnu ones, as int32."""
  raw = jnp.where(byte == 0, np.int32(1 << 22), byte << 23)
  raw = jnp.where(byte == np.int32(255), np.int32(0x7FC00000), raw)
  return jax.lax.bitcast_convert_type(raw, jnp.float32)


def byte_of_scale(scale: jax.Array) -> jax.Array:
  """The reverse, of normal powers of two and NaN."""
  return (jax.lax.bitcast_convert_type(scale, jnp.int32) >> 23) & np.int32(255)


def _arrays(moment: Any) -> tuple[jax.Array, ...]:
  """The arrays of a moment that a step changes, of codes the scales first."""
  if isinstance(moment, Factors):
    return ()
  return (moment.float_scale(), moment.qvalue) if is_quantized(moment) else (moment,)


def numbers(leaf: Leaf) -> list[jax.Array]:
  """A leaf's numbers as a kernel takes them.

  Returns:
    int32 of the leaf: first row and column, numbers of the matrices, starts of the random bits,
    and where it lies in a stack the place of its first matrix there. int32 of the step: steps
    taken. And its float32 scalars.
  """
  of_matrices = matrix_numbers(leaf)
  integers = [jnp.stack([jnp.asarray(x, jnp.int32) for x in origin(leaf)[:2]])]
  integers += [] if of_matrices is None else [of_matrices]
  integers.append(jax.lax.bitcast_convert_type(leaf.starts, jnp.int32))
  if leaf.in_stack and leaf.layer is not None:
    first = leaf.layer.astype(jnp.int32) * np.int32(math.prod(leaf.shape[:-2]))
    integers.append(first.reshape(1))
  scalars = jnp.stack([jnp.asarray(x, jnp.float32) for x in leaf.scalars])
  return [jnp.concatenate(integers), leaf.steps, scalars]


def operands(leaf: Leaf) -> list[jax.Array]:
  """A leaf's arrays as a kernel takes them.

  Returns:
    Scales in float32, codes, gradient, and stored moments, with the scales of codes before them,
    without factors.
  """
  moments = [x for moment in leaf.moments for x in _arrays(moment)]
  return [leaf.weight.float_scale(), leaf.weight.qvalue, leaf.gradient, *moments]


def kernel_keys(integers: Any, steps: Any, place: Stream) -> list[tuple[jax.Array, jax.Array]]:
  """`Leaf.key` of the weight and of each moment in a kernel, which is given `operands`."""
  pairs = ((integers[2 + place.numbers + k], steps[k]) for k in range(steps.shape[0]))
  unsigned = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32)
  return [rounding_lib.key_at(unsigned(start), unsigned(step)) for start, step in pairs]


def kernel_bits(
  integers: Any,
  key: tuple[jax.Array, jax.Array],
  place: Stream,
  matrix: jax.Array,
  row: jax.Array,
  column: jax.Array,
  shape: tuple[int, ...],
) -> jax.Array:
  """`random_bits` of a tile, in a kernel.

  Args:
    integers: of `operands`.
    key: of those of the weight or of a moment, see `kernel_keys`.
    place: of the leaf.
    matrix: the tile's, in the stack.
    row: its first.
    column: its first.
    shape: its own.

  Returns:
    uint32 of that shape.
  """
  number = integers[2 + matrix] if place.numbers else None
  row, column = integers[0] + row, integers[1] + column
  return tile_bits(key, number, place.columns, row, column, shape)


def results(
  leaf: Leaf,
  scale: jax.Array,
  qvalue: jax.Array,
  moments: Sequence[jax.Array],
  largest: jax.Array | None,
  skip: jax.Array | None,
) -> tuple[QuantizedArray, tuple[Any, ...]]:
  """New weight and moments from what a kernel made of `operands`' arrays, in any stacked shape.

  Args:
    leaf: the old.
    scale: as in `with_new_scales`.
    qvalue: the weight's codes; these and those of moments may be given as bytes, and of a stack.
    moments: the arrays they are stored in, without the read-only ones.
    largest: as in `with_new_scales`.
    skip: as in `with_new_scales`.
  """
  typed = lambda x, like: leaf.placed(like, jax.lax.bitcast_convert_type(x, like.dtype))
  new = with_new_scales(leaf, typed(qvalue, leaf.weight.qvalue), scale, largest, skip)
  arrays = iter(moments)
  new_moments: list[Any] = []
  for old in leaf.moments:
    if isinstance(old, Factors):
      new_moments.append(old)
    elif is_quantized(old):
      scale = leaf.placed(old.scale, next(arrays).astype(old.scale.dtype))
      old = dataclasses.replace(old, scale=scale, qvalue=typed(next(arrays), old.qvalue))
      new_moments.append(old)
    else:
      new_moments.append(leaf.placed(old, next(arrays)))
  return new, tuple(new_moments)
