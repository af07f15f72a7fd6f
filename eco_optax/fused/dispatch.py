"""Takes a leaf's fused step by the kernel that suits the device.

A device by itself runs the step as a kernel that touches memory as little as that device allows.
Where no kernel fits, and in programs of several devices that were not told their parts of the leaf
(see `mesh`), the definition stands, a stack layer by layer, for XLA to partition. The choice is a
matter of lowering: a traced program serves every platform.
"""

from __future__ import annotations

import collections
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from eco_optax.fused import cpu, mesh, tpu
from eco_optax.fused import step as step_lib
from eco_optax.fused.leaf import Leaf, on_layers
from eco_optax.fused.step import Moments, Step
from eco_optax.lowering import is_alone
from eco_optax.quantized_array import QuantizedArray, Rounding
from eco_optax.transforms import eager

Implementation = Callable[[Step, Rounding, Leaf], tuple[QuantizedArray, Moments]]

try:
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
    from eco_optax.fused import gpu
except ImportError:  # A JAX without that backend.
  gpu = None  # type: ignore[assignment]


def wants_kernels(fused: bool | None) -> bool:
  """Whether steps run as kernels: as asked, or if None as ECO_OPTAX_FUSED says, where 0 is no.

  Raises:
    ValueError: where that is neither 0 nor 1.
  """
  if fused is not None:
    return fused
  said = os.environ.get("ECO_OPTAX_FUSED", "1")
  if said not in ("0", "1"):
    raise ValueError(f"ECO_OPTAX_FUSED is {said!r}: set 0 for no kernels, or 1")
  return said == "1"


def take_step(
  step: Step, rounding: Rounding, leaf: Leaf, sharding: Any = None, fused: bool | None = None
) -> tuple[QuantizedArray, Moments]:
  """One leaf's step, see `step_lib.definition`.

  Args:
    step: of the optimizer.
    rounding: of the codes.
    leaf: that may be split over the devices of a mesh.
    sharding: of the leaf's codes, or of the stack that it is one layer of. Without a
      `NamedSharding`, or where this would cut a block, a program of several devices keeps to the
      definition.
    fused: whether by a kernel, see `wants_kernels`.

  Returns:
    The new weight and the new moments.
  """
  if mesh.splits_layers(leaf, sharding):  # Devices take steps of parts of one layer.
    take = lambda step, rounding, leaf: take_step(step, rounding, leaf, sharding, fused)
    return on_layers(take)(step, rounding, leaf)
  implementation = on_one_device if wants_kernels(fused) else _without_kernels
  implementation = functools.partial(step_lib.with_means, implementation)
  split = mesh.split_of(leaf, sharding)
  if split is not None:
    return mesh.on_parts(implementation, step, rounding, leaf, sharding.mesh, split)
  return implementation(step, rounding, leaf)


_by_layers = on_layers(step_lib.by_layers)
_without_kernels = jax.jit(_by_layers, static_argnums=(0, 1))

_take_steps_p = Primitive("eco_fused_steps")
_take_steps_p.multiple_results = True


def on_one_device(step: Step, rounding: Rounding, leaf: Leaf) -> tuple[QuantizedArray, Moments]:
  """The step of a leaf, or of a device's part of it: one program for leaves of the same kind."""
  return take_steps(step, rounding, [leaf])[0]


def take_steps(step: Step, rounding: Rounding, leaves: list[Leaf]) -> list[tuple]:
  """Steps of whole leaves of one kind: of many on a CPU by turns, see `cpu.by_turns`.

  Args:
    step: of the optimizer.
    rounding: of the codes.
    leaves: with the same scalars and steps taken, and other arrays of the same shapes and dtypes.

  Returns:
    The new weight and the new moments of each.
  """
  flat, treedef = jax.tree.flatten(leaves)
  results = _compiled(step=step, rounding=rounding, treedef=treedef)(*flat)
  return jax.tree.unflatten(jax.tree.structure([leaf.results for leaf in leaves]), results)


def kinds(
  leaves: dict[str, Leaf], shardings: dict[str, Any], fused: bool | None
) -> list[list[str]]:
  """Paths of the leaves that `take_steps` takes together, by kind."""
  found: dict[Any, list[str]] = collections.defaultdict(list)
  for path, leaf in leaves.items() if wants_kernels(fused) else ():
    if cpu.is_for_turns(leaf) and mesh.split_of(leaf, shardings.get(path)) is None:
      arrays, treedef = jax.tree.flatten(leaf)
      same = *map(id, leaf.scalars), id(leaf.steps)
      found[same, treedef, *((x.shape, x.dtype) for x in arrays)].append(path)
  return [paths for paths in found.values() if len(paths) >= cpu.FEWEST_TURNS]


def _flat(implementation: Implementation) -> Any:
  """An implementation as a function of the flat operands of one leaf or more."""

  def fn(*flat: jax.Array, step: Step, rounding: Rounding, treedef: Any) -> list[jax.Array]:
    leaves = jax.tree.unflatten(treedef, flat)
    take = implementation
    if len(leaves) > 1:
      take = functools.partial(step_lib.with_means, on_one_device)
    return jax.tree.leaves([take(step, rounding, leaf) for leaf in leaves])

  return fn


@functools.cache
def _compiled(**params: Any) -> Any:
  return jax.jit(functools.partial(_take_steps_p.bind, **params))


@_take_steps_p.def_impl
def _impl(*flat: jax.Array, **params: Any) -> list[jax.Array]:
  if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
    return _flat(_by_layers)(*flat, **params)
  return _compiled(**params)(*flat)


@_take_steps_p.def_abstract_eval
def _abstract_eval(*flat: Any, treedef: Any, **params: Any) -> list[Any]:
  del params
  out = jax.tree.leaves([leaf.results for leaf in jax.tree.unflatten(treedef, flat)])
  return [jax.core.ShapedArray(x.shape, x.dtype) for x in out]


def _batched(flat: Any, axes: Any, **params: Any) -> tuple[list[jax.Array], list[int]]:
  results = jax.vmap(
    functools.partial(_flat(on_layers(step_lib.definition)), **params), in_axes=axes
  )(*flat)
  return results, [0] * len(results)


batching.primitive_batchers[_take_steps_p] = _batched


def _lowering(implementation: Implementation, of_many: Any = None, kernels_on: str = "") -> Any:
  """The rule that lowers to an implementation on one device, and to `by_layers` on several.

  A kernel sees local indices and is not partitioned; the definition is, with the bits of global
  indices. Inside `jax.shard_map` over all axes of a mesh each device is by itself.

  Args:
    implementation: of a leaf's step.
    of_many: a function as `_flat` makes them, for a way of their own of several leaves.
    kernels_on: the platform, where it may have kernels that XLA leaves to another compiler.
  """

  def lower(ctx: Any, *args: Any, **params: Any) -> Any:
    lower_as = lambda fn: mlir.lower_fun(fn, multiple_results=True)(ctx, *args, **params)
    leaves = jax.tree.unflatten(params["treedef"], ctx.avals_in)
    if not is_alone(ctx):
      return lower_as(_flat(_by_layers))
    if len(leaves) > 1 and of_many is not None:
      return lower_as(of_many)
    try:
      with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        if kernels_on and len(leaves) == 1 and _is_for_devices_here():
          avals = tuple((x.shape, x.dtype) for x in ctx.avals_in)
          eager.now(lambda: _compile_alone(implementation, kernels_on, avals, **params))
        return lower_as(_flat(implementation))
    except Exception as error:
      if implementation is _by_layers:
        raise
      _warn_of_refusal(ctx, leaves[0], error)
      return lower_as(_flat(_by_layers))

  return lower


def _is_for_devices_here() -> bool:
  return jax.sharding.get_abstract_mesh().abstract_device is None


@functools.cache
def _compile_alone(
  implementation: Implementation, platform: str, avals: tuple[Any, ...], **params: Any
) -> None:
  """Compiles a leaf's kernel alone, for a device of the platform if this process has one.

  A kernel may need too much of a device, such as on-chip memory. The compiler would say so when it
  has the whole program, and then the step could not be lowered another way. A kernel of float32
  moments takes half a second of CPU time for an H100 or a v5p, one of 8-bit moments a second.

  Args:
    implementation: of a leaf's step.
    platform: to compile for.
    avals: shapes and dtypes of the leaf's arrays.
    **params: of the primitive.

  Raises:
    Exception: what the compiler raises.
  """
  try:
    device = jax.local_devices(backend=platform)[0]
  except RuntimeError:
    return
  here = jax.sharding.SingleDeviceSharding(device)
  shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape, dtype in avals]
  alone = jax.jit(functools.partial(_flat(implementation), **params)).lower(*shapes)
  if "custom_call" in alone.as_text():  # Otherwise no kernel of ours is in it.
    alone.compile()


def _warn_of_refusal(ctx: Any, leaf: Leaf, error: Exception) -> None:
  platforms = "/".join(ctx.module_context.platforms)
  warnings.warn(
    f"no kernel for the step of {leaf.weight.format} of shape {leaf.shape} on {platforms}:"
    f" {type(error).__name__}: {str(error)[:500]}. The step runs without one, slower and with the"
    " same result; fused=False or ECO_OPTAX_FUSED=0 does so without this warning",
    RuntimeWarning,
    stacklevel=2,
  )


def _by_turns(*flat: jax.Array, step: Step, rounding: Rounding, treedef: Any) -> list[jax.Array]:
  take = functools.partial(step_lib.with_means, _by_layers, step, rounding)
  return jax.tree.leaves(cpu.by_turns(take, jax.tree.unflatten(treedef, flat)))


def _on_cuda(own: Step, rounding: Rounding, leaf: Leaf) -> tuple[QuantizedArray, Moments]:
  if gpu is None or not gpu.available():
    return _by_layers(own, rounding, leaf)
  return gpu.by_tiles(own, rounding, leaf, gpu.target())


mlir.register_lowering(_take_steps_p, _lowering(_by_layers))
mlir.register_lowering(_take_steps_p, _lowering(cpu.by_size, _by_turns), platform="cpu")
mlir.register_lowering(_take_steps_p, _lowering(tpu.by_panels, kernels_on="tpu"), platform="tpu")
mlir.register_lowering(_take_steps_p, _lowering(_on_cuda, kernels_on="cuda"), platform="cuda")
