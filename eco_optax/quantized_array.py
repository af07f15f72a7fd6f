"""QuantizedArray: low-bit codes and their scales, as one leaf of a parameter tree."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypeGuard

import jax
import jax.extend
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from eco_optax import explicit_axes, flax_state, trees
from eco_optax import rounding as rounding_lib
from eco_optax.formats import LARGE, Format, grid_max, grid_top_step

Rounding = Literal["nearest", "stochastic"]
Where = Callable[[str, Any], bool]

# Below this, arithmetic on CPU and TPU flushes to zero, and a scale of zero would divide by zero.
_SMALLEST_NORMAL = np.float32(2.0**-126)

# What codes may be computed with; trees hold other things too.
_ARRAYS = (jax.Array, np.ndarray, np.generic)

_NO_ARITHMETIC = (
  "a packed array is codes and scales, which cannot be computed with: compute with"
  " eco_optax.dequantize(…) of it, of which eco_optax.value_and_grad gives gradients, multiply by"
  " eco_optax.matmul, and put stock optimizers into eco_optax.chain or"
  " eco_optax.error_feedback_to_momentum"
)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["qvalue", "scale", "tensor_scale", "sink", "guard"],
  meta_fields=["format", "odd", "role"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
  """Codes and scales of one tensor: a frozen pytree whose value is `codes × scale`.

  Leading axes (layers, experts) may be scanned, vmapped, sliced and sharded: all fields have them.

  Values may be read as an array's: `dtype`, `q[i]`, `len(q)`, `astype` and `np.asarray` are those
  of the dense view. Operators, `==` and functions of `jax.numpy` raise a `TypeError`, since JAX
  would differentiate codes: compute with `eco_optax.dequantize` of it.

  Attributes:
    qvalue: codes of `format.dtype` in the tensor's shape. 4-bit codes are packed two to a byte, in
      uint8, along axis −2 (−1 of a vector), even positions in the low half.
    scale: in `format.scale_dtype`, with the tensor's number of axes; 1 on the axes it is shared
      over, or the number of blocks.
    format: what the codes mean (static).
    tensor_scale: float32, one more scale per matrix where `format.two_level`, else None.
    sink: where the gradient of a layer that multiplies the codes directly is collected, see
      `value_and_grad`; None outside of it.
    odd: whether the last packed byte holds one code only (static).
    guard: of an update that takes a parameter's place, see `as_update`; None of a parameter.
    role: a parameter, or an update (static). The two are trees of different structure, so that
      JAX refuses to add one to the other leaf by leaf, as `optax.apply_updates` would.
  """

  qvalue: jax.Array
  scale: jax.Array
  format: Format
  tensor_scale: jax.Array | None = None
  sink: jax.Array | None = None
  odd: bool = False
  role: str = "parameter"
  guard: jax.Array | None = None

  def __post_init__(self) -> None:
    """Raises `TypeError` for fields that only arithmetic on codes and scales can give.

    Tree functions that know nothing of packed leaves, such as `optax.tree.norm`, compute on their
    fields and rebuild the leaf from the results. Fields may be anything else that a tree can hold:
    shardings, masks, shapes, None.
    """
    dtype = self.qvalue.dtype if isinstance(self.qvalue, _ARRAYS) else None
    if dtype is None or not jnp.issubdtype(dtype, jnp.number):
      return
    is_reduced = self.qvalue.ndim == 0
    if is_reduced or (jnp.issubdtype(dtype, jnp.inexact) and dtype != self.format.dtype):
      raise TypeError(
        f"codes of a packed array in {self.format} became {dtype}{list(self.qvalue.shape)}: a tree"
        " function computed on them, not on the values that they stand for. Call it on"
        " eco_optax.dequantize(…), as in optax.tree.norm(eco_optax.dequantize(params)), and put"
        " wrappers such as optax.MultiSteps inside eco_optax.error_feedback_to_momentum"
      )

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the tensor that is stored, not of its packed codes."""
    shape = list(self.qvalue.shape)
    if self.format.bits == 4:
      axis = _pack_axis(len(shape))
      shape[axis] = 2 * shape[axis] - self.odd
    return tuple(shape)

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return self.qvalue.ndim

  @property
  def size(self) -> int:
    """Number of weights."""
    return math.prod(self.shape)

  @property
  def dtype(self) -> np.dtype:
    """float32: of the dense view, and so of its gradient. Codes have `format.dtype`."""
    return np.dtype(np.float32)

  @property
  def nbytes(self) -> int:
    """Bytes of the stored codes and scales."""
    return sum(x.nbytes for x in (self.qvalue, self.scale, self.tensor_scale) if x is not None)

  @property
  def code_bits(self) -> jax.Array:
    """The codes' bit patterns, unpacked: uint8 in the tensor's shape, above 4-bit codes zeros."""
    if self.format.bits == 8:
      return jax.lax.bitcast_convert_type(self.qvalue, jnp.uint8)
    axis = _pack_axis(self.ndim)
    nibbles = jnp.stack([self.qvalue & np.uint8(15), self.qvalue >> np.uint8(4)], axis=axis)
    shape = list(self.qvalue.shape)
    shape[axis] *= 2
    return jax.lax.slice_in_dim(nibbles.reshape(shape), 0, self.shape[axis], axis=axis % self.ndim)

  @property
  def codes(self) -> jax.Array:
    """The codes, unpacked: an array of `format.dtype` in the tensor's shape."""
    if self.format.bits == 8:
      return self.qvalue
    return jax.lax.bitcast_convert_type(self.code_bits.astype(jnp.uint4), self.format.dtype)

  def float_scale(self) -> jax.Array:
    """The float32 factor of the codes, still in the scale's own shape."""
    scale = self.scale.astype(jnp.float32)
    return scale if self.tensor_scale is None else times_scale(self.tensor_scale, scale)

  def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
    """The stored values, `codes × scale` computed in float32.

    Args:
      dtype: of the result.

    Returns:
      An array of the tensor's shape.

    Example:
      >>> import jax.numpy as jnp, eco_optax as eco
      >>> eco.quantize(jnp.array([[0.5, -7.0], [1.0, 3.4]]), eco.INT4).dequantize()
      Array([[ 0., -7.],
             [ 1.,  3.]], dtype=float32)
    """
    if self.sink is not None:
      alone = dataclasses.replace(self, sink=None)
      return _read_for_gradient(self.sink.dtype, alone, self.sink).astype(dtype)
    read = functools.partial(_read, dtype=dtype)
    return explicit_axes.call(read, lambda y: explicit_axes.spec_like(y, self.qvalue), self)

  def astype(self, dtype: Any) -> jax.Array:
    """The stored values as an array of `dtype`, see `dequantize`."""
    return self.dequantize(dtype)

  def __getitem__(self, index: Any) -> jax.Array:
    """Stored values by an index of arrays, float32; nothing can be written this way."""
    return self.dequantize()[index]

  def __len__(self) -> int:
    """Length of the first axis."""
    return self.shape[0]

  def __iter__(self) -> Iterator[jax.Array]:
    """Stored values along the first axis, float32."""
    return iter(self.dequantize())

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    """The stored values for NumPy, float32."""
    if copy is False:
      raise ValueError("the values of a packed array are computed, which no view of memory is")
    return np.asarray(self.dequantize(), dtype)

  def __jax_array__(self) -> jax.Array:
    """Raises `TypeError`: JAX would differentiate codes, which have no gradient."""
    raise TypeError(_NO_ARITHMETIC)

  def __eq__(self, other: Any) -> Any:
    """Whether fields that are no arrays are equal; raises `TypeError` where they are arrays."""
    if isinstance(self.qvalue, _ARRAYS):
      raise TypeError(_NO_ARITHMETIC)
    if not is_quantized(other):
      return NotImplemented
    fields = lambda leaf: [getattr(leaf, field.name) for field in dataclasses.fields(leaf)]
    return fields(self) == fields(other)

  if not TYPE_CHECKING:

    def __getattr__(self, name: str) -> NoReturn:
      """Raises `AttributeError`, with what to do for those that arrays have."""
      remedy = "" if name.startswith("_") else f": {_NO_ARITHMETIC}"
      raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{remedy}")

  def apply_scale(self, y: jax.Array) -> jax.Array:
    """`y × scale` for float32 values of the tensor's shape."""
    return groups_of(self.format, y.shape).times(y, self.float_scale())


def _refuse(*operands: Any) -> NoReturn:
  """Takes the place of operators."""
  raise TypeError(_NO_ARITHMETIC)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"):
  setattr(QuantizedArray, f"__{_name}__", _refuse)
  setattr(QuantizedArray, f"__r{_name}__", _refuse)
for _name in ("neg", "abs", "lt", "le", "gt", "ge"):
  setattr(QuantizedArray, f"__{_name}__", _refuse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _read_for_gradient(dtype: Any, array: QuantizedArray, sink: jax.Array) -> jax.Array:
  """The float32 values of an array; their gradient is the sink's, in its dtype."""
  del dtype, sink
  return array.dequantize()


_read_for_gradient.defvjp(
  # Without the sink, which a checkpoint would keep as an array of zeros.
  lambda dtype, array, sink: (array.dequantize(), None),
  lambda dtype, _, grad: (None, grad.astype(dtype)),
)


@functools.partial(jax.jit, static_argnames="dtype", inline=True)
def _read(array: QuantizedArray, dtype: Any) -> jax.Array:
  """The stored values, see `QuantizedArray.dequantize`."""
  return array.apply_scale(array.codes.astype(jnp.float32)).astype(dtype)


# A guard that was not set to zero.
_ALIVE = np.uint32(0x45434F55)


@functools.cache
def _guard_type(path: str) -> Any:
  """A type of PRNG keys that says, wherever JAX refuses arithmetic on it, what it stands for."""
  return jax.extend.random.define_prng_impl(
    key_shape=(1,),
    seed=lambda seed: seed.astype(jnp.uint32).reshape(1),
    split=lambda key, shape: jnp.broadcast_to(key, (*shape, 1)),
    random_bits=lambda key, width, shape: jnp.zeros(shape, f"uint{width}"),
    fold_in=lambda key, data: key,
    name=f"eco_optax update of {path}",
    tag=(
      f"the new value of {trees.leaf_name(path)}, which is packed: no transformation can change it."
      " Put those that change updates before the quantizer, as in eco_optax.chain(optax.adamw(…),"
      " optax.masked(…), eco_optax.quantize_params()) or as the optimizer of"
      " eco_optax.error_feedback_to_momentum, and apply it by eco_optax.apply_updates"
    ),
  )


def as_update(path: str, leaf: Any) -> Any:
  """A packed leaf as the update that replaces another; other leaves unchanged.

  Arithmetic on codes and scales would be wrong, and nothing in them can tell. An update has a guard
  beside them, an array of a type that has no arithmetic: JAX raises a `TypeError` that names the
  leaf and the remedy. It may be selected and set to zero, as wrappers do to skip a step; zero is
  the update that changes nothing, see `replaced`.
  """
  if not is_quantized(leaf) or leaf.guard is not None:
    return leaf
  guard = jax.random.wrap_key_data(jnp.full((1,), _ALIVE), impl=_guard_type(path))
  role = (
    "update: call eco_optax.apply_updates, not optax.apply_updates; for flax.nnx.Optimizer and"
    " flax.training.TrainState there are eco_optax.nnx.Optimizer and eco_optax.linen.TrainState"
  )
  return dataclasses.replace(leaf, guard=guard, role=role)


def as_parameter(leaf: Any) -> Any:
  """A packed update as a parameter; other leaves unchanged."""
  return dataclasses.replace(leaf, guard=None, role="parameter") if is_quantized(leaf) else leaf


def replaced(old: QuantizedArray, update: QuantizedArray) -> QuantizedArray:
  """The parameter after an update: the update's value, or the old one if that was set to zero."""
  new = as_parameter(update)
  if update.guard is None:
    return new

  choose = lambda new, old, guard: _chosen(new, old, jax.random.key_data(guard))
  old = dataclasses.replace(old, sink=new.sink)
  specs = lambda new: jax.tree.map(explicit_axes.spec_like, new, old)
  return explicit_axes.call(choose, specs, new, old, update.guard)


@functools.partial(jax.jit, inline=True)
def _chosen(new: Any, old: Any, guard: jax.Array) -> Any:
  """The new leaf, or the old one where the guard was set to zero."""
  # A constant in a program that makes the update itself, so that no select is left of it.
  alive = guard[..., 0] == _ALIVE
  select = lambda x, y: jnp.where(alive.reshape(alive.shape + (1,) * (x.ndim - alive.ndim)), x, y)
  return jax.tree.map(select, new, old)


def times_scale(y: jax.Array, scale: jax.Array) -> jax.Array:
  """`y × scale`.

  The select keeps compilers from fusing this product with a following sum into one operation that
  rounds once: the stored value must be the same number wherever it is read.
  """
  return jnp.where(jnp.isnan(scale), scale, y * scale)


def is_quantized(leaf: Any) -> TypeGuard[QuantizedArray]:
  """Whether `leaf` is a QuantizedArray; the `is_leaf` of walks over parameters."""
  return isinstance(leaf, QuantizedArray)


def _pack_axis(ndim: int) -> int:
  return -2 if ndim >= 2 else -1


def pack(code: jax.Array, format: Format) -> tuple[jax.Array, bool]:
  """Codes, see `rounding.code_bits`, as they are stored; whether the last byte holds but one."""
  if format.bits == 8:
    return rounding_lib.from_code_bits(code, format.dtype), False
  axis = _pack_axis(code.ndim) % code.ndim
  nibbles = (code & np.int32(15)).astype(jnp.uint8)
  odd = code.shape[axis] % 2 == 1
  if odd:
    nibbles = jnp.pad(nibbles, [(0, int(a == axis)) for a in range(code.ndim)])
  shape = nibbles.shape
  pairs = nibbles.reshape(*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :])
  low = jax.lax.index_in_dim(pairs, 0, axis + 1, keepdims=False)
  high = jax.lax.index_in_dim(pairs, 1, axis + 1, keepdims=False)
  return low | (high << np.uint8(4)), odd


class Groups(NamedTuple):
  """Which elements of an array, or of a part of it, share a scale.

  Attributes:
    split: a shape of the array in which groups have axes of their own.
    within: the axes of that shape that run inside a group.
    dropped: those of them that stored scales do not have; on the others they are 1.
  """

  split: tuple[int, ...]
  within: tuple[int, ...]
  dropped: tuple[int, ...] = ()

  def largest(self, x: jax.Array) -> jax.Array:
    """Each group's largest magnitude, float32 in the shape of stored scales."""
    largest = largest_magnitude(x.reshape(self.split), self.within, keepdims=True)
    return jax.lax.squeeze(largest, self.dropped) if self.dropped else largest

  def spread(self, scale: jax.Array) -> jax.Array:
    """Stored scales with the axes that make them broadcast against values of shape `split`."""
    return jax.lax.expand_dims(scale, self.dropped) if self.dropped else scale

  def times(
    self,
    y: jax.Array,
    scale: jax.Array,
    product: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
  ) -> jax.Array:
    """`y × scale` for values of the array's shape and stored scales, by `times_scale` if None."""
    product = product or times_scale
    return product(y.reshape(self.split), self.spread(scale)).reshape(y.shape)


def groups_of(format: Format, shape: tuple[int, ...]) -> Groups:
  """The groups of an array that `format.check` accepts."""
  if isinstance(format.granularity, str):
    axes = format.reduce_axes(len(shape))
    return Groups(shape, tuple(sorted(axis % len(shape) for axis in axes)))
  block = format.granularity
  lead = len(shape) - len(block)
  pairs = [(n // b, b) for n, b in zip(shape[lead:], block, strict=True)]
  within = tuple(lead + 2 * i + 1 for i in range(len(block)))
  return Groups((*shape[:lead], *(n for pair in pairs for n in pair)), within, within)


def largest_magnitude(x: jax.Array, axis: tuple[int, ...], keepdims: bool) -> jax.Array:
  """Max |x| in float32, NaN wherever there is one.

  As integers, the bits of magnitudes are in order and NaN is above infinity. A floating-point
  maximum would do, but XLA's drops NaN on CPU.
  """
  bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
  return jax.lax.bitcast_convert_type(jnp.max(bits, axis=axis, keepdims=keepdims), jnp.float32)


def divide(x: jax.Array, divisor: jax.Array | np.float32) -> jax.Array:
  """X / divisor, as IEEE division.

  Compilers turn a division by a constant or by a broadcast value into a product with its
  reciprocal, which is off by an ulp: then a stored tensor would not give its own scale again. A
  divisor that depends on the element cannot be treated so. It is x itself where x is NaN: of a
  constant there, JAX would make an array outside of a scan over layers and keep it for them all.
  """
  return x / jnp.where(jnp.isnan(x), x, divisor)


class Division(NamedTuple):
  """How a device divides as IEEE asks, where `/` alone might round otherwise."""

  divide: Callable[[jax.Array, Any], jax.Array]
  # Values by the scales of a format, which may have a shorter way.
  by_scale: Callable[[jax.Array, jax.Array, Format], jax.Array]


IEEE = Division(divide, lambda x, scale, format: divide(x, scale))


def _largest_scale(format: Format) -> np.float32:
  """The largest scale whose product with the largest code is still finite."""
  limit, codes = np.finfo(np.float32).max, np.float32(format.max)
  scale = np.float32(limit / codes)
  if format.power_of_two:
    return np.float32(2.0 ** np.floor(np.log2(scale)))
  if format.scale_dtype.name == "bfloat16":
    scale = (scale.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
  with np.errstate(over="ignore"):
    while not np.isfinite(scale * codes):
      scale = np.nextafter(scale, np.float32(0))
  return scale


def _smallest_block_scale(format: Format) -> np.float32:
  return np.float32(ml_dtypes.finfo(format.scale_dtype).smallest_normal)


def _round_scale(scale: jax.Array, format: Format, rounding: Rounding) -> jax.Array:
  """float32 scales that `format.scale_dtype` has: nearest, or above under stochastic rounding.

  A scale that is too small makes the largest weight saturate, which to nearest is its own code
  again, but biases a stochastic rounding.
  """
  dtype = format.scale_dtype
  if dtype == np.float32 or format.power_of_two:  # These are exact in all dtypes.
    return scale
  if dtype.name == "bfloat16":
    nearest = scale.astype(dtype).astype(jnp.float32)
    raw = jax.lax.bitcast_convert_type(nearest, jnp.int32)
    up = jax.lax.bitcast_convert_type(raw + np.int32(0x10000), jnp.float32)
  else:
    code = rounding_lib.code_bits(scale, dtype)
    nearest, up = (rounding_lib.decode(code + np.int32(k), dtype) for k in (0, 1))
  if rounding == "stochastic":
    # A scale that was stored before comes back with a few float32 roundings and must stay.
    nearest = jnp.where(nearest * np.float32(1 + 2.0**-20) < scale, up, nearest)
  return jnp.where(jnp.isnan(scale), scale, nearest)


def _nearest_top(format: Format) -> np.float32:
  """The largest magnitude that still comes back as the largest code: half a step beyond it."""
  return np.float32(format.max) + np.float32(grid_top_step(format.dtype) / 2)


def _power_of_two_scale(largest: jax.Array, top: np.float32) -> jax.Array:
  """The smallest power of two that is no less than largest / top, where both are normal."""
  # The exponent of their quotient, rounded up: bits of floats are in order, and their difference
  # exceeds whole exponents as far as the mantissas do.
  over = jax.lax.bitcast_convert_type(largest, jnp.int32) - top.view(np.int32)
  exponent = jnp.clip(((over + np.int32(0x7FFFFF)) >> 23) + 127, 1, 254)
  return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def matrix_scale(whole: jax.Array, format: Format, division: Division = IEEE) -> jax.Array:
  """The `tensor_scale` of a two-level format, from its matrix's largest magnitude."""
  # The product of both scales must not be flushed to zero either.
  floor = _SMALLEST_NORMAL / _smallest_block_scale(format)
  if format.power_of_two:
    # To nearest the largest scale of a block is then 2⁷, and E4M3 has 2⁸ for stochastic rounding.
    scale = _power_of_two_scale(whole, _nearest_top(format)) * np.float32(2.0**-7)
  else:
    scale = division.divide(whole, np.float32(format.max * grid_max(format.scale_dtype)))
  scale = jnp.maximum(scale, floor)
  return jnp.where(jnp.isfinite(whole), scale, np.float32(np.nan))


def group_scale(
  largest: jax.Array,
  unit: jax.Array | None,
  format: Format,
  rounding: Rounding,
  division: Division = IEEE,
) -> jax.Array:
  """Scales, in units of the matrix's scale if that is given.

  Args:
    largest: each group's largest magnitude, float32.
    unit: the `tensor_scale` of a two-level format.
    format: of the codes.
    rounding: of the codes.
    division: of the device.

  Returns:
    float32 scales of largest's shape, exact in `format.scale_dtype`; NaN where the group has a NaN
    or an infinity, which then shows in the whole group: integers have no other way.
  """
  top = np.float32(format.max)
  if format.power_of_two:
    # The smallest power of two at which rounding cannot pass the largest code. With that limit a
    # stored group finds its own scale again.
    if rounding == "nearest":
      top = _nearest_top(format)
    most = _largest_scale(format)
    if unit is None:
      scale = jnp.minimum(_power_of_two_scale(largest, top), most)
    else:
      scale = _power_of_two_scale(division.divide(largest, unit), top)
      scale = jnp.maximum(scale, _smallest_block_scale(format))
      scale = jnp.minimum(scale, division.divide(jnp.asarray(most), unit))
  elif unit is not None:
    # Among subnormal scales a stored block would not find its own scale again.
    scale = jnp.maximum(division.divide(largest, unit * top), _smallest_block_scale(format))
  else:
    scale = jnp.clip(division.divide(largest, top), _SMALLEST_NORMAL, _largest_scale(format))
  scale = jnp.where(jnp.isfinite(largest), scale, np.float32(np.nan))
  return _round_scale(scale, format, rounding)


class Scaled(NamedTuple):
  """A float32 array by its scales."""

  y: jax.Array  # In the array's shape, in the range of the codes.
  scale: jax.Array  # float32 as stored, exact in `format.scale_dtype`; in units of `unit`.
  factor: jax.Array  # float32 that a code is multiplied by, in the scale's shape.


def unit_of(
  x: jax.Array, format: Format, whole: jax.Array | None = None, division: Division = IEEE
) -> jax.Array | None:
  """The `tensor_scale` of a float32 array, None if the format has none.

  Args:
    x: an array that `format.check` accepts.
    format: of the codes.
    whole: the largest magnitude of each matrix, where x has only a part of it.
    division: of the device.
  """
  if not format.two_level:
    return None
  if whole is None:
    whole = largest_magnitude(x, tuple(range(-min(2, x.ndim), 0)), keepdims=True)
  return matrix_scale(whole, format, division)


def scaled(
  x: jax.Array,
  format: Format,
  groups: Groups,
  rounding: Rounding,
  largest: jax.Array | None = None,
  unit: jax.Array | None = None,
  division: Division = IEEE,
) -> Scaled:
  """The scales of a float32 array, and the array divided by them.

  Args:
    x: float32 values.
    format: of the codes.
    groups: of x.
    rounding: of the codes.
    largest: each group's largest magnitude, where x has only a part of the group.
    unit: the `tensor_scale`, see `unit_of`.
    division: of the device.
  """
  largest = groups.largest(x) if largest is None else largest
  scale = group_scale(largest, unit, format, rounding, division)
  factor = scale if unit is None else times_scale(unit, scale)
  y = division.by_scale(x.reshape(groups.split), groups.spread(factor), format)
  return Scaled(y.reshape(x.shape), scale, factor)


# One program where operations one by one would be compiled as twenty; and leaves that are alike are
# traced once.
@functools.partial(jax.jit, static_argnames=("format", "rounding"), inline=True)
def quantize_array(
  x: jax.Array,
  format: Format,
  rounding: Rounding = "nearest",
  bits: jax.Array | None = None,
) -> QuantizedArray:
  """Quantizes one array that `format.check` accepts; `bits` as in `rounding.round_to_codes`."""
  x = x.astype(jnp.float32)
  unit = unit_of(x, format)
  y, scale, _ = scaled(x, format, groups_of(format, x.shape), rounding, unit=unit)
  code = rounding_lib.code_bits(y, format.dtype, bits, format.power_of_two)
  qvalue, odd = pack(code, format)
  return QuantizedArray(qvalue, scale.astype(format.scale_dtype), format, unit, odd=odd)


def seed_of(key: Any) -> int | jax.Array:
  """A PRNG key, an old-style key or an integer as a seed of `rounding.stream_key`."""
  if isinstance(key, (int, np.integer)):
    return int(key)
  if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    return jax.random.bits(key, (), jnp.uint32)
  if key.ndim == 0:
    return key
  return jax.random.bits(jax.random.wrap_key_data(key), (), jnp.uint32)


def default_where(path: str, leaf: Any) -> bool:
  """Every float leaf with at least two axes."""
  del path
  return leaf.ndim >= 2 and (is_quantized(leaf) or trees.is_float(leaf))


def _warn_of_bytes(path: str, leaf: jax.Array, asked: Format, own: Format) -> None:
  """Warns of a large leaf that takes no less than bfloat16 in the format that was asked for."""
  if leaf.size < LARGE:
    return
  like = jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
  packed = jax.eval_shape(lambda x: quantize_array(x, asked), like)
  nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(packed))
  if nbytes < 2 * leaf.size:
    return
  instead = "" if own == asked else f" It is packed in {own} instead."
  warnings.warn(
    f"{trees.leaf_name(path)} of shape {leaf.shape} takes {nbytes / leaf.size:.1f} bytes per weight"
    f" in {asked}, no less than bfloat16: its scales are as many as its codes.{instead} Name the"
    " axes that are summed over by contraction_axis=, as in Format('float8_e4m3fn',"
    " contraction_axis=(-3, -2)) or, by path, contraction_axis=eco_optax.contraction.flax, or leave"
    " it float with where=",
    stacklevel=5,
  )


def quantize(
  tree: Any,
  format: Format,
  where: Where | None = None,
  rounding: Rounding = "nearest",
  key: Any = None,
) -> Any:
  r"""Replaces float leaves of a tree by QuantizedArray leaves.

  .. math:: scale = max|group| / q_{max}, \quad codes = round(x / scale)

  Args:
    tree: a pytree of arrays of any float dtype. A leaf that is packed already is quantized again
      from its stored values: the same codes, if the format is the same.
    format: of the codes, such as `eco.FP8`.
    where: called with each leaf's `/`-joined path and the leaf; true where to quantize. None takes
      every float leaf with at least two axes.
    rounding: `"nearest"` or `"stochastic"`.
    key: a PRNG key or an integer, for stochastic rounding.

  Returns:
    The tree with the chosen leaves as QuantizedArray; the others unchanged.

  Raises:
    ValueError: naming the leaf, if a chosen leaf is not of floats or the format does not fit it; or
      if stochastic rounding lacks a key.

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> params = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
    >>> packed = eco.quantize(params, eco.FP8)
    >>> packed["kernel"].qvalue.dtype, packed["kernel"].scale.shape, packed["bias"].dtype
    (dtype(float8_e4m3fn), (1, 2), dtype('float32'))
  """
  if not isinstance(format, Format):
    raise ValueError(f"format must be an eco_optax.Format such as eco.FP8, got {format!r}")
  if rounding not in ("nearest", "stochastic"):
    raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}")
  if rounding == "stochastic" and key is None:
    raise ValueError("stochastic rounding draws random bits: pass key=, a PRNG key or an integer")
  seed = seed_of(key) if key is not None else 0
  flax_state.register(QuantizedArray)

  def pack(path: str, leaf: Any) -> Any:
    if not hasattr(leaf, "ndim"):
      return leaf
    if not (where or default_where)(path, leaf):
      return leaf
    if is_quantized(leaf):
      leaf = leaf.dequantize()
    if not trees.is_float(leaf):
      raise ValueError(
        f"{trees.leaf_name(path)} holds {leaf.dtype}, only floats can be quantized: leave it out"
        " with where="
      )
    asked = format.of(path, leaf)
    asked.check(leaf.shape, path)
    own = asked.widened(leaf.shape)
    bits = None
    if rounding == "stochastic":
      bits = rounding_lib.counter_bits(rounding_lib.stream_key(seed, 0, path), leaf.shape)
    packed = explicit_axes.call(
      lambda x, bits: quantize_array(x, own, rounding, bits),
      lambda packed: jax.tree.map(lambda x: explicit_axes.spec_like(x, leaf), packed),
      jnp.asarray(leaf),
      bits,
    )
    _warn_of_bytes(path, leaf, asked, own)
    return packed

  return trees.map_with_path(pack, tree, is_leaf=is_quantized)


def dequantize(tree: Any, dtype: Any = jnp.float32) -> Any:
  """The dense view of a tree: QuantizedArray leaves as arrays of `dtype`, other leaves untouched.

  Args:
    tree: a pytree with QuantizedArray leaves anywhere.
    dtype: of the dequantized leaves.

  Returns:
    A tree with one array in place of each QuantizedArray.

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> eco.dequantize({"w": eco.quantize(jnp.ones((2, 2)), eco.FP8)})["w"].dtype
    dtype('float32')
  """
  return jax.tree.map(
    lambda leaf: leaf.dequantize(dtype) if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized
  )
