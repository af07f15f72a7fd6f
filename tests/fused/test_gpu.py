"""The fused update for GPUs: what its kernels cover, and that programs for GPUs have them."""

import functools
import importlib.util

import fused_leaves
import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest

import eco_optax as eco
from eco_optax.fused import fused_update, steps
from eco_optax.fused import gpu as triton_update

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
  if format == "FP8" and jax.default_backend() == "cpu":
    assert "gpu.triton" not in lowered()


def compiled_for_an_h100(leaf, how, implementation=fused_update.fused_update, **options):
  if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
    pytest.skip("compiling for a GPU takes JAX's CUDA plugin")
  from eco_optax.training import compile as compile_lib

  (h100,) = compile_lib.topology_devices("h100:1")
  here = compile_lib.on_device(h100, leaf)
  step = lambda weight, moments, rest: implementation(
    steps.ADAMW, how, rest._replace(weight=weight, moments=moments)
  )
  with compile_lib.abstractly(h100):
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
      here.weight, here.moments, here._replace(weight=None, moments=None)
    )
  return lowered.compile(options)


@pytest.mark.parametrize("moments_in", ["float32", "float8_e4m3fn"])
@pytest.mark.parametrize("format", ["FP8", "INT4", "FP8_BLOCK128", "MXFP8", "NVFP4"])
def test_kernels_compile_for_an_h100_and_work_in_place(format, moments_in):
  shape, preset = (4096, 14336), fused_leaves.FORMATS[format]
  leaf = shapes_of(preset, shape, gradient_dtype=jnp.bfloat16, moments_in=moments_in)
  compiled = compiled_for_an_h100(leaf, "stochastic")
  assert "gpu.triton" in compiled.as_text()
  used, size = compiled.memory_analysis(), shape[0] * shape[1]
  of_moment = 4 if moments_in == "float32" else 1
  assert used.alias_size_in_bytes >= size * (2 * of_moment + preset.bits / 8)
  # Block scales, those of moments too, are in float32 on their way in and out.
  assert used.temp_size_in_bytes / size < 0.8


def on_the_host(kernel):
  """`triton_update._launch` by a compiled kernel whose instructions are run one by one."""

  def launch(plan, interpret, turn, given, changed):
    arrays = changed[2 * plan.finds :]
    found_and_scale = changed[:2] if plan.finds else [jnp.zeros_like(given[2])]
    held = [np.asarray(x) for x in (np.array([turn], np.int32), *given, *arrays, *found_and_scale)]
    ends = np.cumsum([-(-x.nbytes // 256) * 256 for x in held])
    memory, starts = np.zeros(ends[-1], np.uint8), [0, *ends[:-1]]
    for start, x in zip(starts, held, strict=True):
      memory[start : start + x.nbytes] = np.ascontiguousarray(x).view(np.uint8).reshape(-1)
    first = 1 + len(given)
    operands = range(len(held) - (not plan.finds))
    results = [*range(first + len(arrays), len(held)), *range(first, first + len(arrays))]
    programs = plan.chunk[0] * plan.chunk[1] * (plan.m.rows // plan.rows)
    for program in reversed(range(programs)):  # In any order.
      for phase in range(1 + plan.finds):
        ptx.run(kernel, memory, [starts[k] for k in (*operands, *results)], (phase, program, 0))
    of = lambda k: memory[starts[k] : starts[k] + held[k].nbytes].view(held[k].dtype)
    return [jnp.asarray(of(k).reshape(held[k].shape)) for k in results]

  return launch


@pytest.mark.parametrize(
  ("format", "how", "shape", "moments_in"),
  [
    ("FP8", "stochastic", (2, 64, 96), "float32"),
    ("FP8", "nearest", (64, 64), "float8_e4m3fn"),
    ("INT4", "stochastic", (64, 64), "bfloat16"),
    ("FP8_BLOCK128", "nearest", (128, 128), "float32"),
    ("MXFP8", "stochastic", (64, 64), "float32"),
    ("NVFP4", "stochastic", (64, 64), "float32"),
  ],
)
def test_compiled_kernels_take_the_step_of_the_definition(
  format, how, shape, moments_in, monkeypatch, tmp_path
):
  """The instructions for an H100, run on this machine, in several chunks."""
  pytest.importorskip("jax_cuda12_plugin", reason="that for CUDA 13 does not write its PTX")
  monkeypatch.setattr(triton_update, "_REREAD", 2**15)
  preset = fused_leaves.FORMATS[format]
  layer = 5 if len(shape) > 2 else None
  leaf = fused_leaves.make(steps.ADAMW, preset, shape, layer, jnp.bfloat16, moments_in)
  wanted = fused_leaves.run(fused_update.definition, steps.ADAMW, how, leaf)
  tiles = triton_update.by_tiles
  compiled_for_an_h100(jax.eval_shape(lambda: leaf), how, tiles, xla_dump_to=str(tmp_path))
  (text,) = (x for f in tmp_path.glob("*.ptx") if ".entry fused_update(" in (x := f.read_text()))
  monkeypatch.setattr(triton_update, "_launch", on_the_host(ptx.parse(text, "fused_update")))
  with jax.disable_jit():
    found = jax.tree.leaves(triton_update.by_tiles(steps.ADAMW, how, leaf))
  for a, b in zip(found, wanted, strict=True):
    a, b = (np.asarray(x).astype(np.float32) for x in (a, b))
    # Last places differ by the multiply-adds that this machine's compiler fuses.
    assert np.sum(np.abs(a - b) > 1e-5 * np.max(np.abs(b))) <= 1


@pytest.fixture
def gpu():
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
    *(("sgd", name, "float32", "stochastic", (1024, 768)) for name in ("FP8", "NVFP4")),
  ],
)
def test_a_gpu_takes_the_step_of_the_definition(gpu, step, format, moments_in, how, shape):
  """Its kernel, held against the definition on the same GPU and on the CPU."""
  step, layer = fused_leaves.STEPS[step], 5 if len(shape) > 2 else None
  preset = fused_leaves.FORMATS[format]
  leaf = fused_leaves.make(step, preset, shape, layer, jnp.bfloat16, moments_in)
  fused = jax.jit(functools.partial(fused_update.fused_update, step, how))
  assert "triton" in fused.lower(leaf).as_text()
  found = jax.tree.leaves(fused(leaf))
  for device in (jax.devices()[0], jax.devices("cpu")[0]):
    wanted = fused_leaves.run(fused_update.definition, step, how, jax.device_put(leaf, device))
    for a, b in zip(found, wanted, strict=True):
      a, b = (np.asarray(x).astype(np.float32) for x in (a, b))
      # Last places differ by the multiply-adds that compilers fuse, and what is rounded where that
      # is what decides: of stored moments in one of 10^4, whose momentum is a difference.
      limit = 1e-4 if moments_in == "float32" else 1e-3
      assert np.mean(np.abs(a - b) > 1e-5 * np.max(np.abs(b))) <= limit
