"""Flax NNX with packed weights: `pack` a model, then train it as with `nnx.Optimizer`.

A packed `nnx.Param` holds codes and reads as floats, so modules need no change. The codes are
dequantized where a module reads them, also inside `nnx.remat` and `nnx.scan`, so that what waits
for the backward pass is codes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

try:
  from flax import nnx
  from flax.nnx import filterlib
except ImportError as error:
  raise ImportError("Flax is not installed: pip install 'eco_optax[nnx]'") from error

from eco_optax import dense_view, explicit_axes, quantized_array, trees, updates
from eco_optax.formats import Format
from eco_optax.quantized_array import QuantizedArray, Rounding, Where, is_quantized

# Parameters of Flax's layers that are no matrices, also where heads or a stack give them two axes.
_NO_MATRICES = ("bias", "embedding", "scale")


class PackedParam(nnx.Param):
  """An `nnx.Param` that holds a `QuantizedArray` and reads as float32; `pack` makes them.

  `kernel[...]`, `kernel.value`, `x @ kernel`, `kernel.shape` and all else that code of modules does
  are those of the dense view; `kernel.get_raw_value()` is what is stored. Assigning floats raises
  `TypeError`.
  """

  def get_value(self, *, index: Any = ...) -> Any:
    """The float32 values, which are made anew for each call."""
    value = _dense(self.get_raw_value())
    return value if index is ... else value[index]

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the floats."""
    return self.get_raw_value().shape

  def set_value(self, value: Any, *, index: Any = ...) -> None:
    """Takes a QuantizedArray; of floats that are but a shape, how they are split."""
    leaf = self.get_raw_value()
    if isinstance(value, jax.ShapeDtypeStruct) and value.sharding and is_quantized(leaf):
      place = lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like)
      value = jax.tree.map(place, leaf, _split(leaf, value.sharding))
    if is_quantized(leaf) and leaf.sink is not None:
      raise TypeError(
        f"a packed parameter of shape {self.shape} is assigned in a function that is differentiated"
        " with respect to it"
      )
    if index is not ... or not is_quantized(value):
      raise TypeError(
        f"a packed parameter of shape {self.shape} takes no floats, for they would be rounded in"
        " silence: assign eco_optax.quantize(…) of them"
      )
    self.set_raw_value(value)

  def replace(self, *args: Any, **changes: Any) -> Any:
    """A copy with another value; `nnx.get_partition_spec` sets how the floats are split."""
    if args and isinstance(args[0], PartitionSpec) and is_quantized(self.get_raw_value()):
      args = (_split(self.get_raw_value(), args[0]),)
    return self.copy(*args, **changes)

  def __getattr__(self, name: str) -> Any:
    metadata = object.__getattribute__(self, "_var_metadata")
    return metadata[name] if name in metadata else getattr(self.get_value(), name)


def _split(leaf: QuantizedArray, like: Any) -> QuantizedArray:
  """How codes and scales are split, in place of them, where the floats are split like this."""
  if isinstance(like, PartitionSpec):
    mesh = jax.sharding.get_abstract_mesh()
    return jax.tree.map(lambda x: explicit_axes.dividing(like, x.shape, mesh), leaf)
  split = lambda x: explicit_axes.dividing(like.spec, x.shape, like.mesh)
  return jax.tree.map(lambda x: NamedSharding(like.mesh, split(x)), leaf)


def _dense(leaf: Any) -> Any:
  """What a module reads, or its shape; trees of other things, such as shardings, as they are."""
  if not is_quantized(leaf):
    return leaf
  if isinstance(leaf.qvalue, jax.ShapeDtypeStruct):
    return jax.eval_shape(QuantizedArray.dequantize, leaf)
  if not isinstance(leaf.qvalue, (jax.Array, np.ndarray)) or leaf.qvalue.dtype == bool:
    return leaf
  return _no_gradient(leaf) if leaf.sink is None else dense_view.dense(leaf)


@jax.custom_jvp
def _no_gradient(leaf: QuantizedArray) -> jax.Array:
  """The float32 values of a leaf that has no gradient."""
  return leaf.dequantize()


@_no_gradient.defjvp
def _refuse_gradient(primals: Any, tangents: Any) -> Any:
  raise TypeError(
    f"a packed parameter of shape {primals[0].shape} is differentiated with respect to its codes:"
    " use eco_optax.nnx.value_and_grad or eco_optax.nnx.grad in place of those of flax.nnx"
  )


@functools.cache
def _packed_type(kind: Any) -> Any:
  """The kind of `nnx.Param` that `kind` is once it is packed, which filters still find."""
  if issubclass(kind, PackedParam):
    return kind
  if kind is nnx.Param:
    return PackedParam
  return type(f"Packed{kind.__name__}", (PackedParam, kind), {})


def _variables(tree: Any, kind: type) -> Iterator[tuple[tuple[Any, ...], Any]]:
  """The variables of one kind, each with its first path."""
  return ((path, x) for path, x in nnx.iter_graph(tree) if isinstance(x, kind))


def _name(path: tuple[Any, ...]) -> str:
  return "/".join(map(str, path))


def _is_variable(x: Any) -> bool:
  return isinstance(x, nnx.Variable)


def _pure(tree: Any) -> Any:
  """What variables hold, in place of them."""
  raw = lambda x: _pure(x.get_raw_value()) if _is_variable(x) else x
  return jax.tree.map(raw, tree, is_leaf=_is_variable)


def _default_where(path: str, leaf: Any) -> bool:
  is_matrix = path.split("/")[-1] not in _NO_MATRICES
  return is_matrix and quantized_array.default_where(path, leaf)


def pack(
  model: Any,
  format: Format,
  where: Where | None = None,
  rounding: Rounding = "nearest",
  key: Any = None,
) -> Any:
  """Packs a model's matrices in place, as `eco.quantize` does those of a tree.

  Args:
    model: an `nnx.Module` or any graph node. Parameters that are shared stay shared.
    format: of the codes, such as `eco.FP8`. For the einsums of `nnx.MultiHeadAttention` it says
      `contraction_axis=eco.contraction.flax`.
    where: called with each parameter's `/`-joined path in the model and its array; true where to
      pack. None takes every `nnx.Param` of floats with at least two axes that is not called `bias`,
      `scale` or `embedding`.
    rounding: `"nearest"` or `"stochastic"`.
    key: a PRNG key or an integer, for stochastic rounding.

  Returns:
    The model itself: its chosen parameters are of type `PackedParam`.

  Raises:
    ValueError: as `eco.quantize`, naming the parameter; for variables that hold references too, and
      for weights under a LoRA of Qwix beside which another parameter has their shape.

  Example:
    >>> from flax import nnx
    >>> import eco_optax as eco, eco_optax.nnx as eco_nnx, jax.numpy as jnp
    >>> model = eco_nnx.pack(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), eco.FP8)
    >>> model.kernel.get_raw_value().qvalue.dtype, model.kernel.dtype, model.bias.dtype
    (dtype(float8_e4m3fn), dtype('float32'), dtype('float32'))
    >>> model(jnp.ones((3, 4))).shape
    (3, 2)
  """
  params = {_name(path): x for path, x in _variables(model, nnx.Param)}

  def is_chosen(path: str, leaf: Any) -> bool:
    if not (where or _default_where)(path, leaf):
      return False
    if any(map(params[path].get_metadata().get, ("ref", "hijax", "has_ref", "is_hijax"))):
      raise ValueError(
        f"{trees.leaf_name(path)} is an nnx.Variable with ref=True or hijax=True, which holds one"
        " array: make it without, or leave it out with where="
      )
    _require_found_by_lora(path, params)
    return True

  arrays = {path: x.get_raw_value() for path, x in params.items()}
  packed = quantized_array.quantize(arrays, format, is_chosen, rounding, key)
  for path, leaf in packed.items():
    if is_quantized(leaf):
      # Not a new variable: the old one may be in several places.
      kind: Any = type(params[path])
      params[path].__class__ = _packed_type(kind)
      params[path].set_raw_value(leaf)
  return model


def _require_found_by_lora(path: str, params: dict[str, Any]) -> None:
  """Raises `ValueError` for a weight whose LoRA Qwix would leave out.

  Qwix looks for the parameter that a product reads. It knows arrays, and values made anew by their
  shape alone; of two candidates it takes neither, and the adapters have no gradient.
  """
  if f"{path}_lora_a" not in params:
    return
  module = path.rpartition("/")[0]
  for other, x in params.items():
    is_beside = other != path and other.rpartition("/")[0] == module
    if is_beside and x.shape == params[path].shape:
      raise ValueError(
        f"{trees.leaf_name(path)} has a LoRA of Qwix, which would not find it once it is packed,"
        f" for {other!r} beside it has its shape {x.shape} too: leave it out with where="
      )


def value_and_grad(
  f: Any = None, *, argnums: Any = 0, has_aux: bool = False, **options: Any
) -> Any:
  """`nnx.value_and_grad` for models with packed parameters.

  Args:
    f: a scalar function of models and other arguments, written for floats. None makes a decorator.
    argnums: which arguments to differentiate with respect to, integers or `nnx.DiffState`, which
      has a filter of variables; one or several.
    has_aux: whether `f` returns `(value, aux)`.
    **options: others of `nnx.value_and_grad`.

  Returns:
    A function that returns `(value, gradients)`: float32 gradients in the state of the parameters.
    Batch statistics, counters of random keys and all other variables change in the models that are
    given to it.

  Raises:
    ValueError: when called, naming the parameter, if one that was packed holds floats.

  Example:
    >>> from flax import nnx
    >>> import eco_optax as eco, eco_optax.nnx as eco_nnx, jax.numpy as jnp
    >>> model = eco_nnx.pack(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), eco.FP8)
    >>> loss, grads = eco_nnx.value_and_grad(lambda model: jnp.sum(model(jnp.ones((3, 4)))))(model)
    >>> grads["kernel"][...]
    Array([[3., 3.],
           [3., 3.],
           [3., 3.],
           [3., 3.]], dtype=float32)
  """
  options |= {"argnums": argnums, "has_aux": has_aux}
  return _of_sinks(nnx.value_and_grad, f, options)


def grad(f: Any = None, *, argnums: Any = 0, has_aux: bool = False, **options: Any) -> Any:
  """`nnx.grad` for models with packed parameters, as `value_and_grad` is for `nnx.value_and_grad`.

  Args:
    f: a scalar function of models and other arguments, written for floats. None makes a decorator.
    argnums: as of `value_and_grad`.
    has_aux: whether `f` returns `(value, aux)`.
    **options: others of `nnx.grad`.

  Returns:
    A function that returns the gradients.

  Raises:
    ValueError: as `value_and_grad`.

  Example:
    >>> from flax import nnx
    >>> import eco_optax as eco, eco_optax.nnx as eco_nnx, jax.numpy as jnp
    >>> model = eco_nnx.pack(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), eco.FP8)
    >>> eco_nnx.grad(lambda model: jnp.sum(model(jnp.ones((3, 4)))))(model)["bias"][...]
    Array([3., 3.], dtype=float32)
  """
  options |= {"argnums": argnums, "has_aux": has_aux}
  return _of_sinks(nnx.grad, f, options)


def _of_sinks(transform: Any, f: Any, options: dict[str, Any]) -> Any:
  """A transformation of Flax that differentiates sinks in place of packed parameters.

  A sink is a float32 array that nothing reads. Inside `f` a parameter has its codes again, beside
  the sink, which takes the gradient of what is read.
  """
  if f is None:
    return lambda f: _of_sinks(transform, f, options)
  transform(f, **options)  # Flax's own checks.
  argnums = options["argnums"]
  argnums = argnums if isinstance(argnums, (tuple, list)) else (argnums,)
  states = (x if isinstance(x, nnx.DiffState) else nnx.DiffState(x, nnx.Param) for x in argnums)
  wanted = {x.argnum: filterlib.to_predicate(x.filter) for x in states}

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    if kwargs:
      bound = inspect.signature(f).bind(*args, **kwargs)
      args, kwargs = bound.args, bound.kwargs
    params = {
      path: x
      for path, x in _variables(args, PackedParam)
      if path[0] in wanted and wanted[path[0]](path[1:], x)
    }
    leaves = {path: _packed_leaf(path[1:], x) for path, x in params.items()}

    @functools.wraps(f)
    def of_sinks(*args: Any, **kwargs: Any) -> Any:
      inner = [(leaves[path], x) for path, x in _variables(args, PackedParam) if path in leaves]
      for leaf, x in inner:
        x.set_raw_value(dataclasses.replace(leaf, sink=x.get_raw_value()))
      out = f(*args, **kwargs)
      for _, x in inner:
        x.set_raw_value(x.get_raw_value().sink)
      return out

    try:
      for path, x in params.items():
        x.set_raw_value(updates.new_sink(leaves[path], jnp.float32))
      return transform(of_sinks, **options)(*args, **kwargs)
    finally:
      for path, x in params.items():
        x.set_raw_value(leaves[path])

  return wrapper


def _packed_leaf(path: tuple[Any, ...], param: PackedParam) -> QuantizedArray:
  """What a packed parameter holds."""
  leaf = param.get_raw_value()
  if not is_quantized(leaf):
    raise ValueError(
      f"{trees.leaf_name(_name(path))} was packed, but holds floats, as from a checkpoint of the"
      " dense view: call eco_optax.nnx.pack on the model again"
    )
  return leaf


class Optimizer(nnx.Optimizer):
  """`nnx.Optimizer` for models with packed parameters.

  Args:
    model: an `nnx.Module` whose matrices were packed by `pack`; others are trained as ever.
    tx: a transformation of this package, such as `eco.adamw(…)`.
    wrt: the filter of the variables to train, such as `nnx.Param`.

  Attributes:
    step: the number of steps.
    tx: the transformation.
    opt_state: its state, in variables.

  Example:
    >>> from flax import nnx
    >>> import eco_optax as eco, eco_optax.nnx as eco_nnx, jax.numpy as jnp
    >>> model = eco_nnx.pack(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), eco.FP8)
    >>> optimizer = eco_nnx.Optimizer(model, eco.adamw(1e-2), wrt=nnx.Param)
    >>> @nnx.jit
    ... def step(model, optimizer, x):
    ...   loss, grads = eco_nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
    ...   optimizer.update(model, grads)
    ...   return loss
    >>> losses = [float(step(model, optimizer, jnp.ones((3, 4)))) for _ in range(20)]
    >>> losses[-1] < losses[0], model.kernel.get_raw_value().qvalue.dtype
    (True, dtype(float8_e4m3fn))
  """

  def __init__(self, model: Any, tx: optax.GradientTransformation, *, wrt: Any, **options: Any):
    def init(params: Any) -> Any:
      state = tx.init(jax.tree.map(_unpacked, params, is_leaf=_is_variable))
      return jax.tree.map(_state_variables, state, is_leaf=_is_variable)

    super().__init__(model, optax.GradientTransformation(init, tx.update), wrt=wrt, **options)
    self.tx = tx

  def update(self, model: Any, grads: Any, /, **kwargs: Any) -> Any:
    """Takes a step: changes the model's parameters and the optimizer's state in place.

    Args:
      model: that the optimizer was made for.
      grads: from `value_and_grad` or `grad` with the same filter.
      **kwargs: further arguments of `tx.update`, such as `gradient_scale=`.

    Returns:
      The updates that were applied, a tree of the filtered parameters.

    Raises:
      ValueError: naming the parameter, if one that was packed holds floats.
    """
    for path, param in _variables(model, PackedParam):
      _packed_leaf(path, param)
    params = _pure(nnx.state(model, self.wrt))
    found, opt_state = self.tx.update(
      _pure(nnx.state(grads, self.wrt)), _pure(self.opt_state), params, **_pure(kwargs)
    )
    nnx.update(model, updates.apply_updates(params, found))
    jax.tree.map(
      lambda variable, value: variable.set_raw_value(value),
      self.opt_state,
      opt_state,
      is_leaf=_is_variable,
    )
    self.step[...] += 1
    return found


def _unpacked(variable: Any) -> Any:
  """A parameter of the kind that gives back what it holds."""
  if not isinstance(variable, PackedParam):
    return variable
  return nnx.Param.from_metadata(variable.get_raw_value(), variable.get_metadata())


def _state_variables(x: Any) -> Any:
  """A variable for each array of a parameter's state, whose shape may be another than its own.

  Flax gives them the metadata of the parameter, and splits them as that says.
  """
  if not _is_variable(x):
    return x
  metadata = x.get_metadata()
  key = "out_sharding" if "out_sharding" in metadata else "sharding_names"
  if not metadata.get(key):
    return jax.tree.map(lambda array: nnx.Param.from_metadata(array, metadata), x.get_raw_value())
  metadata[key] = names = metadata.pop("optimizer_sharding", metadata[key])
  spec: Any = nnx.get_partition_spec(nnx.Param.from_metadata(None, metadata)).get_raw_value()
  mesh = metadata.get("mesh") or jax.sharding.get_abstract_mesh()

  def own(array: Any) -> Any:
    divided = explicit_axes.dividing(spec, array.shape, mesh)
    fitting = tuple(name if axes else None for name, axes in zip(names, divided, strict=False))
    return nnx.Param.from_metadata(array, metadata | {key: fitting})

  return jax.tree.map(own, x.get_raw_value())
