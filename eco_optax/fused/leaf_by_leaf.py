"""leaf_by_leaf: a step whose temporaries are those of one packed leaf."""

from __future__ import annotations

from typing import Any

import jax
import optax

from eco_optax.fused import order
from eco_optax.quantized_array import is_quantized
from eco_optax.transforms import leafwise
from eco_optax.transforms.leafwise import Leaves, flatten, pick
from eco_optax.transforms.packed import Context, PackedTransformation, require_params


def leaf_by_leaf(inner: PackedTransformation) -> PackedTransformation:
  """Runs an optimizer on one packed leaf after another, and then on all float leaves.

  A matrix function has several float32 arrays of its matrix at once. Left alone, XLA may start on
  all matrices of a model before it is done with any. Here the numbers that a leaf's step begins
  with, such as the step count, do not exist before the leaf before it is stored; see `order`. XLA's
  CPU compiler does not keep to such orders.

  Args:
    inner: an optimizer that treats each leaf by itself.

  Returns:
    A transformation with the state and, but for sums in another order, the steps of `inner`.
  """

  def update(
    updates: Any, state: optax.OptState, params: Any, context: Context, **extra_args: Any
  ) -> tuple[Any, optax.OptState]:
    require_params(params)
    (weights, _), (grads, updates_treedef) = flatten(params), flatten(updates)
    states, treedef = flatten(state)
    optimizer = leafwise.Optimizer(inner, updates, params, state, extra_args)
    owned = optimizer.owned()
    shared = pick(states, owned[None])  # Step counts and coefficients.
    moments = context.moments
    new_updates: Leaves = {}
    new_states: Leaves = {}

    def step(paths: list[str], behind: list[jax.Array]) -> list[jax.Array]:
      """Takes the step of some leaves behind others; returns what is stored of them."""
      own, own_context = shared, context
      if behind:  # These are scalars and small: to wait takes no copy of what is large.
        own, moments_step = order.after(behind, (shared, moments and moments.step))
        own_context = context._replace(moments=moments and moments._replace(step=moments_step))
      own_states = pick(states, [x for path in paths for x in owned[path]])
      found, new = optimizer.step(
        pick(grads, paths), pick(weights, paths), own | own_states, own_context
      )
      new_updates.update(found)
      new_states.update(new)
      stored = [(x.qvalue, x.scale) for x in found.values() if is_quantized(x)]
      return jax.tree.leaves((stored, pick(new, own_states)))

    behind: list[jax.Array] = []
    for stack in order.stacks(path for path, leaf in weights.items() if is_quantized(leaf)):
      for path in (path for layer in stack for path in layer):
        behind = step([path], behind)
    step([path for path, leaf in weights.items() if not is_quantized(leaf)], behind)
    return (
      jax.tree.unflatten(updates_treedef, [new_updates[path] for path in grads]),
      jax.tree.unflatten(treedef, [new_states[path] for path in states]),
    )

  tx = PackedTransformation(inner.init, update)
  tx.skips = True
  return tx
