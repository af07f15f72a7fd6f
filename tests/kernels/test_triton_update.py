"""The fused update for GPUs: what its kernels cover, and that programs for GPUs have them."""

import fused_leaves
import jax
import jax.numpy as jnp
import pytest

import eco_optax as eco
from eco_optax.kernels import fused_update, steps, triton_update

# Optax's schedules compare an int32 count with Python floats.
pytestmark = pytest.mark.standard_promotion


def shapes_of(format, shape, **kwargs):
  return jax.eval_shape(lambda: fused_leaves.make(steps.ADAMW, format, shape, **kwargs))


@pytest.mark.parametrize("format", fused_leaves.FORMATS)
def test_every_format_has_a_kernel_for_whole_tiles(format):
  preset = fused_leaves.FORMATS[format]
  for moments_in in ("float32", "bfloat16", "float8_e4m3fn"):
    assert triton_update.applies(shapes_of(preset, (11008, 4096), moments_in=moments_in))


def test_shapes_that_do_not_tile_keep_to_the_definition():
  for format, shape in [
    (eco.FP8, (100, 128)),
    (eco.FP8, (256, 100)),
    (eco.INT4, (33, 128)),
    (eco.FP8, (2**15, 2**16)),
    (eco.Format("int8", (4, 4)), (256, 128)),
    (eco.Format("int8", (48, 1)), (96, 128)),
    (eco.Format("float8_e4m3fn", contraction_axis=-1), (256, 128)),
  ]:
    assert not triton_update.applies(shapes_of(format, shape))
  step = lambda leaf: triton_update.by_tiles(steps.ADAMW, "stochastic", leaf)
  has_kernel = lambda shape: "pallas_call" in str(jax.make_jaxpr(step)(shapes_of(eco.FP8, shape)))
  assert has_kernel((96, 128))
  assert not has_kernel((100, 128))


def test_a_chunk_is_read_again_before_the_cache_has_lost_it():
  chunk = lambda format, shape: (
    triton_update._plan(
      steps.ADAMW, "nearest", shapes_of(format, shape, gradient_dtype=jnp.bfloat16)
    ).chunk
  )
  matrices, panels = chunk(eco.FP8, (4096, 14336))
  assert matrices == 1
  assert 2**23 < 4096 * 64 * panels * 11 <= 2**24
  assert chunk(eco.FP8, (64, 128, 256)) == (32, 4)  # 11 bytes of 32 times 128 × 256.
  assert chunk(eco.INT4, (8, 1024, 1024)) == (1, 16)  # A matrix has one scale, and stays whole.
  assert chunk(eco.MXFP8, (8, 4096, 4096)) == (8, 64)  # Nothing is read again.


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
  if format == "FP8":
    assert "gpu.triton" not in lowered()


@pytest.mark.parametrize("moments_in", ["float32", "float8_e4m3fn"])
@pytest.mark.parametrize("format", ["FP8", "INT4", "FP8_BLOCK128", "MXFP8", "NVFP4"])
def test_kernels_compile_for_an_h100_and_work_in_place(format, moments_in):
  pytest.importorskip("jax_cuda12_plugin")
  from eco_optax.training import compile as compile_lib

  (h100,) = compile_lib.topology_devices("h100:1")
  shape, preset = (4096, 14336), fused_leaves.FORMATS[format]
  leaf = compile_lib.on_device(
    h100, shapes_of(preset, shape, gradient_dtype=jnp.bfloat16, moments_in=moments_in)
  )
  step = lambda weight, moments, rest: fused_update.fused_update(
    steps.ADAMW, "stochastic", rest._replace(weight=weight, moments=moments)
  )
  with compile_lib.abstractly(h100):
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
      leaf.weight, leaf.moments, leaf._replace(weight=None, moments=None)
    )
  compiled = lowered.compile()
  assert "gpu.triton" in compiled.as_text()
  used, size = compiled.memory_analysis(), shape[0] * shape[1]
  of_moment = 4 if moments_in == "float32" else 1
  assert used.alias_size_in_bytes >= size * (2 * of_moment + preset.bits / 8)
  # Block scales, those of moments too, are in float32 on their way in and out.
  assert used.temp_size_in_bytes / size < 0.8
