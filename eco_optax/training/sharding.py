"""Where arrays live on a mesh: one table from parameters to axes by name, one to mesh axes.

Under `jax.set_mesh` the constraints below fix layouts that the compiler must not choose. Without a
mesh they do nothing, and everything runs on one device.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor", "expert")

# The mesh axes that each logical axis is split over; other logical axes are not split. An array's
# first axis that `fsdp` divides takes it: outputs of kernels, so that a channel's weights, which
# share a scale, are on one device, and only where they do not divide, inputs.
RULES: dict[str, tuple[str, ...]] = {
  "batch": ("data", "fsdp", "expert"),
  "embed": ("fsdp",),
  "heads": ("tensor", "fsdp"),
  "mlp": ("tensor", "fsdp"),
  "vocabulary": ("tensor",),
  "expert": ("expert",),
}

# Parameters by the end of their path (before the fields of a packed leaf or of a factored moment),
# and their logical axes.
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"embedding", ("vocabulary", "embed")),
  (r"head", ("embed", "vocabulary")),
  (r"(embedding|head)/rows", ("vocabulary", "embed")),
  (r"attention/(query|key|value)/kernel", ("heads", "embed")),
  (r"attention/(query|key|value)/bias", ("heads",)),
  (r"attention/out/kernel", ("embed", "heads")),
  (r"experts/(gate|up)/kernel", ("expert", "mlp", "embed")),
  (r"experts/down/kernel", ("expert", "embed", "mlp")),
  (r"(gate|up)/kernel", ("mlp", "embed")),
  (r"down/kernel", ("embed", "mlp")),
  (r"router", ("embed", None)),
  (r"\w*norm/scale", (None,)),
)
_PATTERNS = tuple(
  (re.compile(rf"(.*/)?{pattern}(/(qvalue|scale|tensor_scale|sink|row|column))?"), axes)
  for pattern, axes in PARAMETERS
)


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh with the axes data, fsdp, tensor and expert.

  Args:
    sizes: of the axes by name. −1 takes the devices that are left; of several axes of −1 `fsdp`
      takes them, or else the first, and the others have size 1.
    devices: in the order of the mesh; None takes all of them.

  Returns:
    The mesh, for `jax.set_mesh`.

  Raises:
    ValueError: for an unknown axis, or sizes whose product is not the number of devices.
  """
  if unknown := set(sizes) - set(AXES):
    raise ValueError(f"unknown mesh axes {sorted(unknown)}: use {', '.join(AXES)}")
  found = np.asarray(jax.devices() if devices is None else devices)
  shape = [sizes.get(axis, 1) for axis in AXES]
  if rest := [axis for axis, n in zip(AXES, shape, strict=True) if n == -1]:
    rest.sort(key=lambda axis: axis != "fsdp")
    for axis in rest[1:]:
      shape[AXES.index(axis)] = 1
    shape[AXES.index(rest[0])] = max(1, found.size // -math.prod(shape))
  if any(n < 1 for n in shape) or math.prod(shape) != found.size:
    given = ", ".join(f"{axis}={n}" for axis, n in zip(AXES, shape, strict=True))
    raise ValueError(
      f"a mesh of {given} does not take {found.size} devices: the product of its axes must be"
      f" {found.size}, and one of them may be -1"
    )
  if devices is None and jax.process_count() == 1:
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))
  return Mesh(found.reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _axes(path: str, ndim: int) -> tuple[str | None, ...]:
  """Logical axes of the leaf at `path` of the parameters or of a tree that contains theirs."""
  for pattern, axes in _PATTERNS:
    if pattern.fullmatch(path):
      return (None,) * (ndim - len(axes)) + axes[max(0, len(axes) - ndim) :]
  return (None,) * ndim


def _spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
  """Mesh axes of each axis, as far as they divide it; `fsdp` is left to a later axis if not."""
  entries: list[Any] = []
  taken: set[str] = set()
  for name, size in zip(axes, shape, strict=True):
    wanted = tuple(a for a in RULES.get(name or "", ()) if mesh.shape[a] > 1 and a not in taken)
    if wanted[-1:] == ("fsdp",) and size > 1 and size % math.prod(mesh.shape[a] for a in wanted):
      wanted = wanted[:-1]
    taken |= {*wanted}  # Also of what is shared along an axis, such as scales: as its weights do.
    is_split = wanted and size % math.prod(mesh.shape[a] for a in wanted) == 0
    entries.append(wanted if is_split else None)
  return PartitionSpec(*entries)


def _names(entry: Any) -> tuple[str, ...]:
  """The mesh axes in an entry of a PartitionSpec."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def shardings(tree: Any, mesh: Mesh) -> Any:
  """A NamedSharding for each array of parameters, of an optimizer's state, or of both.

  Moments, residuals, codes and scales are split as their parameter is, along its name.
  """
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return jax.tree_util.tree_map_with_path(
    lambda path, x: NamedSharding(mesh, _spec(_axes(name(path), len(x.shape)), x.shape, mesh)),
    tree,
  )


def check_sharded(tree: Any, mesh: Mesh, limit_bytes: int) -> None:
  """Raises if a large array would be kept whole on every device of a mesh that splits parameters.

  Args:
    tree: of arrays or shapes.
    mesh: that they are to be placed on.
    limit_bytes: above which an array counts as large.

  Raises:
    ValueError: naming the arrays and their sizes.
  """
  if mesh.shape["fsdp"] * mesh.shape["tensor"] * mesh.shape["expert"] == 1:
    return
  whole = []
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  for (path, x), sharding in zip(leaves, jax.tree.leaves(shardings(tree, mesh)), strict=True):
    size = math.prod(x.shape) * x.dtype.itemsize
    if sharding.is_fully_replicated and size > limit_bytes:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      whole.append(f"{name} {x.dtype}{list(x.shape)} ({size / 2**20:,.0f} MiB)")
  if whole:
    raise ValueError(
      f"{'; '.join(whole)} would be whole on every device: choose mesh sizes that divide its axes,"
      " name it in sharding.PARAMETERS, or raise config.replicated_limit_mib"
    )


def group_by_group(fn: Callable[..., Any]) -> Callable[..., Any]:
  """`fn(params, batch)` for one group of a batch after another, groups split over devices.

  Each group is computed by one device in a program that does not depend on how many devices there
  are, and so are the numbers that come out.

  Args:
    fn: of params, which all groups share, and a tree of arrays with a first axis of rows.

  Returns:
    A function of params and a tree of arrays whose first axis is groups; its outputs are stacked
    along a new axis.
  """

  def alone(params: Any, batch: Any) -> Any:
    return jax.lax.map(lambda group: fn(params, group), batch)

  def over_groups(params: Any, batch: Any) -> Any:
    if (mesh := _mesh()) is None:
      return alone(params, batch)
    split = PartitionSpec(RULES["batch"])
    return jax.shard_map(
      alone, mesh=mesh, in_specs=(PartitionSpec(), split), out_specs=split, check_vma=False
    )(params, batch)

  return over_groups


def sum_groups(tree: Any) -> Any:
  """Sums over the first axis from its first element to its last, whatever devices they are on.

  A sum over devices adds in an order of its own. Here every device gets all groups' values of the
  part that it owns and adds them in their order.
  """

  def ordered(path: tuple, x: jax.Array) -> jax.Array:
    mesh = _mesh()
    if mesh is not None:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      own = _spec(_axes(name, x.ndim - 1), x.shape[1:], mesh)
      x = jax.lax.with_sharding_constraint(x, PartitionSpec(None, *own))
    total = x[0].astype(jnp.float32)
    for i in range(1, x.shape[0]):
      total = total + x[i].astype(jnp.float32)
    return total.astype(x.dtype)

  return jax.tree_util.tree_map_with_path(ordered, tree)


def on_each_device(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """`fn` of a tree of whole, flat arrays, computed by every device.

  So a sum over elements adds in one order, whatever parts and memory layouts they come in.
  """

  def alone(tree: Any) -> Any:
    # The barrier keeps the compiler from adding in the order of the arrays before they were flat.
    return fn(jax.lax.optimization_barrier(jax.tree.map(jnp.ravel, tree)))

  if (mesh := _mesh()) is None:
    return alone
  whole = PartitionSpec()
  return jax.shard_map(alone, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)


def _mesh() -> Any:
  """The mesh in use while tracing; None also where a device is by itself, in a `shard_map`."""
  mesh = jax.sharding.get_abstract_mesh()
  is_alone = set(mesh.axis_types) == {AxisType.Manual}
  return None if mesh.empty or is_alone or set(AXES) - set(mesh.axis_names) else mesh


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """`x` split along the mesh axes of its logical axes."""
  mesh = _mesh()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, _spec(axes, x.shape, mesh))


def on_own_parts(
  fn: Callable[..., Any], axes: Sequence[Sequence[str | None]]
) -> Callable[..., Any]:
  """`fn` of arrays, which each device computes of its own parts of them.

  Args:
    fn: returns an array that has the axes of its first argument.
    axes: logical ones of each argument.
  """

  def of_arrays(*arrays: jax.Array) -> jax.Array:
    if (mesh := _mesh()) is None:
      return fn(*arrays)  # type: ignore[no-any-return]
    specs = tuple(_spec(own, x.shape, mesh) for own, x in zip(axes, arrays, strict=True))
    return jax.shard_map(  # type: ignore[no-any-return]
      fn, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False
    )(*arrays)

  return of_arrays


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, whole: PartitionSpec, own: PartitionSpec) -> jax.Array:
  """`x` whole; its gradient is summed into the parts that devices own, and never whole."""
  del own
  return jax.lax.with_sharding_constraint(x, whole)


_gather.defvjp(
  lambda x, whole, own: (_gather(x, whole, own), None),
  lambda whole, own, _, grad: (jax.lax.with_sharding_constraint(grad, own),),
)


def gather(path: str, tree: Any) -> Any:
  """Parameters as a device computes with them: whole along `fsdp`, split along the others.

  Packed leaves are gathered as codes, which so cross the wire in their own dtype; without this the
  compiler may widen them first.

  Args:
    path: of the tree in the parameters; it may be one layer of a stack.
    tree: parameters.

  Returns:
    The same tree.
  """
  mesh = _mesh()
  if mesh is None:
    return tree

  def gather_leaf(key_path: tuple, x: jax.Array) -> jax.Array:
    name = "/".join([path, jax.tree_util.keystr(key_path, simple=True, separator="/")]).rstrip("/")
    own = _spec(_axes(name, x.ndim), x.shape, mesh)
    others = [tuple(a for a in _names(entry) if a != "fsdp") for entry in own]
    whole = PartitionSpec(*[axes or None for axes in others])
    if name.endswith("/sink"):  # Nothing reads it; its gradient is a kernel's.
      return jax.lax.with_sharding_constraint(x, own)
    return _gather(x, whole, own)

  return jax.tree_util.tree_map_with_path(gather_leaf, tree)


def by_own_experts(
  fn: Callable[..., Any], kernels: Any, primals: Any, *tokens: jax.Array
) -> jax.Array:
  """A function of experts and tokens, computed by each device for the experts that it has.

  Devices that share the experts get each other's tokens, and their outputs are summed. All
  gradients of kernels are summed outside, where they end in the parts that devices own.

  Args:
    fn: of the number of the device's first expert, the number of devices that share the experts,
      kernels, primals and tokens; returns outputs of a shape like the tokens'.
    kernels: a tree of arrays with a first axis of experts, which have no gradient.
    primals: the same, which have one.
    *tokens: arrays with a first axis of sequences.

  Returns:
    The outputs.
  """
  mesh = _mesh()
  split = lambda axis, size: _names(_spec((axis,), (size,), mesh)[0])
  if mesh is None or not (batch := split("batch", tokens[0].shape[0])):
    return fn(0, 1, kernels, primals, *tokens)  # On one device, or of too few sequences to split.
  number = jax.tree.leaves((kernels, primals))[0].shape[0]
  owners = split("expert", number)
  others = tuple(axis for axis in batch if axis not in owners)
  devices, copies = (math.prod(mesh.shape[axis] for axis in axes) for axes in (owners, others))

  def alone(own: jax.Array, kernels: Any, primals: Any, *tokens: jax.Array) -> jax.Array:
    primals = jax.tree.map(lambda x: jnp.squeeze(x, 0), primals)
    if not owners:
      return fn(0, 1, kernels, primals, *tokens)
    tokens = tuple(jax.lax.all_gather(x, owners, tiled=True) for x in tokens)
    y = fn(own[0], devices, kernels, primals, *tokens)
    return jax.lax.psum_scatter(y, owners, scatter_dimension=0, tiled=True)

  # A copy of each primal for each device that has it: their gradients are summed by the compiler,
  # which sums whole ones only where they are needed whole.
  primals = jax.tree.map(lambda x: jnp.broadcast_to(x, (copies, *x.shape)), primals)
  by_owner, by_copy = PartitionSpec(owners), PartitionSpec(others, owners)
  return jax.shard_map(
    alone,
    mesh=mesh,
    in_specs=(by_owner, by_owner, by_copy, *[PartitionSpec(batch)] * len(tokens)),
    out_specs=PartitionSpec(batch),
    axis_names=set(AXES) if mesh.shape["tensor"] == 1 else set(AXES) - {"tensor"},
    check_vma=False,
  )(jnp.arange(number), kernels, primals, *tokens)


def scatter(grads: Any) -> Any:
  """Gradients split as their parameters are, so that sums over devices end in parts."""
  mesh = _mesh()
  if mesh is None:
    return grads
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return jax.tree_util.tree_map_with_path(
    lambda path, g: jax.lax.with_sharding_constraint(
      g, _spec(_axes(name(path), g.ndim), g.shape, mesh)
    ),
    grads,
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of a batch of sequences: the first axis split over all devices that do not share its work."""
  return NamedSharding(mesh, PartitionSpec(RULES["batch"], None))
