"""Compressors: what a block of a gradient becomes on the wire, and how much of it is lost.

A compressor works on rows, blocks of a leaf's values one after another, and makes a tuple of arrays
of them, codes and scales, whose bytes are those that are sent. Codes below a byte are packed.

Two constants say what is lost. δ is of a contraction, ω is of an unbiased compressor:

  E‖C(x) − x‖² ≤ (1 − δ) ‖x‖²,  and  E[C(x)] = x with E‖C(x) − x‖² ≤ ω ‖x‖².
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eco_optax import formats
from eco_optax import rounding as rounding_lib

Payload = tuple[jax.Array, ...]

# Below this, arithmetic on CPU and TPU flushes to zero, and a scale of zero would divide by zero.
_SMALLEST_NORMAL = np.float32(2.0**-126)

# A code of so many bits is sent in parts, each of which fills whole bytes.
_PARTS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,)}


@dataclasses.dataclass(frozen=True)
class Compressor:
  """A compressor of rows of float32 values.

  Attributes:
    name: in tables and errors.
    block: values in a row, a multiple of 8; what is smaller is padded with zeros.
    encode: `(rows, bits) → payload`: rows are float32 of shape (m, block), bits are uint32 of shape
      (m, draws) or None, and the payload is a tuple of arrays with a first axis of m.
    decode: `(payload, bits) → rows`; bits matter where `linear` only.
    bytes_per_value: on the wire, scales and indexes included.
    draws: random words per row, 0 for a compressor that draws none.
    delta: δ of the contraction; None if it is none, so that errors must not be fed back.
    omega: ω of an unbiased compressor; None if it is biased.
    linear: whether all workers draw the same bits and the mean of their payloads is the payload of
      their mean: then payloads are summed on the way.
  """

  name: str
  block: int
  encode: Callable[[jax.Array, jax.Array | None], Payload]
  decode: Callable[[Payload, jax.Array | None], jax.Array]
  bytes_per_value: float
  draws: int = 0
  delta: float | None = None
  omega: float | None = None
  linear: bool = False


def pack(codes: jax.Array, bits: int) -> jax.Array:
  """Codes of so many bits in whole bytes, without a bit between them.

  Args:
    codes: uint8 of shape (…, n) below 2^bits, where n is a multiple of 8.
    bits: 1, 2, 3 or 4.

  Returns:
    uint8 of shape (…, n · bits / 8). 3 bits are sent as 2 and 1.

  Example:
    >>> import jax.numpy as jnp
    >>> from eco_optax import wire
    >>> wire.pack(jnp.array([[1, 0, 0, 1, 0, 0, 0, 1]], jnp.uint8), 1)
    Array([[137]], dtype=uint8)
  """
  parts, shift = [], 0
  for width in _PARTS[bits]:
    part = (codes >> np.uint8(shift)) & np.uint8(2**width - 1)
    part = part.reshape(*codes.shape[:-1], 8 // width, codes.shape[-1] * width // 8)
    byte = part[..., 0, :]
    for i in range(1, 8 // width):
      byte = byte | (part[..., i, :] << np.uint8(width * i))
    parts.append(byte)
    shift += width
  return jnp.concatenate(parts, axis=-1)


def unpack(packed: jax.Array, bits: int) -> jax.Array:
  """The codes of `pack`, uint8 of shape (…, n).

  Args:
    packed: from `pack`.
    bits: as there.

  Example:
    >>> import jax.numpy as jnp
    >>> from eco_optax import wire
    >>> wire.unpack(wire.pack(jnp.arange(8, dtype=jnp.uint8), 3), 3)
    Array([0, 1, 2, 3, 4, 5, 6, 7], dtype=uint8)
  """
  n = packed.shape[-1] * 8 // bits
  codes, shift, start = jnp.zeros((*packed.shape[:-1], n), jnp.uint8), 0, 0
  for width in _PARTS[bits]:
    part = packed[..., start : start + n * width // 8]
    digits = [(part >> np.uint8(width * i)) & np.uint8(2**width - 1) for i in range(8 // width)]
    codes = codes | (jnp.concatenate(digits, axis=-1) << np.uint8(shift))
    start, shift = start + part.shape[-1], shift + width
  return codes


def _check_block(block: int) -> None:
  if block < 8 or block % 8:
    raise ValueError(f"block must be a multiple of 8, got {block}: codes fill whole bytes")


def sign(block: int = 256) -> Compressor:
  """One bit per value, and the mean magnitude of each block as its scale.

  C(x) = ‖x‖₁/B · sign(x), and ‖C(x) − x‖² = ‖x‖² − ‖x‖₁²/B exactly: δ = 1/B at worst, where one
  value is all there is, and 2/π = 0.64 for Gaussian values.

  Args:
    block: values that share a scale, a multiple of 8.

  Returns:
    A `Compressor` of 1/8 + 4/block bytes per value.

  Example:
    >>> from eco_optax import wire
    >>> wire.sign().bytes_per_value
    0.140625

  References:
    Karimireddy et al, `Error Feedback Fixes SignSGD <https://arxiv.org/abs/1901.09847>`_, 2019.
  """
  _check_block(block)

  def encode(rows: jax.Array, bits: jax.Array | None) -> Payload:
    del bits
    scale = jnp.mean(jnp.abs(rows), axis=-1, keepdims=True)
    return pack((rows < 0).astype(jnp.uint8), 1), scale

  def decode(payload: Payload, bits: jax.Array | None) -> jax.Array:
    del bits
    packed, scale = payload
    return jnp.where(unpack(packed, 1) == 0, scale, -scale)

  return Compressor(f"sign({block})", block, encode, decode, 1 / 8 + 4 / block, delta=1 / block)


def _scale(rows: jax.Array, largest: float) -> jax.Array:
  """By which a row is divided so that its largest magnitude is the largest code."""
  top = jnp.max(jnp.abs(rows), axis=-1, keepdims=True)
  # A maximum leaves a NaN out on some devices.
  bad = jnp.any(jnp.isnan(rows), axis=-1, keepdims=True)
  return jnp.where(
    bad, np.float32(np.nan), jnp.maximum(top / np.float32(largest), _SMALLEST_NORMAL)
  )


def integers_omega(largest: int, block: int) -> float:
  """ω of rounding stochastically to the integers from −largest to largest.

  (√(1 + (B − 1)/q²) − 1) / 2, and it is reached: one value is the largest, which is a code, and
  B − 1 others are a share 1/(1 + √(1 + (B − 1)/q²)) of a code's spacing from zero.

  Example:
    >>> from eco_optax import wire
    >>> wire.integers_omega(7, 64)
    0.2559289460184544
  """
  return (math.sqrt(1 + (block - 1) / largest**2) - 1) / 2


def integers(bits: int = 4, block: int = 64, unbiased: bool = False) -> Compressor:
  """Integers of 2, 3 or 4 bits, rounded stochastically, with one float32 scale per block.

  Codes are those of `eco.INT4` for 4 bits, ±7; ±3 for 3 and ±1 for 2. With q the largest code and B
  the block, E[C(x)] = x and ω = (√(1 + (B − 1)/q²) − 1)/2: 0.26 for 4 bits, 0.91 for 3 and 3.5 for
  2 of blocks of 64. An error feeds back where ω < 1, with δ = 1 − ω; else values are divided by
  1 + ω, and δ = 1/(1 + ω). These are bounds: of Gaussian values 4 bits lose 0.03, not 0.26.

  Args:
    bits: of a code, 2, 3 or 4.
    block: values that share a scale, a multiple of 8.
    unbiased: whether values are never divided by 1 + ω, as `wire.compressed` needs it.

  Returns:
    A `Compressor` of bits/8 + 4/block bytes per value.

  Example:
    >>> from eco_optax import wire
    >>> wire.integers(4).bytes_per_value
    0.5625
  """
  _check_block(block)
  if bits not in (2, 3, 4):
    raise ValueError(f"bits must be 2, 3 or 4, got {bits}: use wire.sign for 1 and wire.fp8 for 8")
  largest = 2 ** (bits - 1) - 1
  omega = integers_omega(largest, block)
  shrinks = omega >= 1 and not unbiased
  factor = np.float32(1 / (1 + omega) if shrinks else 1.0)

  def encode(rows: jax.Array, random: jax.Array | None) -> Payload:
    assert random is not None
    scale = _scale(rows, largest)
    codes = rounding_lib.round_to_integers(rows / scale, largest, random)
    return pack((codes & np.int32(2**bits - 1)).astype(jnp.uint8), bits), scale * factor

  def decode(payload: Payload, random: jax.Array | None) -> jax.Array:
    del random
    packed, scale = payload
    codes = unpack(packed, bits).astype(jnp.int32)
    codes = (codes << np.int32(32 - bits)) >> np.int32(32 - bits)  # Extends the sign.
    return codes.astype(jnp.float32) * scale

  delta = 1 / (1 + omega) if shrinks else 1 - omega
  return Compressor(
    f"int{bits}({block})",
    block,
    encode,
    decode,
    bits / 8 + 4 / block,
    draws=block,
    delta=delta if delta > 0 else None,
    omega=None if shrinks else omega,
  )


def int4(block: int = 64) -> Compressor:
  """`integers` of 4 bits: two codes of `eco.INT4` in each byte.

  Args:
    block: values that share a scale, a multiple of 8.

  Returns:
    A `Compressor` of 1/2 + 4/block bytes per value.

  Example:
    >>> from eco_optax import wire
    >>> wire.int4().name
    'int4(64)'
  """
  return integers(4, block)


def fp8(block: int = 256) -> Compressor:
  """E4M3 codes, rounded stochastically, with one float32 scale per block.

  Codes are those of `eco.FP8`. Between two codes a and a + u the variance is at most u²/(4a(a + u))
  of a value's square, 1/288 at the foot of each binade; what is below the smallest code adds
  (B − 1)/4 · (2⁻⁹/448)², so that ω = 0.0035.

  Args:
    block: values that share a scale, a multiple of 8.

  Returns:
    A `Compressor` of 1 + 4/block bytes per value.

  Example:
    >>> from eco_optax import wire
    >>> wire.fp8().bytes_per_value
    1.015625
  """
  _check_block(block)
  dtype, largest = formats.FP8.dtype, formats.FP8.max
  omega = 1 / 288 + (block - 1) / 4 * (formats.grid_smallest(dtype) / largest) ** 2

  def encode(rows: jax.Array, random: jax.Array | None) -> Payload:
    scale = _scale(rows, largest)
    return rounding_lib.code_bits(rows / scale, dtype, random).astype(jnp.uint8), scale

  def decode(payload: Payload, random: jax.Array | None) -> jax.Array:
    del random
    codes, scale = payload
    return rounding_lib.decode(codes.astype(jnp.int32), dtype) * scale

  return Compressor(
    f"fp8({block})",
    block,
    encode,
    decode,
    1 + 4 / block,
    draws=block,
    delta=1 - omega,
    omega=omega,
  )


def top_k(count: int = 8, block: int = 256) -> Compressor:
  """The values of largest magnitude of each block, in float32, and their places in it.

  ‖C(x) − x‖² ≤ (1 − k/B) ‖x‖², with equality where all magnitudes are equal: δ = k/B.

  Args:
    count: k, of the values that are kept of each block.
    block: B, a multiple of 8; places are a byte up to blocks of 256, and two up to 65,536.

  Returns:
    A `Compressor` of k · (4 + 1)/B bytes per value, up to blocks of 256.

  Example:
    >>> from eco_optax import wire
    >>> wire.top_k(8, 256).bytes_per_value
    0.15625

  References:
    Stich et al, `Sparsified SGD with Memory <https://arxiv.org/abs/1809.07599>`_, 2018.
  """
  _check_block(block)
  if not 1 <= count <= block <= 2**16:
    raise ValueError(f"count {count} and block {block} must be 1 ≤ count ≤ block ≤ 65536")
  place = jnp.dtype("uint8" if block <= 256 else "uint16")

  def encode(rows: jax.Array, bits: jax.Array | None) -> Payload:
    del bits
    _, index = jax.lax.top_k(jnp.abs(rows), count)
    return jnp.take_along_axis(rows, index, axis=-1), index.astype(place)

  def decode(payload: Payload, bits: jax.Array | None) -> jax.Array:
    del bits
    values, index = payload
    empty = jnp.zeros((values.shape[0], block), jnp.float32)
    rows = jnp.arange(values.shape[0])[:, None]
    return empty.at[rows, index.astype(jnp.int32)].set(values)

  each = 4 + place.itemsize
  name = f"top_k({count} of {block})"
  return Compressor(name, block, encode, decode, count * each / block, delta=count / block)


def random_k(every: int = 32, block: int | None = None, unbiased: bool = False) -> Compressor:
  """One of each `every` neighbouring values, drawn anew in each step, in float32.

  All workers draw the same ones from the seed, so that no index is sent and values are summed on
  the way. Each value is kept with probability p = 1/every, so that δ = p, and ω = every − 1 with
  `unbiased`, which divides by p: the constants of k drawn of all, with k = p · n.

  Args:
    every: how many values one stands for.
    block: values in a row, a multiple of 8 and of `every`; None takes about 256.
    unbiased: whether what is kept is multiplied by `every`. Errors must then not be fed back.

  Returns:
    A `Compressor` of 4/every bytes per value.

  Example:
    >>> from eco_optax import wire
    >>> wire.random_k(32).bytes_per_value
    0.125

  References:
    Stich et al, `Sparsified SGD with Memory <https://arxiv.org/abs/1809.07599>`_, 2018.
  """
  if not 1 <= every <= 2**15:
    raise ValueError(f"every must be between 1 and 32768, got {every}")
  unit = math.lcm(8, every)
  block = unit * max(1, 256 // unit) if block is None else block
  _check_block(block)
  if block % every:
    raise ValueError(f"block must be a multiple of every, got {block} and {every}")
  groups, factor = block // every, np.float32(every if unbiased else 1)

  def chosen(bits: jax.Array | None) -> jax.Array:
    """The place in each group, from the leading bits: ⌊every · U⌋."""
    assert bits is not None
    high, low = bits >> np.uint32(16), bits & np.uint32(0xFFFF)
    # 32 by 16 bits, of which the leading 16 are wanted.
    product = high * np.uint32(every) + ((low * np.uint32(every)) >> np.uint32(16))
    return (product >> np.uint32(16)).astype(jnp.int32)[..., None]

  def encode(rows: jax.Array, bits: jax.Array | None) -> Payload:
    grouped = rows.reshape(-1, groups, every)
    return (jnp.take_along_axis(grouped, chosen(bits), axis=-1)[..., 0] * factor,)

  def decode(payload: Payload, bits: jax.Array | None) -> jax.Array:
    (values,) = payload
    places = jnp.arange(every, dtype=jnp.int32)
    kept = jnp.where(places == chosen(bits), values[..., None], np.float32(0))
    return kept.reshape(-1, block)

  return Compressor(
    f"random_k(1 of {every})",
    block,
    encode,
    decode,
    4 / every,
    draws=groups,
    delta=None if unbiased else 1 / every,
    omega=every - 1.0 if unbiased else None,
    linear=True,
  )


# Compressors of default values by their names in `config.wire`.
COMPRESSORS: dict[str, Callable[[], Compressor]] = {
  "fp8": fp8,
  "int4": int4,
  "int3": lambda: integers(3),
  "int2": lambda: integers(2),
  "sign": sign,
  "top_k": top_k,
  "random_k": random_k,
}
"""Compressors of default values by name, for configs."""


def to_rows(x: Any, block: int) -> jax.Array:
  """An array's values in float32 rows of `block`, the last one filled up with zeros."""
  flat = jnp.ravel(x).astype(jnp.float32)
  return jnp.pad(flat, (0, -flat.size % block)).reshape(-1, block)


def from_rows(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The array of `shape` that `to_rows` made rows of, float32."""
  return rows.ravel()[: math.prod(shape)].reshape(shape)
