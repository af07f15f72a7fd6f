"""What an exchange keeps from step to step, and whose it is."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from eco_optax import formats, trees
from eco_optax.quantized_array import is_quantized
from eco_optax.transforms.momentum import flat as flat
from eco_optax.wire import exchange as exchange_lib
from eco_optax.wire.exchange import Axis, Link

Leaves = dict[str, Any]  # Arrays by the `/`-joined path of their parameter.


class WireState(NamedTuple):
  """State of a gradient exchange.

  Arrays that each worker has of its own have a first axis of workers: all of them outside of the
  axis' scope, one inside. `wire.specs` tells `jax.shard_map` so.
  """

  step: jax.Array  # shape=(), dtype=jnp.int32. Exchanges so far, those skipped not counted.
  own: dict[str, Any]  # By name trees like the parameters', float32 of shape (workers, leaf…).
  shared: dict[str, Any]  # By name trees like the parameters', float32, the same on all workers.
  server: Any  # float32 (workers, rows, block): what second compressions lost; or None.


def is_large(path: str, leaf: Any) -> bool:
  """Leaves of 512 values or more, from which on bytes count; others are exchanged exactly."""
  del path
  return math.prod(leaf.shape) >= formats.LARGE


def like(tree: Any, leaves: Leaves) -> Any:
  """A tree of the structure of `tree` with other arrays."""
  return trees.map_with_path(lambda path, _: leaves[path], tree)


def shapes(params: Any) -> Any:
  """Shapes of the dense view's gradients, float32."""
  of = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
  return jax.tree.map(of, params, is_leaf=is_quantized)


def start(
  link: Link, params: Any, own: tuple[str, ...], shared: tuple[str, ...], where: Any, workers: Any
) -> WireState:
  """The state before any exchange: zeros.

  Raises:
    ValueError: if the number of workers is not known, or not the one that there is.
  """
  inside = exchange_lib.axis_size(link.axis)
  if inside is None and workers is None:
    raise ValueError(
      f"wire: axis {link.axis!r} is not in scope, so that init cannot know how many workers there"
      " are: give the transformation workers=…, or call init inside jax.shard_map or jax.vmap"
    )
  count = workers if inside is None else check_workers(link.axis, workers, inside)
  first = count if inside is None else 1  # A worker has its own arrays only.
  dense = shapes(params)
  chosen = {path: leaf for path, leaf in flat(dense).items() if where(path, leaf)}

  def zeros(*lead: int) -> Any:
    return trees.map_with_path(
      lambda path, leaf: (
        jnp.zeros((*lead, *leaf.shape), jnp.float32) if path in chosen else optax.MaskedNode()
      ),
      dense,
    )

  server = None
  if link.exchange == "scatter" and not link.compressor.linear and chosen:
    block = link.compressor.block
    rows = sum(-(-math.prod(leaf.shape) // block) for leaf in chosen.values())
    server = exchange_lib.in_parts(jnp.zeros((rows, block), jnp.float32), count)[:first]
  return WireState(
    jnp.zeros([], jnp.int32),
    {name: zeros(first) for name in own},
    {name: zeros() for name in shared},
    server,
  )


def check_gradients(updates: Any) -> None:
  """Raises `TypeError` naming the first leaf that is no float gradient."""

  def check(path: str, leaf: Any) -> None:
    if is_quantized(leaf) or not trees.is_float(leaf):
      raise TypeError(
        f"wire: {trees.leaf_name(path)} is no float gradient but {type(leaf).__name__} of"
        f" {getattr(leaf, 'dtype', 'no dtype')}: take gradients by eco_optax.value_and_grad, which"
        " gives those of packed leaves in floats"
      )

  trees.map_with_path(check, updates, is_leaf=is_quantized)


def check_workers(axis: Axis, wanted: int | None, found: int) -> int:
  """The number of workers.

  Raises:
    ValueError: if it is not the wanted one.
  """
  if wanted is not None and wanted != found:
    raise ValueError(
      f"wire: the transformation is of {wanted} workers, and axis {axis!r} has {found}: make it"
      f" with workers={found}, and its state by wire.on_workers(state, {found}) of the old one"
    )
  return found


def check_state(state: Any, chosen: Leaves, own: tuple[str, ...], shared: tuple[str, ...]) -> None:
  """Raises `ValueError` if a state is of other leaves, another method or several workers."""
  names = [*getattr(state, "own", ()), *getattr(state, "shared", ())]
  if sorted(names) != sorted([*own, *shared]):
    raise ValueError(
      f"wire: the state {type(state).__name__} has {sorted(names)} where the method needs"
      f" {sorted([*own, *shared])}: it is of another method; call tx.init(params)"
    )
  for name in names:
    is_own = name in own
    leaves = flat(state.own[name] if is_own else state.shared[name])
    for path in {**leaves, **chosen}:
      wanted = ((1,) if is_own else ()) + chosen[path].shape if path in chosen else None
      found = leaves[path].shape if path in leaves else None
      if wanted == found:
        continue
      if is_own and wanted and found and found[1:] == wanted[1:]:
        raise ValueError(
          f"wire: {name} of {trees.leaf_name(path)} is of {found[0]} workers where one is: give"
          " jax.shard_map the in_specs and out_specs of wire.specs(state, axis), and where the"
          " number of workers has changed make the state by wire.on_workers(state, workers) first"
        )
      raise ValueError(
        f"wire: {name} of {trees.leaf_name(path)} has shape {found}, and its gradient asks for"
        f" {wanted}: the state is of other parameters or another where=; call tx.init(params)"
      )


def specs(state: Any, axis: Axis) -> Any:
  """How an optimizer's state is split over workers, for `in_specs` and `out_specs`.

  Args:
    state: of an optimizer that has exchanges in it; arrays or shapes.
    axis: of the mesh, or a tuple of several, over which workers exchange.

  Returns:
    The same tree of PartitionSpecs: workers' own arrays are split over the axis, others are whole.

  Example:
    >>> import jax.numpy as jnp
    >>> from eco_optax import wire
    >>> state = wire.error_feedback(wire.sign(), "data", workers=4).init(jnp.zeros(512))
    >>> tuple(wire.specs(state, "data").own["error"])
    ('data',)
  """
  split, whole = jax.sharding.PartitionSpec(axis), jax.sharding.PartitionSpec()

  def of(node: Any) -> Any:
    if not _is_exchange(node):
      return whole
    every = jax.tree.map(lambda _: whole, node)
    own = jax.tree.map(lambda _: split, (node.own, node.server))
    return every._replace(own=own[0], server=own[1])

  return jax.tree.map(of, state, is_leaf=_is_exchange)


def _is_exchange(node: Any) -> bool:
  """Whether a node of an optimizer's state is that of an exchange."""
  return isinstance(node, tuple) and {"own", "server"} <= set(getattr(node, "_fields", ()))


def on_workers(state: Any, workers: int) -> Any:
  """An optimizer's state for another number of workers.

  Each worker gets the mean of the errors and of the estimates there were, so that their mean over
  workers, by which weights move, stays what it was. What second compressions lost is split anew.

  Args:
    state: outside of the axis' scope, with all workers' arrays.
    workers: the number to go on with; make the transformation anew with it.

  Returns:
    The state.

  Example:
    >>> import jax.numpy as jnp
    >>> from eco_optax import wire
    >>> state = wire.error_feedback(wire.sign(), "data", workers=4).init(jnp.zeros(512))
    >>> wire.on_workers(state, 8).own["error"].shape
    (8, 512)
  """

  def mean(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.mean(x, axis=0), (workers, *x.shape[1:]))

  def change(node: Any) -> Any:
    if not _is_exchange(node):
      return node
    server = node.server
    if server is not None:
      block = server.shape[2]
      one = next(iter(node.own.values()))
      rows = sum(-(-math.prod(x.shape[1:]) // block) for x in jax.tree.leaves(one))
      server = exchange_lib.in_parts(server.reshape(-1, block)[:rows], workers)
    return node._replace(own=jax.tree.map(mean, node.own), server=server)

  return jax.tree.map(change, state, is_leaf=_is_exchange)
