"""Formats: what a quantized tensor is (code dtype, granularity, scale)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

# Code dtypes, each with its mantissa bits and the exponent of its smallest normal value. An integer
# is a grid of constant spacing 1, which is what no exponent at all means here.
_FLOATS = {"float8_e4m3fn": (3, -6), "float8_e5m2": (2, -14), "float4_e2m1fn": (1, 0)}
_INTEGERS = ("int8", "int4")
_SCALES = ("float32", "bfloat16", "float8_e8m0fnu", "float8_e4m3fn")

# Weights of an array from which on its bytes count.
LARGE = 512

Granularity = str | tuple[int, ...]
ContractionAxis = Callable[[str, Any], int | tuple[int, ...]]


def _canonical_dtype(dtype: Any, allowed: tuple[str, ...], what: str) -> np.dtype:
  """One `np.dtype` for every spelling, so that equal formats make equal tree definitions."""
  try:
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
  except TypeError:
    name = repr(dtype)
  if name not in allowed:
    raise ValueError(f"unknown {what} {name!r}: use one of {', '.join(allowed)}")
  return np.dtype(getattr(ml_dtypes, name, name))


@dataclasses.dataclass(frozen=True, repr=False)
class Format:
  """What a quantized tensor is: the dtype of its codes and how their scales are laid out.

  A stored weight is `code × scale`. One scale serves one group of weights, and is the group's
  largest magnitude divided by the largest code (448 for E4M3), in float32.

  Attributes:
    dtype: of the codes: `float8_e4m3fn`, `float8_e5m2`, `float4_e2m1fn`, `int8` or `int4`, as a
      name, a NumPy dtype or a `jnp` scalar type. Integers are symmetric (±127, ±7).
    granularity: which weights share a scale. Axes beyond the last two (layers, experts) are always
      separate, so a stack of matrices can be scanned, vmapped or sliced.
      `"tensor"`: one scale per matrix (the last two axes).
      `"channel"`: one scale per output channel; the maximum runs over `contraction_axis`.
      A block shape such as `(128, 128)` or `(32, 1)`: one scale per block of the last axes.
    scale_dtype: `float32`, `bfloat16`, `float8_e8m0fnu` (implies powers of two) or
      `float8_e4m3fn`. The last spans too little by itself, so it brings one more float32 scale per
      matrix, as NVFP4 does.
    power_of_two: take the smallest power of two at which no weight overflows. Dequantizing is then
      exact in bfloat16 too.
    contraction_axis: the axis, or axes, that a `"channel"` scale's maximum runs over: −2 of
      `(…, in, out)`; negative, so that it names the same axis under `vmap`. Or a function of a
      leaf's `/`-joined path and the leaf that says so, such as `eco.contraction.flax`; packed
      leaves have a format with the axes that it said.

  Raises:
    ValueError: for an unknown dtype, granularity or combination, naming the value.

  Example:
    >>> import eco_optax as eco
    >>> eco.Format("float8_e4m3fn", "channel")
    Format('float8_e4m3fn', 'channel')
    >>> eco.Format("float8_e4m3fn", "channel") == eco.FP8
    True
    >>> eco.FP8.max
    448.0

  References:
    Nikdan et al, `ECO: Quantized Training without Full-Precision Master Weights
    <https://arxiv.org/abs/2601.22101>`_, 2026. Open Compute Project, `OCP Microscaling Formats (MX)
    Specification`, 2023.
  """

  dtype: Any
  granularity: Granularity = "channel"
  scale_dtype: Any = "float32"
  power_of_two: bool = False
  contraction_axis: int | tuple[int, ...] | ContractionAxis = -2

  def __post_init__(self):
    put = functools.partial(object.__setattr__, self)
    put("dtype", _canonical_dtype(self.dtype, (*_FLOATS, *_INTEGERS), "dtype of codes"))
    put("scale_dtype", _canonical_dtype(self.scale_dtype, _SCALES, "scale_dtype"))
    put("power_of_two", bool(self.power_of_two) or self.scale_dtype.name == "float8_e8m0fnu")
    granularity = self.granularity
    if not isinstance(granularity, str):
      try:
        granularity = tuple(int(b) for b in granularity)
      except TypeError:
        granularity = ()
    if granularity not in ("tensor", "channel") and (
      isinstance(granularity, str) or not granularity or min(granularity) < 1
    ):
      raise ValueError(
        f"unknown granularity {self.granularity!r}: use 'tensor', 'channel' or a block shape such"
        " as (128, 128)"
      )
    put("granularity", granularity)
    if self.two_level and isinstance(granularity, str):
      raise ValueError(
        f"scale_dtype float8_e4m3fn needs a block shape, got granularity {granularity!r}: its range"
        " is too small to serve without a second scale; use (16, 1) or scale_dtype float32"
      )
    axes = self.contraction_axis
    if callable(axes):
      return
    axes = tuple(sorted(axes)) if isinstance(axes, (tuple, list)) else (int(axes),)
    if not axes or max(axes) >= 0:
      raise ValueError(
        f"contraction_axis must count from the end (negative), got {self.contraction_axis!r}: use"
        " -2 for a kernel of shape (in, out)"
      )
    put("contraction_axis", axes[0] if len(axes) == 1 else axes)

  def __repr__(self) -> str:
    """The call that makes this format, without the defaults."""
    parts = [repr(self.dtype.name), repr(self.granularity)]
    for name, value, default in (
      ("scale_dtype", self.scale_dtype.name, "float32"),
      ("power_of_two", self.power_of_two, self.scale_dtype.name == "float8_e8m0fnu"),
      ("contraction_axis", self.contraction_axis, -2),
    ):
      if value != default:
        parts.append(f"{name}={getattr(value, '__name__', repr(value))}")
    return f"Format({', '.join(parts)})"

  @property
  def bits(self) -> int:
    """Bits per code: 8 or 4."""
    return grid_bits(self.dtype)

  @property
  def max(self) -> float:
    """The largest finite code; integers are symmetric."""
    return grid_max(self.dtype)

  @property
  def two_level(self) -> bool:
    """Whether block scales are themselves codes of a per-matrix float32 scale (NVFP4)."""
    return self.scale_dtype.name == "float8_e4m3fn"

  def reduce_axes(self, ndim: int) -> tuple[int, ...]:
    """The axes that one scale's maximum runs over, for `"tensor"` and `"channel"`."""
    if self.granularity == "tensor":
      return tuple(range(-min(2, ndim), 0))
    return self._axes()

  def _axes(self) -> tuple[int, ...]:
    axes = self.contraction_axis
    if callable(axes):
      raise ValueError(
        f"contraction_axis is a function of path and leaf in {self}: ask format.of(path, leaf)"
      )
    return axes if isinstance(axes, tuple) else (axes,)

  def of(self, path: str, leaf: Any) -> Format:
    """The format of the leaf at `path`: with contraction axes that a function chooses, its own."""
    axes = self.contraction_axis
    if not callable(axes):
      return self
    chosen = axes(path, leaf) if self.granularity == "channel" else -2
    if callable(chosen):
      raise ValueError(f"contraction_axis gives a function for leaf {path!r}: return its axes")
    return dataclasses.replace(self, contraction_axis=chosen)

  @property
  def transposed(self) -> Format:
    """The format of transposed matrices, in which the same weights share a scale.

    Raises:
      ValueError: where a function of path and leaf says which axes are summed over.

    Example:
      >>> import eco_optax as eco
      >>> eco.FP8.transposed, eco.MXFP8.transposed.granularity
      (Format('float8_e4m3fn', 'channel', contraction_axis=-1), (1, 32))
    """
    if isinstance(self.granularity, tuple):
      *lead, rows, columns = (1,) * (2 - len(self.granularity)) + self.granularity
      return dataclasses.replace(self, granularity=(*lead, columns, rows))
    if self.granularity == "tensor":
      return self
    axes = tuple({-2: -1, -1: -2}.get(axis, axis) for axis in self._axes())
    return dataclasses.replace(self, contraction_axis=axes)

  def widened(self, shape: tuple[int, ...]) -> Format:
    """The format whose scales serve more than one weight of an array of `shape`, if there is one.

    Where the contraction axis has one element, as in a kernel `(width, 1, head width)` of a single
    head, each weight would have a scale of its own: then the axis before it is taken too. Small
    arrays, of which nobody counts the bytes, keep to what they were told.
    """
    if self.granularity != "channel" or math.prod(shape) < LARGE:
      return self
    axes = self.reduce_axes(len(shape))
    before = min(axes) - 1
    if len(shape) < -before or any(shape[axis] > 1 for axis in axes):
      return self
    return dataclasses.replace(self, contraction_axis=(before, *axes)).widened(shape)

  def check(self, shape: tuple[int, ...], path: str = "") -> None:
    """Raises `ValueError`, naming the leaf at `path`, if an array of `shape` does not fit."""
    name = f"leaf {path!r}" if path else "the array"
    if not shape or math.prod(shape) == 0:
      raise ValueError(f"{name} of shape {shape} has nothing to quantize: leave it out with where=")
    if self.granularity == "channel":
      if len(shape) < -min(self.reduce_axes(len(shape))):
        raise ValueError(
          f"{name} of shape {shape} has no axis {min(self.reduce_axes(len(shape)))} to share a"
          f" scale over, as {self} asks: use granularity 'tensor' or leave it out with where="
        )
    elif isinstance(self.granularity, tuple):
      block = self.granularity
      tail = shape[-len(block) :]
      if len(shape) < len(block) or any(n % b for n, b in zip(tail, block, strict=True)):
        raise ValueError(
          f"{name} of shape {shape} is not divided by blocks of {block}, as {self} asks: use"
          " another block shape, granularity 'channel', or leave it out with where="
        )


def grid(dtype: np.dtype) -> tuple[int, int | None]:
  """`(mantissa bits, exponent of the smallest normal)` of a code dtype; integers: `(0, None)`."""
  return _FLOATS.get(np.dtype(dtype).name, (0, None))


def grid_bits(dtype: np.dtype) -> int:
  """Bits per code: 8 or 4."""
  return 4 if np.dtype(dtype).name in ("int4", "float4_e2m1fn") else 8


def grid_nan(dtype: np.dtype) -> int | None:
  """The smallest magnitude, as a code's bits, that is NaN; None where there is none."""
  return {"float8_e4m3fn": 0x7F, "float8_e5m2": 0x7D}.get(np.dtype(dtype).name)


def grid_max(dtype: np.dtype) -> float:
  """The largest finite code of `dtype`, symmetric for integers."""
  info = ml_dtypes.iinfo if grid(dtype)[1] is None else ml_dtypes.finfo
  return float(info(dtype).max)


def grid_smallest(dtype: np.dtype) -> float:
  """The smallest code of `dtype` above zero."""
  mantissa, minimum = grid(dtype)
  return 1.0 if minimum is None else 2.0 ** (minimum - mantissa)


def grid_top_step(dtype: np.dtype) -> float:
  """Spacing of the codes just below the largest."""
  mantissa, minimum = grid(dtype)
  if minimum is None:
    return 1.0
  return 2.0 ** (math.floor(math.log2(grid_max(dtype))) - mantissa)


FP8 = Format("float8_e4m3fn", "channel")
"""E4M3 with one float32 scale per output channel: the paper's "row-wise" FP8."""

FP8_E5M2 = Format("float8_e5m2", "channel")
"""E5M2 with one float32 scale per output channel."""

FP8_TOKEN = Format("float8_e4m3fn", "channel", contraction_axis=-1)
"""E4M3 with one float32 scale per token: the paper's activations."""

FP8_E5M2_TOKEN = Format("float8_e5m2", "channel", contraction_axis=-1)
"""E5M2 with one float32 scale per token: cotangents, whose range within a token is wide."""

FP8_BLOCK128 = Format("float8_e4m3fn", (128, 128))
"""E4M3 with one float32 scale per 128 × 128 block."""

INT8 = Format("int8", "channel")
"""Symmetric INT8 with one float32 scale per output channel."""

INT4 = Format("int4", "tensor")
"""Symmetric INT4 with one float32 scale per matrix: the paper's fine-tuning format."""

MXFP8 = Format("float8_e4m3fn", (32, 1), "float8_e8m0fnu")
"""OCP MXFP8: E4M3 in blocks of 32 along the contraction axis, power-of-two scales in one byte."""

MXFP4 = Format("float4_e2m1fn", (32, 1), "float8_e8m0fnu")
"""OCP MXFP4: E2M1 in blocks of 32 along the contraction axis, power-of-two scales in one byte."""

NVFP4 = Format("float4_e2m1fn", (16, 1), "float8_e4m3fn")
"""NVFP4: E2M1 in blocks of 16, E4M3 block scales, one float32 scale per matrix."""
