"""What a rule that lowers a primitive may ask of the program it lowers into."""

from __future__ import annotations

from typing import Any


def is_alone(ctx: Any) -> bool:
  """Whether what is lowered runs on one device, or on each of a `jax.shard_map` by itself.

  Args:
    ctx: the lowering rule's first argument, a `jax.interpreters.mlir.LoweringRuleContext`.
  """
  axes = ctx.module_context.axis_context
  mesh = getattr(axes, "mesh", None)
  return getattr(axes, "num_devices", None) == 1 or bool(
    mesh and set(axes.manual_axes) == set(mesh.axis_names)
  )
