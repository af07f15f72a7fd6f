"""Kernels for GPUs in one launch or two: their bits, what they cover, and their arithmetic."""

import functools
import os
import pathlib
import subprocess
import sys

import fused_leaves
import gpu_leaves
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eco_optax as eco
from eco_optax import rounding
from eco_optax.fused import gpu_math, gpu_rows, steps
from eco_optax.transforms import stored_moments

# Optax's schedules compare an int32 count with Python floats.
pytestmark = pytest.mark.standard_promotion


def planned(format, shape, moments_in="float32", **kwargs):
  leaf = jax.eval_shape(
    lambda: fused_leaves.make(
      steps.ADAMW, format, shape, gradient_dtype=jnp.bfloat16, moments_in=moments_in
    )
  )
  return gpu_rows.plan(steps.ADAMW, "stochastic", leaf, **kwargs)


def test_interpreted_kernels_equal_the_definition_to_the_bit():
  """Without fused multiply-adds, which a compiler puts where it likes; in a process of its own."""
  flags = "--xla_cpu_max_isa=AVX --xla_backend_optimization_level=0"
  flags = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  program = pathlib.Path(gpu_leaves.__file__)
  done = subprocess.run([sys.executable, program], env=flags, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("format", fused_leaves.FORMATS)
@pytest.mark.parametrize("moments_in", ["float32", "bfloat16", "float8_e4m3fn"])
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


def test_blocks_of_moments_lie_along_the_weights_rows():
  shape = (64, 128)
  for format, wanted in [(gpu_leaves.ROWS, (1, 32)), (eco.FP8, (32, 1)), (eco.INT4, (32, 1))]:
    params = jax.eval_shape(lambda f=format: eco.quantize({"w": jnp.ones(shape)}, f))
    state = jax.eval_shape(eco.low_bit_moments(eco.adamw(1e-3)).init, params)
    assert state.inner.inner[0].mu["w"].format.granularity == wanted
  assert stored_moments.block_format(shape, "int8", True, -1).granularity == (1, 32)


def test_bits_of_elements_side_by_side_are_those_of_the_elements():
  key = rounding.stream_key(3, 7, "w")
  for per in (4, 8):
    first = (jnp.arange(512, dtype=jnp.uint32) * np.uint32(per * 77777))[:, None]
    elements = first + jnp.arange(per, dtype=jnp.uint32)
    for matrix in (None, jnp.uint32(5)):
      found = gpu_math.element_bits(tuple(key), first, per, matrix)
      np.testing.assert_array_equal(found, rounding.element_bits(key, elements, matrix))


def twice_corrected(x, scale):
  """`gpu_math.over`'s instructions; products of float32 in float64 are exact, and sums nearly."""
  f32 = np.float32
  mantissa, exponent = np.frexp(scale)
  factor, b = np.ldexp(f32(1), 1 - exponent).astype(f32), (2 * mantissa).astype(f32)
  y = (f32(1) / b).astype(f32)
  a = x * factor
  q = a * y
  fma = lambda p, q, r: np.float32(p.astype(np.longdouble) * q + r)
  for _ in range(2):
    e = fma(-q, b, a)
    q = fma(e, y, q)
  return q


def test_division_by_two_corrections_is_ieee_division():
  draw = np.random.default_rng(0)
  n = 2_000_000
  mantissas = lambda: (draw.integers(2**23, 2**24, n) / 2**23).astype(np.float32)
  scale = np.ldexp(mantissas(), draw.integers(-40, 10, n)).astype(np.float32)
  # Also what lies beside a divisor of the hardest kind: all ones, or one bit.
  scale[::7] = np.nextafter(np.float32(2), np.float32(0))
  scale[1::7] = np.nextafter(np.float32(1), np.float32(2))
  x = np.ldexp(mantissas(), draw.integers(-30, 9, n)).astype(np.float32) * scale
  np.testing.assert_array_equal(twice_corrected(x, scale), x / scale)


def e4m3_by_its_own_bits(y, bits):
  """`gpu_math`'s instructions for stochastic codes of E4M3."""
  t = np.minimum((y.view(np.int32) + 4) & 0x7FFFFFF8, 0x43E00000)
  code = (t.astype(np.int64) + (bits >> 12) - (120 << 23)) >> 20
  small = (t.view(np.float32) * np.float32(2.0**36)).astype(np.int64)
  code = np.where(t < 0x3C800000, (small + (bits >> 5)) >> 27, code)
  return code | ((y.view(np.uint32) >> 24) & 0x80)


def test_codes_by_their_own_bits_are_those_of_the_definition():
  draw = np.random.default_rng(1)
  n = 2_000_000
  y = np.ldexp(draw.uniform(-2, 2, n), draw.integers(-24, 9, n)).astype(np.float32)
  bits = draw.integers(0, 2**32, n, dtype=np.uint32)
  wanted = rounding.code_bits(jnp.asarray(y), jnp.dtype("float8_e4m3fn"), jnp.asarray(bits))
  np.testing.assert_array_equal(e4m3_by_its_own_bits(y, bits), np.asarray(wanted) & 255)
