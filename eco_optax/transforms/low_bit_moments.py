"""low_bit_moments: any optimizer's moments in 8 or 16 bits, second ones as two vectors."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from eco_optax import rounding as rounding_lib
from eco_optax import trees
from eco_optax.lowering import barrier
from eco_optax.quantized_array import is_quantized
from eco_optax.transforms import momentum as momentum_lib
from eco_optax.transforms.factored import factored, is_array
from eco_optax.transforms.momentum import shapes_of
from eco_optax.transforms.packed import (
  Context,
  PackedTransformation,
  require_params,
  require_state,
  run,
)
from eco_optax.transforms.stored_moments import (
  DTYPES,
  SECOND_DTYPES,
  Kind,
  MomentDtype,
  SecondMomentDtype,
  block_axis,
  dtype_name,
  is_factored,
  read,
  store,
)

# Of the random bits with which moments are rounded.
_SEED = 0xBF58476D1CE4E5B9


class LowBitMomentsState(NamedTuple):
  """State of `low_bit_moments`."""

  step: jax.Array  # shape=(), dtype=jnp.int32. Steps taken; it numbers the random bits.
  inner: optax.OptState  # With stored moments.


# Shorter vectors, such as biases and norms' scales, keep float32 moments. These take little memory;
# in few bits they took three quarters of the compile time of a step without stacks.
_LONG_VECTOR = 2**16


def _is_stored(x: Any, dtype: SecondMomentDtype, parameter: Any) -> bool:
  """Whether a moment is stored as asked: floats in two axes or more, or in a long one."""
  if dtype == "float32" or x.size == 0 or not trees.is_float(x):
    return False
  if x.ndim < 2 and x.size < _LONG_VECTOR:
    return False
  return dtype != "factored" or is_factored(parameter)


class MomentStorage(NamedTuple):
  """How an optimizer's moments are stored between its steps, and at which step."""

  mu: MomentDtype  # Of first moments.
  nu: SecondMomentDtype  # Of second moments.
  step: jax.Array  # int32: it numbers the random bits.

  def _dtype(self, kind: Kind) -> SecondMomentDtype:
    return self.mu if kind == "first" else self.nu

  def key(self, path: str) -> jax.Array:
    """Of the random bits of the moment at a path of the optimizer's state."""
    return rounding_lib.stream_key(_SEED, self.step, path)

  def starts(self, state: Any, shapes: Any) -> Any:
    """The state with `rounding.stream_start` in place of moments; shapes are the parameters'."""
    start = lambda path, kind, x: rounding_lib.stream_start(_SEED, path)
    return momentum_lib.map_moments(start, state, shapes)

  def store(
    self,
    state: Any,
    params: Any,
    layer: jax.Array | None = None,
    like: Any = None,
  ) -> Any:
    """The state with float32 moments stored.

    Args:
      state: of the optimizer.
      params: that its moments are of.
      layer: the number of the layer that they are, of stacks of more.
      like: the state that the step read, which tells which moments are stored. None for moments
        before any step, constants as a rule; the layers of a stack are stored one after another
        then, with temporaries of one, in the same codes.
    """
    owner, shapes, is_first = _owners(state, params), shapes_of(params), like is None
    names: dict[str, str] = {}
    if not is_first:
      note = lambda path, kind, x: names.setdefault(path, dtype_name(x))
      momentum_lib.map_moments(note, like, shapes)

    def store_leaf(path: str, kind: Kind, x: jax.Array) -> Any:
      if is_quantized(x):
        raise ValueError(
          f"the optimizer made a packed moment {path!r}, as stock optimizers do of packed"
          " parameters: put eco_optax.error_feedback_to_momentum(optax.adamw(…),"
          " eco_optax.quantize_params()) in its place, or eco_optax.adamw(…)"
        )
      dtype, weight = self._dtype(kind), owner(path)
      is_stored = _is_stored(x, dtype, weight) if is_first else dtype == names[path] != "float32"
      if not is_stored:
        return x
      axis = (True, block_axis(weight.format)) if is_quantized(weight) else ()

      def store_one(x: jax.Array, layer: jax.Array | None) -> Any:
        if is_first:  # XLA would work out a constant's codes as it compiles, for minutes.
          x = barrier(x)
        if dtype == "factored":
          return factored(x)
        bits = rounding_lib.counter_bits(self.key(path), x.shape, layer)
        return store(x, kind, dtype, bits, *axis)

      if not is_first or x.ndim < 3:
        return store_one(x, layer)
      at = lambda i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
      return jax.lax.map(lambda i: store_one(at(i), i), jnp.arange(len(x), dtype=jnp.int32))

    return momentum_lib.map_moments(store_leaf, state, shapes)

  def read(self, state: Any, params: Any) -> Any:
    """The state with stored moments as float32.

    Raises:
      ValueError: naming the moment, where the state is stored in another way.
    """
    owner = _owners(state, params)

    def read_leaf(path: str, kind: Kind, x: Any) -> jax.Array:
      wanted, found = self._dtype(kind), dtype_name(x)
      if found != wanted and not is_array(x) and not _is_stored(x, wanted, owner(path)):
        return x
      if found != wanted:
        raise ValueError(
          f"the moment {path!r} in the state is {found}, but eco_optax.low_bit_moments stores it in"
          f" {wanted}: keep mu= and nu= as long as the state, or call tx.init(params)"
        )
      return read(x)

    return momentum_lib.map_moments(read_leaf, state, shapes_of(params))


def _owners(state: Any, params: Any) -> Callable[[str], Any]:
  """The parameter that the moment at a path of the state belongs to."""
  weights = momentum_lib.flat(params)
  owners = trees.owners(momentum_lib.flat(state), weights)
  return lambda path: weights[owners[path.lstrip("/")] or ""]


def check_moment_dtypes(mu: MomentDtype, nu: SecondMomentDtype) -> None:
  """Raises `ValueError` for what moments cannot be stored in."""
  for name, dtype, known in (("mu", mu, DTYPES), ("nu", nu, SECOND_DTYPES)):
    if dtype not in known:
      raise ValueError(f"{name} must be one of {', '.join(known)}, got {dtype!r}")


def low_bit_moments(
  inner: optax.GradientTransformation,
  mu: MomentDtype = "float8_e4m3fn",
  nu: SecondMomentDtype = "float8_e4m3fn",
) -> optax.GradientTransformationExtraArgs:
  r"""Keeps the moments of any optimizer in 8 or 16 bits between its steps, or second ones factored.

  A step reads the moments as float32, and rounds what the optimizer leaves there stochastically,
  so that small changes survive in the mean: those of a slow average, and the quantization errors
  that `error_feedback_to_momentum` puts there. With FP8 weights and 8-bit moments, training
  without master weights takes 3.1 bytes per parameter instead of 9, or with `nu="factored"` 2.1.

  Codes of matrices are in blocks of 32 rows with scales of powers of two (MXFP8, MXINT8); INT8
  codes of parameters that are not packed, such as an embedding, in blocks of up to 128 along the
  last axis. Of a second moment the square root is stored, rounded so that its square is unbiased;
  what is not zero stays so. Vectors of fewer than 65,536 numbers keep float32 moments. Steps of
  `eco.adamw` and `eco.sgd` read and write moments in the same pass as the weights.

  Args:
    inner: any optimizer, stock or of this package, whole: `eco.adamw(…)`,
      `error_feedback_to_momentum(optax.adamw(…), …)`, `optax.MultiSteps(…)`, `optax.adam(…)`.
    mu: what momenta and other first moments are stored in: `"float8_e4m3fn"`, `"int8"`,
      `"float8_e5m2"`, `"bfloat16"`, or `"float32"` to leave them unchanged.
    nu: what second moments are stored in; or `"factored"`: of a matrix the means of its rows and
      columns, in float32, and no more. A step reads their product over the mean of the matrix, and
      keeps the means of what the optimizer made of it. Matrices are the last two axes, each layer,
      head or expert by itself, of packed parameters, and of others where both have 128 elements or
      more, as of embeddings. Others, such as stacks of norms' scales, stay float32. There is no
      rounding; the last places of means depend on how a matrix is split over devices.

  Returns:
    A `GradientTransformationExtraArgs` whose state has the state of `inner` with such moments in
    it. Around it `layer_by_layer` keeps the float32 copies to those of one layer.

  Raises:
    ValueError: for an unknown dtype, or at `init` if the optimizer has no moments.

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> params = eco.quantize({"w": jnp.ones((128, 128))}, eco.FP8)
    >>> tx = eco.low_bit_moments(eco.adamw(1e-3))
    >>> state = tx.init(params)
    >>> state.inner.inner[0].mu["w"].qvalue.dtype, state.inner.inner[0].nu["w"].qvalue.dtype
    (dtype(float8_e4m3fn), dtype(float8_e4m3fn))

  References:
    Dettmers et al, `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021. Shazeer and Stern, `Adafactor
    <https://arxiv.org/abs/1804.04235>`_, 2018 (factored second moments).
  """
  check_moment_dtypes(mu, nu)

  def init(params: Any) -> LowBitMomentsState:
    step, state = jnp.zeros([], jnp.int32), inner.init(params)
    shapes = shapes_of(params)
    if shapes and not momentum_lib.has_moments(state, shapes):
      raise ValueError(
        f"the optimizer keeps no moments in its {type(state).__name__} that could be stored in few"
        " bits: use it without eco_optax.low_bit_moments"
      )
    stored = MomentStorage(mu, nu, step).store(state, params)
    # Nor does XLA simplify a first step in the same program by what it knows to be zero.
    return LowBitMomentsState(step, barrier(stored))

  def update(
    updates: Any, state: LowBitMomentsState, params: Any, context: Context, **extra_args: Any
  ) -> tuple[Any, LowBitMomentsState]:
    require_params(params)
    require_state(state, LowBitMomentsState, "eco_optax.low_bit_moments")
    moments = MomentStorage(mu, nu, state.step)
    if getattr(inner, "takes_stored_moments", False):
      jax.eval_shape(moments.read, state.inner, params)  # For its errors.
      context = context._replace(moments=moments)
      updates, stored = run(inner, updates, state.inner, params, context, extra_args)
    else:
      unpacked = moments.read(state.inner, params)
      updates, inner_state = run(inner, updates, unpacked, params, context, extra_args)
      stored = moments.store(inner_state, params, context.layer, state.inner)
    step = optax.safe_increment(state.step)
    if context.gradient_scale is not None:
      step = jnp.where(jnp.isfinite(context.gradient_scale), step, state.step)
    return updates, LowBitMomentsState(step, stored)

  if not isinstance(inner, PackedTransformation):

    def stock_update(
      updates: Any,
      state: LowBitMomentsState,
      params: Any = None,
      context: Context | None = None,
      **extra_args: Any,
    ) -> tuple[Any, LowBitMomentsState]:
      return update(updates, state, params, context or Context(), **extra_args)

    return optax.GradientTransformationExtraArgs(init, stock_update)
  if inner.takes_stored_moments:

    def takes_whole(state: LowBitMomentsState, params: Any, _: bool) -> Collection[str]:
      require_state(state, LowBitMomentsState, "eco_optax.low_bit_moments")
      return inner.takes_whole(state.inner, params, True)

    tx = PackedTransformation(init, update, takes_whole)
    tx.skips, tx.steps_in_stacks = inner.skips, inner.steps_in_stacks
    return tx
  return PackedTransformation(init, update)
