"""Using packed parameters: applying their updates and differentiating with respect to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from eco_optax import dense_view, explicit_axes, trees
from eco_optax.quantized_array import QuantizedArray, is_quantized, replaced


def apply_updates(params: Any, updates: Any) -> Any:
  """`optax.apply_updates` for packed parameters: packed leaves are replaced, float leaves added.

  `optax.apply_updates` itself raises for them: the update of a packed leaf is its new value, and
  marked as one, so that nothing adds it.

  Args:
    params: a tree with QuantizedArray and float leaves.
    updates: the tree that a transformation of this package returned for them.

  Returns:
    The new parameters: every leaf keeps its shape and dtype.

  Raises:
    ValueError: naming the leaf, if a packed leaf's update is not packed, or the reverse.

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> eco.apply_updates({"b": jnp.ones(2)}, {"b": jnp.ones(2)})
    {'b': Array([2., 2.], dtype=float32)}
  """

  def apply(path: str, leaf: Any, update: Any) -> Any:
    if is_quantized(leaf) and is_quantized(update):
      return replaced(leaf, update)
    if is_quantized(leaf):
      raise ValueError(
        f"{trees.leaf_name(path)} is packed, but its update is not: end the optimizer with"
        " eco.quantize_params, as in eco.chain(optax.adamw(…), eco.quantize_params()), and freeze"
        " leaves by optax.masked(optax.set_to_zero(), …) behind it, not by optax.partition or"
        " optax.masked around it"
      )
    if is_quantized(update):
      raise ValueError(
        f"{trees.leaf_name(path)} is not packed, but its update is: apply the update to the"
        " parameters that it was computed for"
      )
    return optax.apply_updates(leaf, update)

  return trees.map_with_path(apply, params, updates, is_leaf=is_quantized)


def require_floats(path: str, leaf: Any) -> None:
  """Raises `ValueError` for a parameter that has no gradient."""
  if hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jnp.inexact):
    raise ValueError(
      f"{trees.leaf_name(path)} holds {leaf.dtype}, which has no gradient: pass it as a further"
      " argument of the function, beside the parameters"
    )


def new_sink(leaf: QuantizedArray, dtype: Any) -> jax.Array:
  """Where the gradient of a packed leaf is collected, on the devices where the leaf is.

  These are zeros that nothing reads, so they cost no memory once compiled.
  """
  return explicit_axes.call(  # type: ignore[no-any-return]
    lambda codes: jnp.zeros_like(codes, dtype, shape=leaf.shape),
    lambda new: explicit_axes.spec_like(new, leaf.qvalue),
    leaf.qvalue,
  )


def value_and_grad(
  fn: Callable[..., Any],
  dense: bool = True,
  has_aux: bool = False,
  gradient_dtype: Any = jnp.float32,
) -> Callable[..., Any]:
  """`jax.value_and_grad` with respect to packed parameters, the first argument of `fn`.

  Args:
    fn: a scalar function of parameters and further arguments.
    dense: whether `fn` gets float32 arrays in place of QuantizedArray leaves, so that any model
      works. Otherwise it gets QuantizedArray leaves that collect gradients, from layers that
      multiply the codes directly with `eco.matmul`, and where their values are read.
    has_aux: whether `fn` returns `(value, aux)`.
    gradient_dtype: of packed leaves' gradients. `jnp.bfloat16` halves what lies between the
      backward pass and the optimizer step.

  Returns:
    A function that returns `(value, gradients)`: float gradients in the tree of the dense view,
    either way.

  Raises:
    ValueError: when called, naming the leaf, for integers and PRNG keys among the parameters.

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> params = eco.quantize({"w": jnp.ones((2, 2))}, eco.FP8)
    >>> value, grads = eco.value_and_grad(lambda p: jnp.sum(p["w"] ** 2))(params)
    >>> value, grads["w"]
    (Array(4., dtype=float32), Array([[2., 2.],
           [2., 2.]], dtype=float32))
  """

  def of_sinks(params: Any, call: Callable[[Any], Any], sink_dtype: Any) -> tuple[Any, Any]:
    trees.map_with_path(require_floats, params, is_leaf=is_quantized)
    sinks = jax.tree.map(
      lambda leaf: new_sink(leaf, sink_dtype) if is_quantized(leaf) else leaf,
      params,
      is_leaf=is_quantized,
    )

    def fn_of_sinks(sinks: Any) -> Any:
      leaves = jax.tree.map(
        lambda leaf, sink: dataclasses.replace(leaf, sink=sink) if is_quantized(leaf) else sink,
        params,
        sinks,
        is_leaf=is_quantized,
      )
      return call(leaves)

    return jax.value_and_grad(fn_of_sinks, has_aux=has_aux)(sinks)

  def with_dense(params: Any, *args: Any, **kwargs: Any) -> Any:
    # Differentiated at the dense view's own dtype, so that a gradient rounds once, at the end.
    call = lambda leaves: dense_view.apply(lambda view: fn(view, *args, **kwargs), leaves)
    value, grads = of_sinks(params, call, jnp.float32)
    cast = lambda leaf, g: g.astype(gradient_dtype) if is_quantized(leaf) else g
    return value, jax.tree.map(cast, params, grads, is_leaf=is_quantized)

  def with_codes(params: Any, *args: Any, **kwargs: Any) -> Any:
    return of_sinks(params, lambda leaves: fn(leaves, *args, **kwargs), gradient_dtype)

  return with_dense if dense else with_codes
