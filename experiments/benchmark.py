"""The cost of an optimizer step, its random bits and a checkpoint, measured within one process."""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import json
import math
import os
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import eco_optax as eco
from eco_optax import rounding
from eco_optax.fused import dispatch, gpu, tpu
from eco_optax.fused.leaf import Leaf
from eco_optax.optimizers.adamw import ADAMW, AdamScalars
from eco_optax.quantized_array import is_quantized
from eco_optax.training import checkpoints, loop, memory, methods, sharding
from eco_optax.training import compile as compile_lib
from eco_optax.training import config as config_lib
from eco_optax.training import step as step_lib
from eco_optax.training.data import pipeline
from eco_optax.training.models import transformer
from eco_optax.transforms import stored_moments
from experiments import figures as figures_lib
from experiments.studies import storage, sweep


def paired_ratios(
  functions: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, dict[str, float]]:
  """Times functions in turn, so that a machine's drift affects all of them equally.

  Args:
    functions: by name, each compiled and its arguments bound; the first is the unit of the ratios.
    repeats: rounds; each calls every function once.

  Returns:
    By name, the median `milliseconds`, and of the rounds' ratios to the first the median (`ratio`)
    and the quartiles (`low`, `high`).
  """
  for function in functions.values():
    jax.block_until_ready(function())
  times: dict[str, list[float]] = {name: [] for name in functions}
  for _ in range(repeats):
    for name, function in functions.items():
      start = time.perf_counter()
      jax.block_until_ready(function())
      times[name].append(time.perf_counter() - start)
  first = np.array(next(iter(times.values())))
  rows = {}
  for name, values in times.items():
    low, ratio, high = np.quantile(np.array(values) / first, (0.25, 0.5, 0.75))
    rows[name] = {
      "milliseconds": 1e3 * statistics.median(values),
      "ratio": float(ratio),
      "low": float(low),
      "high": float(high),
    }
  return rows


def _together(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
  """A function of each, on all cores: XLA compiles most programs on one."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return list(pool.map(function, items))


def random_bits(size: int, repeats: int) -> dict[str, dict[str, float]]:
  """32 random bits for each of `size` elements: the counter hash beside JAX's generators."""
  shape = (size // 4096, 4096)  # The width of a large model's kernels.
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


class Way(NamedTuple):
  """A way to train a matrix: the state kept between steps, and the step."""

  init: Callable[[Any], Any]  # Float32 weights → the state kept, as one tree.
  step: Callable[[Any, Any], Any]  # (that, gradients) → that, for `jit` with donation.
  runs_on: tuple[str, ...] = ("cpu", "tpu", "gpu")
  needs_device: bool = False  # To be compiled.
  is_eco: bool = False  # Drawn in ECO's color.


def _way(tx: optax.GradientTransformation, convert: Callable[[Any], Any]) -> Way:
  """An optimizer on parameters that are converted first."""

  def init(dense: Any) -> Any:
    params = convert(dense)
    return params, tx.init(params)

  def step(kept: Any, grads: Any) -> Any:
    params, state = kept
    if not is_quantized(params["kernel"]):
      grads = optax.tree.cast_like(grads, params)  # As a backward pass gives them.
    updates, state = tx.update(grads, state, params)
    return eco.apply_updates(params, updates), state

  return Way(init, step)


def _with_cast(tx: optax.GradientTransformation, format: eco.Format) -> Way:
  """Float32 training whose forward pass reads codes, made anew at each step."""
  plain = _way(tx, lambda dense: dense)
  codes = lambda kept: eco.quantize(kept[0], format)

  def step(kept: Any, grads: Any) -> Any:
    new = plain.step(kept[:2], grads)
    return (*new, codes(new))

  return Way(lambda dense: (*plain.init(dense), codes((dense,))), step)


def _flashoptim() -> Way | None:
  """AdamW of flashoptim-jax, if that is installed; its kernels are for GPUs."""
  try:
    flashoptim = importlib.import_module("flashoptim_jax")
  except ImportError:
    return None
  tx = flashoptim.flash_adamw(learning_rate=RATE, master_weight_bits=24)

  def init(dense: Any) -> Any:
    params = optax.tree.cast(dense, jnp.bfloat16)
    return params, tx.init(params)

  return Way(init, lambda kept, grads: tx.step(*kept, grads), ("gpu",), True)


RATE = 1e-3
REFERENCE = "float32 AdamW"


def ways() -> dict[str, Way]:
  """All that are compared, by name; the first is the unit of ratios."""
  adamw = optax.adamw(RATE)
  pack = lambda format: lambda dense: eco.quantize(dense, format)
  nearest, stochastic = (eco.quantize_params(rounding=r) for r in ("nearest", "stochastic"))  # type: ignore[arg-type]
  low = lambda tx, mu, nu: _way(eco.low_bit_moments(tx, mu, nu), pack(eco.FP8))
  fp8 = lambda tx: _way(tx, pack(eco.FP8))
  # An output channel is a row, as in the harness and in checkpoints.
  rows = lambda tx: _way(tx, pack(eco.Format("float8_e4m3fn", contraction_axis=-1)))
  bfloat16 = functools.partial(optax.tree.cast, dtype=jnp.bfloat16)
  f8: Any = "float8_e4m3fn"
  found = {
    REFERENCE: _way(adamw, lambda dense: dense),
    "bfloat16 AdamW": _way(adamw, bfloat16),
    "float32 AdamW, then FP8 cast": _with_cast(adamw, eco.FP8),
    "flashoptim-jax AdamW, 24-bit master": _flashoptim(),
    "naive, RTN": fp8(eco.chain(adamw, nearest)),
    "naive, SR": fp8(eco.chain(adamw, stochastic)),
    "master weights, RTN": fp8(eco.master_weights(adamw, nearest)),
    "master weights, SR": fp8(eco.master_weights(adamw, stochastic)),
    "int16 residual, bfloat16 momentum, RTN": low(
      eco.master_weights(adamw, nearest, "int16"), "bfloat16", "float32"
    ),
    "int8 residual, RTN": fp8(eco.master_weights(adamw, nearest, "int8")),
    "int8 residual, FP8 moments, RTN": low(eco.master_weights(adamw, nearest, "int8"), f8, f8),
  }
  ours = {
    "ECO over optax.adamw, RTN": fp8(eco.error_feedback_to_momentum(adamw, nearest, RATE)),
    "ECO over optax.adamw, SR": fp8(eco.error_feedback_to_momentum(adamw, stochastic, RATE)),
    "eco.adamw, RTN": fp8(eco.adamw(RATE, rounding="nearest")),
    "eco.adamw, SR": fp8(eco.adamw(RATE)),
    "eco.adamw, SR, INT4": _way(eco.adamw(RATE), pack(eco.INT4)),
    "eco.adamw, SR, MXFP8": _way(eco.adamw(RATE), pack(eco.MXFP8)),
    "eco.adamw, SR, bfloat16 moments": low(eco.adamw(RATE), "bfloat16", "bfloat16"),
    "eco.adamw, SR, FP8 moments": low(eco.adamw(RATE), f8, f8),
    "eco.adamw, SR, INT8 and FP8 moments": low(eco.adamw(RATE), "int8", f8),
    "eco.adamw, SR, kernels (out, in)": rows(eco.adamw(RATE)),
    "eco.adamw, SR, (out, in), FP8 moments": rows(eco.low_bit_moments(eco.adamw(RATE), f8, f8)),
    "eco.adamw, SR, (out, in), FP8 and factored moments": rows(
      eco.low_bit_moments(eco.adamw(RATE), f8, "factored")
    ),
    "eco.sgd, SR": fp8(eco.sgd(RATE)),
  }
  found |= {name: way._replace(is_eco=True) for name, way in ours.items()}
  return {name: way for name, way in found.items() if way}


def _program(way: Way, dense: Any, grads: Any, device: Any = None) -> Any:
  """The compiled step of one way, for `device`, which need not be there, or for this machine."""
  kept = jax.eval_shape(way.init, dense)
  step = jax.jit(way.step, donate_argnums=0)
  if device is None:
    return step.lower(kept, grads).compile()
  with compile_lib.abstractly(device):
    lowered = step.lower(*compile_lib.on_device(device, (kept, grads)))
  return lowered.compile()


def at_rest(way: Way, dense: Any) -> float:
  """Bytes per parameter that are kept between steps: weights, codes, scales, moments, residuals."""
  arrays = [x for x in jax.tree.leaves(jax.eval_shape(way.init, dense)) if x.ndim]
  return sum(x.size * x.dtype.itemsize for x in arrays) / dense["kernel"].size


def optimizer_step(
  shape: tuple[int, int], repeats: int, names: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
  """One step of one matrix, each way: time, bytes at rest, and temporaries.

  Args:
    shape: of the matrix.
    repeats: rounds of the timing.
    names: of `ways`, or all.

  Returns:
    By name: `bytes_at_rest` and `temporaries` (of the compiler) per parameter, and, for what runs
    on this machine, the figures of `paired_ratios`.
  """
  draw = lambda i, size: {"kernel": size * jax.random.normal(jax.random.key(i), shape)}
  dense, grads = draw(0, 0.02), draw(1, 1e-3)
  chosen = {name: way for name, way in ways().items() if names is None or name in names}
  running = {}

  def runner(way: Way, program: Any) -> Callable[[], Any]:
    kept = way.init(jax.tree.map(jnp.copy, dense))

    def run() -> Any:
      nonlocal kept
      kept = program(kept, grads)
      return kept

    return run

  here = {name: way for name, way in chosen.items() if jax.default_backend() in way.runs_on}
  programs = _together(lambda way: _program(way, dense, grads), list(here.values()))
  rows = {name: {"bytes_at_rest": at_rest(way, dense)} for name, way in chosen.items()}
  for (name, way), program in zip(here.items(), programs, strict=True):
    used = program.memory_analysis()
    rows[name]["temporaries"] = used.temp_size_in_bytes / dense["kernel"].size
    running[name] = runner(way, program)
  for name, row in paired_ratios(running, repeats).items():
    rows[name] |= row
  return rows


def compiled_step(device: Any, shape: tuple[int, int]) -> dict[str, dict[str, float]]:
  """The bytes that one step of one matrix moves and holds on a TPU or GPU, which may be absent.

  Args:
    device: of a topology, see `compile.topology_devices`.
    shape: of the matrix; its gradient is bfloat16.

  Returns:
    By name, per parameter: `bytes_at_rest`, `temporaries`, and `moved`, the bytes read and written,
    as the compiler counts them; the GPU compiler does not.
  """
  dense = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
  grads = {"kernel": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
  size, rows = math.prod(shape), {}
  for name, way in ways().items():
    rows[name] = {"bytes_at_rest": at_rest(way, dense)}
    if device.platform not in way.runs_on or way.needs_device:
      continue
    program = _program(way, dense, grads, device)
    if cost := program.cost_analysis():
      rows[name]["moved"] = cost["bytes accessed"] / size
    rows[name]["temporaries"] = program.memory_analysis().temp_size_in_bytes / size
  return rows


# Methods whose whole training steps are timed; the first is the unit of ratios.
TRAINING: dict[str, methods.Method] = {
  "weights as they are (bf16_mw)": methods.BY_NAME["bf16_mw"],
  **{
    methods.BY_NAME[name].short: methods.BY_NAME[name]
    for name in ("mw_rtn", "mw_sr", "eco_rtn", "eco_sr")
  },
  "ECO + SR, FP8 moments": methods.METHODS["ECO + SR, FP8 moments"],
}


def training_step(config: ml_collections.ConfigDict, repeats: int) -> dict[str, dict[str, float]]:
  """Whole training steps of one model, by each way of `TRAINING`, on random tokens.

  Args:
    config: of a run.
    repeats: rounds of the timing.

  Returns:
    By name, the figures of `paired_ratios`.
  """
  draw = np.random.default_rng(0)
  shape = (config.batch_size, config.length + 1)
  tokens = draw.integers(0, config.model.vocabulary, shape, np.int32)

  def runner(method: methods.Method) -> Callable[[], Any]:
    changed = ml_collections.ConfigDict(config.to_dict())
    changed.update_from_flattened_dict(method.changes)
    tx, mesh = loop.prepare(changed)
    with jax.set_mesh(mesh):
      batch = pipeline.Batch(jax.device_put(tokens, sharding.batch_sharding(mesh)))
      state = step_lib.init_state(changed, tx, mesh)
      train_step = step_lib.make_train_step(changed, tx, mesh).lower(state, batch).compile()

    def run() -> Any:
      nonlocal state
      state, _ = train_step(state, batch)
      return state

    return run

  runners = _together(runner, list(TRAINING.values()))
  return paired_ratios(dict(zip(TRAINING, runners, strict=True)), repeats)


def checkpoint(
  config: ml_collections.ConfigDict, folder: pathlib.Path, saves: int, between: int = 5
) -> dict[str, Any]:
  """The cost of a save to a run of this config.

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
  """Bytes per parameter of fused AdamW steps compiled for a TPU or GPU, which need not be there.

  Args:
    device: of a topology, see `compile.topology_devices`.
    shape: of the parameter; its gradient is bfloat16.

  Returns:
    By preset, the bytes that the kernels load and store, the program's temporaries, and on GPUs the
    instructions of PTX that a weight takes where no value is subnormal.
  """
  scalars = AdamScalars(*[jnp.zeros([], jnp.float32)] * len(AdamScalars._fields))
  size, figures = shape[0] * shape[1], {}
  kernels: Any = {"tpu": tpu, "gpu": gpu}[device.platform]

  def leaf(format: eco.Format, in_few_bits: bool) -> Leaf:
    moment, count = jnp.zeros(shape), 3 if in_few_bits else 1
    moments: Any = (moment, moment)
    if in_few_bits:
      key = rounding.stream_key(0, 0, "kernel")
      bits, axis = rounding.counter_bits(key, shape), stored_moments.block_axis(format)
      moments = tuple(
        stored_moments.store(moment, kind, "float8_e4m3fn", bits, True, axis)
        for kind in ("first", "second")
      )
    return Leaf(
      scalars,
      jnp.array([rounding.stream_start(0, "kernel")] * count),
      jnp.zeros(count, jnp.int32),
      None,
      eco.quantize(moment, format),
      moment.astype(jnp.bfloat16),
      moments,
    )

  ways = {name: (getattr(eco, name), False) for name in KERNELS}
  if device.platform == "gpu":
    rows = eco.Format("float8_e4m3fn", contraction_axis=-1)
    ways |= {"FP8, FP8 moments": (eco.FP8, True), "FP8 (out, in)": (rows, False)}
    ways |= {"FP8 (out, in), FP8 moments": (rows, True)}
  for name, (format, in_few_bits) in ways.items():
    operands = jax.eval_shape(functools.partial(leaf, format, in_few_bits))
    here = compile_lib.on_device(device, operands)
    step = jax.jit(
      lambda weight, moments, rest: dispatch.take_step(
        ADAMW, "stochastic", rest._replace(weight=weight, moments=moments)
      ),
      donate_argnums=(0, 1),
    )
    with compile_lib.abstractly(device):
      lowered = step.lower(here.weight, here.moments, here._replace(weight=None, moments=None))
    with tempfile.TemporaryDirectory() as folder:
      # Options that write files would be taken for those of another program by a cache.
      options: Any = {"xla_dump_to": folder} if device.platform == "gpu" else {}
      used: Any = lowered.compile(options).memory_analysis()
      texts = [path.read_text() for path in pathlib.Path(folder).glob("*.ptx")]
    figures[name] = {
      "moved": kernels.bytes_moved(ADAMW, "stochastic", operands) / size,
      "temporaries": used.temp_size_in_bytes / size,
    }
    if texts:
      plan: Any = gpu.plan(ADAMW, "stochastic", operands)
      weights = plan.height * plan.width / (32 * plan.warps)
      figures[name]["instructions"] = sum(map(_instructions, texts)) / weights
  return figures


def _instructions(text: str) -> int:
  """What a thread runs of the fused steps in a module of PTX, one after another."""
  count = 0
  for kernel in re.split(r"\.entry ", text)[1:]:
    if kernel.startswith("fused_step"):
      usual = re.sub(r"bra NORMAL;.*?NORMAL:", "bra NORMAL;", kernel, flags=re.DOTALL)
      statements = re.split(r"[;\n{]\s*(?:@!?%?p\d*\s)?", re.sub(r"//.*", "", usual))
      count += sum(bool(re.match(r"\s*[a-z][\w.]*\s+[%$\[{\w]", x)) for x in statements)
  return count


# Runs of `studies.storage` that train in one of the ways, at its first learning rate.
_LOSSES = {
  "master weights, RTN": "float32 residual",
  "int8 residual, RTN": "int8 residual",
  "ECO over optax.adamw, RTN": "no residual: ECO + RTN",
  "ECO over optax.adamw, SR": "no residual: ECO + SR",
  "eco.adamw, SR": "float32 moments",
  "eco.adamw, SR, bfloat16 moments": "bfloat16 moments",
  "eco.adamw, SR, FP8 moments": "FP8 moments",
  "eco.adamw, SR, INT8 and FP8 moments": "INT8 and FP8 moments",
}


# Rows of `experiments.gpu`, whose steps are many in one program, by the names that they have here.
_ON_GPUS = {
  "float32 optax.adamw": REFERENCE,
  "bfloat16 optax.adamw": "bfloat16 AdamW",
  "flashoptim-jax, 24-bit master": "flashoptim-jax AdamW, 24-bit master",
  "eco.adamw FP8 (in, out)": "eco.adamw, SR",
  "eco.adamw FP8 (out, in)": "eco.adamw, SR, kernels (out, in)",
  "eco.adamw INT4": "eco.adamw, SR, INT4",
  "eco.adamw MXFP8": "eco.adamw, SR, MXFP8",
  "eco.adamw NVFP4": "eco.adamw, SR, NVFP4",
  "eco.adamw FP8_BLOCK128": "eco.adamw, SR, FP8_BLOCK128",
  "eco.adamw FP8 (out, in), bfloat16 moments": "eco.adamw, SR, (out, in), bfloat16 moments",
  "eco.adamw FP8 (in, out), FP8 moments": "eco.adamw, SR, FP8 moments",
  "eco.adamw FP8 (out, in), FP8 moments": "eco.adamw, SR, (out, in), FP8 moments",
}


def _on_gpu(path: pathlib.Path) -> dict[str, Any]:
  """The steps in a file of `experiments.gpu`, as `scripts/benchmark.py` would have written them."""
  found = json.loads(path.read_text())
  entry = found.get("fused_steps", {})
  if "float32 optax.adamw" not in entry.get("rows", {}):  # Not measured yet.
    return {}
  first = entry["rows"]["float32 optax.adamw"]["milliseconds"]
  steps = {
    _ON_GPUS[name]: {
      "milliseconds": row["milliseconds"],
      "ratio": row["ratio"],
      "low": row["least"] / first,
      "high": row["most"] / first,
      "bytes_at_rest": row["bytes_at_rest"],
    }
    for name, row in entry["rows"].items()
    if name in _ON_GPUS and "ratio" in row
  }
  figures = {
    "elements": entry["size"],
    "gradient_bytes": 2,
    "optimizer_step": steps,
    "machine": entry["machine"],
  }
  trained = {n: x for n, x in found.get("train_800m", {}).get("rows", {}).items() if "ratio" in x}
  if trained:
    tokens = next(iter(trained.values()))["tokens_per_step"]
    figures |= {"trained": f"llama_800m, {tokens:,} tokens", "training_step": trained}
  return figures


def _figures(results: pathlib.Path) -> dict[str, Any]:
  """What `scripts/benchmark.py` and `scripts/gpu.py` wrote, by file."""
  files = sorted(results.glob("benchmark/*.json"))
  found = {path.stem: json.loads(path.read_text()) for path in files}
  on_gpus = {path.stem: _on_gpu(path) for path in sorted(results.glob("gpu/*.json"))}
  return found | {name: figures for name, figures in on_gpus.items() if figures}


def _loss(name: str, rows: dict[str, Any]) -> str:
  """The mean over seeds, with its standard error and the runs' length."""
  names = (
    storage.runs_of(_LOSSES[name], "FP8", storage.LEARNING_RATES[0]) if name in _LOSSES else []
  )
  done = [rows[run] for run in names if run in rows]
  if not done:
    return "–"
  return f"{sweep.compared(rows, names, names)[0]} ({done[0]['validation_curve'][-1][0]:,} steps)"


def table(results: pathlib.Path) -> str:
  """The optimizer step's ways by what they take, in Markdown.

  Args:
    results: the folder with `benchmark/*.json` and the runs of `studies.storage`.

  Returns:
    A table for the optimizer step, and one for each device on which training steps were timed.
  """
  found = _figures(results)
  rows = sweep.read(results / "storage" / "runs.jsonl")
  stepped = [name for name in found if "optimizer_step" in found[name]]
  compiled = [name for name in stepped if "compiled_for" in found[name]]
  timed = [name for name in stepped if name not in compiled]
  # Not every compiler counts what a program moves.
  counted = lambda file: {
    key: form
    for key, form in {"moved": ".1f", "temporaries": ".2f"}.items()
    if any(key in row for row in found[file]["optimizer_step"].values())
  }
  head = ["AdamW, 1 matrix", "bytes at rest"]
  for file in compiled:
    kind = found[file]["compiled_for"]
    head += [f"{key} on {kind}" for key in counted(file)]
  for file in timed:
    head += [f"time on {found[file]['machine']['device']}", "quartiles"]
  head += ["validation loss, 1M parameters"]
  lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
  names = dict.fromkeys(n for f in [*timed, *compiled] for n in found[f]["optimizer_step"])
  for name in names:
    own = lambda file, key, name=name: found[file]["optimizer_step"].get(name, {}).get(key)
    number = lambda value, form: "–" if value is None else format(value, form)
    rest = next(x for f in [*timed, *compiled] if (x := own(f, "bytes_at_rest")) is not None)
    cells = [name, f"{rest:.2f}"]
    for file in compiled:
      cells += [number(own(file, key), form) for key, form in counted(file).items()]
    for file in timed:
      ratio, low, high = (own(file, key) for key in ("ratio", "low", "high"))
      cells += ["–", "–"] if ratio is None else [f"{ratio:.2f}×", f"{low:.2f}–{high:.2f}"]
    lines.append(f"| {' | '.join([*cells, _loss(name, rows)])} |")
  for figures in (found[name] for name in found if "training_step" in found[name]):
    what = f"{figures['machine']['device']}: {figures['trained']}"
    lines += ["", f"| training step on {what} | milliseconds | ratio | quartiles |"]
    lines.append("|---" * 4 + "|")
    for name, row in figures["training_step"].items():
      spread = f"{row['low']:.2f}–{row['high']:.2f}" if "low" in row else "–"
      lines.append(f"| {name} | {row['milliseconds']:.0f} | {row['ratio']:.2f}× | {spread} |")
  return "\n".join(lines) + "\n"


# The rows of the short table: plain training, the best peer, master weights, ours.
_SHORT = (
  REFERENCE,
  "bfloat16 AdamW",
  "flashoptim-jax AdamW, 24-bit master",
  "master weights, SR",
  "eco.adamw, SR",
  "eco.adamw, SR, kernels (out, in)",
  "eco.adamw, SR, MXFP8",
  "eco.adamw, SR, FP8 moments",
  "eco.adamw, SR, (out, in), FP8 moments",
)


def short_table(results: pathlib.Path) -> str:
  """The ways of `_SHORT`: bytes at rest, bytes moved on TPUs, times where they were measured.

  Args:
    results: the folder with `benchmark/*.json`.

  Returns:
    Markdown; times are in those of the first row.
  """
  found = {name: own for name, own in _figures(results).items() if "optimizer_step" in own}
  rows = lambda file: found[file]["optimizer_step"]
  moved = [file for file in found if any("moved" in row for row in rows(file).values())]
  timed = [file for file in found if "compiled_for" not in found[file]]
  head = ["AdamW step of one matrix", "bytes per parameter"]
  head += [f"bytes moved, {found[file]['compiled_for']} (compiled)" for file in moved]
  head += [f"time, {found[file]['machine']['device']}" for file in timed]
  lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
  for name in _SHORT:
    own = [rows(file)[name] for file in (*timed, *moved) if name in rows(file)]
    if not own:
      continue
    show = lambda file, key, form, name=name: (
      format(row[key], form) if key in (row := rows(file).get(name, {})) else "–"
    )
    cells = [name, f"{own[0]['bytes_at_rest']:.2f}"]
    cells += [show(file, "moved", ".1f") for file in moved]
    times = [show(file, "ratio", ".2f") for file in timed]
    cells += [time if time == "–" else f"{time}×" for time in times]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


# Bytes per second of device memory, from the vendors' data sheets.
_BANDWIDTH = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12}
_CAST = "float32 AdamW, then FP8 cast"


class _Panel(NamedTuple):
  """Bars of a chart, and what each cannot be below; neither has to be there for every way."""

  title: str
  bars: dict[str, float]
  floors: dict[str, float]


def _least(name: str, row: dict[str, Any], gradient: float) -> float:
  """Bytes per parameter of a step that reads and writes each array once."""
  codes_not_read = 1.0 if name == _CAST else 0.0
  return 2 * row["bytes_at_rest"] - codes_not_read + gradient


def _panel(figures: dict[str, Any]) -> _Panel | None:
  """Bytes moved of what was compiled, times of what was run; None where a compiler counts none."""
  rows = figures["optimizer_step"]
  if "compiled_for" in figures:
    bars = {name: row["moved"] for name, row in rows.items() if "moved" in row}
    floors = {name: _least(name, rows[name], 2) for name in bars}
    title = f"bytes moved per parameter\n{figures['compiled_for']}, compiled"
    return _Panel(title, bars, floors) if bars else None
  device = figures["machine"]["device"]
  bars = {name: row["ratio"] for name, row in rows.items() if "ratio" in row}
  floors = {}
  if device in _BANDWIDTH:
    unit = 1e-3 * rows[REFERENCE]["milliseconds"] * _BANDWIDTH[device] / figures["elements"]
    gradient = figures.get("gradient_bytes", 4)
    floors = {name: _least(name, rows[name], gradient) / unit for name in bars}
  return _Panel(f"time of a step, {device}\n{REFERENCE} = 1", bars, floors)


def _chart(panels: Sequence[_Panel], names: Sequence[str], path: pathlib.Path) -> None:
  """Draws panels side by side: a bar for each way, and its floor as a line across it."""
  plt = figures_lib.pyplot()
  ours = {name for name, way in ways().items() if way.is_eco}
  figure, axes = plt.subplots(
    1, len(panels), figsize=(3.2 + 2.9 * len(panels), 0.34 * len(names) + 1.6), sharey=True,
    layout="constrained",
  )  # fmt: skip
  for ax, panel in zip(np.atleast_1d(axes), panels, strict=True):
    for i, name in enumerate(names):
      is_ours = name in ours or name.startswith("eco.")
      color = figures_lib.ECO if is_ours else "0.6"
      if name in panel.bars:
        ax.barh(i, panel.bars[name], color=color, height=0.7)
        ax.text(panel.bars[name], i, f" {panel.bars[name]:.3g}", va="center", fontsize=9)
      if name in panel.floors:
        ax.plot([panel.floors[name]] * 2, [i - 0.42, i + 0.42], color="black", lw=2.2)
    ax.set_title(panel.title, fontsize=10)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.margins(x=0.18)
  if any(panel.floors for panel in panels):
    ax.plot([], [], color="black", lw=2.2, label="floor: each array read and written once")
    figure.legend(loc="outside lower right", fontsize=9, frameon=False)
  figures_lib.save(figure, path)


def plot(results: pathlib.Path) -> None:
  """Draws bytes at rest, bytes moved and times as bars.

  `benchmark.png` has the ways that were timed on a GPU, or all where there was none;
  `benchmark_cpu.png` the ones timed on a CPU.

  Args:
    results: the folder with `benchmark/*.json`.
  """
  found = {name: rows for name, rows in _figures(results).items() if "optimizer_step" in rows}
  steps: dict[str, Any] = {}  # Not every machine has every package that is measured.
  for own in found.values():
    steps |= {name: row for name, row in own["optimizer_step"].items() if name not in steps}
  rest = {name: row["bytes_at_rest"] for name, row in steps.items()}
  at_rest_panel = _Panel("bytes per parameter at rest\nweights, moments, residual", rest, {})
  folder = results / "benchmark"
  on_cpu = lambda own: own.get("machine", {}).get("device") == "cpu" and "compiled_for" not in own
  accelerators = [own for own in found.values() if not on_cpu(own)]
  timed = [own for own in accelerators if "compiled_for" not in own]
  names = [name for name in steps if not timed or any(name in o["optimizer_step"] for o in timed)]
  panels = [panel for own in accelerators[::-1] if (panel := _panel(own))]
  _chart([at_rest_panel, *panels], names, folder / "benchmark.png")
  panels = [panel for own in found.values() if on_cpu(own) and (panel := _panel(own))]
  names = [name for name in steps if any(name in panel.bars for panel in panels)]
  _chart([at_rest_panel, *panels], names, folder / "benchmark_cpu.png")
