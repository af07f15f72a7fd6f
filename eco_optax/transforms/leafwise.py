"""Steps of an optimizer for some leaves at a time, and whether its leaves can be taken apart."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax import trees
from eco_optax.quantized_array import dequantize, is_quantized, quantize_array
from eco_optax.transforms import eager
from eco_optax.transforms.factored import is_array
from eco_optax.transforms.packed import (
  Context,
  PackedTransformation,
  is_packed_transformation,
  run,
  unless_skipped,
)

Leaves = dict[str, Any]  # Leaves of a tree by path; a packed leaf or a factored moment is one.


def flatten(tree: Any) -> tuple[Leaves, Any]:
  """Leaves by path, and the tree's definition."""
  leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_array)
  return {trees.path_name(path): leaf for path, leaf in leaves}, treedef


def keep(tree: Any, kept: Leaves) -> Any:
  """The tree with `kept` leaves by path, and all others masked."""
  leaves, treedef = flatten(tree)
  return jax.tree.unflatten(treedef, [kept.get(path, optax.MaskedNode()) for path in leaves])


def pick(leaves: Leaves, paths: Collection[str]) -> Leaves:
  """The leaves at some paths."""
  return {path: leaves[path] for path in paths}


class Optimizer(NamedTuple):
  """A transformation, and trees that say where the leaves of its step are."""

  tx: optax.GradientTransformation
  updates: Any  # Tree of the gradients; only its structure counts.
  params: Any
  state: Any
  extra_args: dict[str, Any]

  def owned(self) -> dict[str | None, list[str]]:
    """Paths of the state's leaves by the parameter they belong to; None has what all share."""
    weights, states = flatten(self.params)[0], flatten(self.state)[0]
    found: dict[str | None, list[str]] = {path: [] for path in (None, *weights)}
    for path, owner in trees.owners(states, weights).items():
      found[owner].append(path)
    return found

  def in_stacks(self) -> tuple[frozenset[str], frozenset[str]]:
    """Paths of parameters whose stacks a step of one layer takes whole, and of their state."""
    if not (isinstance(self.tx, PackedTransformation) and self.tx.steps_in_stacks):
      return frozenset(), frozenset()
    owned, paths = self.owned(), self.tx.takes_whole(self.state, self.params, False)
    return frozenset(paths), frozenset(x for path in paths for x in owned[path])

  def step(
    self, grads: Leaves, weights: Leaves, states: Leaves, context: Context
  ) -> tuple[Leaves, Leaves]:
    """A step for the leaves that are given, where all others are masked.

    Args:
      grads: of these leaves.
      weights: packed or float.
      states: their own, and the ones that all leaves share.
      context: of the step.

    Returns:
      Updates, and new leaves of the state.
    """
    paths, treedef = flatten(self.state)
    state = jax.tree.unflatten(treedef, [states.get(p, optax.MaskedNode()) for p in paths])
    updates, params = keep(self.updates, grads), keep(self.params, weights)
    new_updates, new_state = run(self.tx, updates, state, params, context, self.extra_args)
    scale = context.gradient_scale
    if scale is not None and not is_packed_transformation(self.tx):
      new_updates, new_state = unless_skipped(scale, new_updates, new_state, state, params)
    return flatten(new_updates)[0], flatten(new_state)[0]


def _few(leaf: Any) -> tuple[int, ...]:
  """The shape of a few layers and a few channels or blocks of a leaf."""
  block = getattr(getattr(leaf, "format", None), "granularity", ())
  least = (3,) * leaf.ndim if isinstance(block, str) else (3,) * (leaf.ndim - len(block)) + block
  return tuple(min(n, m) for n, m in zip(leaf.shape, least, strict=True))


def _miniature(leaf: Any, generator: np.random.Generator) -> Any:
  """A small leaf of the same kind."""
  values = jnp.asarray(generator.standard_normal(_few(leaf)), jnp.float32)
  return quantize_array(values, leaf.format) if is_quantized(leaf) else values.astype(leaf.dtype)


def kind(params: Any) -> Any:
  """What of the parameters decides `responses`: the same for trees of the same miniature."""
  leaves, treedef = jax.tree.flatten(params, is_leaf=is_quantized)
  few = [(_few(x), jnp.dtype(x.dtype), x.format if is_quantized(x) else None) for x in leaves]
  return treedef, tuple(few)


def responses(
  tx: optax.GradientTransformation,
  params: Any,
  changes: Sequence[Callable[[str, jax.Array], jax.Array]],
) -> list[Leaves] | None:
  """What a step makes of a miniature of the parameters.

  Args:
    tx: whose step it is.
    params: arrays or their shapes.
    changes: (path of a parameter, its random gradient) → another gradient of it.

  Returns:
    NumPy arrays, updates and state, by path: of a step with random gradients, and of one with each
    change of these. None where the update wants an argument of the user's own.
  """
  generator = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda tree: tree, params)  # Nothing that is traced goes along.

  # Compiled in two pieces: operation by operation, hundreds of small programs would be.
  @jax.jit
  def prepare() -> tuple[Any, Any, Any]:
    small = jax.tree.map(lambda x: _miniature(x, generator), shapes, is_leaf=is_quantized)
    draw = lambda x: jnp.asarray(generator.standard_normal(x.shape), jnp.float32)
    return small, tx.init(small), jax.tree.map(draw, dequantize(small))

  @jax.jit
  def step(grads: Any, state: Any, small: Any, extra_args: Any) -> Any:
    update = optax.with_extra_args_support(tx).update
    read = lambda x: x.dequantize() if is_array(x) else x
    return jax.tree.map(read, update(grads, state, small, **extra_args), is_leaf=is_array)

  def try_out(extra_args: Any) -> list[Leaves]:
    small, state, grads = prepare()
    grads = jax.device_get(grads)
    changed = [trees.map_with_path(change, grads) for change in changes]
    results = [jax.device_get(step(g, state, small, extra_args)) for g in (grads, *changed)]
    return [flatten(result)[0] for result in results]

  found, failure = eager.now(lambda: eager.with_made_up_arguments(try_out))
  if failure is not None and not eager.is_missing_argument(failure):
    raise failure
  return found
