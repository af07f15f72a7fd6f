"""The fused step as Pallas kernels for TPUs.

One program takes a panel, all rows of 128 columns of a matrix, and works through it tile by tile;
or a band, all columns of some rows, of a weight stored `(…, out, in)`, whose scales are those of
rows or of blocks within a row. Where a scale depends on all of a panel or band a first loop over
the tiles finds the largest proposals, and where it depends on others too, or on weights that other
devices have, a kernel before does. The arithmetic is `step.definition`'s, by the same functions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from eco_optax.formats import Format
from eco_optax.fused import leaf as leaf_lib
from eco_optax.fused import step as step_lib
from eco_optax.fused.leaf import Leaf
from eco_optax.fused.step import Moments, Proposal, Step
from eco_optax.quantized_array import (
  Groups,
  QuantizedArray,
  Rounding,
  is_quantized,
  largest_magnitude,
  matrix_scale,
)
from eco_optax.transforms.factored import Factors
from eco_optax.transforms.stored_moments import Codes

_LANES = 128  # Columns of a panel.
_TILE = 256  # Rows that are computed at a time, at least where a matrix has so many.
_LARGEST_TILE = 8 * _TILE
_BAND = 24 * 2**20  # Bytes of the largest band. There are more bands than one waits for.


def _vmem() -> int:
  """Bytes that the panels of two programs may take: one computes, the other is on its way."""
  kind = jax.devices()[0].device_kind if jax.default_backend() == "tpu" else ""
  # These have 16 MiB; those since, which programs compiled ahead of time are taken to be for, more.
  small = kind.startswith(("TPU v2", "TPU v3", "TPU v4"))
  return (12 if small else 64) * 2**20


class _Plan(NamedTuple):
  """What a kernel is made for."""

  step: step_lib.Plan
  m: leaf_lib.Matrices
  place: leaf_lib.Stream
  by_row: bool  # Whether programs take bands of rows, or else panels of columns.
  height: int  # Of a tile; of a band too.
  width: int  # Of a tile; of a panel too.
  shared: tuple[_Shared, ...]  # By the weights of a tile and by each moment's.
  finds: bool  # Whether a scale depends on weights outside a panel or band.

  @property
  def format(self) -> Format:
    """Of the weight."""
    assert self.step.weight.format is not None
    return self.step.weight.format

  @property
  def factors(self) -> int:
    """Arrays of moments that are read only."""
    return 2 * sum(stored.is_read_only for stored in self.step.moments)

  @property
  def whole(self) -> bool:
    """Whether a scale depends on other columns and rows."""
    return self.format.granularity == "tensor" or self.format.two_level

  @property
  def grid(self) -> tuple[int, int]:
    """Programs by matrix, and in one."""
    across = self.m.rows // self.height if self.by_row else self.m.columns // self.width
    return self.m.stack, across

  @property
  def turns(self) -> int:
    """Tiles of a program."""
    return self.m.columns // self.width if self.by_row else self.m.rows // self.height


def _tile(rows: int, format: Format, heights: list[int]) -> int | None:
  """Rows of a tile: whole groups of `heights`, and whole registers of codes; None if there is none.

  Scales, too, are stored eight rows at a time, unless all at once.
  """
  registers = 32 * 8 // format.bits
  several = math.lcm(registers, *(8 * height for height in heights))
  fits = [n for n in range(several, _LARGEST_TILE + 1, several) if rows % n == 0]
  if rows <= _LARGEST_TILE and rows % math.lcm(registers, *heights) == 0:
    fits.append(rows)
  return min((n for n in fits if n >= _TILE), default=max(fits, default=None))


def _band(m: leaf_lib.Matrices, format: Format, nbytes: int) -> tuple[int, int] | None:
  """Rows and columns of a tile of a band: whole registers of codes; None if there is none.

  Args:
    m: the matrices.
    format: of the weight.
    nbytes: of a weight's arrays, in all.
  """
  registers = 32 * 8 // format.bits
  most = min(_vmem() // 2, _BAND)
  fits = lambda n: m.rows % n == 0 and n * m.columns * nbytes <= most
  height = max((n for n in range(registers, _TILE + 1, registers) if fits(n)), default=None)
  if height is None:
    return None
  # Scales of blocks of 16 in so many columns are in no more than one register.
  widths = [_LANES * n for n in (16, 8, 4, 2, 1) if m.columns % (_LANES * n) == 0]
  return height, next((n for n in widths if height * n <= _TILE * _LANES), _LANES)


def _lane(x: jax.Array) -> jax.Array:
  """The number of each element's lane."""
  return jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], _LANES), 1)


def _taken(x: jax.Array, lanes: jax.Array) -> jax.Array:
  """Elements of 128 columns by lane."""
  return jnp.take_along_axis(x, lanes, axis=1, mode="promise_in_bounds")


def _slices(x: jax.Array) -> list[jax.Array]:
  """128 columns each."""
  return [x[:, first : first + _LANES] for first in range(0, x.shape[1], _LANES)]


class _Neighbours(NamedTuple):
  """`quantized_array.Groups` of neighbours in a row: each element has its group's scale itself."""

  split: tuple[int, int]  # Of a tile.
  size: int  # Of a group: a power of two, 128 at most.

  def largest(self, x: jax.Array) -> jax.Array:
    """Each element's group's largest magnitude."""
    return jnp.concatenate([self._largest(part) for part in _slices(x)], axis=1)

  def _largest(self, x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    for k in range(self.size.bit_length() - 1):
      bits = jnp.maximum(bits, _taken(bits, _lane(x) ^ np.int32(1 << k)))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)

  def spread(self, scale: jax.Array) -> jax.Array:
    """The scale itself."""
    return scale

  def times(self, y: jax.Array, scale: jax.Array, product: Any) -> jax.Array:
    """`y × scale`."""
    return product(y, scale)

  def read(self, scales: jax.Array, first: jax.Array) -> jax.Array:
    """The scales of a tile's elements from 128 stored ones, those from number `first` on."""
    if is_byte := scales.dtype == jnp.uint8:
      scales = pltpu.bitcast(scales, jnp.int8).astype(jnp.int32) & np.int32(255)
    per = _LANES // self.size
    numbers = range(self.split[1] // _LANES)
    lanes = first + jax.lax.div(_lane(scales), np.int32(self.size))
    own = jnp.concatenate([_taken(scales, lanes + np.int32(k * per)) for k in numbers], axis=1)
    return leaf_lib.scale_of_byte(own) if is_byte else own

  def written(self, scales: jax.Array, first: jax.Array, new: jax.Array) -> jax.Array:
    """The reverse: 128 stored scales, with the tile's in their places."""
    per = _LANES // self.size
    if is_byte := scales.dtype == jnp.uint8:
      scales = pltpu.bitcast(scales, jnp.int8).astype(jnp.int32)
      new = leaf_lib.byte_of_scale(new)
    lane = _lane(scales)
    number = jax.lax.div(lane, np.int32(per)) - jax.lax.div(first, np.int32(per))
    for k, part in enumerate(_slices(new)):
      own = _taken(part, jax.lax.rem(lane, np.int32(per)) * np.int32(self.size))
      scales = jnp.where(number == np.int32(k), own, scales)
    return pltpu.bitcast(scales.astype(jnp.int8), jnp.uint8) if is_byte else scales


class _Shared(NamedTuple):
  """What shares a scale: so many rows of each column, of all of them, or neighbours in a row."""

  rows: int
  columns: int  # 1, 128 for all columns of a panel, or 0 for those of a row.

  def groups(self, height: int, width: int) -> Any:
    """Those of a tile."""
    if self.columns == 0:
      return Groups((height, width), (1,))
    if self.rows == 1 and self.columns > 1:
      return _Neighbours((height, width), self.columns)
    within = (1,) if self.columns == 1 else (1, 2)
    return Groups((height // self.rows, self.rows, width), within, (1,))


def _plan(step: Step, rounding: Rounding, leaf: Leaf) -> _Plan | None:
  """None where no kernel covers the leaf, which then keeps to the definition."""
  format, m = leaf.weight.format, leaf_lib.matrices(leaf)
  # Of other widths compilers turn matrices round, to keep padding small.
  if m is None or m.columns % _LANES:
    return None
  written = [x for x in leaf.moments if not isinstance(x, Factors)]
  dtypes = [x.qvalue.dtype if is_quantized(x) else x.dtype for x in written]
  nbytes = leaf.gradient.dtype.itemsize + 2 * sum(x.itemsize for x in dtypes) + 2
  of_moments = [_Shared(leaf_lib.block_rows(x), leaf_lib.block_columns(x)) for x in leaf.moments]
  own = _shared(format)
  if own is None:
    return None
  if by_row := own.rows == 1:
    tile = _band(m, format, nbytes)
    known = lambda x: x.rows == 1 and x.columns <= _LANES and x.columns & (x.columns - 1) == 0
  else:
    tile = _panel(m, format, nbytes, [x.rows for x in (own, *of_moments) if x.rows], leaf)
    known = lambda x: x.columns == 1
  if tile is None or not all(known(x) for x in of_moments):
    return None
  shared = _Shared(own.rows or tile[0], own.columns), *of_moments
  plan = step_lib.plan_of(step, rounding, leaf, [x.groups(*tile) for x in shared])
  finds = format.granularity == "tensor" or format.two_level
  finds |= bool(leaf.part and leaf.part.sharing)
  return _Plan(plan, m, leaf_lib.stream(leaf), by_row, *tile, shared, finds)


def _shared(format: Format) -> _Shared | None:
  """Of a weight, all rows of a tile as 0; None for what no kernel knows."""
  if not isinstance(format.granularity, tuple):
    by_row = format.granularity == "channel" and format.contraction_axis == -1
    return _Shared(1, 0) if by_row else _Shared(0, 1)
  rows, columns = format.granularity
  if rows == 1:
    return _Shared(rows, columns) if columns in (16, 32, 64, _LANES) else None
  return _Shared(rows, columns) if columns in (1, _LANES) and rows % 8 == 0 else None


def _panel(
  m: leaf_lib.Matrices, format: Format, nbytes: int, heights: list[int], leaf: Leaf
) -> tuple[int, int] | None:
  """Rows and columns of a tile of a panel; None if there is none."""
  heights = [height for height in heights if height > 1]
  if is_factored := any(isinstance(x, Factors) for x in leaf.moments):
    heights.append(_LANES // 8)  # So that the factors of a tile's rows fill registers.
  tile = _tile(m.rows, format, heights)
  if tile is None or (is_factored and tile % _LANES):
    return None
  return None if 2 * m.rows * _LANES * nbytes > _vmem() else (tile, _LANES)


def applies(leaf: Leaf) -> bool:
  """Whether a kernel covers a leaf: its format and moments, and a shape of whole tiles."""
  return _plan(None, "nearest", leaf) is not None  # type: ignore[arg-type]


def _unpack(stored: jax.Array, format: Format) -> jax.Array:
  """int32 codes from the stored array: two to a byte if they have four bits."""
  return pltpu.bitcast(stored, jnp.int4 if format.bits == 4 else jnp.int8).astype(jnp.int32)


def _pack(code: jax.Array, format: Format) -> jax.Array:
  """The reverse of `_unpack`."""
  if format.bits == 4:
    return pltpu.bitcast(code.astype(jnp.int4), jnp.uint8)
  return pltpu.bitcast(code.astype(jnp.int8), format.dtype)


def _turned(x: jax.Array) -> jax.Array:
  """A row of numbers as a column, or back, by the diagonal of a square: exact, of any length."""
  size = max(x.shape)
  row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
  square = jnp.where(row == column, jnp.broadcast_to(x, (size, size)), np.float32(0))
  return jnp.sum(square, axis=1 if x.shape[0] == 1 else 0, keepdims=True)


class _Block(NamedTuple):
  """One program's blocks: references to int32, float32 and the stored arrays."""

  plan: _Plan
  integers: Any  # See `leaf.operands`.
  steps: Any
  scalars: Any
  factors: tuple[Any, ...]  # Of moments that are only read.
  scale: Any
  qvalue: Any
  gradient: Any
  moments: tuple[Any, ...]  # Of each that is stored as codes, its scales and then these.
  of_rows: tuple[Any, ...] = ()  # In a band: the weight's scales and factors of rows, as columns.

  def step_scalars(self) -> Any:
    """The optimizer's."""
    numbers = (self.scalars[k] for k in range(self.scalars.shape[0]))
    return self.plan.step.step.scalars(*numbers)

  def ready(self) -> _Block:
    """With numbers of rows as columns, where they are those of a band."""
    if not self.plan.by_row:
      return self
    of_weight = _turned(self.scale[0, 0]) if self.plan.shared[0].columns == 0 else None
    return self._replace(of_rows=(of_weight, *(_turned(x[0, 0]) for x in self.factors[::2])))

  def codes(self, k: int, scale: Any, qvalue: Any, i: jax.Array) -> Codes:
    """A tile of the weight, 0, or of a moment, from 1 on."""
    p = self.plan
    stored = (p.step.weight, *p.step.moments)[k]
    assert stored.format is not None
    code = _unpack(qvalue[self.at(i, p.height * stored.format.bits // 8)], stored.format)
    if isinstance(stored.groups, _Neighbours):
      part, first = _stored(stored.groups, i)
      return Codes(code, stored.groups.read(scale[0, :, part], first))
    if p.by_row:
      return Codes(code, self.of_rows[0])
    if scale.shape[1] == 1:
      return Codes(code, scale[0])
    return Codes(code, scale[self.at(i, p.height // p.shared[k].rows)])

  def at(self, i: jax.Array, height: int) -> tuple[Any, ...]:
    """Where tile i is in a block, of an array that has so many rows of it."""
    if self.plan.by_row:
      return 0, slice(None), pl.ds(i * self.plan.width, self.plan.width)
    return 0, pl.ds(i * height, height), slice(None)

  def factors_of(self, k: int, i: jax.Array) -> Factors:
    """The factors of the k-th moment that has them."""
    p = self.plan
    if p.by_row:
      return Factors(self.of_rows[1 + k], self.factors[2 * k + 1][self.at(i, 1)])
    # Of each tile in one row: a column of numbers would fill a register for eight of them.
    row, ratio = self.factors[2 * k][0, pl.ds(i, 1), :], self.factors[2 * k + 1][0]
    return Factors(jnp.broadcast_to(row, (_LANES, p.height)).T, ratio)

  def propose(self, i: jax.Array) -> Proposal:
    """The optimizer's step on a tile."""
    plan, moments = self.plan, list[Any]()
    refs, count = iter(self.moments), 0
    for k, stored in enumerate(plan.step.moments):
      if stored.is_read_only:
        moments.append(self.factors_of(count, i))
        count += 1
      elif stored.format is None:
        moments.append(next(refs)[self.at(i, plan.height)])
      else:
        moments.append(self.codes(k + 1, next(refs), next(refs), i))
    weight = self.codes(0, self.scale, self.qvalue, i)
    gradient = self.gradient[self.at(i, plan.height)]
    return step_lib.propose(plan.step, self.step_scalars(), gradient, weight, tuple(moments))

  def largest(self) -> jax.Array:
    """The largest proposal of each column of a panel, (1, 128), or row of a band, (height, 1)."""
    plan = self.plan
    # As integers, which are in the same order, with NaN above all.
    bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32)

    def find(i: jax.Array, largest: jax.Array) -> jax.Array:
      proposal = plan.step.value(self.propose(i))
      if plan.by_row:
        found = [bits(jnp.abs(part)) for part in _slices(proposal)]
      else:
        found = [bits(largest_magnitude(proposal, (0,), keepdims=True))]
      return functools.reduce(jnp.maximum, found, largest)

    zeros = jnp.zeros((plan.height if plan.by_row else 1, _LANES), jnp.int32)
    largest = jax.lax.fori_loop(0, plan.turns, find, zeros)
    if plan.by_row:
      largest = jnp.max(largest, axis=1, keepdims=True)
    return jax.lax.bitcast_convert_type(largest, jnp.float32)


def _stored(groups: _Neighbours, i: jax.Array) -> tuple[Any, jax.Array]:
  """Which 128 of a row's stored scales are those of tile i, and the number of its first there."""
  count = groups.split[1] // groups.size
  whole = _LANES // count
  part = jax.lax.div(i, np.int32(whole)) * np.int32(_LANES)
  return pl.ds(pl.multiple_of(part, _LANES), _LANES), jax.lax.rem(i, np.int32(whole)) * np.int32(
    count
  )


def _apart(plan: _Plan, refs: Any) -> tuple[tuple[Any, Any, Any, tuple[Any, ...]], Any]:
  """References to what both kernels are given first, numbers and factors, and the others."""
  integers, steps, scalars, *rest = refs
  return (integers, steps, scalars, tuple(rest[: plan.factors])), rest[plan.factors :]


def _find(plan: _Plan, *refs: Any) -> None:
  """Kernel: the largest proposal of each column or row."""
  first, (scale, qvalue, gradient, *moments, out) = _apart(plan, refs)
  largest = _Block(plan, *first, scale, qvalue, gradient, tuple(moments)).ready().largest()
  if plan.by_row:
    out[0, 0] = _turned(largest)
  else:
    out[0] = largest


def _update(plan: _Plan, *refs: Any) -> None:
  """Kernel: the whole step."""
  first, (found, scale, qvalue, gradient, *rest) = _apart(plan, refs)
  count = (len(rest) - 2) // 2  # Of the arrays that moments are stored in.
  block = _Block(plan, *first, scale, qvalue, gradient, tuple(rest[:count])).ready()
  new_scale, new_qvalue, *new_moments = rest[count:]
  format = plan.format
  matrix, number = pl.program_id(0), pl.program_id(1)
  largest = unit = None
  if plan.finds:
    largest = found[0, 0] if plan.by_row else found[0]
    largest = largest[:, :1] if plan.whole else _turned(largest) if plan.by_row else largest
    if format.two_level:
      unit, largest = matrix_scale(largest, format), None
  elif format.granularity == "channel":
    largest = block.largest()

  keys = leaf_lib.kernel_keys(block.integers, block.steps, plan.place)

  def write(i: jax.Array, carry: None) -> None:
    proposal = block.propose(i)
    shape = proposal.weight.shape
    row, column = (number, i) if plan.by_row else (i, number)
    bits = lambda k: leaf_lib.kernel_bits(
      block.integers, keys[k], plan.place, matrix, row * plan.height, column * plan.width, shape
    )
    scalars = block.step_scalars()
    weight, *moments = step_lib.settle(plan.step, scalars, proposal, bits, largest, unit)
    assert isinstance(weight, Codes)
    write_scale(0, new_scale, weight.scale, i)
    packed = _pack(weight.code, format)
    new_qvalue[block.at(i, packed.shape[0])] = packed
    refs = iter(new_moments)
    for k, (stored, moment) in enumerate(zip(plan.step.moments, moments, strict=True), 1):
      if isinstance(moment, Codes):
        assert stored.format is not None
        write_scale(k, next(refs), moment.scale, i)
        moment = _pack(moment.code, stored.format)
      if moment is not None:
        next(refs)[block.at(i, moment.shape[0])] = moment

  def write_scale(k: int, ref: Any, scale: jax.Array, i: jax.Array) -> None:
    groups = (plan.step.weight, *plan.step.moments)[k].groups
    if isinstance(groups, _Neighbours):
      part, first = _stored(groups, i)
      ref[0, :, part] = groups.written(ref[0, :, part], first, scale)
    elif plan.by_row:
      pl.when(i == 0)(lambda: ref.__setitem__((0, 0), _turned(scale)))
    else:
      is_whole = k == 0 and not isinstance(format.granularity, tuple)
      rows = slice(None) if is_whole else pl.ds(i * scale.shape[0], scale.shape[0])
      ref[0, rows, :] = jnp.broadcast_to(scale, (scale.shape[0], _LANES))

  jax.lax.fori_loop(0, plan.turns, write, None)
  if (skip := plan.step.step.skipped(block.step_scalars())) is not None:

    @pl.when(skip)
    def _() -> None:
      for new, old in zip(rest[count:], (scale, qvalue, *block.moments), strict=True):
        new[...] = old[...]


def _block(plan: _Plan, x: Any, is_whole: bool = False) -> pl.BlockSpec:
  """The part of an array that one program has: a panel or band, or all of a matrix."""
  if x.ndim == 4:  # Numbers of rows, by band.
    return pl.BlockSpec((1, 1, *x.shape[2:]), lambda i, j, integers: (i, j, 0, 0))
  if is_whole:
    return pl.BlockSpec((1, *x.shape[1:]), lambda i, j, integers: (i, 0, 0))
  in_stack = x.shape[0] != plan.m.stack
  at = lambda i, integers: i + integers[integers.shape[0] - 1] if in_stack else i
  if plan.by_row:
    shape = 1, x.shape[1] // plan.grid[1], x.shape[2]
    return pl.BlockSpec(shape, lambda i, j, integers: (at(i, integers), j, 0))
  return pl.BlockSpec((1, x.shape[1], _LANES), lambda i, j, integers: (at(i, integers), 0, j))


def _moved(plan: _Plan, arrays: list[Any]) -> int:
  """Bytes that the programs load and store: every array once, and of a stack the leaf's part."""
  return sum(math.prod(x.shape[1:]) * plan.m.stack * x.dtype.itemsize for x in arrays)


def _call(
  kernel: Callable[..., None],
  plan: _Plan,
  numbers: list[jax.Array],
  factors: list[jax.Array],
  operands: list[jax.Array],
  results: list[jax.ShapeDtypeStruct],
  in_place: dict[int, int],
  interpret: bool,
) -> list[jax.Array]:
  """Runs a kernel on all panels or bands."""
  is_whole = lambda k: k % 2 == int(plan.by_row)
  return pl.pallas_call(
    functools.partial(kernel, plan),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,  # Integers tell where in a stack a matrix lies.
      grid=plan.grid,
      in_specs=[
        *[pl.BlockSpec(memory_space=pltpu.SMEM)] * (len(numbers) - 1),
        *(_block(plan, x, is_whole(k)) for k, x in enumerate(factors)),
        *(_block(plan, x) for x in operands),
      ],
      out_specs=[_block(plan, x) for x in results],
    ),
    out_shape=results,
    input_output_aliases=in_place,
    # Arithmetic is not what a step waits for.
    cost_estimate=pl.CostEstimate(
      flops=0, transcendentals=0, bytes_accessed=_moved(plan, [*factors, *operands, *results])
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_vmem() + 2**24
    ),
    interpret=interpret,
  )(*numbers, *factors, *operands)


def _operands(plan: _Plan, leaf: Leaf) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
  """A kernel's numbers, factors of moments, and the leaf's other arrays as stacks of matrices."""
  own = leaf.alone
  scale, *arrays = leaf_lib.operands(own)
  if plan.by_row:
    scale, *arrays = _with_bytes(own, [scale, *arrays])
  if leaf.in_stack:
    # Scales are few, and some are laid out anew: those are the leaf's own.
    whole = leaf_lib.operands(leaf)[1:]
    arrays = [
      x if is_scale else of_stack
      for x, of_stack, is_scale in zip(arrays, whole, _are_scales(leaf), strict=True)
    ]
  stack = lambda x: x.reshape(math.prod(x.shape[:-2]), -1, x.shape[-1])
  of_rows = lambda x: x.reshape(*plan.grid, 1, plan.height)
  factors = []
  for x in leaf.moments:
    if isinstance(x, Factors):
      row = of_rows(x.row) if plan.by_row else x.row.reshape(plan.m.stack, -1, plan.height)
      factors += [row, stack(x.ratio)]
  if plan.by_row:
    # Scales of blocks are read 128 at a time.
    full = lambda x: jnp.pad(stack(x), ((0, 0), (0, 0), (0, -x.shape[-1] % _LANES)))
    scale = of_rows(scale) if plan.shared[0].columns == 0 else full(scale)
    return leaf_lib.numbers(leaf), factors, [scale, *map(full, arrays)]
  # Scales are few: one of each column for each of their rows.
  scale = jnp.repeat(stack(scale), plan.m.columns // scale.shape[-1], axis=-1)
  return leaf_lib.numbers(leaf), factors, [scale, *map(stack, arrays)]


def _are_scales(leaf: Leaf) -> list[bool]:
  """Of `leaf.operands` behind the first: which are scales of moments."""
  of = lambda x: [] if isinstance(x, Factors) else [True, False] if is_quantized(x) else [False]
  return [False, False, *(flag for x in leaf.moments for flag in of(x))]


def _with_bytes(leaf: Leaf, arrays: list[jax.Array]) -> list[jax.Array]:
  """`leaf.operands`' arrays with scales of float8_e8m0fnu as the bytes that are stored."""
  weight, *moments = (leaf.weight, *leaf.moments)
  stored: list[Any] = [weight, None, None]
  for x in moments:
    stored += [x, None] if is_quantized(x) else [] if isinstance(x, Factors) else [None]
  is_byte = lambda x: x is not None and x.format.scale_dtype.name == "float8_e8m0fnu"
  return [
    jax.lax.bitcast_convert_type(like.scale, jnp.uint8) if is_byte(like) else x
    for like, x in zip(stored, arrays, strict=True)
  ]


def _shapes(plan: _Plan, operands: list[jax.Array]) -> tuple[Any, list[Any]]:
  """Shapes of columns' or rows' largest proposals, and of the step's results."""
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  scale, qvalue, _, *moments = operands
  of_one = (*plan.grid, 1, plan.height) if plan.by_row else (plan.m.stack, 1, plan.m.columns)
  return jax.ShapeDtypeStruct(of_one, jnp.float32), [shape(x) for x in (scale, qvalue, *moments)]


def bytes_moved(step: Step, rounding: Rounding, leaf: Leaf) -> int:
  """What the kernels load and store for a leaf (of shapes, or of arrays).

  Returns:
    Bytes.
  """
  plan = _plan(step, rounding, leaf)
  if plan is None:
    raise ValueError(f"no kernel covers {leaf.weight.format} of shape {leaf.shape}")
  _, factors, operands = jax.eval_shape(functools.partial(_operands, plan), leaf)
  largest, results = _shapes(plan, operands)
  read = [largest, *factors, *operands]
  return _moved(plan, [*read, *results]) + (_moved(plan, read) if plan.finds else 0)


def by_panels(
  step: Step, rounding: Rounding, leaf: Leaf, interpret: bool = False
) -> tuple[QuantizedArray, Moments]:
  """`step.definition` by kernels for TPUs, where these apply.

  Args:
    step: as in `step.definition`.
    rounding: as in `step.definition`.
    leaf: as in `step.definition`.
    interpret: whether to run the kernels in plain JAX, on any device.

  Returns:
    As `step.definition`.
  """
  plan = _plan(step, rounding, leaf)
  if plan is None:
    return leaf_lib.on_layers(step_lib.by_layers)(step, rounding, leaf)
  numbers, factors, operands = _operands(plan, leaf)
  columns, results = _shapes(plan, operands)
  largest = jnp.zeros(columns.shape, jnp.float32)
  if plan.finds:
    (found,) = _call(_find, plan, numbers, factors, operands, [columns], {}, interpret)
    matrices = found.reshape(plan.m.stack, *((-1, 1) if plan.by_row else (1, -1)))
    found = jnp.broadcast_to(leaf_lib.largest_proposal(leaf, matrices), matrices.shape)
    largest = found.reshape(largest.shape)
  begin = len(numbers) + plan.factors + 1  # Of scale, codes, gradient and moments.
  in_place = {0: 0, 1: 1} | {3 + k: 2 + k for k in range(len(results) - 2)}
  in_place = {begin + k: to for k, to in in_place.items()}
  scale, qvalue, *moments = _call(
    _update, plan, numbers, factors, [largest, *operands], results, in_place, interpret
  )
  if plan.by_row:
    # Without what fills scales up.
    scale_like, _, _, *likes = leaf_lib.operands(leaf.alone)
    cut = lambda x, like: x if x.ndim == 4 else x[..., : like.shape[-1]]
    is_byte = lambda x, like: x.dtype == jnp.uint8 and like.dtype == jnp.float32
    typed = lambda x, like: (
      jax.lax.bitcast_convert_type(x, jnp.float8_e8m0fnu) if is_byte(x, like) else x
    )
    scale = typed(cut(scale, scale_like), scale_like)
    moments = [typed(cut(x, like), like) for x, like in zip(moments, likes, strict=True)]
  else:
    scale = scale[..., :: plan.m.columns // leaf.weight.scale.shape[-1]]
  of_matrices = largest.reshape(plan.m.stack, -1)[:, :1]
  skip = step.skipped(leaf.scalars)
  return leaf_lib.results(leaf, scale, qvalue, moments, of_matrices, skip)
