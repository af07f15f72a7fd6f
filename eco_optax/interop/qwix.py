"""Packed leaves as qwix has them, and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eco_optax import trees
from eco_optax.formats import Format
from eco_optax.quantized_array import QuantizedArray, is_quantized, pack
from eco_optax.rounding import to_code_bits


def _qarray() -> Any:
  try:
    from qwix import QArray
  except ImportError as error:
    raise ImportError("qwix is not installed: pip install 'eco_optax[interop]'") from error
  return QArray


def to_qwix(tree: Any) -> Any:
  """The tree with a `qwix.QArray` in place of each packed leaf: the same codes, the same values.

  Scales become float32, and those of two levels one, because a QArray's value has the dtype of its
  scale and it has but one.

  Args:
    tree: of any leaves.

  Returns:
    The same tree; 4-bit codes are unpacked.

  Raises:
    ImportError: without qwix.

  Example:
    >>> import jax.numpy as jnp, eco_optax as eco
    >>> from eco_optax.interop import qwix
    >>> w = eco.quantize(jnp.ones((4, 2)), eco.INT8)
    >>> qwix.to_qwix({"w": w})["w"].scale_tile_shape
    (4, 1)

  References:
    `Qwix <https://github.com/google/qwix>`_.
  """
  make = _qarray()
  return jax.tree.map(
    lambda leaf: make(leaf.codes, leaf.float_scale()) if is_quantized(leaf) else leaf,
    tree,
    is_leaf=is_quantized,
  )


def from_qwix(tree: Any, format: Format | None = None) -> Any:
  """The tree with a packed leaf in place of each `qwix.QArray`: the same codes, the same scales.

  Args:
    tree: of any leaves.
    format: of all of them, such as `MXFP8`, whose scales QArrays have in float32; None takes each
      array's own dtype of codes and of scales, and how these are shared.

  Returns:
    The same tree.

  Raises:
    ImportError: without qwix.
    ValueError: naming the leaf, for a zero point, for codes that no Format has, and where the
      scales are not those of `format`.

  Example:
    >>> import jax.numpy as jnp, qwix as qwix_lib
    >>> from eco_optax.interop import qwix
    >>> w = qwix_lib.quantize(jnp.ones((4, 2)), "float8_e4m3fn", channelwise_axes=[1])
    >>> qwix.from_qwix({"w": w})["w"].format
    Format('float8_e4m3fn', 'channel')
  """
  kind = _qarray()
  is_leaf = lambda leaf: isinstance(leaf, kind)
  return trees.map_with_path(
    lambda path, leaf: _packed(path, leaf, format) if is_leaf(leaf) else leaf,
    tree,
    is_leaf=is_leaf,
  )


def _packed(path: str, x: Any, format: Format | None) -> QuantizedArray:
  name = trees.leaf_name(path)
  if x.zero_point is not None:
    raise ValueError(
      f"{name} has a zero point, and formats here are symmetric: quantize it without"
    )
  tail = tuple(zip(x.qvalue.shape[-2:], x.scale.shape[-2:], strict=True))
  if x.ndim < 2 or any(size % count for size, count in tail):
    raise ValueError(f"{name} of shape {x.shape} with scales of {x.scale.shape} is no matrix")
  found = _format(name, x, tuple(size // count for size, count in tail))
  if format is None:
    format = found
  elif format.two_level or (format.dtype, format.granularity, format.contraction_axis) != (
    found.dtype,
    found.granularity,
    found.contraction_axis,
  ):
    raise ValueError(f"{name} is {found} and cannot be {format}: leave format out")
  # Layers and experts may share a scale there, and have their own here.
  scale = jnp.broadcast_to(x.scale, (*x.shape[:-2], *x.scale.shape[-2:]))
  stored = scale.astype(format.scale_dtype)
  if not bool(jnp.array_equal(stored.astype(jnp.float32), scale.astype(jnp.float32))):
    raise ValueError(f"{name} has scales that {format.scale_dtype} has not: leave format out")
  qvalue, odd = pack(to_code_bits(x.qvalue), format)
  return QuantizedArray(qvalue, stored, format, None, None, odd)


def _format(name: str, x: Any, tile: tuple[int, ...]) -> Format:
  """Of an array whose scales are shared over `tile` of its last two axes."""
  rows, columns = x.shape[-2:]
  scale_dtype = np.dtype(x.scale.dtype).name
  try:
    if tile == (rows, columns):
      return Format(x.qvalue.dtype, "tensor", scale_dtype)
    if tile in ((rows, 1), (1, columns)):
      return Format(x.qvalue.dtype, "channel", scale_dtype, contraction_axis=-2 + (tile[0] == 1))
    return Format(x.qvalue.dtype, tile, scale_dtype)
  except ValueError as error:
    raise ValueError(f"{name}: {error}") from error
