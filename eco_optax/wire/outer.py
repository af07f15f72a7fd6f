"""Outer steps of DiLoCo: workers train by themselves, and at times exchange how far they got."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from eco_optax.quantized_array import dequantize, is_quantized, quantize


def outer_step(
  tx: optax.GradientTransformation, anchor: Any, params: Any, state: Any
) -> tuple[Any, Any, Any]:
  r"""One outer step: the workers' mean way from where they started, taken by an outer optimizer.

  .. math:: \Delta_i = \theta - \theta_i, \quad \theta \leftarrow \theta + tx(\Delta_i), \quad
            \theta_i \leftarrow \theta

  With Δ exchanged by `wire.error_feedback` in 2 to 4 bits, an outer step of every H steps sends
  1/(8H) of the bytes that float32 gradients take.

  Args:
    tx: the exchange and the outer optimizer, in `optax.chain`, such as
      `wire.error_feedback(wire.integers(4), "data")` and `optax.sgd(0.7, 0.9, nesterov=True)`.
    anchor: θ, float parameters that all workers started from: `eco.dequantize(params)` at first.
    params: θ_i, a worker's own after some steps of its inner optimizer; leaves may be packed.
    state: of `tx`, from `tx.init(anchor)`.

  Returns:
    θ; all workers' new parameters, θ with packed leaves rounded to nearest in their formats; and
    the state. Where a worker's parameters are not finite the transformations of this module make
    the way of all NaN: then nothing moves, and workers begin again at θ.

  Raises:
    ValueError: if the trees or shapes of anchor and params differ.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from eco_optax import wire
    >>> tx = optax.chain(wire.error_feedback(wire.integers(2), "data"), optax.sgd(0.7))
    >>> def worker(start, params):
    ...   return wire.outer_step(tx, start, params, tx.init(start))[0]
    >>> start, ends = jnp.zeros(512), jnp.stack([jnp.full(512, 1.0), jnp.full(512, 3.0)])
    >>> outer = jax.vmap(worker, in_axes=(None, 0), axis_name="data")(start, ends)
    >>> outer.shape
    (2, 512)

  References:
    Douillard et al, `DiLoCo <https://arxiv.org/abs/2311.08105>`_, 2023, Algorithm 1.
  """
  dense = dequantize(params)
  of = lambda tree: jax.tree.map(jnp.shape, tree)
  if of(anchor) != of(dense):
    raise ValueError(
      "wire.outer_step: anchor and params are of different trees or shapes: the anchor is"
      " eco.dequantize(params) of the parameters that workers started from"
    )
  way = jax.tree.map(lambda x, y: x - y.astype(x.dtype), anchor, dense)
  updates, new_state = tx.update(way, state, anchor)
  is_finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(u)) for u in jax.tree.leaves(updates)]))
  keep = lambda old, new: jnp.where(is_finite, new, old)
  anchor = jax.tree.map(lambda x, u: keep(x, x + u.astype(x.dtype)), anchor, updates)
  state = jax.tree.map(keep, state, new_state)
  rounded = jax.tree.map(
    lambda leaf, x: quantize(x, leaf.format) if is_quantized(leaf) else x.astype(leaf.dtype),
    params,
    anchor,
    is_leaf=is_quantized,
  )
  return anchor, rounded, state
