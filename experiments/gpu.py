"""What a GPU that is there for minutes is asked: a queue of measurements, in order of worth.

Each entry runs in a process of its own, with a time limit, so that a crash or a hang costs that
entry only. It writes each figure as it has it; a queue that was cut off goes on where it stopped.
An entry needs JAX and Optax, and those of whole training steps what training needs.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import pathlib
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]  # By name.

SIZE = 2**30  # Weights of a fused step.
_LEAVES = 16  # Of a fused step,
_FEW = 4  # and of a variant of one, which is compiled sooner.
RATE = 1e-3
REFERENCE = "float32 optax.adamw"


class Entry(NamedTuple):
  """A measurement."""

  seconds: float  # Limit.
  rows: Callable[[int], Rows]  # Of a number of weights.


def card() -> str:
  """This machine's GPU as a file name, without starting JAX; "cpu" where there is none."""
  try:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    name = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
  except (OSError, subprocess.CalledProcessError, IndexError):
    name = "cpu"
  return re.sub(r"\W+", "_", name.strip().lower())


def _versions() -> dict[str, str]:
  names = ("jax", "jaxlib", "optax", "numpy", "flashoptim_jax")
  found = {"python": platform.python_version()}
  for name in names:
    module = sys.modules.get(name)
    if module is not None and hasattr(module, "__version__"):
      found[name] = module.__version__
  return found


# Timing


def _time(run: Callable[[], Any], repeats: int) -> list[float]:
  """Seconds of each call, after one that does not count."""
  import jax

  jax.block_until_ready(run())
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return seconds


def _loops(size: int) -> int:
  return 20 if size >= 2**24 else 2


def _many_steps(step: Callable[[Any, Any, Any], Any], kept: Any, grads: Any, size: int) -> Row:
  """Milliseconds of a step among many of one program, so that the host does not count.

  Args:
    step: (carry, gradients, number of the step) → carry.
    kept: to begin with; it is used up.
    grads: of every step.
    size: weights.

  Returns:
    Median and extremes, temporaries and bytes at rest per weight.
  """
  import jax
  import jax.numpy as jnp

  loops = _loops(size)
  program = jax.jit(
    lambda kept, grads: jax.lax.fori_loop(0, loops, lambda i, x: step(x, grads, i), kept),
    donate_argnums=0,
  )
  compiled = program.lower(kept, grads).compile()
  used: Any = compiled.memory_analysis()
  rest = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept) if jnp.ndim(x)) / size

  def run() -> Any:
    nonlocal kept
    kept = compiled(kept, grads)
    return kept

  seconds = [1e3 * x / loops for x in _time(run, 3)]
  peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
  return {
    "milliseconds": statistics.median(seconds),
    "least": min(seconds),
    "most": max(seconds),
    "steps_in_one_program": loops,
    "bytes_at_rest": rest,
    "temporaries": used.temp_size_in_bytes / size,
    "process_peak_bytes": peak,
  }


# Ceilings


def ceilings(size: int) -> Rows:
  """Bandwidth of a copy, and rates of products."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  loops = _loops(size)
  x = jax.random.normal(jax.random.key(0), (size // 4096, 4096), jnp.float32)
  copies = jax.jit(
    lambda x: jax.lax.fori_loop(0, loops, lambda i, x: x * np.float32(1.0000001), x),
    donate_argnums=0,
  )

  def copy() -> Any:
    nonlocal x
    x = copies(x)
    return x

  seconds = statistics.median(_time(copy, 3)) / loops
  yield (
    "copy",
    {"gigabytes_per_second": 2 * x.nbytes / seconds / 1e9, "milliseconds": 1e3 * seconds},
  )
  del x

  contract = (((1,), (1,)), ((), ()))  # As Hopper's FP8 units want it.
  side = 8192 if size >= 2**26 else 64
  for name in ("bfloat16", "float8_e4m3fn"):
    dtype: Any = jnp.dtype(getattr(jnp, name))
    a, b = (
      jax.random.normal(jax.random.key(k), (side, side), jnp.float32).astype(dtype) for k in (0, 1)
    )

    def products(a: Any, b: Any, dtype: Any = dtype) -> Any:
      def one(_: Any, a: Any) -> Any:
        y = jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.bfloat16)
        return (y * np.dtype(jnp.bfloat16).type(0.01)).astype(dtype)

      return jax.lax.fori_loop(0, loops, one, a)

    seconds = statistics.median(_time(functools.partial(jax.jit(products), a, b), 3)) / loops
    yield f"{name} product of {side}", {"teraflops": 2 * side**3 / seconds / 1e12}


# Fused steps


def _shape(size: int, leaves: int = _LEAVES) -> tuple[int, int]:
  """(in, out) of one of the matrices."""
  leaf = size // leaves
  rows = min(4096, 1 << (leaf.bit_length() // 2))
  return rows, leaf // rows


def _draw(
  shape: tuple[int, int], leaves: int, scale: float, key: int, dtype: Any = None
) -> dict[str, Any]:
  import jax
  import jax.numpy as jnp

  make = jax.jit(lambda key: (scale * jax.random.normal(key, shape)).astype(dtype or jnp.float32))
  keys = jax.random.split(jax.random.key(key), leaves)
  return {f"layer{i:02}": make(keys[i]) for i in range(leaves)}


def _optax_step(tx: Any) -> Callable[[Any, Any, Any], Any]:
  import eco_optax as eco

  def step(kept: Any, grads: Any, i: Any) -> Any:
    del i
    params, state = kept
    updates, state = tx.update(grads, state, params)
    return eco.apply_updates(params, updates), state

  return step


class Way(NamedTuple):
  """A way to train matrices."""

  moved: float  # Bytes read and written per weight, at least; of scales too.
  init: Callable[[dict[str, Any]], Any]
  step: Callable[[Any, Any, Any], Any]
  transposed: bool = False  # Stored (out, in).


def _adamw(dtype: Any, moved: float) -> Way:
  import optax

  tx = optax.adamw(RATE)

  def init(dense: Any) -> Any:
    params = optax.tree.cast(dense, dtype)
    return params, tx.init(params)

  step = _optax_step(tx)
  return Way(moved, init, lambda kept, grads, i: step(kept, optax.tree.cast(grads, dtype), i))


def _eco(format: Any, moved: float, moments: str | None = None, transposed: bool = False) -> Way:
  import jax

  import eco_optax as eco

  tx: Any = eco.adamw(RATE)
  if moments:
    tx = eco.low_bit_moments(tx, moments, moments)  # type: ignore[arg-type]

  def init(dense: Any) -> Any:
    # Leaf by leaf, so that there are no copies of all at once.
    pack = jax.jit(lambda x: eco.quantize({"kernel": x}, format)["kernel"], donate_argnums=0)
    params = {}
    for name in list(dense):
      params[name] = pack(dense.pop(name))
    return params, jax.jit(tx.init)(params)

  return Way(moved, init, _optax_step(tx), transposed)


def _kernel_scalars() -> Any:
  from eco_optax.optimizers.adamw import AdamScalars

  values = (1.0, 0.1, 0.9, 0.001, 0.999, 1.9, 0.0, 1.5, 0.0, 1e-8, 1e-4, 1e-3, -50.0, 1e20)
  return AdamScalars(*values)


def _leafwise(
  run: Callable[[Any], Any],
  format: Any,
  moved: float,
  moments: str = "float32",
  transposed: bool = False,
) -> Way:
  """Leaves by themselves through one kernel: without an optimizer's state around them."""
  import jax
  import jax.numpy as jnp

  import eco_optax as eco
  from eco_optax import rounding
  from eco_optax.fused.leaf import Leaf
  from eco_optax.transforms import stored_moments

  kinds: Any = ("first", "second")

  @functools.partial(jax.jit, donate_argnums=0)
  def one(x: Any) -> Any:
    weight = eco.quantize({"kernel": x}, format)["kernel"]
    first, second = 0.05 * x, jnp.square(0.05 * x) + 1e-9
    if moments == "float32":
      return weight, (first, second)
    bits = rounding.counter_bits(rounding.stream_key(0, 0, "m"), x.shape)
    axis = stored_moments.block_axis(format)
    return weight, tuple(
      stored_moments.store(m, kind, moments, bits, True, axis)
      for m, kind in zip((first, second), kinds, strict=True)
    )

  def init(dense: Any) -> Any:
    return {name: one(dense.pop(name)) for name in list(dense)}

  def step(kept: Any, grads: Any, i: Any) -> Any:
    new = {}
    for name, (weight, m) in kept.items():
      streams = ("",) if moments == "float32" else ("", "mu", "nu")
      starts = jnp.array([rounding.stream_start(0, name + kind) for kind in streams])
      steps = jnp.full(len(streams), i, jnp.int32)
      scalars = jax.tree.map(jnp.float32, _kernel_scalars())
      new[name] = run(Leaf(scalars, starts, steps, None, weight, grads[name], m))
    return new

  return Way(moved, init, step, transposed)


def _interpreted() -> bool:
  import jax

  return jax.default_backend() == "cpu"


def _target() -> Any:
  from eco_optax.fused import gpu_math

  return gpu_math.Target(interpret=_interpreted())


def _by_tiles(**tuning: Any) -> Callable[[Any], Any]:
  from eco_optax.fused import gpu
  from eco_optax.optimizers.adamw import ADAMW

  chosen = gpu.Tuning(**tuning)
  return lambda leaf: gpu.by_tiles(ADAMW, "stochastic", leaf, _target(), chosen)


# Bytes per weight, moments in float32: gradient 2, codes, moments; scales are few.
_MOVED = 20.0
_COLUMNS_MOVED = 2 * 11 + 9.0  # What two launches read twice, columns' scales among it.
_LOW = 2 + 3 * 2 + 4 / 32  # All in one byte, with scales of two moments.
_COLUMNS_LOW = 2 * (2 + 3 + 2 / 32) + 3 + 2 / 32
_BFLOAT16 = 2 + 5 * 2
_INT4 = 2 * 10.5 + 8.5
_MXFP8 = 20 + 2 / 32
_NVFP4 = 2 * (10.5 + 1 / 16) + 8.5 + 1 / 16


def _formats() -> dict[str, Any]:
  import eco_optax as eco
  from eco_optax.formats import Format

  found = {name: getattr(eco, name) for name in ("FP8", "INT4", "MXFP8", "NVFP4", "FP8_BLOCK128")}
  found["rows"] = Format("float8_e4m3fn", contraction_axis=-1)
  return found


def ways() -> dict[str, Callable[[], Way | None]]:
  """The compared optimizers, by name; the first is the unit of ratios."""
  formats, f8 = _formats(), "float8_e4m3fn"
  rows = formats["rows"]
  return {
    REFERENCE: lambda: _adamw("float32", 26),
    "eco.adamw FP8 (out, in)": lambda: _eco(rows, _MOVED, transposed=True),
    "eco.adamw FP8 (out, in), FP8 moments": lambda: _eco(rows, _LOW, f8, True),
    "eco.adamw FP8 (in, out)": lambda: _eco(formats["FP8"], _COLUMNS_MOVED),
    "eco.adamw INT4": lambda: _eco(formats["INT4"], _INT4),
    "eco.adamw FP8 (out, in), bfloat16 moments": lambda: _eco(rows, _BFLOAT16, "bfloat16", True),
    "eco.adamw FP8 (in, out), FP8 moments": lambda: _eco(formats["FP8"], _COLUMNS_LOW, f8),
    "eco.adamw MXFP8": lambda: _eco(formats["MXFP8"], _MXFP8),
    "eco.adamw NVFP4": lambda: _eco(formats["NVFP4"], _NVFP4),
    "eco.adamw FP8_BLOCK128": lambda: _eco(formats["FP8_BLOCK128"], _MOVED),
    "bfloat16 optax.adamw": lambda: _adamw("bfloat16", 14),
    "flashoptim-jax, 24-bit master": _flashoptim,
  }


def _flashoptim() -> Way | None:
  """AdamW of flashoptim-jax, if that is installed."""
  import jax.numpy as jnp
  import optax

  try:
    flashoptim = importlib.import_module("flashoptim_jax")
  except ImportError:
    return None
  tx = flashoptim.flash_adamw(learning_rate=RATE, master_weight_bits=24)

  def init(dense: Any) -> Any:
    params = optax.tree.cast(dense, jnp.bfloat16)
    return params, tx.init(params)

  return Way(2 + 2 * 5.125, init, lambda kept, grads, i: tx.step(*kept, grads))


def _measured(
  makers: dict[str, Callable[[], Way | None]], size: int, leaves: int = _LEAVES
) -> Rows:
  """Each way's time, also as a ratio to the first's, and its share of a copy's bandwidth."""
  import jax
  import jax.numpy as jnp

  shape, reference, copied = _shape(size, leaves), None, None
  for name, figures in ceilings(min(size, 2**28)):
    if name == "copy":
      copied = figures["gigabytes_per_second"]
      break
  yield "copy", {"gigabytes_per_second": copied}
  for name, make in makers.items():
    try:
      way = make()
      if way is None:
        continue
      own = shape[::-1] if way.transposed else shape
      grads = _draw(own, leaves, 1e-3, 1, jnp.bfloat16)
      kept = way.init(_draw(own, leaves, 0.02, 0))
      row = _many_steps(way.step, kept, grads, size)
    except Exception as error:  # The next may work.
      yield name, {"error": f"{type(error).__name__}: {error}"[:500]}
      continue
    del kept, grads
    reference = reference or row["milliseconds"]
    moved = way.moved * size / row["milliseconds"] / 1e6
    yield (
      name,
      row
      | {
        "ratio": row["milliseconds"] / reference,
        "bytes_moved": way.moved,
        "share_of_copy": moved / copied,
      },
    )
    jax.clear_caches()


def fused_steps(size: int) -> Rows:
  """Steps of about 1.07B weights in every way."""
  yield from _measured(ways(), size)


def _variants(
  format: str, moved: float, moments: str, tunings: Sequence[dict[str, Any]]
) -> Callable[[int], Rows]:
  """Kernels by how they are tuned."""

  def rows(size: int) -> Rows:
    chosen = _formats()[format]

    def maker(tuning: dict[str, Any]) -> Callable[[], Way | None]:
      run = _by_tiles(**tuning)
      return lambda: _leafwise(run, chosen, moved, moments, format == "rows")

    makers: dict[str, Callable[[], Way | None]] = {REFERENCE: lambda: _adamw("float32", 26)}
    for tuning in tunings:
      name = ", ".join(f"{key} {value}" for key, value in tuning.items()) or "default"
      makers[name] = maker(tuning)
    yield from _measured(makers, size, _FEW)

  return rows


def _in_optimizer(format: str, moved: float, tunings: Sequence[dict[str, Any]]) -> Any:
  """`eco.adamw` by kernels that are tuned, among all that the optimizer does beside them."""

  def rows(size: int) -> Rows:
    import jax

    from eco_optax.fused import dispatch, gpu

    def maker(tuning: dict[str, Any]) -> Callable[[], Way | None]:
      def make() -> Way:
        gpu.by_tiles = functools.partial(by_tiles, tuning=gpu.Tuning(**tuning))
        dispatch._compiled.cache_clear()
        jax.clear_caches()
        return _eco(_formats()[format], moved, transposed=format == "rows")

      return make

    by_tiles = gpu.by_tiles
    makers: dict[str, Callable[[], Way | None]] = {REFERENCE: lambda: _adamw("float32", 26)}
    for tuning in tunings:
      name = ", ".join(f"{key} {value}" for key, value in tuning.items()) or "default"
      makers[name] = maker(tuning)
    yield from _measured(makers, size)

  return rows


_ROWS: tuple[dict[str, Any], ...] = (
  {},
  {"chunk": 8192},
  {"elements": 8},
  {"row": 2048, "chunk": 2048},
)
_LOW_ROWS: tuple[dict[str, Any], ...] = (
  {},
  {"per": 16},
  {"chunk": 8192},
  {"per": 16, "chunk": 8192},
  {"elements": 8},
)
_COLUMNS: tuple[dict[str, Any], ...] = (
  {},
  {"chunk": 2048, "elements": 16},
  {"chunk": 1024, "elements": 16},
  {"chunk": 2048},
  {"width": 128},
)
_LOW_COLUMNS: tuple[dict[str, Any], ...] = ({}, {"per": 8}, {"elements": 8}, {"width": 32})
_MATRICES: tuple[dict[str, Any], ...] = (
  {},
  {"chunk": 2048, "elements": 16},
  {"chunk": 1024, "elements": 16},
)
_BLOCKS: tuple[dict[str, Any], ...] = (
  {},
  {"chunk": 1024, "width": 32},
  {"chunk": 1024, "width": 32, "elements": 8},
  {"width": 128},
)


# The arithmetic of kernels


def _difference(found: Any, wanted: Any) -> Row:
  """How much two results differ."""
  import jax
  import numpy as np

  parts: list[Row] = []
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    raw = [np.asarray(x) for x in (a, b)]
    same = float(np.mean(raw[0].view(np.uint8) == raw[1].view(np.uint8)))
    a, b = (x.astype(np.float32) for x in raw)
    gap = np.abs(a - b)
    largest = np.nanmax(np.abs(b)) + 1e-30
    parts.append(
      {
        "dtype": str(raw[0].dtype),
        "bytes_that_differ": 1 - same,
        "beyond_last_places": float(np.mean(gap > 1e-5 * largest)),
        "largest_gap": float(np.nanmax(gap) / largest),
      }
    )
  return {"arrays": parts, "worst": max(x["beyond_last_places"] for x in parts)}


def arithmetic(size: int) -> Rows:
  """Functions of `gpu_math` against the functions they replace, to the bit, on random bits."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.experimental import pallas as pl

  from eco_optax import rounding
  from eco_optax.fused import gpu_math
  from eco_optax.transforms import stored_moments

  target, dtype = _target(), jnp.dtype(jnp.float8_e4m3fn)
  n = max(min(size, 2**26) // 4096, 1)
  shape = (n, 1024, 4)

  def call(kernel: Any, out: Any, *args: Any) -> Any:
    spec = pl.BlockSpec((1, 1024, 4), lambda i: (i, 0, 0))
    fn = pl.pallas_call(
      kernel, grid=(n,), in_specs=[spec] * len(args), out_specs=spec,
      out_shape=jax.ShapeDtypeStruct(shape, out), interpret=target.interpret,
    )  # fmt: skip
    return jax.jit(fn)(*args)

  raw = jax.random.bits(jax.random.key(2), shape, jnp.uint32)
  dither = jax.random.bits(jax.random.key(3), shape, jnp.uint32)
  as_float = lambda x: jax.lax.bitcast_convert_type(x, jnp.float32)
  any_float = as_float(raw)
  any_float = jnp.where(jnp.isfinite(any_float), any_float, 1.5)
  # In E4M3's range and below it.
  log = jax.random.uniform(jax.random.key(4), shape, minval=-20.0, maxval=9.0)
  y = jnp.where(raw & 1, -1.0, 1.0) * jnp.exp2(log)
  same = lambda a, b: float(jnp.mean((a == b) | (jnp.isnan(a) & jnp.isnan(b))))

  codes = (raw & 255).astype(jnp.uint8)
  found = call(
    lambda c, out: out.__setitem__(..., gpu_math.decode(target, c[...], dtype)), jnp.float32, codes
  )
  wanted = rounding.decode(codes.astype(jnp.int32), dtype)
  yield "decode E4M3", {"equal": same(found, wanted), "of": math.prod(shape)}

  for name, values in (("any float", any_float), ("in range", y)):
    for bits in (dither, None):
      args = (values,) if bits is None else (values, bits)

      def kernel(*refs: Any) -> None:
        *given, out = (ref for ref in refs)
        x = given[0][...]
        drawn = given[1][...] if len(given) > 1 else None
        out[...] = gpu_math.code_bits(target, x, dtype, drawn).astype(jnp.uint8)

      found = call(kernel, jnp.uint8, *args)
      wanted = (rounding.code_bits(values, dtype, bits) & 255).astype(jnp.uint8)
      rounded = "nearest" if bits is None else "stochastic"
      yield f"codes of {name}, {rounded}", {"equal": same(found, wanted), "of": math.prod(shape)}

  scale = jnp.exp2(jax.random.uniform(jax.random.key(5), (n, 1, 1), minval=-30.0, maxval=3.0))
  spread = jnp.broadcast_to(scale, shape)
  x = y * spread

  def divide(x_ref: Any, s_ref: Any, out: Any) -> None:
    out[...] = gpu_math.over(target, x_ref[...], s_ref[...], False)

  found = np.asarray(call(divide, jnp.float32, x, spread))
  quotients: Any = np.asarray(x) / np.asarray(spread)  # By the host.
  equal = float(np.mean(found == quotients))
  yield "division by a scale", {"equal": equal, "of": math.prod(shape)}

  root = jnp.abs(y)

  def roots(y_ref: Any, bits_ref: Any, out: Any) -> None:
    y = y_ref[...]
    codes = gpu_math.root_codes(target, y, y * y, dtype, bits_ref[...])
    out[...] = codes.astype(jnp.uint8)

  found = call(roots, jnp.uint8, root, dither)
  wanted = jax.jit(lambda y: stored_moments.root_codes(y, y * y, dtype, dither))(root)
  equal = same(found, wanted.astype(jnp.uint8))
  yield "codes of roots", {"equal": equal, "of": math.prod(shape)}


def check(size: int) -> Rows:
  """Whole steps on real shapes against the definition on the same GPU.

  Last places differ where XLA contracts products and sums, and with them, rarely, codes.
  """
  import jax
  import jax.numpy as jnp

  import eco_optax as eco
  from eco_optax import rounding
  from eco_optax.fused import gpu
  from eco_optax.fused.leaf import Leaf
  from eco_optax.fused.step import definition
  from eco_optax.optimizers.adamw import ADAMW
  from eco_optax.transforms import stored_moments

  # As the harness has it, which skips steps whose gradients are not finite.
  step = ADAMW._replace(skips=True)
  formats, kinds = _formats(), ("first", "second")
  real = size >= 2**26
  cases = [
    ("rows", (4096, 4096) if real else (16, 256), "float32"),
    ("FP8", (4096, 4096) if real else (64, 64), "float32"),
    ("rows", (512, 11008) if real else (8, 1376), "float8_e4m3fn"),
    ("rows", (2, 1024, 14336) if real else (2, 8, 128), "bfloat16"),
    ("FP8", (2, 4096, 2816) if real else (2, 64, 96), "float8_e4m3fn"),
    ("INT4", (4096, 4096) if real else (64, 64), "float32"),
    ("MXFP8", (4096, 4096) if real else (64, 64), "float8_e4m3fn"),
    ("NVFP4", (4096, 4096) if real else (64, 64), "float32"),
    ("FP8_BLOCK128", (4096, 4096) if real else (128, 128), "float32"),
  ]
  for k, (name, shape, moments) in enumerate(cases):

    def make(key: Any, name: str = name, shape: Any = shape, moments: str = moments) -> Any:
      keys = jax.random.split(key, 4)
      draw = lambda i, scale: scale * jax.random.normal(keys[i], shape)
      weight = eco.quantize({"w": draw(0, 0.02)}, formats[name])["w"]
      m = draw(1, 1e-3), jnp.square(draw(2, 1e-3))
      starts = [rounding.stream_start(3, "w")]
      if moments != "float32":
        bits = jax.random.bits(keys[1], shape, jnp.uint32)
        axis = stored_moments.block_axis(formats[name])
        m = tuple(  # type: ignore[assignment]
          stored_moments.store(x, kind, moments, bits, True, axis)  # type: ignore[arg-type]
          for x, kind in zip(m, kinds, strict=True)
        )
        starts += [rounding.stream_start(5, x) for x in ("mu", "nu")]
      layer = jnp.int32(1) if len(shape) > 2 else None
      scalars = jax.tree.map(jnp.float32, _kernel_scalars())
      gradient = draw(3, 1e-3).astype(jnp.bfloat16)
      steps = jnp.full(len(starts), 7, jnp.int32)
      return Leaf(scalars, jnp.array(starts), steps, layer, weight, gradient, m)

    label = f"{name} {' × '.join(map(str, shape))}, {moments} moments"
    try:
      leaf = jax.jit(make)(jax.random.key(k))
      planned = gpu.plan(step, "stochastic", leaf, _target())
      if planned is None:
        yield label, {"error": "no kernel"}
        continue
      take = jax.jit(functools.partial(gpu.by_tiles, step, "stochastic", target=_target()))
      equal = lambda a, b: not any(x["bytes_that_differ"] for x in _difference(a, b)["arrays"])
      found = take(leaf=leaf)
      wanted = jax.jit(functools.partial(definition, step, "stochastic"))(leaf)
      figures = _difference(found, wanted) | {"schedule": planned.schedule}
      figures["again_equal"] = equal(found, take(leaf=leaf))
      if leaf.layer is not None:  # The same as the middle one of three layers, in place.
        pile = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x, x]), tree)
        old = leaf.weight, leaf.moments
        stack = leaf._replace(weight=pile(old[0]), moments=pile(old[1]))
        new = take(leaf=stack)
        wanted_of_stack = jax.tree.map(lambda x, y: jnp.stack([x, y, x]), old, found)
        figures["in_stack_equal"] = equal(new, wanted_of_stack)
      yield label, figures
    except Exception as error:
      yield label, {"error": f"{type(error).__name__}: {error}"[:500]}


# Whole training steps


def _kernels(step: Callable[[], Any], steps: int, most: int = 24) -> dict[str, float]:
  """Milliseconds of a step that kernels take, by name without numbers; empty without a GPU."""
  import gzip
  import tempfile

  import jax

  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, create_perfetto_trace=False):
      for _ in range(steps):
        jax.block_until_ready(step())
    events: list[dict[str, Any]] = []
    for path in pathlib.Path(folder).rglob("*.trace.json.gz"):
      events += json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
  named = [x for x in events if x.get("ph") == "M"]
  gpus = {
    x["pid"]
    for x in named
    if x["name"] == "process_name" and "/device:GPU" in x["args"].get("name", "")
  }
  streams = {
    (x["pid"], x["tid"])
    for x in named
    if x["name"] == "thread_name" and x["pid"] in gpus and x["args"]["name"].startswith("Stream")
  }
  took: dict[str, float] = {}
  for x in events:
    if x.get("ph") == "X" and (x["pid"], x["tid"]) in streams:
      name = re.sub(r"[._]?\d+$", "", x["name"])[:80]
      took[name] = took.get(name, 0.0) + x["dur"] / 1e3 / steps
  return dict(sorted(took.items(), key=lambda item: -item[1])[:most])


def _training_step(config: Any, steps: int) -> Row:
  """Whole steps of a config's model on random tokens."""
  import jax
  import numpy as np

  from eco_optax.training import compile as compile_lib
  from eco_optax.training import hardware, loop, sharding
  from eco_optax.training import step as step_lib
  from eco_optax.training.data import pipeline

  device = jax.devices()[0]
  tx, mesh = loop.prepare(config)
  shape = config.batch_size, config.length + 1
  tokens = np.random.default_rng(0).integers(0, config.model.vocabulary, shape, np.int32)
  with jax.set_mesh(mesh):
    data = pipeline.Batch(jax.device_put(tokens, sharding.batch_sharding(mesh)))
    state = step_lib.init_state(config, tx, mesh)
    started = time.perf_counter()
    train_step = step_lib.make_train_step(config, tx, mesh).lower(state, data).compile()
    compiled = time.perf_counter() - started

    def once() -> Any:
      nonlocal state
      state, _ = train_step(state, data)
      return state

    once()
    seconds = statistics.median(_time(once, steps))
    used: Any = train_step.memory_analysis()
    tokens, chip = config.batch_size * config.length, hardware.chip(device.device_kind)
    operations = sum(compile_lib.products(train_step.as_text()).values())
    return {
      "milliseconds": 1e3 * seconds,
      "tokens_per_step": tokens,
      "tokens_per_second": tokens / seconds,
      "operations": operations,  # Of all products; recomputed ones count again.
      "share_of_peak_operations": operations / seconds / chip.flops if chip else None,
      "temporaries": used.temp_size_in_bytes,
      "arguments": used.argument_size_in_bytes,
      "process_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
      "seconds_to_compile": compiled,
      "kernels": _kernels(once, 2),
    }


def _training(config: str, batch: int, changes: dict[str, dict[str, Any]]) -> Callable[[int], Rows]:
  """Steps of a config's model on random tokens, by the change to the config."""

  def rows(size: int) -> Rows:
    import runpy

    import ml_collections

    real, first = size >= 2**26, None
    name = config if real else "tiny"
    path = pathlib.Path(__file__).parents[1] / "configs" / f"{name}.py"
    base = runpy.run_path(str(path))["get_config"]()
    for label, change in changes.items():
      own = ml_collections.ConfigDict(base.to_dict())
      own.batch_size, own.accumulation = batch if real else 4, 1
      own.update_from_flattened_dict(change)
      try:
        row = _training_step(own, 6 if real else 1)
      except Exception as error:
        yield label, {"error": f"{type(error).__name__}: {error}"[:500]}
        continue
      first = first or row["milliseconds"]
      yield label, row | {"ratio": row["milliseconds"] / first}

  return rows


# One GPU has the memory to keep what the backward pass needs, and without a loop over layers XLA
# fuses more of it and copies none of it into stacks.
_UNROLLED: dict[str, Any] = {"model.remat": "none", "model.unroll": 16}
_FP8_BACKWARD: dict[str, Any] = {"method": "eco_sr", "gradient_format": "FP8_E5M2_TOKEN"}
_FP8_KERNELS: dict[str, Any] = {"kernel_gradient_format": "FP8"}
_LOW_MOMENTS: dict[str, Any] = {
  "method": "eco_sr",
  "moments.mu": "float8_e4m3fn",
  "moments.nu": "float8_e4m3fn",
}
_METHODS: dict[str, dict[str, Any]] = {
  "BF16": {"method": "bf16_mw"} | _UNROLLED,
  "ECO + SR, FP8 backward": _FP8_BACKWARD | _UNROLLED,
  "ECO + SR": {"method": "eco_sr"} | _UNROLLED,
  "ECO + SR, FP8 moments": _LOW_MOMENTS | _UNROLLED,
  "ECO + SR, FP8 backward, kernels too": _FP8_BACKWARD | _FP8_KERNELS | _UNROLLED,
  "BF16, loop over layers": {"method": "bf16_mw", "model.remat": "dots"},
  "ECO + SR, loop over layers": {"method": "eco_sr", "model.remat": "dots"},
}


# Ordinary training: float32 weights and moments, and as many layers as fit one card. A process only
# knows its peak so far, so the variant with the largest peak comes last.
_ORDINARY: dict[str, Any] = {
  "method": "bf16_mw",
  "release": False,
  "kept_format": "none",
  "model.quantized": "blocks",
  "moments.mu": "float32",
  "moments.nu": "float32",
}
_8B: dict[str, dict[str, Any]] = {
  "1 sequence": {},
  "16 sequences, one after another": {"batch_size": 16, "accumulation": 16},
  "1 sequence, 10 layers, float32 AdamW": _ORDINARY | {"model.layers": 10},
}
_16B: dict[str, dict[str, Any]] = {
  "1 sequence": {},
  "16 sequences": {"batch_size": 16, "accumulation": 1},
}

ENTRIES: dict[str, Entry] = {
  "arithmetic": Entry(60, arithmetic),
  "fused_steps": Entry(150, fused_steps),
  "check": Entry(120, check),
  "rows": Entry(90, _variants("rows", _MOVED, "float32", _ROWS)),
  "columns": Entry(90, _variants("FP8", _COLUMNS_MOVED, "float32", _COLUMNS)),
  "rows_fp8_moments": Entry(60, _variants("rows", _LOW, "float8_e4m3fn", _LOW_ROWS)),
  "columns_fp8_moments": Entry(60, _variants("FP8", _COLUMNS_LOW, "float8_e4m3fn", _LOW_COLUMNS)),
  "matrices": Entry(60, _variants("INT4", _INT4, "float32", _MATRICES)),
  "blocks": Entry(60, _variants("MXFP8", _MXFP8, "float32", _BLOCKS)),
  "rows_in_optimizer": Entry(60, _in_optimizer("rows", _MOVED, ({}, {"elements": 8}))),
  "ceilings": Entry(90, ceilings),
  "train_800m": Entry(120, _training("llama_800m", 32, _METHODS)),
  "train_30m": Entry(90, _training("packages_30m", 64, _METHODS)),
  "train_8b": Entry(180, _training("llama3_8b", 1, _8B)),
  "train_16b": Entry(180, _training("deepseek_moe_16b_one_gpu", 1, _16B)),
}


# The queue


def _load(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.exists() else {}


def _save(path: pathlib.Path, figures: dict[str, Any]) -> None:
  """Writes a whole file or none."""
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_suffix(".new")
  new.write_text(json.dumps(figures, indent=2) + "\n")
  os.replace(new, path)


def _put(path: pathlib.Path, name: str, **changes: Any) -> None:
  """Changes what the file has of an entry."""
  figures = _load(path)
  figures[name] = figures.get(name, {}) | changes
  _save(path, figures)


def run_entry(name: str, path: pathlib.Path, size: int) -> None:
  """Measures one entry in this process, and writes each row as it comes."""
  started = time.perf_counter()
  command = f"python scripts/gpu.py --entry={name}" + (f" --size={size}" if size != SIZE else "")
  _put(path, name, status="running", command=command, size=size, rows={})
  import jax

  device = jax.devices()[0]
  machine = {"device": device.device_kind, "cores": os.cpu_count()}
  rows: dict[str, Row] = {}
  for label, row in ENTRIES[name].rows(size):
    rows[label] = row
    seconds = time.perf_counter() - started
    _put(path, name, rows=rows, seconds=seconds, versions=_versions(), machine=machine)
    short = {key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}
    short = {key: x for key, x in short.items() if key not in ("arrays", "kernels")}
    print(f"{name} [{seconds:.0f} s] {label}: {short}", flush=True)
  _put(path, name, status="done", seconds=time.perf_counter() - started)


def queue(
  path: pathlib.Path,
  seconds: float,
  size: int = SIZE,
  names: Sequence[str] = (),
  again: bool = False,
  command: Sequence[str] = (),
  longest: float = math.inf,
) -> dict[str, str]:
  """Runs entries in order until the time is over.

  Args:
    path: the card's file of results.
    seconds: there are.
    size: weights of a step.
    names: of entries, or all.
    again: whether finished entries run again.
    command: that runs an entry whose name is appended to it as `--entry=`.
    longest: seconds that any entry may take, whose first rows tell most.

  Returns:
    By name, what became of the entries: "done", "failed", "out of time", or "skipped".
  """
  end, fates = time.monotonic() + seconds, {}
  for name in names or ENTRIES:
    if not again and _load(path).get(name, {}).get("status") == "done":
      fates[name] = "skipped"
      continue
    left = end - time.monotonic()
    if left < min(10.0, seconds / 2):
      break
    limit = min(ENTRIES[name].seconds, left, longest)
    process = subprocess.Popen(
      [*command, f"--entry={name}"], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    try:
      _, errors = process.communicate(timeout=limit)
      fate = "done" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)
      _, errors = process.communicate()
      fate = "out of time"
    fates[name] = fate
    if fate != "done":
      _put(path, name, status=fate, error=errors[-2000:])
      print(f"{name}: {fate}\n{errors[-1500:]}", flush=True)
  return fates
