"""The fused step on NVIDIA GPUs in one launch per leaf, or two: Pallas kernels by way of Triton.

Two schedules share one step of a tile:

- *Alone*: a program owns whole groups of weights that share a scale: blocks, or the rows of a
  weight stored `(…, out, in)`. A row of up to 4,096 stays in registers between its scale and its
  codes; a longer one is read twice, the second time from the caches.
- *Two launches*, where scales are those of columns or of whole matrices. One finds the largest
  proposals, one writes. (One launch that alternates between finding a panel of columns and
  writing an earlier one, which the L2 cache still holds, moves a third less and took 11.4 to 14.2
  ms on an H200 where two launches took 8.9: programs are short, and wait for each other.)

Each thread has `per` elements side by side, 16 bytes of the widest array: then no array changes its
layout between threads, and all accesses are coalesced. Arrays are seen as (matrices, rows, columns
/ per, per). The arithmetic is `step.propose` and `step.settle`; `gpu_math` has its numbers in fewer
instructions. Triton rounds every product and sum, so neither needs a guard against a compiler that
contracts them; only the optimizer's own function has multiply-adds. JAX means to remove its Triton
backend; without it the definition stays.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from eco_optax import rounding as rounding_lib
from eco_optax.formats import Format
from eco_optax.fused import gpu_math
from eco_optax.fused import leaf as leaf_lib
from eco_optax.fused import step as step_lib
from eco_optax.fused.leaf import Leaf
from eco_optax.fused.step import Moments, Proposal, Step
from eco_optax.quantized_array import QuantizedArray, Rounding, is_quantized, matrix_scale
from eco_optax.transforms.factored import Factors
from eco_optax.transforms.stored_moments import Codes, Stored

Schedule = Literal["alone", "two launches"]
Group = tuple[int, int]  # Rows and columns that share a scale.


class Tuning(NamedTuple):
  """Free choices; None takes the fastest on an H200, see results/gpu."""

  elements: int | None = None  # Of a tile, for each thread.
  chunk: int | None = None  # Elements of a tile, but for rows in registers.
  row: int = 4096  # The longest row in registers.
  width: int = 64  # Columns of a tile, where a scale is not a row's.
  per: int | None = None  # Elements side by side.


TUNED = Tuning()
# Elements of a thread and of a tile. What waits for a scale fills the registers with values; what
# reads twice does better with more threads. Rows with moments in few bits take so many instructions
# that two at a time, in 512 threads, are worth fewer registers.
_IN_REGISTERS, _READ_TWICE, _ROWS_OF_FEW_BITS = (16, 2048), (8, 1024), (16, 8192)


class _Groups(NamedTuple):
  """`quantized_array.Groups` of a tile; a scale has the axes of `split`, 1 within a group."""

  split: tuple[int, ...]  # (…, rows of a group, …) and if a group has columns these on two axes.
  within: tuple[int, ...]

  def largest_bits(self, x: jax.Array) -> jax.Array:
    """The largest magnitude of each group: int32, in the order of magnitudes."""
    bits = gpu_math.bits_of(jnp.abs(x)).reshape(self.split)
    for axis in reversed(self.within):
      if bits.shape[axis] > 1:
        bits = jnp.max(bits, axis=axis, keepdims=True)
    return bits

  def largest(self, x: jax.Array) -> jax.Array:
    """The largest magnitude of each group, float32."""
    return gpu_math.float_of(self.largest_bits(x))

  def spread(self, scale: jax.Array) -> jax.Array:
    """The scale itself: it broadcasts."""
    return scale

  def times(self, y: jax.Array, scale: jax.Array, product: Any) -> jax.Array:
    """`y × scale`."""
    return product(y.reshape(self.split), scale).reshape(y.shape)


class _Plan(NamedTuple):
  """What a kernel is made for."""

  step: step_lib.Plan
  target: gpu_math.Target
  schedule: Schedule
  blocks: tuple[Group, ...]  # Of each moment's scales; (1, 1) of what has none.
  stack: int
  rows: int
  columns: int
  per: int
  group: Group  # Of the weight's scales; columns or rows of a matrix beyond a tile count as 0.
  height: int  # Of a tile.
  width: int
  turns: int  # Tiles that a program takes one after another to own whole groups.
  along: int  # The axis on which they follow each other.
  place: leaf_lib.Stream
  warps: int

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
  def masked(self) -> bool:
    """Whether tiles reach beyond the rows' end."""
    return self.columns % self.width != 0

  @property
  def tiles(self) -> tuple[int, int]:
    """In a matrix: down and across, each of a program."""
    down = self.turns if self.along == 0 else 1
    across = self.turns if self.along == 1 else 1
    return self.rows // (self.height * down), -(-self.columns // (self.width * across))


def _power(n: int) -> int:
  """The smallest power of two that is no less."""
  return 1 << max(n - 1, 0).bit_length()


def _group(format: Format) -> Group | None:
  """Rows and columns that share a scale, 0 for all of them; None for what no kernel knows."""
  if format.granularity == "tensor":
    return 0, 0
  if format.granularity == "channel":
    return {-2: (0, 1), -1: (1, 0)}.get(format.contraction_axis)  # type: ignore[arg-type]
  if len(format.granularity) == 1:
    return 1, int(format.granularity[0])
  if len(format.granularity) == 2:
    return int(format.granularity[0]), int(format.granularity[1])
  return None


def _blocks(leaf: Leaf) -> list[Group] | None:
  """Rows and columns of the moments' blocks; None where no kernel reads one."""
  found = []
  for x in leaf.moments:
    if not is_quantized(x):
      found.append((1, 1))
      continue
    group = _group(x.format) if isinstance(x.format.granularity, tuple) else None
    if group is None or 0 in group or x.format.scale_dtype.name != "float8_e8m0fnu":
      return None
    if x.format.bits != 8:
      return None
    found.append(group)
  return found


def _groups(group: Group, height: int, width: int, per: int) -> _Groups:
  """The groups of a tile."""
  high = min(group[0] or height, height)
  if group[1] == 1:
    return _Groups((height // high, high, width // per, per), (1,))
  wide = min(group[1] or width, width) // per
  return _Groups((height // high, high, width // per // wide, wide, per), (1, 3, 4))


def plan(
  step: Step,
  rounding: Rounding,
  leaf: Leaf,
  target: gpu_math.Target = gpu_math.HOPPER,
  tuning: Tuning = TUNED,
) -> _Plan | None:
  """How a leaf's step runs; None where no kernel covers it, which then keeps to the definition."""
  weight, format = leaf.weight, leaf.weight.format
  of_moments, group = _blocks(leaf), _group(leaf.weight.format)
  if len(leaf.shape) < 2 or weight.odd or of_moments is None or group is None:
    return None
  if weight.size >= 2**31:  # Places are computed in 32 bits.
    return None
  if leaf.part and leaf.part.sharing:  # Between two launches devices would have to meet.
    return None
  *lead, rows, columns = leaf.shape
  stack = math.prod(lead)
  written = [x for x in leaf.moments if not isinstance(x, Factors)]
  dtypes = [x.qvalue.dtype if is_quantized(x) else x.dtype for x in written]
  widest = max(leaf.gradient.dtype.itemsize, *(x.itemsize for x in dtypes))
  blocks = [own for x, own in zip(leaf.moments, of_moments, strict=True) if is_quantized(x)]
  # Where a block is one of columns a thread has the fewer scales the fewer columns it has.
  per = tuning.per or max(16 // widest if all(x[1] > 1 for x in blocks) else 4, 4)
  high = max([2 if format.bits == 4 else 1, *(x[0] for x in blocks)])
  wide = max([per, *(x[1] for x in blocks)])

  schedule: Schedule = "alone"
  turns, along, best = 1, 1, _IN_REGISTERS
  across = next((n for n in (tuning.width, 64, 32) if columns % n == 0), 0)
  if group == (1, 0):  # Rows.
    width, height = _power(columns), high
    best = _IN_REGISTERS if widest == 4 else _ROWS_OF_FEW_BITS
    if width > tuning.row or (width - columns) * 8 > columns:
      best = _READ_TWICE
      width = min(tuning.chunk or best[1], width)
      # The largest tile that divides the rows, if it is not much smaller.
      width = next((n for n in (width, width // 2, width // 4) if columns % n == 0), width)
      turns = -(-columns // width)
    # Several short rows together.
    height = max(high, min((tuning.chunk or best[1]) // width, 8))
    while height > high and rows % height:
      height //= 2
  elif 0 in group:  # Columns, or a matrix.
    schedule, width = "two launches", across
    best = _READ_TWICE if 1 in group and not blocks else _IN_REGISTERS
    height = max(high, (tuning.chunk or best[1]) // max(width, 1))
  else:
    schedule = "two launches" if format.two_level else "alone"
    height, width = max(high, group[0]), max(wide, group[1])
    if group[1] == 1:
      height, width = max(height, 32), across
    if height * width > 2 * best[1]:  # More than registers hold.
      best = _READ_TWICE
    chunk = tuning.chunk or best[1]
    while best is _READ_TWICE and height * width > chunk and height > high:
      height, turns, along = height // 2, turns * 2, 0
    while height * width < chunk and columns % (2 * width) == 0 and group[0] == 1:
      width *= 2
  sizes = (height, width, *(n for x in (*blocks, group) for n in x if n))
  if not width or any(n & (n - 1) for n in sizes):
    return None
  if rows % (height * (turns if along == 0 else 1)):
    return None
  if columns % wide or any(width % n for n in (per, wide)) or any(height % x[0] for x in blocks):
    return None
  if any(1 < x[1] < per for x in (*blocks, group)):
    return None
  if width * (turns if along == 1 else 1) > columns and group != (1, 0):
    return None
  if schedule != "alone" and columns % width:
    return None
  warps = min(max(height * width // (32 * (tuning.elements or best[0])), 1), 32)
  groups = [_groups(own, height, width, per) for own in (group, *of_moments)]
  step = step._replace(
    propose=gpu_math.shorter(target, step.propose), inject=gpu_math.shorter(target, step.inject)
  )
  step_plan = step_lib.plan_of(step, rounding, leaf, groups, gpu_math.arithmetic(target))
  return _Plan(
    step_plan, target, schedule, tuple(of_moments), stack, rows, columns, per, group, height, width,
    turns, along, leaf_lib.stream(leaf), warps,
  )  # fmt: skip


def _unsigned(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, jnp.uint32)


class _Tile(NamedTuple):
  """Where a tile is."""

  matrix: jax.Array
  row: jax.Array  # The first.
  column: jax.Array  # The first.


class _Read(NamedTuple):
  """A tile's proposal, and what it is computed from."""

  scalars: Any  # The optimizer's, loaded once so that what depends on them is computed once.
  proposal: Proposal
  elements: jax.Array  # As `bits` takes them.


class _Program(NamedTuple):
  """A plan and the references that its programs have."""

  plan: _Plan
  integers: Any  # See `leaf.operands`.
  keys: list[Any]  # See `leaf.kernel_keys`.
  scalars: Any
  factors: tuple[Any, ...]  # Of moments that are only read.
  scale: Any
  qvalue: Any
  gradient: Any
  moments: tuple[Any, ...]  # Of each that is stored as codes, its scales and then these.

  def step_scalars(self) -> Any:
    """The optimizer's."""
    numbers = (self.scalars[k] for k in range(self.scalars.shape[0]))
    return self.plan.step.step.scalars(*numbers)

  def _at(self, ref: Any, tile: _Tile) -> tuple[Any, jax.Array | None]:
    """A tile's part of an array, each element of which may stand for several; and its mask."""
    p, matrix = self.plan, tile.matrix
    *_, rows, columns = ref.shape[:3]
    if ref.shape[0] != p.stack:  # Of a whole stack.
      matrix = matrix + self.integers[self.integers.shape[0] - 1]
    if len(ref.shape) == 3:  # Scales, and factors.
      high, wide = p.rows // rows, p.columns // columns
      count = max(p.height // high, 1), max(p.width // wide, 1)
      first = jax.lax.div(tile.row, np.int32(high)), jax.lax.div(tile.column, np.int32(wide))
      part = ref.at[matrix, pl.ds(first[0], count[0]), pl.ds(first[1], count[1])]
      if not p.masked or columns == 1:
        return part, None
      across = first[1] + jax.lax.broadcasted_iota(jnp.int32, count, 1)
      return part, across < np.int32(columns)
    high = p.rows // rows  # 2, where a byte has the codes of two rows.
    count = p.height // high, p.width // p.per
    first = jax.lax.div(tile.row, np.int32(high)), jax.lax.div(tile.column, np.int32(p.per))
    part = ref.at[matrix, pl.ds(first[0], count[0]), pl.ds(first[1], count[1]), :]
    return part, self.inside(tile, count[0])

  def inside(self, tile: _Tile, rows: int | None = None) -> jax.Array | None:
    """Which of a tile's elements the matrix has; None for all of them."""
    p = self.plan
    if not p.masked:
      return None
    shape = rows or p.height, p.width // p.per, p.per
    group = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return jax.lax.div(tile.column, np.int32(p.per)) + group < np.int32(p.columns // p.per)

  def load(self, ref: Any, tile: _Tile) -> jax.Array:
    """A tile's part of an array."""
    part, mask = self._at(ref, tile)
    return pltriton.load(part, mask=mask, other=None if mask is None else 0)

  def store(self, ref: Any, tile: _Tile, x: jax.Array) -> None:
    """Writes a tile's part."""
    part, mask = self._at(ref, tile)
    pltriton.store(part, x, mask=mask)

  def elements(self, tile: _Tile) -> jax.Array:
    """A tile's elements as `bits` takes them."""
    p, integers = self.plan, self.integers
    shape = p.height, p.width // p.per, 1
    row = integers[0] + tile.row + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1) * np.int32(p.per)
    column = integers[1] + tile.column + column
    # Rows of parts, and of wholes, are multiples of what lies side by side.
    first = _unsigned(row * np.int32(p.place.columns) + column)
    offset = jax.lax.broadcasted_iota(jnp.uint32, (*shape[:-1], p.per), 2)
    return rounding_lib.mixed(first, offset)

  def bits(self, k: int, tile: _Tile, elements: jax.Array) -> jax.Array:
    """Random bits of the weight, 0, or of a moment, from 1 on."""
    number = _unsigned(self.integers[2 + tile.matrix]) if self.plan.place.numbers else None
    return rounding_lib.element_bits(self.keys[k], elements, number)

  def spread(self, scale: jax.Array, group: Group) -> jax.Array:
    """Stored scales, with the axes of `_Groups.split`."""
    if scale.dtype == jnp.uint8:
      scale = leaf_lib.scale_of_byte(scale.astype(jnp.int32))
    if group[1] == 1:  # (blocks, columns)
      return scale.reshape(scale.shape[0], 1, self.plan.width // self.plan.per, self.plan.per)
    return scale[:, None, :, None, None]

  def store_scale(self, ref: Any, tile: _Tile, scale: jax.Array, group: Group) -> None:
    """Writes a tile's scales."""
    columns = self.plan.width if group[1] == 1 else scale.shape[2]
    scale = scale.reshape(scale.shape[0], columns)
    self.store(
      ref,
      tile,
      leaf_lib.byte_of_scale(scale).astype(jnp.uint8) if ref.dtype == jnp.uint8 else scale,
    )

  def read(self, tile: _Tile) -> _Read:
    """A tile's proposal."""
    p, refs, factors = self.plan, iter(self.moments), iter(self.factors)
    code = _unpack(self.load(self.qvalue, tile), p.format)
    gradient = self.load(self.gradient, tile)
    moments: list[Any] = []
    for stored, group in zip(p.step.moments, p.blocks, strict=True):
      if stored.is_read_only:
        row, ratio = (self.load(next(factors), tile) for _ in range(2))
        moments.append(Factors(row[:, :, None], ratio.reshape(1, p.width // p.per, p.per)))
      elif stored.format is None:
        moments.append(self.load(next(refs), tile))
      else:
        scale = self.spread(self.load(next(refs), tile), group)
        moments.append(Codes(self.load(next(refs), tile), scale))
    weight = Codes(code, self.spread(self.load(self.scale, tile), p.group))
    scalars = self.step_scalars()
    proposal = step_lib.propose(p.step, scalars, gradient, weight, tuple(moments))
    return _Read(scalars, proposal, self.elements(tile))

  def inside_proposal(self, read: _Read, tile: _Tile) -> jax.Array:
    """A tile's proposals; zeros beyond the matrix."""
    value, inside = self.plan.step.value(read.proposal), self.inside(tile)
    return value if inside is None else jnp.where(inside, value, np.float32(0))

  def found(self, read: _Read, tile: _Tile, groups: _Groups) -> jax.Array:
    """The largest proposals of a tile, as int32."""
    return groups.largest_bits(self.inside_proposal(read, tile))

  def write(self, out: Any, tile: _Tile, read: _Read, largest: jax.Array, unit: Any) -> None:
    """A tile's new codes, scales and momentum, after `write_others`.

    Args:
      out: references to scales, codes and moments.
      tile: where.
      read: what there is to write.
      largest: int32, with the axes of `_Groups.split`.
      unit: the scale of block scales, if there is one.
    """
    p = self.plan
    new_scale, new_qvalue, *new_moments = out
    settled = step_lib.settle(
      p.step,
      read.scalars,
      read.proposal,
      lambda k: self.bits(k, tile, read.elements),
      gpu_math.float_of(largest),
      unit,
    )
    code, scale = next(settled)  # type: ignore[misc]
    self.store(new_qvalue, tile, _pack(code, p.format))
    del code
    # The programs of a column or matrix all store the same.
    self.store_scale(new_scale, tile, scale, p.group)
    self.store_moments(new_moments, tile, p.blocks[:1], [next(settled)])

  def write_others(self, out: Any, tile: _Tile, read: _Read) -> None:
    """A tile's moments after the first: before its scale is known, so that no register waits."""
    bits = lambda k: self.bits(k, tile, read.elements)
    others = step_lib.settle_others(self.plan.step, read.proposal, bits)
    self.store_moments(out[2:], tile, self.plan.blocks, [None, *others])

  def store_moments(
    self, refs: Any, tile: _Tile, blocks: Sequence[Group], moments: Sequence[Any]
  ) -> None:
    """Writes a tile's moments. A moment that is None is left out."""
    refs = iter(refs)
    for stored, group, moment in zip(self.plan.step.moments, blocks, moments, strict=False):
      own = [next(refs) for _ in range(_arrays(stored))]
      if isinstance(moment, Codes):
        self.store_scale(own[0], tile, moment.scale, group)
        moment = moment.code.astype(jnp.uint8)
      if moment is not None:
        self.store(own[-1], tile, moment)


def _arrays(stored: Stored) -> int:
  """How many arrays of a moment a step writes."""
  return 0 if stored.is_read_only else 2 if stored.format else 1


def _unpack(stored: jax.Array, format: Format) -> jax.Array:
  """Codes of a tile from its bytes, which may have those of two rows."""
  if format.bits == 8:
    return stored
  code = stored.astype(jnp.int32)
  shape = (code.shape[0], 2, *code.shape[1:])
  halves = jnp.broadcast_to(code[:, None], shape)
  halves = halves >> (4 * jax.lax.broadcasted_iota(jnp.int32, shape, 1))
  return halves.reshape(-1, *code.shape[1:])


def _pack(code: jax.Array, format: Format) -> jax.Array:
  """The reverse of `_unpack`."""
  if format.bits == 4:
    code = (code.astype(jnp.int32) & np.int32(15)).reshape(-1, 2, *code.shape[1:])
    code = jnp.sum(code << (4 * jax.lax.broadcasted_iota(jnp.int32, code.shape, 1)), axis=1)
  return code.astype(jnp.uint8)


def _alone(program: _Program, out: Any, first: _Tile, unit: Any = None) -> None:
  """The step of a program that owns whole groups."""
  p = program.plan
  if p.turns == 1:
    read = program.read(first)
    program.write_others(out, first, read)
    largest = program.found(read, first, p.step.weight.groups)  # type: ignore[arg-type]
    program.write(out, first, read, largest, unit)
    return
  size = np.int32((p.height, p.width)[p.along])
  if p.along == 0:
    at = lambda i: first._replace(row=first.row + i * size)
  else:
    at = lambda i: first._replace(column=first.column + i * size)

  # Element by element, so that threads meet once.
  def larger(i: jax.Array, largest: jax.Array) -> jax.Array:
    proposal = program.inside_proposal(program.read(at(i)), at(i))
    return jnp.maximum(largest, gpu_math.bits_of(jnp.abs(proposal)))

  zeros = jnp.zeros((p.height, p.width // p.per, p.per), jnp.int32)
  largest = jax.lax.fori_loop(0, p.turns, larger, zeros)
  largest = p.step.weight.groups.largest_bits(gpu_math.float_of(largest))  # type: ignore[union-attr]

  def write(i: jax.Array, carry: None) -> None:
    read = program.read(at(i))
    program.write_others(out, at(i), read)
    program.write(out, at(i), read, largest, unit)

  jax.lax.fori_loop(0, p.turns, write, None)


def _number(n: int) -> jax.Array:
  """An index as atomic operations take it."""
  return jnp.full((), n, jnp.int32)


def _split(x: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
  return jax.lax.div(x, np.int32(n)), jax.lax.rem(x, np.int32(n))


def _tile(plan: _Plan, number: jax.Array) -> _Tile:
  """The first tile of a program; neighbours in a row of the matrix come together."""
  down, across = plan.tiles
  rest, column = _split(number, across)
  matrix, row = _split(rest, down)
  high = plan.height * (plan.turns if plan.along == 0 else 1)
  wide = plan.width * (plan.turns if plan.along == 1 else 1)
  return _Tile(matrix, row * np.int32(high), column * np.int32(wide))


def _largest_of(program: _Program, found: Any, tile: _Tile) -> jax.Array:
  """What other programs found for a tile: columns of `found`, or its one number for a matrix."""
  p = program.plan
  if p.group == (0, 1):
    part = found.at[tile.matrix, pl.ds(tile.column, p.width)]
    return pltriton.load(part)
  return found[tile.matrix, 0]


def _raise_found(program: _Program, found: Any, tile: _Tile) -> None:
  """Raises the largest proposals, of columns or matrices, to those of a tile."""
  p = program.plan
  groups = _groups((0, 1) if p.group[1] == 1 else (0, 0), p.height, p.width, p.per)
  largest = program.found(program.read(tile), tile, groups)
  largest = gpu_math.float_of(largest)  # Atomic operations on arrays of integers do not lower.
  if p.group == (0, 1):
    index = (tile.matrix, pl.ds(tile.column, p.width))
    pltriton.atomic_max(found, index, largest.reshape(p.width))
  else:
    largest = gpu_math.float_of(jnp.max(gpu_math.bits_of(largest)))
    pltriton.atomic_max(found, (tile.matrix, _number(0)), largest)


def _kernel(plan: _Plan, phase: Any, *refs: Any) -> None:
  """`_step`, but for one that is skipped: arrays are changed in place, and stay."""
  step, scalars = plan.step.step, refs[2]
  skip = step.skipped(step.scalars(*(scalars[k] for k in range(scalars.shape[0]))))
  run = functools.partial(_step, plan, phase, pl.program_id(0), *refs)
  if skip is None:
    run()
  else:
    pl.when(~skip)(run)


def _apart(plan: _Plan, refs: Any) -> tuple[Any, Any]:
  """References to what all kernels are given first, numbers and factors, and the others."""
  first = 3 + plan.factors
  return refs[:first], refs[first:]


def _step(plan: _Plan, phase: Any, number: jax.Array, *refs: Any) -> None:
  """A program.

  Args:
    plan: of it.
    phase: of two launches, which: "find" or "write"; else None.
    number: its own.
    *refs: as `_launch` gives them.
  """
  (integers, steps, scalars, *factors), (scale, gradient, qvalue, *rest) = _apart(plan, refs)
  count = sum(map(_arrays, plan.step.moments))
  keys = leaf_lib.kernel_keys(integers, steps, plan.place)
  program = _Program(
    plan, integers, keys, scalars, tuple(factors), scale, qvalue, gradient, tuple(rest[:count])
  )
  del rest[:count]
  out = rest[-2 - count :]
  if plan.schedule == "alone":
    _alone(program, out, _tile(plan, number))
  else:
    tile = _tile(plan, number)
    if phase == "find":
      _raise_found(program, rest[-1], tile)
      return
    largest = _largest_of(program, rest[0], tile)
    if plan.format.two_level:
      unit = matrix_scale(largest, plan.format, plan.step.how.division)
      _alone(program, out, tile, unit)
      return
    read, shape = program.read(tile), (1, 1, 1, 1, 1)
    if plan.group == (0, 1):
      shape = (1, 1, plan.width // plan.per, plan.per)  # type: ignore[assignment]
    largest = gpu_math.bits_of(largest).reshape(shape)
    program.write_others(out, tile, read)
    program.write(out, tile, read, largest, None)


def _as_bytes(x: jax.Array) -> jax.Array:
  return x if x.dtype.itemsize > 1 else jax.lax.bitcast_convert_type(x, jnp.uint8)


def _call(
  plan: _Plan,
  kernel: Any,
  programs: int,
  given: list[jax.Array],
  changed: list[jax.Array],
  new: Any,
) -> list[jax.Array]:
  """One launch.

  Args:
    plan: what for.
    kernel: of it.
    programs: how many.
    given: arrays that are only read.
    changed: arrays that are changed in place; after `given` among the operands.
    new: shapes of results that are made.

  Returns:
    The new ones and then the changed.
  """
  operands = [*given, *changed]
  call = pl.pallas_call(
    kernel,
    grid=(programs,),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*new, *changed)],
    input_output_aliases={len(given) + k: len(new) + k for k in range(len(changed))},
    compiler_params=pltriton.CompilerParams(num_warps=plan.warps, num_stages=1),
    interpret=plan.target.interpret,
    name="fused_step",
  )
  return list(call(*operands))


def run(plan: _Plan, leaf: Leaf) -> tuple[QuantizedArray, Moments]:
  """The step of a leaf as planned."""
  first, p, own = leaf_lib.numbers(leaf), plan, leaf.alone
  in_place = p.schedule == "alone" and p.turns == 1  # A program reads scales that it writes.
  # A kernel that changes scales in place, in the dtype that they are stored in, takes the scales of
  # the whole stack. Any other kernel takes the scales of the leaf alone.
  by_byte = p.format.scale_dtype.name == "float8_e8m0fnu"
  as_stored = by_byte or p.format.scale_dtype == jnp.float32
  weight = leaf.weight if in_place and as_stored else own.weight
  scale = _as_bytes(weight.scale) if by_byte else weight.float_scale()
  stack = lambda x: _as_bytes(x).reshape(math.prod(x.shape[:-2]), -1, x.shape[-1])
  split = lambda x: _as_bytes(x).reshape(math.prod(x.shape[:-2]), -1, p.columns // p.per, p.per)
  moments = []
  for x in leaf.moments:
    if isinstance(x, Factors):
      first += map(stack, x)
      continue
    moments += [stack(x.scale), split(x.qvalue)] if is_quantized(x) else [split(x)]
  scale, gradient = stack(scale), split(leaf.gradient)
  changed = [split(leaf.weight.qvalue), *moments]
  given, whole = [*first, scale, gradient], math.prod(p.tiles) * p.stack
  found = None
  launch = functools.partial(_call, p)
  if p.schedule == "alone":
    if in_place:
      kernel = functools.partial(_kernel_in_place, p, len(changed))
      *changed, scale = launch(kernel, whole, [*first, gradient], [*changed, scale], [])
    else:
      kernel = functools.partial(_kernel, p, None)
      scale, *changed = launch(kernel, whole, given, changed, [scale])
  else:
    start = jnp.zeros((p.stack, p.columns if p.group == (0, 1) else 1), jnp.float32)
    one = p._replace(turns=1)
    (found,) = launch(
      functools.partial(_kernel, one, "find"),
      math.prod(one.tiles) * p.stack,
      [*given, *changed],
      [start],
      [],
    )
    scale, *changed = launch(
      functools.partial(_kernel_writing, p, len(changed)), whole, [*given, found], changed, [scale]
    )
  skip = None if in_place else p.step.step.skipped(leaf.scalars)
  return _results(leaf, scale, changed, found, skip)


def _kernel_in_place(plan: _Plan, count: int, *refs: Any) -> None:
  """Programs that write their own scales, with their operands as `_kernel` takes them."""
  first, (gradient, *rest) = _apart(plan, refs)
  scale, arrays, new = rest[count], rest[:count], rest[count + 1 :]
  _kernel(plan, None, *first, scale, gradient, *arrays, new[-1], *new[:-1])


def _kernel_writing(plan: _Plan, count: int, *refs: Any) -> None:
  """The second of two launches, with its operands as `_kernel` takes them."""
  first, (scale, gradient, found, *rest) = _apart(plan, refs)
  _kernel(plan, "write", *first, scale, gradient, *rest[:count], found, *rest[count:])


def _results(
  leaf: Leaf,
  scale: jax.Array,
  changed: list[jax.Array],
  found: jax.Array | None,
  skip: jax.Array | None,
) -> tuple[QuantizedArray, Moments]:
  """New weight and moments from what the kernels made; `skip` as in `leaf.with_new_scales`."""
  typed = lambda x, like: leaf.placed(
    like, x if x.dtype == like.dtype else jax.lax.bitcast_convert_type(x, like.dtype)
  )
  qvalue, *arrays = changed
  qvalue = typed(qvalue, leaf.weight.qvalue)
  new = leaf_lib.with_new_scales(leaf, qvalue, scale, found, skip)
  rest = iter(arrays)
  new_moments: list[Any] = []
  for old in leaf.moments:
    if isinstance(old, Factors):
      new_moments.append(old)
    elif is_quantized(old):
      parts = typed(next(rest), old.scale), typed(next(rest), old.qvalue)
      new_moments.append(dataclasses.replace(old, scale=parts[0], qvalue=parts[1]))
    else:
      new_moments.append(typed(next(rest), old))
  return new, tuple(new_moments)


def available() -> bool:
  """Whether the kernels run on this process's GPUs, or on the abstract device of a mesh in use."""
  if jax.__version_info__ < (0, 10):
    return False
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None and device.platform == "gpu":
    return True
  try:
    devices = jax.local_devices(backend="cuda")
  except RuntimeError:
    return False
  return all(float(x.compute_capability) >= 8 for x in devices)  # Triton asks for that.


_WITHOUT_FLOAT8 = re.compile(r"\b(A100|A10|A10G|A30|A40|A16|A2|RTX A\d+|RTX 30\d\d)\b")


def target() -> gpu_math.Target:
  """This process's GPUs, or the abstract device of a mesh in use."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None and device.platform == "gpu":
    return gpu_math.Target(has_float8=not _WITHOUT_FLOAT8.search(device.device_kind))
  try:
    devices = jax.local_devices(backend="cuda")
  except RuntimeError:
    return gpu_math.Target()
  return gpu_math.Target(has_float8=all(float(x.compute_capability) >= 8.9 for x in devices))


def by_tiles(
  step: Step,
  rounding: Rounding,
  leaf: Leaf,
  target: gpu_math.Target = gpu_math.HOPPER,
  tuning: Tuning = TUNED,
) -> tuple[QuantizedArray, Moments]:
  """`step.definition` by kernels for NVIDIA GPUs, where these apply.

  Args:
    step: as in `step.definition`.
    rounding: as in `step.definition`.
    leaf: as in `step.definition`.
    target: that it is compiled for; `gpu_math.Target(interpret=True)` runs kernels in plain JAX.
    tuning: of the kernels.

  Returns:
    As `step.definition`.
  """
  own = plan(step, rounding, leaf, target, tuning)
  if own is None and leaf.in_stack:  # One layer may not be too large.
    take = lambda step, rounding, leaf: by_tiles(step, rounding, leaf, target, tuning)
    return leaf_lib.on_layers(take)(step, rounding, leaf)
  if own is None:
    return step_lib.by_layers(step, rounding, leaf)
  return run(own, leaf)


def bytes_moved(step: Step, rounding: Rounding, leaf: Leaf) -> int:
  """What the kernels load from memory and store there for a leaf (of shapes, or of arrays).

  A second read that the caches serve does not count.
  """
  own = plan(step, rounding, leaf)
  if own is None:
    raise ValueError(f"no kernel covers {leaf.weight.format} of shape {leaf.weight.shape}")
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  kept, gradient = size((leaf.weight, leaf.moments)), size(leaf.gradient)
  return (2 if own.schedule == "two launches" else 1) * (kept + gradient) + kept
