"""Devices that each compute with their own examples, and sum gradients once when all are done.

Left to itself the compiler sums the gradient of each product over the devices, and gathers weights
for each, also inside a loop over micro-batches.

Examples may come in groups, several for a device. What a group makes, and the order in which groups
are summed, then does not depend on how many devices there are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class DataParallel(NamedTuple):
  """How devices share the examples of micro-batches.

  What belongs to examples is split: its arrays have the axes (micro-batches, parts, …), and a part
  is what a device has, or a group.
  """

  mesh: Any
  axes: tuple[str, ...]  # Of the mesh: all that have several devices.
  reduce_dtype: Any  # In which gradients of two axes and more cross the wire.
  groups: int | None  # Parts of a micro-batch that are summed in their order.

  @property
  def size(self) -> int:
    """The number of parts."""
    return self.groups or math.prod(self.mesh.shape[axis] for axis in self.axes)

  @property
  def _split(self) -> PartitionSpec:
    return PartitionSpec(None, self.axes)

  def split(self, x: jax.Array) -> jax.Array:
    """An array of shape (micro-batches, examples, …) as one that is split."""
    x = x.reshape(x.shape[0], self.size, -1, *x.shape[2:])
    return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self._split))

  def _context(self) -> Any:
    """The mesh in use; its axes may have other types than the shardings' mesh."""
    context = jax.sharding.get_abstract_mesh()
    return self.mesh if context.empty else context

  def tracing(self) -> contextlib.AbstractContextManager[Any]:
    """A context for tracing one device's own computation."""
    mesh = self._context()
    mesh = getattr(mesh, "abstract_mesh", mesh)
    manual = dict.fromkeys(mesh.axis_names, AxisType.Manual)
    return jax.sharding.use_abstract_mesh(mesh.update_axis_types(manual))

  def alike(self, fn: Callable[[Any], Any], shared: Any) -> Any:
    """`fn` of shared operands, computed by every device."""
    whole = PartitionSpec()
    how = {"mesh": self._context(), "in_specs": whole, "out_specs": whole, "check_vma": False}
    return jax.shard_map(fn, **how)(shared)

  def each(
    self,
    fn: Callable[[Any, Any], tuple[dict[Any, jax.Array], Any]],
    specs: dict[Any, PartitionSpec],
    shared: Any,
    own: Any,
  ) -> tuple[dict[Any, jax.Array], Any]:
    """What each device makes of operands that all share, and of its own.

    Args:
      fn: (shared operands, own ones without the axis of parts) → (arrays to sum over the parts, own
        results).
      specs: of the sums, by name.
      shared: a tree of arrays, which each device gathers once, in their own dtypes.
      own: a tree of arrays that are split.

    Returns:
      The sums, in their own dtypes, split as `specs` says; and the own results, split.
    """

    def alone(shared: Any, own: Any) -> tuple[dict[Any, jax.Array], Any]:
      sums, found = fn(shared, jax.tree.map(lambda x: jnp.squeeze(x, 1), own))
      sums = {name: self._sum(x, specs[name]) for name, x in sums.items()}
      return sums, jax.tree.map(lambda x: jnp.expand_dims(x, 1), found)

    def by_group(shared: Any, own: Any) -> tuple[dict[Any, jax.Array], Any]:
      groups = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), own)
      sums, found = jax.lax.map(lambda own: fn(shared, own), groups)
      sums = {name: self._sum_in_order(x, specs[name]) for name, x in sums.items()}
      return sums, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)

    return jax.shard_map(  # type: ignore[no-any-return]
      by_group if self.groups else alone,
      mesh=self._context(),
      in_specs=(PartitionSpec(), self._split),
      out_specs=(specs, self._split),
      check_vma=False,
    )(shared, own)

  def whole(self, fn: Callable[[Any], Any], tree: Any) -> Any:
    """`fn` of a tree of arrays that are summed: with groups by every device, in one order."""
    if not self.groups:
      return fn(tree)
    # The barrier keeps the compiler from adding in the order of the parts.
    return self.alike(lambda tree: fn(jax.lax.optimization_barrier(tree)), tree)

  def _on_the_wire(self, x: jax.Array, axes: int) -> jax.Array:
    # Vectors, such as scales of norms, cost nothing.
    return x.astype(self.reduce_dtype) if axes > 1 else x

  def _sum_in_order(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """A device's part of the sum over the first axis, which has all devices' groups."""
    groups = jax.lax.all_gather(self._on_the_wire(x, x.ndim - 1), self.axes, tiled=True)
    for i, entry in enumerate(spec, 1):
      if entry:
        names = (entry,) if isinstance(entry, str) else entry
        size = groups.shape[i] // math.prod(self.mesh.shape[axis] for axis in names)
        first = jax.lax.axis_index(names) * size
        groups = jax.lax.dynamic_slice_in_dim(groups, first, size, i)
    total = groups[0].astype(jnp.float32)
    for group in groups[1:]:
      total = total + group.astype(jnp.float32)
    return total.astype(x.dtype)

  def _sum(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """A device's part of the sum over all."""
    total = self._on_the_wire(x, x.ndim)
    rest = list(self.axes)
    for i, entry in enumerate(spec):
      names = (entry,) if isinstance(entry, str) else tuple(entry or ())
      if names := tuple(axis for axis in names if axis in rest):
        total = jax.lax.psum_scatter(total, names, scatter_dimension=i, tiled=True)
        rest = [axis for axis in rest if axis not in names]
    if rest:
      total = jax.lax.psum(total, tuple(rest))
    return total.astype(x.dtype)


def data_parallel(
  shardings: Sequence[NamedSharding],
  batch_axes: Sequence[str],
  reduce_dtype: Any,
  groups: int | None,
) -> DataParallel:
  """How the devices of a mesh share examples.

  Args:
    shardings: of parameters.
    batch_axes: mesh axes that examples are split over.
    reduce_dtype: of gradients as they cross the wire.
    groups: see `DataParallel`.

  Raises:
    ValueError: naming the axis, if the mesh has an axis that examples are not split over; or if
      devices cannot share the groups evenly.
  """
  if not shardings:
    raise ValueError("batch_axes needs the parameters' shardings, which say what mesh they are of")
  mesh = shardings[0].mesh
  if unknown := set(batch_axes) - set(mesh.axis_names):
    raise ValueError(f"batch_axes {sorted(unknown)} are none of the mesh's axes {mesh.axis_names}")
  for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
    if mesh.shape[axis] > 1 and axis not in batch_axes:
      raise ValueError(
        f"batch_axes {tuple(batch_axes)} lack the mesh axis {axis!r} of {mesh.shape[axis]} devices:"
        " examples have to be split over all of the mesh; without batch_axes the compiler splits"
        " the loss over any mesh"
      )
    if kind == AxisType.Explicit:
      raise ValueError(f"batch_axes need axes of type Auto, but mesh axis {axis!r} is Explicit")
  # Groups are computed by the same program on one device.
  axes = tuple(axis for axis in batch_axes if groups or mesh.shape[axis] > 1)
  found = DataParallel(mesh, axes, jnp.dtype(reduce_dtype), None)
  if groups is not None and (groups < 1 or groups % found.size):
    raise ValueError(
      f"reduction_groups {groups} is not a multiple of the {found.size} devices that share them"
    )
  return found._replace(groups=groups)
