"""The fused update as Pallas kernels for NVIDIA GPUs, by way of Triton.

One program takes a tile of a matrix, or the tiles of a block that shares a scale. Where a scale
depends on a whole column or matrix, launches go chunk by chunk: each takes the step of one chunk
and finds the largest proposals of the next, so that the second reading is from the L2 cache if a
chunk fits there, which whole matrices do not. The arithmetic is that of `step.definition`,
by the same functions; scales and codes are divided as IEEE asks.

No GPU has run these kernels yet. They compile for compute capabilities 8.0, 8.9, 9.0, 10.0 and 12.0
with JAX 0.10.2 and for 9.0 with 0.12.0, in place and without copies; where JAX's CUDA plugin is
installed the tests compile them for an H100, run its instructions one by one, and find the codes
and moments of the definition. So they are used where a process has GPUs from 8.0 on, and JAX 0.10
or later. Elsewhere, and in programs that are lowered where no GPU is, unless for an abstract one,
the definition is, which holds 5 to 9 bytes of temporaries per weight. JAX means to remove its
Triton backend; without it the definition stays.
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
from jax.experimental.pallas import triton as pltriton

from eco_optax.formats import Format
from eco_optax.fused import leaf as leaf_lib
from eco_optax.fused import step as step_lib
from eco_optax.fused.leaf import Leaf
from eco_optax.fused.step import Moments, Proposal, Step
from eco_optax.quantized_array import (
  IEEE,
  Division,
  Groups,
  QuantizedArray,
  Rounding,
  is_quantized,
  largest_magnitude,
  matrix_scale,
  times_scale,
)
from eco_optax.transforms.stored_moments import Codes

_TILE = 32  # Rows of a tile: a block of moments, and of most block formats.
_WIDTHS = (64, 32)  # Columns of a tile: the most that divide a matrix's, or those of a block.
_PER_THREAD = 8  # Elements of a tile: few enough for the registers of several programs.
_REREAD = 2**24  # Bytes that stay in the L2 cache until they are read again; it has 40 MB or more.


class _Plan(NamedTuple):
  """What a kernel is made for."""

  step: step_lib.Plan
  m: leaf_lib.Matrices
  place: leaf_lib.Stream
  width: int  # Columns of a tile.
  rows: int  # Of a program: those of a tile, or of a block that is higher.
  chunk: tuple[int, int]  # Matrices, and tiles side by side in each, that one launch takes.

  @property
  def format(self) -> Format:
    """Of the weight."""
    assert self.step.weight.format is not None
    return self.step.weight.format

  @property
  def finds(self) -> bool:
    """Whether a scale depends on what other programs read."""
    return isinstance(self.format.granularity, str) or self.format.two_level

  @property
  def chunks(self) -> tuple[int, int]:
    """Of a stack, and of a matrix's columns."""
    return self.m.stack // self.chunk[0], self.m.columns // (self.width * self.chunk[1])


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


def _divide(x: jax.Array, divisor: Any) -> jax.Array:
  """`quantized_array.divide` in a kernel, where `/` may be two last places off."""
  # The instruction takes arrays, of one shape, that were computed.
  divisor = jnp.where(jnp.isnan(x), np.float32(1), divisor)
  shape = x.shape or (1,)
  (quotient,) = pltriton.elementwise_inline_asm(
    "div.rn.f32 $0, $1, $2;",
    args=[x.reshape(shape), divisor.reshape(shape)],
    constraints="=f,f,f",
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
  )
  return quotient.reshape(x.shape)


def _dividing(divide: Callable[[jax.Array, Any], jax.Array]) -> Division:
  """Division by scales in fewer instructions where that is exact."""

  def by_scale(x: jax.Array, scale: jax.Array, format: Format) -> jax.Array:
    if not format.power_of_two:
      return divide(x, scale)
    raw = jax.lax.bitcast_convert_type(scale, jnp.int32)
    inverse = jax.lax.bitcast_convert_type(np.int32(254 << 23) - raw, jnp.float32)
    return times_scale(x, jnp.where(jnp.isnan(scale), scale, inverse))

  return Division(divide, by_scale)


class _Block(Groups):
  """A tile within one block of several columns, with a scalar for its scale.

  A program has a scalar once; Triton would spread an array of one element over threads.
  """

  def largest(self, x: jax.Array) -> jax.Array:
    """A float32 scalar."""
    of_columns = largest_magnitude(x.reshape(self.split), (1,), keepdims=True)
    return largest_magnitude(of_columns, (0, 1, 2), keepdims=False)

  def spread(self, scale: jax.Array) -> jax.Array:
    """The scalar itself."""
    return scale if scale.ndim == 0 else super().spread(scale)


def _fitting(count: int, most: float) -> int:
  """The largest divisor of a count that is not above a limit; 1 if there is none."""
  return max((n for n in range(1, count + 1) if count % n == 0 and n <= most), default=1)


def _plan(step: Step, rounding: Rounding, leaf: Leaf, interpret: bool = False) -> _Plan | None:
  """None where no kernel covers the leaf, which then keeps to the definition."""
  format, m = leaf.weight.format, leaf_lib.matrices(leaf)
  if m is None or leaf.weight.size >= 2**31:  # Places are computed in 32 bits.
    return None
  if leaf.part and leaf.part.sharing:  # Between two launches devices would have to meet.
    return None
  heights = [leaf_lib.block_rows(x) for x in leaf.moments]
  height, rows = _TILE, _TILE
  widths: tuple[int, ...] = _WIDTHS
  is_wide = False
  if isinstance(format.granularity, tuple):
    height, wide = format.granularity
    is_wide = wide > 1
    rows = max(height, _TILE)
    widths = tuple({wide} & {32, 64, 128}) if is_wide else widths
    if _TILE % height and height % _TILE:
      return None
  width = next((n for n in widths if m.columns % n == 0), None)
  if width is None or m.rows % rows or any(_TILE % x for x in heights):
    return None
  panels = m.columns // width
  dtypes = [x.qvalue.dtype if is_quantized(x) else x.dtype for x in leaf.moments]
  read = leaf.gradient.dtype.itemsize + format.bits / 8 + sum(x.itemsize for x in dtypes)
  matrices = _REREAD / (m.rows * m.columns * read)
  chunk = m.stack, panels
  if format.granularity == "tensor" or format.two_level:
    chunk = _fitting(m.stack, matrices), panels
  elif format.granularity == "channel":
    chunk = _fitting(m.stack, matrices), _fitting(panels, panels * matrices)

  def groups(height: int) -> Groups:
    return Groups((_TILE // height, height, width), (1,), (1,))

  own = groups(min(height, _TILE))
  own = _Block(*own) if is_wide else own
  dividing = _dividing(IEEE.divide if interpret else _divide)
  plan = step_lib.plan_of(step, rounding, leaf, [own, *map(groups, heights)], dividing)
  return _Plan(plan, m, leaf_lib.stream(leaf), width, rows, chunk)


def applies(leaf: Leaf) -> bool:
  """Whether a kernel covers a leaf: its format and moments, and a shape of whole tiles."""
  return _plan(None, "nearest", leaf) is not None  # type: ignore[arg-type]


def _unpack(stored: jax.Array, format: Format) -> jax.Array:
  """int32 codes of a tile from its bytes, of which one may have those of two rows."""
  code = stored.astype(jnp.int32)
  if format.bits == 8:
    return code
  halves = jnp.broadcast_to(code[:, None, :], (code.shape[0], 2, code.shape[1]))
  return (halves >> _shift(halves.shape)).reshape(-1, code.shape[1])


def _pack(code: jax.Array, format: Format) -> jax.Array:
  """The reverse of `_unpack`."""
  if format.bits == 4:
    halves = (code & np.int32(15)).reshape(-1, 2, code.shape[1])
    code = jnp.sum(halves << _shift(halves.shape), axis=1)
  return (code & np.int32(255)).astype(jnp.uint8)


def _shift(shape: tuple[int, ...]) -> jax.Array:
  """By how many bits the codes of even and of odd rows are shifted in their byte."""
  return 4 * jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
  """The larger of magnitudes, as integers, which are in the same order, with NaN above all."""
  bits = (jax.lax.bitcast_convert_type(x, jnp.int32) for x in (a, b))
  return jax.lax.bitcast_convert_type(jnp.maximum(*bits), jnp.float32)


class _Tile(NamedTuple):
  """Where a tile is."""

  matrix: jax.Array
  row: jax.Array  # The first.
  column: jax.Array  # The first.


class _Program(NamedTuple):
  """A plan and the references that its programs have."""

  plan: _Plan
  integers: Any  # See `leaf.operands`.
  scalars: Any
  scale: Any
  qvalue: Any
  gradient: Any
  moments: tuple[Any, ...]  # Of each that is stored as codes, its scales and then these.

  def part(self, ref: Any, tile: _Tile) -> tuple[Any, ...]:
    """The index of a tile's part of an array, each element of which may stand for several."""
    m = self.plan.m
    high, wide = m.rows // ref.shape[1], m.columns // ref.shape[2]
    rows = pl.ds(jax.lax.div(tile.row, np.int32(high)), max(_TILE // high, 1))
    columns = pl.ds(jax.lax.div(tile.column, np.int32(wide)), max(self.plan.width // wide, 1))
    return tile.matrix, rows, columns

  def bits(self, k: int, tile: _Tile) -> jax.Array:
    """Random bits of the weight, 0, or of a moment, from 1 on."""
    shape = _TILE, self.plan.width
    return leaf_lib.kernel_bits(self.integers, self.plan.place, k, *tile, shape)

  def step_scalars(self) -> Any:
    """The optimizer's."""
    numbers = (self.scalars[k] for k in range(self.scalars.shape[0]))
    return self.plan.step.step.scalars(*numbers)

  def codes(self, scale: Any, qvalue: Any, format: Format, tile: _Tile) -> Codes:
    """A tile of the weight or of a moment."""
    stored = qvalue[self.part(qvalue, tile)]
    return Codes(_unpack(stored, format), scale[self.part(scale, tile)])

  def propose(self, tile: _Tile) -> Proposal:
    """The optimizer's step on a tile."""
    plan = self.plan.step
    moments: list[Any] = []
    refs = iter(self.moments)
    for stored in plan.moments:
      if stored.format is None:
        ref = next(refs)
        moments.append(ref[self.part(ref, tile)])
      else:
        moments.append(self.codes(next(refs), next(refs), stored.format, tile))
    weight = self.codes(self.scale, self.qvalue, self.plan.format, tile)
    gradient = self.gradient[self.part(self.gradient, tile)]
    return step_lib.propose(plan, self.step_scalars(), gradient, weight, tuple(moments))


def _find(program: _Program, found: Any, tile: _Tile) -> None:
  """Kernel: raises the largest proposals, of columns or matrices, to those of a tile."""
  largest = largest_magnitude(program.propose(tile).value, (0,), keepdims=True)
  if found.shape[2] == 1:
    largest = largest_magnitude(largest, (1,), keepdims=True)
  pltriton.atomic_max(found, program.part(found, tile), largest)


def _update(program: _Program, found: Any, out: Any, first: _Tile) -> None:
  """Kernel: the whole step of a program's tiles."""
  plan, format, groups = program.plan, program.plan.format, program.plan.step.weight.groups
  assert groups is not None
  new_scale, new_qvalue, *new_moments = out
  at = lambda i: first._replace(row=first.row + i * np.int32(_TILE))
  largest = unit = None
  if plan.finds:
    largest = found[program.part(found, first)]
    if format.two_level:
      unit, largest = matrix_scale(largest, format, plan.step.division), None

  def proposals(i: jax.Array, largest: jax.Array) -> jax.Array:
    return _larger(largest, groups.largest(program.propose(at(i)).value))

  def write(i: jax.Array, carry: None) -> None:
    tile = at(i)
    proposal = program.propose(tile)
    bits = lambda k: program.bits(k, tile)
    scalars = program.step_scalars()
    code, scale, moments = step_lib.settle(plan.step, scalars, proposal, bits, largest, unit)
    # The programs of a column or matrix all store the same.
    _, rows, columns = at_scale = program.part(new_scale, tile)
    new_scale[at_scale] = jnp.broadcast_to(scale, (rows.size, columns.size))
    new_qvalue[program.part(new_qvalue, tile)] = _pack(code, format)
    refs = iter(new_moments)
    for stored, moment in zip(plan.step.moments, moments, strict=True):
      for array in step_lib.arrays(stored, moment, _pack):
        ref = next(refs)
        ref[program.part(ref, tile)] = array

  count = plan.rows // _TILE
  if count == 1:
    write(jnp.zeros([], jnp.int32), None)
    return
  is_wide = isinstance(groups, _Block)
  zero = jnp.zeros(() if is_wide else (1, plan.width), jnp.float32)
  largest = jax.lax.fori_loop(0, count, proposals, zero)
  jax.lax.fori_loop(0, count, write, None)


def _place(plan: _Plan, chunk: jax.Array, program: jax.Array) -> _Tile:
  """The first tile of a program of a chunk: neighbours in a row of the matrix come together."""
  matrices, panels = plan.chunk
  split = lambda x, n: (jax.lax.div(x, np.int32(n)), jax.lax.rem(x, np.int32(n)))
  stack, across = split(chunk, plan.chunks[1])
  rest, panel = split(program, panels)
  matrix, row = split(rest, plan.m.rows // plan.rows)
  return _Tile(
    stack * np.int32(matrices) + matrix,
    row * np.int32(plan.rows),
    (across * np.int32(panels) + panel) * np.int32(plan.width),
  )


def _kernel(plan: _Plan, *refs: Any) -> None:
  """The step of a chunk, and the largest proposals of the next."""
  turn, integers, scalars, scale, gradient, *arrays = refs
  count = sum(2 if stored.format else 1 for stored in plan.step.moments)
  qvalue, *moments = arrays[: 1 + count]
  out = arrays[-2 - count :]  # Scales, codes, moments.
  program = _Program(plan, integers, scalars, scale, qvalue, gradient, tuple(moments))
  number, i = pl.program_id(1), turn[0]
  if not plan.finds:
    _update(program, None, out, _place(plan, i, number))
    return
  found = arrays[-3 - count]
  looks = pl.program_id(0) == 1

  @pl.when(jnp.logical_and(looks, i < math.prod(plan.chunks)))
  def _() -> None:
    _find(program, found, _place(plan, i, number))

  @pl.when(jnp.logical_and(jnp.logical_not(looks), i > 0))
  def _() -> None:
    _update(program, found, out, _place(plan, i - 1, number))


def _launch(
  plan: _Plan, interpret: bool, turn: jax.Array, given: list[jax.Array], changed: list[jax.Array]
) -> list[jax.Array]:
  """One launch on a chunk.

  Args:
    plan: what for.
    interpret: whether to run in plain JAX.
    turn: the number of the launch.
    given: what is only read.
    changed: codes and moments; where scales depend on other programs, before them the largest
      proposals that were found, and the new scales.

  Returns:
    `changed`, in place; with new scales.
  """
  found_and_scale, arrays = changed[: 2 * plan.finds], changed[2 * plan.finds :]
  operands = [turn[None], *given, *arrays, *found_and_scale]
  first = 1 + len(given)
  in_place = {first + k: k + 1 + plan.finds for k in range(len(arrays))}
  if plan.finds:
    in_place |= {first + len(arrays) + k: k for k in range(2)}
  results = [*(found_and_scale or [given[2]]), *arrays]
  programs = plan.chunk[0] * plan.chunk[1] * (plan.m.rows // plan.rows)
  call = pl.pallas_call(
    functools.partial(_kernel, plan),
    grid=(1 + plan.finds, programs),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
    input_output_aliases=in_place,
    compiler_params=pltriton.CompilerParams(
      num_warps=max(_TILE * plan.width // (32 * _PER_THREAD), 1), num_stages=1
    ),
    interpret=interpret,
    name="fused_step",
  )
  return list(call(*operands))


def _as_bytes(x: jax.Array) -> jax.Array:
  return x if x.dtype.itemsize > 1 else jax.lax.bitcast_convert_type(x, jnp.uint8)


def bytes_moved(step: Step, rounding: Rounding, leaf: Leaf) -> int:
  """What the kernels load from memory and store there for a leaf (of shapes, or of arrays).

  What a chunk that fits in the L2 cache is read from there a second time does not count.

  Returns:
    Bytes.
  """
  plan = _plan(step, rounding, leaf)
  if plan is None:
    raise ValueError(f"no kernel covers {leaf.weight.format} of shape {leaf.weight.shape}")
  _, _, (scale, qvalue, gradient, *moments) = jax.eval_shape(leaf_lib.operands, leaf)
  size = lambda *arrays: sum(x.size * x.dtype.itemsize for x in arrays)
  written = size(scale, qvalue, *moments)
  read = size(gradient) + written
  again = plan.finds and read / math.prod(plan.chunks) > 1.01 * _REREAD  # Scales are few.
  return read * (1 + again) + written


def by_tiles(
  step: Step, rounding: Rounding, leaf: Leaf, interpret: bool = False
) -> tuple[QuantizedArray, Moments]:
  """`step.definition` by kernels for NVIDIA GPUs, where these apply.

  Args:
    step: as in `step.definition`.
    rounding: as in `step.definition`.
    leaf: as in `step.definition`.
    interpret: whether to run the kernels in plain JAX, on any device.

  Returns:
    As `step.definition`.
  """
  plan = _plan(step, rounding, leaf, interpret)
  if plan is None:
    return step_lib.by_layers(step, rounding, leaf)
  found = None
  integers, scalars, (scale, qvalue, gradient, *moments) = leaf_lib.operands(leaf)
  stack = lambda x: _as_bytes(x).reshape(plan.m.stack, -1, x.shape[-1])
  given = [integers, scalars, stack(scale), stack(gradient)]
  changed = [stack(x) for x in (qvalue, *moments)]
  launch = functools.partial(_launch, plan, interpret)
  if plan.finds:
    # Of columns if these have scales of their own, and of matrices.
    columns = plan.m.columns if plan.format.granularity == "channel" else 1
    found = jnp.zeros((plan.m.stack, 1, columns), jnp.float32)
    changed = [found, jnp.zeros_like(given[2]), *changed]
    turns = math.prod(plan.chunks) + 1
    found, *changed = jax.lax.fori_loop(0, turns, lambda i, x: launch(i, given, x), changed)
  else:
    changed = launch(jnp.zeros([], jnp.int32), given, changed)

  scale, qvalue, *moments = changed
  return leaf_lib.results(leaf, scale, qvalue, moments, found)
