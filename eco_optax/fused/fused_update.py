"""One leaf's whole ECO step: optimizer, rounding, error and injection, fused.

`definition` says what is computed, in plain `jnp`. A device by itself runs it as a kernel that
touches memory as little as that device allows; where no kernel fits, and in programs of several
devices that were not told their parts of the leaf (see `parts`), it stands as it is, a stack layer
by layer, for XLA to partition. Which of them is a matter of lowering: a traced program serves every
platform.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from eco_optax import rounding as rounding_lib
from eco_optax.formats import Format
from eco_optax.fused.steps import Moments, Step
from eco_optax.quantized_array import (
  QuantizedArray,
  Rounding,
  is_quantized,
  largest_magnitude,
  pack,
  scaled,
)
from eco_optax.transforms import stacks, stored_moments
from eco_optax.transforms.quantize_params import add_update
from eco_optax.transforms.stored_moments import SecondMoment


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["first"],
  meta_fields=["shape", "sharing"],
)
@dataclasses.dataclass(frozen=True)
class Part:
  """Where in a leaf the part lies that a device has."""

  first: tuple[jax.Array, ...]  # int32: index of its first element, on each axis of the leaf.
  shape: tuple[int, ...]  # Of the whole leaf.
  sharing: tuple[str, ...]  # Mesh axes along which parts have weights of one scale.


class Leaf(NamedTuple):
  """Operands of one leaf's step."""

  scalars: Any  # Of the step, float32.
  key: jax.Array  # Of the random bits, see `rounding.stream_key`.
  layer: jax.Array | None  # Where the leaf is one layer of a stack: its index.
  weight: QuantizedArray
  gradient: jax.Array
  moments: tuple[Any, ...]  # The momentum first; as they are stored, see `fits`.
  moment_keys: tuple[jax.Array, ...] = ()  # Of their random bits, where any is stored in few.
  part: Part | None = None  # Where the arrays are one device's part of the leaf.


def fits(moment: Any, rounds: bool) -> bool:
  """Whether a step takes a moment as it is stored; in few bits only if it `rounds` what it writes.

  Those are float32, bfloat16, and codes in blocks of rows or columns.
  """
  if is_quantized(moment):
    granularity = moment.format.granularity
    return rounds and isinstance(granularity, tuple) and len(granularity) == 2
  return moment.dtype == jnp.float32 or (rounds and moment.dtype == jnp.bfloat16)


class Rounded(NamedTuple):
  """Proposals on the grid."""

  code: jax.Array  # int32, see `rounding.code_bits`.
  holder: QuantizedArray  # Their scales.
  stored: jax.Array  # The float32 values that will be read back.


def put_on_grid(
  proposal: jax.Array,
  format: Format,
  rounding: Rounding,
  bits: jax.Array | None,
  largest: jax.Array | None = None,
) -> Rounded:
  """Rounds proposals θ̃; arguments as in `quantized_array.scaled` and `rounding.code_bits`."""
  holder, y = scaled(proposal, format, rounding, largest)
  code = rounding_lib.code_bits(y, format.dtype, bits)
  return Rounded(code, holder, holder.apply_scale(rounding_lib.decode(code, format.dtype)))


def stored_weight(weight: QuantizedArray) -> jax.Array:
  """`weight.dequantize()`, by arithmetic on the bits of the codes."""
  code = weight.code_bits.astype(jnp.int32)
  return weight.apply_scale(rounding_lib.decode(code, weight.format.dtype))


def stored_moment(moment: Any) -> jax.Array:
  """`stored_moments.read(moment)`, likewise."""
  if not is_quantized(moment):
    return stored_moments.read(moment)
  value = stored_weight(moment)
  return jnp.square(value) if isinstance(moment, SecondMoment) else value


def injected(
  step: Step,
  scalars: Any,
  moments: Moments,
  weight: jax.Array,
  stored: jax.Array,
  update: jax.Array,
) -> Moments:
  """The moments with the error θ̃ − θ̂' in the momentum."""
  # In the order that keeps an update far below the weight's own precision.
  error = add_update(weight - stored, update)
  return moments[0] + step.inject(scalars, moments, error), *moments[1:]


def definition(step: Step, rounding: Rounding, leaf: Leaf) -> tuple[QuantizedArray, Moments]:
  """The step of one leaf in plain `jnp`.

  Args:
    step: the optimizer, see `steps`.
    rounding: of the codes.
    leaf: a packed weight of any format and shape, its gradient and moments.

  Returns:
    The new weight and the new moments.
  """
  weight = stored_weight(leaf.weight)
  values = tuple(stored_moment(x) for x in leaf.moments)
  update, moments = step.propose(leaf.scalars, leaf.gradient, values, weight)
  bits = random_bits(leaf, leaf.key) if rounding == "stochastic" else None
  format, proposal = leaf.weight.format, add_update(weight, update)
  largest = largest_proposal(leaf, proposal) if leaf.part and leaf.part.sharing else None
  code, holder, stored = put_on_grid(proposal, format, rounding, bits, largest)
  qvalue, odd = pack(code, format)
  moments = injected(step, leaf.scalars, moments, weight, stored, update)
  new_moments = []
  for k, (old, x) in enumerate(zip(leaf.moments, moments, strict=True)):
    if is_low(old):
      x = stored_moments.store_like(old, x, random_bits(leaf, leaf.moment_keys[k]))
    new_moments.append(x)
  return dataclasses.replace(holder, qvalue=qvalue, odd=odd), tuple(new_moments)


def by_layers(step: Step, rounding: Rounding, leaf: Leaf) -> tuple[QuantizedArray, Moments]:
  """`definition` of a stack's layers one after another, so that no temporary is of its size."""
  if leaf.layer is not None or leaf.weight.ndim < 3:
    return definition(step, rounding, leaf)
  part, first = leaf.part, jnp.zeros([], jnp.int32)
  if part is not None:
    first, part = (
      part.first[0],
      dataclasses.replace(part, first=part.first[1:], shape=part.shape[1:]),
    )

  def one(i: jax.Array, layer: Any, gradient: jax.Array) -> tuple[QuantizedArray, Moments]:
    weight, moments = layer
    own = leaf._replace(
      layer=first + i, weight=weight, gradient=gradient, moments=moments, part=part
    )
    return definition(step, rounding, own)

  return stacks.each_layer(one, (leaf.weight, leaf.moments), leaf.gradient)


def block_rows(moment: Any) -> int:
  """Rows of a moment that share a scale; 1 if it has none."""
  return int(moment.format.granularity[0]) if is_quantized(moment) else 1


def is_low(moment: Any) -> bool:
  """Whether a moment is stored in few bits."""
  return is_quantized(moment) or moment.dtype != jnp.float32


class Matrices(NamedTuple):
  """A leaf as a stack of matrices."""

  stack: int
  rows: int
  columns: int
  unit: int  # Rows that stay together: those of a block, or of the codes in a byte.


def matrices(leaf: Leaf) -> Matrices | None:
  """The leaf as matrices; None where scales are not those of columns, matrices or their blocks."""
  weight = leaf.weight
  format, shape = weight.format, weight.shape
  unit = 8 // format.bits
  if weight.odd or weight.ndim < 2:
    return None
  if isinstance(format.granularity, tuple):
    if len(format.granularity) != 2:
      return None
    unit = math.lcm(unit, format.granularity[0])
  elif format.granularity == "channel" and format.contraction_axis != -2:
    return None
  unit = math.lcm(unit, *map(block_rows, leaf.moments))
  return Matrices(math.prod(shape[:-2]), shape[-2], shape[-1], unit)


def matrix_numbers(leaf: Leaf) -> jax.Array | None:
  """The numbers, int32, of a leaf's matrices in its stack; None where there is no stack."""
  lead = leaf.weight.shape[:-2]
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
  """Where a leaf's matrices begin in the whole ones, and how wide these are."""

  row: jax.Array | int
  column: jax.Array | int
  columns: int


def origin(leaf: Leaf) -> Origin:
  """That of a part, or of a whole leaf."""
  if leaf.part is None:
    return Origin(0, 0, leaf.weight.shape[-1])
  return Origin(leaf.part.first[-2], leaf.part.first[-1], leaf.part.shape[-1])


def tile_bits(
  key: Any,
  matrix: jax.Array | None,
  columns: int,
  row: jax.Array | int,
  column: jax.Array | int,
  shape: tuple[int, ...],
) -> jax.Array:
  """The part of `rounding.counter_bits` that starts at `row` and `column` of each matrix."""
  row, column = (
    jax.lax.broadcasted_iota(jnp.int32, shape, axis) + first
    for axis, first in zip((len(shape) - 2, len(shape) - 1), (row, column), strict=True)
  )
  unsigned = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32)
  element = unsigned(row * np.int32(columns) + column)
  return rounding_lib.element_bits(key, element, None if matrix is None else unsigned(matrix))


def random_bits(leaf: Leaf, key: jax.Array) -> jax.Array:
  """`rounding.counter_bits` of a leaf, or of the part that is there of it."""
  shape = leaf.weight.shape
  if leaf.part is None:
    return rounding_lib.counter_bits(key, shape, leaf.layer)
  numbers, at = matrix_numbers(leaf), origin(leaf)
  numbers = None if numbers is None else numbers.reshape(*shape[:-2], 1, 1)
  return tile_bits(key, numbers, at.columns, at.row, at.column, shape)


def largest_proposal(leaf: Leaf, proposal: jax.Array) -> jax.Array:
  """The largest magnitude for each scale that whole columns or matrices share, on all devices."""
  axes = (-2,) if leaf.weight.format.granularity == "channel" else (-2, -1)
  largest = largest_magnitude(proposal, axes, keepdims=True)
  if not (leaf.part and leaf.part.sharing):
    return largest
  # Magnitudes are in the order of their bits, with NaN above all.
  bits = jax.lax.pmax(jax.lax.bitcast_convert_type(largest, jnp.int32), leaf.part.sharing)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


# Elements of a chunk: a CPU's caches hold a few such arrays, and its threads are worth starting.
_CHUNK = 2**18
_SMALLEST_CHUNK = 2**14


def _chunk_rows(m: Matrices) -> int | None:
  """Rows of the largest chunk of whole units that divides a matrix, if there is a good one."""
  fits = [n for n in range(m.unit, m.rows, m.unit) if m.rows % n == 0]
  fits = [n for n in fits if _SMALLEST_CHUNK <= n * m.columns <= _CHUNK]
  return max(fits, default=None)


def _as_bits(x: jax.Array) -> jax.Array:
  """Short floats as integers: XLA's CPU compiler widens all of what a loop holds of them."""
  if x.dtype.itemsize > 2:
    return x
  return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _arrays(moment: Any) -> dict[str, jax.Array]:
  """What a moment is stored in."""
  if is_quantized(moment):
    return {"qvalue": moment.qvalue, "scale": moment.scale}
  return {"value": moment}


def _with_arrays(like: Any, arrays: dict[str, jax.Array]) -> Any:
  """A moment stored like another in other arrays, which may be given as bits."""
  typed: dict[str, Any] = {
    name: x if x.dtype == old.dtype else jax.lax.bitcast_convert_type(x, old.dtype)
    for (name, old), x in zip(_arrays(like).items(), arrays.values(), strict=True)
  }
  return dataclasses.replace(like, **typed) if is_quantized(like) else typed["value"]


def by_rows(step: Step, rounding: Rounding, leaf: Leaf) -> tuple[QuantizedArray, Moments]:
  """`definition` in place, chunk by chunk of rows, for CPUs, whose compiler makes a loop per array.

  What lies between a chunk's gradient and its new code stays in the caches. Where scales depend on
  a whole column or matrix, a first loop over the chunks finds its largest proposal.
  """
  weight, format = leaf.weight, leaf.weight.format
  m = matrices(leaf)
  size = _chunk_rows(m) if m else None
  if m is None or size is None:
    return by_layers(step, rounding, leaf)
  chunks, shape = m.rows // size, (size, m.columns)
  numbers, at = matrix_numbers(leaf), origin(leaf)
  blocked = isinstance(format.granularity, tuple)

  names = ("qvalue", "scale", "tensor_scale")
  fields = {name: x for name in names if (x := getattr(weight, name)) is not None}
  dtypes = {name: x.dtype for name, x in fields.items()}
  # What has rows of its own for each chunk, and what belongs to a matrix.
  flat = lambda x: x.reshape(-1, x.shape[-1])
  stores = {name: flat(_as_bits(x)) for name, x in fields.items() if name == "qvalue" or blocked}
  stores.pop("tensor_scale", None)
  scales = {
    name: x.reshape(m.stack, 1, x.shape[-1]) for name, x in fields.items() if name not in stores
  }
  gradient = flat(_as_bits(leaf.gradient))
  # Of each moment the arrays it is stored in, all of which have rows of their own for each chunk.
  moments = tuple(
    {name: flat(_as_bits(x)) for name, x in _arrays(moment).items()} for moment in leaf.moments
  )

  def place(x: jax.Array, matrix: jax.Array, i: jax.Array) -> tuple[jax.Array, int]:
    """Where the chunk's rows of an array begin, and how many it has."""
    rows = x.shape[0] // m.stack
    return matrix * rows + i * (rows // chunks), rows // chunks

  def packed(stores: dict[str, jax.Array], scales: dict[str, jax.Array]) -> QuantizedArray:
    typed: dict[str, Any] = {
      name: x if x.dtype == dtypes[name] else jax.lax.bitcast_convert_type(x, dtypes[name])
      for name, x in (stores | scales).items()
    }
    return QuantizedArray(format=format, **typed)

  def read(
    stores: dict[str, jax.Array], moments: Moments, matrix: jax.Array, i: jax.Array
  ) -> tuple[jax.Array, jax.Array, Moments]:
    """θ̂, update and new moments of a chunk."""
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, *place(x, matrix, i))
    own_gradient = jax.lax.bitcast_convert_type(part(gradient), leaf.gradient.dtype)
    old = packed(jax.tree.map(part, stores), {name: x[matrix] for name, x in scales.items()})
    theta = stored_weight(old)
    own = tuple(
      stored_moment(_with_arrays(like, jax.tree.map(part, arrays)))
      for like, arrays in zip(leaf.moments, moments, strict=True)
    )
    return theta, *step.propose(leaf.scalars, own_gradient, own, theta)

  def largest_proposals(matrix: jax.Array, stores: Any, moments: Moments) -> jax.Array:
    def chunk(i: jax.Array, largest: jax.Array) -> jax.Array:
      theta, update, _ = read(stores, moments, matrix, i)
      # Magnitudes are in the order of their bits, with NaN above all.
      bits = jax.lax.bitcast_convert_type(jnp.abs(add_update(theta, update)), jnp.int32)
      return jnp.maximum(largest, bits)

    largest = jax.lax.fori_loop(0, chunks, chunk, jnp.zeros(shape, jnp.int32))
    return largest_proposal(leaf, jax.lax.bitcast_convert_type(largest, jnp.float32))

  def bits_of(key: jax.Array, matrix: jax.Array, i: jax.Array) -> jax.Array:
    number = None if numbers is None else numbers[matrix]
    return tile_bits(key, number, at.columns, at.row + i * size, at.column, shape)

  def one_matrix(matrix: jax.Array, carry: Any) -> Any:
    stores, new_scales, moments = carry
    # Block scales alone do without.
    largest = largest_proposals(matrix, stores, moments) if scales else None

    def rounded(stores: Any, moments: Moments, i: jax.Array) -> Any:
      theta, update, new_moments = read(stores, moments, matrix, i)
      bits = bits_of(leaf.key, matrix, i) if rounding == "stochastic" else None
      code, holder, _ = put_on_grid(add_update(theta, update), format, rounding, bits, largest)
      whole = dataclasses.replace(holder, qvalue=pack(code, format)[0])
      new = {name: _as_bits(getattr(whole, name)) for name in fields}
      return new, theta, update, new_moments

    def write(stores: Any, moments: Moments, done: Any, i: jax.Array) -> Any:
      new, theta, update, new_moments = done
      parts = {name: new[name] for name in stores}
      stored = stored_weight(packed(parts, {name: new[name] for name in scales}))
      new_moments = injected(step, leaf.scalars, new_moments, theta, stored, update)
      chunks_of_moments = []
      for k, (like, x) in enumerate(zip(leaf.moments, new_moments, strict=True)):
        if is_low(like):
          x = stored_moments.store_like(like, x, bits_of(leaf.moment_keys[k], matrix, i))
        chunks_of_moments.append({name: _as_bits(y) for name, y in _arrays(x).items()})
      put = lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, place(x, matrix, i)[0], 0)
      return jax.tree.map(put, (stores, moments), (parts, tuple(chunks_of_moments)))

    # Each turn writes what the one before it computed, and then reads: an array of which nothing
    # else is read while it changes is one that the compiler does not copy.
    def turn(i: jax.Array, carry: Any) -> Any:
      stores, moments, done = carry
      stores, moments = write(stores, moments, done, i - 1)
      return stores, moments, rounded(stores, moments, jnp.minimum(i, chunks - 1))

    first = rounded(stores, moments, jnp.zeros([], jnp.int32))
    stores, moments, done = jax.lax.fori_loop(1, chunks + 1, turn, (stores, moments, first))
    new_scales = {name: x.at[matrix].set(done[0][name]) for name, x in new_scales.items()}
    return stores, new_scales, moments

  carry = (stores, scales, moments)
  if m.stack == 1:
    stores, new_scales, moments = one_matrix(jnp.zeros([], jnp.int32), carry)
  else:
    stores, new_scales, moments = jax.lax.fori_loop(0, m.stack, one_matrix, carry)
  whole = packed(stores, new_scales)
  new = {name: getattr(whole, name).reshape(x.shape) for name, x in fields.items()}
  shaped = tuple(
    _with_arrays(like, {name: x.reshape(_arrays(like)[name].shape) for name, x in arrays.items()})
    for like, arrays in zip(leaf.moments, moments, strict=True)
  )
  return dataclasses.replace(weight, **new), shaped


_fused_update_p = Primitive("fused_update")
_fused_update_p.multiple_results = True


def fused_update(step: Step, rounding: Rounding, leaf: Leaf) -> tuple[QuantizedArray, Moments]:
  """One leaf's step as `definition` has it, by the kernel that suits the device.

  Args:
    step: as in `definition`.
    rounding: as in `definition`.
    leaf: as in `definition`.

  Returns:
    As `definition`.
  """
  flat, treedef = jax.tree.flatten(leaf)
  results = _fused_update_p.bind(*flat, step=step, rounding=rounding, treedef=treedef)
  return jax.tree.unflatten(jax.tree.structure(like_results(leaf)), results)


def like_results(leaf: Leaf) -> tuple[QuantizedArray, Moments]:
  """What has the results' structure, shapes and dtypes."""
  return dataclasses.replace(leaf.weight, sink=None), leaf.moments


def _flat(implementation: Any) -> Any:
  """An implementation as a function of flat operands."""

  def fn(*flat: jax.Array, step: Step, rounding: Rounding, treedef: Any) -> list[jax.Array]:
    return jax.tree.leaves(implementation(step, rounding, jax.tree.unflatten(treedef, flat)))

  return fn


@functools.cache
def _compiled(**params: Any) -> Any:
  return jax.jit(functools.partial(_fused_update_p.bind, **params))


@_fused_update_p.def_impl
def _impl(*flat: jax.Array, **params: Any) -> list[jax.Array]:
  return _compiled(**params)(*flat)


@_fused_update_p.def_abstract_eval
def _abstract_eval(*flat: Any, treedef: Any, **params: Any) -> list[Any]:
  del params
  out = jax.tree.leaves(like_results(jax.tree.unflatten(treedef, flat)))
  return [jax.core.ShapedArray(x.shape, x.dtype) for x in out]


def _batched(flat: Any, axes: Any, **params: Any) -> tuple[list[jax.Array], list[int]]:
  results = jax.vmap(functools.partial(_flat(definition), **params), in_axes=axes)(*flat)
  return results, [0] * len(results)


batching.primitive_batchers[_fused_update_p] = _batched


def _on_one_device(implementation: Any) -> Any:
  """Lowers to `implementation` where a device is by itself, and to `by_layers` elsewhere.

  A kernel sees local indices and is not partitioned; the definition is, with the bits of global
  indices. Inside `jax.shard_map` over all axes of a mesh each device is by itself.
  """

  def lower(ctx: Any, *args: Any, **params: Any) -> Any:
    axes = ctx.module_context.axis_context
    devices, mesh = getattr(axes, "num_devices", None), getattr(axes, "mesh", None)
    alone = devices == 1 or (mesh and set(axes.manual_axes) == set(mesh.axis_names))
    chosen = implementation if alone else by_layers
    return mlir.lower_fun(_flat(chosen), multiple_results=True)(ctx, *args, **params)

  return lower


def _by_panels(step: Step, rounding: Rounding, leaf: Leaf) -> tuple[QuantizedArray, Moments]:
  from eco_optax.fused import tpu as pallas_update  # It stands on this module.

  return pallas_update.by_panels(step, rounding, leaf)


def _by_tiles(step: Step, rounding: Rounding, leaf: Leaf) -> tuple[QuantizedArray, Moments]:
  try:
    from eco_optax.fused import gpu as triton_update
    from eco_optax.fused import gpu_rows
  except ImportError:  # A JAX without that backend.
    return by_layers(step, rounding, leaf)
  if not triton_update.available():
    return by_layers(step, rounding, leaf)
  plan = gpu_rows.plan(step, rounding, leaf, gpu_rows.arithmetic())
  if plan is not None:
    return gpu_rows.run(plan, leaf)
  return triton_update.by_tiles(step, rounding, leaf)


def _on_cuda(ctx: Any, *args: Any, **params: Any) -> Any:
  with warnings.catch_warnings():
    # Where it is gone `_by_tiles` does without.
    warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
    return _on_one_device(_by_tiles)(ctx, *args, **params)


mlir.register_lowering(_fused_update_p, _on_one_device(by_layers))
mlir.register_lowering(_fused_update_p, _on_one_device(by_rows), platform="cpu")
mlir.register_lowering(_fused_update_p, _on_one_device(_by_panels), platform="tpu")
mlir.register_lowering(_fused_update_p, _on_cuda, platform="cuda")
