"""The fused step on a mesh: each device takes the step of its own part of a leaf.

A kernel is not partitioned by the compiler. The caller passes the leaf's sharding, and the kernel
runs inside `jax.shard_map`, on local arrays and with the random bits of global indices. Devices
exchange one number for each scale that depends on weights beyond a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from eco_optax.fused.leaf import Leaf, Part, block_columns, matrices
from eco_optax.fused.step import Moments, Step
from eco_optax.quantized_array import QuantizedArray, Rounding

Split = tuple[tuple[str, ...], ...]  # Mesh axes by axis of the leaf.


def split_of(leaf: Leaf, sharding: Any) -> Split | None:
  """How a leaf is split over devices; None where its parts cannot take steps of their own."""
  if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
    return None
  m = matrices(leaf)
  if m is None:
    return None
  shape, granularity = leaf.shape, leaf.weight.format.granularity
  # A layer has the sharding of its stack, without the first axis.
  entries = [*sharding.spec, *[None] * (len(shape) + (leaf.layer is not None))]
  entries = entries[leaf.layer is not None :][: len(shape)]
  if PartitionSpec.UNCONSTRAINED in entries:
    return None
  split = tuple((x,) if isinstance(x, str) else tuple(x or ()) for x in entries)
  width = granularity[1] if isinstance(granularity, tuple) else 1
  width = math.lcm(width, *map(block_columns, leaf.moments))
  units = (*[1] * (len(shape) - 2), m.unit, width)
  for size, unit, axes in zip(shape, units, split, strict=True):
    # Weights that share a scale or a byte stay together.
    if size % (unit * math.prod(sharding.mesh.shape[axis] for axis in axes)):
      return None
  return split


def splits_layers(leaf: Leaf, sharding: Any) -> bool:
  """Whether a leaf lies in a stack whose layers are on different devices."""
  return leaf.in_stack and isinstance(sharding, NamedSharding) and any(tuple(sharding.spec)[:1])


def _sharing(weight: QuantizedArray, split: Split) -> tuple[str, ...]:
  """Mesh axes along which a scale, or a scale of scales, has weights."""
  if weight.format.granularity == "tensor" or weight.format.two_level:
    return split[-2] + split[-1]
  if weight.format.granularity != "channel":
    return ()
  return tuple(axis for k in weight.format.reduce_axes(2) for axis in split[k])


def on_parts(
  take_step: Callable[[Step, Rounding, Leaf], tuple[QuantizedArray, Moments]],
  step: Step,
  rounding: Rounding,
  leaf: Leaf,
  mesh: jax.sharding.Mesh,
  split: Split,
) -> tuple[QuantizedArray, Moments]:
  """`take_step` of each device's part of a leaf.

  Args:
    take_step: takes the step of a part.
    step: as in `step.definition`.
    rounding: as in `step.definition`.
    leaf: the whole.
    mesh: of the devices.
    split: of the leaf over them, see `split_of`.

  Returns:
    As `step.definition`.
  """
  shape, sharing = leaf.shape, _sharing(leaf.weight, split)

  def spec(x: Any) -> PartitionSpec:
    """The leaf's for arrays that have its axes: codes, scales, gradient and moments."""
    if x.ndim < len(shape):
      return PartitionSpec()
    layers = (None,) * (x.ndim - len(shape))  # Of a stack.
    entries = zip(x.shape[len(layers) :], split, strict=True)
    own = ((axes or None) if size > 1 else None for size, axes in entries)
    return PartitionSpec(*layers, *own)

  def on_part(leaf: Leaf) -> tuple[QuantizedArray, Moments]:
    first = tuple(
      jax.lax.axis_index(axes) * np.int32(size) if axes else jnp.zeros([], jnp.int32)
      for size, axes in zip(leaf.shape, split, strict=True)
    )
    return take_step(step, rounding, leaf._replace(part=Part(first, shape, sharing, *split[-2:])))

  context = jax.sharding.get_abstract_mesh()
  return jax.shard_map(
    on_part,
    mesh=mesh if context.empty else context,  # The same, perhaps with axes that are automatic here.
    in_specs=(jax.tree.map(spec, leaf),),
    out_specs=jax.tree.map(spec, leaf.results),
    check_vma=False,
  )(leaf)
