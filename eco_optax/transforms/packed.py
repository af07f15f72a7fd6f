"""Transformations that take packed parameters, and what they tell those inside them of a step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from eco_optax import trees
from eco_optax.quantized_array import QuantizedArray, as_update, is_quantized


class Context(NamedTuple):
  """What a transformation hands down to those inside it about one step.

  Users pass `shardings=` and `gradient_scale=` to `update` by name; `layer_by_layer` adds the
  layer, and `low_bit_moments` the way that moments are stored.
  """

  layer: jax.Array | None = None  # int32: index of the layer of a stack whose step it is.
  shardings: Any = None  # A tree of the parameters' NamedShardings.
  gradient_scale: jax.Array | None = None  # Gradients are multiplied by it before all else.
  moments: Any = None  # A `low_bit_moments.MomentStorage`, where the state is stored by one.

  def scale(self, updates: Any) -> tuple[Any, Context]:
    """Gradients times their scale, in their dtypes, and what is left to hand down."""
    if self.gradient_scale is None:
      return updates, self
    return scale_gradients(updates, self.gradient_scale), self._replace(gradient_scale=None)


class PackedTransformation(optax.GradientTransformationExtraArgs):
  """A transformation that takes packed parameters as they are.

  All others are stock transformations and must see float32 in place of a packed leaf.
  """

  # Largest distance of a weight from its proposal, in steps of the grid.
  largest_error: float = 1.0

  # Whether the update takes moments as `Context.moments` stores them.
  takes_stored_moments: bool = False

  # (state, params, whether moments are stored) → paths of leaves whose stacks a step takes whole,
  # in temporaries of one layer.
  takes_whole: Callable[[Any, Any, bool], Collection[str]]

  def __new__(
    cls,
    init: Any,
    update: Any,
    takes_whole: Callable[[Any, Any, bool], Collection[str]] = lambda *_: (),
  ) -> PackedTransformation:
    """Makes one of an `update(updates, state, params, context=…, **extra_args)`.

    The updates of packed leaves say that they are updates, so that nothing adds them.
    """

    def update_with_context(
      updates: Any,
      state: Any,
      params: Any = None,
      *,
      context: Context | None = None,
      shardings: Any = None,
      gradient_scale: Any = None,
      **extra_args: Any,
    ) -> tuple[Any, Any]:
      context = context or Context()
      if shardings is not None:
        context = context._replace(shardings=shardings)
      if gradient_scale is not None:
        context = context._replace(gradient_scale=gradient_scale)
      updates, state = update(updates, state, params, context=context, **extra_args)
      return trees.map_with_path(as_update, updates, is_leaf=is_quantized), state

    tx = super().__new__(cls, init, update_with_context)
    tx.takes_whole = takes_whole
    return tx


def is_packed_transformation(tx: optax.GradientTransformation) -> bool:
  """Whether a transformation takes packed parameters, and a `Context`."""
  return isinstance(tx, PackedTransformation)


def run(
  tx: optax.GradientTransformation,
  updates: Any,
  state: Any,
  params: Any,
  context: Context,
  extra_args: dict[str, Any],
) -> tuple[Any, Any]:
  """One update of a transformation, packed or stock, with what is handed down to it."""
  if is_packed_transformation(tx):
    return tx.update(updates, state, params, context=context, **extra_args)  # type: ignore[call-arg]
  updates, _ = context.scale(updates)
  return optax.with_extra_args_support(tx).update(updates, state, params, **extra_args)


def require_params(params: Any) -> None:
  """Raises `ValueError` where a caller forgot the parameters."""
  if params is None:
    raise ValueError("params are missing: call tx.update(grads, state, params)")


def require_state(state: Any, kind: type, name: str) -> None:
  """Raises `ValueError` for a state of another kind than the transformation `name` keeps."""
  if not isinstance(state, kind):
    raise ValueError(
      f"the state is a {type(state).__name__}, but {name} keeps a {kind.__name__}: it belongs to"
      " another optimizer, or is nested in another order. Restore the state that this optimizer"
      " saved, or call tx.init(params)"
    )


def require_stock(inner: optax.GradientTransformation, name: str, remedy: str) -> None:
  """Raises `ValueError` where a transformation of this package stands for a stock optimizer."""
  if is_packed_transformation(inner):
    raise ValueError(
      f"{name} takes a stock optimizer, such as optax.adamw(…), and got a transformation of"
      f" eco_optax, which moves packed parameters itself: {remedy}"
    )


def float_gradients(updates: Any, params: Any) -> Any:
  """The updates with those of packed leaves in float32, as the dense view that they belong to."""
  if params is None:
    return updates
  return jax.tree.map(
    lambda leaf, update: update.astype(jnp.float32) if is_quantized(leaf) else update,
    params,
    updates,
    is_leaf=is_quantized,
  )


def scale_gradients(updates: Any, scale: Any) -> Any:
  """Gradients times a factor, in their dtypes; None is 1."""
  if scale is None:
    return updates
  scale = jnp.asarray(scale, jnp.float32)
  return jax.tree.map(lambda g: (g.astype(jnp.float32) * scale).astype(g.dtype), updates)


def add_update(stored: jax.Array, update: jax.Array) -> jax.Array:
  """`stored + update` in float32; for a dense stored weight the proposal θ̃ = θ̂ + u.

  The select keeps compilers from fusing the update's last product with this sum, which would round
  once instead of twice in some programs only: the proposal must be one number everywhere.
  """
  stored = stored.astype(jnp.float32)
  return stored + jnp.where(jnp.isnan(stored), stored, update.astype(jnp.float32))


def stored_weight(path: str, leaf: Any, update: Any) -> jax.Array:
  """The float32 weight that is stored at `leaf` once its quantized `update` is applied.

  An error must be measured against this, as it will be read back, and nothing else.
  """
  if isinstance(update, QuantizedArray):
    return update.dequantize()
  if is_quantized(leaf):
    raise ValueError(
      f"{trees.leaf_name(path)} is packed, but the quantizer gave it a float update: use"
      " eco.quantize_params, or keep this leaf float"
    )
  return optax.apply_updates(leaf, update).astype(jnp.float32)
