"""The fused step for CPUs: in place, chunk by chunk of rows, in the caches.

XLA's compiler for CPUs makes a loop over memory for each array. A chunk of rows is small enough
that everything between its gradient and its new codes stays in the caches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eco_optax.fused.leaf import (
  Leaf,
  Matrices,
  largest_proposal,
  matrices,
  matrix_numbers,
  on_layers,
  origin,
  over_parts,
  tile_bits,
)
from eco_optax.fused.step import (
  Moments,
  Plan,
  Proposal,
  Step,
  by_layers,
  plan_of,
  propose,
  settle,
)
from eco_optax.lowering import unlike_constant
from eco_optax.quantized_array import (
  QuantizedArray,
  Rounding,
  is_quantized,
  largest_magnitude,
  matrix_scale,
)
from eco_optax.transforms.factored import Factors
from eco_optax.transforms.stored_moments import pack_like, unpack

# A loop takes this many leaves at least, and this many weights at most. It copies the leaves, with
# their gradients and moments, into arrays of its own, and copies the results out of them.
FEWEST_TURNS = 4
_TURNS = 2**21

Arrays = dict[str, jax.Array]  # The arrays of a weight or of a moment, by the name of their field.

# Elements of a chunk. A CPU's caches hold a few float32 arrays of the larger number (1 MiB each);
# below the smaller, XLA's loops no longer repay starting their threads. Both were read from timings
# of 4096 × 4096 weights on two cores of a server. On other CPUs measure `scripts/benchmark.py`.
_CHUNK = 2**18
_SMALLEST_CHUNK = 2**14

# Elements of the largest matrix whose step XLA's own loops take as fast or faster: all of it stays
# in the caches, and its program compiles in half the time. FP8, AdamW, stochastic: 256² in 0.5 of
# the chunks' CPU time, 352² in 0.6, 512² in 1.6.
_SMALL_MATRIX = 2**17


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


def _arrays(leaf: Any) -> Arrays:
  """The arrays that a step changes of a weight or a moment."""
  if isinstance(leaf, Factors):
    return {}
  if not is_quantized(leaf):
    return {"value": leaf}
  fields = {name: getattr(leaf, name) for name in ("qvalue", "scale", "tensor_scale")}
  return {name: x for name, x in fields.items() if x is not None}


def _with_arrays(like: Any, arrays: Arrays) -> Any:
  """A weight or moment stored like another in other arrays, which may be given as bits."""
  if isinstance(like, Factors):
    return like
  old = _arrays(like)
  typed: dict[str, Any] = _typed({name: arrays[name] for name in old}, old)
  return dataclasses.replace(like, **typed) if is_quantized(like) else typed["value"]


@on_layers
def by_size(step: Step, rounding: Rounding, leaf: Leaf) -> tuple[QuantizedArray, Moments]:
  """`by_rows`, and for a small matrix the definition.

  Stacks, and layers of one, are changed in place by chunks alone.
  """
  m = matrices(leaf)
  if m is None or (matrix_numbers(leaf) is None and m.rows * m.columns <= _SMALL_MATRIX):
    return by_layers(step, rounding, leaf)
  return by_rows(step, rounding, leaf)


def by_rows(step: Step, rounding: Rounding, leaf: Leaf) -> tuple[QuantizedArray, Moments]:
  """`step.definition` for CPUs, where a chunk of rows suits the leaf.

  Where scales depend on a whole column or matrix, or on a row that several devices have, a first
  loop over the chunks finds its largest proposal.

  Args:
    step: as in `step.definition`.
    rounding: as in `step.definition`.
    leaf: as in `step.definition`.

  Returns:
    As `step.definition`.
  """
  format = leaf.weight.format
  m = matrices(leaf)
  size = _chunk_rows(m) if m else None
  if m is None or size is None:
    return by_layers(step, rounding, leaf)
  chunks, shape = m.rows // size, (size, m.columns)
  numbers, at = matrix_numbers(leaf), origin(leaf)
  keys = [leaf.key(k) for k in range(leaf.starts.size)]

  # Arrays with rows of their own for each chunk, and the scales of whole columns or matrices.
  flat = lambda x: _as_bits(x).reshape(-1, x.shape[-1])
  fields = _arrays(leaf.weight)
  by_row = format.granularity == "channel" and format.contraction_axis == -1
  has_own_scales = by_row or isinstance(format.granularity, tuple)
  per_chunk = {"qvalue", "scale"} if has_own_scales else {"qvalue"}
  weight = {name: flat(x) for name, x in fields.items() if name in per_chunk}
  whole = {
    name: x.reshape(m.stack, 1, x.shape[-1]) for name, x in fields.items() if name not in per_chunk
  }
  moments = tuple({name: flat(x) for name, x in _arrays(m).items()} for m in leaf.moments)
  gradient = flat(leaf.gradient)

  def place(x: jax.Array, matrix: jax.Array, i: jax.Array) -> tuple[jax.Array, int]:
    """The first row of a chunk of an array, and how many it has."""
    rows = x.shape[0] // m.stack
    return matrix * rows + i * (rows // chunks), rows // chunks

  def propose_chunk(stored: Any, matrix: jax.Array, i: jax.Array) -> tuple[Plan, Proposal, Leaf]:
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, *place(x, matrix, i))
    weight, moments = jax.tree.map(part, stored)
    old = _with_arrays(leaf.weight, weight | {name: x[matrix] for name, x in whole.items()})
    old_moments = [
      Factors(part(flat(like.row)), like.ratio.reshape(m.stack, 1, -1)[matrix])
      if isinstance(like, Factors)
      else _with_arrays(like, arrays)
      for like, arrays in zip(leaf.moments, moments, strict=True)
    ]
    own_gradient = jax.lax.bitcast_convert_type(part(gradient), leaf.gradient.dtype)
    chunk = leaf._replace(weight=old, moments=tuple(old_moments))
    plan = plan_of(step, rounding, chunk)
    unpacked = unpack(old), tuple(map(unpack, old_moments))
    return plan, propose(plan, leaf.scalars, own_gradient, *unpacked), chunk

  def largest_of_rows(matrix: jax.Array, stored: Any) -> jax.Array:
    def chunk(i: jax.Array, largest: jax.Array) -> jax.Array:
      plan, proposal, _ = propose_chunk(stored, matrix, i)
      own = largest_magnitude(plan.value(proposal), (-1,), keepdims=True)
      return jax.lax.dynamic_update_slice_in_dim(largest, own, i * size, 0)

    zeros = jnp.zeros((m.rows, 1), jnp.float32)
    return over_parts(leaf, jax.lax.fori_loop(0, chunks, chunk, zeros))

  def largest_proposals(matrix: jax.Array, stored: Any) -> jax.Array:
    def chunk(i: jax.Array, largest: jax.Array) -> jax.Array:
      plan, proposal, _ = propose_chunk(stored, matrix, i)
      # Magnitudes are in the order of their bits, with NaN above all.
      return jnp.maximum(
        largest, jax.lax.bitcast_convert_type(jnp.abs(plan.value(proposal)), jnp.int32)
      )

    largest = jax.lax.fori_loop(0, chunks, chunk, jnp.zeros(shape, jnp.int32))
    return largest_proposal(leaf, jax.lax.bitcast_convert_type(largest, jnp.float32))

  def one_matrix(matrix: jax.Array, carry: Any) -> Any:
    stored, new_whole = carry
    # Scales of blocks and rows do without.
    largest = largest_proposals(matrix, stored) if whole else None
    if by_row and leaf.part and leaf.part.sharing:
      largest = largest_of_rows(matrix, stored)
    unit = None
    if format.two_level and largest is not None:
      unit, largest = matrix_scale(largest, format), None

    def old_chunk(stored: Any, i: jax.Array) -> tuple[Arrays, tuple[Arrays, ...], Arrays]:
      part = lambda x: jax.lax.dynamic_slice_in_dim(x, *place(x, matrix, i))
      return *jax.tree.map(part, stored), {name: x[matrix] for name, x in whole.items()}

    def new_chunk(stored: Any, i: jax.Array) -> tuple[Arrays, tuple[Arrays, ...], Arrays]:
      plan, proposal, chunk = propose_chunk(stored, matrix, i)
      number = None if numbers is None else numbers[matrix]
      bits = lambda k: tile_bits(keys[k], number, at.columns, at.row + i * size, at.column, shape)
      own_largest = largest
      if by_row and largest is not None:
        own_largest = jax.lax.dynamic_slice_in_dim(largest, i * size, size)
      new_weight, *moments = settle(plan, leaf.scalars, proposal, bits, own_largest, unit)
      old = dataclasses.replace(chunk.weight, tensor_scale=unit)
      new = _arrays(pack_like(old, new_weight))
      new_moments = tuple(
        jax.tree.map(_as_bits, _arrays(pack_like(*pair)))
        for pair in zip(chunk.moments, moments, strict=True)
      )
      own = {name: _as_bits(new[name]) for name in weight}
      of_matrix = {name: new[name] for name in whole}
      if (skip := step.skipped(leaf.scalars)) is None:
        return own, new_moments, of_matrix
      keep = functools.partial(jnp.where, skip)
      return jax.tree.map(keep, old_chunk(stored, i), (own, new_moments, of_matrix))

    # Each turn writes the chunk that the one before it computed, and then reads: the
    # compiler does not copy an array that nothing else reads while it changes. The first writes
    # what is there.
    def turn(i: jax.Array, carry: Any) -> Any:
      stored, (*new, _) = carry
      put = lambda x, part: jax.lax.dynamic_update_slice_in_dim(
        x, part, place(x, matrix, jnp.maximum(i - 1, 0))[0], 0
      )
      stored = jax.tree.map(put, stored, tuple(new))
      return stored, new_chunk(stored, jnp.minimum(i, chunks - 1))

    first = old_chunk(stored, jnp.zeros([], jnp.int32))
    stored, (*_, of_matrix) = jax.lax.fori_loop(0, chunks + 1, turn, (stored, first))
    return stored, {name: x.at[matrix].set(of_matrix[name]) for name, x in new_whole.items()}

  carry = (weight, moments), whole
  if m.stack == 1:
    carry = one_matrix(jnp.zeros([], jnp.int32), carry)
  else:
    carry = jax.lax.fori_loop(0, m.stack, one_matrix, carry)
  (weight, moments), new_whole = carry
  shaped = lambda like, arrays: _with_arrays(
    like, {name: arrays[name].reshape(x.shape) for name, x in _arrays(like).items()}
  )
  new_moments = tuple(shaped(*pair) for pair in zip(leaf.moments, moments, strict=True))
  return shaped(leaf.results[0], weight | new_whole), new_moments


def is_for_turns(leaf: Leaf) -> bool:
  """Whether a leaf's step is best taken in a loop over leaves of its kind, see `by_turns`.

  A step with moments in few bits is long to compile and short to copy. For 40 matrices of 256²,
  FP8, a loop takes 1.1 s to compile instead of 4.3, and no longer to run. With float32 moments it
  would take 2.2 times as long as programs of their own, with matrices of 1024² 1.5 times.
  """
  small = leaf.layer is None and leaf.weight.ndim == 2 and leaf.weight.size <= _SMALL_MATRIX
  return small and any(map(is_quantized, leaf.moments))


def by_turns(
  take_step: Callable[[Leaf], tuple[QuantizedArray, Moments]], leaves: list[Leaf]
) -> list[tuple[QuantizedArray, Moments]]:
  """`take_step` of many leaves of one kind, in a loop that is compiled for one.

  Args:
    take_step: of a leaf.
    leaves: as in `dispatch.take_steps`.

  Returns:
    The results of each.
  """
  # In loops of one length, which are one program.
  loops = -(-len(leaves) * leaves[0].weight.size // _TURNS)
  length = -(-len(leaves) // loops)
  if length < len(leaves):
    parts = (leaves[i : i + length] for i in range(0, len(leaves), length))
    return [new for part in parts for new in by_turns(take_step, part)]
  like, results = leaves[0], leaves[0].results
  own = lambda leaf: (leaf.starts, leaf.weight, leaf.gradient, leaf.moments)

  def turn(raw: Any) -> Any:
    starts, weight, gradient, moments = _typed(raw, own(like))
    leaf = like._replace(starts=starts, weight=weight, gradient=gradient, moments=moments)
    return jax.tree.map(_as_bits, take_step(leaf))

  stacked = jax.tree.map(lambda *x: jnp.stack(list(map(_as_bits, x))), *map(own, leaves))
  new = jax.lax.map(turn, stacked)
  number = lambda i: unlike_constant(np.int32(i), like.steps[0])
  at = lambda i: lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
  return [_typed(jax.tree.map(at(number(i)), new), results) for i in range(len(leaves))]


def _typed(raw: Any, like: Any) -> Any:
  """A tree of arrays given `_as_bits` in the dtypes of another."""
  cast = lambda x, old: x if x.dtype == old.dtype else jax.lax.bitcast_convert_type(x, old.dtype)
  return jax.tree.map(cast, raw, like)
