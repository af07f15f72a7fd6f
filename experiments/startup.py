"""What passes before the first step of an unrolled model: making the state, tracing, compiling.

Each way is measured in a process of its own, that has compiled nothing before. Times are CPU
seconds of all threads, which another program on the machine moves less than the clock's.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import eco_optax as eco
from eco_optax.training import compile as compile_lib


class Model(NamedTuple):
  """Square matrices, and as many vectors, each a leaf of its own."""

  matrices: int
  width: int


MODELS = {"cpu": Model(160, 256), "h100:1": Model(40, 1024), "v5p:2x2x1": Model(40, 1024)}
PLAIN = "float32 optax.adamw"
_OPTIMIZERS: dict[str, Callable[[], Any]] = {
  PLAIN: lambda: optax.adamw(1e-3),
  "eco.adamw": lambda: eco.adamw(1e-3),
  "eco.adamw, FP8 moments": lambda: eco.low_bit_moments(eco.adamw(1e-3)),
  "ECO over optax.adamw": lambda: eco.error_feedback_to_momentum(
    optax.adamw(1e-3), eco.quantize_params()
  ),
}
WAYS = tuple(_OPTIMIZERS)


def measure(way: str, topology: str, model: Model) -> dict[str, float]:
  """CPU seconds to make the state, and to trace and to compile a step.

  Args:
    way: of `WAYS`.
    topology: to compile for, `"cpu"` or one of `compile.topology_devices`, which may be absent.
    model: to be trained.

  Returns:
    Seconds by what they went into.
  """
  device = None if topology == "cpu" else compile_lib.topology_devices(topology)[0]
  params: Any = {
    f"layer_{i}": {"kernel": jnp.ones((model.width, model.width)), "bias": jnp.zeros(model.width)}
    for i in range(model.matrices)
  }
  grads, tx = params, _OPTIMIZERS[way]()
  if way != PLAIN:
    params = eco.quantize(params, eco.FP8, where=lambda path, x: x.ndim > 1)
  apply = optax.apply_updates if way == PLAIN else eco.apply_updates

  def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
    updates, state = tx.update(grads, state, params)
    return apply(params, updates), state

  marks = [time.process_time()]
  arguments: Any = (params, jax.block_until_ready(tx.init(params)), grads)
  marks.append(time.process_time())
  context: Any = contextlib.nullcontext()
  if device is not None:
    arguments = compile_lib.on_device(device, arguments)
    context = compile_lib.abstractly(device)
  with context, compile_lib.without_cache():
    lowered = jax.jit(step, donate_argnums=(0, 1)).trace(*arguments).lower()
    marks.append(time.process_time())
    lowered.compile()
  marks.append(time.process_time())
  spent = (after - before for before, after in itertools.pairwise(marks))
  return dict(zip(("init", "trace", "compile"), spent, strict=True))


def study(topology: str, repeats: int, show: Callable[[str], None]) -> dict[str, dict[str, float]]:
  """Medians of each way's seconds, by its name."""
  model, found = MODELS[topology], {}
  spawn = multiprocessing.get_context("spawn")
  for way in WAYS:
    with concurrent.futures.ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as process:
      rows = list(process.map(measure, *zip(*[(way, topology, model)] * repeats, strict=True)))
    found[way] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    show(f"{topology}  {', '.join(f'{k} {x:.2f}' for k, x in found[way].items())}  {way}")
  return found


def ratio(rows: dict[str, dict[str, float]], way: str) -> float:
  """Trace and compile, as a multiple of float32 `optax.adamw`."""
  seconds = lambda way: rows[way]["trace"] + rows[way]["compile"]
  return seconds(way) / seconds(PLAIN)


def table(found: dict[str, Any]) -> str:
  """What came out, in Markdown; `found` by topology as `scripts/startup.py` writes it."""
  names = {"cpu": "CPU", "h100:1": "H100", "v5p:2x2x1": "TPU v5p"}
  head = [f"{names[t]}: init | trace + compile | beside AdamW" for t in found]
  lines = [f"| CPU seconds | {' | '.join(head)} |", "|---" * (1 + 3 * len(found)) + "|"]
  for way in WAYS:
    cells = [way]
    for own in found.values():
      row = own["rows"][way]
      cells += [f"{row['init']:.1f}", f"{row['trace'] + row['compile']:.1f}"]
      cells.append(f"{ratio(own['rows'], way):.1f}×")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"
