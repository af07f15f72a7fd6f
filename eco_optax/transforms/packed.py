"""Transformations that take packed parameters, and what they tell those inside them of a step."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from eco_optax import explicit_axes, trees
from eco_optax.quantized_array import QuantizedArray, as_parameter, as_update, is_quantized
from eco_optax.transforms.factored import is_array

_MASK_BY_LEAF = (
  "jax.tree.map over packed parameters gives a flag for codes and one for scales. Make masks and"
  " labels over the dense view, one for each leaf: jax.tree.map(lambda x: x.ndim >= 2,"
  " eco_optax.dequantize(params))"
)


class Context(NamedTuple):
  """What a transformation hands down to those inside it about one step.

  Users pass `shardings=` and `gradient_scale=` to `update` by name; `layer_by_layer` adds the
  layer, and `low_bit_moments` the way that moments are stored.
  """

  layer: jax.Array | None = None  # int32: index of the layer of a stack whose step it is.
  shardings: Any = None  # A tree of the parameters' NamedShardings.
  gradient_scale: jax.Array | None = None  # Gradients are multiplied by it before all else.
  moments: Any = None  # A `low_bit_moments.MomentStorage`, where the state is stored by one.
  only_asks: bool = False  # Which leaves are moved: updates may have any values, if they are new.

  def scale(self, updates: Any) -> tuple[Any, Context]:
    """Gradients times their scale, in their dtypes, and the context without it."""
    if self.gradient_scale is None:
      return updates, self
    return scale_gradients(updates, self.gradient_scale), self._replace(gradient_scale=None)


class PackedTransformation(optax.GradientTransformationExtraArgs):
  """A transformation that takes packed parameters.

  All others are stock transformations and must see float32 in place of a packed leaf.
  """

  # Largest distance of a weight from its proposal, in steps of the grid.
  largest_error: float = 1.0

  # Whether the update takes moments as `Context.moments` stores them.
  takes_stored_moments: bool = False

  # Whether the update sees to it that a scale of the gradients that is not finite changes nothing.
  skips: bool = False

  # (state, params, whether moments are stored) → paths of leaves whose stacks a step takes whole,
  # in temporaries of one layer.
  takes_whole: Callable[[Any, Any, bool], Collection[str]]

  # Whether a step of one layer, see `Context.layer`, may be given whole stacks of those leaves and
  # of their state beside the gradient of the layer, which it then changes in place.
  steps_in_stacks: bool = False

  def __new__(
    cls,
    init: Any,
    update: Any,
    takes_whole: Callable[[Any, Any, bool], Collection[str]] = lambda *_: (),
  ) -> PackedTransformation:
    """Makes one of an `update(updates, state, params, context=…, **extra_args)`.

    Parameters and gradients are checked on the way in, once for all transformations inside. The
    updates of packed leaves say that they are updates, so that nothing adds them.

    A `gradient_scale` that is not finite skips the step: it changes nothing, bit for bit.
    """

    def init_checked(params: Any) -> Any:
      require_leaves(params)
      with naming_masks():
        return explicit_axes.call(init, lambda state: _specs_of_state(state, params), params)

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
      if context is None and params is not None:
        require_leaves(params)
        require_gradients(updates, params)
      context = context or Context()
      if shardings is not None:
        context = context._replace(shardings=shardings)
      if gradient_scale is not None:
        context = context._replace(gradient_scale=gradient_scale)

      def run(updates: Any, state: Any, params: Any, context: Context, extra_args: Any) -> Any:
        new: tuple[Any, Any] = update(updates, state, params, context=context, **extra_args)
        if tx.skips or context.gradient_scale is None:
          return new
        return unless_skipped(context.gradient_scale, *new, state, params)

      specs = lambda new: _specs_of_update(new, updates, state, params)
      with naming_masks():
        updates, state = explicit_axes.call(run, specs, updates, state, params, context, extra_args)
      if context.only_asks:
        return updates, state
      return trees.map_with_path(as_update, updates, is_leaf=is_quantized), state

    tx = super().__new__(cls, init_checked, update_with_context)
    tx.takes_whole = takes_whole
    return tx


def _specs_of_state(state: Any, params: Any) -> Any:
  """How a new state lies on a mesh with explicit axes: moments as their parameters."""
  flat: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
  for leaves, tree in zip(flat, (state, params), strict=True):
    trees.map_with_path(leaves.__setitem__, tree, is_leaf=is_array)
  owners = trees.owners(*flat)

  def spec(path: str, leaf: Any) -> Any:
    owner = flat[1].get(owners[path] or "")
    like = owner.qvalue if is_quantized(owner) else owner
    none = jax.sharding.PartitionSpec()
    return jax.tree.map(lambda x: none if like is None else explicit_axes.spec_like(x, like), leaf)

  return trees.map_with_path(spec, state, is_leaf=is_array)


def _specs_of_update(new: Any, updates: Any, state: Any, params: Any) -> Any:
  """How `(updates, state)` lie on a mesh with explicit axes: each as what it takes the place of."""
  old: dict[str, Any] = {}
  replaced = jax.tree.map(
    lambda leaf, update: leaf if is_quantized(leaf) else update, params, updates,
    is_leaf=is_quantized,
  )  # fmt: skip
  trees.map_with_path(old.__setitem__, (replaced, state))

  def spec(path: str, x: Any) -> Any:
    like = old.get(path)
    none = jax.sharding.PartitionSpec()
    return explicit_axes.spec_like(x, like) if isinstance(like, jax.Array) else none

  return trees.map_with_path(spec, new)


def unless_skipped(
  scale: jax.Array, updates: Any, new_state: Any, state: Any, params: Any
) -> tuple[Any, Any]:
  """Updates and state of a step; if the gradients' scale is not finite, they change nothing.

  Args:
    scale: of the gradients.
    updates: of the step, a packed leaf's being its new value.
    new_state: of the optimizer.
    state: that it had.
    params: packed and float.
  """
  skip = ~jnp.isfinite(jnp.asarray(scale, jnp.float32))

  def leaf(old: Any, update: Any) -> Any:
    if not is_quantized(update):
      # x + (−0) is x, where −0 + 0 is not; and XLA turns a sum with a chosen 0 into a chosen sum,
      # for which it copies what it chooses from.
      return trees.select(skip, jnp.full_like(update, -0.0), update)
    stored = dataclasses.replace(as_parameter(old), sink=None)
    return trees.select(skip, stored, as_parameter(update))

  new_updates = jax.tree.map(leaf, params, updates, is_leaf=is_quantized)
  return new_updates, trees.select(skip, state, new_state)


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
  """One update of a transformation, packed or stock, with the context for it."""
  if is_packed_transformation(tx):
    return tx.update(updates, state, params, context=context, **extra_args)  # type: ignore[call-arg]
  updates, context = context.scale(updates)
  if context != Context():  # For transformations of this package in a stock chain.
    extra_args = extra_args | {"context": context}
  return update_stock(optax.with_extra_args_support(tx), updates, state, params, extra_args)


def update_stock(
  tx: optax.GradientTransformationExtraArgs,
  updates: Any,
  state: Any,
  params: Any,
  extra_args: dict[str, Any],
) -> tuple[Any, Any]:
  """One update of a stock transformation.

  Raises:
    ValueError: where it fails, and its state is not of the structure that its `init` makes.
  """
  try:
    return tx.update(updates, state, params, **extra_args)
  except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
    structures: list[Any] = [
      jax.tree.structure(x) for x in (state, jax.eval_shape(tx.init, params))
    ]
    found, wanted = structures
    if found == wanted:
      raise
    raise ValueError(
      f"the state inside has {_states(found)}, but the stock optimizer keeps {_states(wanted)}: it"
      " belongs to another optimizer or other parameters, or is nested in another order. Restore"
      " the state that this optimizer saved, or call tx.init(params)"
    ) from error


def _states(structure: Any) -> str:
  """The named states in a state, as text."""
  names = re.findall(r"namedtuple\[(\w+)\]", str(structure))
  return f"{', '.join(names) or 'no named state'} with {structure.num_leaves} arrays"


def require_leaves(params: Any) -> None:
  """Raises `ValueError`, naming the leaf, for parameters that no optimizer can move."""

  def check(path: str, leaf: Any) -> None:
    fields = (leaf.qvalue, leaf.scale) if is_quantized(leaf) else ()
    if any(not hasattr(field, "shape") for field in fields):
      kinds = " and ".join(type(field).__name__ for field in fields)
      raise ValueError(f"{trees.leaf_name(path)} is a packed array of {kinds}: {_MASK_BY_LEAF}")
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
      raise ValueError(
        f"{trees.leaf_name(path)} holds {leaf.dtype}, which no optimizer can move: keep it beside"
        " the parameters, as flax.nnx.split or equinox.partition do, or mask it with"
        " optax.masked around the whole optimizer"
      )

  trees.map_with_path(check, params, is_leaf=is_quantized)


def require_gradients(updates: Any, params: Any) -> None:
  """Raises `ValueError`, naming the leaf, for gradients that are not those of the dense view."""
  leaves: dict[str, Any] = {}
  trees.map_with_path(leaves.__setitem__, updates, is_leaf=is_quantized)

  def check(path: str, leaf: Any) -> None:
    name, gradient = trees.leaf_name(path), leaves.pop(path, None)
    if gradient is None:
      raise ValueError(
        f"{name} has no gradient, it is None or missing: pass zeros, or leave the leaf out of"
        " parameters and gradients, as optax.masked around the whole optimizer does"
      )
    if is_quantized(gradient):
      raise ValueError(
        f"the gradient of {name} is packed, one of its codes: differentiate the dense view, with"
        " eco_optax.value_and_grad in place of jax.value_and_grad"
      )
    if getattr(gradient, "dtype", None) == jax.dtypes.float0:
      raise ValueError(
        f"{name} holds {leaf.dtype}, which has no gradient: keep it beside the parameters, or mask"
        " it with optax.masked around the whole optimizer"
      )
    if jnp.shape(gradient) != leaf.shape:
      raise ValueError(
        f"the gradient of {name} has shape {jnp.shape(gradient)}, the leaf {leaf.shape}: pass the"
        " gradients of the dense view, as eco_optax.value_and_grad returns them"
      )

  trees.map_with_path(check, params, is_leaf=is_quantized)
  for path in leaves:
    raise ValueError(
      f"there is a gradient of {trees.leaf_name(path)}, which the parameters do not have: pass the"
      " parameters that the gradients are of"
    )


@contextlib.contextmanager
def naming_masks() -> Iterator[None]:
  """Says what to do where a stock transformation has a mask that was made over packed parameters.

  It meets a packed array of flags where the dense view has an array; what JAX says of that names
  the leaf, but not the remedy.
  """
  try:
    yield
  except (TypeError, ValueError) as error:
    seen = " ".join(str(error).split())
    if "pytree structure error" not in seen or QuantizedArray.__name__ not in seen:
      raise
    raise ValueError(
      f"a mask or tree of labels does not fit the dense view of the parameters: {_MASK_BY_LEAF}"
      f" ({seen})"
    ) from error


def require_scalar(name: str, value: Any) -> None:
  """Raises `ValueError` for a hyperparameter that is not one real number, traced or not."""
  try:
    # Booleans are no numbers here.
    kinds = [k for k in (jnp.floating, jnp.integer) if jnp.issubdtype(jnp.result_type(value), k)]
    is_number = jnp.shape(value) == () and bool(kinds)
  except (TypeError, ValueError):
    is_number = False
  if not is_number:
    raise ValueError(
      f"{name} must be a number, got {value!r}: pass a float, or an array of shape ()"
    )


def require_rate(learning_rate: Any) -> None:
  """Raises `ValueError` for a learning rate that is neither a number nor a schedule of numbers."""
  if not callable(learning_rate):
    require_scalar("learning_rate", learning_rate)
    if isinstance(learning_rate, (float, np.generic)) and not np.isfinite(learning_rate):
      raise ValueError(f"learning_rate must be finite, got {learning_rate!r}")
    return
  try:
    rate = jax.eval_shape(learning_rate, jax.ShapeDtypeStruct((), jnp.int32))
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"the schedule learning_rate cannot be asked for the rate of a step, an int32 ({error}): pass"
      " a function of the step count, such as optax.cosine_decay_schedule(…)"
    ) from error
  if jnp.shape(rate) != ():
    raise ValueError(
      f"the schedule learning_rate gives {rate} for a step, not one number: return a scalar, and"
      " give leaves rates of their own by optax.partition inside"
      " eco_optax.error_feedback_to_momentum"
    )


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
