"""layer_by_layer: an optimizer step whose temporaries are those of one layer."""

from __future__ import annotations

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax import trees
from eco_optax.quantized_array import dequantize, is_quantized, quantize_array, replaced
from eco_optax.transforms import eager, stacks
from eco_optax.transforms.packed import (
  Context,
  PackedTransformation,
  require_params,
  run,
)

_Leaves = dict[str, Any]  # Leaves of a tree by path.


def _flatten(tree: Any) -> tuple[_Leaves, Any]:
  """Leaves by path, a packed leaf being one, and the tree's definition."""
  leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)
  return {trees.path_name(path): leaf for path, leaf in leaves}, treedef


def _keep(tree: Any, kept: _Leaves) -> Any:
  """The tree with `kept` leaves by path, and all others masked."""
  leaves, treedef = _flatten(tree)
  return jax.tree.unflatten(treedef, [kept.get(path, optax.MaskedNode()) for path in leaves])


def _stacks(params: _Leaves) -> dict[int, list[str]]:
  """Paths of packed stacks of matrices, by their number of layers."""
  groups: dict[int, list[str]] = collections.defaultdict(list)
  for path, leaf in params.items():
    if is_quantized(leaf) and leaf.ndim >= 3:
      groups[leaf.shape[0]].append(path)
  return groups


def _miniature(leaf: Any, generator: np.random.Generator) -> Any:
  """A leaf of the same kind with a few layers and a few channels or blocks."""
  block = getattr(getattr(leaf, "format", None), "granularity", ())
  least = (3,) * leaf.ndim if isinstance(block, str) else (3,) * (leaf.ndim - len(block)) + block
  shape = tuple(min(n, m) for n, m in zip(leaf.shape, least, strict=True))
  values = jnp.asarray(generator.standard_normal(shape), jnp.float32)
  return quantize_array(values, leaf.format) if is_quantized(leaf) else values.astype(leaf.dtype)


def _check_separable(inner: optax.GradientTransformationExtraArgs, params: Any) -> None:
  """Raises `ValueError` if on a miniature the first layer's step changes with other gradients."""
  generator = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda tree: tree, params)  # Nothing that is traced goes along.
  stacked = [path for paths in _stacks(_flatten(shapes)[0]).values() for path in paths]

  # Compiled in two pieces: operation by operation, hundreds of small programs would be.
  @jax.jit
  def prepare() -> tuple[Any, Any, tuple[Any, Any]]:
    small = jax.tree.map(lambda x: _miniature(x, generator), shapes, is_leaf=is_quantized)
    first = jax.tree.map(
      lambda x: jnp.asarray(generator.standard_normal(x.shape), jnp.float32), dequantize(small)
    )
    # Large, so that a norm which is clipped only beyond some limit shows too.
    second = trees.map_with_path(
      lambda path, g: (1e4 * g).at[0].set(g[0]) if path in stacked else 1e4 * g, first
    )
    return small, inner.init(small), (first, second)

  @jax.jit
  def step(grads: Any, state: Any, small: Any) -> Any:
    return dequantize(inner.update(grads, state, small))

  def try_out() -> list[Any]:
    small, state, gradients = prepare()
    return [jax.device_get(step(g, state, small)) for g in gradients]

  results = eager.now(try_out)
  one, other = (_flatten(result)[0] for result in results)
  owners = trees.owners(one, _flatten(shapes)[0])
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
  result is that of `inner` on whole leaves, random bits included.

  Args:
    inner: an optimizer that treats each layer by itself, such as `error_feedback_to_momentum` over
      `optax.adamw`. A clip by global norm belongs before it:
      `optax.chain(clip, eco.layer_by_layer(…))`.

  Returns:
    A `GradientTransformationExtraArgs` with the state of `inner`. Apply its updates with
    `eco.apply_updates`.

  Raises:
    ValueError: at `init`, naming the leaf, if a layer's update depends on other layers.

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

  tried: set[Any] = set()  # Trees of shapes; a run asks for its state's shapes, then for the state.

  def init(params: Any) -> optax.OptState:
    if _stacks(_flatten(params)[0]):
      leaves, treedef = jax.tree.flatten(params)
      shapes = treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
      if shapes not in tried:
        _check_separable(inner, params)
        tried.add(shapes)
    return inner.init(params)

  def update(
    updates: Any, state: optax.OptState, params: Any, context: Context, **extra_args: Any
  ) -> tuple[Any, optax.OptState]:
    require_params(params)
    weights, grads = _flatten(params)[0], _flatten(updates)[0]
    states, treedef = _flatten(state)
    owners = trees.owners(states, weights)
    whole = takes_whole(state, params, context.moments is not None)
    groups = _stacks({path: leaf for path, leaf in weights.items() if path not in whole})
    stacked = [path for paths in groups.values() for path in paths]
    pick = lambda leaves, paths: {path: leaves[path] for path in paths}

    def run_on(
      grads: _Leaves, weights: _Leaves, state: _Leaves, layer: jax.Array | None = context.layer
    ) -> tuple[_Leaves, _Leaves]:
      """One step of `inner` where all other leaves are masked."""
      masked = jax.tree.unflatten(treedef, [state.get(p, optax.MaskedNode()) for p in states])
      own_context = context._replace(layer=layer)
      new_updates, new_state = run(
        inner, _keep(updates, grads), masked, _keep(params, weights), own_context, extra_args
      )
      put = lambda path, new: replaced(weights[path], new) if is_quantized(new) else new
      new_weights = {path: put(path, new) for path, new in _flatten(new_updates)[0].items()}
      return new_weights, _flatten(new_state)[0]

    rest = [path for path in weights if path not in stacked]
    rest_states = pick(states, [path for path in states if owners[path] not in stacked])
    new_updates, new_states = run_on(pick(grads, rest), pick(weights, rest), rest_states)
    shared = pick(states, [path for path in states if owners[path] is None])  # The step count.

    for paths in groups.values():

      def step(i: jax.Array, layer: Any, grads: Any) -> tuple[_Leaves, _Leaves]:
        weights, own_state = layer
        new_weights, new_state = run_on(grads, weights, shared | own_state, i)
        return new_weights, pick(new_state, own_state)

      own = [path for path in states if owners[path] in paths]
      stack = pick(weights, paths), pick(states, own)
      done = stacks.each_layer(step, stack, pick(grads, paths))
      new_updates |= done[0]
      new_states |= done[1]
    leaves, updates_treedef = _flatten(updates)
    return (
      jax.tree.unflatten(updates_treedef, [new_updates[path] for path in leaves]),
      jax.tree.unflatten(treedef, [new_states[path] for path in states]),
    )

  tx = PackedTransformation(init, update)
  tx.skips = isinstance(inner, PackedTransformation)
  return tx
