"""Peaks of chips, from their vendors' data sheets. A new chip is one more line of `CHIPS`."""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
  """One device as JAX counts them."""

  name: str
  bytes: int  # Of high-bandwidth memory.
  flops: float  # Dense bfloat16 operations per second.


_GB = 10**9

# By the start of `jax.Device.device_kind`; the longest that fits counts.
CHIPS: dict[str, Chip] = {
  "TPU v4": Chip("TPU v4", 32 * 2**30, 275e12),
  "TPU v5 lite": Chip("TPU v5e", 16 * 2**30, 197e12),
  "TPU v5": Chip("TPU v5p", 95 * 2**30, 459e12),
  "TPU v6 lite": Chip("TPU v6e", 32 * 2**30, 918e12),
  "TPU7x": Chip("TPU7x core", 96 * 2**30, 1153.5e12),  # A chip has two.
  "NVIDIA A100": Chip("A100", 80 * _GB, 312e12),
  "NVIDIA H100": Chip("H100", 80 * _GB, 989e12),
  "NVIDIA H200": Chip("H200", 141 * _GB, 989e12),
  "NVIDIA B200": Chip("B200", 180 * _GB, 2250e12),
}


def chip(device_kind: str) -> Chip | None:
  """The chip of a `jax.Device.device_kind`, or None where it is not known."""
  fits = [kind for kind in CHIPS if device_kind.startswith(kind)]
  return CHIPS[max(fits, key=len)] if fits else None
