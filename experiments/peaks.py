"""What the README's lines take at their peak on a model whose layers are not stacked.

The step is compiled for one device, which need not exist. The model has a name for each layer, as
a Python loop over modules makes it; it is computed in bfloat16, and each layer is in a
`jax.checkpoint`.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import eco_optax as eco
from eco_optax.training import compile as compile_lib

LAYERS, WIDTH, HIDDEN, TOKENS = 16, 2048, 8192, 2048
WEIGHTS = LAYERS * 2 * WIDTH * HIDDEN  # Of the kernels, by whose number all bytes are divided.
RATE = 1e-3
# Topologies whose figures are published, with their column's head.
DEVICES = {"h100:1": "H100", "v5p:2x2x1": "TPU v5p"}


def init(layers: int, width: int, hidden: int) -> dict[str, Any]:
  """Float32 parameters, by layer."""
  layer = lambda: {
    "norm": {"scale": jnp.ones([width])},
    "up": {"kernel": jnp.zeros([width, hidden])},
    "down": {"kernel": jnp.zeros([hidden, width])},
  }
  return {f"layer_{number}": layer() for number in range(layers)}


@jax.checkpoint
def _block(params: Any, x: jax.Array) -> jax.Array:
  """One residual MLP, computed in the dtype of `x`, of shape (tokens, width)."""
  own = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)
  hidden = jax.nn.gelu((x * own["norm"]["scale"]) @ own["up"]["kernel"])
  return x + hidden @ own["down"]["kernel"]


def loss(params: dict[str, Any], x: jax.Array) -> jax.Array:
  """A loss of all layers, one after another; `params` are dense."""
  for number in range(len(params)):
    x = _block(params[f"layer_{number}"], x)
  return jnp.mean(jnp.square(x.astype(jnp.float32)))


class Way(NamedTuple):
  """A way to train, in the words of the README."""

  tx: optax.GradientTransformation
  is_quantized: bool = True
  gradient_dtype: Any = jnp.float32
  released: bool = False

  def params(self, *sizes: int) -> Any:
    """Packed parameters of these sizes, or float ones."""
    where = lambda path, leaf: "kernel" in path
    return eco.quantize(init(*sizes), eco.FP8, where) if self.is_quantized else init(*sizes)

  def step(self, params: Any, state: Any, x: jax.Array) -> tuple[Any, Any, jax.Array]:
    """New parameters, state and the loss."""
    if self.released:
      step = eco.value_and_step(loss, self.tx, gradient_dtype=self.gradient_dtype)
      value, params, state, _ = step(params, state, x)
      return params, state, value
    if not self.is_quantized:
      value, grads = jax.value_and_grad(loss)(params, x)
      updates, state = self.tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state, value
    make = eco.value_and_grad(loss, gradient_dtype=self.gradient_dtype)
    value, grads = make(params, x)
    updates, state = self.tx.update(grads, state, params)
    return eco.apply_updates(params, updates), state, value


def ways() -> dict[str, Way]:
  """What is compared; the first is what the others are held against."""
  any_optimizer = eco.error_feedback_to_momentum(optax.adamw(RATE), eco.quantize_params())
  low_bit = eco.low_bit_moments(eco.adamw(RATE))
  return {
    "float32 `optax.adamw`": Way(optax.adamw(RATE), is_quantized=False),
    "`eco.adamw`": Way(eco.adamw(RATE)),
    "`eco.adamw`, bfloat16 gradients": Way(eco.adamw(RATE), gradient_dtype=jnp.bfloat16),
    "`eco.error_feedback_to_momentum(optax.adamw(…), …)`": Way(any_optimizer),
    "`eco.low_bit_moments(eco.adamw(…))`": Way(low_bit),
    "the same, `eco.value_and_step`": Way(low_bit, released=True),
  }


def measure(way: Way, device: Any) -> dict[str, float]:
  """Bytes per weight of a kernel, as the compiler counts them.

  Args:
    way: to train.
    device: to compile for, of `compile.topology_devices`; it may be absent.

  Returns:
    `state`: parameters and optimizer; `temporaries`; `peak`: all, donated memory counted once.
  """
  params = jax.eval_shape(lambda: way.params(LAYERS, WIDTH, HIDDEN))
  state = jax.eval_shape(way.tx.init, params)
  x = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16)
  arguments = compile_lib.on_device(device, (params, state, x))
  is_gpu = "gpu" in device.platform.lower() or "cuda" in device.platform.lower()
  with compile_lib.abstractly(device) if is_gpu else contextlib.nullcontext():
    lowered = jax.jit(way.step, donate_argnums=(0, 1)).lower(*arguments)
  with compile_lib.without_cache():
    used: Any = lowered.compile().memory_analysis()
  kept = used.output_size_in_bytes - used.alias_size_in_bytes
  nbytes = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  return {
    "state": nbytes((params, state)) / WEIGHTS,
    "temporaries": used.temp_size_in_bytes / WEIGHTS,
    "peak": (used.argument_size_in_bytes + kept + used.temp_size_in_bytes) / WEIGHTS,
  }


def study(topology: str, show: Callable[[str], None]) -> dict[str, dict[str, float]]:
  """Each way's bytes on one device of a topology, by its name in the table."""
  device, found = compile_lib.topology_devices(topology)[0], {}
  for name, way in ways().items():
    found[name] = measure(way, device)
    show(f"{topology}  {found[name]['state']:5.2f}  {found[name]['peak']:5.2f}  {name}")
  return found


def path_of(folder: pathlib.Path, topology: str) -> pathlib.Path:
  """The file of a topology's figures."""
  return folder / f"{topology.replace(':', '_')}.json"


def read(folder: pathlib.Path) -> dict[str, Any]:
  """What was measured, by topology."""
  files = {topology: path_of(folder, topology) for topology in DEVICES}
  return {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}


def table(files: Mapping[str, Any]) -> str:
  """Peaks in Markdown, from the files of `read`."""
  heads = [f"peak, {DEVICES[topology]}" for topology in files]
  lines = [
    f"| bytes per parameter | state | {' | '.join(heads)} |",
    "|---" * (2 + len(heads)) + "|",
  ]
  for name in ways():
    rows = [file["rows"][name] for file in files.values()]
    cells = [f"{rows[0]['state']:.2f}", *(f"{row['peak']:.1f}" for row in rows)]
    lines.append(f"| {' | '.join([name, *cells])} |")
  return "\n".join(lines) + "\n"
