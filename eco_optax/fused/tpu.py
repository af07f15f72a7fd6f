"""The fused step as Pallas kernels for TPUs.

One program takes a panel, all rows of 128 columns of a matrix, and works through it tile by tile.
Where a scale depends on all rows a first loop over the tiles finds the largest proposals, and where
it depends on other columns too, or on rows that other devices have, a kernel before does. The
arithmetic is `step.definition`'s, by the same functions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
  tile: int  # Rows of a tile.
  heights: tuple[int, ...]  # Rows of a tile that share a scale: of the weight and each moment.
  finds: bool  # Whether a scale depends on weights outside a panel.

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
    """Whether a scale depends on other columns."""
    return self.format.granularity == "tensor" or self.format.two_level


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


def _groups(tile: int, height: int, within: tuple[int, ...] = (1,)) -> Groups:
  """The groups of a tile: so many rows of each column, or of all columns of a block."""
  return Groups((tile // height, height, _LANES), within, (1,))


def _plan(step: Step, rounding: Rounding, leaf: Leaf) -> _Plan | None:
  """None where no kernel covers the leaf, which then keeps to the definition."""
  format, m = leaf.weight.format, leaf_lib.matrices(leaf)
  # Of other widths compilers turn matrices round, to keep padding small.
  if m is None or m.columns % _LANES:
    return None
  blocks = [leaf_lib.block_rows(x) for x in leaf.moments if is_quantized(x)]
  if isinstance(format.granularity, tuple):
    if format.granularity[1] not in (1, _LANES) or format.granularity[0] % 8:
      return None
    blocks.append(format.granularity[0])
  written = [x for x in leaf.moments if not isinstance(x, Factors)]
  if is_factored := len(written) < len(leaf.moments):
    blocks.append(_LANES // 8)  # So that the factors of a tile's rows fill registers.
  tile = _tile(m.rows, format, blocks)
  if is_factored and tile and tile % _LANES:
    return None
  dtypes = [x.qvalue.dtype if is_quantized(x) else x.dtype for x in written]
  moments = 2 * sum(x.itemsize for x in dtypes)
  panel = m.rows * _LANES * (leaf.gradient.dtype.itemsize + moments + 2)
  if tile is None or 2 * panel > _vmem():
    return None
  own: tuple[int, tuple[int, ...]] = tile, (1,)
  if isinstance(format.granularity, tuple):
    height, width = format.granularity
    own = height, (1,) if width == 1 else (1, 2)
  heights = (own[0], *map(leaf_lib.block_rows, leaf.moments))
  groups = [_groups(tile, *own), *(_groups(tile, height) for height in heights[1:])]
  plan = step_lib.plan_of(step, rounding, leaf, groups)
  whole = format.granularity == "tensor" or format.two_level
  finds = whole or bool(leaf.part and leaf.part.sharing)
  return _Plan(plan, m, leaf_lib.stream(leaf), tile, heights, finds)


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


class _Panel(NamedTuple):
  """One program's blocks: references to int32, float32 and the stored arrays."""

  integers: Any  # See `leaf.operands`.
  scalars: Any
  factors: tuple[Any, ...]  # Of moments that are only read; a tile's row factors form one row.
  scale: Any
  qvalue: Any
  gradient: Any
  moments: tuple[Any, ...]  # Of each that is stored as codes, its scales and then these.

  def step_scalars(self, plan: _Plan) -> Any:
    """The optimizer's."""
    numbers = (self.scalars[k] for k in range(self.scalars.shape[0]))
    return plan.step.step.scalars(*numbers)

  def codes(self, plan: _Plan, k: int, scale: Any, qvalue: Any, i: jax.Array) -> Codes:
    """A tile of the weight, 0, or of a moment, from 1 on."""
    format = (plan.step.weight, *plan.step.moments)[k].format
    assert format is not None
    stored = qvalue[0, _rows(i, plan.tile * format.bits // 8), :]
    factor = scale[0]
    if scale.shape[1] > 1:
      factor = scale[0, _rows(i, plan.tile // plan.heights[k]), :]
    return Codes(_unpack(stored, format), factor)

  def propose(self, plan: _Plan, i: jax.Array) -> Proposal:
    """The optimizer's step on a tile."""
    moments: list[Any] = []
    refs, factors = iter(self.moments), iter(self.factors)
    for k, stored in enumerate(plan.step.moments):
      if stored.is_read_only:
        row, ratio = next(factors)[0, pl.ds(i, 1), :], next(factors)[0]
        row = jnp.broadcast_to(row, (_LANES, plan.tile)).T
        moments.append(Factors(row, ratio))
      elif stored.format is None:
        moments.append(next(refs)[0, _rows(i, plan.tile), :])
      else:
        moments.append(self.codes(plan, k + 1, next(refs), next(refs), i))
    weight = self.codes(plan, 0, self.scale, self.qvalue, i)
    gradient = self.gradient[0, _rows(i, plan.tile), :]
    return step_lib.propose(plan.step, self.step_scalars(plan), gradient, weight, tuple(moments))

  def largest_of_columns(self, plan: _Plan) -> jax.Array:
    """float32 of shape (1, 128)."""

    def find(i: jax.Array, largest: jax.Array) -> jax.Array:
      proposal = largest_magnitude(plan.step.value(self.propose(plan, i)), (0,), keepdims=True)
      # As integers, which are in the same order, with NaN above all.
      bits = (jax.lax.bitcast_convert_type(x, jnp.int32) for x in (largest, proposal))
      return jax.lax.bitcast_convert_type(jnp.maximum(*bits), jnp.float32)

    zeros = jnp.zeros((1, _LANES), jnp.float32)
    return jax.lax.fori_loop(0, plan.m.rows // plan.tile, find, zeros)


def _rows(i: jax.Array, count: int) -> Any:
  """The i-th so many rows."""
  return pl.ds(i * count, count)


def _apart(plan: _Plan, refs: Any) -> tuple[tuple[Any, Any, tuple[Any, ...]], Any]:
  """References to what both kernels are given first, numbers and factors, and the others."""
  integers, scalars, *rest = refs
  return (integers, scalars, tuple(rest[: plan.factors])), rest[plan.factors :]


def _find(plan: _Plan, *refs: Any) -> None:
  """Kernel: the largest proposal of each column."""
  first, (scale, qvalue, gradient, *moments, out) = _apart(plan, refs)
  panel = _Panel(*first, scale, qvalue, gradient, tuple(moments))
  out[0] = panel.largest_of_columns(plan)


def _update(plan: _Plan, *refs: Any) -> None:
  """Kernel: the whole step."""
  first, (found, scale, qvalue, gradient, *rest) = _apart(plan, refs)
  count = (len(rest) - 2) // 2  # Of the arrays that moments are stored in.
  panel = _Panel(*first, scale, qvalue, gradient, tuple(rest[:count]))
  new_scale, new_qvalue, *new_moments = rest[count:]
  format = plan.format
  matrix, column = pl.program_id(0), pl.program_id(1) * _LANES
  largest = unit = None
  if plan.finds:
    largest = found[0, :, :1] if plan.whole else found[0]
    if format.two_level:
      unit, largest = matrix_scale(largest, format), None
  elif format.granularity == "channel":
    largest = panel.largest_of_columns(plan)

  def write(i: jax.Array, carry: None) -> None:
    proposal = panel.propose(plan, i)
    shape = proposal.weight.shape
    bits = lambda k: leaf_lib.kernel_bits(
      panel.integers, plan.place, k, matrix, i * plan.tile, column, shape
    )
    scalars = panel.step_scalars(plan)
    weight, *moments = step_lib.settle(plan.step, scalars, proposal, bits, largest, unit)
    assert isinstance(weight, Codes)
    is_blocked = isinstance(format.granularity, tuple)
    rows = _rows(i, plan.tile // plan.heights[0]) if is_blocked else slice(None)
    new_scale[0, rows, :] = jnp.broadcast_to(weight.scale, (weight.scale.shape[0], _LANES))
    packed = _pack(weight.code, format)
    new_qvalue[0, _rows(i, packed.shape[0]), :] = packed
    refs = iter(new_moments)
    for stored, moment in zip(plan.step.moments, moments, strict=True):
      for array in step_lib.arrays(stored, moment, _pack):
        next(refs)[0, _rows(i, array.shape[0]), :] = array

  jax.lax.fori_loop(0, plan.m.rows // plan.tile, write, None)
  if (skip := plan.step.step.skipped(panel.step_scalars(plan))) is not None:

    @pl.when(skip)
    def _() -> None:
      for new, old in zip(rest[count:], (scale, qvalue, *panel.moments), strict=True):
        new[...] = old[...]


def _block(x: Any, is_whole: bool = False) -> pl.BlockSpec:
  """The part of an array that one program has: a panel, or all of a matrix."""
  if is_whole:
    return pl.BlockSpec((1, *x.shape[1:]), lambda i, j: (i, 0, 0))
  return pl.BlockSpec((1, x.shape[1], _LANES), lambda i, j: (i, 0, j))


def _grid(plan: _Plan) -> tuple[int, int]:
  return plan.m.stack, plan.m.columns // _LANES


def _moved(arrays: list[Any]) -> int:
  """Bytes that the programs load and store: every array once."""
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def _call(
  kernel: Callable[..., None],
  plan: _Plan,
  scalars: list[jax.Array],
  factors: list[jax.Array],
  operands: list[jax.Array],
  results: list[jax.ShapeDtypeStruct],
  in_place: dict[int, int],
  interpret: bool,
) -> list[jax.Array]:
  """Runs a kernel on all panels."""
  return pl.pallas_call(
    functools.partial(kernel, plan),
    grid=_grid(plan),
    in_specs=[
      *[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(scalars),
      *(_block(x, is_whole=k % 2 == 0) for k, x in enumerate(factors)),
      *(_block(x) for x in operands),
    ],
    out_specs=[_block(x) for x in results],
    out_shape=results,
    input_output_aliases=in_place,
    # Arithmetic is not what a step waits for.
    cost_estimate=pl.CostEstimate(
      flops=0, transcendentals=0, bytes_accessed=_moved([*factors, *operands, *results])
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_vmem() + 2**24
    ),
    interpret=interpret,
  )(*scalars, *factors, *operands)


def _operands(plan: _Plan, leaf: Leaf) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
  """A kernel's scalars, factors of moments, and the leaf's other arrays as stacks of matrices."""
  integers, scalars, (scale, *arrays) = leaf_lib.operands(leaf)
  stack = lambda x: x.reshape(plan.m.stack, -1, x.shape[-1])
  # Scales are few: one of each column for each of their rows.
  scale = jnp.repeat(stack(scale), plan.m.columns // scale.shape[-1], axis=-1)
  factors = []
  for x in leaf.moments:
    if isinstance(x, Factors):
      # Of each tile in one row: a column of numbers would fill a register for eight of them.
      factors += [x.row.reshape(plan.m.stack, -1, plan.tile), stack(x.ratio)]
  return [integers, scalars], factors, [scale, *map(stack, arrays)]


def _shapes(plan: _Plan, operands: list[jax.Array]) -> tuple[Any, list[Any]]:
  """Shapes of columns' largest proposals, and of the step's results."""
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  scale, qvalue, _, *moments = operands
  columns = jax.ShapeDtypeStruct((plan.m.stack, 1, plan.m.columns), jnp.float32)
  return columns, [shape(x) for x in (scale, qvalue, *moments)]


def bytes_moved(step: Step, rounding: Rounding, leaf: Leaf) -> int:
  """What the kernels load and store for a leaf (of shapes, or of arrays).

  Returns:
    Bytes.
  """
  plan = _plan(step, rounding, leaf)
  if plan is None:
    raise ValueError(f"no kernel covers {leaf.weight.format} of shape {leaf.weight.shape}")
  _, factors, operands = jax.eval_shape(functools.partial(_operands, plan), leaf)
  columns, results = _shapes(plan, operands)
  read = [columns, *factors, *operands]
  return _moved([*read, *results]) + (_moved(read) if plan.finds else 0)


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
    return step_lib.by_layers(step, rounding, leaf)
  scalars, factors, operands = _operands(plan, leaf)
  columns, results = _shapes(plan, operands)
  largest = jnp.zeros(columns.shape, jnp.float32)
  if plan.finds:
    (found,) = _call(_find, plan, scalars, factors, operands, [columns], {}, interpret)
    largest = jnp.broadcast_to(leaf_lib.largest_proposal(leaf, found), largest.shape)
  begin = 3 + plan.factors  # Of scale, codes, gradient and moments.
  in_place = {0: 0, 1: 1} | {3 + k: 2 + k for k in range(len(results) - 2)}
  in_place = {begin + k: to for k, to in in_place.items()}
  scale, qvalue, *moments = _call(
    _update, plan, scalars, factors, [largest, *operands], results, in_place, interpret
  )
  scale = scale[..., :: plan.m.columns // leaf.weight.scale.shape[-1]]
  new, new_moments = leaf_lib.results(leaf, scale, qvalue, moments, largest[..., :1])
  if (skip := step.skipped(leaf.scalars)) is not None:
    new = leaf_lib.with_old_scales(skip, new, leaf.weight)
  return new, new_moments
