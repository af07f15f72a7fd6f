"""muon: Muon on quantized weights, whose errors are kept beside them in a byte."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax
import optax.contrib

from eco_optax import trees
from eco_optax.formats import Format
from eco_optax.fused.leaf_by_leaf import leaf_by_leaf
from eco_optax.fused.transformation import gradient_factor
from eco_optax.optimizers import build
from eco_optax.quantized_array import Rounding, Where, is_quantized
from eco_optax.transforms.error_feedback import dense_shapes
from eco_optax.transforms.layer_by_layer import layer_by_layer
from eco_optax.transforms.master_weights import MasterWeightsState, Residual, master_weights
from eco_optax.transforms.packed import (
  Context,
  PackedTransformation,
  float_gradients,
  require_params,
  require_state,
  run,
  scale_gradients,
)
from eco_optax.transforms.quantize_params import quantize_params

Coefficients = tuple[float, float, float]
Preconditioning = Literal["frobenius", "spectral", "aol", "schatten"]

_STOCK = inspect.signature(optax.contrib.muon).parameters
# From Optax 0.2.6 on.
_DIMENSIONS = "muon_weight_dimension_numbers"
_has_dimensions = _DIMENSIONS in _STOCK


class _StoredMoments(PackedTransformation):
  """A transformation that reads and writes moments as `low_bit_moments` stores them."""

  takes_stored_moments = True
  skips = True


class _Matrices(NamedTuple):
  """What Muon takes for matrices, found on whole leaves; a layer of a stack has the same."""

  # By path, `MuonDimensionNumbers` that count axes from the last; None for leaves of AdamW.
  dimensions: dict[str, Any]
  decayed: dict[str, bool]  # By path, whether the weight decay of matrices applies.
  whole: tuple[str, ...]  # Paths of packed stacks whose layers cannot take steps by themselves.


def _is_dimensions(x: Any) -> bool:
  return x is None or type(x).__name__ == "MuonDimensionNumbers"


def _spread(tree: Any, params: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
  """By path of a parameter, the leaf of a tree that the parameters' tree begins with."""
  found: dict[str, Any] = {}
  paths = trees.map_with_path(lambda path, _: path, params)
  note = lambda leaf, part: found.update(dict.fromkeys(jax.tree.leaves(part), leaf))
  jax.tree.map(note, tree, paths, is_leaf=is_leaf)
  return found


def _from_the_last(dimensions: Any, ndim: int) -> Any:
  """Dimension numbers that count axes from the last one."""
  if dimensions is None:
    return None
  axes = [(axis,) if isinstance(axis, int) else tuple(axis) for axis in dimensions]
  return type(dimensions)(*(tuple(axis % ndim - ndim for axis in own) for own in axes))


def _matrices(params: Any, context: Context, dimensions: Any, mask: Any, couples: bool) -> Any:
  """Which leaves are matrices.

  Args:
    params: packed and float, or one layer of them.
    context: of the step.
    dimensions: `muon_weight_dimension_numbers`.
    mask: `weight_decay_mask`.
    couples: whether the step of a layer depends on the others.
  """
  shapes = dense_shapes(params)
  if context.layer is not None:  # Each leaf is one layer of a stack: which, makes no difference.
    stack = lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype)
    shapes = jax.tree.map(stack, shapes)
  chosen = dimensions(shapes) if callable(dimensions) else dimensions
  if chosen is not None:
    by_path = _spread(chosen, shapes, _is_dimensions)
  elif _has_dimensions:
    default = optax.contrib.MuonDimensionNumbers()
    by_path = _spread(jax.tree.map(lambda x: default if x.ndim == 2 else None, shapes), shapes,
                      _is_dimensions)  # fmt: skip
  else:
    by_path = {}
  ndims: dict[str, int] = {}
  trees.map_with_path(lambda path, x: ndims.__setitem__(path, x.ndim), shapes)
  by_path = {path: _from_the_last(x, ndims[path]) for path, x in by_path.items()}

  def is_whole(path: str, leaf: Any) -> bool:
    if not (is_quantized(leaf) and leaf.ndim >= 3):
      return False
    own = by_path.get(path)
    spans_layers = own is not None and -leaf.ndim in (*own[0], *own[1])
    return couples or spans_layers or not _has_dimensions

  whole: list[str] = []
  trees.map_with_path(
    lambda path, leaf: whole.append(path) if is_whole(path, leaf) else None, params,
    is_leaf=is_quantized,
  )  # fmt: skip
  flags = mask(shapes) if callable(mask) else mask
  decayed = {} if flags is None else _spread(flags, shapes)
  return _Matrices(by_path, decayed, tuple(whole))


def _by_path(values: dict[str, Any]) -> Callable[[Any], Any]:
  """A function from parameters, some of them masked, to their values."""
  return lambda params: trees.map_with_path(lambda path, _: values[path], params)


def muon(
  learning_rate: optax.ScalarOrSchedule,
  ns_coeffs: Coefficients | tuple[Coefficients, ...] | str = (3.4445, -4.7750, 2.0315),
  ns_steps: int = 5,
  beta: float = 0.95,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  weight_decay_mask: Any = None,
  mu_dtype: Any = None,
  *,
  nesterov: bool = True,
  adaptive: bool = False,
  preconditioning: Preconditioning = "frobenius",
  adam_b1: float = 0.9,
  adam_b2: float = 0.999,
  adam_eps_root: float = 0.0,
  adam_weight_decay: float = 0.0,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
  muon_weight_dimension_numbers: Any = None,
  consistent_rms: float | None = None,
  max_norm: float | None = None,
  residual: Residual = "int8",
  rounding: Rounding = "nearest",
  seed: int = 0,
  format: Format | None = None,
  where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Muon on quantized weights: `optax.contrib.muon` with its hyperparameters, and a residual.

  Muon's update is the polar factor of its momentum, which does not carry an error back: half of it
  is invisible to the derivative, see `theory.polar_derivative`. So what rounding takes from a
  weight is kept beside it, as `master_weights` keeps it, and Muon's momentum stays Muon's:

  .. math:: \tilde θ = \hat θ + r + u, \quad \hat θ' = q(\tilde θ), \quad r' = \tilde θ - \hat θ'

  The step of a leaf reads its codes, residual and momentum, and writes them, before that of the
  next begins, and a stack is stepped matrix by matrix: GPUs and TPUs hold the float32 arrays of one
  matrix at a time, CPUs those of one layer of each stack. With FP8 codes, an int8 residual and
  `eco.low_bit_moments` around it, training takes 3.06 bytes per parameter.

  Args:
    learning_rate: a number or a schedule.
    ns_coeffs: as in `optax.contrib.muon`.
    ns_steps: as in `optax.contrib.muon`.
    beta: as in `optax.contrib.muon`.
    eps: as in `optax.contrib.muon`.
    weight_decay: as in `optax.contrib.muon`.
    weight_decay_mask: as in `optax.contrib.muon`.
    mu_dtype: as in `optax.contrib.muon`; `eco.low_bit_moments` rounds stochastically instead.
    nesterov: as in `optax.contrib.muon`.
    adaptive: as in `optax.contrib.muon`.
    preconditioning: as in `optax.contrib.muon`, from Optax 0.2.8 on.
    adam_b1: as in `optax.contrib.muon`.
    adam_b2: as in `optax.contrib.muon`.
    adam_eps_root: as in `optax.contrib.muon`.
    adam_weight_decay: as in `optax.contrib.muon`.
    adam_learning_rate: as in `optax.contrib.muon`, from Optax 0.2.6 on.
    muon_weight_dimension_numbers: as in `optax.contrib.muon`, from Optax 0.2.6 on. Without it Muon
      is for leaves with two axes and AdamW for all others, packed or not. For stacks of matrices,
      as `jax.lax.scan` wants them, give `optax.contrib.MuonDimensionNumbers(-2, -1)` to each: then
      each matrix has its own polar factor.
    consistent_rms: as in `optax.contrib.muon`, from Optax 0.2.6 on.
    max_norm: clips the gradients' global norm, if given.
    residual: as in `master_weights`.
    rounding: as in `quantize_params`. Nothing that rounding takes is lost, so that the nearest
      code is the best.
    seed: as in `quantize_params`.
    format: as in `quantize_params`; then the residual must be `"float32"` or `"bfloat16"`.
    where: as in `quantize_params`.

  Returns:
    A `GradientTransformationExtraArgs` with the state of `master_weights` over
    `optax.contrib.muon`. Apply its updates with `eco.apply_updates`. With `gradient_scale=` its
    `update` multiplies gradients by a scalar before all else; one that is not finite skips the
    step: nothing changes, bit for bit.

  Raises:
    ValueError: naming the hyperparameter, if one is not a number, or one that the installed Optax
      does not have; at `init` as `master_weights` and `quantize_params`.

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> params = eco.quantize({"w": jnp.ones((64, 64))}, eco.FP8)
    >>> tx = eco.low_bit_moments(eco.muon(0.02, weight_decay=0.1))
    >>> state = tx.init(params)
    >>> state.inner.residual["w"].dtype, state.inner.inner.inner_states["muon"][0][0].mu["w"].nbytes
    (dtype('int8'), 4224)

  References:
    Jordan et al, `Muon: An optimizer for hidden layers in neural networks
    <https://kellerjordan.github.io/posts/muon/>`_, 2024.
  """
  build.require_numbers(
    learning_rate, ns_steps=ns_steps, beta=beta, eps=eps, weight_decay=weight_decay,
    adam_b1=adam_b1, adam_b2=adam_b2, adam_eps_root=adam_eps_root,
    adam_weight_decay=adam_weight_decay, consistent_rms=consistent_rms, max_norm=max_norm,
  )  # fmt: skip
  if adam_learning_rate is not None:
    build.require_numbers(adam_learning_rate)
  hyperparameters = {
    "learning_rate": learning_rate, "ns_coeffs": ns_coeffs, "ns_steps": ns_steps, "beta": beta,
    "eps": eps, "weight_decay": weight_decay, "mu_dtype": mu_dtype, "nesterov": nesterov,
    "adaptive": adaptive, "adam_b1": adam_b1, "adam_b2": adam_b2, "adam_eps_root": adam_eps_root,
    "adam_weight_decay": adam_weight_decay,
  }  # fmt: skip
  newer = {
    "preconditioning": (preconditioning, "frobenius"),
    "adam_learning_rate": (adam_learning_rate, None),
    "consistent_rms": (consistent_rms, None),
    _DIMENSIONS: (muon_weight_dimension_numbers, None),
  }
  for name, (value, default) in newer.items():
    if name in _STOCK:
      hyperparameters[name] = value
    elif value is not default and value != default:
      raise ValueError(
        f"{name} is {value!r}, which optax.contrib.muon of Optax {optax.__version__} does not take:"
        " leave it out, or install a newer Optax"
      )
  quantizer = quantize_params(format, where, rounding, seed)

  def over(matrices: _Matrices) -> PackedTransformation:
    own = dict(hyperparameters)
    if _has_dimensions:
      own[_DIMENSIONS] = _by_path(matrices.dimensions)
    if matrices.decayed:
      own["weight_decay_mask"] = _by_path(matrices.decayed)
    return master_weights(optax.contrib.muon(**own), quantizer, residual)  # type: ignore[return-value]

  def found(params: Any, context: Context) -> _Matrices:
    return _matrices(params, context, muon_weight_dimension_numbers, weight_decay_mask, adaptive)

  def init(params: Any) -> MasterWeightsState:
    return over(found(params, Context())).init(params)

  def update(
    updates: Any, state: MasterWeightsState, params: Any, context: Context, **extra_args: Any
  ) -> tuple[Any, MasterWeightsState]:
    require_params(params)
    require_state(state, MasterWeightsState, "eco_optax.muon")
    scale = context.gradient_scale
    if max_norm is not None:
      factor = gradient_factor(float_gradients(updates, params), scale, max_norm)
      if scale is None:
        updates = scale_gradients(updates, factor)
      else:
        context = context._replace(gradient_scale=factor)
    matrices = found(params, context)
    tx = over(matrices)

    def with_moments(
      updates: Any, state: Any, params: Any, context: Context, **extra_args: Any
    ) -> tuple[Any, Any]:
      moments = context.moments
      updates, context = context.scale(updates)
      if moments:
        state = moments.read(state, params)
      updates, state = run(tx, updates, state, params, context._replace(moments=None), extra_args)
      return updates, moments.store(state, params, context.layer) if moments else state

    own = PackedTransformation(init, with_moments, lambda *_: matrices.whole)
    steps = leaf_by_leaf(layer_by_layer(own))  # type: ignore[arg-type]
    return run(steps, updates, state, params, context, extra_args)

  def takes_whole(state: MasterWeightsState, params: Any, _: bool) -> list[str]:
    del state
    stacks: list[str] = []
    trees.map_with_path(
      lambda path, leaf: stacks.append(path) if is_quantized(leaf) else None, params,
      is_leaf=is_quantized,
    )  # fmt: skip
    return stacks

  return _StoredMoments(init, update, takes_whole)
