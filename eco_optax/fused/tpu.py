"""The fused update as Pallas kernels for TPUs, which read and write every array once.

One program takes a panel, all rows of 128 columns of a matrix, and works through it tile by tile.
Where a scale depends on all rows a first loop over the tiles finds the largest proposals, and where
it depends on other columns too, or on rows that other devices have, a kernel before does. The
arithmetic is that of `fused_update.definition`, by the same functions.
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

from eco_optax import rounding as rounding_lib
from eco_optax.formats import Format
from eco_optax.fused import fused_update as fused
from eco_optax.fused import tiles
from eco_optax.fused.steps import Moments, Step
from eco_optax.quantized_array import (
  QuantizedArray,
  Rounding,
  divide,
  group_scale,
  largest_magnitude,
  matrix_scale,
  times_scale,
)
from eco_optax.transforms.quantize_params import add_update

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

  step: Step
  rounding: Rounding
  format: Format
  moments: tuple[tiles.Stored, ...]
  m: fused.Matrices
  place: tiles.Place
  tile: int  # Rows of a tile.
  height: int  # Rows of a tile that share a scale.
  finds: bool  # Whether a scale depends on what a panel has not.

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


def _plan(step: Step, rounding: Rounding, leaf: fused.Leaf) -> _Plan | None:
  """None where no kernel covers the leaf, which then keeps to the definition."""
  format, m = leaf.weight.format, fused.matrices(leaf)
  # Of other widths compilers turn matrices round, to keep padding small.
  if m is None or m.columns % _LANES:
    return None
  kinds = tiles.kinds(leaf)
  heights = [x.height for x in kinds if x.format]
  if isinstance(format.granularity, tuple):
    if format.granularity[1] not in (1, _LANES) or format.granularity[0] % 8:
      return None
    heights.append(format.granularity[0])
  tile = _tile(m.rows, format, heights)
  moments = 2 * sum(x.dtype.itemsize for x in kinds)
  panel = m.rows * _LANES * (leaf.gradient.dtype.itemsize + moments + 2)
  if tile is None or 2 * panel > _vmem():
    return None
  height = format.granularity[0] if isinstance(format.granularity, tuple) else tile
  place = tiles.place(leaf, m.stack)
  plan = _Plan(step, rounding, format, kinds, m, place, tile, height, False)
  return plan._replace(finds=plan.whole or bool(leaf.part and leaf.part.sharing))


def applies(leaf: fused.Leaf) -> bool:
  """Whether a kernel covers a leaf: its format and moments, and a shape of whole tiles."""
  return _plan(None, "nearest", leaf) is not None  # type: ignore[arg-type]


def _unpack(stored: jax.Array, format: Format) -> jax.Array:
  """int32 codes from what is stored: two to a byte if they have four bits."""
  return pltpu.bitcast(stored, jnp.int4 if format.bits == 4 else jnp.int8).astype(jnp.int32)


def _pack(code: jax.Array, format: Format) -> jax.Array:
  """The reverse of `_unpack`."""
  if format.bits == 4:
    return pltpu.bitcast(code.astype(jnp.int4), jnp.uint8)
  return pltpu.bitcast(code.astype(jnp.int8), format.dtype)


class _Panel(NamedTuple):
  """One program's blocks: references to int32, float32 and the stored arrays."""

  integers: Any  # See `tiles.operands`.
  scalars: Any
  largest: Any  # Of each column's group, where `plan.finds`.
  scale: Any
  qvalue: Any
  gradient: Any
  moments: tuple[Any, ...]  # Of each that is stored as codes, its scales and then these.

  def read_moments(self, plan: _Plan, rows: Any, i: jax.Array) -> Moments:
    """The moments of a tile."""
    values, refs = [], iter(self.moments)
    for kind in plan.moments:
      if kind.format is None:
        values.append(next(refs)[0, rows, :].astype(jnp.float32))
        continue
      scale, qvalue = next(refs), next(refs)
      code = _unpack(qvalue[0, rows, :], kind.format)
      values.append(tiles.read_moment(kind, code, scale[0, _groups(plan, i, kind.height), :]))
    return tuple(values)

  def read(self, plan: _Plan, i: jax.Array) -> tuple[jax.Array, jax.Array, Moments]:
    """θ̂, update and new moments of a tile."""
    rows = pl.ds(i * plan.tile, plan.tile)
    per_byte = 8 // plan.format.bits
    stored = self.qvalue[0, pl.ds(i * (plan.tile // per_byte), plan.tile // per_byte), :]
    value = rounding_lib.decode(_unpack(stored, plan.format), plan.format.dtype)
    scale = self.scale[0]
    if self.scale.shape[1] > 1:
      scale = self.scale[0, _groups(plan, i, plan.height), :]
    weight = times_scale(_grouped(plan, value), scale[:, None, :]).reshape(value.shape)
    s = plan.step.scalars(*(self.scalars[k] for k in range(self.scalars.shape[0])))
    moments = self.read_moments(plan, rows, i)
    return weight, *plan.step.propose(s, self.gradient[0, rows, :], moments, weight)

  def largest_of_columns(self, plan: _Plan) -> jax.Array:
    """float32 of shape (1, 128)."""

    def find(i: jax.Array, largest: jax.Array) -> jax.Array:
      weight, update, _ = self.read(plan, i)
      proposal = largest_magnitude(add_update(weight, update), (0,), keepdims=True)
      # As integers, which are in the same order, with NaN above all.
      bits = (jax.lax.bitcast_convert_type(x, jnp.int32) for x in (largest, proposal))
      return jax.lax.bitcast_convert_type(jnp.maximum(*bits), jnp.float32)

    zeros = jnp.zeros((1, _LANES), jnp.float32)
    return jax.lax.fori_loop(0, plan.m.rows // plan.tile, find, zeros)


def _groups(plan: _Plan, i: jax.Array, height: int) -> Any:
  """The rows of a tile's scales, each of which is that of so many rows."""
  count = plan.tile // height
  return pl.ds(i * count, count)


def _grouped(plan: _Plan, x: jax.Array) -> jax.Array:
  return x.reshape(-1, plan.height, _LANES)


def _over(x: jax.Array, scale: jax.Array, format: Format) -> jax.Array:
  del format
  return divide(x, scale)


def _find(plan: _Plan, *refs: Any) -> None:
  """Kernel: the largest proposal of each column."""
  integers, scalars, *operands, out = refs
  scale, qvalue, gradient, *moments = operands
  panel = _Panel(integers, scalars, None, scale, qvalue, gradient, tuple(moments))
  out[0] = panel.largest_of_columns(plan)


def _update(plan: _Plan, *refs: Any) -> None:
  """Kernel: the whole step."""
  count = (len(refs) - 8) // 2  # Of the arrays that moments are stored in.
  integers, scalars, whole, scale, qvalue, gradient = refs[:6]
  panel = _Panel(integers, scalars, whole, scale, qvalue, gradient, refs[6 : 6 + count])
  new_scale, new_qvalue, *new_moments = refs[6 + count :]
  format, granularity = plan.format, plan.format.granularity
  s = plan.step.scalars(*(panel.scalars[k] for k in range(panel.scalars.shape[0])))
  matrix, column = pl.program_id(0), pl.program_id(1) * _LANES
  largest = unit = None
  if plan.finds:
    largest = panel.largest[0, :, :1] if plan.whole else panel.largest[0]
    unit = matrix_scale(largest, format) if format.two_level else None
  elif granularity == "channel":
    largest = panel.largest_of_columns(plan)

  def write(i: jax.Array, carry: None) -> None:
    weight, update, moments = panel.read(plan, i)
    proposal = _grouped(plan, add_update(weight, update))
    if isinstance(granularity, tuple):
      within = (1,) if granularity[1] == 1 else (1, 2)
      of_group = largest_magnitude(proposal, within, keepdims=True)
    else:
      of_group = largest[None]  # type: ignore[index]
    scale = group_scale(of_group, unit if unit is None else unit[None], format, plan.rounding)
    factor = scale if unit is None else times_scale(unit[None], scale)
    bits_of = lambda k: tiles.bits(
      panel.integers, plan.place, k, matrix, i * plan.tile, column, weight.shape
    )
    bits = bits_of(0) if plan.rounding == "stochastic" else None
    y = divide(proposal, factor).reshape(weight.shape)
    code = rounding_lib.code_bits(y, format.dtype, bits)
    value = _grouped(plan, rounding_lib.decode(code, format.dtype))
    stored = times_scale(value, factor).reshape(weight.shape)
    moments = fused.injected(plan.step, s, moments, weight, stored, update)

    rows = _groups(plan, i, plan.height) if isinstance(granularity, tuple) else slice(None)
    new_scale[0, rows, :] = jnp.broadcast_to(scale[:, 0], (scale.shape[0], _LANES))
    packed = _pack(code, format)
    new_qvalue[0, pl.ds(i * packed.shape[0], packed.shape[0]), :] = packed
    new = iter(new_moments)
    for k, (kind, moment) in enumerate(zip(plan.moments, moments, strict=True)):
      bits_of_moment = functools.partial(bits_of, k + 1)
      for array in tiles.store_moment(kind, moment, bits_of_moment, _pack, divide, _over):
        next(new)[0, pl.ds(i * array.shape[0], array.shape[0]), :] = array

  jax.lax.fori_loop(0, plan.m.rows // plan.tile, write, None)


def _block(x: Any) -> pl.BlockSpec:
  """The part of an array that one program has."""
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
      *(_block(x) for x in operands),
    ],
    out_specs=[_block(x) for x in results],
    out_shape=results,
    input_output_aliases=in_place,
    # Arithmetic is not what a step waits for.
    cost_estimate=pl.CostEstimate(
      flops=0, transcendentals=0, bytes_accessed=_moved([*operands, *results])
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_vmem() + 2**24
    ),
    interpret=interpret,
  )(*scalars, *operands)


def _operands(plan: _Plan, leaf: fused.Leaf) -> tuple[list[jax.Array], list[jax.Array]]:
  """A kernel's scalars, and the leaf's arrays as stacks of matrices."""
  integers, scalars, (scale, *arrays) = tiles.operands(leaf)
  stack = lambda x: x.reshape(plan.m.stack, -1, x.shape[-1])
  # Scales are few: one of each column for each of their rows.
  scale = jnp.repeat(stack(scale), plan.m.columns // scale.shape[-1], axis=-1)
  return [integers, scalars], [scale, *map(stack, arrays)]


def _shapes(plan: _Plan, operands: list[jax.Array]) -> tuple[Any, list[Any]]:
  """Shapes of columns' largest proposals, and of the step's results."""
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  scale, qvalue, _, *moments = operands
  columns = jax.ShapeDtypeStruct((plan.m.stack, 1, plan.m.columns), jnp.float32)
  return columns, [shape(x) for x in (scale, qvalue, *moments)]


def bytes_moved(step: Step, rounding: Rounding, leaf: fused.Leaf) -> int:
  """What the kernels load and store for a leaf (of shapes, or of arrays).

  Returns:
    Bytes.
  """
  plan = _plan(step, rounding, leaf)
  if plan is None:
    raise ValueError(f"no kernel covers {leaf.weight.format} of shape {leaf.weight.shape}")
  _, operands = jax.eval_shape(functools.partial(_operands, plan), leaf)
  columns, results = _shapes(plan, operands)
  moved = _moved([columns, *operands, *results])
  return moved + (_moved([*operands, columns]) if plan.finds else 0)


def by_panels(
  step: Step, rounding: Rounding, leaf: fused.Leaf, interpret: bool = False
) -> tuple[QuantizedArray, Moments]:
  """`fused_update.definition` by kernels for TPUs, where these apply.

  Args:
    step: as in `fused_update.definition`.
    rounding: as in `fused_update.definition`.
    leaf: as in `fused_update.definition`.
    interpret: whether to run the kernels in plain JAX, on any device.

  Returns:
    As `fused_update.definition`.
  """
  plan = _plan(step, rounding, leaf)
  if plan is None:
    return fused.by_layers(step, rounding, leaf)
  scalars, operands = _operands(plan, leaf)
  columns, results = _shapes(plan, operands)
  largest = jnp.zeros(columns.shape, jnp.float32)
  if plan.finds:
    (found,) = _call(_find, plan, scalars, operands, [columns], {}, interpret)
    largest = jnp.broadcast_to(fused.largest_proposal(leaf, found), largest.shape)
  in_place = {3: 0, 4: 1} | {6 + k: 2 + k for k in range(len(results) - 2)}
  scale, qvalue, *moments = _call(
    _update, plan, scalars, [largest, *operands], results, in_place, interpret
  )
  scale = scale[..., :: plan.m.columns // leaf.weight.scale.shape[-1]]
  return tiles.results(leaf, scale, qvalue, moments, largest[..., :1])
