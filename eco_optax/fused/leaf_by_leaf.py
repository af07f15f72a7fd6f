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
  all matrices of a model before it is done with any. Here a leaf's gradient does not exist before
  the steps of the layer behind it are done, see `order`.

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
    shared = pick(states, owned[None])  # Step counts.
    new_updates: Leaves = {}
    new_states: Leaves = {}

    def step(paths: list[str], after: list[jax.Array]) -> None:
      own = shared | pick(states, [x for path in paths for x in owned[path]])
      own_grads = order.after(after, pick(grads, paths))
      found = optimizer.step(own_grads, pick(weights, paths), own, context)
      new_updates.update(found[0])
      new_states.update(found[1])

    ends: list[jax.Array] = []
    for stack in order.stacks(path for path, leaf in weights.items() if is_quantized(leaf)):
      behind: list[jax.Array] = []
      for layer in stack:
        for path in layer:
          step([path], behind)
          behind = [new_updates[path].scale]
      ends += behind
    step([path for path, leaf in weights.items() if not is_quantized(leaf)], ends)
    return (
      jax.tree.unflatten(updates_treedef, [new_updates[path] for path in grads]),
      jax.tree.unflatten(treedef, [new_states[path] for path in states]),
    )

  tx = PackedTransformation(inner.init, update)
  tx.skips = True
  return tx
