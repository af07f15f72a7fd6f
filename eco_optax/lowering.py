"""What programs are lowered to: on how many devices, and equal for leaves of one kind."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def is_alone(ctx: Any) -> bool:
  """Whether one device runs the program, or each runs its own part inside `jax.shard_map`.

  Args:
    ctx: the lowering rule's first argument, a `jax.interpreters.mlir.LoweringRuleContext`.
  """
  axes = ctx.module_context.axis_context
  mesh = getattr(axes, "mesh", None)
  return getattr(axes, "num_devices", None) == 1 or bool(
    mesh and set(axes.manual_axes) == set(mesh.axis_names)
  )


def barrier(tree: Any) -> Any:
  """`jax.lax.optimization_barrier` of what is traced. Of arrays that are there it makes copies."""
  is_traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))
  return jax.lax.optimization_barrier(tree) if is_traced else tree


def row_major(tree: Any) -> Any:
  """What is traced, with the last axis of its arrays contiguous in memory, whatever reads them."""
  own = lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim))))
  is_traced = lambda x: isinstance(x, jax.core.Tracer)
  return jax.tree.map(lambda x: own(x) if is_traced(x) else x, tree)


_unlike_constant_p = Primitive("eco_unlike_constant")


def unlike_constant(x: Any, step: Any) -> jax.Array:
  """A leaf's own number, which compilers take for the result of a computation.

  Programs of leaves that differ in such a number alone are then equal, and compiled once: JAX
  lowers equal functions once, and XLA's compiler for CPUs compiles equal kernels once, of which one
  with a constant of its own takes it 10 ms.

  Args:
    x: a constant, of any shape and dtype.
    step: integer scalar that is not known before the program runs, such as the steps taken.

  Returns:
    `x`.
  """
  return _unlike_constant_p.bind(jnp.asarray(x), jnp.asarray(step, jnp.int32))


@_unlike_constant_p.def_impl
def _unlike_constant_impl(x: jax.Array, step: jax.Array) -> jax.Array:
  del step
  return x


_unlike_constant_p.def_abstract_eval(lambda x, step: x)


def _unlike_constant_batched(args: Any, axes: Any) -> tuple[jax.Array, Any]:
  return jax.lax.optimization_barrier(args[0]), axes[0]


def _unlike_constant_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
  return _unlike_constant_p.bind(*primals), tangents[0]


def _by_branch(x: jax.Array, step: jax.Array) -> jax.Array:
  """A barrier is gone before fusions are made. A branch is not, and costs a CPU nothing.

  The other one is never taken, which the compiler does not find out.
  """
  return jax.lax.cond((step | 1) != 0, lambda: x, lambda: jnp.zeros_like(x))


def _by_barrier(x: jax.Array, step: jax.Array) -> jax.Array:
  del step
  return jax.lax.optimization_barrier(x)  # type: ignore[no-any-return]


ad.primitive_jvps[_unlike_constant_p] = _unlike_constant_jvp
batching.primitive_batchers[_unlike_constant_p] = _unlike_constant_batched
_lower = functools.partial(mlir.lower_fun, multiple_results=False)
mlir.register_lowering(_unlike_constant_p, _lower(_by_barrier))
mlir.register_lowering(_unlike_constant_p, _lower(_by_branch), platform="cpu")
