"""Stacks of layers, changed in place one layer after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import layout


def as_stored(layer: Any) -> Any:
  """A layer that keeps the order in memory in which it came out of its stack.

  A compiler that wants the rows and columns of a product in another order may otherwise transpose
  the whole stack, and carry that through the loop over its layers.
  """
  in_order = lambda x: layout.Layout(major_to_minor=tuple(range(x.ndim)))
  return jax.tree.map(lambda x: layout.with_layout_constraint(x, in_order(x)), layer)


def write_layer(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
  """The stack with one layer changed."""
  write = lambda stack, layer, i: jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)
  if stack.dtype.itemsize > 1 or not jnp.issubdtype(stack.dtype, jnp.floating):
    return write(stack, layer, i)
  # XLA's CPU compiler would widen all of a float8 stack to change one layer.
  bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint8)
  as_bits = lambda stack, layer, i: jax.lax.bitcast_convert_type(
    write(bits(stack), bits(layer), i), stack.dtype
  )
  return jax.lax.platform_dependent(stack, layer, i, cpu=as_bits, default=write)


def each_layer(fn: Callable[[jax.Array, Any, Any], Any], stacks: Any, others: Any) -> Any:
  """Replaces each layer of stacks, with temporaries of one layer at a time.

  Args:
    fn: called with the index, int32, of a layer, and this layer of `stacks` and of `others`;
      returns what replaces it in `stacks`.
    stacks: a tree of arrays with layers along the first axis.
    others: a tree of arrays to read along, layers along the first axis too.

  Returns:
    The new stacks.
  """

  def turn(i: jax.Array, stacks: Any) -> Any:
    at = lambda stack: jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
    new = fn(i, jax.tree.map(at, stacks), jax.tree.map(at, others))
    return jax.tree.map(lambda stack, x: write_layer(stack, x, i), stacks, new)

  # The carry starts as the stacks themselves, so that the loop works in place.
  return jax.lax.fori_loop(0, jax.tree.leaves(stacks)[0].shape[0], turn, stacks)
