"""What an optimizer step, its random bits and a checkpoint cost, measured within one process."""

from __future__ import annotations

import functools
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding

import eco_optax as eco
from eco_optax import rounding
from eco_optax.kernels import fused_update, pallas_update, steps
from eco_optax.training import checkpoints, loop, memory, sharding
from eco_optax.training import config as config_lib
from eco_optax.training import step as step_lib
from eco_optax.training.data import pipeline
from eco_optax.training.models import transformer


def paired_ratios(
  functions: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, dict[str, float]]:
  """Times functions in turn, so that a machine's drift meets them all alike.

  Args:
    functions: by name, each compiled and its arguments bound; the first is the unit of the ratios.
    repeats: rounds; each calls every function once.

  Returns:
    By name, the median milliseconds, and the median over rounds of the ratio to the first.
  """
  for function in functions.values():
    jax.block_until_ready(function())
  times: dict[str, list[float]] = {name: [] for name in functions}
  for _ in range(repeats):
    for name, function in functions.items():
      start = time.perf_counter()
      jax.block_until_ready(function())
      times[name].append(time.perf_counter() - start)
  first = next(iter(times.values()))
  return {
    name: {
      "milliseconds": 1e3 * statistics.median(values),
      "ratio": statistics.median(a / b for a, b in zip(values, first, strict=True)),
    }
    for name, values in times.items()
  }


def random_bits(size: int, repeats: int) -> dict[str, dict[str, float]]:
  """32 random bits for each of `size` elements: the counter hash beside JAX's generators."""
  shape = (size // 4096, 4096)
  counter = jax.jit(
    lambda step: rounding.counter_bits(rounding.stream_key(0, step, "kernel"), shape)
  )
  threefry, rbg = (jax.jit(lambda key: jax.random.bits(key, shape, jnp.uint32)) for _ in range(2))
  step = jnp.zeros([], jnp.int32)
  keys = jax.random.key(0), jax.random.key(0, impl="rbg")
  return paired_ratios(
    {
      "threefry": lambda: threefry(keys[0]),
      "rbg": lambda: rbg(keys[1]),
      "counter": lambda: counter(step),
    },
    repeats,
  )


def optimizer_step(size: int, repeats: int) -> dict[str, dict[str, float]]:
  """One update of `size` parameters, donated: float32 AdamW beside each way to quantize."""
  shape = (size // 4096, 4096)
  dense = {"kernel": 0.02 * jax.random.normal(jax.random.key(0), shape)}
  grads = {"kernel": 1e-3 * jax.random.normal(jax.random.key(1), shape)}
  packed = eco.quantize(dense, eco.FP8)
  adamw = optax.adamw(1e-3)

  def runner(tx: optax.GradientTransformation, params: Any) -> Callable[[], Any]:
    def step(params: Any, state: Any, grads: Any) -> Any:
      updates, state = tx.update(grads, state, params)
      return eco.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))
    # A copy of its own for each, because donation gives the buffers away.
    carry = [jax.tree.map(jnp.copy, params), tx.init(params)]

    def run() -> Any:
      carry[:] = compiled(*carry, grads)
      return carry

    return run

  def with_cast(params: Any) -> Callable[[], Any]:
    run = runner(adamw, params)
    cast = jax.jit(lambda p: eco.quantize(p, eco.FP8))
    return lambda: cast(run()[0])

  quantizers = {r: eco.quantize_params(rounding=r) for r in ("nearest", "stochastic")}  # type: ignore[arg-type]
  return paired_ratios(
    {
      "float32 adamw": runner(adamw, dense),
      "float32 adamw, then FP8 cast": with_cast(dense),
      "naive, nearest": runner(eco.chain(adamw, quantizers["nearest"]), packed),
      "ECO, nearest": runner(eco.error_feedback_to_momentum(adamw, quantizers["nearest"]), packed),
      "ECO, stochastic": runner(
        eco.error_feedback_to_momentum(adamw, quantizers["stochastic"]), packed
      ),
      "ECO fused (adamw), nearest": runner(eco.adamw(1e-3, rounding="nearest"), packed),
      "ECO fused (adamw), stochastic": runner(eco.adamw(1e-3), packed),
      "ECO fused (sgd), stochastic": runner(eco.sgd(1e-3), packed),
      "master weights, stochastic": runner(
        eco.master_weights(adamw, quantizers["stochastic"]), packed
      ),
    },
    repeats,
  )


def checkpoint(
  config: ml_collections.ConfigDict, folder: pathlib.Path, saves: int, between: int = 5
) -> dict[str, Any]:
  """What a save costs a run of this config.

  Args:
    config: of the run; its data are not read, tokens are drawn at random.
    folder: to save in, on the disk that is to be measured.
    saves: how many.
    between: steps that are timed before each, with no save under way.

  Returns:
    Bytes of the state and on disk, and medians of seconds: a step with and without a save under
    way, the time for which a save stops the run, and the time until it is whole.
  """
  tx, mesh = loop.prepare(config)
  split = sharding.batch_sharding(mesh)
  draw = np.random.default_rng(0)
  times: dict[str, list[float]] = {"alone": [], "saving": []}
  stopped, whole = [], []
  with jax.set_mesh(mesh), checkpoints.manager(folder, keep=2) as store:
    state = step_lib.init_state(config, tx, mesh)
    train_step = step_lib.make_train_step(config, tx, mesh)
    shape = (config.batch_size, config.length + 1)
    tokens = jax.device_put(draw.integers(0, config.model.vocabulary, shape, np.int32), split)
    state, _ = jax.block_until_ready(train_step(state, pipeline.Batch(tokens)))

    def timed_step(kind: str) -> None:
      nonlocal state
      start = time.perf_counter()
      state, _ = jax.block_until_ready(train_step(state, pipeline.Batch(tokens)))
      times[kind].append(time.perf_counter() - start)

    for number in range(saves):
      for _ in range(between):
        timed_step("alone")
      start = time.perf_counter()
      checkpoints.save(store, number, state, config, {}, {}, {})
      stopped.append(time.perf_counter() - start)
      while store.is_saving_in_progress():
        timed_step("saving")
      checkpoints.finish(store)
      whole.append(time.perf_counter() - start)
    newest = folder / str(saves - 1)
    on_disk = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
  median = lambda values: statistics.median(values) if values else None
  return {
    "parameters": transformer.count_params(config_lib.model(config), embedding=True),
    "state_bytes": sum(leaf.array.nbytes for leaf in memory.leaves(state)),
    "bytes_on_disk": on_disk,
    "seconds_per_step": median(times["alone"]),
    "seconds_per_step_while_saving": median(times["saving"]),
    "seconds_stopped_per_save": median(stopped),
    "seconds_until_whole": median(whole),
    "saves": saves,
  }


# The presets whose steps have a kernel on TPUs.
KERNELS = ("FP8", "FP8_E5M2", "INT8", "INT4", "FP8_BLOCK128", "MXFP8", "MXFP4", "NVFP4")


def kernel_traffic(device: Any, shape: tuple[int, int]) -> dict[str, dict[str, float]]:
  """Bytes per parameter of fused AdamW steps compiled for a TPU, which need not be there.

  Args:
    device: of a topology, see `compile.topology_devices`.
    shape: of the parameter; its gradient is bfloat16.

  Returns:
    By preset, the bytes that the kernels load and store, and the program's temporaries.
  """
  scalars = steps.AdamScalars(*[jnp.zeros([], jnp.float32)] * len(steps.AdamScalars._fields))
  size, figures = shape[0] * shape[1], {}

  def leaf(format: eco.Format) -> fused_update.Leaf:
    moment = jnp.zeros(shape)
    return fused_update.Leaf(
      scalars,
      rounding.stream_key(0, 0, "kernel"),
      None,
      eco.quantize(moment, format),
      moment.astype(jnp.bfloat16),
      (moment, moment),
    )

  for name in KERNELS:
    operands = jax.eval_shape(functools.partial(leaf, getattr(eco, name)))
    here = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)),
      operands,
    )
    step = jax.jit(
      lambda weight, moments, rest: fused_update.fused_update(
        steps.ADAMW, "stochastic", rest._replace(weight=weight, moments=moments)
      ),
      donate_argnums=(0, 1),
    )
    rest = here._replace(weight=None, moments=None)  # type: ignore[arg-type]
    used: Any = step.lower(here.weight, here.moments, rest).compile().memory_analysis()
    figures[name] = {
      "moved": pallas_update.bytes_moved(steps.ADAMW, "stochastic", operands) / size,
      "temporaries": used.temp_size_in_bytes / size,
    }
  return figures
