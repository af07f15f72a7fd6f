"""Kernels stored `(in, out)` and `(out, in)` in compiled steps of the 800M model's linear layers.

The steps are compiled for one device, which need not exist: forward and backward pass of stacked
blocks in a scan, without attention, and the fused step of every kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import eco_optax as eco
from eco_optax.training import compile as compile_lib

LAYERS, WIDTH, HIDDEN, TOKENS = 4, 2048, 5632, 4096
TOPOLOGIES = ("h100:1", "v5p:2x2x1", "tpu7x:2x2x1")
_KERNELS = {name: (WIDTH, WIDTH) for name in ("query", "key", "value", "out")} | {
  "gate": (WIDTH, HIDDEN),
  "up": (WIDTH, HIDDEN),
  "down": (HIDDEN, WIDTH),
}


_TX = eco.layer_by_layer(eco.adamw(1e-3))


class Way(NamedTuple):
  """How kernels are stored and computed with."""

  transposed: bool  # (out, in).
  gradient_format: eco.Format | None = None  # Of cotangents.

  def init(self) -> Any:
    """Packed kernels, layers along the first axis."""
    format = eco.Format("float8_e4m3fn", contraction_axis=-1 if self.transposed else -2)
    shape = lambda rows, columns: (columns, rows) if self.transposed else (rows, columns)
    zeros = {name: jnp.zeros((LAYERS, *shape(*size))) for name, size in _KERNELS.items()}
    return eco.quantize(zeros, format)

  def loss(self, params: Any, x: jax.Array) -> jax.Array:
    """Of bfloat16 tokens of shape (tokens, width)."""

    def block(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
      def product(name: str, x: jax.Array) -> jax.Array:
        formats = eco.FP8_TOKEN, self.gradient_format
        return eco.matmul(x, own[name], *formats, transposed=self.transposed)

      mixed = product("query", x) * product("key", x) + product("value", x)
      x = x + product("out", mixed)
      hidden = jax.nn.silu(product("gate", x)) * product("up", x)
      return x + product("down", hidden), None

    x, _ = jax.lax.scan(block, x, params)
    return jnp.mean(jnp.square(x.astype(jnp.float32)))

  def step(self, params: Any, state: Any, x: jax.Array) -> tuple[Any, Any, jax.Array]:
    """New kernels, state and the loss."""
    make = eco.value_and_grad(self.loss, gradient_dtype=jnp.bfloat16, dense=False)
    value, grads = make(params, x)
    updates, state = _TX.update(grads, state, params)
    return eco.apply_updates(params, updates), state, value


def ways(has_float8: bool) -> dict[str, Way]:
  """What is compared, on a device with or without units for products of float8."""
  layouts = {"(in, out)": False, "(out, in)": True}
  found = {name: Way(transposed) for name, transposed in layouts.items()}
  if has_float8:
    for name, transposed in layouts.items():
      found[f"{name}, FP8 cotangents"] = Way(transposed, eco.FP8_TOKEN)
  return found


def measure(way: Way, device: Any) -> dict[str, Any]:
  """What the compiler says of one step.

  Args:
    way: of the kernels.
    device: to compile for, of `compile.topology_devices`; it may be absent.

  Returns:
    Bytes that the step reads and writes by the compiler's count, that it copies or transposes, and
    of its temporaries; and operations of its products by dtype.
  """
  params = jax.eval_shape(way.init)
  state = jax.eval_shape(_TX.init, params)
  x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16)
  arguments = compile_lib.on_device(device, (params, state, x))
  # As the harness has it.
  options: Any = {"xla_gpu_enable_triton_gemm": False} if device.platform == "gpu" else {}
  with compile_lib.abstractly(device), compile_lib.without_cache():
    compiled = jax.jit(way.step, donate_argnums=(0, 1)).lower(*arguments).compile(options)
  cost: Any = compiled.cost_analysis() or {}  # There is none of programs for GPUs.
  used: Any = compiled.memory_analysis()
  text: Any = compiled.as_text()
  return {
    "bytes": cost.get("bytes accessed"),
    "copied": compile_lib.bytes_copied(text),
    "temporaries": used.temp_size_in_bytes,
    "products": compile_lib.products(text),
    "kernels": text.count("tpu_custom_call") or text.count('"__gpu$xla.gpu.triton"'),
  }


def study(topology: str, show: Callable[[str], None]) -> dict[str, dict[str, Any]]:
  """Each way's figures on one device of a topology, by its name."""
  device, found = compile_lib.topology_devices(topology)[0], {}
  for name, way in ways(not topology.startswith("v5p")).items():
    row = found[name] = measure(way, device)
    moved = f"{row['bytes'] / 2**30:.2f} GiB read and written  " if row["bytes"] else ""
    show(
      f"{topology}  {moved}{row['copied'] / 2**20:.0f} MiB copied"
      f"  {row['temporaries'] / 2**30:.2f} GiB temporary  {name}"
    )
  return found
