"""Kernels for GPUs in one launch or two: their bits, what they cover, and their arithmetic."""

import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import fused_leaves
import gpu_leaves
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ptx
import pytest

import eco_optax as eco
from eco_optax import rounding
from eco_optax.fused import dispatch, gpu
from eco_optax.fused.step import definition
from eco_optax.optimizers.adamw import ADAMW
from eco_optax.transforms import stored_moments

# Optax's schedules compare an int32 count with Python floats.
pytestmark = pytest.mark.standard_promotion


def shapes_of(format, shape, **kwargs):
  return jax.eval_shape(lambda: fused_leaves.make(ADAMW, format, shape, **kwargs))


def planned(format, shape, moments_in="float32", **kwargs):
  leaf = shapes_of(format, shape, gradient_dtype=jnp.bfloat16, moments_in=moments_in)
  return gpu.plan(ADAMW, "stochastic", leaf, **kwargs)


def test_interpreted_kernels_equal_the_definition_to_the_bit():
  """Without fused multiply-adds, which a compiler puts where it likes; in a process of its own."""
  flags = fused_leaves.EXACT + " --xla_force_host_platform_device_count=1"
  flags = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  program = pathlib.Path(gpu_leaves.__file__)
  done = subprocess.run([sys.executable, program], env=flags, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("format", fused_leaves.FORMATS)
@pytest.mark.parametrize("moments_in", ["float32", "bfloat16", "float8_e4m3fn", "factored"])
def test_every_format_has_a_kernel(format, moments_in):
  own = planned(fused_leaves.FORMATS[format], (11264, 4096), moments_in)
  assert own.height * own.width <= 32 * own.warps * 16


def test_rows_stay_in_registers_if_they_fit():
  plan = functools.partial(planned, gpu_leaves.ROWS)
  assert plan((4096, 4096)).turns == 1
  assert plan((4096, 4096), "float8_e4m3fn").per == 8
  assert plan((4096, 14336)).turns == 14
  assert not plan((4096, 14336)).masked
  assert plan((4096, 11000)).masked
  assert plan((4096, 256)).height == 8  # Several short rows together.
  assert plan((2, 4096, 11008), "float8_e4m3fn").along == 1


def test_what_has_no_kernel():
  for format, shape in [
    (gpu_leaves.ROWS, (64, 102)),
    (eco.FP8, (64, 100)),
    (eco.FP8, (2**15, 2**16)),
    (eco.Format("int8", (4, 2)), (256, 128)),
    (eco.Format("int8", (48, 1)), (96, 128)),
    (eco.Format("int4", contraction_axis=-1), (63, 128)),
  ]:
    assert planned(format, shape) is None


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older ones lower on GPUs only")
@pytest.mark.parametrize("format", fused_leaves.FORMATS)
def test_programs_for_a_gpu_have_kernels(format):
  """As far as Triton's own language; where no GPU is meant they keep to the definition."""
  tx = eco.adamw(1e-3, rounding="nearest" if format == "FP8" else "stochastic")
  preset = fused_leaves.FORMATS[format]
  params = jax.eval_shape(lambda: eco.quantize({"w": jnp.ones((128, 128))}, preset))
  grads = jax.eval_shape(eco.dequantize, params)
  state = jax.eval_shape(tx.init, params)

  def lowered():
    traced = jax.jit(lambda *args: tx.update(*args)).trace(grads, state, params)
    return traced.lower(lowering_platforms=("cuda",)).as_text()

  device = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
  )
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
    assert "gpu.triton" in lowered()
  if format == "FP8" and jax.default_backend() == "cpu":
    assert "gpu.triton" not in lowered()


def compiled_for_an_h100(leaf, how, implementation=dispatch.take_step, **options):
  if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    pytest.skip("compiling for a GPU takes JAX's CUDA plugin")
  from eco_optax.training import compile as compile_lib

  (h100,) = compile_lib.topology_devices("h100:1")
  here = compile_lib.on_device(h100, leaf)
  step = lambda weight, moments, rest: implementation(
    ADAMW, how, rest._replace(weight=weight, moments=moments)
  )
  with compile_lib.abstractly(h100):
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
      here.weight, here.moments, here._replace(weight=None, moments=None)
    )
  return lowered.compile(options)


@pytest.mark.parametrize("moments_in", ["float32", "float8_e4m3fn", "factored"])
@pytest.mark.parametrize("format", ["FP8", "INT4", "FP8_BLOCK128", "MXFP8", "NVFP4"])
def test_kernels_compile_for_an_h100_and_work_in_place(format, moments_in):
  shape, preset = (4096, 14336), fused_leaves.FORMATS[format]
  leaf = shapes_of(preset, shape, gradient_dtype=jnp.bfloat16, moments_in=moments_in)
  compiled = compiled_for_an_h100(leaf, "stochastic")
  assert "gpu.triton" in compiled.as_text()
  used, size = compiled.memory_analysis(), shape[0] * shape[1]
  of_moments = {"float32": 8, "float8_e4m3fn": 2, "factored": 1}[moments_in]
  assert used.alias_size_in_bytes >= size * (of_moments + preset.bits / 8)
  # Scales of two launches are made anew.
  assert used.temp_size_in_bytes / size < 0.8


def test_blocks_of_moments_lie_along_the_weights_rows():
  shape = (64, 128)
  for format, wanted in [(gpu_leaves.ROWS, (1, 32)), (eco.FP8, (32, 1)), (eco.INT4, (32, 1))]:
    params = jax.eval_shape(lambda f=format: eco.quantize({"w": jnp.ones(shape)}, f))
    state = jax.eval_shape(eco.low_bit_moments(eco.adamw(1e-3)).init, params)
    assert state.inner.inner[0].mu["w"].format.granularity == wanted
  assert stored_moments.block_format(shape, "int8", True, -1).granularity == (1, 32)


def test_bits_of_elements_side_by_side_are_those_of_the_elements():
  for per in (4, 8, 16):
    first = (jnp.arange(512, dtype=jnp.uint32) * np.uint32(per * 77777))[:, None]
    offset = jnp.arange(per, dtype=jnp.uint32)
    np.testing.assert_array_equal(rounding.mixed(first, offset), rounding.mixed(first + offset))


def corrected(x, scale):
  """`gpu_math.over`'s instructions; products of float32 in long doubles are exact, sums nearly."""
  fma = lambda p, q, r: np.float32(p.astype(np.longdouble) * q + r)
  y = np.float32(1) / scale
  q = x * y
  return fma(fma(scale, q, -x), -y, q)


def test_division_by_a_correction_is_ieee_division():
  """But for one in 10^7 that lies near the middle of two numbers, and is the other one."""
  draw = np.random.default_rng(0)
  n = 2_000_000
  mantissas = lambda: (draw.integers(2**23, 2**24, n) / 2**23).astype(np.float32)
  scale = np.ldexp(mantissas(), draw.integers(-40, 10, n)).astype(np.float32)
  # Also what lies beside a divisor of the hardest kind: all ones, or one bit.
  scale[::7] = np.nextafter(np.float32(2), np.float32(0))
  scale[1::7] = np.nextafter(np.float32(1), np.float32(2))
  x = np.ldexp(mantissas(), draw.integers(-30, 9, n)).astype(np.float32) * scale
  x[::1000] *= 0
  x[::2000] *= -1
  found, wanted = corrected(x, scale), x / scale
  np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))
  differ = found != wanted
  assert np.sum(differ) <= 2
  np.testing.assert_array_max_ulp(found, wanted, 1)


def e4m3_by_its_own_bits(y, bits):
  """`gpu_math`'s instructions for stochastic codes of E4M3."""
  t = (y.view(np.uint32) + np.uint32(4)) & np.uint32(0xFFFFFFF8)
  z = ((t + (bits >> np.uint32(12))) & np.uint32(0xFFF00000)).view(np.float32)
  small = ((t & np.uint32(0x7FFFFFFF)).view(np.float32) * np.float32(2.0**36)).astype(np.int64)
  small = ((small + (bits >> np.uint32(5))) >> 27).astype(np.float32) * np.float32(2.0**-9)
  z = np.where(np.abs(y) < 2.0**-6, np.copysign(small, y), np.clip(z, -448, 448))
  return z.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def test_codes_by_their_own_bits_are_those_of_the_definition():
  draw = np.random.default_rng(1)
  n = 2_000_000
  y = np.ldexp(draw.uniform(-2, 2, n), draw.integers(-24, 9, n)).astype(np.float32)
  y[:4] = 0.0, -0.0, 448, -448
  bits = draw.integers(0, 2**32, n, dtype=np.uint32)
  wanted = rounding.code_bits(jnp.asarray(y), jnp.dtype("float8_e4m3fn"), jnp.asarray(bits))
  np.testing.assert_array_equal(e4m3_by_its_own_bits(y, bits), np.asarray(wanted) & 255)


def on_the_host(kernels):
  """`gpu._call` by compiled kernels whose instructions are run one by one."""

  def call(plan, kernel, programs, given, changed, new):
    held = [
      *(np.asarray(x) for x in (*given, *changed)),
      *(np.zeros(x.shape, x.dtype) for x in new),
    ]
    ends = np.cumsum([-(-x.nbytes // 256) * 256 for x in held])
    memory, starts = np.zeros(ends[-1], np.uint8), [0, *ends[:-1]]
    for start, x in zip(starts, held, strict=True):
      memory[start : start + x.nbytes] = np.ascontiguousarray(x).view(np.uint8).reshape(-1)
    operands = len(given) + len(changed)
    results = [*range(operands, len(held)), *range(len(given), operands)]
    finds = plan.schedule == "two launches" and not new
    for program in reversed(range(programs)):  # In any order.
      places = [starts[k] for k in (*range(operands), *results)]
      ptx.run(kernels["find" if finds else "write"], memory, places, (program, 0, 0))
    of = lambda k: memory[starts[k] : starts[k] + held[k].nbytes].view(held[k].dtype)
    return [jnp.asarray(of(k).reshape(held[k].shape)) for k in results]

  return call


@pytest.mark.parametrize(
  ("format", "how", "shape", "moments_in", "tuning"),
  [
    (gpu_leaves.ROWS, "stochastic", (8, 256), "float8_e4m3fn", gpu.TUNED),
    (gpu_leaves.ROWS, "nearest", (4, 352), "float32", gpu.Tuning(row=128, chunk=128)),
    (eco.FP8, "stochastic", (2, 64, 64), "bfloat16", gpu.TUNED),
    (eco.INT4, "stochastic", (64, 64), "float8_e4m3fn", gpu.TUNED),
    (eco.INT4, "stochastic", (2, 64, 64), "factored", gpu.TUNED),
    (eco.MXFP8, "stochastic", (64, 64), "float32", gpu.TUNED),
    (eco.NVFP4, "stochastic", (64, 64), "float32", gpu.TUNED),
    (eco.FP8_BLOCK128, "nearest", (128, 128), "float32", gpu.TUNED),
  ],
)
def test_compiled_kernels_take_the_step_of_the_definition(
  format, how, shape, moments_in, tuning, monkeypatch, tmp_path
):
  """The instructions for an H100, run on this machine."""
  pytest.importorskip("jax_cuda12_plugin", reason="that for CUDA 13 does not write its PTX")
  layer = 5 if len(shape) > 2 else None
  leaf = fused_leaves.make(ADAMW, format, shape, layer, jnp.bfloat16, moments_in)
  step = functools.partial(gpu.by_tiles, tuning=tuning)
  compiled_for_an_h100(jax.eval_shape(lambda: leaf), how, step, xla_dump_to=str(tmp_path))
  kernels = {}
  for text in (f.read_text() for f in tmp_path.glob("*.ptx")):
    for name in re.findall(r"\.entry (fused_step\w*)\(", text):
      body = text[text.index(f".entry {name}(") :].split(".entry", 2)[1]
      kernels["find" if "atom." in body else "write"] = ptx.parse(text, name)
  wanted = fused_leaves.run(definition, ADAMW, how, leaf)
  monkeypatch.setattr(gpu, "_call", on_the_host(kernels))
  with jax.disable_jit():
    found = jax.tree.leaves(step(ADAMW, how, leaf))
  for a, b in zip(found, wanted, strict=True):
    a, b = (np.asarray(x).astype(np.float32) for x in (a, b))
    # Last places differ by the multiply-adds that this machine's compiler fuses.
    assert np.sum(np.abs(a - b) > 1e-5 * np.max(np.abs(b))) <= 1


def test_products_and_sums_are_not_contracted(tmp_path):
  """Which the kernels rely on: they have none of the guards of `add_update` and `times_scale`."""
  pytest.importorskip("jax_cuda12_plugin", reason="that for CUDA 13 does not write its PTX")
  leaf = jax.eval_shape(
    lambda: fused_leaves.make(ADAMW, gpu_leaves.ROWS, (64, 256), None, jnp.bfloat16)
  )
  compiled_for_an_h100(leaf, "stochastic", gpu.by_tiles, xla_dump_to=str(tmp_path))
  (text,) = (x for f in tmp_path.glob("*.ptx") if ".entry fused_step" in (x := f.read_text()))
  assert "mul.rn.f32" in text
  # Those of inline assembly, which are meant, share a line with others.
  assert not re.findall(r"^\s*(?:fma\.rn|mul|add|sub)\.f32\b", text, re.MULTILINE)


@pytest.fixture
def on_gpu():
  """With JAX_PLATFORMS=cuda,cpu where there is an NVIDIA GPU."""
  if jax.default_backend() != "gpu":
    pytest.skip("runs on a GPU")


@pytest.mark.parametrize(
  ("step", "format", "moments_in", "how", "shape"),
  [
    *(("adamw", name, "float32", "stochastic", (1024, 768)) for name in fused_leaves.FORMATS),
    *(("adamw", name, "float32", "nearest", (3, 512, 256)) for name in fused_leaves.FORMATS),
    *(("adamw", name, "bfloat16", "stochastic", (3, 512, 256)) for name in ("FP8", "MXFP8")),
    *(("adamw", name, "float8_e4m3fn", "stochastic", (1024, 768)) for name in ("FP8", "INT4")),
    *(("adamw", name, "factored", "stochastic", (1024, 768)) for name in ("FP8", "NVFP4")),
    *(("sgd", name, "float32", "stochastic", (1024, 768)) for name in ("FP8", "NVFP4")),
  ],
)
def test_a_gpu_takes_the_step_of_the_definition(on_gpu, step, format, moments_in, how, shape):
  """Its kernel, held against the definition on the same GPU and on the CPU."""
  step, layer = fused_leaves.STEPS[step], 5 if len(shape) > 2 else None
  preset = fused_leaves.FORMATS[format]
  leaf = fused_leaves.make(step, preset, shape, layer, jnp.bfloat16, moments_in)
  fused = jax.jit(functools.partial(dispatch.take_step, step, how))
  assert "triton" in fused.lower(leaf).as_text()
  found = jax.tree.leaves(fused(leaf))
  for device in (jax.devices()[0], jax.devices("cpu")[0]):
    wanted = fused_leaves.run(definition, step, how, jax.device_put(leaf, device))
    for a, b in zip(found, wanted, strict=True):
      a, b = (np.asarray(x).astype(np.float32) for x in (a, b))
      # Last places differ by the multiply-adds that compilers fuse, and what is rounded where that
      # is what decides: of stored moments in one of 10^4, whose momentum is a difference.
      limit = 1e-4 if moments_in == "float32" else 1e-3
      assert np.mean(np.abs(a - b) > 1e-5 * np.max(np.abs(b))) <= limit
