"""An independent account of quantized training in NumPy float64, from the formulas alone.

It shares no code with the library. Grids are sorted tables of values, rounding is a search in a
table, optimizers are plain loops, and their derivatives J, B and P are written out by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

Array = np.ndarray
Tree = Mapping[str, Array]


def _minifloat(mantissa_bits: int, bias: int, codes: int) -> Array:
  """Values of the first `codes` non-negative codes of a minifloat, in order of the code."""
  code = np.arange(codes)
  exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
  subnormal = mantissa * 2.0 ** (1 - bias - mantissa_bits)
  normal = (2**mantissa_bits + mantissa) * 2.0 ** (exponent - bias - mantissa_bits)
  return np.where(exponent == 0, subnormal, normal)


# Non-negative values in order of their code, so that "even" means an even index. E4M3 has all codes
# up to 0x7E (0x7F is NaN), E5M2 all below the exponent of infinity, integers are symmetric.
TABLES = {
  "float8_e4m3fn": _minifloat(3, 7, 0x7F),
  "float8_e5m2": _minifloat(2, 15, 0x7C),
  "float4_e2m1fn": np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]),
  "int8": np.arange(128.0),
  "int4": np.arange(8.0),
}


def neighbours(y: Array, dtype: str) -> tuple[Array, Array]:
  """Indices of the codes around |y|, saturated: table[low] ≤ |y| ≤ table[low + 1]."""
  table = TABLES[dtype]
  magnitude = np.minimum(np.abs(np.asarray(y, np.float64)), table[-1])
  low = np.clip(np.searchsorted(table, magnitude, side="right") - 1, 0, len(table) - 2)
  return low, low + 1


def nearest(y: Array, dtype: str) -> Array:
  """The value of the code nearest to y, ties to the even code, saturated."""
  table = TABLES[dtype]
  y = np.asarray(y, np.float64)
  magnitude = np.minimum(np.abs(y), table[-1])
  low, high = neighbours(y, dtype)
  middle = (table[low] + table[high]) / 2
  even = np.where(low % 2 == 0, low, high)
  index = np.where(magnitude < middle, low, np.where(magnitude > middle, high, even))
  return np.copysign(table[index], y)


def distance_to_tie(y: Array, dtype: str) -> Array:
  """How far |y| is from the midpoint of the two codes around it."""
  table = TABLES[dtype]
  low, high = neighbours(y, dtype)
  return np.abs(np.abs(y) - (table[low] + table[high]) / 2)


def group_max(x: Array, granularity: str | tuple[int, ...], contraction_axis: int = -2) -> Array:
  """Largest magnitude of each group, in x's own shape."""
  magnitude = np.abs(np.asarray(x, np.float64))
  if isinstance(granularity, str):
    axis = tuple(range(-min(2, x.ndim), 0)) if granularity == "tensor" else contraction_axis
    return np.broadcast_to(magnitude.max(axis=axis, keepdims=True), x.shape)
  largest = np.empty(x.shape)
  lead = x.ndim - len(granularity)
  blocks = [n // b for n, b in zip(x.shape[lead:], granularity, strict=True)]
  for index in np.ndindex(*x.shape[:lead], *blocks):
    place = index[:lead] + tuple(
      slice(i * b, (i + 1) * b) for i, b in zip(index[lead:], granularity, strict=True)
    )
    largest[place] = magnitude[place].max()
  return largest


def scales(x: Array, dtype: str, granularity: str | tuple[int, ...], axis: int = -2) -> Array:
  """float32 max/qmax of each weight's group, in x's own shape, never below 2^-126."""
  largest = group_max(x, granularity, axis).astype(np.float32)
  return np.maximum(largest / np.float32(TABLES[dtype][-1]), np.float32(2.0**-126))


@dataclasses.dataclass(frozen=True)
class Quantized:
  """A quantized tensor: values of the codes, scales, what is read back, distance to a tie."""

  codes: Array  # float64 values of the codes.
  scale: Array  # float32, in the tensor's shape.
  scaled: Array  # float64 x / scale, before rounding.

  @property
  def stored(self) -> Array:
    """As it is read back: code × scale, a float32 product."""
    return (self.codes.astype(np.float32) * self.scale).astype(np.float64)


def quantize(x: Array, dtype: str, granularity: str | tuple[int, ...]) -> Quantized:
  """Nearest rounding with scale max/qmax."""
  scale = scales(x, dtype, granularity)
  scaled = np.asarray(x, np.float64) / scale.astype(np.float64)
  return Quantized(nearest(scaled, dtype), scale, scaled)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """An optimizer and its hyperparameters; `rate(t)` is the learning rate of step t = 1, 2, …."""

  rate: Callable[[int], float]
  b1: float = 0.9
  kind: str = "sgdm"  # or "adam"
  share: float = 1.0  # What the momentum of SGD takes of a gradient; 1 − b1 in the paper.
  b2: float = 0.98
  eps: float = 1e-9
  decay: float = 0.0  # Decoupled: u = −η (… + decay · θ̂).
  max_norm: float | None = None


class Run:
  """One training run in float64.

  Methods: "master" (master weights), "naive" (no error feedback), "paper" (Algorithms 2 and 3 as
  printed), "aware" (memory-free with the J of all steps to come, or three quarters of what it
  would be at a constant rate), "exact" (the paper's with e_t stored), "exact_aware" (with J', P').
  """

  def __init__(
    self,
    recipe: Recipe,
    method: str,
    weights: Tree,
    quantized: tuple[str, ...],
    dtype: str,
    granularity: str,
  ):
    self.recipe, self.method, self.t = recipe, method, 0
    self.names, self.dtype, self.granularity = quantized, dtype, granularity
    self.weights = {name: np.asarray(w, np.float64) for name, w in weights.items()}  # θ̂
    zeros = {name: np.zeros(w.shape) for name, w in self.weights.items()}
    self.m, self.v, self.e = dict(zeros), dict(zeros), dict(zeros)
    self.last: dict[str, Quantized] = {}

  def step(self, grads: Tree) -> None:
    """One step with gradients taken at the stored weights."""
    r, self.t = self.recipe, self.t + 1
    t, rate, next_rate = self.t, r.rate(self.t), r.rate(self.t + 1)
    grads = {name: np.asarray(g, np.float64) for name, g in grads.items()}
    if r.max_norm is not None:
      norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
      factor = min(1.0, r.max_norm / norm) if norm > 0 else 1.0
      grads = {name: g * factor for name, g in grads.items()}

    for name, g in grads.items():
      weight, m = self.weights[name], self.m[name]
      if self.method == "master":
        weight = weight + self.e[name]
      if r.kind == "adam":
        m = r.b1 * m + (1 - r.b1) * g
        self.v[name] = r.b2 * self.v[name] + (1 - r.b2) * g**2
        denominator = np.sqrt(self.v[name] / (1 - r.b2**t)) + r.eps
        direction = m / (1 - r.b1**t) / denominator
      else:
        m = r.b1 * m + r.share * g
        denominator, direction = 1.0, m
      proposal = weight - rate * (direction + r.decay * weight)
      self.m[name] = m
      if name not in self.names:
        self.weights[name] = proposal
        continue

      result = quantize(proposal, self.dtype, self.granularity)
      error = proposal - result.stored
      self.m[name] = m + self._injection(name, error, denominator, rate, next_rate)
      self.weights[name], self.e[name], self.last[name] = result.stored, error, result

  def _injection(
    self, name: str, error: Array, denominator: Array, rate: float, next_rate: float
  ) -> Array:
    r, t = self.recipe, self.t
    zero = np.zeros(error.shape)
    if self.method in ("master", "naive") or rate == 0:
      return zero
    correction = (1 - r.b1**t) if r.kind == "adam" else 1.0
    if self.method == "paper":
      return correction / rate * (1 - 1 / r.b1) * denominator * error
    if self.method == "exact":
      return (self.e[name] / rate - error / (rate * r.b1)) * correction * denominator
    if self.method == "aware":
      weight = lambda s: r.b1 ** (s - t - 1) / ((1 - r.b1**s) if r.kind == "adam" else 1.0)
      steps = range(t + 1, t + 1000)
      ahead = sum(weight(s) * r.rate(s) for s in steps)
      ahead = max(ahead, 0.75 * sum(weight(s) * rate for s in steps))
      return -error * denominator / (r.b1 * ahead)
    if next_rate == 0:
      return zero
    next_correction = (1 - r.b1 ** (t + 1)) if r.kind == "adam" else 1.0
    j = -rate * r.b1 / (correction * denominator)
    j_next = -next_rate * r.b1 / (next_correction * denominator)
    p, p_next = 1 - rate * r.decay, 1 - next_rate * r.decay
    return p_next / j_next * error - r.b1 * p / j * self.e[name]
