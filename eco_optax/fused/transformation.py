"""Fuses a transformation: the steps of packed leaves in one pass each, the rest as it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax import rounding as rounding_lib
from eco_optax import trees
from eco_optax.fused import dispatch, order
from eco_optax.fused.leaf import Leaf, fits
from eco_optax.fused.step import Step
from eco_optax.lowering import unlike_constant
from eco_optax.quantized_array import Rounding, is_quantized
from eco_optax.transforms import momentum as momentum_lib
from eco_optax.transforms.error_feedback import ErrorFeedbackState
from eco_optax.transforms.factored import is_array
from eco_optax.transforms.packed import (
  Context,
  PackedTransformation,
  float_gradients,
  require_params,
  require_state,
  run,
  scale_gradients,
  unless_skipped,
)


class Optimizer(NamedTuple):
  """A stock optimizer whose step and rule are known in closed form."""

  step: Step
  state_type: type  # Of the link of the optimizer's state that has the moments.
  fields: tuple[str, ...]  # Of its moments, the momentum first.
  # (that state, count of the schedule, factor of the gradients, weight decay) → scalars of `step`
  scalars: Callable[[Any, jax.Array | None, jax.Array, Any], Any]

  def is_state(self, node: Any) -> bool:
    """Whether a node of a state has the moments."""
    return isinstance(node, self.state_type)

  def find(self, state: Any) -> Any:
    """The link of a state that has the moments."""
    nodes = [x for x in jax.tree.leaves(state, is_leaf=self.is_state) if self.is_state(x)]
    if not nodes:
      raise ValueError(
        f"the state has no {self.state_type.__name__}: it belongs to another optimizer. Restore the"
        " state that this optimizer saved, or call tx.init(params)"
      )
    return nodes[0]

  def moments(self, state: Any) -> dict[str, tuple[Any, ...]]:
    """The moments in a state by path of their parameter, the momentum first."""
    node = self.find(state)
    of_fields = [momentum_lib.flat(getattr(node, field)) for field in self.fields]
    return {path: tuple(leaves[path] for leaves in of_fields) for path in of_fields[0]}

  def map_moments(self, fn: Callable[[int, Any], Any], state: Any) -> Any:
    """A state with `fn(number, tree of moments)` in place of its moments."""

    def change(node: Any) -> Any:
      if not self.is_state(node):
        return node
      new = {field: fn(k, getattr(node, field)) for k, field in enumerate(self.fields)}
      return node._replace(**new)

    return jax.tree.map(change, state, is_leaf=self.is_state)


class FusedTransformation(PackedTransformation):
  """A transformation that reads and writes moments as `low_bit_moments` stores them."""

  takes_stored_moments = True
  skips = True
  steps_in_stacks = True


class _Done(NamedTuple):
  """The results of one leaf's step."""

  weight: Any
  moments: tuple[Any, ...]


def _flat_leaves(params: Any) -> dict[str, Any]:
  """Parameters, or their shardings, by path; a packed leaf is one."""
  leaves: dict[str, Any] = {}
  trees.map_with_path(leaves.__setitem__, params, is_leaf=is_quantized)
  return leaves


def _fusable(weights: dict[str, Any], moments: dict[str, tuple], rounds: bool) -> list[str]:
  """Paths of the packed leaves whose moments a fused step takes, see `leaf.fits`."""
  return [
    path
    for path, leaf in weights.items()
    if is_quantized(leaf) and path in moments and all(fits(x, rounds) for x in moments[path])
  ]


def _without(tree: Any, done: dict[str, _Done]) -> Any:
  """A tree of parameters, gradients or moments in which leaves that are done are masked."""
  return trees.map_with_path(
    lambda path, leaf: optax.MaskedNode() if path in done else leaf, tree, is_leaf=is_array
  )


def _merged(tree: Any, done: dict[str, Any]) -> Any:
  """The reverse of `_without`, with new leaves by path."""
  is_leaf = lambda leaf: is_array(leaf) or isinstance(leaf, optax.MaskedNode)
  return trees.map_with_path(lambda path, leaf: done.get(path, leaf), tree, is_leaf=is_leaf)


def gradient_factor(updates: Any, scale: Any, max_norm: Any) -> jax.Array:
  """The gradients' factor: their scale times the clip factor, if a global norm is clipped."""
  scale = jnp.ones([], jnp.float32) if scale is None else jnp.asarray(scale, jnp.float32)
  if max_norm is None:
    return scale
  norm = optax.tree.norm(updates).astype(jnp.float32) * jnp.abs(scale)
  clip = jnp.where(norm < max_norm, np.float32(1), jnp.asarray(max_norm, jnp.float32) / norm)
  return scale * clip


def _decays(decay: Any, mask: Any, updates: Any) -> dict[str, Any]:
  """Weight decay by path."""
  flags = jax.tree.map(lambda _: True, updates)
  if mask is not None:
    tree = mask(updates) if callable(mask) else mask
    flags = jax.tree.map(lambda flag, part: jax.tree.map(lambda _: flag, part), tree, updates)
  return {path: decay if flag else 0.0 for path, flag in momentum_lib.flat(flags).items()}


def fuse(
  general: optax.GradientTransformationExtraArgs,
  optimizer: Optimizer,
  rounding: Rounding,
  seed: int,
  max_norm: Any = None,
  decay: Any = 0.0,
  mask: Any = None,
  fused: bool | None = None,
) -> optax.GradientTransformationExtraArgs:
  """`general` with the steps of packed leaves in closed form, each in one pass.

  Args:
    general: `error_feedback_to_momentum` over the optimizer, schedule-aware, perhaps behind a clip.
    optimizer: its closed form.
    rounding: as in `quantize_params`.
    seed: as in `quantize_params`.
    max_norm: of the clip, or None.
    decay: decoupled weight decay.
    mask: of the decay, as in `optax.adamw`.
    fused: whether by kernels, see `dispatch.wants_kernels`.

  Returns:
    A transformation with the same state and, but for roundings of the last place, the same steps.
    Leaves that are not packed, or whose moments are stored in a way that the fused step does not
    know, take the steps of `general`.
  """

  def takes_whole(state: ErrorFeedbackState, params: Any, stored: bool) -> list[str]:
    require_state(state, ErrorFeedbackState, "this optimizer")
    return _fusable(_flat_leaves(params), optimizer.moments(state.inner), stored)

  def update(
    updates: Any, state: ErrorFeedbackState, params: Any, context: Context, **extra_args: Any
  ) -> tuple[Any, ErrorFeedbackState]:
    require_params(params)
    require_state(state, ErrorFeedbackState, "this optimizer")
    factor = gradient_factor(float_gradients(updates, params), context.gradient_scale, max_norm)
    count, node = momentum_lib.inner_count(state.inner), optimizer.find(state.inner)
    weights, gradients = _flat_leaves(params), momentum_lib.flat(updates)
    moments, decays = optimizer.moments(state.inner), _decays(decay, mask, updates)
    shardings, starts, counters = _flat_leaves(context.shardings), {}, [state.quantizer.step]
    if context.moments:
      shapes = momentum_lib.shapes_of(params)
      starts = optimizer.moments(context.moments.starts(state, shapes).inner)
      counters += [context.moments.step] * len(optimizer.fields)
    steps = jnp.stack(counters)

    scale = context.gradient_scale
    step = optimizer.step._replace(skips=scale is not None)
    # Made once for all leaves of one decay.
    by_decay = {id(own): optimizer.scalars(node, count, factor, own) for own in decays.values()}
    places = {path: getattr(x, "qvalue", x) for path, x in shardings.items()}

    def leaf_at(path: str) -> Leaf:
      own = jnp.array([rounding_lib.stream_start(seed, path), *starts.get(path, ())])
      arrays = weights[path], gradients[path], moments[path]
      scalars, own = by_decay[id(decays[path])], unlike_constant(own, steps[0])
      return Leaf(scalars, own, steps, context.layer, *arrays)

    leaves = {
      path: leaf_at(path) for path in _fusable(weights, moments, context.moments is not None)
    }
    done: dict[str, _Done] = {}
    # The many small ones have small gradients, and need not wait for layers behind theirs.
    for paths in dispatch.kinds(leaves, places, fused):
      new = dispatch.take_steps(step, rounding, [leaves.pop(path) for path in paths])
      done.update(zip(paths, itertools.starmap(_Done, new), strict=True))
    ends = []
    for stack in order.stacks(leaves):
      behind: list[jax.Array] = []
      for layer in stack:
        for path in layer:
          leaf = leaves[path]._replace(steps=order.after(behind, steps))
          done[path] = _Done(*dispatch.take_step(step, rounding, leaf, places.get(path), fused))
        behind = [done[path].weight.scale for path in layer]
      ends += behind
    # Embeddings' gradients are there last, and whatever comes before them waits for the layers.
    updates = order.after(ends, _without(updates, done))

    if max_norm is not None or scale is not None:
      # A second clip of leaves that were clipped together finds nothing to do.
      updates = scale_gradients(updates, factor)
    rest = _without(params, done)
    rest_state = state._replace(
      inner=optimizer.map_moments(lambda _, tree: _without(tree, done), state.inner)
    )
    stored_state = rest_state
    if context.moments:
      rest_state = context.moments.read(rest_state, rest)
    rest_context = Context(layer=context.layer)
    new_updates, new_state = run(general, updates, rest_state, rest, rest_context, extra_args)
    if scale is not None:
      new_updates, new_state = unless_skipped(scale, new_updates, new_state, rest_state, rest)
    if context.moments:
      new_state = context.moments.store(new_state, rest, context.layer, stored_state)

    of_moment = lambda k, tree: _merged(tree, {path: x.moments[k] for path, x in done.items()})
    new_inner = optimizer.map_moments(of_moment, new_state.inner)
    new_weights = {path: x.weight for path, x in done.items()}
    return _merged(new_updates, new_weights), new_state._replace(inner=new_inner)

  return FusedTransformation(general.init, update, takes_whole)
