"""layer_by_layer: an optimizer step whose temporaries are those of one layer."""

from __future__ import annotations

import collections
from typing import Any

import jax
import numpy as np
import optax

from eco_optax import trees
from eco_optax.quantized_array import is_quantized, replaced
from eco_optax.transforms import leafwise, stacks
from eco_optax.transforms.leafwise import Leaves, flatten, pick
from eco_optax.transforms.packed import Context, PackedTransformation, require_params, run


def _stacks(params: Leaves) -> dict[int, list[str]]:
  """Paths of packed stacks of matrices, by their number of layers."""
  groups: dict[int, list[str]] = collections.defaultdict(list)
  for path, leaf in params.items():
    if is_quantized(leaf) and leaf.ndim >= 3:
      groups[leaf.shape[0]].append(path)
  return groups


def _check_separable(inner: optax.GradientTransformation, params: Any) -> None:
  """Raises `ValueError` if on a miniature the first layer's step changes with other gradients."""
  weights = flatten(params)[0]
  stacked = [path for paths in _stacks(weights).values() for path in paths]

  def change(path: str, grad: Any) -> Any:
    """Large, so that a norm which is clipped only beyond some limit shows too."""
    large = np.float32(1e4) * grad
    return np.concatenate([grad[:1], large[1:]]) if path in stacked else large

  found = leafwise.responses(inner, params, [change])
  if found is None:
    return
  one, other = found
  owners = trees.owners(one, weights)
  for path, leaf in one.items():
    owner = owners[path]
    if (
      owner in stacked and leaf.ndim and not np.array_equal(leaf[0], other[path][0], equal_nan=True)
    ):
      raise ValueError(
        f"{trees.leaf_name(owner or '')}: a layer's update depends on other layers, as with"
        " optax.clip_by_global_norm. Put what couples them before, as in"
        " optax.chain(clip, eco.layer_by_layer(…))"
      )


def layer_by_layer(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Runs an optimizer on one layer after another of stacked packed parameters, in place.

  The proposals, errors and random bits of a quantized step are float32 arrays of the weights' size.
  This holds those of one layer at a time: a loop over the first axis of packed leaves with three
  axes or more reads a layer's codes, gradients and moments and writes them back where they were.
  Stacks whose steps `inner` fuses it gets whole, since it holds no more itself, and moves less. The
  result equals `inner` on whole leaves, random bits included.

  Args:
    inner: an optimizer that treats each layer by itself, such as `error_feedback_to_momentum` over
      `optax.adamw`. A clip by global norm belongs before it:
      `optax.chain(clip, eco.layer_by_layer(…))`.

  Returns:
    A `GradientTransformationExtraArgs` with the state of `inner`. Apply its updates with
    `eco.apply_updates`.

  Raises:
    ValueError: at `init`, naming the leaf, if a layer's update depends on other layers, or at
      `update` if the optimizer keeps one number for a whole stack.

  Example:
    >>> import jax.numpy as jnp, optax, eco_optax as eco
    >>> params = {"blocks": eco.quantize(jnp.ones((12, 4, 4)), eco.FP8)}
    >>> tx = eco.layer_by_layer(
    ...   eco.error_feedback_to_momentum(optax.adamw(1e-3), eco.quantize_params())
    ... )
    >>> updates, _ = tx.update({"blocks": jnp.ones((12, 4, 4))}, tx.init(params), params)
    >>> eco.apply_updates(params, updates)["blocks"].shape
    (12, 4, 4)
  """
  takes_whole = inner.takes_whole if isinstance(inner, PackedTransformation) else lambda *_: ()

  # A run asks for its state's shapes, then for the state, and `value_and_step` for a miniature's.
  tried: set[Any] = set()

  def init(params: Any) -> optax.OptState:
    if _stacks(flatten(params)[0]) and (kind := leafwise.kind(params)) not in tried:
      _check_separable(inner, params)
      tried.add(kind)
    return inner.init(params)

  def update(
    updates: Any, state: optax.OptState, params: Any, context: Context, **extra_args: Any
  ) -> tuple[Any, optax.OptState]:
    require_params(params)
    if context.layer is not None:  # One layer of each stack: no stack to take apart.
      return run(inner, updates, state, params, context, extra_args)
    (weights, _), (grads, updates_treedef) = flatten(params), flatten(updates)
    states, treedef = flatten(state)
    whole = takes_whole(state, params, context.moments is not None)
    groups = _stacks({path: leaf for path, leaf in weights.items() if path not in whole})
    stacked = [path for paths in groups.values() for path in paths]
    optimizer = leafwise.Optimizer(inner, updates, params, state, extra_args)
    owned = optimizer.owned()
    shared = pick(states, owned[None])  # The step count.

    def run_on(
      grads: Leaves, weights: Leaves, own_states: Leaves, layer: jax.Array | None = None
    ) -> tuple[Leaves, Leaves]:
      """One step of `inner` where all other leaves are masked."""
      own_context = context._replace(layer=layer)
      new_updates, new_states = optimizer.step(grads, weights, shared | own_states, own_context)
      put = lambda path, new: replaced(weights[path], new) if is_quantized(new) else new
      return {path: put(path, new) for path, new in new_updates.items()}, new_states

    rest = [path for path in weights if path not in stacked]
    rest_states = pick(states, [x for path in rest for x in owned[path]])
    new_updates, new_states = run_on(pick(grads, rest), pick(weights, rest), rest_states)

    for paths in groups.values():

      def step(i: jax.Array, layer: Any, grads: Any) -> tuple[Leaves, Leaves]:
        weights, own_states = layer
        new_weights, new_states = run_on(grads, weights, own_states, i)
        return new_weights, pick(new_states, own_states)

      own = [x for path in paths for x in owned[path]]
      stack = pick(weights, paths), pick(states, own)
      done = stacks.each_layer(step, stack, pick(grads, paths))
      new_updates |= done[0]
      new_states |= done[1]
    for path in states:
      if path not in new_states:
        raise ValueError(
          f"the optimizer's state {path!r} is one number for all layers of a stack, which a step of"
          " one layer cannot keep. Put the transformation that keeps it before, as in"
          " optax.chain(optax.zero_nans(), eco.layer_by_layer(…))"
        )
    return (
      jax.tree.unflatten(updates_treedef, [new_updates[path] for path in grads]),
      jax.tree.unflatten(treedef, [new_states[path] for path in states]),
    )

  tx = PackedTransformation(init, update, takes_whole)
  if isinstance(inner, PackedTransformation):
    tx.skips, tx.steps_in_stacks = True, inner.steps_in_stacks
  return tx
