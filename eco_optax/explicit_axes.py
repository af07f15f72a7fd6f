"""Computing on meshes with explicit axes, the default of `jax.make_mesh`.

On such a mesh the type of an array says how it is split, and an operation that regroups a split
axis, as into blocks that share a scale, has to be told how to split the result. Inside here axes
are left to the compiler, as on meshes with automatic axes; only the results say where they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def spec_of(x: Any) -> PartitionSpec:
  """How an array is split over explicit axes."""
  return jax.typeof(x).sharding.spec


def spec_like(x: Any, like: Any) -> PartitionSpec:
  """The split of `like`, on all the axes of x that it divides."""
  if x.shape == like.shape:
    return spec_of(like)
  if x.ndim != like.ndim:
    return PartitionSpec()
  return dividing(spec_of(like), x.shape, jax.typeof(like).sharding.mesh)


def dividing(spec: PartitionSpec, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
  """The entries of a split that divide the axes of a shape, and None in place of others."""

  def entry(size: int, axes: Any) -> Any:
    names = (axes,) if isinstance(axes, str) else tuple(axes or ())
    parts = 1
    for name in names:
      parts *= mesh.shape.get(name, 1)
    return axes if size % parts == 0 and size > 1 else None

  return PartitionSpec(*map(entry, shape, spec))


def varying(x: Any) -> frozenset[str]:
  """The axes of an enclosing `shard_map` over which an array may differ from device to device."""
  aval: Any = jax.typeof(x)
  found = getattr(aval, "vma", None)  # Of JAX before 0.10.
  return frozenset(getattr(getattr(aval, "mat", None), "varying", ()) if found is None else found)


def vary_like(x: Any, like: Any) -> Any:
  """`x` as an array that varies over all axes of a `shard_map` over which `like` does.

  JAX does so wherever the two meet, and sums the gradient of x over these axes; but it does not for
  operands of a `jax.custom_vjp`.
  """
  axes = tuple(varying(like) - varying(x))
  if not axes:
    return x
  if hasattr(jax.lax, "pcast"):
    return jax.lax.pcast(x, axes, to="varying")
  return jax.lax.pvary(x, axes)  # type: ignore[attr-defined]


def call(fn: Callable[..., Any], specs: Callable[[Any], Any], *args: Any) -> Any:
  """`fn(*args)`, with axes that are explicit left to the compiler.

  Args:
    fn: a function of trees of arrays.
    specs: of the function's result, the tree of its arrays' PartitionSpecs; called where some axis
      is explicit.
    *args: of `fn`.

  Returns:
    What `fn` returns.
  """
  arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
  explicit = [x for x in arrays if AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types]
  if not explicit:
    return fn(*args)
  mesh = jax.typeof(explicit[0]).sharding.mesh
  types = zip(mesh.axis_names, mesh.axis_types, strict=True)
  automatic = {name: AxisType.Auto for name, kind in types if kind == AxisType.Explicit}

  def enter(x: Any) -> Any:
    is_on_mesh = isinstance(x, jax.Array) and not jax.typeof(x).sharding.mesh.empty
    return jax.sharding.reshard(x, PartitionSpec()) if is_on_mesh else x

  def leave(x: Any, spec: PartitionSpec) -> Any:
    if not isinstance(x, jax.Array):
      return x
    if isinstance(x, jax.core.Tracer) or isinstance(explicit[0], jax.core.Tracer):
      return jax.sharding.reshard(x, NamedSharding(mesh, spec))
    # An array that was made on the way may be on one device only.
    devices: Any = explicit[0].sharding
    return jax.device_put(x, NamedSharding(devices.mesh, spec))

  with jax.sharding.use_abstract_mesh(mesh.update_axis_types(automatic)):
    result = fn(*jax.tree.map(enter, args))
  return jax.tree.map(leave, result, specs(result))
