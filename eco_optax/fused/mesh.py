"""The fused update on a mesh: each device takes the step of its own part of a leaf.

A kernel is not partitioned by the compiler. Who knows where a leaf lies says so, and the kernel
runs inside `jax.shard_map`, on local arrays and with the random bits of global indices; what scales
depend on beyond a part is exchanged, one number for each scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from eco_optax.fused import fused_update as fused
from eco_optax.fused.fused_update import Leaf, Part
from eco_optax.fused.steps import Moments, Step
from eco_optax.quantized_array import QuantizedArray, Rounding

_Split = tuple[tuple[str, ...], ...]  # Mesh axes by axis of the leaf.


def _split(leaf: Leaf, sharding: Any) -> _Split | None:
  """How a leaf is split; None where its parts are no leaves of their own."""
  m = fused.matrices(leaf)
  if m is None or not isinstance(sharding, NamedSharding):
    return None
  shape, granularity = leaf.weight.shape, leaf.weight.format.granularity
  # Of one layer of a stack the sharding is that of the stack, whose first axis is gone.
  entries = [*sharding.spec, *[None] * (len(shape) + (leaf.layer is not None))]
  entries = entries[leaf.layer is not None :][: len(shape)]
  if PartitionSpec.UNCONSTRAINED in entries:
    return None
  split = tuple((x,) if isinstance(x, str) else tuple(x or ()) for x in entries)
  width = granularity[1] if isinstance(granularity, tuple) else 1
  units = (*[1] * (len(shape) - 2), m.unit, width)
  for size, unit, axes in zip(shape, units, split, strict=True):
    # What shares a scale or a byte stays together.
    if size % (unit * math.prod(sharding.mesh.shape[axis] for axis in axes)):
      return None
  return split


def _sharing(weight: QuantizedArray, split: _Split) -> tuple[str, ...]:
  """Mesh axes along which a scale, or a scale of scales, has weights."""
  if weight.format.granularity == "tensor" or weight.format.two_level:
    return split[-2] + split[-1]
  return split[-2] if weight.format.granularity == "channel" else ()


def fused_update(
  step: Step,
  rounding: Rounding,
  leaf: Leaf,
  sharding: Any = None,
  implementation: Callable[..., tuple[QuantizedArray, Moments]] = fused.fused_update,
) -> tuple[QuantizedArray, Moments]:
  """`fused_update.fused_update` of a leaf that may be split over the devices of a mesh.

  Args:
    step: as in `fused_update.definition`.
    rounding: as in `fused_update.definition`.
    leaf: as in `fused_update.definition`.
    sharding: of the leaf's codes, or of the stack that it is one layer of; without a
      `NamedSharding`, or where this would cut a block, a program of several devices keeps to the
      definition.
    implementation: of the step of one part, see `fused_update`.

  Returns:
    As `fused_update.definition`.
  """
  split = _split(leaf, sharding)
  if split is None or sharding.mesh.size == 1:
    return implementation(step, rounding, leaf)
  shape, sharing = leaf.weight.shape, _sharing(leaf.weight, split)

  def spec(x: Any) -> PartitionSpec:
    """That of the leaf for what has its axes: codes, scales, gradient and moments."""
    if x.ndim != len(shape):
      return PartitionSpec()
    entries = zip(x.shape, split, strict=True)
    return PartitionSpec(*((axes or None) if size > 1 else None for size, axes in entries))

  def on_one_device(leaf: Leaf) -> tuple[QuantizedArray, Moments]:
    first = tuple(
      jax.lax.axis_index(axes) * np.int32(size) if axes else jnp.zeros([], jnp.int32)
      for size, axes in zip(leaf.weight.shape, split, strict=True)
    )
    return implementation(step, rounding, leaf._replace(part=Part(first, shape, sharing)))

  return jax.shard_map(
    on_one_device,
    mesh=sharding.mesh,
    in_specs=(jax.tree.map(spec, leaf),),
    out_specs=jax.tree.map(spec, fused.like_results(leaf)),
    check_vma=False,
  )(leaf)
